"""What every participant of a federation is given: keys, certificates, scripts."""
