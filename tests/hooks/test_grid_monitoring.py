"""Grids of runs: progress, runs that died, and who does what; with processes that are killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, Queries
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import ClaimLostError, ConfigurationError, DatabaseError, UnsupportedValueError
from model_checkpoint.hooks import HookContext, HookEvent, HookManager
from model_checkpoint.hooks.grid_monitoring import (
    Claim,
    ExperimentRecoveryHook,
    GridCoordinatorHook,
    GridProgressHook,
    read_progress,
)
from tests.hooks.grid_worker import STEPS, configurations
from tests.servers import KINDS, new_database

DEADLINE = 60.0
MODEL = {"weights": b"\x01\x02\x03\x04"}
WORKER = Path(__file__).with_name("grid_worker.py")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_grid_of_12_over_4_processes_of_which_one_is_killed_is_completed_once_each(url: str, tmp_path: Path) -> None:
    EnhancedDatabaseConnection(url).close()
    (tmp_path / "slow 0").touch()  # which the first worker finds, and waits in the middle of a run
    arguments = [sys.executable, str(WORKER), url, str(tmp_path), "5.0"]
    first = subprocess.Popen([*arguments, "0"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "at work\n"
    others = [subprocess.Popen([*arguments, str(n)], stdout=subprocess.PIPE, text=True) for n in (1, 2, 3)]
    first.send_signal(signal.SIGKILL)
    first.wait(DEADLINE)
    first.stdout.close()
    told = [line.split() for other in others for line in other.communicate(timeout=DEADLINE)[0].splitlines()]
    assert [other.returncode for other in others] == [0, 0, 0]
    done = {int(number): (int(attempt), int(begin)) for _, number, attempt, begin, _ in told}
    assert len(told) == 12
    assert sorted(done) == list(range(12))
    (killed,) = [number for number, (attempt, _) in done.items() if attempt == 2]
    assert done[killed][1] == 1  # it went on from the checkpoint of the worker that died
    assert len(set(map(tuple, told))) == 12
    finals = {int(number): float(final) for _, number, _, _, final in told}
    for number, config in enumerate(configurations()):
        expected = 10.0 * (1 - config["rate"] / 10) ** STEPS
        assert finals[number] == pytest.approx(expected)  # interrupted or not
    with Queries(url) as queries:
        runs = queries.search_experiments()
        assert [run.status for run in runs] == ["completed"] * 12  # nothing was begun anew
        assert sorted(run.config["seed"] for run in runs) == list(range(12))
    database = EnhancedDatabaseConnection(url)
    assert database.claims.counts("grid") == {"open": 0, "claimed": 0, "completed": 12, "failed": 0}
    database.close()
    progress = read_progress(tmp_path / "progress.jsonl", total=12)
    assert (progress["completed"], progress["failed"], progress["running"], progress["dead"]) == (12, 0, 0, 0)
    assert progress["eta_seconds"] == 0
    assert ExperimentRecoveryHook(tmp_path / "running").interrupted() == []


# --- claims -------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(url: str) -> Iterator[EnhancedDatabaseConnection]:
    made = EnhancedDatabaseConnection(url)
    yield made
    made.close()


def coordinator(database: EnhancedDatabaseConnection, count: int = 3, **options: Any) -> GridCoordinatorHook:
    return GridCoordinatorHook(database, "g", [{"n": number} for number in range(count)], **options)


def stand_still(database: EnhancedDatabaseConnection, worker: GridCoordinatorHook, claim: Claim) -> None:
    """Let a worker be as one whose process has been stopped for longer than its lease."""
    assert worker._beat is not None
    worker._beat.stop()
    assert database.claims.renew("g", claim.number, claim.holder, time.time() - 1)


def test_workers_get_different_configurations_until_none_is_left(database: EnhancedDatabaseConnection) -> None:
    first, second = coordinator(database), coordinator(database)
    claims = [first.claim(), second.claim()]
    assert [claim and (claim.number, claim.config, claim.attempt) for claim in claims] == [
        (0, {"n": 0}, 1),
        (1, {"n": 1}, 1),
    ]
    with pytest.raises(ConfigurationError, match="has not ended"):
        first.claim()
    first.release("completed")
    third = first.claim()
    assert third is not None
    assert third.number == 2
    assert first.counts() == {"open": 0, "claimed": 2, "completed": 1, "failed": 0}
    second.release("open")
    again = second.claim()
    assert again is not None
    assert (again.number, again.attempt) == (1, 2)
    first.release("completed")
    second.release("failed")
    assert first.claim() is None
    assert first.counts() == {"open": 0, "claimed": 0, "completed": 2, "failed": 1}


def test_many_threads_claim_each_configuration_once(database: EnhancedDatabaseConnection) -> None:
    got: list[int] = []

    def work() -> None:
        mine = coordinator(database, 40)
        while (claim := mine.claim()) is not None:
            got.append(claim.number)
            mine.release("completed")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(got) == list(range(40))


def test_a_claim_that_expired_goes_to_another_worker_and_its_first_one_cannot_end_it(
    database: EnhancedDatabaseConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = coordinator(database, 1), coordinator(database, 1)
    claimed = first.claim()
    assert claimed is not None
    stand_still(database, first, claimed)
    taken = second.claim()
    assert taken is not None
    assert (taken.number, taken.attempt) == (0, 2)
    with pytest.raises(ClaimLostError, match="another worker's"):
        first.release("completed")
    assert claimed.lost
    assert not taken.lost
    assert second.counts()["claimed"] == 1
    second.release("completed")
    assert second.counts()["completed"] == 1


def test_a_claim_is_renewed_while_its_worker_lives(file: str) -> None:
    database = EnhancedDatabaseConnection(file)
    first = coordinator(database, 1, lease=0.6)
    claim = first.claim()
    assert claim is not None
    seen: set[float] = set()
    until = time.monotonic() + DEADLINE
    while len(seen) < 4:  # it was put off three times
        assert time.monotonic() < until
        ((expires,),) = database.query("SELECT expires_at FROM claims")
        seen.add(expires)
    first.release("completed")
    assert first.claim() is None
    database.close()


def test_a_late_renewal_of_an_ended_claim_leaves_the_next_one_alone(
    database: EnhancedDatabaseConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = coordinator(database, 2)
    first = grid.claim()
    assert first is not None
    grid.release("completed")
    second = grid.claim()
    assert second is not None
    beat = grid._beat
    assert not grid._renew(first)  # which was under way
    assert (first.lost, second.lost, grid._beat is beat) == (False, False, True)
    assert beat is not None
    assert not beat._stop.is_set()
    grid.release("completed")
    assert beat._stop.is_set()


def test_the_end_of_a_claim_is_tried_again_where_the_database_refuses_it(
    database: EnhancedDatabaseConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = HookManager()
    grid = coordinator(database, 1)
    hooks.register_hook(grid)
    claim = grid.claim()
    assert claim is not None
    hooks.fire_hook(HookEvent.ON_EXPERIMENT_START, experiment_id="e", name="n")

    def refuse(*_: object) -> NoReturn:
        raise DatabaseError("locked")

    with monkeypatch.context() as patched:
        patched.setattr(database.claims, "end", refuse)
        hooks.fire_hook(HookEvent.ON_EXPERIMENT_END, experiment_id="e", status="completed")
    assert grid.counts()["claimed"] == 1
    assert grid._renew(claim) is False  # the next heartbeat ends it
    assert grid.counts()["completed"] == 1
    assert not claim.lost
    assert grid.claim() is None


def test_an_end_whose_answer_was_lost_is_no_loss(
    database: EnhancedDatabaseConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = coordinator(database, 1)
    claim = grid.claim()
    assert claim is not None
    end = database.claims.end

    def lose(*asked: Any) -> NoReturn:
        assert end(*asked)
        raise DatabaseError("the connection broke at the commit")

    with monkeypatch.context() as patched:
        patched.setattr(database.claims, "end", lose)
        with pytest.raises(DatabaseError, match="broke"):
            grid.release("completed")
    assert not grid._renew(claim)  # the next heartbeat
    assert not claim.lost
    assert grid.claim() is None
    assert not database.claims.end("g", 0, "somebody else", "completed")


def test_a_forked_worker_has_no_claim_and_its_end_is_not_its_parents(file: str, tmp_path: Path) -> None:
    """A data loader's process ends; the run and its claim go on."""
    code = """
import os, sys
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.hooks.grid_monitoring import GridCoordinatorHook
hooks, database = HookManager(), EnhancedDatabaseConnection(sys.argv[1])
ends = [HookEvent.ON_EXPERIMENT_END, HookEvent.ON_SYSTEM_SHUTDOWN]
hooks.register_hook("tell", lambda c: print(c.event.value, os.getpid() == parent, flush=True), ends)
grid = GridCoordinatorHook(database, "g", [{"n": 0}])
hooks.register_hook(grid)
parent = os.getpid()
grid.claim()
tracker = ExperimentTracker("run", database_url=sys.argv[1], hook_manager=hooks)
manager = EnhancedCheckpointManager(tracker, sys.argv[2])
if os.fork() == 0:
    assert grid._claim is None
    sys.exit(0)
os.wait()
assert grid.counts()["claimed"] == 1, grid.counts()
tracker.close()
assert grid.counts()["completed"] == 1, grid.counts()
manager.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, file, str(tmp_path / "c")], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["on_experiment_end True", "on_system_shutdown True"]


def test_whoever_waits_gets_what_a_dead_worker_left(file: str) -> None:
    database = EnhancedDatabaseConnection(file)
    first, second = coordinator(database, 1, lease=0.2), coordinator(database, 1, lease=0.2)
    claimed = first.claim()
    assert claimed is not None
    stand_still(database, first, claimed)
    taken = second.claim()  # waits for the lease to expire
    assert taken is not None
    assert taken.attempt == 2
    second.release("completed")
    database.close()


def test_after_the_last_attempt_a_configuration_has_failed(database: EnhancedDatabaseConnection) -> None:
    hooks = HookManager()
    grid = coordinator(database, 1, attempts=2)
    hooks.register_hook(grid)
    for attempt in (1, 2):
        claim = grid.claim()
        assert claim is not None
        assert claim.attempt == attempt
        hooks.fire_hook(HookEvent.ON_EXPERIMENT_START, experiment_id="e", name="n")
        hooks.fire_hook(HookEvent.ON_EXPERIMENT_END, experiment_id="e", status="failed")
    assert grid.claim() is None
    assert grid.counts()["failed"] == 1
    dies = coordinator(database, 2, attempts=1)
    claimed = dies.claim()
    assert claimed is not None
    stand_still(database, dies, claimed)
    assert coordinator(database, 2, attempts=1).claim() is None
    assert grid.counts()["failed"] == 2


def test_the_first_experiment_after_a_claim_is_the_claims_and_others_are_not(file: str) -> None:
    hooks, database = HookManager(), EnhancedDatabaseConnection(file)
    grid = coordinator(database, 1)
    hooks.register_hook(grid)
    with ExperimentTracker("before", database_url=file, hook_manager=hooks):
        assert grid.claim() is not None
    assert grid.counts()["claimed"] == 1
    with ExperimentTracker("it", database_url=file, hook_manager=hooks) as tracker:
        tracker.child("a part of it").close()
        assert grid.counts()["claimed"] == 1
    assert grid.counts()["completed"] == 1
    assert hooks.list_hooks()[0]["failures"] == 0
    database.close()


def test_a_grid_cannot_be_another_one_under_the_same_name(database: EnhancedDatabaseConnection) -> None:
    coordinator(database, 2)
    coordinator(database, 4)  # may grow
    with pytest.raises(ConfigurationError, match=r"place 1.*another name"):
        GridCoordinatorHook(database, "g", [{"n": 0}, {"n": 7}])
    with pytest.raises(UnsupportedValueError, match=r"configs\[1\]\.n"):
        GridCoordinatorHook(database, "h", [{"n": 0}, {"n": object()}])
    assert database.claims.counts("h") == {"open": 0, "claimed": 0, "completed": 0, "failed": 0}
    for wrong in ({"lease": 0}, {"lease": "1"}, {"lease": float("nan")}, {"lease": True}, {"attempts": 0}):
        with pytest.raises(ConfigurationError):
            coordinator(database, 4, **wrong)
    for configs in ([5], {"n": [0]}, None):
        with pytest.raises(ConfigurationError, match="configs"):
            GridCoordinatorHook(database, "g", configs)  # type: ignore[arg-type]
    for name in (5, "", " ", "x" * 2_000_000, "\ud800"):
        with pytest.raises((ConfigurationError, UnsupportedValueError), match="grid"):
            GridCoordinatorHook(database, name, [])  # type: ignore[arg-type]
    grid = coordinator(database, 4)
    assert grid.claim() is not None
    with pytest.raises(ConfigurationError, match=r"'done'|completed, failed, open"):
        grid.release("finished")
    grid.release("completed")


def test_the_end_of_a_run_waits_for_its_checkpoints(file: str, tmp_path: Path) -> None:
    """Otherwise its configuration could be completed and its last checkpoint lost."""
    told: list[str] = []
    hooks = HookManager()
    both = [HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.ON_EXPERIMENT_END]
    hooks.register_hook("order", lambda context: told.append(context.event.value), both)
    with ExperimentTracker("run", database_url=file, hook_manager=hooks) as tracker:
        EnhancedCheckpointManager(tracker, tmp_path / "c").save_checkpoint(MODEL, blocking=False)
    assert told == ["after_checkpoint_save", "on_experiment_end"]


# --- progress -----------------------------------------------------------------------------------------------------


def test_progress_is_noted_a_line_for_each_event_and_summed_up(file: str, tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    hooks = HookManager()
    hook = GridProgressHook(path, total=4)
    hooks.register_hook(hook)
    for number, status in enumerate(["completed", "completed", "failed"]):
        tracker = ExperimentTracker(f"run {number}", database_url=file, hook_manager=hooks)
        manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
        manager.save_checkpoint(MODEL, epoch=number, step=7)
        tracker.close(status)
    with ExperimentTracker("the last", database_url=file, hook_manager=hooks) as running:
        progress = hook.progress()
        assert (progress["total"], progress["completed"], progress["failed"]) == (4, 2, 1)
        assert (progress["running"], progress["dead"]) == (1, 0)
        assert 0 < progress["eta_seconds"] < DEADLINE
        assert progress["experiments"][running.experiment_id]["state"] == "running"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert [line["event"] for line in lines] == [*["started", "saved", "ended"] * 3, "started", "ended"]
    assert {(line["pid"], line["name"]) for line in lines} == {(os.getpid(), f"run {n}") for n in range(3)} | {
        (os.getpid(), "the last")
    }
    assert lines[1]["step"] == 7
    assert [line["status"] for line in lines if line["event"] == "ended"] == [
        "completed",
        "completed",
        "failed",
        "completed",
    ]
    assert hook.progress()["eta_seconds"] == 0


def test_a_run_whose_process_is_silent_is_dead_and_heartbeats_keep_it_alive(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    hooks = HookManager()
    hooks.register_hook(GridProgressHook(path, heartbeat=0.05))
    hooks.fire_hook(HookEvent.ON_EXPERIMENT_START, experiment_id="e", name="n")
    until = time.monotonic() + DEADLINE
    while path.read_text().count("heartbeat") < 3:
        assert time.monotonic() < until
        assert read_progress(path, patience=DEADLINE)["running"] == 1
    hooks.fire_hook(HookEvent.ON_EXPERIMENT_END, experiment_id="e", status="completed", seconds=1.0)
    late = {
        "time": time.time() - 100,
        "host": "elsewhere",
        "pid": 1,
        "event": "started",
        "experiment_id": "x",
        "name": "x",
    }
    with path.open("a") as file:
        file.write(json.dumps(late) + "\n")
    told = read_progress(path, patience=50)
    assert (told["completed"], told["dead"]) == (1, 1)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"time": 1.0, "host": "h", "pi')
    hooks = HookManager()
    hooks.register_hook(GridProgressHook(path))
    hooks.fire_hook(HookEvent.ON_EXPERIMENT_START, experiment_id="e", name="n")
    assert read_progress(path)["running"] == 1
    with path.open("a") as file:
        for line in ("{}", '{"time": "x"}', "[1]", "[" * 100_000, '{"time": 1, "host": [], "pid": null, "event": 5}'):
            file.write(f"{line}\n")
        for line in ({"event": "started"}, {"event": "ended", "experiment_id": "e", "seconds": None}):
            file.write(json.dumps({"time": 1.0, "host": "h", "pid": 1, **line}) + "\n")
    assert read_progress(path)["running"] == 1
    nothing = read_progress(tmp_path / "not there", total=3)
    assert (nothing["completed"], nothing["running"], nothing["eta_seconds"]) == (0, 0, None)
    for wrong in ({"total": 0}, {"heartbeat": 0}, {"heartbeat": "1"}):
        with pytest.raises(ConfigurationError):
            GridProgressHook(path, **wrong)


def test_runs_that_start_at_once_share_a_heartbeat_and_a_forked_child_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "progress.jsonl"
    hook = GridProgressHook(path, heartbeat=0.05)
    starts = [HookContext(HookEvent.ON_EXPERIMENT_START, {"name": "n"}, None, key) for key in "ab"]
    threads = [threading.Thread(target=hook.execute, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert hook._beat is not None
    pid = os.fork()
    if pid == 0:
        try:
            hook.execute(HookContext(HookEvent.ON_EXPERIMENT_START, {"name": "n"}, None, "c"))
            good = hook._beat is not None and list(hook._names) == ["c"]
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for key in "ab":
        end = {"status": "completed", "seconds": 1.0}
        hook.execute(HookContext(HookEvent.ON_EXPERIMENT_END, end, None, key))
    assert hook._beat is None


def test_lines_of_many_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    code = (
        "import sys\n"
        "from model_checkpoint.hooks import HookContext, HookEvent\n"
        "from model_checkpoint.hooks.grid_monitoring import GridProgressHook\n"
        "hook = GridProgressHook(sys.argv[1])\n"
        "for n in range(300):\n"
        "    data = {'name': sys.argv[2] * 500}\n"
        "    hook.execute(HookContext(HookEvent.ON_EXPERIMENT_START, data, None, f'{sys.argv[2]}{n}'))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    assert [writer.wait(DEADLINE) for writer in writers] == [0, 0, 0]
    runs = read_progress(path)["experiments"]
    assert len(runs) == 900
    assert all(run["name"] == experiment_id[0] * 500 for experiment_id, run in runs.items())


# --- runs that died -----------------------------------------------------------------------------------------------

DIES = """
import sys, threading
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.hooks import HookManager
from model_checkpoint.hooks.grid_monitoring import ExperimentRecoveryHook
hooks = HookManager()
hooks.register_hook(ExperimentRecoveryHook("running"))
ended = ExperimentTracker("ended", database_url="sqlite:///runs.db", hook_manager=hooks)
ended.close()
without = ExperimentTracker("without a checkpoint", database_url="sqlite:///runs.db", hook_manager=hooks)
tracker = ExperimentTracker("dies", database_url="sqlite:///runs.db", hook_manager=hooks)
manager = EnhancedCheckpointManager(tracker, "c")
for epoch in range(3):
    saved = manager.save_checkpoint({"epoch": epoch}, epoch=epoch, step=10 * epoch)
print(tracker.experiment_id, saved, flush=True)
threading.Event().wait()
"""


def test_runs_that_died_are_found_with_the_checkpoint_that_they_go_on_from(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", DIES], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    experiment_id, saved = process.stdout.readline().split()
    hook = ExperimentRecoveryHook(tmp_path / "running")
    assert hook.interrupted() == []  # they live
    with pytest.raises(ConfigurationError, match="goes on"):
        hook.forget(experiment_id)
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE)
    process.stdout.close()
    dies, without = hook.interrupted()
    assert (dies.experiment_id, dies.name, dies.checkpoint_id) == (experiment_id, "dies", saved)
    assert (dies.epoch, dies.step) == (2, 20)
    assert (without.name, without.checkpoint_id, without.step) == ("without a checkpoint", None, None)
    hooks = HookManager()
    hooks.register_hook(hook)
    url = f"sqlite:///{tmp_path}/runs.db"
    with ExperimentTracker.resume(experiment_id, url, hook_manager=hooks) as tracker:
        assert [run.name for run in hook.interrupted()] == ["without a checkpoint"]  # that one lives again
        manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
        assert manager.load_checkpoint(dies.checkpoint_id)["model_state_dict"] == {"epoch": 2}
    hook.forget(without.experiment_id)
    assert hook.interrupted() == []
    assert list((tmp_path / "running").iterdir()) == []


def test_a_forked_child_does_not_keep_a_dead_run_alive(tmp_path: Path) -> None:
    hook = ExperimentRecoveryHook(tmp_path)
    start = HookContext(HookEvent.ON_EXPERIMENT_START, {"name": "n"}, None, "e")
    reading, writing = os.pipe()
    waiting, going = os.pipe()
    pid = os.fork()
    if pid == 0:  # the run, whose child lives longer
        os.close(going)
        hook.execute(start)
        if os.fork() == 0:
            os.write(writing, b"1")
            os.read(waiting, 1)  # until the test is over
            os._exit(0)
        os._exit(1)
    os.close(waiting)
    os.waitpid(pid, 0)
    try:
        assert os.read(reading, 1) == b"1"
        assert [run.name for run in hook.interrupted()] == ["n"]
    finally:
        for end in (reading, writing, going):
            os.close(end)


def test_a_look_at_runs_that_died_does_not_keep_one_from_starting(tmp_path: Path) -> None:
    looks, starts = ExperimentRecoveryHook(tmp_path), ExperimentRecoveryHook(tmp_path)
    look = looks._lock("e", fcntl.LOCK_SH)
    assert look is not None
    timer = threading.Timer(0.1, os.close, [look])
    timer.start()
    starts.execute(HookContext(HookEvent.ON_EXPERIMENT_START, {"name": "n"}, None, "e"))
    timer.join(DEADLINE)
    assert "e" in starts._locks
    assert looks.interrupted() == []
    starts.execute(HookContext(HookEvent.ON_EXPERIMENT_END, {"status": "completed"}, None, "e"))


def test_a_damaged_note_is_passed_over_and_two_processes_do_not_share_one(tmp_path: Path) -> None:
    for number, content in enumerate(("{", "5", '{"name": 5}', "[" * 100_000)):
        (tmp_path / f"broken{number}.json").write_text(content)
    (tmp_path.parent / "precious.json").write_text("{}")
    first, second = ExperimentRecoveryHook(tmp_path), ExperimentRecoveryHook(tmp_path)
    assert first.interrupted() == []
    for wrong in ("../precious", "nope", ""):
        with pytest.raises(ConfigurationError, match="no note"):
            first.forget(wrong)
    assert (tmp_path.parent / "precious.json").exists()
    start = HookContext(HookEvent.ON_EXPERIMENT_START, {"name": "n"}, None, "e")
    end = HookContext(HookEvent.ON_EXPERIMENT_END, {"status": "completed"}, None, "e")
    first.execute(start)
    second.execute(start)  # goes on in both
    second.execute(end)
    assert (tmp_path / "e.json").exists()
    first.execute(end)
    assert not (tmp_path / "e.json").exists()
