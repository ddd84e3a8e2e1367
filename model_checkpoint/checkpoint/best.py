"""Which checkpoint is best: pure decisions over numbers.

A criterion is ``loss``, ``val_loss`` or ``metrics.<name>``. NaN is never best, and of two
that tie, the one whose save began first is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.criteria import MINIMISED


def direction(criterion: str, overrides: Mapping[str, str]) -> str:
    """Return ``min`` or ``max``: the override of the metric's name, else ``min`` for names that end like a loss."""
    name = criterion.removeprefix("metrics.")
    return overrides.get(name) or ("min" if name.lower().endswith(MINIMISED) else "max")


def check_overrides(overrides: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of ``best_metrics``.

    Raises:
        ConfigurationError: a direction is neither ``min`` nor ``max``.
    """
    for name, way in overrides.items():
        if way not in ("min", "max"):
            raise ConfigurationError(f"best_metrics[{name!r}] must be 'min' or 'max', not {way!r}")
    return dict(overrides)


def scores_of(record: CheckpointRecord) -> dict[str, float]:
    """Return the criteria in which a checkpoint competes, with its values; NaN does not compete."""
    if not record.update_best:
        return {}
    found = {"loss": record.loss, "val_loss": record.val_loss}
    for name, value in record.metrics.items():
        found[f"metrics.{name}"] = value
    scores = {}
    for criterion, score in found.items():
        if score is not None and score == score:
            scores[criterion] = score
    return scores


def flags_taken(
    record: CheckpointRecord,
    holders: Mapping[str, float],
    younger: Collection[str] = (),
    *,
    overrides: Mapping[str, str],
) -> dict[str, float]:
    """Return the criteria that a new checkpoint takes from their holders, with its values.

    Args:
        record: the new checkpoint.
        holders: criterion -> value of the checkpoint that is best so far.
        younger: the criteria whose holder began after ``record`` did; of these it takes a tie, too.
        overrides: metric name -> ``min`` or ``max``.
    """
    taken = {}
    for criterion, value in scores_of(record).items():
        held = holders.get(criterion)
        better = held is None or (value < held if direction(criterion, overrides) == "min" else value > held)
        if better or (value == held and criterion in younger):
            taken[criterion] = value
    return taken


def elect(records: Iterable[CheckpointRecord], overrides: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Return criterion -> (id, value) of the best over a whole history in the order of its saves."""
    best: dict[str, tuple[str, float]] = {}
    for record in records:
        held = {criterion: value for criterion, (_, value) in best.items()}
        taken = flags_taken(record, held, overrides=overrides)
        best.update({criterion: (record.id, value) for criterion, value in taken.items()})
    return best


def with_sound_holders(records: Sequence[CheckpointRecord], overrides: Mapping[str, str]) -> list[CheckpointRecord]:
    """Return the records, with flags added to the best that can be loaded where a holder is corrupt.

    So retention keeps both: the holder, whose files may come back, and the best of the rest.
    """
    if not any(record.best and record.status == "corrupt" for record in records):
        return list(records)
    sound: dict[str, set[str]] = {}
    for criterion, (holder, _) in elect((r for r in records if r.status != "corrupt"), overrides).items():
        sound.setdefault(holder, set()).add(criterion)
    return [replace(record, best=record.best | sound.get(record.id, set())) for record in records]
