"""Where handlers run: with timeouts, as coroutines, in the background; and that none of it outlives its use."""

from __future__ import annotations

import asyncio
import builtins
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ConfigurationError, HookTimeoutError, HookVetoError
from model_checkpoint.hooks import BaseHook, HookContext, HookEvent, HookManager

DEADLINE = 20.0  # seconds that anything may take before it counts as hung
SHORT = 0.05  # a timeout that is meant to run out
BEFORE, AFTER = HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE
MODEL = {"weights": b"\x01\x02\x03\x04"}


@pytest.fixture
def hooks() -> HookManager:
    return HookManager()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    with (
        ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as tracker,
        EnhancedCheckpointManager(tracker, tmp_path / "checkpoints", max_checkpoints=None) as made,
    ):
        yield made


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What a hanging handler waits for; it comes when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def where(context: HookContext) -> dict[str, Any]:
    return {"thread": threading.current_thread()}


async def where_async(context: HookContext) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"thread": threading.current_thread(), "loop": asyncio.get_running_loop()}


# --- timeouts -----------------------------------------------------------------------------------------------------


def test_plain_handlers_run_in_the_caller_and_those_with_a_timeout_elsewhere(hooks: HookManager) -> None:
    hooks.register_hook("plain", where, [AFTER])
    hooks.register_hook("timed", where, [AFTER], timeout=DEADLINE)
    hooks.register_hook("async", where_async, [AFTER])
    hooks.register_hook("async too", where_async, [AFTER], timeout=DEADLINE)
    result = hooks.fire_hook(AFTER)
    assert result.success
    assert result.results["plain"]["thread"] is threading.current_thread()
    assert result.results["timed"]["thread"] is not threading.current_thread()
    assert result.results["async"]["thread"] is not threading.current_thread()
    assert result.results["async"] == result.results["async too"]  # one loop, one thread


@pytest.mark.parametrize("kind", ["plain", "coroutine", "coroutine that blocks"])
def test_a_handler_that_takes_too_long_has_failed_and_the_others_run(
    hooks: HookManager, never: threading.Event, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    async def sleeps(context: HookContext) -> None:
        await asyncio.sleep(1000)

    async def blocks(context: HookContext) -> None:
        never.wait()

    handler = {"plain": lambda context: never.wait(), "coroutine": sleeps, "coroutine that blocks": blocks}[kind]
    hooks.register_hook("slow", handler, [BEFORE], timeout=SHORT)
    hooks.register_hook("after", where_async, [BEFORE], timeout=DEADLINE)
    with caplog.at_level(logging.ERROR):
        result = hooks.fire_hook(BEFORE)
    assert isinstance(result.errors["slow"], HookTimeoutError)
    assert isinstance(result.errors["slow"], TimeoutError)
    assert list(result.results) == ["after"]  # also where the first event loop is blocked for good
    assert [r.getMessage() for r in caplog.records] == [
        "hook 'slow' failed at before_checkpoint_save; what it watches goes on"
    ]


def test_a_coroutine_that_takes_too_long_is_cancelled(hooks: HookManager) -> None:
    cancelled = threading.Event()

    async def sleeps(context: HookContext) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    hooks.register_hook("slow", sleeps, [AFTER], timeout=SHORT)
    hooks.fire_hook(AFTER)
    assert cancelled.wait(DEADLINE)


def test_three_timeouts_in_a_row_disable_a_hook_until_it_is_enabled(
    hooks: HookManager, never: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def sometimes(context: HookContext) -> None:
        if context.get("hang"):
            never.wait()

    hooks.register_hook("h", sometimes, [AFTER], timeout=SHORT)
    for hang in (True, True, False, True, True):  # never three in a row
        hooks.fire_hook(AFTER, hang=hang)
    assert hooks.list_hooks()[0]["enabled"]
    with caplog.at_level(logging.ERROR):
        hooks.fire_hook(AFTER, hang=True)
    assert not hooks.list_hooks()[0]["enabled"]
    assert "disabled" in caplog.records[-1].getMessage()
    assert hooks.fire_hook(AFTER).success
    assert hooks.get_performance_stats("h")["total_calls"] == 6
    hooks.enable_hook("h")
    assert hooks.fire_hook(AFTER).results == {"h": None}


def test_what_a_late_handler_does_to_its_context_is_not_seen_by_the_next(hooks: HookManager) -> None:
    go, done = threading.Event(), threading.Event()

    def late(context: HookContext) -> None:
        go.wait(DEADLINE)
        context.set("epoch", "changed")
        context.get("metrics")["poison"] = 1.0
        done.set()

    def after(context: HookContext) -> Any:
        go.set()
        assert done.wait(DEADLINE)
        return dict(context.data)

    hooks.register_hook("late", late, [AFTER], timeout=SHORT)
    hooks.register_hook("after", after, [AFTER])
    for _ in range(3):  # also when it is disabled with that
        go.clear(), done.clear()
        result = hooks.fire_hook(AFTER, epoch=1, metrics={"a": 0.5})
        assert result.get_result("after") == {"epoch": 1, "metrics": {"a": 0.5}}
    assert hooks.list_hooks()[0]["enabled"] is False


def test_a_timeout_needs_no_signal_and_no_main_thread(hooks: HookManager, never: threading.Event) -> None:
    hooks.register_hook("slow", lambda context: never.wait(), [AFTER], timeout=SHORT)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(hooks.fire_hook(AFTER)))
    thread.start()
    thread.join(DEADLINE)
    assert isinstance(results[0].errors["slow"], HookTimeoutError)


def test_errors_of_other_threads_come_as_they_are(hooks: HookManager) -> None:
    def wrong(context: HookContext) -> None:
        raise SystemExit("from a thread")

    async def wrong_async(context: HookContext) -> None:
        raise SystemExit("from the loop")

    async def interrupts(context: HookContext) -> None:
        raise KeyboardInterrupt

    hooks.register_hook("timed", wrong, [AFTER], timeout=DEADLINE)
    hooks.register_hook("async", wrong_async, [AFTER])
    hooks.register_hook("interrupts", interrupts, [AFTER])
    hooks.register_hook("last", where_async, [AFTER])
    result = hooks.fire_hook(AFTER)
    assert [type(error) for error in result.errors.values()] == [SystemExit, SystemExit, RuntimeError]
    assert list(result.results) == ["last"]  # the loop turns on


def test_a_task_that_a_handler_leaves_behind_cannot_end_the_loop(hooks: HookManager) -> None:
    async def leaves(context: HookContext) -> None:
        async def ends() -> None:
            raise SystemExit

        context.user_data["task"] = asyncio.get_running_loop().create_task(ends())

    hooks.register_hook("leaves", leaves, [AFTER])
    hooks.register_hook("last", where_async, [AFTER])
    for _ in range(3):
        assert hooks.fire_hook(AFTER).success


# --- coroutines ---------------------------------------------------------------------------------------------------


def test_a_coroutine_can_veto_a_save_with_a_reason(manager: EnhancedCheckpointManager) -> None:
    async def refuse(context: HookContext) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"continue": False, "reason": "no room"}

    manager.register_hook("refuse", refuse, [BEFORE])
    with pytest.raises(HookVetoError, match="no room"):
        manager.save_checkpoint(MODEL)
    assert manager.list_checkpoints() == []


def test_a_coroutine_of_a_plain_function_is_awaited(hooks: HookManager) -> None:
    hooks.register_hook("hidden", lambda context: where_async(context), [AFTER])
    assert "loop" in hooks.fire_hook(AFTER).results["hidden"]


def test_methods_of_an_object_may_be_coroutines(hooks: HookManager) -> None:
    class Both(BaseHook):
        def on_before_checkpoint_save(self, context: HookContext) -> str:
            return "plain"

        async def on_metric_threshold(self, context: HookContext) -> str:
            return "async"

    hooks.register_hook(Both())
    assert hooks.fire_hook(BEFORE).results == {"Both": "plain"}
    assert hooks.fire_hook(HookEvent.ON_METRIC_THRESHOLD).results == {"Both": "async"}
    assert hooks.list_hooks()[0]["events"] == ["before_checkpoint_save", "on_metric_threshold"]


def test_execute_gets_the_events_that_have_no_method(hooks: HookManager) -> None:
    class Mixed(BaseHook):
        events = (BEFORE, AFTER)

        def execute(self, context: HookContext) -> str:
            return "execute"

        def on_after_checkpoint_save(self, context: HookContext) -> str:
            return "method"

    hooks.register_hook(Mixed())
    assert hooks.fire_hook(BEFORE).results == {"Mixed": "execute"}
    assert hooks.fire_hook(AFTER).results == {"Mixed": "method"}


@pytest.mark.parametrize("timeout", [None, DEADLINE])
def test_a_coroutine_that_fires_an_event_with_coroutines_does_not_wait_for_itself(
    hooks: HookManager, timeout: float | None
) -> None:
    async def outer(context: HookContext) -> Any:
        return hooks.fire_hook(AFTER).get_result("inner")

    async def inner(context: HookContext) -> str:
        await asyncio.sleep(0)
        return "inner ran"

    hooks.register_hook("outer", outer, [BEFORE], timeout=timeout)
    hooks.register_hook("inner", inner, [AFTER], timeout=timeout)
    assert hooks.fire_hook(BEFORE).results == {"outer": "inner ran"}


@pytest.mark.parametrize("kind", ["coroutines", "saves", "a plain one with a timeout between"])
def test_coroutines_that_fire_events_of_coroutines_end_however_deep(
    hooks: HookManager, manager: EnhancedCheckpointManager, kind: str
) -> None:
    depth = 0

    async def deeper(context: HookContext) -> None:
        nonlocal depth
        depth += 1
        await asyncio.sleep(0)
        if depth < 5 and kind == "saves":
            manager.save_checkpoint(MODEL)
        elif depth < 5:
            hooks.fire_hook(AFTER if kind == "coroutines" else HookEvent.ON_ERROR)

    hooks.register_hook("deeper", deeper, [AFTER])
    hooks.register_hook("between", lambda context: hooks.fire_hook(AFTER), [HookEvent.ON_RECOVERY], timeout=DEADLINE)
    hooks.register_hook("before", lambda c: hooks.fire_hook(HookEvent.ON_RECOVERY), [HookEvent.ON_ERROR])
    manager.register_hook("deeper", deeper, [AFTER])
    if kind == "saves":
        manager.save_checkpoint(MODEL)
        assert len(manager.list_checkpoints()) == 5
    else:
        assert hooks.fire_hook(AFTER).success
    assert depth == 5


def test_a_coroutine_that_blocks_in_the_background_holds_no_other_manager_up(
    hooks: HookManager, never: threading.Event
) -> None:
    blocks = threading.Event()

    async def forever(context: HookContext) -> None:
        blocks.set()
        never.wait()

    other = HookManager()
    other.register_hook("forever", forever, [BEFORE], async_execution=True)
    other.fire_hook(BEFORE)
    assert blocks.wait(DEADLINE)
    hooks.register_hook("good", where_async, [AFTER])
    assert "loop" in hooks.fire_hook(AFTER).results["good"]
    never.set()
    assert other.wait(DEADLINE)


def test_an_event_loop_that_was_left_ends_with_what_blocked_it(hooks: HookManager) -> None:
    go, blocked = threading.Event(), []

    async def blocks(context: HookContext) -> None:
        blocked.append(threading.current_thread())
        go.wait(DEADLINE)

    hooks.register_hook("blocks", blocks, [AFTER], timeout=SHORT)
    hooks.fire_hook(AFTER)
    go.set()
    blocked[0].join(DEADLINE)
    assert not blocked[0].is_alive()


def test_coroutines_that_have_begun_on_a_loop_that_is_left_come_to_their_end(hooks: HookManager) -> None:
    begun, go, end = threading.Event(), threading.Event(), threading.Event()
    results: list[Any] = []

    async def waits(context: HookContext) -> str:
        begun.set()
        while not end.is_set():
            await asyncio.sleep(0.001)
        return "ended"

    async def blocks(context: HookContext) -> None:
        go.wait(DEADLINE)

    hooks.register_hook("waits", waits, [BEFORE])
    hooks.register_hook("blocks", blocks, [AFTER], timeout=SHORT)
    thread = threading.Thread(target=lambda: results.append(hooks.fire_hook(BEFORE).results))
    thread.start()
    assert begun.wait(DEADLINE)
    hooks.fire_hook(AFTER)  # and the loop is left
    go.set()
    end.set()
    thread.join(DEADLINE)
    assert results == [{"waits": "ended"}]


# --- the background -----------------------------------------------------------------------------------------------


def test_the_event_does_not_wait_for_the_background(hooks: HookManager) -> None:
    go, ran = threading.Event(), []

    def slow(context: HookContext) -> bool:
        assert go.wait(DEADLINE)
        ran.append(context.get("epoch"))
        return False  # too late for a veto

    hooks.register_hook("slow", slow, [BEFORE], async_execution=True)
    result = hooks.fire_hook(BEFORE, epoch=7)
    assert (result.success, result.stopped_by, result.results) == (True, None, {})
    assert not hooks.wait(SHORT)
    go.set()
    assert hooks.wait(DEADLINE)
    assert ran == [7]
    assert hooks.get_performance_stats("slow")["successful_calls"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_run_at_once_as_there_are_workers(workers: int) -> None:
    hooks = HookManager(max_workers=workers)
    together = threading.Barrier(workers + 1)
    most, running, lock = 0, 0, threading.Lock()

    def work(context: HookContext) -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        if context.get("number") < workers:
            together.wait(DEADLINE)
        with lock:
            running -= 1

    hooks.register_hook("work", work, [AFTER], async_execution=True)
    for number in range(5 * workers):
        hooks.fire_hook(AFTER, number=number)
    together.wait(DEADLINE)
    assert hooks.wait(DEADLINE)
    assert most == workers
    assert hooks.get_performance_stats("work")["failed_calls"] == 0


def test_failures_in_the_background_are_logged_counted_and_told(
    hooks: HookManager, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []

    async def broken(context: HookContext) -> None:
        raise OSError("no network")

    handler = lambda error, context: told.append((type(error), context.event))  # noqa: E731
    hooks.register_hook("broken", broken, [AFTER], async_execution=True, error_handler=handler)
    hooks.register_hook("errors", lambda context: told.append(context.data["hook"]), [HookEvent.ON_ERROR])
    with caplog.at_level(logging.ERROR):
        assert hooks.fire_hook(AFTER).success
        assert hooks.wait(DEADLINE)
    assert told == [(OSError, AFTER), "broken"]
    assert len(caplog.records) == 1
    assert hooks.get_performance_stats("broken")["failed_calls"] == 1


def test_a_timeout_in_the_background_frees_its_worker(hooks: HookManager, never: threading.Event) -> None:
    hooks = HookManager(max_workers=1)
    hooks.register_hook("hangs", lambda context: never.wait(), [BEFORE], timeout=SHORT, async_execution=True)
    hooks.register_hook("next", where, [AFTER], async_execution=True)
    hooks.fire_hook(BEFORE)
    hooks.fire_hook(AFTER)
    assert hooks.wait(DEADLINE)
    assert hooks.get_performance_stats("next")["successful_calls"] == 1
    assert hooks.get_performance_stats("hangs")["failed_calls"] == 1


def test_the_background_is_bounded_and_says_what_was_not_run(
    never: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = HookManager(max_workers=1)
    hooks.register_hook("hangs", lambda context: never.wait(), [AFTER], async_execution=True)
    with caplog.at_level(logging.ERROR):
        for _ in range(1_010):
            hooks.fire_hook(AFTER)
    refused = [r for r in caplog.records if "too many wait" in r.getMessage()]
    assert 9 <= len(refused) <= 10  # one runs, or is about to
    assert hooks.get_performance_stats("hangs")["failed_calls"] == len(refused)
    never.set()
    assert hooks.wait(DEADLINE)


@pytest.mark.parametrize("options", [{"async_execution": True}, {"async_execution": True, "timeout": DEADLINE}])
def test_a_handler_in_the_background_cannot_wait_for_itself(hooks: HookManager, options: dict[str, Any]) -> None:
    waited: list[bool] = []
    hooks.register_hook("waits", lambda context: waited.append(hooks.wait()), [AFTER], **options)
    hooks.register_hook("later", lambda context: waited.append(hooks.wait()), [HookEvent.ON_DATABASE_ERROR])
    hooks.fire_hook(AFTER)
    hooks.fire_later(HookEvent.ON_DATABASE_ERROR, {})
    assert hooks.wait(DEADLINE)
    assert waited == [False, False]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_the_number_of_workers_is_checked(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_workers"):
        HookManager(max_workers=value)


# --- what a save has to do with all that --------------------------------------------------------------------------


@pytest.mark.parametrize("event", [BEFORE, AFTER])
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("kind", ["timed", "async", "timed async"])
def test_a_hook_in_another_thread_can_save_and_load_itself(
    manager: EnhancedCheckpointManager, kind: str, blocking: bool, event: HookEvent
) -> None:
    """The thread that saves waits for the hook, so what the hook saves must not wait for that thread."""
    inner: list[str] = []

    def save(context: HookContext) -> None:
        if not inner:
            inner.append("begun")
            inner.append(manager.save_checkpoint({"inner": b"x"}, epoch=9))
            assert manager.load_checkpoint(inner[1])["epoch"] == 9

    async def save_async(context: HookContext) -> None:
        save(context)

    timeout = None if kind == "async" else DEADLINE
    manager.register_hook("again", save if kind == "timed" else save_async, [event], timeout=timeout)
    outer = manager.save_checkpoint(MODEL, epoch=1, blocking=blocking)
    assert manager.wait(timeout=DEADLINE)
    assert manager.list_hooks()[0]["failures"] == 0
    assert manager.load_checkpoint(outer)["model_state_dict"] == MODEL
    assert manager.load_checkpoint(inner[1])["model_state_dict"] == {"inner": b"x"}


def test_a_hook_in_the_background_can_save_while_saves_are_pending(manager: EnhancedCheckpointManager) -> None:
    saved: list[str] = []

    def save(context: HookContext) -> None:
        if context.get("epoch") == 1:
            saved.append(manager.save_checkpoint({"inner": b"x"}, epoch=9))

    manager.register_hook("again", save, [AFTER], async_execution=True)
    manager.save_checkpoint(MODEL, epoch=1, blocking=False)
    assert manager.wait(timeout=DEADLINE)
    assert manager.hook_manager is not None
    assert manager.hook_manager.wait(DEADLINE)
    assert manager.load_checkpoint(saved[0])["model_state_dict"] == {"inner": b"x"}


def test_a_hanging_hook_with_a_timeout_does_not_keep_a_checkpoint_from_its_commit(
    manager: EnhancedCheckpointManager, never: threading.Event
) -> None:
    manager.register_hook("hangs", lambda context: never.wait(), [BEFORE, AFTER], timeout=SHORT)
    saved = [manager.save_checkpoint(MODEL, epoch=epoch, blocking=bool(epoch % 2)) for epoch in range(4)]
    assert manager.wait(timeout=DEADLINE)
    assert [manager.load_checkpoint(i)["epoch"] for i in saved] == [0, 1, 2, 3]
    assert not manager.list_hooks()[0]["enabled"]


def test_after_hooks_of_a_background_save_run_when_it_is_committed(manager: EnhancedCheckpointManager) -> None:
    found: list[Any] = []

    def look(context: HookContext) -> None:
        found.append([c["checkpoint_id"] for c in manager.list_checkpoints()])
        found.append(threading.current_thread() is threading.main_thread())

    manager.register_hook("look", look, [AFTER])
    checkpoint = manager.save_checkpoint(MODEL, blocking=False)
    assert manager.wait(timeout=DEADLINE)
    assert found == [[checkpoint], False]


def test_ctrl_c_in_a_hook_before_a_save_comes_when_the_checkpoint_is_there(
    manager: EnhancedCheckpointManager,
) -> None:
    later: list[str] = []

    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    manager.register_hook("h", interrupted, [BEFORE], priority=1)
    manager.register_hook("later", lambda context: later.append("ran"), [BEFORE], priority=2)
    with pytest.raises(KeyboardInterrupt):
        manager.save_checkpoint(MODEL)
    (told,) = manager.list_checkpoints()
    assert manager.load_checkpoint(told["checkpoint_id"])["model_state_dict"] == MODEL
    assert later == ["ran"]
    manager.unregister_hook("h")
    manager.save_checkpoint(MODEL)  # it was raised once


def test_a_keyboardinterrupt_of_a_hook_in_another_thread_is_a_failure_like_any(
    manager: EnhancedCheckpointManager,
) -> None:
    """Ctrl-C goes to the main thread; a background save must not fail for what a hook invents."""

    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    manager.register_hook("h", interrupted, [AFTER])
    checkpoint = manager.save_checkpoint(MODEL, blocking=False)
    assert manager.wait(timeout=DEADLINE)
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    assert manager.list_hooks()[0]["failures"] == 1


def test_fire_hook_raises_the_users_ctrl_c_when_the_others_have_run(hooks: HookManager) -> None:
    ran: list[str] = []

    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    hooks.register_hook("h", interrupted, [AFTER])
    hooks.register_hook("last", lambda context: ran.append("ran"), [AFTER])
    with pytest.raises(KeyboardInterrupt):
        hooks.fire_hook(AFTER)
    assert ran == ["ran"]


# --- errors of errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_handler_of_errors_that_fails_itself_is_only_logged(hooks: HookManager, background: bool) -> None:
    def broken(context: HookContext) -> None:
        hooks.fire_hook(AFTER)  # whose hook is broken, too
        raise OSError("worse")

    hooks.register_hook("first", lambda context: 1 / 0, [BEFORE, AFTER])
    hooks.register_hook("errors", broken, [HookEvent.ON_ERROR], async_execution=background)
    hooks.fire_hook(BEFORE)
    assert hooks.wait(DEADLINE)
    assert hooks.get_performance_stats("errors")["failed_calls"] == 1
    assert hooks.get_performance_stats("first")["failed_calls"] == 2


def test_an_error_is_told_with_hook_event_and_traceback(hooks: HookManager) -> None:
    seen: list[HookContext] = []
    hooks.register_hook("broken", lambda context: 1 / 0, [AFTER])
    hooks.register_hook("errors", seen.append, [HookEvent.ON_ERROR])
    hooks.fire_hook(AFTER, experiment_id="e")
    (context,) = seen
    assert (context.data["source"], context.data["hook"], context.data["event"]) == ("hook", "broken", AFTER.value)
    assert context.data["error_type"] == "ZeroDivisionError"
    assert "1 / 0" in context.data["traceback"]
    assert context.experiment_id == "e"


# --- nothing is left behind ---------------------------------------------------------------------------------------


class Big:
    """Stands for a tensor."""


@pytest.mark.parametrize(
    "kind", ["plain", "timed", "async", "background", "failing", "failing timed", "failing async", "failing group"]
)
def test_what_a_hook_was_given_goes_when_the_firing_ends(hooks: HookManager, kind: str) -> None:
    """Without a pass of the garbage collector: on a GPU that memory is needed at once."""

    def handler(context: HookContext) -> None:
        mine = context.get("tensor")
        if "group" in kind and sys.version_info >= (3, 11):
            try:
                raise OSError(f"wrong {type(mine)}")
            except OSError as error:
                raise builtins.ExceptionGroup("several", [error]) from None
        if "failing" in kind:
            raise ValueError(f"wrong {type(mine)}")

    async def handler_async(context: HookContext) -> None:
        handler(context)

    options: dict[str, Any] = {"timeout": DEADLINE} if "timed" in kind else {}
    options |= {"async_execution": True} if kind == "background" else {}
    hooks.register_hook("h", handler_async if "async" in kind else handler, [AFTER], **options)
    logging.disable(logging.CRITICAL)  # pytest keeps log records, and with them tracebacks
    gc.collect()
    gc.disable()
    try:
        tensor = Big()
        gone = weakref.ref(tensor)
        result = hooks.fire_hook(AFTER, tensor=tensor)
        assert result.success == ("failing" not in kind)
        assert hooks.wait(DEADLINE)
        del tensor, result
        until = time.monotonic() + DEADLINE
        while gone() is not None and time.monotonic() < until:
            os.sched_yield()  # a thread may be between its last line and its rest
        assert gone() is None
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_100_000_firings_leave_no_object_and_no_thread(hooks: HookManager) -> None:
    hooks.register_hook("plain", where, [AFTER])
    hooks.register_hook("failing", lambda context: 1 / 0, [AFTER])
    hooks.register_hook("timed", where, [BEFORE], timeout=DEADLINE)
    hooks.register_hook("async", where_async, [BEFORE])
    hooks.register_hook("background", where, [BEFORE], async_execution=True)
    hooks.register_hook("errors", lambda context: None, [HookEvent.ON_ERROR])
    logging.disable(logging.CRITICAL)

    def fire(times: int) -> tuple[int, int]:
        for number in range(times):
            hooks.fire_hook(AFTER, number=number)
            hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_LOAD, number=number)  # which nobody listens to
            if number % 100 == 0:
                hooks.fire_hook(BEFORE, number=number)
                assert hooks.wait(DEADLINE)
        gc.collect()
        return len(gc.get_objects()), threading.active_count()

    try:
        fire(1_000)
        objects, threads = fire(1_000)
        more_objects, more_threads = fire(100_000)
    finally:
        logging.disable(logging.NOTSET)
    assert more_objects - objects < 50
    assert more_threads <= threads
    assert hooks.get_performance_stats("failing")["failed_calls"] == 102_000


def test_a_thousand_hooks_run_in_their_order(hooks: HookManager) -> None:
    ran: list[int] = []
    for number in range(1_000):
        hooks.register_hook(f"h{number}", lambda context, n=number: ran.append(n), [AFTER], priority=number % 7)
    assert hooks.fire_hook(AFTER).success
    assert ran == sorted(range(1_000), key=lambda number: number % 7)


def test_threads_that_nobody_needs_end(tmp_path: Path) -> None:
    ended = script(
        """
        import threading
        from model_checkpoint.hooks import HookEvent, HookManager, threads

        threads.REST = 0.05
        used = []
        hooks = HookManager()
        hooks.register_hook("h", lambda c: used.append(threading.current_thread()), [HookEvent.ON_ERROR], timeout=20)
        for _ in range(3):
            hooks.fire_hook(HookEvent.ON_ERROR)
            used[-1].join(20)
            assert not used[-1].is_alive()
        assert threading.active_count() == 1
        print(len(set(used)))
        """,
        tmp_path,
    )
    assert (ended.stdout, ended.stderr) == ("3\n", "")


def test_a_forked_child_has_threads_of_its_own_and_none_of_the_parents_work(never: threading.Event) -> None:
    hooks = HookManager(max_workers=1)
    hooks.register_hook("timed", where, [AFTER], timeout=DEADLINE)
    hooks.register_hook("async", where_async, [AFTER])
    hooks.register_hook("hangs", lambda context: never.wait(), [BEFORE], async_execution=True)
    hooks.fire_hook(AFTER)
    hooks.fire_hook(BEFORE)
    pid = os.fork()
    if pid == 0:
        try:
            good = hooks.wait(0) and hooks.fire_hook(AFTER).success
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert hooks.fire_hook(AFTER).success


def script(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


def test_the_end_of_the_process_waits_for_the_background_and_tells_of_itself(tmp_path: Path) -> None:
    ended = script(
        """
        import threading
        from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
        from model_checkpoint.hooks import HookEvent, HookManager

        def tell(context):
            threading.Event().wait(0.2)
            print(context.event.value, context.data.get("status"), flush=True)

        hooks = HookManager()
        ends = [HookEvent.ON_EXPERIMENT_END, HookEvent.ON_SYSTEM_SHUTDOWN]
        hooks.register_hook("tell", tell, ends, async_execution=True)
        tracker = ExperimentTracker("run", database_url="sqlite:///runs.db", hook_manager=hooks)
        manager = EnhancedCheckpointManager(tracker, "checkpoints")
        manager.save_checkpoint({"a": b"1"}, blocking=False)
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(ended.stdout.splitlines()) == ["on_experiment_end completed", "on_system_shutdown None"]


def test_the_end_waits_whatever_has_registered_itself_for_it_before(tmp_path: Path) -> None:
    ended = script(
        """
        import tempfile
        folder = tempfile.TemporaryDirectory()  # whose finalizer runs behind all exit handlers that come later
        import threading
        from model_checkpoint import ExperimentTracker
        from model_checkpoint.hooks import HookEvent, HookManager

        def tell(context):
            threading.Event().wait(0.2)
            print(context.event.value, flush=True)

        hooks = HookManager()
        hooks.register_hook("tell", tell, [HookEvent.ON_EXPERIMENT_END], async_execution=True)
        tracker = ExperimentTracker("run", database_url="sqlite:///runs.db", hook_manager=hooks)
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "on_experiment_end\n", "")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_end_of_a_multiprocessing_child_waits_too(tmp_path: Path, method: str) -> None:
    (tmp_path / "child.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys, threading
            from model_checkpoint.hooks import HookEvent, HookManager

            def tell(context):
                threading.Event().wait(0.2)
                print("told", flush=True)

            def work():
                hooks = HookManager()
                hooks.register_hook("tell", tell, [HookEvent.ON_ERROR], async_execution=True)
                hooks.fire_hook(HookEvent.ON_ERROR)

            if __name__ == "__main__":
                child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
                child.start()
                child.join()
                sys.exit(child.exitcode)
            """
        )
    )
    command = [sys.executable, "child.py", method]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "told\n", "")


def test_hooks_that_hang_do_not_keep_the_process(tmp_path: Path) -> None:
    ended = script(
        """
        import threading
        from model_checkpoint.hooks import HookEvent, HookManager, threads

        threads._AT_EXIT = 0.2
        hooks = HookManager()
        hooks.register_hook("hangs", lambda context: threading.Event().wait(), [HookEvent.ON_ERROR], timeout=0.1)
        hooks.register_hook("too", lambda c: threading.Event().wait(), [HookEvent.ON_ERROR], async_execution=True)
        hooks.fire_hook(HookEvent.ON_ERROR)
        print("done")
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n")
