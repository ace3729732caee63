"""Checkpoints: loading, and what a loaded model can do."""
