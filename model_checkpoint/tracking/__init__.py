"""Tracking experiments."""

from model_checkpoint.tracking.capture import Capture
from model_checkpoint.tracking.experiment_tracker import ExperimentTracker
from model_checkpoint.tracking.queries import Queries

__all__ = ["Capture", "ExperimentTracker", "Queries"]
