"""Decorated handlers, and hooks that installed packages bring."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint.errors import ConfigurationError, HookRegistrationError
from model_checkpoint.hooks import (
    BaseHook,
    HookContext,
    HookEvent,
    HookManager,
    HookPriority,
    async_hook_handler,
    benchmark_hook,
    conditional_hook,
    hook_handler,
    retry_on_failure,
    suppress_errors,
)

BEFORE, AFTER = HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE
DEADLINE = 20.0


@pytest.fixture
def hooks() -> HookManager:
    return HookManager()


def plain(function: Callable[[HookContext], Any]) -> Callable[[HookContext], Any]:
    return function


def coroutine(function: Callable[[HookContext], Any]) -> Callable[[HookContext], Any]:
    async def wrapper(context: HookContext) -> Any:
        await asyncio.sleep(0)
        return function(context)

    return wrapper


BOTH = pytest.mark.parametrize("kind", [plain, coroutine])


def fire(hooks: HookManager, handler: Callable[[HookContext], Any], **data: Any) -> Any:
    """Register and fire; returns the result, or raises the handler's error."""
    hooks.register_hook("h", handler, [AFTER])
    result = hooks.fire_hook(AFTER, **data)
    hooks.unregister_hook("h")
    for error in result.errors.values():
        raise error
    return result.results["h"]


def failing(times: int, error: type[Exception] = OSError) -> Callable[[HookContext], int]:
    """Return a handler that fails so often and then returns the number of its calls."""
    calls = 0

    def handler(context: HookContext) -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error(f"failure {calls}")
        return calls

    return handler


def test_a_marked_function_is_registered_with_what_was_noted_on_it(hooks: HookManager) -> None:
    @hook_handler([BEFORE, "after_checkpoint_save"], priority=HookPriority.LOW, timeout=2.0, team="a")
    def announce(context: HookContext) -> str:
        return context.metadata["team"]

    assert announce(HookContext(AFTER, metadata={"team": "b"})) == "b"  # it stays what it is
    hooks.register_hook(announce)
    (told,) = hooks.list_hooks()
    assert told["name"] == "announce"
    assert told["events"] == ["before_checkpoint_save", "after_checkpoint_save"]
    assert (told["priority"], told["timeout"], told["async_execution"]) == (90, 2.0, False)
    assert hooks.fire_hook(AFTER).results == {"announce": "a"}
    with pytest.raises(HookRegistrationError, match=r"'announce'.*taken"):
        hooks.register_hook(announce)
    with pytest.raises(HookRegistrationError, match=r"'announce'.*brings its own"):
        hooks.register_hook(announce, priority=3)


def test_one_event_and_a_name_of_its_own_can_be_given(hooks: HookManager) -> None:
    @hook_handler(AFTER, name="mine")
    def announce(context: HookContext) -> None: ...

    @hook_handler("no such event")
    def wrong(context: HookContext) -> None: ...

    hooks.register_hook(announce)
    assert [(told["name"], told["events"]) for told in hooks.list_hooks()] == [("mine", [AFTER.value])]
    with pytest.raises(HookRegistrationError, match=r"'wrong'.*no such event"):
        hooks.register_hook(wrong)


def test_methods_can_be_marked(hooks: HookManager) -> None:
    class Mine:
        seen = 0

        @hook_handler(AFTER)
        def count(self, context: HookContext) -> None:
            self.seen += 1

    mine = Mine()
    hooks.register_hook(mine.count)
    hooks.fire_hook(AFTER)
    assert mine.seen == 1


@BOTH
def test_async_hook_handler_runs_in_the_background(hooks: HookManager, kind: Any) -> None:
    ran: list[str] = []
    hooks.register_hook(async_hook_handler(AFTER, name="late")(kind(lambda context: ran.append("ran"))))
    assert hooks.fire_hook(AFTER).results == {}
    assert hooks.wait(DEADLINE)
    assert ran == ["ran"]


@BOTH
def test_a_conditional_hook_runs_where_its_condition_holds(hooks: HookManager, kind: Any) -> None:
    handler = conditional_hook(lambda context: context.get("epoch") % 2 == 0)(kind(lambda context: "ran"))
    assert fire(hooks, handler, epoch=2) == "ran"
    assert fire(hooks, handler, epoch=3) is None
    with pytest.raises(TypeError):  # the condition is part of the hook
        fire(hooks, handler)


@BOTH
def test_retrying_ends_with_the_first_success_or_the_last_failure(hooks: HookManager, kind: Any) -> None:
    retry = retry_on_failure(tries=3, delay=0.001, errors=OSError)
    assert fire(hooks, retry(kind(failing(0)))) == 1
    assert fire(hooks, retry(kind(failing(2)))) == 3
    with pytest.raises(OSError, match="failure 3"):
        fire(hooks, retry(kind(failing(3))))
    with pytest.raises(KeyError, match="failure 1"):  # not one of those that are tried again
        fire(hooks, retry(kind(failing(1, KeyError))))
    for wrong in ({"tries": 0}, {"delay": -1}, {"delay": "x"}, {"backoff": None}, {"errors": 5}, {"errors": (5,)}):
        with pytest.raises(ConfigurationError):
            retry_on_failure(**wrong)


def test_the_delay_grows_between_tries(hooks: HookManager, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("model_checkpoint.hooks.decorators.time.sleep", slept.append)
    assert fire(hooks, retry_on_failure(tries=4, delay=0.5, backoff=3.0)(failing(3))) == 4
    assert slept == [0.5, 1.5, 4.5]


@BOTH
def test_a_benchmark_keeps_the_newest_times_of_failures_too(
    hooks: HookManager, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handler: Any = benchmark_hook(kind(failing(1)))
    with pytest.raises(OSError, match="failure 1"):
        fire(hooks, handler)
    with caplog.at_level(logging.INFO):
        assert fire(hooks, handler) == 2
    assert len(handler.seconds) == 2
    assert all(0 <= seconds < DEADLINE for seconds in handler.seconds)
    assert "at after_checkpoint_save" in caplog.records[-1].getMessage()


@BOTH
def test_suppressed_errors_are_warnings_and_others_are_not_suppressed(
    hooks: HookManager, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert fire(hooks, suppress_errors(OSError, default="none")(kind(failing(1)))) == "none"
    (record,) = caplog.records
    assert (record.levelno, "failure 1" in record.getMessage()) == (logging.WARNING, True)
    assert fire(hooks, suppress_errors()(kind(failing(1, KeyError)))) is None
    with pytest.raises(KeyError):
        fire(hooks, suppress_errors(OSError)(kind(failing(1, KeyError))))


@BOTH
def test_decorators_can_be_stacked_in_any_order(hooks: HookManager, kind: Any) -> None:
    marked = hook_handler(AFTER, name="inner")(kind(failing(2)))
    handler = suppress_errors(default="gave up")(retry_on_failure(tries=2, delay=0.001)(benchmark_hook(marked)))
    hooks.register_hook(handler)  # what is noted innermost is found outside, too
    assert hooks.fire_hook(AFTER).results == {"inner": "gave up"}
    assert hooks.fire_hook(AFTER).results == {"inner": 3}


def test_decorators_that_were_not_called_or_cannot_work_are_refused(hooks: HookManager) -> None:
    def handler(context: HookContext) -> None: ...

    async def later(context: HookContext) -> bool:
        return False

    for decorate in (suppress_errors, retry_on_failure):
        with pytest.raises(ConfigurationError):
            decorate(handler)  # type: ignore[operator]
    for condition in (None, later):
        with pytest.raises(ConfigurationError, match="plain function"):
            conditional_hook(condition)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="name="):
        hook_handler(AFTER)(functools.partial(handler))
    hooks.register_hook(async_hook_handler(AFTER, async_execution=True)(handler))


def test_what_would_never_run_is_refused(hooks: HookManager) -> None:
    def generator(context: HookContext) -> Any:
        yield 1

    async def generator_too(context: HookContext) -> Any:
        yield 1

    async def tell(error: BaseException, context: HookContext) -> None: ...

    for wrong in (generator, generator_too):
        with pytest.raises(HookRegistrationError, match=r"'h'.*generator"):
            hooks.register_hook("h", wrong, [AFTER])
    with pytest.raises(HookRegistrationError, match=r"'h'.*error_handler"):
        hooks.register_hook("h", lambda context: None, [AFTER], error_handler=tell)
    for name in ("", " ", "\n"):
        with pytest.raises(HookRegistrationError, match="name must be text"):
            hooks.register_hook(name, lambda context: None, [AFTER])
    assert hooks.list_hooks() == []


def test_one_event_is_enough_for_an_object(hooks: HookManager) -> None:
    class One(BaseHook):
        events = HookEvent.ON_ERROR  # type: ignore[assignment]

        def execute(self, context: HookContext) -> None: ...

    hooks.register_hook(One())
    hooks.register_hook(One("two", events=AFTER))
    assert [told["events"] for told in hooks.list_hooks()] == [["on_error"], ["after_checkpoint_save"]]


# --- packages -----------------------------------------------------------------------------------------------------

PACKAGE = """
from model_checkpoint.hooks import BaseHook, HookEvent, hook_handler

class Whole(BaseHook):
    events = (HookEvent.AFTER_CHECKPOINT_SAVE,)

    def execute(self, context):
        return "class"

@hook_handler(HookEvent.AFTER_CHECKPOINT_SAVE)
def marked(context):
    return "function"

made = Whole("made")
neither = 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package on the path that offers hooks."""
    (tmp_path / "hooks_of_others.py").write_text(PACKAGE)
    info = tmp_path / "hooks_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hooks-of-others\nVersion: 1.0\n")
    names = {"whole": "Whole", "marked": "marked", "made": "made", "neither": "neither", "gone": "nothing"}
    lines = [f"{name} = hooks_of_others:{attribute}" for name, attribute in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[model_checkpoint.hooks]", *lines, "away = no_such_module:x"]))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("package")
def test_hooks_of_packages_are_registered_by_their_names(hooks: HookManager) -> None:
    for name in ("whole", "marked", "made"):
        hooks.register_hook(name)
    assert hooks.fire_hook(AFTER).results == {"Whole": "class", "marked": "function", "made": "class"}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("neither", "neither a BaseHook"),
        ("gone", "cannot load hooks_of_others:nothing"),
        ("away", "cannot load no_such_module:x"),
        ("unknown", "there: away, gone, made, marked, neither, whole"),
    ],
)
def test_what_packages_offer_wrongly_is_refused_with_its_name(hooks: HookManager, name: str, text: str) -> None:
    with pytest.raises(HookRegistrationError, match=f"'{name}'.*{text}"):
        hooks.register_hook(name)
    assert hooks.list_hooks() == []


def test_an_object_says_how_it_runs(hooks: HookManager) -> None:
    class Slow(BaseHook):
        def execute(self, context: HookContext) -> None: ...

    hooks.register_hook(Slow(timeout=3.0, async_execution=True, priority=1))
    (told,) = hooks.list_hooks()
    assert (told["priority"], told["timeout"], told["async_execution"]) == (1, 3.0, True)
    with pytest.raises(HookRegistrationError, match=r"'b'.*timeout"):
        hooks.register_hook(Slow("b", timeout=-1))
