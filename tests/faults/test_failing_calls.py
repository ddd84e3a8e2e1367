"""Calls that fail: no space, I/O errors, interrupts and short writes, once and for good, at each call that can."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from strace import CHANGING, LARGE, MANY, WIDE, Call, Nursery, Outcome, Step, needs_strace
from test_killed_at_every_call import Store

pytestmark = [pytest.mark.slow, needs_strace]

AFTER = 8  # the epoch that is saved afterwards
GO_ON: list[Step] = [["save", AFTER], ["close"]]
# What is prepared, what the child does before, what is disturbed, and what must then work in the same process if that
# was once only.
SCENARIOS: dict[str, tuple[tuple[int, ...], list[Step], list[Step], list[Step]]] = {
    "save": ((1, 2, 3), [["open"]], [["save", 4]], GO_ON),
    "save in the background": ((1, 2, 3), [["open", {"async_save": True}]], [["save", 4]], GO_ON),
    "save of large files": ((1, 2, 3), [["open", {"max_shard_size": 9 << 20}]], [["save", LARGE]], GO_ON),
    "compressed save": ((1, 2, 3), [["open", {"enable_compression": True}]], [["save", 4]], GO_ON),
    "delete": ((1, 2, 3), [["open"]], [["delete", "victim"]], GO_ON),
    "retention": ((1, 2, 3, 4, 5), [["open", {"max_checkpoints": 2}]], [["save", 6]], GO_ON),
    "opening": ((1, 2, 3), [], [["open"]], [["open"], *GO_ON]),
    "first opening": ((), [], [["create"], ["open"]], [["create"], ["open"], *GO_ON]),
}
# A call that POSIX lets be interrupted is made again by Python; SQLite does not repeat a sync, and says so.
INTERRUPTIBLE = {"open", "openat", "write", "pwrite64", "writev", "pwritev", "fallocate", "ftruncate", "fsync"}


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(tmp_path) as nursery:
        yield nursery


def points_of(whole: Outcome, store: Store) -> list[tuple[str, int]]:
    """Return the calls that change the store or close what was written, one for each name and number.

    No ``close`` where there are several threads: it could be that of a lock in another run.
    """
    written = {call.paths[0] for call in whole.calls if call.name in ("write", "fsync") and call.paths}
    written = written if len({call.thread for call in whole.calls}) == 1 else set()
    points = []
    for call in whole.calls:
        paths = [path for path in call.paths if path.startswith(str(store.folder))]
        if paths and (paths[0] in written if call.name == "close" else call.changes):
            points.append(call.point)
    return list(dict.fromkeys(points))


def forms_of(point: tuple[str, int], error: str) -> list[bool]:
    """Return whether to let it fail once (True) and for good (False).

    Who is interrupted for good waits for ever. And strace skips the calls that it lets fail: a lock's file whose close
    fails would stay open, as with no real kernel.
    """
    return [True] if error == "EINTR" or point[0] == "close" else [True, False]


def some(points: list[tuple[str, int]], chance: random.Random, most: int) -> list[tuple[str, int]]:
    """Return at most so many points; each kind of call once before any comes twice."""
    mixed = chance.sample(points, len(points))
    seen: dict[str, int] = {}
    for name, _ in mixed:
        seen[name] = seen.get(name, 0)
    ranked = []
    for point in mixed:
        ranked.append((seen[point[0]], point))
        seen[point[0]] += 1
    return [point for _, point in sorted(ranked, key=lambda pair: pair[0])[:most]]


def problems_of(failure: dict[str, Any], store: Store, injected: str) -> list[str]:
    """Return what an error does not tell: it is one of ours, names a path of the store, and the cause."""
    if not failure["typed"]:
        return [f"not of the family: {failure}"]
    if failure["type"] == "SaveFailedError":  # of a save in the background: it carries what went wrong
        return problems_of(failure["cause"], store, injected)
    if failure["type"] == "DatabaseError":
        fine = store.database in failure["text"] and failure["cause"] is not None
    else:
        fine = str(failure["path"]).startswith(str(store.folder)) and failure["errno"] == getattr(errno, injected)
        fine = fine and failure["path"] in failure["text"] and os.strerror(failure["errno"]) in failure["text"]
    return [] if fine else [f"does not name path and cause: {failure}"]


def staged_in(call: Call) -> set[str]:
    """Return the ids of the checkpoints in whose staging folders the call is."""
    return {found[1] for path in call.paths if (found := re.search(r"/staging/([^/]+)", path))}


def false_durability(outcome: Outcome, database: str) -> list[str]:
    """Return files and folders whose sync failed, of a save that was acknowledged all the same.

    Linux reports a failed write-back once. Whoever syncs again is told that all is well, and the data are gone; only a
    file that was written again from the start can be trusted.
    """
    done = {word[1] for word in outcome.words if word[0] in ("saved", "deleted") and word[-1] != AFTER}
    if not done:
        return []
    # Threads share the calls differently each time: the failing one may be of the save after that.
    later = (place for place, call in enumerate(outcome.calls) if staged_in(call) - done)
    calls = outcome.calls[: next(later, None)]
    lost = []
    for place, call in enumerate(calls):
        if call.injected and call.name in ("fsync", "fdatasync"):
            path = call.paths[0]
            if path == os.path.dirname(database):
                continue  # SQLite ignores that its new log could not be entered in its folder
            rewritten = any(path in c.paths and "O_CREAT" in c.text for c in calls[place:])
            lost += [] if rewritten else [path]
    return lost


def failing(
    nursery: Nursery,
    store: Store,
    scenario: str,
    point: tuple[str, int],
    error: str,
    once: bool,
    mutants: Sequence[tuple[str, str]] = (),
) -> tuple[Outcome, list[str]]:
    """Disturb the scenario at one call; return how it went and what broke a promise."""
    before, steps, after = scenario_of(store, scenario)
    retains = scenario == "retention"
    store.restore()
    when = f"{point[1]}..{point[1] + 2}" if error == "EINTR" else f"{point[1]}" if once else f"{point[1]}+"
    inject = [f"{point[0]}:error={error}:when={when}"]
    outcome = nursery.run(store.address, steps + after * once, before, inject, mutants, f"{CHANGING},close")
    found = [problem for _, failure in outcome.failures for problem in problems_of(failure, store, error)]
    if not retains and error != "EINTR":  # what retention cannot do, it does later; what was interrupted is done again
        found += false_durability(outcome, store.database)
    if once:
        staged = os.listdir(store.directory / ".engine" / "staging")
        found += [f"left in staging: {staged}"] if staged else []
        done = [word[1] for word in outcome.words if word[0] == "done"]
        again = len({call.thread for call in outcome.injected}) > 1  # strace counts anew in each thread
        fine = again or done[-len(after) :] == [verb for verb, *_ in after]
        found += [] if fine else [f"then failed: {outcome.failures}"]
    refused = any("StorageError" in str(failure) for _, failure in outcome.failures)
    if once and refused and "save" in scenario:  # what was refused must not appear later
        words = [word for word in outcome.words if word[0] != "saving"]
    else:
        words = outcome.words
    return outcome, found + store.violations(words, retains)


def scenario_of(store: Store, scenario: str) -> tuple[list[Step], list[Step], list[Step]]:
    _, before, steps, after = SCENARIOS[scenario]
    return before, [[verb, *(store.id_of(2) if a == "victim" else a for a in more)] for verb, *more in steps], after


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EINTR"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_call_that_fails_gives_a_typed_error_or_success_and_harms_nothing(
    scenario: str,
    error: str,
    tmp_path: Path,
    nursery: Nursery,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    epochs = SCENARIOS[scenario][0]
    store = Store(tmp_path / "store").prepare(*epochs, max_checkpoints=2 if scenario == "retention" else None)
    store.restore()
    before, steps, _ = scenario_of(store, scenario)
    whole = nursery.run(store.address, steps, before, traced=f"{CHANGING},close")
    assert whole.failures == []
    points = points_of(whole, store)
    if error == "EINTR":
        points = [point for point in points if point[0] in INTERRUPTIBLE]
    hits, found = 0, []
    points = some(points, chance, effort(4 if "large" in scenario else 8, 10**9))
    forms = [(point, once) for point in points for once in forms_of(point, error)]
    tried(len(forms))
    for point, once in forms:
        outcome, problems = failing(nursery, store, scenario, point, error, once)
        hits += bool(outcome.injected)
        interrupted = [failure for _, failure in outcome.failures if error == "EINTR"]
        problems += [f"an interrupt was seen: {f}" for f in interrupted if f["type"] != "DatabaseError"]
        found += [(point, "once" if once else "for good", [c.text for c in outcome.injected[:1]], problems)] * bool(
            problems
        )
    assert found == []
    assert hits >= 0.8 * len(forms)  # threads share the calls differently each time


def test_short_writes_at_a_file_size_limit_give_typed_errors_and_show_nothing(
    tmp_path: Path,
    nursery: Nursery,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    """The kernel writes up to the limit and then refuses: in header, data, manifest and the database's log."""
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    refused: set[str] = set()
    count = 0
    for epoch, shard in ((MANY, 1 << 30), (WIDE, 8)):  # one file with a long header; many, so that the manifest is long
        before: list[Step] = [["open", {"max_shard_size": shard}]]
        store.restore()
        assert nursery.run(store.address, [["save", epoch]], before, traced="").failures == []
        sizes = sorted({file.stat().st_size for file in store.directory.glob("*/*/*") if file.is_file()})
        exact = [1, *(size + more for size in sizes[-2:] for more in (-1, 0))]
        random_ones = [
            int(2 ** chance.uniform(0, sizes[-1].bit_length())) for _ in range(effort(10 if epoch == MANY else 4, 300))
        ]
        for limit in exact + random_ones:
            count += 1
            store.restore()
            steps: list[Step] = [["limit", limit], ["save", epoch], ["limit", -1], *GO_ON]
            outcome = nursery.run(store.address, steps, before, traced="")
            found = [problem for _, failure in outcome.failures for problem in problems_of(failure, store, "EFBIG")]
            assert found == [], limit
            assert [verb for verb, _ in outcome.failures] in ([], ["save"]), limit
            assert os.listdir(store.directory / ".engine" / "staging") == [], limit
            assert store.violations(outcome.words) == [], limit
            refused |= {os.path.basename(str(f["path"] or f["type"])) for _, f in outcome.failures}
    tried(count)
    print("refused:", sorted(refused))
    assert {"model.safetensors", "checkpoint.json", "DatabaseError"} <= refused


def test_a_file_that_has_no_room_is_refused_before_it_is_written(tmp_path: Path, nursery: Nursery) -> None:
    """Large files reserve their space first; the limit stands for a disk that is nearly full."""
    store = Store(tmp_path / "store").prepare(1, 2, 3)
    store.restore()
    outcome = nursery.run(store.address, [["limit", 8 << 20], ["save", LARGE], ["limit", -1], *GO_ON], [["open"]])
    ((verb, failure),) = outcome.failures
    assert (verb, failure["type"], failure["errno"]) == ("save", "StorageError", errno.EFBIG)
    assert store.violations(outcome.words) == []
