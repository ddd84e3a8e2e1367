"""Checkpoints: state to disk and back."""
