"""A client of a federation: its images, decisions, state, ledger and answers."""
