"""Proof of the harness: engines that are broken on purpose, in a child only, are each caught by one of its checks.

What is changed is as low as it can be (``os.fsync``, ``os.rename``, ``os.write``, the statements that begin a
transaction), so that the mutants stay what they are when the engine changes.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_power_loss
from strace import CHANGING, MANY, Nursery, Step, needs_strace, sample
from test_failing_calls import failing, points_of, scenario_of
from test_killed_at_every_call import Store
from test_power_loss import Disk, build, survives

from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.database.sqlite import SQLiteDialect

pytestmark = [pytest.mark.slow, needs_strace]
disk = test_power_loss.disk
WRITERS, SAVES = 4, 12
Mutant = Callable[[], None]


# The mutants; each is called in the child, which imports this module


def _skip_syncs(wanted: Callable[[str, bool], bool]) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not wanted(os.readlink(f"/proc/self/fd/{descriptor}"), folder):
            real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def files_are_not_synced() -> None:
    _skip_syncs(lambda path, folder: not folder)


def the_manifest_is_not_synced() -> None:
    _skip_syncs(lambda path, folder: path.endswith("/checkpoint.json"))


def folders_are_not_synced_after_publication() -> None:
    _skip_syncs(lambda path, folder: folder and "/.engine" not in path)


def nothing_is_synced() -> None:
    _skip_syncs(lambda path, folder: True)


def durable_commits_are_not_synced() -> None:
    SQLiteDialect.begin = {**SQLiteDialect.begin, True: ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE")}


def commits_are_never_synced() -> None:
    SQLiteDialect.begin = dict.fromkeys((True, False), ("PRAGMA synchronous=OFF", "BEGIN IMMEDIATE"))


def transactions_are_deferred() -> None:
    SQLiteDialect.begin = {durable: (pragma, "BEGIN DEFERRED") for durable, (pragma, _) in SQLiteDialect.begin.items()}


def the_row_comes_before_publication() -> None:
    real_rename, real_save, put_off = os.rename, EnhancedCheckpointManager.save_checkpoint, []

    def rename(source: Any, target: Any) -> None:
        if "/staging/" in os.fspath(source):
            put_off.append((source, target))
        else:
            real_rename(source, target)

    def save_checkpoint(self: EnhancedCheckpointManager, *arguments: Any, **options: Any) -> str:
        saved = real_save(self, *arguments, **options)
        while put_off:
            real_rename(*put_off.pop())
        return saved

    os.rename = rename  # type: ignore[assignment]
    EnhancedCheckpointManager.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def _on_failed_sync(then: Callable[[int], object]) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        try:
            real(descriptor)
        except OSError:
            then(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def a_failed_sync_is_tried_again() -> None:
    _on_failed_sync(os.fsync)


def a_failed_sync_is_ignored() -> None:
    _on_failed_sync(lambda descriptor: None)


def short_writes_are_taken_for_whole() -> None:
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        real(descriptor, data)
        return memoryview(data).nbytes

    os.write = write  # type: ignore[assignment]


# The checks


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(tmp_path) as nursery:
        yield nursery


def patch_of(mutant: Mutant) -> list[tuple[str, str]]:
    return [(Path(__file__).stem, mutant.__name__)]


@pytest.mark.parametrize(
    ("mutant", "layout", "scenario"),
    [
        (files_are_not_synced, "checkpoints", "save"),
        (files_are_not_synced, "all", "save of large files"),
        (the_manifest_is_not_synced, "checkpoints", "save"),
        (folders_are_not_synced_after_publication, "checkpoints", "save"),
        (nothing_is_synced, "checkpoints", "first opening"),
        (durable_commits_are_not_synced, "database", "delete"),
        (commits_are_never_synced, "database", "delete"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_power_loss_finds_the_missing_sync(
    mutant: Mutant,
    layout: str,
    scenario: str,
    disk: Disk,
    tmp_path: Path,
    nursery: Nursery,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    ruin, before, steps = build(disk, tmp_path, layout, scenario)
    steps = [step for step in steps if step != ["close"]]  # the last close moves SQLite's log, with syncs of its own
    whole, found = survives(nursery, ruin, steps, before, None, patch_of(mutant))
    assert whole.failures == []
    caught = {None: found} if found else {}
    points = sample(whole, chance, effort(5, 10**9))
    for point in points:
        found = survives(nursery, ruin, steps, before, point, patch_of(mutant))[1]
        caught.update({point: found} if found else {})
    tried(len(points) + 1)
    assert caught
    point, found = next(iter(caught.items()))
    print(f"caught at {len(caught)} of {len(points) + 1} points, first at {point or 'the end'}: {found[0][:300]}")


def test_kills_find_that_the_row_comes_before_publication(
    tmp_path: Path, nursery: Nursery, chance: random.Random, tried: Callable[[int], None]
) -> None:
    patch = patch_of(the_row_comes_before_publication)
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    before: list[Step] = [["open"]]
    steps: list[Step] = [["save", 4], ["save", 5]]
    store.restore()
    whole = nursery.run(store.address, steps, before, mutants=patch)
    assert (whole.failures, store.violations(whole.words)) == ([], [])  # nothing but a crash shows it
    caught = {}
    points = [point for point in sample(whole, chance, 10**9) if point[0].startswith(("rename", "f"))]  # and syncs
    for name, number in points:
        store.restore()
        outcome = nursery.run(store.address, steps, before, [f"{name}:signal=SIGKILL:when={number}"], patch)
        if found := store.violations(outcome.words):
            caught[name, number] = found
    tried(len(points))
    assert caught
    print(f"caught at {list(caught)}: {next(iter(caught.values()))}")


@pytest.mark.parametrize("mutant", [a_failed_sync_is_tried_again, a_failed_sync_is_ignored])
def test_a_failing_call_finds_that_a_failed_sync_is_not_final(
    mutant: Mutant, tmp_path: Path, nursery: Nursery, tried: Callable[[int], None]
) -> None:
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    before, steps, _ = scenario_of(store, "save")
    store.restore()
    whole = nursery.run(store.address, steps, before, mutants=patch_of(mutant), traced=f"{CHANGING},close")
    syncs = [point for point in points_of(whole, store) if point[0] == "fsync"]
    caught = [p for p in syncs if failing(nursery, store, "save", p, "EIO", True, patch_of(mutant))[1]]
    tried(len(syncs))
    print(f"caught at {caught}")
    assert caught == syncs


def test_a_size_limit_finds_that_short_writes_are_taken_for_whole(tmp_path: Path, nursery: Nursery) -> None:
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    store.restore()
    patch = patch_of(short_writes_are_taken_for_whole)
    whole = nursery.run(store.address, [["save", MANY]], [["open"]], mutants=patch, traced="")
    assert whole.failures == []
    longest = max(file.stat().st_size for file in store.directory.glob("*/*/*.safetensors"))
    store.restore()
    steps: list[Step] = [["limit", longest - 1], ["save", MANY], ["limit", -1]]
    outcome = nursery.run(store.address, steps, [["open"]], mutants=patch, traced="")
    found = store.violations(outcome.words)
    print(outcome.failures, found)
    assert found


@pytest.mark.parametrize("mutant", [None, transactions_are_deferred], ids=["sound engine", "deferred"])
def test_several_writers_find_that_transactions_are_deferred(
    mutant: Mutant | None, tmp_path: Path, tried: Callable[[int], None]
) -> None:
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    store.restore()
    patch = [] if mutant is None else patch_of(mutant)

    def write(place: int) -> tuple[list[Any], list[Any]]:
        steps: list[Step] = [["save", 10 + place + WRITERS * i] for i in range(SAVES)]
        folder = tmp_path / str(place)
        folder.mkdir()
        with Nursery(folder) as nursery:
            outcome = nursery.run(store.address, [["open"], *steps, ["close"]], mutants=patch, traced="")
        return outcome.words, outcome.failures

    with ThreadPoolExecutor(WRITERS) as pool:
        ran = list(pool.map(write, range(WRITERS)))
    failures = [failure["text"] for _, failed in ran for _, failure in failed]
    problems = failures + store.violations([word for words, _ in ran for word in words])
    tried(WRITERS * SAVES)
    if mutant is None:
        assert problems == []
    else:
        assert any("locked" in problem for problem in problems)
        print(f"caught by {len(failures)} refused saves of {WRITERS * SAVES}: {failures[0]}")
