"""Built-in hooks that say which checkpoints to keep, which is the best, and when to save.

They advise: the manager removes, and what is pinned, protected, newest or best by its own flags stays in any case.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.utils.checks import check_count, check_positive
from model_checkpoint.utils.criteria import MINIMISED

__all__ = ["BestModelSelectionHook", "SaveDecisionHook", "SmartCheckpointRetentionHook"]

log = logging.getLogger(__name__)
_HOUR, _DAY = 3600.0, 86_400.0
# Of checkpoints of up to this age, one in each so many seconds stays. The last goes on for ever.
_THINNING = ((_HOUR, 0.0), (_DAY, _HOUR), (30 * _DAY, _DAY), (float("inf"), 30 * _DAY))
STRATEGIES = ("performance", "time", "hybrid")


class Checkpoints(Protocol):
    """What these hooks ask of a manager; ``EnhancedCheckpointManager`` has it."""

    @property
    def checkpoint_dir(self) -> Any:
        """Where its checkpoints are."""

    def list_checkpoints(self, experiment_id: str | None = None) -> list[dict[str, Any]]:
        """Return them in the order of their saves."""


class _Record(Protocol):
    """What a strategy looks at in a checkpoint; ``CheckpointRecord`` has it."""

    id: str
    created_at: float

    def score(self, criterion: str) -> float | None:
        """Return its value of a criterion."""


class SmartCheckpointRetentionHook(BaseHook):
    """Advises the manager which checkpoints to keep after each save; it removes nothing itself.

    Strategies:
        performance: the best ``keep`` by ``metric``. Checkpoints without a value of it, or with NaN, go first.
        time: the newest ``keep``, and what is left of the others when they are thinned out by age: all of the last
            hour, one an hour for a day, one a day for 30 days, one in 30 days after that.
        hybrid: the ``keep`` that are best by a mean of two ranks: by metric and by age, weighted with
            ``performance_weight`` and 1 - ``performance_weight``.

    Args:
        strategy: one of these.
        keep: how many, from 1.
        metric: ``loss``, ``val_loss`` or the name of a metric.
        mode: ``min`` or ``max``; None goes by the metric's name, as for the best flags; what the manager's
            ``best_metrics`` says is not known here.
        performance_weight: from 0 to 1.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    events = (HookEvent.BEFORE_RETENTION,)

    def __init__(
        self,
        strategy: str = "hybrid",
        keep: int = 10,
        metric: str = "val_loss",
        mode: str | None = None,
        performance_weight: float = 0.5,
        name: str | None = None,
        priority: int = HookPriority.NORMAL,
    ) -> None:
        super().__init__(name, priority=priority)
        if strategy not in STRATEGIES:
            raise ConfigurationError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
        check_count(keep=keep)
        _check_mode(mode)
        if not isinstance(performance_weight, (int, float)) or not 0 <= performance_weight <= 1:
            raise ConfigurationError(f"performance_weight must be from 0 to 1, not {performance_weight!r}")
        if not isinstance(metric, str):
            raise ConfigurationError(f"metric must be the name of one, not {metric!r}")
        self._strategy, self._keep = strategy, keep
        self._criterion, self._sign = _criterion(metric), _sign(metric, mode)
        self._weight = performance_weight

    def execute(self, context: HookContext) -> dict[str, Any]:
        """Return this as the policy of the pass."""
        return {"retention_policy": self}

    def keeps(self, records: Sequence[_Record], now: float) -> Mapping[str, str]:
        """Return checkpoint id -> why it stays; see ``RetentionPolicy``."""
        if self._strategy == "performance":
            return {r.id: f"one of the best {self._keep}" for r in self._ranked(records)[: self._keep]}
        if self._strategy == "time":
            newest = {r.id: f"one of the newest {self._keep}" for r in records[-self._keep :]}
            return {**_thinned(records[: -self._keep], now), **newest}
        by_metric = {record.id: place for place, record in enumerate(self._ranked(records))}
        by_age = {record.id: place for place, record in enumerate(reversed(records))}
        last = len(records)

        def mean(record: _Record) -> float:
            return self._weight * by_metric.get(record.id, last) + (1 - self._weight) * by_age[record.id]

        newest_first = list(reversed(records))
        best = sorted(newest_first, key=mean)[: self._keep]  # stable: of equals the newest
        return {record.id: f"among {self._keep} by metric and age" for record in best}

    def _ranked(self, records: Sequence[_Record]) -> list[_Record]:
        """Return those with a value, the best first, of equals the newest."""
        scored = [(record.score(self._criterion), record) for record in reversed(records)]
        real = [(self._sign * score, record) for score, record in scored if score is not None and score == score]
        return [record for _, record in sorted(real, key=lambda pair: pair[0])]


def _thinned(records: Sequence[_Record], now: float) -> dict[str, str]:
    """Return the oldest checkpoint of each window of time.

    The windows are fixed, and nest: what is left does not depend on how often this was asked.
    """
    kept: dict[str, str] = {}
    seen: set[tuple[float, float]] = set()
    for record in records:
        age = max(0.0, now - record.created_at)
        window = next(width for limit, width in _THINNING if age <= limit)
        slots = {width: (width, record.created_at // width) for _, width in _THINNING if width}
        if not window:
            kept[record.id] = "younger than an hour"
        elif slots[window] not in seen:
            kept[record.id] = f"the first in {window:g} s"
        seen.update(slots.values())
    return kept


class BestModelSelectionHook(BaseHook):
    """Ranks checkpoints by several criteria at once, keeps the best, and holds a link to the very best.

    The score of a checkpoint is the sum of its values, each times its weight, and times -1 where less is better; the
    highest is the best. Checkpoints that lack one of the criteria, or have NaN there, are not ranked.

    The link is a symbolic one in the experiment's folder, relative, so that the directory can be moved:
    ``<checkpoint_dir>/<experiment>/best``. It is replaced in one step. Where links cannot be made, a warning says so.

    Args:
        manager: whose checkpoints.
        criteria: ``loss``, ``val_loss`` or the name of a metric -> weight above 0.
        modes: criterion -> ``min`` or ``max``, where its name does not tell.
        top_k: how many of the best the manager is advised to keep.
        link: the link's name; None makes none.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    events = (
        HookEvent.AFTER_CHECKPOINT_SAVE,
        HookEvent.AFTER_CHECKPOINT_DELETE,
        HookEvent.BEFORE_RETENTION,
    )

    def __init__(
        self,
        manager: Checkpoints,
        criteria: Mapping[str, float],
        modes: Mapping[str, str] | None = None,
        top_k: int = 3,
        link: str | None = "best",
        name: str | None = None,
        priority: int = HookPriority.NORMAL,
    ) -> None:
        super().__init__(name, priority=priority)
        check_count(top_k=top_k)
        if not isinstance(criteria, Mapping) or not criteria or not all(isinstance(name, str) for name in criteria):
            raise ConfigurationError(f"criteria must be a dict of metrics and their weights, not {criteria!r}")
        check_positive(**{f"criteria: the weight of {name}": weight for name, weight in criteria.items()})
        for each, mode in (modes or {}).items():
            _check_mode(mode)
            if each not in criteria:
                raise ConfigurationError(f"modes has {each!r}, which is not among the criteria {', '.join(criteria)}")
        if link is not None and (
            not isinstance(link, str) or os.sep in link or link in ("", ".", "..") or "\0" in link
        ):
            raise ConfigurationError(f"link must be a plain name, not {link!r}")
        self._manager = manager
        self._weights = {
            each.removeprefix("metrics."): -_sign(each, (modes or {}).get(each)) * weight
            for each, weight in criteria.items()
        }
        self._top_k = top_k
        self._link = link

    def ranking(self, experiment_id: str | None = None) -> list[tuple[str, float]]:
        """Return (checkpoint id, score) of an experiment's checkpoints, the best first; of equals the older one."""
        listed = self._manager.list_checkpoints(experiment_id)
        scored = [(told["checkpoint_id"], self._score(told)) for told in listed if told["status"] == "committed"]
        return sorted([(i, s) for i, s in scored if s is not None], key=lambda pair: -pair[1])

    def execute(self, context: HookContext) -> dict[str, Any] | None:
        """Advise, or move the link."""
        ranking = self.ranking(context.experiment_id)
        if context.event is HookEvent.BEFORE_RETENTION:
            return {"keep": [checkpoint_id for checkpoint_id, _ in ranking[: self._top_k]]}
        if self._link is not None and context.experiment_id is not None:
            self._point(os.path.join(self._manager.checkpoint_dir, context.experiment_id), ranking)
        return {"best": ranking[0][0]} if ranking else None

    def _score(self, told: Mapping[str, Any]) -> float | None:
        values = {"loss": told["loss"], "val_loss": told["val_loss"], **told["metrics"]}
        if any(values.get(name) is None for name in self._weights):
            return None
        score = sum(float(values[name]) * weight for name, weight in self._weights.items())
        return score if score == score else None

    def _point(self, folder: str, ranking: Sequence[tuple[str, float]]) -> None:
        link = os.path.join(folder, str(self._link))
        if os.path.lexists(link) and not os.path.islink(link):
            raise ConfigurationError(f"{link} is there and no link; rename it, or give the hook another link=")
        try:
            if not ranking:
                if os.path.islink(link):
                    os.unlink(link)
            elif not os.path.islink(link) or os.readlink(link) != ranking[0][0]:
                beside = f"{link}.{uuid4()}"
                os.symlink(ranking[0][0], beside)
                os.replace(beside, link)
        except OSError as error:
            log.warning("the link %s to the best checkpoint could not be set: %s", link, error)


class SaveDecisionHook(BaseHook):
    """Says when a checkpoint is due.

    ::

        decision = SaveDecisionHook(every_minutes=10, on_spike=3.0, max_overhead=0.02)
        manager.register_hook(decision)
        for step, batch in enumerate(batches):
            loss = train(batch)
            if decision.should_save(step, loss=loss):
                manager.save_checkpoint(model, optimizer, step=step, loss=loss)

    Several reasons may be given; any of them is enough. ``max_overhead`` limits them all: for as long as one more save
    would make saves cost more than that share of the time, none is due, except on a spike. Alone, it makes a save due
    whenever that is not so, as CheckFreq does (Mohan et al., FAST 2021), from what saves really cost.

    Args:
        every_steps: a save is due this many steps after the last one.
        every_minutes: a save is due this many minutes after the last one.
        on_improvement: the name of a value given to ``should_save``; a save is due when it is better than ever.
        mode: ``min`` or ``max`` of that value; None goes by its name.
        on_spike: a save is due when ``loss`` is NaN, or above the median of the last 50 by this many times that, less
            one: 3.0 is three times a median above 0, and as far above one below. The checkpoint before it is kept from
            then on. Above 1.
        max_overhead: the share of the time that saves may hold training up, above 0 and below 1.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: no reason is given, or an argument cannot be used.
    """

    events = (HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.BEFORE_RETENTION)

    def __init__(  # noqa: PLR0913 - one for each reason
        self,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        on_improvement: str | None = None,
        mode: str | None = None,
        on_spike: float | None = None,
        max_overhead: float | None = None,
        name: str | None = None,
        priority: int = HookPriority.NORMAL,
    ) -> None:
        super().__init__(name, priority=priority)
        reasons = (every_steps, every_minutes, on_improvement, on_spike, max_overhead)
        if all(reason is None for reason in reasons):
            raise ConfigurationError("SaveDecisionHook: give at least one reason to save, such as every_minutes=10")
        if every_steps is not None:
            check_count(every_steps=every_steps)
        limits = {"every_minutes": every_minutes, "on_spike": on_spike, "max_overhead": max_overhead}
        check_positive(**{name: value for name, value in limits.items() if value is not None})
        if max_overhead is not None and max_overhead >= 1:
            raise ConfigurationError(f"max_overhead must be a share of the time, below 1, not {max_overhead!r}")
        if on_spike is not None and on_spike <= 1:
            raise ConfigurationError(f"on_spike must be above 1, not {on_spike!r}")
        _check_mode(mode)
        self._every_steps, self._every_seconds = every_steps, None if every_minutes is None else 60 * every_minutes
        self._watched, self._sign = on_improvement, 1 if on_improvement is None else _sign(on_improvement, mode)
        self._on_spike, self._max_overhead = on_spike, max_overhead
        self._only_overhead = all(reason is None for reason in reasons[:-1])
        self._began = self._saved_at = time.monotonic()
        self._saved_step: int | None = None
        self._best: float | None = None
        self._losses: deque[float] = deque(maxlen=50)
        self._saves, self._spent = 0, 0.0  # seconds for which saves have held training up
        self._last: dict[str | None, str] = {}  # experiment -> its newest checkpoint
        self._kept: set[str] = set()
        self._spiking = False

    def should_save(self, step: int, loss: float | None = None, **values: float) -> str | None:
        """Return why a checkpoint is due now, or None.

        Args:
            step: of training; the first call counts as the last save.
            loss: of the step, for ``on_spike``, and for ``on_improvement="loss"``.
            **values: others, for ``on_improvement``.
        """
        now = time.monotonic()
        if self._saved_step is None or step < self._saved_step:  # training went back to an earlier checkpoint
            self._saved_step = step
        values = values if loss is None else {**values, "loss": float(loss)}
        spike = self._is_spike(values.get("loss"))
        if spike:
            return self._due(step, now, spike)
        if self._max_overhead is not None and self._saves:
            with_one_more = self._spent + self._spent / self._saves
            if with_one_more > self._max_overhead * (now - self._began):
                return None
        reason = self._reason(step, now, values)
        return None if reason is None else self._due(step, now, reason)

    @property
    def overhead(self) -> float:
        """The share of the time since this was made for which saves have held training up."""
        return self._spent / max(1e-9, time.monotonic() - self._began)

    def execute(self, context: HookContext) -> dict[str, Any] | None:
        """Note what a save cost; or advise to keep the checkpoints from before spikes."""
        if context.event is HookEvent.BEFORE_RETENTION:
            return {"keep": sorted(self._kept)}
        self._spent += context.data["blocked_seconds"]
        self._saves += 1
        if self._saved_step is None or context.data["step"] > self._saved_step:  # one that nobody asked us about
            self._saved_step, self._saved_at = context.data["step"], time.monotonic()
        if context.checkpoint_id is not None:
            self._last[context.experiment_id] = context.checkpoint_id
        return None

    def _reason(self, step: int, now: float, values: Mapping[str, float]) -> str | None:
        value = None if self._watched is None else values.get(self._watched)
        if value is not None and value == value and (self._best is None or self._sign * (value - self._best) < 0):
            self._best = value
            return f"{self._watched} improved to {value:g}"
        if self._every_steps is not None and step - (self._saved_step or 0) >= self._every_steps:
            return f"{self._every_steps} steps"
        if self._every_seconds is not None and now - self._saved_at >= self._every_seconds:
            return f"{self._every_seconds / 60:g} minutes"
        return "within the overhead allowed" if self._only_overhead else None

    def _is_spike(self, loss: float | None) -> str | None:
        """Return what is wrong with the loss, once for each spike."""
        if self._on_spike is None or loss is None:
            return None
        middle = statistics.median(self._losses) if self._losses else 0.0
        if loss == loss and (not middle or loss - middle <= (self._on_spike - 1) * abs(middle)):
            self._losses.append(loss)
            self._spiking = False
            return None
        first, self._spiking = not self._spiking, True
        if first:
            self._kept |= set(self._last.values())
        return f"the loss went to {loss:g}" if first else None

    def _due(self, step: int, now: float, reason: str) -> str:
        self._saved_step, self._saved_at = step, now
        return reason


def _criterion(metric: str) -> str:
    return metric if metric in ("loss", "val_loss") else f"metrics.{metric.removeprefix('metrics.')}"


def _sign(metric: str, mode: str | None) -> int:
    """Return 1 where less is better, else -1."""
    return 1 if mode == "min" or (mode is None and metric.lower().endswith(MINIMISED)) else -1


def _check_mode(mode: object) -> None:
    if mode not in (None, "min", "max"):
        raise ConfigurationError(f"mode must be 'min', 'max' or None, not {mode!r}")
