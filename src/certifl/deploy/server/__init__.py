"""The server of a federation: who takes part, rounds, what comes back."""
