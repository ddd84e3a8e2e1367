"""The built-in hooks that advise retention, rank checkpoints and say when to save."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks import HookContext, HookEvent, checkpoint_strategies
from model_checkpoint.hooks.checkpoint_strategies import (
    BestModelSelectionHook,
    SaveDecisionHook,
    SmartCheckpointRetentionHook,
)

MODEL = {"weights": b"\x01\x02\x03\x04"}
NAN = float("nan")
HOUR, DAY = 3600.0, 86_400.0
NOW = 1_000 * DAY


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    with (
        ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as tracker,
        EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None, save_best=False) as made,
    ):
        yield made


@dataclass
class Record:
    """What a strategy looks at."""

    id: str
    val_loss: float | None = None
    created_at: float = NOW
    metrics: dict[str, float] = field(default_factory=dict)

    def score(self, criterion: str) -> float | None:
        return self.val_loss if criterion == "val_loss" else self.metrics.get(criterion.removeprefix("metrics."))


def epochs(manager: EnhancedCheckpointManager) -> list[int]:
    return [told["epoch"] for told in manager.list_checkpoints()]


# --- retention ----------------------------------------------------------------------------------------------------


def test_the_performance_strategy_keeps_the_best_and_never_the_worst_for_lack_of_a_number() -> None:
    hook = SmartCheckpointRetentionHook("performance", keep=2)
    records = [Record("a", 0.3), Record("b", NAN), Record("c", 0.1), Record("d", None), Record("e", 0.2)]
    assert set(hook.keeps(records, NOW)) == {"c", "e"}
    more = SmartCheckpointRetentionHook("performance", keep=2, metric="accuracy")
    scored = [Record(name, metrics={"accuracy": value}) for name, value in (("a", 0.5), ("b", 0.9), ("c", 0.7))]
    assert set(more.keeps(scored, NOW)) == {"b", "c"}
    less = SmartCheckpointRetentionHook("performance", keep=2, metric="accuracy", mode="min")
    assert set(less.keeps(scored, NOW)) == {"a", "c"}


def test_the_time_strategy_thins_out_with_age() -> None:
    ages = [400 * DAY, 399 * DAY, 70 * DAY, 5 * DAY, 5 * DAY - 60, 5 * HOUR, 5 * HOUR - 60, 1800.0, 1700.0, 0.0]
    records = [Record(f"{age:g}", created_at=NOW - age) for age in ages]
    kept = SmartCheckpointRetentionHook("time", keep=1).keeps(records, NOW)
    assert [r.id for r in records if r.id not in kept] == [
        f"{age:g}" for age in (399 * DAY, 5 * DAY - 60, 5 * HOUR - 60)
    ]


def test_what_was_thinned_out_once_a_minute_is_what_is_thinned_out_at_the_end() -> None:
    """Which checkpoints are left must not depend on how often somebody looked."""
    hook = SmartCheckpointRetentionHook("time", keep=3)
    saved = [Record(str(minute), created_at=NOW + 60.0 * minute) for minute in range(3 * 24 * 60)]
    alive: list[Record] = []
    for record in saved:
        alive.append(record)
        kept = hook.keeps(alive, record.created_at)
        alive = [each for each in alive if each.id in kept]
    at_once = hook.keeps(saved, saved[-1].created_at)
    assert [r.id for r in alive] == [r.id for r in saved if r.id in at_once]
    assert 60 + 20 < len(alive) < 60 + 30  # those of an hour, one an hour for a day, and two days


def test_a_clock_that_jumped_back_takes_nothing_young() -> None:
    records = [Record("future", created_at=NOW + 100 * DAY), Record("now", created_at=NOW)]
    assert set(SmartCheckpointRetentionHook("time", keep=1).keeps(records, NOW)) == {"future", "now"}


def test_the_hybrid_strategy_weighs_metric_against_age() -> None:
    records = [Record(str(place), val_loss) for place, val_loss in enumerate([0.1, 0.5, 0.2, 0.6, 0.4])]
    by_metric = SmartCheckpointRetentionHook("hybrid", keep=2, performance_weight=1.0)
    by_age = SmartCheckpointRetentionHook("hybrid", keep=2, performance_weight=0.0)
    both = SmartCheckpointRetentionHook("hybrid", keep=2)
    assert set(by_metric.keeps(records, NOW)) == {"0", "2"}
    assert set(by_age.keeps(records, NOW)) == {"3", "4"}
    assert set(both.keeps(records, NOW)) == {"2", "4"}  # ranks by metric 0 3 1 4 2, by age 4 3 2 1 0


@pytest.mark.parametrize("strategy", ["performance", "time", "hybrid"])
def test_any_history_keeps_at_least_what_was_asked_for_and_a_reason_for_each(strategy: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(100):
        count = chance.randrange(1, 40)
        times = sorted(NOW - chance.expovariate(1 / (30 * DAY)) for _ in range(count))
        records = [Record(str(i), chance.choice([NAN, None, chance.random()]), at) for i, at in enumerate(times)]
        keep = chance.randrange(1, 10)
        kept = SmartCheckpointRetentionHook(strategy, keep=keep).keeps(records, NOW)
        scored = [r for r in records if r.val_loss is not None and r.val_loss == r.val_loss]
        assert len(kept) >= min(keep, len(scored) if strategy == "performance" else count)
        assert all(kept.values())
        assert kept.keys() <= {record.id for record in records}


def test_the_manager_does_what_the_hook_advises_and_keeps_what_is_protected(
    manager: EnhancedCheckpointManager,
) -> None:
    manager.register_hook(SmartCheckpointRetentionHook("performance", keep=2))
    for epoch, val_loss in enumerate([0.5, 0.1, 0.4, 0.2, 0.9]):
        checkpoint = manager.save_checkpoint(MODEL, epoch=epoch, val_loss=val_loss)
        if epoch == 0:
            manager.pin(checkpoint)
    assert epochs(manager) == [0, 1, 3, 4]  # pinned, the two best, the newest


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "best"}, "strategy"),
        ({"keep": 0}, "keep"),
        ({"mode": "low"}, "mode"),
        ({"performance_weight": 1.5}, "performance_weight"),
        ({"performance_weight": NAN}, "performance_weight"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        SmartCheckpointRetentionHook(**arguments)


# --- the best by several criteria ---------------------------------------------------------------------------------


def best_of(manager: EnhancedCheckpointManager) -> Path:
    assert manager._tracker is not None
    return Path(manager.checkpoint_dir) / manager._tracker.experiment_id / "best"


def test_the_link_follows_the_best_by_weighted_criteria(manager: EnhancedCheckpointManager) -> None:
    hook = BestModelSelectionHook(manager, {"val_loss": 1.0, "metrics.accuracy": 2.0}, top_k=2)
    manager.register_hook(hook)
    first = manager.save_checkpoint(MODEL, epoch=1, val_loss=0.5, metrics={"accuracy": 0.5})  # 0.5
    assert os.readlink(best_of(manager)) == first
    better = manager.save_checkpoint(MODEL, epoch=2, val_loss=0.5, metrics={"accuracy": 0.75})  # 1.0
    manager.save_checkpoint(MODEL, epoch=3, val_loss=0.25, metrics={"accuracy": 0.375})  # 0.5
    manager.save_checkpoint(MODEL, epoch=4, val_loss=NAN, metrics={"accuracy": 1.0})
    manager.save_checkpoint(MODEL, epoch=5, metrics={"accuracy": 1.0})
    assert os.readlink(best_of(manager)) == better
    assert (best_of(manager) / "checkpoint.json").is_file()
    ranked = hook.ranking()
    assert [checkpoint for checkpoint, _ in ranked][:2] == [better, first]  # of equals the older one
    assert [score for _, score in ranked] == [1.0, 0.5, 0.5]
    manager.delete_checkpoint(better)
    assert os.readlink(best_of(manager)) == first
    for checkpoint, _ in hook.ranking():
        manager.delete_checkpoint(checkpoint)
    assert not os.path.lexists(best_of(manager))
    assert manager.list_hooks()[0]["failures"] == 0


def test_the_link_harms_neither_recovery_nor_a_move_of_the_directory(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    manager.register_hook(BestModelSelectionHook(manager, {"loss": 1.0}))
    saved = manager.save_checkpoint(MODEL, loss=0.5)
    assert not manager.recover()
    assert not manager.rebuild_index()
    assert best_of(manager).is_symlink()
    linked = best_of(manager).relative_to(manager.checkpoint_dir)
    Path(manager.checkpoint_dir).rename(tmp_path / "moved")
    assert (tmp_path / "moved" / linked / "checkpoint.json").is_file()
    Path(tmp_path / "moved").rename(manager.checkpoint_dir)
    assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL


def test_retention_keeps_the_best_k(manager: EnhancedCheckpointManager) -> None:
    manager._max_checkpoints = 1
    manager.register_hook(BestModelSelectionHook(manager, {"accuracy": 1.0}, top_k=2, link=None))
    for epoch, accuracy in enumerate([0.5, 0.9, 0.4, 0.8, 0.1, 0.2]):
        manager.save_checkpoint(MODEL, epoch=epoch, metrics={"accuracy": accuracy})
    assert epochs(manager) == [1, 3, 5]  # the two best, and the newest
    assert not os.path.lexists(best_of(manager))


def test_what_is_no_link_is_never_replaced(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL, loss=0.5)
    best_of(manager).mkdir()
    (best_of(manager) / "mine").write_text("precious")
    manager.register_hook(BestModelSelectionHook(manager, {"loss": 1.0}))
    saved = manager.save_checkpoint(MODEL, loss=0.25)
    assert (best_of(manager) / "mine").read_text() == "precious"
    assert manager.list_hooks()[0]["failures"] == 1
    assert manager.load_checkpoint(saved)["loss"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"criteria": {}}, "criteria"),
        ({"criteria": {"loss": 0}}, "criteria"),
        ({"criteria": {"loss": True}}, "criteria"),
        ({"criteria": {"loss": 1.0}, "modes": {"loss": "up"}}, "mode"),
        ({"criteria": {"loss": 1.0}, "top_k": 0}, "top_k"),
        ({"criteria": {"loss": 1.0}, "link": "a/b"}, "link"),
        ({"criteria": {"loss": 1.0}, "link": ".."}, "link"),
        ({"criteria": {"loss": 1.0}, "link": 5}, "link"),
        ({"criteria": ["loss"]}, "criteria"),
        ({"criteria": {"loss": "1"}}, "weight of loss"),
        ({"criteria": {"loss": 1.0}, "modes": {"lossx": "min"}}, "lossx"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(
    manager: EnhancedCheckpointManager, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        BestModelSelectionHook(manager, **arguments)


# --- when to save -------------------------------------------------------------------------------------------------


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(checkpoint_strategies, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_so_many_steps() -> None:
    decision = SaveDecisionHook(every_steps=10)
    assert [step for step in range(100, 140) if decision.should_save(step)] == [110, 120, 130]


def test_every_so_many_minutes(clock: Clock) -> None:
    decision = SaveDecisionHook(every_minutes=5)
    due = []
    for minute in range(16):
        clock.now = 1000.0 + 60 * minute
        due += [minute] if decision.should_save(minute) else []
    assert due == [5, 10, 15]


def test_on_improvement_only() -> None:
    decision = SaveDecisionHook(on_improvement="val_loss")
    values = [0.5, 0.6, 0.4, NAN, 0.4, 0.3]
    assert [v for v in values if decision.should_save(0, val_loss=v)] == [0.5, 0.4, 0.3]
    assert decision.should_save(1) is None  # a step without that value
    rising = SaveDecisionHook(on_improvement="accuracy")
    assert [v for v in (0.5, 0.4, 0.6) if rising.should_save(0, accuracy=v)] == [0.5, 0.6]
    falling = SaveDecisionHook(on_improvement="accuracy", mode="min")
    assert [v for v in (0.5, 0.4, 0.6) if falling.should_save(0, accuracy=v)] == [0.5, 0.4]


@pytest.mark.parametrize("spike", [10.0, NAN, float("inf")])
def test_a_spike_is_saved_once_and_the_checkpoint_before_it_is_kept(
    manager: EnhancedCheckpointManager, spike: float
) -> None:
    manager._max_checkpoints = 1
    decision = SaveDecisionHook(every_steps=2, on_spike=3.0)
    manager.register_hook(decision)
    losses = [1.0, 0.9, 0.8, 0.8, 0.7, spike, spike, 0.6, 0.6, 0.6]
    reasons = {}
    for step, loss in enumerate(losses):
        reason = decision.should_save(step, loss=loss)
        if reason:
            reasons[step] = reason
            manager.save_checkpoint(MODEL, step=step, loss=loss)
    assert list(reasons) == [2, 4, 5, 7, 9]
    assert "the loss went to" in reasons[5]
    assert [told["step"] for told in manager.list_checkpoints()] == [4, 9]  # the one before it, and the newest


def test_losses_below_zero_have_spikes_too() -> None:
    """Log-likelihoods and lower bounds."""
    decision = SaveDecisionHook(on_spike=3.0)
    losses = [-1.0, -1.1, -1.2, -0.9, 0.5, 1.5, -1.0, -1.0, 8.0]
    assert [loss for loss in losses if decision.should_save(0, loss=loss)] == [1.5, 8.0]
    from_zero = SaveDecisionHook(on_spike=3.0)
    assert [loss for loss in (0.0, 0.001, 0.0) if from_zero.should_save(0, loss=loss)] == []


def test_a_save_that_nobody_asked_about_counts_and_going_back_does_not_stop_saving(
    manager: EnhancedCheckpointManager,
) -> None:
    decision = SaveDecisionHook(every_steps=5)
    manager.register_hook(decision)
    due = []
    for step in range(12):
        if decision.should_save(step):
            due.append(step)
            manager.save_checkpoint(MODEL, step=step)
        if step == 3:
            manager.save_checkpoint(MODEL, step=3)  # by hand
    assert due == [8]
    assert [step for step in range(4, 16) if decision.should_save(step)] == [9, 14]  # resumed at an earlier one


def test_a_save_that_becomes_durable_late_does_not_bring_the_next_one_forward() -> None:
    decision = SaveDecisionHook(every_steps=10)
    due = [step for step in range(25) if decision.should_save(step)]
    told = {"blocked_seconds": 0.1, "step": 10}
    decision.execute(
        HookContext(HookEvent.AFTER_CHECKPOINT_SAVE, told, "c", "e")
    )  # of the first, after the second is due
    due += [step for step in range(25, 45) if decision.should_save(step)]
    assert due == [10, 20, 30, 40]


def test_saves_stay_within_the_overhead_allowed(clock: Clock) -> None:
    decision = SaveDecisionHook(max_overhead=0.02)
    spent, saves = 0.0, []
    for step in range(10_000):
        clock.now += 1.0
        if decision.should_save(step):
            cost = 2.0 if step < 5_000 else 10.0  # saves become slower, as on a disk that fills up
            clock.now += cost
            spent += cost
            saves.append(step)
            decision.execute(
                HookContext(HookEvent.AFTER_CHECKPOINT_SAVE, {"blocked_seconds": cost, "step": step}, "c", "e")
            )
            if len(saves) > 1:
                assert decision.overhead <= 0.02 * 1.5  # of the first ones nobody knew what they cost
    assert 0.015 < spent / 10_000 <= 0.0205
    early = [b - a for a, b in pairwise(saves) if b < 5_000]
    late = [b - a for a, b in pairwise(saves) if a > 6_000]
    assert sum(late) / len(late) > 2 * sum(early) / len(early)


def test_the_overhead_limits_other_reasons_but_not_a_spike(clock: Clock) -> None:
    decision = SaveDecisionHook(every_steps=1, on_spike=2.0, max_overhead=0.1)
    decision.should_save(0, loss=1.0)
    clock.now += 1.0
    assert decision.should_save(1, loss=1.0) == "1 steps"
    decision.execute(HookContext(HookEvent.AFTER_CHECKPOINT_SAVE, {"blocked_seconds": 5.0, "step": 1}, "c", "e"))
    clock.now += 50.0
    assert decision.should_save(2, loss=1.0) is None
    assert "10" in str(decision.should_save(3, loss=10.0))
    clock.now += 60.0
    assert decision.should_save(4, loss=1.0) == "1 steps"


@pytest.mark.parametrize("blocking", [True, False])
def test_the_cost_of_a_save_is_what_the_manager_measured(manager: EnhancedCheckpointManager, blocking: bool) -> None:
    decision = SaveDecisionHook(max_overhead=0.5)
    manager.register_hook(decision)
    assert decision.overhead == 0
    manager.save_checkpoint(MODEL, blocking=blocking)
    assert manager.wait(timeout=20)
    assert 0 < decision.overhead <= 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "at least one reason"),
        ({"every_steps": 0}, "every_steps"),
        ({"every_minutes": 0}, "every_minutes"),
        ({"on_spike": -1}, "on_spike"),
        ({"on_spike": 1.0}, "on_spike"),
        ({"max_overhead": 1}, "max_overhead"),
        ({"max_overhead": "1%"}, "max_overhead"),
        ({"on_improvement": "x", "mode": "best"}, "mode"),
    ],
)
def test_a_decision_that_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        SaveDecisionHook(**arguments)
