"""What a save was called with, from the call to the commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from model_checkpoint.database.models import CheckpointRecord


class SaveCall(NamedTuple):
    """What a save was called with, and what else was true then.

    Attributes:
        record, details: what the user gave.
        experiment: what manifests tell of the experiment.
        hashed: whether to compute digests.
        started: when it was called, of ``time.perf_counter``.
        position: how many metric points there were; None: as many as there are at the commit.
        stall: seconds for which its caller was held up, once they are known; None where that waits for it to end.
    """

    record: CheckpointRecord
    details: Mapping[str, Any]
    experiment: Mapping[str, Any]
    hashed: bool
    started: float
    position: int | None = None
    stall: list[float] | None = None
