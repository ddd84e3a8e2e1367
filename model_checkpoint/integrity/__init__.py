"""Digests, manifests and verification."""

from model_checkpoint.integrity.verification import CheckpointVerifier, ChecksumCalculator

__all__ = ["CheckpointVerifier", "ChecksumCalculator"]
