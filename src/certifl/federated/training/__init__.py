"""A client's local training: batches, steps, schedule, precision."""
