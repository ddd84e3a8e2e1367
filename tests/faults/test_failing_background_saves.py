"""Row 12: background saves that fail are told of once, everywhere; an end of the process loses none that is pending."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from common import DEADLINE, ROOT

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, register_storage_backend
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import SaveFailedError, StorageError
from model_checkpoint.hooks import HookContext, HookEvent

STATE = {"weight": array("d", range(100))}


class FaultyBackend(SafeTensorsBackend):
    """The standard format; fails while there is an error."""

    name: ClassVar[str] = "failing background"
    error: ClassVar[BaseException | None] = None

    def plan(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return super().plan(*arguments)


register_storage_backend("failing background", FaultyBackend)


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    FaultyBackend.error = None
    options = {"async_save": True, "max_pending_saves": 2, "max_checkpoints": None}
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", "failing background", **options)
    yield manager
    FaultyBackend.error = None
    manager._queue.wait()


def fail_one(manager: EnhancedCheckpointManager, error: BaseException | None = None) -> str:
    """Save in the background, in vain, and wait until it has failed without being told."""
    ended = threading.Event()
    manager.register_hook("ended", lambda _: ended.set(), [HookEvent.ON_CHECKPOINT_SAVE_FAILED])
    FaultyBackend.error = error or OSError(28, "No space left on device")
    failed = manager.save_checkpoint(STATE, epoch=99)
    assert ended.wait(DEADLINE)
    manager.unregister_hook("ended")
    FaultyBackend.error = None
    while manager.pending():  # the hook runs just before
        pass
    return failed


TELLERS: dict[str, Callable[[EnhancedCheckpointManager, str], object]] = {
    "the next save": lambda manager, _: manager.save_checkpoint(STATE),
    "the next blocking save": lambda manager, _: manager.save_checkpoint(STATE, blocking=True),
    "the next load": lambda manager, _: manager.load_checkpoint(),
    "the next load of an id": lambda manager, sound: manager.load_checkpoint(sound),
    "the next load in place": lambda manager, _: manager.load_into({"weight": array("d", bytes(800))}),
    "wait": lambda manager, _: manager.wait(),
    "wait with a timeout": lambda manager, _: manager.wait(timeout=0),
    "close": lambda manager, _: manager.close(),
    "the end of the with block": lambda manager, _: manager.__exit__(None, None, None),
}


@pytest.mark.parametrize("teller", TELLERS)
def test_a_failure_is_told_once_and_harms_nothing_else(
    manager: EnhancedCheckpointManager, teller: str, tmp_path: Path
) -> None:
    sound = manager.save_checkpoint(STATE, epoch=1, blocking=True)
    failed = fail_one(manager)
    with pytest.raises(SaveFailedError, match=f"{failed}.*No space left") as caught:
        TELLERS[teller](manager, sound)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.checkpoint_id == failed
    assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [sound]
    assert os.listdir(tmp_path / "c" / ".engine" / "staging") == []
    assert manager.wait()
    later = manager.save_checkpoint(STATE, epoch=2)
    assert manager.load_checkpoint()["epoch"] == 2
    assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [sound, later]
    manager.close()


def test_wait_for_an_id_raises_what_became_of_that_one_and_leaves_others(manager: EnhancedCheckpointManager) -> None:
    sound = manager.save_checkpoint(STATE)
    manager.wait(sound)
    failed = fail_one(manager)
    assert manager.wait(sound)
    with pytest.raises(SaveFailedError):
        manager.wait(failed)
    assert manager.wait()


@pytest.mark.parametrize("error", [OSError(5, "I/O"), StorageError("write", "f", OSError(5, "I/O"), ""), SystemExit(3)])
def test_the_hook_of_failures_fires_once_with_the_cause(
    manager: EnhancedCheckpointManager, error: BaseException
) -> None:
    told: list[HookContext] = []
    manager.register_hook("told", told.append, [HookEvent.ON_CHECKPOINT_SAVE_FAILED])
    FaultyBackend.error = error
    failed = manager.save_checkpoint(STATE, epoch=7)
    with pytest.raises(SaveFailedError) as caught:
        manager.wait()
    assert caught.value.__cause__ is error
    assert [context.checkpoint_id for context in told] == [failed]
    assert told[0].data["epoch"] == 7
    assert type(error).__name__ in told[0].data["error"]


def test_a_veto_and_a_refused_value_are_raised_by_the_call_itself(manager: EnhancedCheckpointManager) -> None:
    with pytest.raises(TypeError, match=r"model\.x"):
        manager.save_checkpoint({"x": object()})
    manager.register_hook("no", lambda _: False, [HookEvent.BEFORE_CHECKPOINT_SAVE])
    with pytest.raises(RuntimeError, match="vetoed"):
        manager.save_checkpoint(STATE)
    assert (manager.pending(), manager.wait()) == ([], True)


def test_an_error_in_the_block_is_seen_rather_than_that_of_a_save(manager: EnhancedCheckpointManager) -> None:
    fail_one(manager)
    with pytest.raises(ZeroDivisionError), manager:
        raise ZeroDivisionError


def test_a_disk_that_fills_up_fails_one_save_and_the_next_one_works(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, before[1]))
    try:
        manager.save_checkpoint({"w": array("d", bytes(24 << 20))})
        with pytest.raises(SaveFailedError) as caught:
            manager.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value.__cause__, StorageError)
    assert "model.safetensors" in str(caught.value.__cause__)
    assert os.listdir(tmp_path / "c" / ".engine" / "staging") == []
    assert manager.wait(manager.save_checkpoint(STATE))


def test_a_hook_that_closes_the_manager_does_not_hang_it(tmp_path: Path, tracker: ExperimentTracker) -> None:
    url = tracker.database.database_url
    manager = EnhancedCheckpointManager(None, tmp_path / "c", database_url=url, async_save=True)
    manager.register_hook("close", lambda _: manager.close(), [HookEvent.AFTER_CHECKPOINT_SAVE])
    manager.save_checkpoint(STATE, experiment_id=tracker.experiment_id)
    closing = threading.Thread(target=manager.close, daemon=True)
    closing.start()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    with EnhancedCheckpointManager(tracker, tmp_path / "c") as again:
        assert again.load_checkpoint()["model_state_dict"] == STATE


# The end of the process. What is told of comes from outside: the child prints each id when the call has returned.

CHILD = """
import atexit, os, signal, sys, threading, time
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, register_storage_backend
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend

class Held(SafeTensorsBackend):
    "Plans nothing until the program has come to its end."
    name = "held"
    ended = threading.Event()

    def plan(self, state, size):
        self.ended.wait(2)
        return super().plan(state, size)

register_storage_backend("held", Held)
folder, end = sys.argv[1:]
tracker = ExperimentTracker("end", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", "held", async_save=True, max_pending_saves=2, io_threads=3)
state = [{"w": array("d", [1.0]) * 600_000} for _ in range(3)]  # enough to be written by several threads

def save():
    print(manager.save_checkpoint(*state), flush=True)

if end == "atexit without a tracker":
    run = tracker.experiment_id
    tracker.close()
    manager = EnhancedCheckpointManager(
        None, folder + "/c", "held", database_url=f"sqlite:///{folder}/e.db", async_save=True
    )
    atexit.register(lambda: print(manager.save_checkpoint(*state, experiment_id=run), flush=True))
if end == "SIGTERM in a hook that saves elsewhere":
    other = EnhancedCheckpointManager(tracker, folder + "/c", async_save=True)
    once = []

    def save_elsewhere(context):
        if once:
            return
        once.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.001)  # until the main thread has met the signal
        print(other.save_checkpoint(*state), flush=True)

    manager.register_hook("elsewhere", save_elsewhere, ["after_checkpoint_save"])
if end == "handler":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
if not end.startswith("atexit"):
    save()
    save()
assert end.startswith("atexit") or len(manager.pending()) == 2
Held.ended.set()
if end == "exit":
    sys.exit(3)
if end == "error":
    raise ZeroDivisionError
if end == "with manager":
    with manager:
        pass
    assert manager.pending() == []
    os._exit(0)
if end == "with tracker":
    with tracker:
        pass
    assert manager.pending() == []
    os._exit(0)
if end == "nobody holds it":
    del manager, tracker
if end == "atexit":
    atexit.register(save)
if end == "SIGTERM in a hook that saves elsewhere":
    time.sleep(60)
if end in ("SIGTERM", "handler"):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
if end == "SIGTERM at exit":
    atexit.register(time.sleep, 1)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
if end == "SIGTERM in a loop":
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:
        save()
"""
ENDS = {
    "plain": 0,
    "exit": 3,
    "error": 1,
    "with manager": 0,
    "with tracker": 0,
    "nobody holds it": 0,
    "atexit": 0,
    "atexit without a tracker": 0,
    "SIGTERM in a hook that saves elsewhere": -signal.SIGTERM,
    "SIGTERM": -signal.SIGTERM,
    "handler": 5,
    "SIGTERM at exit": -signal.SIGTERM,
    "SIGTERM in a loop": -signal.SIGTERM,
}


def pythons() -> list[str]:
    """Return this interpreter, and others that pyenv has of the versions that are supported."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    others = [path / "bin" / "python" for v in (10, 11, 12, 13, 14) for path in sorted(versions.glob(f"3.{v}.*"))[:1]]
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}."
    return [sys.executable, *(str(path) for path in others if path.exists() and mine not in path.parts[-3])]


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_no_end_of_the_process_loses_a_save_that_is_pending(end: str, tmp_path: Path) -> None:
    for number, python in enumerate(pythons()):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [python, "-c", CHILD, str(folder), end]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE / 4)
        assert done.returncode == ENDS[end], (python, done.stderr)
        told = done.stdout.split()
        assert told, (python, done.stderr)
        with EnhancedCheckpointManager(None, folder / "c", database_url=f"sqlite:///{folder}/e.db") as manager:
            rows = [row["checkpoint_id"] for row in manager.list_checkpoints()]
            assert set(told[-10:]) <= set(rows), (python, done.stderr)  # retention keeps ten
            assert len(rows) <= len(told) + 1  # one more may not have been told of any more
            assert (
                manager.verify_experiment_integrity(rows and manager.list_checkpoints()[0]["experiment_id"])["failed"]
                == 0
            )


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a process 1 of one's own needs root")
def test_the_first_process_of_a_container_saves_and_ends_at_sigterm(tmp_path: Path) -> None:
    """The kernel does not end process 1 by a signal that it does not handle."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", CHILD, str(tmp_path), "SIGTERM"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE / 4)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    with EnhancedCheckpointManager(None, tmp_path / "c", database_url=f"sqlite:///{tmp_path}/e.db") as manager:
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == done.stdout.split()


INTERRUPTED = """
import faulthandler, random, signal, sys, threading
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

folder, seed, wanted = sys.argv[1:]
chance = random.Random(int(seed))
tracker = ExperimentTracker("interrupted", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", async_save=True, max_pending_saves=2, max_checkpoints=None)
state = {"w": array("d", bytes(800)), "x": array("d", bytes(2_000_000))}

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
told = [manager.save_checkpoint(state)]
interrupts = 0
while interrupts < int(wanted):
    faulthandler.dump_traceback_later(30, exit=True)  # a lock that was left taken
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.004))
        saved = manager.save_checkpoint(state)
        told.append(saved)
        manager.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
    other = threading.Thread(target=lambda: told.append(manager.save_checkpoint(state)))
    other.start()
    other.join()
    if interrupts % 50 == 0:
        assert manager.wait(told[-1])
manager.wait()
faulthandler.cancel_dump_traceback_later()  # gigabytes are verified
rows = [row["checkpoint_id"] for row in manager.list_checkpoints()]
assert set(told) <= set(rows), len(set(told) - set(rows))
assert manager.verify_experiment_integrity()["failed"] == 0
manager.close()
tracker.close()
# Python keeps note of a thread for ever whose start() was interrupted before there was one.
assert [t for t in threading.enumerate() if t.is_alive()] == [threading.main_thread()]
print("done")
"""


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_a_manager_that_goes_on_and_keeps_what_was_told(
    tmp_path: Path, chance: random.Random, effort: Callable[[int, int], int], tried: Callable[[int], None]
) -> None:
    interrupts = effort(150, 5000)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(chance.randrange(2**32)), str(interrupts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40 * DEADLINE)
    assert done.stdout == "done\n", done.stderr
    tried(interrupts)
