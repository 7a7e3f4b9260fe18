"""Run folders and checkpoints: files that are whole or absent."""
