"""Crash-proof, verified checkpoints and experiment tracking for any ML framework.

The names below load on first use (PEP 562), so that importing the package costs a few milliseconds
and never imports a framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from model_checkpoint.checkpoint.diff import CheckpointDiff, TensorDiff
    from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
    from model_checkpoint.checkpoint.retention import (
        KeepBest,
        KeepEvery,
        KeepLast,
        KeepTypes,
        KeepWithinBytes,
        KeepYoungerThan,
    )
    from model_checkpoint.checkpoint.storage import register_storage_backend
    from model_checkpoint.performance.statistics import prometheus_text
    from model_checkpoint.tracking import Capture, ExperimentTracker, Queries
    from model_checkpoint.tracking.runs import resume_or_start

__all__ = [
    "Capture",
    "CheckpointDiff",
    "EnhancedCheckpointManager",
    "ExperimentTracker",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepTypes",
    "KeepWithinBytes",
    "KeepYoungerThan",
    "Queries",
    "TensorDiff",
    "__version__",
    "prometheus_text",
    "register_storage_backend",
    "resume_or_start",
]

_POLICIES = ("KeepBest", "KeepEvery", "KeepLast", "KeepTypes", "KeepWithinBytes", "KeepYoungerThan")
_HOME = {
    **dict.fromkeys(_POLICIES, "model_checkpoint.checkpoint.retention"),
    **dict.fromkeys(("CheckpointDiff", "TensorDiff"), "model_checkpoint.checkpoint.diff"),
    "EnhancedCheckpointManager": "model_checkpoint.checkpoint.enhanced_manager",
    **dict.fromkeys(("Capture", "ExperimentTracker", "Queries"), "model_checkpoint.tracking"),
    "prometheus_text": "model_checkpoint.performance.statistics",
    "register_storage_backend": "model_checkpoint.checkpoint.storage",
    "resume_or_start": "model_checkpoint.tracking.runs",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
