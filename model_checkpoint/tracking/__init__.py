"""Tracking experiments."""

from model_checkpoint.tracking.experiment_tracker import ExperimentTracker

__all__ = ["ExperimentTracker"]
