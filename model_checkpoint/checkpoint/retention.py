"""Which checkpoints go and which stay, with the reason for each: pure decisions over records, oldest first.

A policy says what it keeps. ``KeepLast(3) | KeepBest(2, "accuracy")`` keeps what either keeps. Whatever the policy,
pinned checkpoints, protected types, the newest and the holders of best flags stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from model_checkpoint.checkpoint.best import direction
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError

Records = Sequence[CheckpointRecord]  # of one experiment, in the order of their saves


class Decision(NamedTuple):
    """What happens to one checkpoint: kept or removed, and why."""

    record: CheckpointRecord
    keep: bool
    reason: str


@dataclass(frozen=True)
class RetentionPlan:
    """What a retention pass does; making one changes nothing.

    Attributes:
        decisions: one for each checkpoint, oldest first.
    """

    decisions: tuple[Decision, ...]

    @property
    def kept(self) -> dict[str, str]:
        """Checkpoint id -> why it stays."""
        return {d.record.id: d.reason for d in self.decisions if d.keep}

    @property
    def removed(self) -> dict[str, str]:
        """Checkpoint id -> why it goes."""
        return {d.record.id: d.reason for d in self.decisions if not d.keep}

    @property
    def reclaimed(self) -> int:
        """Bytes of the files of those that go."""
        return sum(d.record.size for d in self.decisions if not d.keep)

    def __str__(self) -> str:
        lines = [
            f"{'keep  ' if d.keep else 'remove'}  {d.record.id}  epoch {d.record.epoch:<6} {d.reason}"
            for d in self.decisions
        ]
        return "\n".join([*lines, f"{len(self.removed)} of {len(lines)} go, {self.reclaimed:,} bytes reclaimed"])


class RetentionPolicy(Protocol):
    """Anything that says what to keep; ``|`` on the ones here makes the union."""

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        """Return checkpoint id -> reason of those that stay; the rest may go.

        Args:
            records: one experiment's checkpoints, oldest first.
            now: the time, in Unix seconds.
        """


class _Composable:
    def __or__(self, other: RetentionPolicy) -> KeepAny:
        if not callable(getattr(other, "keeps", None)):
            raise ConfigurationError(f"retention: {other!r} is no policy; it has no keeps()")
        return KeepAny((self, other))  # type: ignore[arg-type]


def _positive(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ConfigurationError(f"retention: {name} must be a positive number, not {value!r}")


def _count(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"retention: {name} must be an integer of at least 1, not {value!r}")


@dataclass(frozen=True)
class KeepAny(_Composable):
    """Keep what any of ``policies`` keeps."""

    policies: tuple[RetentionPolicy, ...]

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        kept: dict[str, str] = {}
        for policy in self.policies:
            kept = {**policy.keeps(records, now), **kept}
        return kept


@dataclass(frozen=True)
class KeepLast(_Composable):
    """Keep the newest ``n``, by the order of their saves, not by clock or step."""

    n: int

    def __post_init__(self) -> None:
        _count(n=self.n)

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        return {r.id: f"one of the last {self.n}" for r in records[-self.n :]}


@dataclass(frozen=True)
class KeepBest(_Composable):
    """Keep the best ``k`` by ``metric`` (``loss``, ``val_loss`` or a metric's name); NaN is never among them.

    ``mode`` is ``min`` or ``max``; None goes by the name, as for the best flags.
    """

    k: int
    metric: str
    mode: str | None = None

    def __post_init__(self) -> None:
        _count(k=self.k)
        if self.mode not in (None, "min", "max"):
            raise ConfigurationError(f"retention: mode must be 'min', 'max' or None, not {self.mode!r}")

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        sign = 1 if (self.mode or direction(self.metric, {})) == "min" else -1
        named = [(_score(r, self.metric), r.id) for r in records]
        ranked = sorted(
            (sign * value, i, id) for i, (value, id) in enumerate(named) if value is not None and value == value
        )
        return {id: f"one of the best {self.k} by {self.metric}" for _, _, id in ranked[: self.k]}


def _score(record: CheckpointRecord, metric: str) -> float | None:
    return record.score(metric if metric in ("loss", "val_loss") else f"metrics.{metric}")


@dataclass(frozen=True)
class KeepEvery(_Composable):
    """Keep the epochs or steps that are multiples of a number, or the first checkpoint of every so many minutes.

    Exactly one of ``epochs``, ``steps`` and ``minutes`` is given.
    """

    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None:
            _positive(minutes=self.minutes)
        _count(**{name: value for name, value in (("epochs", self.epochs), ("steps", self.steps)) if value is not None})
        if sum(value is not None for value in (self.epochs, self.steps, self.minutes)) != 1:
            raise ConfigurationError("retention: KeepEvery takes exactly one of epochs, steps and minutes")

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        if self.epochs is not None:
            return {r.id: f"every {self.epochs} epochs" for r in records if r.epoch % self.epochs == 0}
        if self.steps is not None:
            return {r.id: f"every {self.steps} steps" for r in records if r.step % self.steps == 0}
        first: dict[float, str] = {}
        for record in records:
            first.setdefault(record.created_at // (60 * (self.minutes or 1)), record.id)
        return dict.fromkeys(first.values(), f"first in {self.minutes:g} minutes")


@dataclass(frozen=True)
class KeepTypes(_Composable):
    """Keep every checkpoint of these types."""

    types: Collection[str]

    def __post_init__(self) -> None:
        if isinstance(self.types, str):
            raise ConfigurationError(f"retention: types must be a list of types, not the text {self.types!r}")

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        return {r.id: f"type {r.checkpoint_type}" for r in records if r.checkpoint_type in self.types}


@dataclass(frozen=True)
class KeepYoungerThan(_Composable):
    """Keep what was saved less than ``seconds`` ago; what a clock that jumped back puts in the future is young."""

    seconds: float

    def __post_init__(self) -> None:
        _positive(seconds=self.seconds)

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        return {r.id: f"younger than {self.seconds:g} s" for r in records if now - r.created_at < self.seconds}


@dataclass(frozen=True)
class KeepWithinBytes(_Composable):
    """Keep the newest as long as their files together stay within ``limit`` bytes."""

    limit: int

    def __post_init__(self) -> None:
        _count(limit=self.limit)

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        kept, used = {}, 0
        for record in reversed(records):
            used += record.size
            if used > self.limit:
                break
            kept[record.id] = f"within {self.limit:,} bytes"
        return kept


class Protection(NamedTuple):
    """What stays whatever the policy says: see the manager's arguments of the same names."""

    save_best: bool = True
    save_last: bool = True
    protected_types: Collection[str] = ()

    def reason(self, record: CheckpointRecord, newest: bool) -> str | None:
        """Return why ``record`` is protected, or None."""
        if record.status == "corrupt":
            return "corrupt: a copy of its files may bring it back"
        if record.pinned:
            return "pinned"
        if record.checkpoint_type in self.protected_types:
            return f"type {record.checkpoint_type} is protected"
        if self.save_best and record.best:
            return f"best {', '.join(sorted(c.removeprefix('metrics.') for c in record.best))}"
        return "the newest" if self.save_last and newest else None


def plan_by_policy(records: Records, policy: RetentionPolicy, protection: Protection, now: float) -> RetentionPlan:
    """Return the plan of a policy: what it keeps stays, and what is protected; the rest goes."""
    sound = [record for record in records if record.status != "corrupt"]
    kept = policy.keeps(sound, now)
    decisions = []
    for record in records:
        reason = protection.reason(record, newest=bool(sound) and record is sound[-1]) or kept.get(record.id)
        decisions.append(Decision(record, reason is not None, reason or "no rule keeps it"))
    return RetentionPlan(tuple(decisions))


def plan_by_count(
    records: Records, max_checkpoints: int | None, save_frequency: int, protection: Protection
) -> RetentionPlan:
    """Return the plan of the default rule.

    Nothing goes until there are more than ``max_checkpoints`` (None: never). Then the oldest that nothing protects goes
    first, epochs that are no multiple of ``save_frequency`` before those that are. Corrupt ones neither go nor count.
    """
    sound = [record for record in records if record.status != "corrupt"]
    excess = 0 if max_checkpoints is None else len(sound) - max_checkpoints
    protected = {r.id: protection.reason(r, newest=bool(sound) and r is sound[-1]) for r in records}
    candidates = [record for record in records if protected[record.id] is None]
    candidates.sort(key=lambda record: record.epoch % save_frequency == 0)  # stable: the oldest of each kind first
    doomed = {record.id for record in candidates[: max(0, excess)]}
    decisions = []
    for record in records:
        if record.id in doomed:
            periodic = record.epoch % save_frequency == 0
            kind = "periodic" if periodic else f"epoch is no multiple of {save_frequency}"
            reason = f"more than {max_checkpoints} checkpoints; {kind}, oldest first"
            decisions.append(Decision(record, False, reason))
        else:
            limit = "no limit is set" if max_checkpoints is None else f"within {max_checkpoints} checkpoints"
            decisions.append(Decision(record, True, protected[record.id] or limit))
    return RetentionPlan(tuple(decisions))


class _Advised(NamedTuple):
    """A policy that a hook has returned: whatever it raises, it is an error of the hook and ends nothing."""

    policy: RetentionPolicy
    hook: str

    def keeps(self, records: Records, now: float) -> Mapping[str, str]:
        try:
            return self.policy.keeps(records, now)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise RuntimeError(f"the policy of hook {self.hook!r} raised {error!r}") from error


def advice_of(answers: Mapping[str, object], policy: RetentionPolicy | None) -> tuple[RetentionPolicy | None, set[str]]:
    """Return the policy that hooks advise together, else ``policy``, and the ids that stay besides.

    Args:
        answers: hook -> what it returned: ``{"retention_policy": policy}``, ``{"keep": ids}``, or something else.
        policy: of the manager.

    Raises:
        ConfigurationError: a policy or ids that are none; the text names the hook.
    """
    policies: list[_Advised] = []
    kept: set[str] = set()
    for name, answer in answers.items():
        advice = answer if isinstance(answer, dict) else {}
        ids = advice.get("keep", ())
        if "retention_policy" in advice:
            policies.append(_Advised(advice["retention_policy"], name))
        good = isinstance(ids, (list, tuple, set, frozenset)) and all(isinstance(i, str) for i in ids)
        if not good or not all(callable(getattr(each.policy, "keeps", None)) for each in policies[-1:]):
            raise ConfigurationError(
                f"hook {name!r} must return a policy with keeps() and a list of ids to keep, not {answer!r:.200}"
            )
        kept.update(ids)
    return (KeepAny(tuple(policies)) if policies else policy), kept
