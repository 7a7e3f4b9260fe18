"""From a spec to results."""
