"""Saving when the process is told to end: once, at a safe point, and then it ends as the signal would have had it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint import background
from model_checkpoint.checkpoint.storage.base_backend import PlannedFile
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import ConfigurationError, Preempted
from model_checkpoint.hooks import HookEvent

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
STATE = {"weight": array("d", range(100))}


@pytest.fixture
def manager(
    tracker: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EnhancedCheckpointManager]:
    monkeypatch.setattr(background, "_watching", False)  # as where nothing was saved in the background yet
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None)
    yield manager
    for number, handler in before.items():
        signal.signal(number, handler)


def wanted(epoch: int = 7) -> dict[str, object]:
    return {"model": STATE, "epoch": epoch, "checkpoint_type": "preempted"}


def types(manager: EnhancedCheckpointManager) -> list[str]:
    return [row["checkpoint_type"] for row in manager.list_checkpoints()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_acted_upon_at_the_next_safe_point_once(
    manager: EnhancedCheckpointManager, number: signal.Signals
) -> None:
    manager.save_on_signal(wanted)
    manager.safe_point()
    assert types(manager) == []
    signal.raise_signal(number)
    signal.raise_signal(number)
    assert types(manager) == []
    with pytest.raises(Preempted) as ended:
        manager.safe_point()
    assert ended.value.code == 128 + number
    assert types(manager) == ["preempted"]
    assert manager.load_checkpoint(checkpoint_type="preempted")["model_state_dict"] == STATE
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    manager.safe_point()
    assert types(manager) == ["preempted"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_counts_as_a_safe_point_and_nothing_is_saved_twice(
    manager: EnhancedCheckpointManager, blocking: bool
) -> None:
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.save_checkpoint(STATE, checkpoint_type="own", blocking=blocking)
    assert manager.pending() == []
    assert types(manager) == ["own"]


def test_an_earlier_handler_is_called_in_place_of_an_exit(manager: EnhancedCheckpointManager) -> None:
    called: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: called.append(number))
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGUSR1)
    assert called == []
    manager.safe_point()
    assert called == [signal.SIGUSR1]
    assert types(manager) == ["preempted"]


def test_a_ctrl_c_can_be_watched_and_still_ends_as_one(manager: EnhancedCheckpointManager) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without it
    try:
        manager.save_on_signal(wanted, [signal.SIGINT])
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            manager.safe_point()
    finally:
        signal.signal(signal.SIGINT, before)
    assert types(manager) == ["preempted"]


def test_a_signal_during_the_save_does_no_harm(manager: EnhancedCheckpointManager) -> None:
    manager.save_on_signal(wanted)
    for event in (HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE):
        manager.register_hook(event.value, lambda _: signal.raise_signal(signal.SIGTERM), [event])
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Preempted) as ended:
        manager.safe_point()
    assert ended.value.code == 128 + signal.SIGUSR1
    assert types(manager) == ["preempted"]


def test_a_hook_that_saves_does_not_swallow_the_signal(manager: EnhancedCheckpointManager) -> None:
    def again(context: object) -> None:
        if context.data["checkpoint_type"] == "preempted":  # type: ignore[attr-defined]
            manager.save_checkpoint(STATE, checkpoint_type="inner")
            manager.safe_point()

    manager.register_hook("again", again, [HookEvent.AFTER_CHECKPOINT_SAVE])
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted", "inner"]


def test_a_safe_point_or_save_within_the_state_function_does_not_end_the_process(
    manager: EnhancedCheckpointManager,
) -> None:
    def state() -> dict[str, Any]:
        manager.safe_point()
        manager.save_checkpoint(STATE, checkpoint_type="inner")
        return wanted()

    manager.save_on_signal(state)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["inner", "preempted"]


@pytest.mark.parametrize("blocking", [True, False])
def test_saves_and_hooks_in_other_threads_leave_the_signal_to_the_main_thread(
    manager: EnhancedCheckpointManager, blocking: bool
) -> None:
    def again(context: object) -> None:
        if context.data["checkpoint_type"] == "other":  # type: ignore[attr-defined]
            manager.save_checkpoint(STATE, checkpoint_type="inner")
            manager.safe_point()

    manager.register_hook("again", again, [HookEvent.AFTER_CHECKPOINT_SAVE])
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    options = {"checkpoint_type": "other", "blocking": blocking}
    thread = threading.Thread(target=manager.save_checkpoint, args=(STATE,), kwargs=options)
    thread.start()
    thread.join(DEADLINE)
    manager.wait()
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["other", "inner", "preempted"]


def test_replacing_the_state_keeps_the_signal_that_came(manager: EnhancedCheckpointManager) -> None:
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    manager.save_on_signal(lambda: wanted(8))
    with pytest.raises(Preempted):
        manager.safe_point()
    assert [row["epoch"] for row in manager.list_checkpoints()] == [8]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_state_function_that_fails_is_asked_again_at_the_next_safe_point(manager: EnhancedCheckpointManager) -> None:
    broken = True

    def state() -> dict[str, object]:
        if broken:
            raise ZeroDivisionError
        return wanted()

    manager.save_on_signal(state)
    signal.raise_signal(signal.SIGTERM)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            manager.safe_point()
    broken = False
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted"]


def test_an_earlier_failure_in_the_background_does_not_keep_the_state_from_being_saved(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(type(manager._backend), "plan", refuse)
        manager.save_checkpoint(STATE, blocking=False)
        while manager.pending():
            pass
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted"]


def test_a_signal_during_the_wait_for_one_that_fails_still_saves_the_state(
    manager: EnhancedCheckpointManager,
) -> None:
    class Bad(SafeTensorsBackend):
        def plan(self, *arguments: object) -> list[PlannedFile]:
            if threading.current_thread() is not threading.main_thread():
                os.kill(os.getpid(), signal.SIGTERM)
                raise ValueError("bad disk")
            return super().plan(*arguments)  # type: ignore[arg-type]

    manager._backend = Bad()
    manager.save_on_signal(wanted)
    manager.save_checkpoint(STATE, blocking=False)
    with pytest.raises(Preempted):
        manager.save_checkpoint(STATE, checkpoint_type="last")
    assert types(manager) == ["last"]


def test_what_others_save_in_the_background_is_finished_at_sigterm_after_a_watch_has_ended(
    manager: EnhancedCheckpointManager, tracker: ExperimentTracker, tmp_path: Path
) -> None:
    manager.save_on_signal(wanted)
    with EnhancedCheckpointManager(tracker, tmp_path / "other") as other:
        other.save_checkpoint(STATE, blocking=False)
        manager.close()
        assert signal.getsignal(signal.SIGTERM) is background.end_after_saves
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_watch_after_one_whose_manager_is_gone_ends_the_process_in_its_own_way(
    manager: EnhancedCheckpointManager, tracker: ExperimentTracker, tmp_path: Path
) -> None:
    gone = EnhancedCheckpointManager(tracker, tmp_path / "gone")
    gone.save_on_signal(wanted)
    del gone
    gc.collect()
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted) as ended:
        manager.safe_point()
    assert ended.value.code == 128 + signal.SIGTERM
    assert types(manager) == ["preempted"]


def test_a_save_that_failed_in_the_background_is_not_called_durable(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "no space")

    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(type(manager._backend), "plan", refuse)
        with pytest.raises(Exception, match="no space"):
            manager.save_checkpoint(STATE, blocking=False)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted"]


@pytest.mark.parametrize("came", [True, False])
def test_closing_gives_the_signals_back_and_ends_by_one_that_came(
    manager: EnhancedCheckpointManager, came: bool
) -> None:
    manager.save_on_signal(wanted)
    if came:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted), manager:
            pass
    else:
        manager.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_what_cannot_be_watched_is_refused_and_nothing_stays_changed(manager: EnhancedCheckpointManager) -> None:
    for signals in ([signal.SIGUSR1, signal.SIGKILL], [signal.SIGUSR1, 12345], [signal.SIGUSR1, "TERM"]):
        with pytest.raises(ConfigurationError, match="cannot be handled"):
            manager.save_on_signal(wanted, signals)  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(ConfigurationError, match="function"):
        manager.save_on_signal(STATE)  # type: ignore[arg-type]
    refused: list[BaseException] = []

    def elsewhere() -> None:
        try:
            manager.save_on_signal(wanted)
        except ConfigurationError as error:
            refused.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(DEADLINE)
    assert "main thread" in str(refused[0])


def test_a_signal_that_is_named_twice_is_watched_once(manager: EnhancedCheckpointManager) -> None:
    manager.save_on_signal(wanted, [signal.SIGTERM, signal.SIGTERM])
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.safe_point()


CHILD = """
import os, signal, sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

folder, number, background = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
state = {"weight": array("d", [0.0])}
with ExperimentTracker("preempted", database_url=f"sqlite:///{folder}/e.db") as tracker:
    print(tracker.experiment_id, flush=True)
    with EnhancedCheckpointManager(tracker, folder + "/c", async_save=background, max_checkpoints=None) as manager:
        manager.save_on_signal(lambda: {"model": state, "step": step, "checkpoint_type": "preempted"})
        for step in range(10**9):
            state["weight"][0] = step
            if step % 50 == 0:
                manager.save_checkpoint(state, step=step)
            if step == 60:
                print("ready", flush=True)
            manager.safe_point()
"""


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_child_that_is_told_to_end_saves_what_it_had_and_exits_as_shells_report_it(
    number: signal.Signals, background: bool, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(int(number)), str(background)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        experiment = child.stdout.readline().strip()
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, errors = child.communicate(timeout=DEADLINE)
    assert (child.returncode, errors) == (128 + number, "")
    url = f"sqlite:///{tmp_path}/e.db"
    with EnhancedCheckpointManager(None, tmp_path / "c", database_url=url) as manager:
        rows = manager.list_checkpoints()
        last = manager.load_checkpoint(experiment_id=experiment)
        assert last["model_state_dict"]["weight"][0] == last["step"] == rows[-1]["step"]
        assert [row["checkpoint_type"] for row in rows[:-1]] == ["regular"] * (len(rows) - 1)
        assert last["step"] >= 60
        assert manager._db.experiments.get(experiment).status == "interrupted"  # type: ignore[union-attr]


def test_managers_closed_in_any_order_leave_no_handler_that_swallows_signals(
    manager: EnhancedCheckpointManager, tracker: ExperimentTracker, tmp_path: Path
) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    other = EnhancedCheckpointManager(tracker, tmp_path / "other")
    manager.save_on_signal(wanted)
    other.save_on_signal(wanted)
    manager.close()
    other.close()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_manager_closed_by_another_thread_lets_the_next_signal_through(manager: EnhancedCheckpointManager) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    manager.save_on_signal(wanted)
    closer = threading.Thread(target=manager.close)
    closer.start()
    closer.join()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("wrong", [[signal.SIGTERM, signal.SIGKILL], [10.0], 5, None, ["TERM"], [2**70]])
def test_signals_that_cannot_be_handled_are_refused_and_what_was_set_before_holds_on(
    manager: EnhancedCheckpointManager, wrong: Any
) -> None:
    manager.save_on_signal(wanted, [signal.SIGTERM])
    with pytest.raises(ConfigurationError, match="holds on"):
        manager.save_on_signal(wanted, wrong)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted"]


def test_a_forked_child_ends_by_the_signal_that_its_parent_would_save_at(manager: EnhancedCheckpointManager) -> None:
    manager.save_on_signal(wanted)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, b"r")
        while True:
            signal.pause()
    assert os.read(ours, 1) == b"r"
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    os.close(ours)
    os.close(theirs)


def test_a_signal_that_was_ignored_is_saved_at_and_ignored_again(manager: EnhancedCheckpointManager) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    manager.save_on_signal(wanted)
    signal.raise_signal(signal.SIGUSR1)
    manager.safe_point()
    assert types(manager) == ["preempted"]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


@pytest.mark.parametrize("made", [None, 5, {"modle": STATE}, {}, {"model": STATE, "blocking": False, "x": 1}], ids=repr)
def test_a_state_function_that_returns_nonsense_is_named_and_may_be_replaced(
    manager: EnhancedCheckpointManager, made: Any
) -> None:
    manager.save_on_signal(lambda: made)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(
        ConfigurationError, match=r"save_on_signal\(\) must return a dict of save_checkpoint's arguments"
    ):
        manager.safe_point()
    assert types(manager) == []
    manager.save_on_signal(wanted)
    with pytest.raises(Preempted):
        manager.safe_point()
    assert types(manager) == ["preempted"]


@pytest.mark.parametrize("when", ["before it is gone", "after"])
def test_a_manager_that_is_gone_leaves_no_handler_that_swallows_signals(
    tracker: ExperimentTracker, tmp_path: Path, when: str
) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: called.append(number))
    try:
        dropped = EnhancedCheckpointManager(tracker, tmp_path / "c")
        dropped.save_on_signal(wanted)
        if when == "before it is gone":
            signal.raise_signal(signal.SIGUSR1)
            assert called == []
        del dropped
        gc.collect()
        if when == "after":
            signal.raise_signal(signal.SIGUSR1)
        assert called == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert called == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
