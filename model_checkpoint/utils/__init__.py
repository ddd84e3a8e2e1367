"""Shared helpers without knowledge of checkpoints."""
