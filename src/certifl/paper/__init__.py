"""All that exists because of one paper: its figures, scales, claims and pages."""
