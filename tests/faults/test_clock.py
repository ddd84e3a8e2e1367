"""The clock jumps by years, forwards and backwards, between saves and during them.

Order is the order of the saves, never the clock's: ``latest``, ties of the best, and what retention calls the newest.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, reopen_without_database

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint.retention import KeepEvery, KeepLast, KeepYoungerThan, RetentionPolicy
from model_checkpoint.hooks import HookContext, HookEvent

time_machine = pytest.importorskip("time_machine")

Effort = Callable[[int, int], int]
Tried = Callable[[int], None]

# The moments around which clocks go wrong: before and at the epoch, the last of 31 and of 32 bits, the last year.
MOMENTS = [
    *(
        datetime(year, 1, 1, tzinfo=timezone.utc)
        for year in (1901, 1969, 1970, 1980, 2001, 2024, 2026, 2100, 2262, 9998)
    ),
    *(datetime.fromtimestamp(second, timezone.utc) for second in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32)),
]
YEAR = 365 * 86400.0


@pytest.fixture
def clock() -> Iterator[Any]:
    with time_machine.travel(MOMENTS[6], tick=True) as traveller:
        yield traveller


def jump(clock: Any, chance: random.Random) -> None:
    """To a moment of those, or by anything between a second and a century, either way."""
    if chance.random() < 0.5:
        clock.move_to(chance.choice(MOMENTS))
    else:
        by = chance.choice([1, 60, 3600, 86400, YEAR, 100 * YEAR]) * chance.uniform(-1, 1)
        if -60 * YEAR < time.time() + by < 7000 * YEAR:
            clock.shift(by)


def during(manager: EnhancedCheckpointManager, clock: Any, chance: random.Random) -> None:
    """Let the clock jump within saves, too: before anything is written, after, and when retention asks."""
    events = [HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.BEFORE_CHECKPOINT_DELETE]

    def hook(context: HookContext) -> None:
        if chance.random() < 0.5:
            jump(clock, chance)

    manager.register_hook("jump", hook, events)


def save(store: Store, epoch: int, loss: float | None = None) -> str:
    return store.save({"w": array("d", [epoch])}, epoch=epoch, loss=loss)


def epochs(manager: EnhancedCheckpointManager) -> list[int]:
    return [row["epoch"] for row in manager.list_checkpoints()]


RULES: dict[str, tuple[dict[str, Any], int]] = {  # arguments of the manager, and how many of the newest must stay
    "max_checkpoints": ({"max_checkpoints": 4, "save_best": False, "save_frequency": 1}, 4),
    "KeepLast": ({"retention_policy": KeepLast(4)}, 4),
    "KeepLast or young": ({"retention_policy": KeepLast(3) | KeepYoungerThan(3600)}, 3),
    "KeepLast or each hour": ({"retention_policy": KeepEvery(minutes=60) | KeepLast(2)}, 2),
    "KeepYoungerThan": ({"retention_policy": KeepYoungerThan(1)}, 1),
}


@pytest.mark.parametrize("rule", RULES)
def test_retention_never_removes_one_of_the_newest_wherever_the_clock_jumps(
    tmp_path: Path, clock: Any, chance: random.Random, effort: Effort, tried: Tried, rule: str
) -> None:
    options, newest = RULES[rule]
    store = Store(tmp_path, **options)
    during(store.manager, clock, chance)
    best, saves = (float("inf"), -1), effort(40, 1500)
    for epoch in range(saves):
        jump(clock, chance)
        loss = float(chance.randrange(20))
        save(store, epoch, loss)
        kept = epochs(store.manager)
        assert kept == sorted(kept), "listed in the order of the saves"
        assert kept[-newest:] == list(range(max(0, epoch + 1 - newest), epoch + 1))
        assert store.manager.load_checkpoint()["epoch"] == epoch
        best = min(best, (loss, epoch))
        if options.get("save_best", True):
            assert store.manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == best[1]
        elif rule == "max_checkpoints":
            assert len(kept) <= 4
    tried(saves)
    store.close()


def test_the_order_is_that_of_the_saves_and_a_new_database_has_it_from_the_manifests(
    tmp_path: Path, clock: Any, chance: random.Random, effort: Effort, tried: Tried
) -> None:
    store = Store(tmp_path, max_checkpoints=None)
    during(store.manager, clock, chance)
    count = effort(40, 400)
    for epoch in range(count):
        jump(clock, chance)
        save(store, epoch, float(chance.randrange(5)))
    assert epochs(store.manager) == list(range(count))
    for row in chance.sample(store.manager.list_checkpoints()[:-1], count // 4):  # so that the sequence has gaps
        store.manager.delete_checkpoint(row["checkpoint_id"])
    store.manager.empty_trash()
    rows = store.manager.list_checkpoints()
    assert sorted(rows, key=lambda row: row["created_at"]) != rows, "the clock never jumped back: nothing was tried"
    store.close()
    jump(clock, chance)
    with reopen_without_database(tmp_path) as manager:
        rebuilt = manager.list_checkpoints()
        told = ("checkpoint_id", "sequence", "epoch", "created_at", "loss", "best", "is_best_loss")
        assert [[row[name] for name in told] for row in rebuilt] == [[row[name] for name in told] for row in rows]
        experiment = rows[0]["experiment_id"]
        assert manager.load_checkpoint(experiment_id=experiment)["epoch"] == count - 1
        jump(clock, chance)
        manager.save_checkpoint({"w": array("d", [count])}, epoch=count, experiment_id=experiment)
        assert epochs(manager)[-1] == count, "what comes next is the newest in the new database, too"
        assert manager.load_checkpoint(experiment_id=experiment)["epoch"] == count
    tried(count)


@pytest.mark.parametrize("back", [1.0, 86400.0, 10 * YEAR, 50 * YEAR])
def test_what_a_clock_that_went_back_puts_in_the_future_stays_and_ages_again_when_it_is_right(
    tmp_path: Path, clock: Any, back: float
) -> None:
    """One bad clock must cost no checkpoint: what seems to come from the future is young, not expired."""
    policy: RetentionPolicy = KeepYoungerThan(3600)
    store = Store(tmp_path, retention_policy=policy)
    first = [save(store, epoch) for epoch in range(3)]
    clock.shift(-back)
    second = [save(store, epoch) for epoch in range(3, 6)]
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == first + second
    clock.shift(back + 7200)  # right again, two hours on: all are older than the hour now, but for the newest
    third = save(store, 6)
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == [third]
    clock.shift(-7200 - back)
    for checkpoint_id in (first + second)[-3:]:  # and a clock that goes back does not bring anything out of the trash
        assert checkpoint_id not in [row["checkpoint_id"] for row in store.manager.list_checkpoints()]
    store.close()


def test_a_clock_that_leaps_ahead_once_costs_what_the_policy_says_and_never_the_newest(
    tmp_path: Path, clock: Any
) -> None:
    store = Store(tmp_path, retention_policy=KeepLast(2) | KeepYoungerThan(86400))
    for epoch in range(6):
        save(store, epoch)
    clock.shift(30 * YEAR)
    save(store, 6)
    assert epochs(store.manager) == [5, 6]
    clock.shift(-30 * YEAR)
    for epoch in range(7, 10):
        save(store, epoch)
    assert epochs(store.manager) == [5, 6, 7, 8, 9]
    assert store.manager.load_checkpoint()["epoch"] == 9
    store.close()


def test_ties_of_the_best_go_to_the_earlier_save_whatever_the_clock_says(
    tmp_path: Path, clock: Any, chance: random.Random, effort: Effort, tried: Tried
) -> None:
    store, rounds = Store(tmp_path, max_checkpoints=None), effort(25, 300)
    during(store.manager, clock, chance)
    left: list[tuple[float, int, str]] = []
    for epoch in range(rounds):
        jump(clock, chance)
        loss = float(chance.randrange(3))
        left.append((loss, epoch, save(store, epoch, loss)))
        if len(left) > 3 and chance.random() < 0.5:  # when its holder goes, the flag passes on by the same rule
            gone = min(left)
            left.remove(gone)
            store.manager.delete_checkpoint(gone[2])
            jump(clock, chance)
        assert store.manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == min(left)[1]
        assert [row["epoch"] for row in store.manager.list_checkpoints() if row["is_best_loss"]] == [min(left)[1]]
    tried(rounds)
    store.close()


def test_removal_undeletion_verification_and_locks_do_not_depend_on_the_clock(
    tmp_path: Path, clock: Any, chance: random.Random, effort: Effort, tried: Tried
) -> None:
    """A deadline on the clock of the day would expire at once, or in a hundred years."""
    store, rounds = Store(tmp_path, max_checkpoints=2, save_best=False, save_frequency=1), effort(20, 200)
    during(store.manager, clock, chance)
    for epoch in range(rounds):
        saved = save(store, 2 * epoch)
        jump(clock, chance)
        store.manager.delete_checkpoint(saved)
        jump(clock, chance)
        store.manager.undelete(saved)
        jump(clock, chance)
        assert store.load(saved)["epoch"] == 2 * epoch
        assert store.manager.verify_experiment_integrity()["failed"] == 0
        verified_at = store.row(saved)["verification"]["verified_at"]
        assert abs(verified_at - time.time()) < YEAR, (
            "the last verification is the last one, not the one of the latest time"
        )
        store.manager.unpin(saved)
        jump(clock, chance)
        save(store, 2 * epoch + 1)
        assert epochs(store.manager) == [2 * epoch, 2 * epoch + 1]
    assert store.manager.empty_trash() > 0
    assert store.manager.list_trash() == []
    tried(rounds)
    store.close()


def test_who_waits_for_the_lock_waits_neither_less_nor_for_ever_when_the_clock_jumps(
    tmp_path: Path, clock: Any
) -> None:
    """A verification holds the lock, and a deletion of another manager waits for it, while the clock leaps."""
    store, asked, outcomes = Store(tmp_path), threading.Event(), []
    saved = [save(store, epoch) for epoch in range(2)]
    with EnhancedCheckpointManager(None, str(store.folder), database_url=store.url) as other:
        other.register_hook("asked", lambda context: asked.set(), [HookEvent.BEFORE_CHECKPOINT_DELETE])
        deletion = threading.Thread(target=lambda: outcomes.append(other.delete_checkpoint(saved[0])))

        def leap(count: int) -> None:
            if not asked.is_set():
                deletion.start()
                assert asked.wait(60)
                for years in (50, -90):
                    threading.Event().wait(0.2)  # it tries for the lock all the while; nothing tells of that
                    clock.shift(years * YEAR)

        assert store.manager.verify_experiment_integrity(on_bytes=leap)["failed"] == 0
        deletion.join(60)
    assert outcomes == [True]
    assert epochs(store.manager) == [1]
    store.close()


def test_metrics_and_experiments_keep_their_order(tmp_path: Path, clock: Any, chance: random.Random) -> None:
    url = f"sqlite:///{tmp_path}/e.db"
    made = []
    for number in range(10):
        jump(clock, chance)
        with ExperimentTracker(f"run {number}", database_url=url) as tracker:
            made.append(tracker.experiment_id)
            for step in range(10):
                tracker.log_metrics({"loss": float(step)}, step=step)
                jump(clock, chance)
    for experiment in made:
        with ExperimentTracker.resume(experiment, url) as tracker:
            history = tracker.get_metrics()
            assert [point["metric_value"] for point in history] == [float(step) for step in range(10)]
