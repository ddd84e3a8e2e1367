"""Rows as the rest of the engine sees them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_checkpoint.utils.jsonable import unescape

_COLUMNS = ("id", "experiment_id", "backend", "size", "created_at", "pinned", "sequence", "status", "manifest_sha256")
_CHECK = ("verified_at", "verified", "error", "files")
# What to select for ``record_of_row``, of a checkpoint c and its last verification v.
RECORD = ", ".join([*(f"v.{name}" for name in _CHECK), "c.details", *(f"c.{name}" for name in _COLUMNS)])


@dataclass(frozen=True)
class ExperimentRecord:
    """One experiment (a run).

    Attributes:
        id: UUID text.
        name, project: what the user called it and the group that it is in.
        parent_id: the experiment that it belongs under, or None.
        forked_from: the checkpoint that it went on from, or None.
        status: ``running``, ``completed``, ``failed`` or ``interrupted``.
        created_at, ended_at: Unix seconds; ``ended_at`` is None while it runs.
        config, metadata: JSON values by name.
        tags: JSON values, usually strings, in the order in which they were added.
    """

    id: str
    name: str
    project: str | None = None
    parent_id: str | None = None
    status: str = "running"
    created_at: float = 0.0
    ended_at: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[Any, ...] = ()
    forked_from: str | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint.

    Attributes:
        id, experiment_id: UUID texts.
        sequence: its place among the database's saves, in the order in which they began; None before that.
        status: ``saving``, ``committed``, ``corrupt``, ``failed`` or ``trashed``.
        checkpoint_type: the label that it was saved under.
        epoch, step: counts from the training loop.
        loss, val_loss, metrics: floats; NaN and the infinities included.
        config: JSON value given at the save, or None.
        size: bytes of its files.
        created_at: Unix seconds.
        pinned: whether the user protects it from removal.
        update_best: whether it competes for the best flags.
        best: the criteria that it holds: ``loss``, ``val_loss``, ``metrics.<name>``.
        manifest_sha256: the digest that its manifest carries; None until it is committed.
        verification: the last recorded outcome (``verified_at``, ``verified``, ``error``, ``files``), or None.
    """

    id: str
    experiment_id: str
    checkpoint_type: str = "regular"
    epoch: int = 0
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Any = None
    notes: str | None = None
    model_name: str | None = None
    backend: str = ""
    size: int = 0
    created_at: float = 0.0
    pinned: bool = False
    update_best: bool = True
    sequence: int | None = None
    status: str = "saving"
    best: frozenset[str] = frozenset()
    manifest_sha256: str | None = None
    verification: Mapping[str, Any] | None = None

    def score(self, criterion: str) -> float | None:
        """Return its value of ``loss``, ``val_loss`` or ``metrics.<name>``, or None where it has none."""
        if criterion == "loss":
            return self.loss
        if criterion == "val_loss":
            return self.val_loss
        return self.metrics.get(criterion.removeprefix("metrics."))


def decode_details(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``CheckpointRecord`` that ``checkpoints.details_of`` encoded."""
    scores = {name: None if details[name] is None else float(details[name]) for name in ("loss", "val_loss")}
    metrics = {name: float(value) for name, value in details["metrics"].items()}
    return {**details, **scores, "metrics": metrics, "config": unescape(details["config"])}


def record_of_row(row: Sequence[Any], best: Collection[str]) -> CheckpointRecord:
    """Return the record of the columns ``RECORD``, which holds the criteria ``best``.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the row is damaged.
    """
    check, details, plain = dict(zip(_CHECK, row)), row[len(_CHECK)], dict(zip(_COLUMNS, row[len(_CHECK) + 1 :]))
    plain["pinned"] = bool(plain["pinned"])
    for text in (plain["id"], plain["experiment_id"], *best):
        if not isinstance(text, str):  # a flipped bit can make a number of it
            raise TypeError(f"{text!r} stands where text was")
    verification = None
    if check["verified_at"] is not None:
        verification = {**check, "verified": bool(check["verified"]), "files": json.loads(check["files"])}
    return CheckpointRecord(
        **plain, **decode_details(json.loads(details)), best=frozenset(best), verification=verification
    )
