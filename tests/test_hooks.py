"""Hooks: what can be registered, in which order they run, who may veto what, and that none can spoil an outcome."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint.retention import KeepLast
from model_checkpoint.errors import (
    ClaimLostError,
    ConfigurationError,
    DatabaseError,
    HookRegistrationError,
    HookTimeoutError,
    HookVetoError,
    IntegrityError,
    MissingDependencyError,
    StorageError,
    UnsupportedValueError,
)
from model_checkpoint.hooks import BaseHook, HookContext, HookEvent, HookManager, HookPriority

DEADLINE = 20.0  # seconds that anything may take before it counts as hung
EVERY = tuple(event for event in HookEvent if event is not HookEvent.ON_ERROR)
USUAL = [  # what ``use_everything`` fires
    HookEvent.BEFORE_CHECKPOINT_SAVE,
    HookEvent.AFTER_CHECKPOINT_SAVE,
    HookEvent.ON_BEST_MODEL_UPDATE,
    HookEvent.BEFORE_RETENTION,
    HookEvent.AFTER_RETENTION,
    HookEvent.BEFORE_CHECKPOINT_LOAD,
    HookEvent.AFTER_CHECKPOINT_LOAD,
    HookEvent.BEFORE_INTEGRITY_CHECK,
    HookEvent.AFTER_INTEGRITY_CHECK,
    HookEvent.BEFORE_CHECKPOINT_DELETE,
    HookEvent.AFTER_CHECKPOINT_DELETE,
    HookEvent.ON_BEST_MODEL_UPDATE,
]
BEFORE_SAVE = [HookEvent.BEFORE_CHECKPOINT_SAVE]
AFTER_SAVE = [HookEvent.AFTER_CHECKPOINT_SAVE]
MODEL = {"weights": b"\x01\x02\x03\x04", "name": "small"}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ExperimentTracker]:
    tracker = ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db")
    yield tracker
    tracker.close()


@pytest.fixture
def manager(run: ExperimentTracker, tmp_path: Path) -> EnhancedCheckpointManager:
    return EnhancedCheckpointManager(run, str(tmp_path / "checkpoints"), max_checkpoints=None)


@pytest.fixture
def hooks() -> HookManager:
    return HookManager()


class Recorder:
    """A handler that keeps a copy of every context that it gets."""

    def __init__(self, returns: Any = None) -> None:
        self.returns = returns
        self.seen: list[HookContext] = []

    def __call__(self, context: HookContext) -> Any:
        self.seen.append(copy.deepcopy(context))
        return self.returns

    @property
    def events(self) -> list[HookEvent]:
        return [context.event for context in self.seen]


def fail(context: HookContext) -> None:
    raise OSError("the hook is broken")


def use_everything(manager: EnhancedCheckpointManager) -> str:
    """Save, load, verify and delete: everything that fires hooks."""
    checkpoint = manager.save_checkpoint(MODEL, epoch=1, loss=0.5)
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    assert manager.verify_experiment_integrity()["verified"] == 1
    assert manager.delete_checkpoint(checkpoint)
    return checkpoint


def fail_to_save(manager: EnhancedCheckpointManager) -> None:
    """Save where that is not possible: the staging area is gone."""
    staging = Path(manager.checkpoint_dir) / ".engine" / "staging"
    staging.rmdir()
    with pytest.raises(StorageError, match="publish a checkpoint"):
        manager.save_checkpoint(MODEL)
    staging.mkdir()


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- the specification's examples -------------------------------------------------------------------------------


def test_the_first_example_of_the_specification(
    manager: EnhancedCheckpointManager, run: ExperimentTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    from model_checkpoint.hooks import HookEvent

    # Simple function hook
    def log_checkpoint_save(context):
        print(f"Saving checkpoint for experiment {context.experiment_id}")
        return True

    manager.hook_manager.register_hook("logger", log_checkpoint_save, [HookEvent.BEFORE_CHECKPOINT_SAVE])
    manager.save_checkpoint(MODEL)
    assert capsys.readouterr().out == f"Saving checkpoint for experiment {run.experiment_id}\n"


def test_the_second_example_of_the_specification_fails_without_harm(
    manager: EnhancedCheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Its hook refers to an attribute that it never sets."""
    from model_checkpoint.hooks import BaseHook

    # Class-based hook for complex logic
    class ValidationHook(BaseHook):
        def execute(self, context):
            # Custom validation logic here
            if context.data.get("loss") > self.max_loss_threshold:
                print("Warning: High loss detected!")
            return True

    validation_hook = ValidationHook(priority=10)
    manager.hook_manager.register_hook(validation_hook)

    with caplog.at_level(logging.DEBUG):
        checkpoint = manager.save_checkpoint(MODEL, loss=0.5)
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "ValidationHook" in record.getMessage()
    assert "before_checkpoint_save" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], AttributeError)
    assert record.exc_info[2] is not None  # the traceback
    (told,) = manager.list_hooks()
    assert (told["name"], told["priority"], told["calls"], told["failures"]) == ("ValidationHook", 10, 1, 1)

    result = manager.hook_manager.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE, data={"loss": 1.0})
    assert not result.success
    assert result.stopped_by is None
    assert set(result.errors) == {"ValidationHook"}
    assert "max_loss_threshold" in str(result.errors["ValidationHook"])


# --- registration -----------------------------------------------------------------------------------------------


def test_a_function_an_object_a_method_a_partial_and_a_builtin_can_be_registered(hooks: HookManager) -> None:
    class Mine(BaseHook):
        def execute(self, context: HookContext) -> str:
            return "object"

    seen: list[HookContext] = []
    hooks.register_hook("function", lambda context: "function", AFTER_SAVE)
    hooks.register_hook(Mine("object", AFTER_SAVE))
    hooks.register_hook("method", Recorder("method").__call__, AFTER_SAVE)
    hooks.register_hook("partial", functools.partial(lambda word, context: word, "partial"), AFTER_SAVE)
    hooks.register_hook("builtin", seen.append, AFTER_SAVE)
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE, data={"epoch": 1})
    expected = {"function": "function", "object": "object", "method": "method", "partial": "partial", "builtin": None}
    assert result.results == expected
    assert result.success
    assert (result.get_result("object"), result.get_result("nobody")) == ("object", None)
    assert seen[0].get("epoch") == 1


def test_events_can_be_given_by_value_and_twice_without_running_twice(hooks: HookManager) -> None:
    recorder = Recorder()
    hooks.register_hook("h", recorder, ["after_checkpoint_save", HookEvent.AFTER_CHECKPOINT_SAVE])
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert recorder.events == [HookEvent.AFTER_CHECKPOINT_SAVE]


def test_an_event_can_be_fired_by_its_value(hooks: HookManager) -> None:
    hooks.register_hook("h", lambda context: False, BEFORE_SAVE)
    assert hooks.fire_hook("before_checkpoint_save").stopped_by == "h"  # type: ignore[arg-type]


def test_firing_what_is_no_event_says_which_there_are(hooks: HookManager) -> None:
    with pytest.raises(ConfigurationError, match=r"'after_save'.*AFTER_CHECKPOINT_SAVE"):
        hooks.fire_hook("after_save")


def test_a_hook_object_has_its_class_name_and_runs_before_saves_unless_it_says_otherwise(hooks: HookManager) -> None:
    class Plain(BaseHook):
        def execute(self, context: HookContext) -> None: ...

    class Loud(BaseHook):
        events = (HookEvent.AFTER_CHECKPOINT_LOAD,)

        def execute(self, context: HookContext) -> None: ...

    hooks.register_hook(Plain())
    hooks.register_hook(Plain("second", EVERY, priority=3))
    hooks.register_hook(Loud())
    told = {hook["name"]: (hook["events"], hook["priority"]) for hook in hooks.list_hooks()}
    assert told == {
        "Plain": (["before_checkpoint_save"], HookPriority.NORMAL),
        "second": ([event.value for event in EVERY], 3),
        "Loud": (["after_checkpoint_load"], HookPriority.NORMAL),
    }


def test_an_object_that_handles_nothing_is_refused_and_so_is_a_misspelt_method(hooks: HookManager) -> None:
    class Misspelt(BaseHook):
        def on_before_checkpoint_save(self, context: HookContext) -> None: ...

        def on_befor_checkpoint_load(self, context: HookContext) -> None: ...

    class Both(BaseHook):
        """A callback of another framework, too."""

        def on_metric_threshold(self, context: HookContext) -> None: ...

        def on_train_start(self) -> None: ...

    with pytest.raises(HookRegistrationError, match=r"'empty'.*neither execute\(\) nor a method"):
        hooks.register_hook(BaseHook("empty"))
    with pytest.raises(HookRegistrationError, match=r"'Misspelt'.*on_befor_checkpoint_load.*on_before_checkpoint_load"):
        hooks.register_hook(Misspelt())
    hooks.register_hook(Both())
    assert [told["events"] for told in hooks.list_hooks()] == [["on_metric_threshold"]]


class AsyncCall:
    async def __call__(self, context: HookContext) -> None: ...


class AsyncHook(BaseHook):
    async def execute(self, context: HookContext) -> None: ...


class NoSuper(BaseHook):
    def __init__(self) -> None:
        self.limit = 1

    def execute(self, context: HookContext) -> None: ...


async def coroutine(context: HookContext) -> None: ...


def ok(context: HookContext) -> None: ...


WRONG: dict[str, tuple[Callable[[HookManager], object], str]] = {
    "not callable": (lambda h: h.register_hook("wrong", 5, AFTER_SAVE), "'wrong'.*handler.*callable"),
    "no handler": (lambda h: h.register_hook("wrong", events=AFTER_SAVE), "'wrong'.*handler.*callable"),
    "no argument": (lambda h: h.register_hook("wrong", lambda: None, AFTER_SAVE), "'wrong'.*handler.*one argument"),
    "two arguments": (lambda h: h.register_hook("wrong", lambda a, b: None, AFTER_SAVE), "'wrong'.*handler.*one arg"),
    "keyword only": (lambda h: h.register_hook("wrong", lambda *, c: None, AFTER_SAVE), "'wrong'.*handler.*one arg"),
    "zero timeout": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, timeout=0), "'wrong'.*timeout.*0"),
    "endless timeout": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, timeout=math.inf), "'wrong'.*timeout.*inf"),
    "text timeout": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, timeout="5"), "'wrong'.*timeout.*'5'"),
    "in background": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, async_execution=1), "'wrong'.*async_exec.*1"),
    "object and priority": (lambda h: h.register_hook(BaseHook("wrong"), priority=1), "'wrong'.*brings its own"),
    "no events": (lambda h: h.register_hook("wrong", ok), "'wrong'.*events"),
    "empty events": (lambda h: h.register_hook("wrong", ok, []), "'wrong'.*events.*empty"),
    "a bare event": (lambda h: h.register_hook("wrong", ok, HookEvent.AFTER_CHECKPOINT_SAVE), "'wrong'.*events.*list"),
    "a bare string": (lambda h: h.register_hook("wrong", ok, "after_checkpoint_save"), "'wrong'.*events.*list"),
    "a number": (lambda h: h.register_hook("wrong", ok, 5), "'wrong'.*events.*list"),
    "unknown event": (lambda h: h.register_hook("wrong", ok, ["on_save"]), "'wrong'.*events.*on_save.*BEFORE_CHECKP"),
    "text priority": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, priority="high"), "'wrong'.*priority.*'high'"),
    "float priority": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, priority=0.5), "'wrong'.*priority.*0.5"),
    "error handler": (lambda h: h.register_hook("wrong", ok, AFTER_SAVE, error_handler=5), "'wrong'.*error_handler"),
    "object and handler": (lambda h: h.register_hook(BaseHook("wrong"), ok), "'wrong'.*handler"),
    "object and events": (lambda h: h.register_hook(BaseHook("wrong"), events=AFTER_SAVE), "'wrong'.*events"),
    "object without super": (lambda h: h.register_hook(NoSuper()), "NoSuper.*super"),
    "unknown plugin": (lambda h: h.register_hook("wrong"), "'wrong'.*entry points model_checkpoint.hooks"),
    "no name": (lambda h: h.register_hook(5, ok, AFTER_SAVE), "5.*name"),
    "handler first": (lambda h: h.register_hook(ok, AFTER_SAVE), "ok"),
    "class for object": (lambda h: h.register_hook(NoSuper), "NoSuper"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_registration_names_the_hook_and_the_argument_and_registers_nothing(
    hooks: HookManager, case: str
) -> None:
    register, text = WRONG[case]
    with pytest.raises(HookRegistrationError, match=text) as caught:
        register(hooks)
    assert isinstance(caught.value, ValueError)
    assert hooks.list_hooks() == []
    assert hooks.listening == {}


def test_a_name_can_be_taken_once_until_it_is_free_again(hooks: HookManager) -> None:
    hooks.register_hook("h", ok, AFTER_SAVE)
    with pytest.raises(HookRegistrationError, match=r"'h'.*taken"):
        hooks.register_hook("h", fail, BEFORE_SAVE)
    with pytest.raises(HookRegistrationError, match=r"'h'.*taken"):
        hooks.register_hook(AsyncHook("h"))
    (told,) = hooks.list_hooks()
    assert told["events"] == ["after_checkpoint_save"]  # the first is as it was
    assert hooks.unregister_hook("h")
    assert not hooks.unregister_hook("h")
    hooks.register_hook("h", fail, BEFORE_SAVE)
    assert [hook["events"] for hook in hooks.list_hooks()] == [["before_checkpoint_save"]]


def test_metadata_of_the_registration_reaches_its_own_hook_only(hooks: HookManager) -> None:
    first, second = Recorder(), Recorder()
    hooks.register_hook("first", first, AFTER_SAVE, team="vision", limit=3)
    hooks.register_hook("second", second, AFTER_SAVE)
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert first.seen[0].metadata == {"team": "vision", "limit": 3}
    assert second.seen[0].metadata == {}
    assert hooks.list_hooks()[0]["metadata"] == {"team": "vision", "limit": 3}


# --- order, enabling, listing -----------------------------------------------------------------------------------


def test_lower_priorities_run_first_and_equal_ones_in_the_order_of_registration(hooks: HookManager) -> None:
    order: list[str] = []
    priorities = [
        ("background", HookPriority.BACKGROUND),
        ("normal 1", HookPriority.NORMAL),
        ("critical", HookPriority.CRITICAL),
        ("minus", -5),
        ("normal 2", 50),
        ("low", HookPriority.LOW),
        ("high", HookPriority.HIGH),
        ("normal 3", HookPriority.NORMAL),
        ("large", 10**6),
    ]
    for name, priority in priorities:
        hooks.register_hook(name, lambda context, name=name: order.append(name), AFTER_SAVE, priority)
    expected = ["minus", "critical", "high", "normal 1", "normal 2", "normal 3", "low", "background", "large"]
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert order == expected
    assert list(result.results) == expected
    assert [hook["name"] for hook in hooks.list_hooks()] == expected


def test_the_named_priorities_have_their_documented_values() -> None:
    assert {p.name: p.value for p in HookPriority} == {
        "CRITICAL": 0,
        "HIGH": 10,
        "NORMAL": 50,
        "LOW": 90,
        "BACKGROUND": 100,
    }


def test_hooks_of_one_event_do_not_run_at_another(hooks: HookManager) -> None:
    recorder = Recorder()
    hooks.register_hook("h", recorder, [HookEvent.AFTER_CHECKPOINT_LOAD])
    for event in EVERY:
        hooks.fire_hook(event)
    assert recorder.events == [HookEvent.AFTER_CHECKPOINT_LOAD]


def test_a_disabled_hook_stays_registered_and_does_not_run_until_it_is_enabled(hooks: HookManager) -> None:
    recorder = Recorder()
    hooks.register_hook("h", recorder, AFTER_SAVE)
    assert hooks.disable_hook("h")
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert (len(recorder.seen), hooks.list_hooks()[0]["enabled"]) == (0, False)
    assert hooks.disable_hook("h")
    assert hooks.enable_hook("h")
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert (len(recorder.seen), hooks.list_hooks()[0]["enabled"]) == (1, True)
    assert not hooks.enable_hook("nobody")
    assert not hooks.disable_hook("nobody")


def test_an_enabled_hook_takes_its_old_place_among_equals(hooks: HookManager) -> None:
    for name in ("a", "b", "c"):
        hooks.register_hook(name, ok, AFTER_SAVE)
    hooks.disable_hook("a")
    hooks.enable_hook("a")
    assert list(hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE).results) == ["a", "b", "c"]


def test_list_hooks_filters_by_event_and_tells_everything(hooks: HookManager) -> None:
    hooks.register_hook("save", ok, [*BEFORE_SAVE, *AFTER_SAVE], priority=7, timeout=2.5, team="a")
    hooks.register_hook("load", fail, [HookEvent.AFTER_CHECKPOINT_LOAD])
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_LOAD)
    assert [hook["name"] for hook in hooks.list_hooks(HookEvent.AFTER_CHECKPOINT_SAVE)] == ["save"]
    assert hooks.list_hooks(HookEvent.AFTER_INTEGRITY_CHECK) == []
    assert {hook["name"]: hook for hook in hooks.list_hooks()} == {
        "save": {
            "name": "save",
            "events": ["before_checkpoint_save", "after_checkpoint_save"],
            "priority": 7,
            "timeout": 2.5,
            "async_execution": False,
            "enabled": True,
            "calls": 0,
            "failures": 0,
            "metadata": {"team": "a"},
        },
        "load": {
            "name": "load",
            "events": ["after_checkpoint_load"],
            "priority": 50,
            "timeout": None,
            "async_execution": False,
            "enabled": True,
            "calls": 1,
            "failures": 1,
            "metadata": {},
        },
    }


def test_performance_stats_count_calls_and_time_them(hooks: HookManager) -> None:
    flip = iter([True, False, True])

    def sometimes(context: HookContext) -> None:
        if not next(flip):
            raise ValueError

    hooks.register_hook("sometimes", sometimes, AFTER_SAVE)
    hooks.register_hook("never", ok, BEFORE_SAVE)
    for _ in range(3):
        hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    told = hooks.get_performance_stats("sometimes")
    assert (told["total_calls"], told["successful_calls"], told["failed_calls"]) == (3, 2, 1)
    assert 0 < told["min_time"] <= told["avg_time"] <= told["max_time"] < DEADLINE
    assert hooks.get_performance_stats() == {
        "sometimes": told,
        "never": {
            "total_calls": 0,
            "successful_calls": 0,
            "failed_calls": 0,
            "min_time": 0.0,
            "avg_time": 0.0,
            "max_time": 0.0,
        },
    }
    with pytest.raises(HookRegistrationError, match="'nobody' is not registered"):
        hooks.get_performance_stats("nobody")


# --- contexts and results ---------------------------------------------------------------------------------------


def test_firing_builds_the_context_from_its_arguments(hooks: HookManager) -> None:
    recorder = Recorder()
    hooks.register_hook("h", recorder, AFTER_SAVE)
    given = {"epoch": 1}
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE, data=given, checkpoint_id="c", experiment_id="e", loss=0.5)
    (context,) = recorder.seen
    assert (context.event, context.checkpoint_id, context.experiment_id) == (
        HookEvent.AFTER_CHECKPOINT_SAVE,
        "c",
        "e",
    )
    assert context.data == {"epoch": 1, "loss": 0.5}
    assert given == {"epoch": 1}


def test_handlers_of_one_firing_share_the_context_in_their_order(hooks: HookManager) -> None:
    def first(context: HookContext) -> None:
        context.set("a", 1)
        context.update({"b": 2, "c": 3})
        context.user_data["note"] = "from first"

    recorder = Recorder()
    hooks.register_hook("second", recorder, AFTER_SAVE, priority=2)
    hooks.register_hook("first", first, AFTER_SAVE, priority=1)
    context = HookContext(HookEvent.AFTER_CHECKPOINT_SAVE, {"c": 0})
    hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE, context)
    (seen,) = recorder.seen
    assert (seen.get("a"), seen.get("b"), seen.get("c"), seen.get("d", "none")) == (1, 2, 3, "none")
    assert seen.user_data == {"note": "from first"}
    assert context.get("a") == 1


def test_a_dict_is_kept_as_the_result_of_its_hook(hooks: HookManager) -> None:
    hooks.register_hook("h", lambda context: {"continue": True, "score": 5}, BEFORE_SAVE)
    result = hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE)
    assert (result.success, result.stopped_by) == (True, None)
    assert result.get_result("h") == {"continue": True, "score": 5}


def test_firing_an_event_without_hooks_is_a_success_without_results(hooks: HookManager) -> None:
    result = hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE)
    assert (result.success, result.results, result.errors, result.stopped_by) == (True, {}, {}, None)


@pytest.mark.parametrize("value", [False, {"continue": False, "reason": "no"}])
def test_a_veto_ends_the_firing_and_a_failure_does_not(hooks: HookManager, value: Any) -> None:
    last = Recorder()
    hooks.register_hook("broken", fail, BEFORE_SAVE, priority=1)
    hooks.register_hook("veto", lambda context: value, BEFORE_SAVE, priority=2)
    hooks.register_hook("last", last, BEFORE_SAVE, priority=3)
    result = hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE)
    assert (result.success, result.stopped_by) == (False, "veto")
    assert result.reason == ("no" if isinstance(value, dict) else None)
    assert set(result.errors) == {"broken"}
    assert last.seen == []


@pytest.mark.parametrize("value", [None, True, 0, "", [], {}, {"continue": None}, {"continue": 0}, "False"], ids=repr)
def test_only_false_and_continue_false_are_vetoes(hooks: HookManager, value: Any) -> None:
    hooks.register_hook("h", lambda context: value, BEFORE_SAVE)
    assert hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE).stopped_by is None


# --- the events of the manager ----------------------------------------------------------------------------------


def test_events_come_in_the_order_in_which_things_happen(
    manager: EnhancedCheckpointManager, run: ExperimentTracker
) -> None:
    recorder = Recorder()
    manager.register_hook("all", recorder, EVERY)
    checkpoint = use_everything(manager)
    assert recorder.events == USUAL
    of_experiment = {HookEvent.BEFORE_RETENTION, HookEvent.AFTER_RETENTION}
    ids = {context.checkpoint_id for context in recorder.seen[:-1] if context.event not in of_experiment}
    assert ids == {checkpoint}
    assert recorder.seen[-1].checkpoint_id is None  # nothing is the best any more
    fail_to_save(manager)
    assert recorder.events[-2:] == [HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.ON_CHECKPOINT_SAVE_FAILED]
    assert recorder.seen[-1].data["error"].startswith("StorageError: ")
    assert {context.experiment_id for context in recorder.seen} == {run.experiment_id}


def test_every_event_says_when_it_comes_and_only_before_can_be_vetoed() -> None:
    assert all(event.name.startswith(("BEFORE_", "AFTER_", "ON_")) for event in HookEvent)
    assert all(event.can_be_vetoed == event.name.startswith("BEFORE_") for event in HookEvent)
    assert all(event.value == event.name.lower() for event in HookEvent)


def test_the_payload_of_a_save_is_what_the_user_gave(manager: EnhancedCheckpointManager) -> None:
    recorder = Recorder()
    manager.register_hook("h", recorder, [*BEFORE_SAVE, *AFTER_SAVE])
    manager.save_checkpoint(
        MODEL,
        epoch=3,
        step=40,
        loss=0.5,
        val_loss=0.25,
        metrics={"accuracy": 0.9},
        config={"betas": (0.9, 0.99)},
        notes="good",
        model_name="small",
        checkpoint_type="milestone",
    )
    given = {
        "epoch": 3,
        "step": 40,
        "loss": 0.5,
        "val_loss": 0.25,
        "metrics": {"accuracy": 0.9},
        "config": {"betas": [0.9, 0.99]},
        "notes": "good",
        "model_name": "small",
        "checkpoint_type": "milestone",
    }
    before, after = recorder.seen
    assert given.items() <= before.data.items()
    assert given.items() <= after.data.items()
    assert after.data["size"] > 0
    assert sorted(after.data["best"]) == ["loss", "metrics.accuracy", "val_loss"]


def test_hooks_of_a_save_get_real_numbers_where_they_are_not_finite(manager: EnhancedCheckpointManager) -> None:
    """A hook that compares the loss with a limit must not stumble over the text ``nan``."""
    recorder = Recorder()
    manager.register_hook("h", recorder, [*BEFORE_SAVE, *AFTER_SAVE])
    manager.save_checkpoint(
        MODEL, loss=math.nan, val_loss=math.inf, metrics={"m": -math.inf, "n": math.nan}, config={"limit": math.inf}
    )
    for context in recorder.seen:
        assert math.isnan(context.data["loss"])
        assert context.data["val_loss"] == math.inf
        assert context.data["metrics"]["m"] == -math.inf
        assert math.isnan(context.data["metrics"]["n"])
        assert context.data["config"] == {"limit": math.inf}


def test_the_payloads_of_load_verification_and_deletion(manager: EnhancedCheckpointManager) -> None:
    recorder = Recorder()
    checkpoint = manager.save_checkpoint(MODEL, epoch=2, step=5, loss=0.5)
    manager.register_hook("h", recorder, EVERY)
    manager.load_checkpoint(checkpoint)
    manager.verify_experiment_integrity()
    manager.delete_checkpoint(checkpoint)
    data = {context.event: context.data for context in recorder.seen}
    loaded = data[HookEvent.AFTER_CHECKPOINT_LOAD]
    assert (loaded["checkpoint_id"], loaded["epoch"], loaded["step"]) == (checkpoint, 2, 5)
    assert (loaded["is_best_loss"], loaded["is_best_val_loss"]) == (True, False)
    assert data[HookEvent.AFTER_INTEGRITY_CHECK] == {"verified": True, "error": None}
    assert data[HookEvent.AFTER_CHECKPOINT_DELETE]["reason"] == "deleted by the user"


def test_a_failed_verification_is_told_with_its_error(manager: EnhancedCheckpointManager) -> None:
    recorder = Recorder()
    manager.save_checkpoint(MODEL)
    (told,) = manager.list_checkpoints()
    manager.register_hook("h", recorder, [HookEvent.AFTER_INTEGRITY_CHECK])
    with open(Path(told["path"]) / "state.json", "ab") as file:
        file.write(b" ")
    manager.verify_experiment_integrity()
    (context,) = recorder.seen
    assert context.data["verified"] is False
    assert "state.json" in context.data["error"]


def test_after_save_runs_when_the_checkpoint_can_be_loaded(manager: EnhancedCheckpointManager) -> None:
    loaded = []
    manager.register_hook(
        "h", lambda context: loaded.append(manager.load_checkpoint(context.checkpoint_id)), AFTER_SAVE
    )
    checkpoint = manager.save_checkpoint(MODEL)
    assert [part["model_state_dict"] for part in loaded] == [MODEL]
    assert loaded[0]["_checkpoint_metadata"]["checkpoint_id"] == checkpoint


def test_hooks_run_outside_every_lock_and_transaction(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    """From within a hook, another thread can save, delete and log: nothing is held that it would need."""
    other = manager.save_checkpoint(MODEL)
    failures: list[BaseException] = []
    ran: list[HookEvent] = []
    inside = threading.local()

    def elsewhere(context: HookContext) -> None:
        if threading.current_thread() is not threading.main_thread() or getattr(inside, "busy", False):
            return
        ran.append(context.event)

        def work() -> None:
            try:
                manager.pin(other)
                manager.unpin(other)
                gone = manager.save_checkpoint(MODEL)
                manager.delete_checkpoint(gone)  # takes the directory's lock alone
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive()

    manager.register_hook("elsewhere", elsewhere, EVERY)
    checkpoint = manager.save_checkpoint(MODEL, loss=0.5)
    manager.load_checkpoint(checkpoint)
    manager.delete_checkpoint(checkpoint)
    manager.verify_experiment_integrity()
    assert failures == []
    assert set(ran) == set(USUAL)
    assert manager.list_hooks()[0]["failures"] == 0


# --- vetoes -----------------------------------------------------------------------------------------------------

VETOES: list[tuple[Any, str | None]] = [(False, None), ({"continue": False, "reason": "too early"}, "too early")]


def check_veto(error: HookVetoError, event: HookEvent, reason: str | None) -> None:
    assert (error.hook, error.event, error.reason) == ("guard", event.value, reason)
    assert isinstance(error, RuntimeError)
    for part in ("'guard'", event.value, reason or ""):
        assert part in str(error)


@pytest.mark.parametrize(("value", "reason"), VETOES)
def test_a_vetoed_save_writes_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path, value: Any, reason: str | None
) -> None:
    manager.save_checkpoint(MODEL, loss=1.0)
    before, listed = files_under(tmp_path / "checkpoints"), manager.list_checkpoints()
    after = Recorder()
    manager.register_hook("guard", lambda context: value, BEFORE_SAVE)
    manager.register_hook("after", after, AFTER_SAVE)
    with pytest.raises(HookVetoError) as caught:
        manager.save_checkpoint(MODEL, loss=0.5)
    check_veto(caught.value, HookEvent.BEFORE_CHECKPOINT_SAVE, reason)
    assert files_under(tmp_path / "checkpoints") == before
    assert manager.list_checkpoints() == listed
    assert after.seen == []
    manager.unregister_hook("guard")
    assert manager.save_checkpoint(MODEL, loss=0.5)


@pytest.mark.parametrize(("value", "reason"), VETOES)
def test_a_vetoed_load_loads_nothing(manager: EnhancedCheckpointManager, value: Any, reason: str | None) -> None:
    checkpoint = manager.save_checkpoint(MODEL)
    after = Recorder()
    manager.register_hook("guard", lambda context: value, [HookEvent.BEFORE_CHECKPOINT_LOAD])
    manager.register_hook("after", after, [HookEvent.AFTER_CHECKPOINT_LOAD])
    with pytest.raises(HookVetoError) as caught:
        manager.load_checkpoint(checkpoint)
    check_veto(caught.value, HookEvent.BEFORE_CHECKPOINT_LOAD, reason)
    assert after.seen == []
    assert manager.get_performance_statistics()["loads"] == 0
    assert manager.list_checkpoints()[0]["verification"] is None  # no file was read


@pytest.mark.parametrize(("value", "reason"), VETOES)
def test_a_vetoed_deletion_removes_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path, value: Any, reason: str | None
) -> None:
    checkpoint = manager.save_checkpoint(MODEL, loss=0.5)
    before = files_under(tmp_path / "checkpoints")
    after = Recorder()
    manager.register_hook("guard", lambda context: value, [HookEvent.BEFORE_CHECKPOINT_DELETE])
    manager.register_hook("after", after, [HookEvent.AFTER_CHECKPOINT_DELETE])
    with pytest.raises(HookVetoError) as caught:
        manager.delete_checkpoint(checkpoint)
    check_veto(caught.value, HookEvent.BEFORE_CHECKPOINT_DELETE, reason)
    assert files_under(tmp_path / "checkpoints") == before
    assert manager.list_trash() == []
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    assert after.seen == []


@pytest.mark.parametrize(("value", "reason"), VETOES)
def test_a_vetoed_verification_records_nothing(
    manager: EnhancedCheckpointManager, value: Any, reason: str | None
) -> None:
    manager.save_checkpoint(MODEL)
    after = Recorder()
    manager.register_hook("guard", lambda context: value, [HookEvent.BEFORE_INTEGRITY_CHECK])
    manager.register_hook("after", after, [HookEvent.AFTER_INTEGRITY_CHECK])
    with pytest.raises(HookVetoError) as caught:
        manager.verify_experiment_integrity()
    check_veto(caught.value, HookEvent.BEFORE_INTEGRITY_CHECK, reason)
    assert after.seen == []
    assert manager.list_checkpoints()[0]["verification"] is None


def test_false_from_an_after_hook_is_no_veto(manager: EnhancedCheckpointManager) -> None:
    recorder = Recorder(returns={"continue": False, "reason": "too late"})
    later = Recorder(returns=False)
    after = [event for event in dict.fromkeys(USUAL) if not event.can_be_vetoed]
    after = [*after, HookEvent.ON_CHECKPOINT_SAVE_FAILED]
    manager.register_hook("false", recorder, after)
    manager.register_hook("later", later, after)
    manager.register_hook("advice", ok, [HookEvent.BEFORE_RETENTION])  # there are passes then
    use_everything(manager)
    fail_to_save(manager)
    assert set(recorder.events) == set(later.events) == set(after)


def test_a_vetoed_removal_by_retention_keeps_that_checkpoint(run: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(run, str(tmp_path / "checkpoints"), retention_policy=KeepLast(1))
    first = manager.save_checkpoint(MODEL, epoch=1)
    after = Recorder()
    manager.register_hook("guard", lambda context: context.checkpoint_id != first, [HookEvent.BEFORE_CHECKPOINT_DELETE])
    manager.register_hook("after", after, [HookEvent.AFTER_CHECKPOINT_DELETE])
    second = manager.save_checkpoint(MODEL, epoch=2)
    third = manager.save_checkpoint(MODEL, epoch=3)
    assert [c["checkpoint_id"] for c in manager.list_checkpoints()] == [first, third]
    assert [context.checkpoint_id for context in after.seen] == [second]
    assert after.seen[0].data["reason"] == "no rule keeps it"
    assert manager.load_checkpoint(first)["epoch"] == 1
    manager.unregister_hook("guard")
    fourth = manager.save_checkpoint(MODEL, epoch=4)
    assert [c["checkpoint_id"] for c in manager.list_checkpoints()] == [fourth]


# --- hooks that misbehave ---------------------------------------------------------------------------------------


class Strange(BaseException):
    """Not an Exception, and none of Python's own."""


class Mute(Exception):
    """An exception that fails to say what it is."""

    def __str__(self) -> str:
        raise AttributeError("no text")


class Broken:
    """A result of which nothing can be asked."""

    shape = ()

    def item(self) -> object:
        raise OSError("the device is gone")


class BrokenDict(dict[str, object]):
    """A result that fails when it is read."""

    def get(self, *_: object) -> object:
        raise OSError("cannot be read")


def spoil_event(context: HookContext) -> None:
    del context.event
    raise ValueError("and fails")


def spoil_data(context: HookContext) -> None:
    context.data = None  # type: ignore[assignment]


def spoil_everything(context: HookContext) -> None:
    del context.data, context.user_data, context.checkpoint_id
    context.metadata = 5  # type: ignore[assignment]


def spoil_by_itself(context: HookContext) -> None:
    context.data["me"] = context.data


def mute(context: HookContext) -> None:
    raise Mute


MEAN: dict[str, Callable[[HookContext], object]] = {
    "no text": mute,
    "no event": spoil_event,
    "no data": spoil_data,
    "nothing": spoil_everything,
    "itself": spoil_by_itself,
    "broken result": lambda context: Broken(),
    "broken dict": lambda context: BrokenDict(),
}


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("case", MEAN)
def test_whatever_a_handler_does_to_what_it_gets_and_gives_the_save_ends_well(
    manager: EnhancedCheckpointManager, case: str, blocking: bool
) -> None:
    seen: list[tuple[HookEvent, type]] = []
    both = [*BEFORE_SAVE, *AFTER_SAVE]
    manager.register_hook("mean", MEAN[case], both, priority=0)
    manager.register_hook("background", ok, both, priority=1, async_execution=True)
    manager.register_hook("next", lambda c: seen.append((c.event, type(c.data))), both, priority=2)
    manager.register_hook("errors", ok, [HookEvent.ON_ERROR])
    checkpoint = manager.save_checkpoint(MODEL, blocking=blocking)
    assert manager.wait(timeout=DEADLINE)
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    assert seen == [(HookEvent.BEFORE_CHECKPOINT_SAVE, dict), (HookEvent.AFTER_CHECKPOINT_SAVE, dict)]
    failures = {told["name"]: told["failures"] for told in manager.list_hooks()}
    assert failures["background"] == failures["next"] == failures["errors"] == 0
    assert failures["mean"] == {"no text": 2, "no event": 2, "broken result": 1, "broken dict": 1}.get(case, 0)


@pytest.mark.parametrize("where", ["fails", "takes too long"])
def test_where_advice_on_retention_cannot_be_had_nothing_is_removed(
    manager: EnhancedCheckpointManager, where: str
) -> None:
    """It may be what keeps the best of a week."""
    manager._max_checkpoints = 1
    done = threading.Event()

    def advise(context: HookContext) -> object:
        if context.get("removed") and where == "fails":
            raise OSError("the database is locked")
        if context.get("removed"):
            done.wait(DEADLINE)
        return {"retention_policy": KeepLast(100)}

    manager.register_hook("advise", advise, [HookEvent.BEFORE_RETENTION], timeout=0.05)
    for epoch in range(6):
        manager.save_checkpoint(MODEL, epoch=epoch)
    done.set()
    assert len(manager.list_checkpoints()) == 6
    manager.unregister_hook("advise")
    manager.save_checkpoint(MODEL, epoch=6)
    assert len(manager.list_checkpoints()) == 1


@pytest.mark.parametrize("advice", [{"retention_policy": None}, {"keep": 5}, {"keep": "abc"}, {"keep": [[1]]}])
def test_advice_that_is_none_removes_nothing_and_names_the_hook(
    manager: EnhancedCheckpointManager, advice: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    manager._max_checkpoints = 1
    manager.register_hook("advise", lambda context: advice, [HookEvent.BEFORE_RETENTION])
    for epoch in range(3):
        manager.save_checkpoint(MODEL, epoch=epoch)
    assert len(manager.list_checkpoints()) == 3
    assert "hook 'advise' must return" in caplog.text


@pytest.mark.parametrize("raised", [SystemExit, Strange])
def test_a_policy_of_a_hook_that_fails_fails_no_save(
    manager: EnhancedCheckpointManager, raised: type[BaseException]
) -> None:
    class Fails:
        def keeps(self, records: object, now: float) -> NoReturn:
            raise raised

    manager.register_hook("advise", lambda context: {"retention_policy": Fails()}, [HookEvent.BEFORE_RETENTION])
    saved = manager.save_checkpoint(MODEL)
    assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL


def test_a_database_that_fails_when_hooks_are_to_be_told_fails_nothing(
    manager: EnhancedCheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = manager.save_checkpoint(MODEL, loss=0.5)
    told: list[object] = []
    manager.register_hook("best", told.append, [HookEvent.ON_BEST_MODEL_UPDATE])
    manager.register_hook("errors", lambda context: told.append(context.data["source"]), [HookEvent.ON_ERROR])

    def refuse(*_: object) -> NoReturn:
        raise DatabaseError("locked")

    real = manager._db.checkpoints.of_experiment
    calls = iter([real, refuse])
    monkeypatch.setattr(manager._db.checkpoints, "of_experiment", lambda experiment: next(calls)(experiment))
    assert manager.delete_checkpoint(checkpoint)
    assert told == ["database"]


def test_ctrl_c_before_a_save_that_fails_is_raised_with_it_and_not_later(manager: EnhancedCheckpointManager) -> None:
    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    manager.register_hook("h", interrupted, BEFORE_SAVE)
    staging = Path(manager.checkpoint_dir) / ".engine" / "staging"
    staging.rmdir()
    with pytest.raises(KeyboardInterrupt) as caught:
        manager.save_checkpoint(MODEL)
    assert isinstance(caught.value.__context__, StorageError)
    staging.mkdir()
    manager.unregister_hook("h")
    assert manager.save_checkpoint(MODEL)


def test_ctrl_c_in_a_hook_of_errors_is_the_users_too(hooks: HookManager) -> None:
    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    hooks.register_hook("broken", fail, AFTER_SAVE)
    hooks.register_hook("errors", interrupted, [HookEvent.ON_ERROR])
    with pytest.raises(KeyboardInterrupt):
        hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)


def test_the_exit_that_a_signal_handler_raises_in_a_hook_comes_when_the_save_has_ended(
    manager: EnhancedCheckpointManager,
) -> None:
    """A scheduler's SIGTERM must end the program; a hook's own SystemExit must not."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(143)

    earlier = signal.signal(signal.SIGUSR2, leave)
    try:
        manager.register_hook("h", lambda context: signal.raise_signal(signal.SIGUSR2), BEFORE_SAVE)
        with pytest.raises(SystemExit) as caught:
            manager.save_checkpoint(MODEL)
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert caught.value.code == 143
    assert len(manager.list_checkpoints()) == 1


def test_an_exception_that_cannot_be_changed_is_the_one_that_is_told(hooks: HookManager) -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    def broken(context: HookContext) -> None:
        raise Frozen(5)

    hooks.register_hook("h", broken, AFTER_SAVE)
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert result.errors == {"h": Frozen(5)}
    assert hooks.get_performance_stats("h")["failed_calls"] == 1


def test_the_end_of_a_child_run_ends_no_other(run: ExperimentTracker) -> None:
    child = run.child("child")
    grandchild = child.child("grandchild")
    child.close()
    assert grandchild.record.status == "running"
    grandchild.close("failed")


def test_the_end_of_a_run_is_told_although_its_checkpoints_cannot_be_waited_for(
    run: ExperimentTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[HookContext] = []
    run.hook_manager.register_hook("end", told.append, [HookEvent.ON_EXPERIMENT_END])

    def refuse() -> NoReturn:
        raise DatabaseError("gone")

    monkeypatch.setattr(run._events, "_settle", refuse)
    with pytest.raises(DatabaseError, match="gone"):
        run.close()
    assert [context.data["status"] for context in told] == ["completed"]


def test_ctrl_c_in_a_hook_at_the_end_of_a_run_leaves_it_closed(run: ExperimentTracker) -> None:
    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    run.hook_manager.register_hook("h", interrupted, [HookEvent.ON_EXPERIMENT_END])
    with pytest.raises(KeyboardInterrupt):
        run.close()
    with pytest.raises(DatabaseError, match="was closed"):
        run.database.query("SELECT 1")


def test_errors_go_through_pickle_as_pools_of_processes_send_them() -> None:
    made = [
        HookVetoError("h", "before_checkpoint_save", "too early", "c"),
        StorageError("write a file", "/x", OSError(28, "full"), "free some"),
        HookTimeoutError(2.5),
        ClaimLostError("g", 3),
        IntegrityError("/x", "is gone", 1, 2),
        HookRegistrationError("plain"),
        MissingDependencyError("torch", "torch", "this"),
    ]
    for error in made:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))
        for name in ("errno", "filename", "msg"):
            assert getattr(again, name, None) == getattr(error, name, None)
    local = UnsupportedValueError("config.f", lambda: None, "store its name")
    again = pickle.loads(pickle.dumps(local))  # noqa: S301
    assert (str(again), again.path, again.value_type) == (str(local), "config.f", "<class 'function'>")


@pytest.mark.parametrize("raised", [OSError, MemoryError, RecursionError, StopIteration, SystemExit, Strange])
def test_hooks_that_fail_at_every_event_change_no_outcome(
    manager: EnhancedCheckpointManager, caplog: pytest.LogCaptureFixture, raised: type[BaseException]
) -> None:
    def broken(context: HookContext) -> None:
        raise raised("the hook is broken")

    recorder = Recorder()
    failing = [event for event in USUAL if event is not HookEvent.BEFORE_RETENTION]  # without advice there is no pass
    manager.register_hook("broken", broken, failing, priority=0)
    manager.register_hook("good", recorder, EVERY, priority=1)
    with caplog.at_level(logging.ERROR):
        use_everything(manager)
    assert recorder.events.count(HookEvent.AFTER_CHECKPOINT_SAVE) == 1
    assert recorder.events == USUAL  # the others run all the same
    assert manager.list_checkpoints() == []
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == len(failing)  # once each
    for event, text in zip(failing, logged):
        assert event.value in text
        assert "'broken'" in text
    assert manager.hook_manager is not None
    stats = manager.hook_manager.get_performance_stats("broken")
    assert (stats["total_calls"], stats["failed_calls"], stats["successful_calls"]) == (11, 11, 0)
    fail_to_save(manager)  # with the error that it has without hooks


def test_ctrl_c_in_a_hook_is_the_users_and_an_acknowledged_checkpoint_stays(manager: EnhancedCheckpointManager) -> None:
    def interrupted(context: HookContext) -> None:
        raise KeyboardInterrupt

    manager.register_hook("h", interrupted, AFTER_SAVE)
    with pytest.raises(KeyboardInterrupt):
        manager.save_checkpoint(MODEL)
    (told,) = manager.list_checkpoints()
    assert manager.load_checkpoint(told["checkpoint_id"])["model_state_dict"] == MODEL


def test_a_failing_hook_does_not_hide_a_corrupt_file(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL)
    (told,) = manager.list_checkpoints()
    manager.register_hook("broken", fail, EVERY)
    with open(Path(told["path"]) / "state.json", "ab") as file:
        file.write(b" ")
    assert manager.verify_experiment_integrity()["failed"] == 1
    with pytest.raises(ValueError, match=r"state\.json"):
        manager.load_checkpoint(told["checkpoint_id"])


def test_the_error_handler_gets_exception_and_context(hooks: HookManager) -> None:
    told: list[tuple[BaseException, HookContext]] = []
    hooks.register_hook(
        "h", fail, AFTER_SAVE, error_handler=lambda error, context: told.append((error, context)), team="a"
    )
    hooks.register_hook("good", ok, AFTER_SAVE, error_handler=lambda error, context: told.append((error, context)))
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE, checkpoint_id="c", epoch=1)
    ((error, context),) = told
    assert error is result.errors["h"]
    assert (context.event, context.checkpoint_id, context.get("epoch")) == (HookEvent.AFTER_CHECKPOINT_SAVE, "c", 1)


@pytest.mark.parametrize("raised", [ValueError, SystemExit, Strange])
def test_an_error_handler_that_fails_is_contained_and_logged(
    hooks: HookManager, caplog: pytest.LogCaptureFixture, raised: type[BaseException]
) -> None:
    def worse(error: BaseException, context: HookContext) -> None:
        raise raised("even worse")

    last = Recorder()
    hooks.register_hook("h", fail, AFTER_SAVE, error_handler=worse)
    hooks.register_hook("last", last, AFTER_SAVE)
    with caplog.at_level(logging.ERROR):
        result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert isinstance(result.errors["h"], OSError)
    assert len(last.seen) == 1
    assert any("error handler" in r.getMessage() and "'h'" in r.getMessage() for r in caplog.records)


def test_an_error_handler_cannot_veto(manager: EnhancedCheckpointManager) -> None:
    manager.register_hook("h", fail, BEFORE_SAVE, error_handler=lambda error, context: False)
    assert manager.save_checkpoint(MODEL)


def mutate(context: HookContext) -> None:
    """Change everything that can be reached, at every level."""
    context.checkpoint_id = context.experiment_id = "changed"
    for value in list(context.data.values()):
        if isinstance(value, dict):
            value["accuracy"] = 99.0
            for inner in value.values():
                if isinstance(inner, list):
                    inner.append("changed")
        if isinstance(value, list):
            value.append("changed")
    for name in list(context.data):
        context.data[name] = "changed"
    context.data["new"] = object()
    context.metadata["team"] = "changed"


def test_a_hook_that_changes_its_context_changes_nothing_stored(
    manager: EnhancedCheckpointManager, run: ExperimentTracker
) -> None:
    metrics, config = {"accuracy": 0.5}, {"betas": [0.9], "nested": {"accuracy": 1}}
    manager.register_hook("mutate", mutate, EVERY, team="a")
    checkpoint = manager.save_checkpoint(MODEL, epoch=3, loss=0.5, metrics=metrics, config=config, notes="n")
    assert (metrics, config) == ({"accuracy": 0.5}, {"betas": [0.9], "nested": {"accuracy": 1}})  # nor the caller's
    manager.unregister_hook("mutate")
    loaded = manager.load_checkpoint(checkpoint)
    assert (loaded["epoch"], loaded["loss"], loaded["metrics"]) == (3, 0.5, {"accuracy": 0.5})
    assert loaded["config"] == {"betas": [0.9], "nested": {"accuracy": 1}}
    (told,) = manager.list_checkpoints()
    assert (told["experiment_id"], told["notes"], told["metrics"]) == (run.experiment_id, "n", {"accuracy": 0.5})
    assert manager.load_checkpoint(checkpoint_type="best:accuracy")["_checkpoint_metadata"]["is_best_metric"]
    better = manager.save_checkpoint(MODEL, metrics={"accuracy": 0.6})  # better than 0.5, not than the hook's 99
    assert manager.load_checkpoint(checkpoint_type="best:accuracy")["_checkpoint_metadata"]["checkpoint_id"] == better
    assert "changed" not in (Path(told["path"]) / "checkpoint.json").read_text()


def test_a_hook_that_changes_its_context_changes_no_returned_value(manager: EnhancedCheckpointManager) -> None:
    manager.register_hook("mutate", mutate, EVERY, team="a")
    checkpoint = manager.save_checkpoint(MODEL, epoch=3, metrics={"accuracy": 0.5})
    loaded = manager.load_checkpoint(checkpoint)
    assert loaded["_checkpoint_metadata"]["checkpoint_id"] == checkpoint
    assert loaded["metrics"] == {"accuracy": 0.5}
    assert manager.verify_experiment_integrity()["checkpoint_results"][checkpoint]["verified"] is True
    assert manager.list_hooks()[0]["metadata"] == {"team": "a"}


def test_a_hook_can_unregister_and_disable_others_while_firing(hooks: HookManager) -> None:
    first, last = Recorder(), Recorder()

    def meddle(context: HookContext) -> None:
        hooks.unregister_hook("meddle")
        hooks.disable_hook("last")
        hooks.register_hook("new", first, AFTER_SAVE, priority=0)

    hooks.register_hook("meddle", meddle, AFTER_SAVE, priority=1)
    hooks.register_hook("last", last, AFTER_SAVE, priority=2)
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    # A firing that is under way keeps the hooks that it began with.
    assert (list(result.results), len(last.seen), first.seen) == (["meddle", "last"], 1, [])
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert (list(result.results), len(last.seen), len(first.seen)) == (["new"], 1, 1)


def test_a_before_hook_can_register_an_after_hook_for_the_same_save(manager: EnhancedCheckpointManager) -> None:
    recorder = Recorder()

    def prepare(context: HookContext) -> None:
        manager.register_hook("after", recorder, AFTER_SAVE)

    manager.register_hook("prepare", prepare, BEFORE_SAVE)
    checkpoint = manager.save_checkpoint(MODEL)
    assert [context.checkpoint_id for context in recorder.seen] == [checkpoint]


@pytest.mark.parametrize("event", [HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE])
def test_a_hook_can_save_itself(manager: EnhancedCheckpointManager, event: HookEvent) -> None:
    inner: list[str] = []

    def save_again(context: HookContext) -> None:
        if not inner:
            inner.append("started")
            inner.append(manager.save_checkpoint({"inner": b"x"}, epoch=9))

    manager.register_hook("again", save_again, [event])
    outer = manager.save_checkpoint(MODEL, epoch=1)
    assert manager.load_checkpoint(outer)["model_state_dict"] == MODEL
    assert manager.load_checkpoint(inner[1])["model_state_dict"] == {"inner": b"x"}
    assert {c["epoch"] for c in manager.list_checkpoints()} == {1, 9}


def test_hooks_that_save_within_hooks_that_save_all_come_to_their_end(manager: EnhancedCheckpointManager) -> None:
    depth = 0

    def deeper(context: HookContext) -> None:
        nonlocal depth
        depth += 1
        if depth < 15:
            manager.save_checkpoint({"depth": depth})
        raise RecursionError("enough")

    manager.register_hook("deeper", deeper, BEFORE_SAVE)
    checkpoint = manager.save_checkpoint(MODEL)
    assert manager.load_checkpoint(checkpoint)["model_state_dict"] == MODEL
    assert len(manager.list_checkpoints()) == 15


def test_a_hook_can_delete_the_checkpoint_that_was_just_saved(manager: EnhancedCheckpointManager) -> None:
    manager.register_hook("delete", lambda context: manager.delete_checkpoint(context.checkpoint_id), AFTER_SAVE)
    checkpoint = manager.save_checkpoint(MODEL)
    assert manager.list_checkpoints() == []
    assert [entry["checkpoint_id"] for entry in manager.list_trash()] == [checkpoint]


# --- threads ----------------------------------------------------------------------------------------------------


def test_many_threads_fire_at_once_and_every_call_is_counted(hooks: HookManager) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    start = threading.Barrier(8)
    wrong: list[object] = []

    def mine(context: HookContext) -> dict[str, Any]:
        return {"thread": context.get("thread")}

    def fire(number: int) -> None:
        start.wait(DEADLINE)
        for _ in range(200):
            result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE, thread=number)
            if result.get_result("mine") != {"thread": number} or set(result.errors) != {"broken"}:
                wrong.append(result)

    hooks.register_hook("mine", mine, AFTER_SAVE)
    hooks.register_hook("broken", fail, AFTER_SAVE)
    logging.disable(logging.CRITICAL)
    try:
        threads = [threading.Thread(target=fire, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    finally:
        logging.disable(logging.NOTSET)
        sys.setswitchinterval(interval)
    assert wrong == []
    assert hooks.get_performance_stats("mine")["total_calls"] == 1600
    broken = hooks.get_performance_stats("broken")
    assert (broken["total_calls"], broken["failed_calls"]) == (1600, 1600)


def test_registering_while_others_fire_never_breaks_a_firing(hooks: HookManager) -> None:
    stop = threading.Event()
    results = []
    hooks.register_hook("always", lambda context: {"ran": True}, AFTER_SAVE)

    def fire() -> None:
        while not stop.is_set():
            results.append(hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE).get_result("always"))

    threads = [threading.Thread(target=fire) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(100):
        hooks.register_hook(f"h{i}", ok, EVERY, priority=i % 7)
        hooks.disable_hook(f"h{i // 2}")
        hooks.list_hooks()
        hooks.get_performance_stats()
        hooks.unregister_hook(f"h{i - 5}")
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert results
    assert all(result == {"ran": True} for result in results)


# --- without hooks ----------------------------------------------------------------------------------------------


def test_without_hooks_everything_works_and_registering_is_refused(run: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(run, str(tmp_path / "checkpoints"), enable_hooks=False)
    assert manager.hook_manager is None
    use_everything(manager)
    assert manager.get_performance_statistics()["hooks"] == {}
    for call in (
        lambda: manager.register_hook("h", ok, AFTER_SAVE),
        lambda: manager.unregister_hook("h"),
        lambda: manager.list_hooks(),
    ):
        with pytest.raises(ConfigurationError, match="enable_hooks=True"):
            call()


def test_the_managers_own_calls_pass_to_its_hook_manager(manager: EnhancedCheckpointManager) -> None:
    manager.register_hook("h", ok, AFTER_SAVE, priority=4, team="a")
    assert manager.hook_manager is not None
    assert manager.list_hooks() == manager.hook_manager.list_hooks()
    assert manager.list_hooks(HookEvent.BEFORE_CHECKPOINT_SAVE) == []
    with pytest.raises(HookRegistrationError, match=r"'h'.*taken"):
        manager.register_hook("h", ok, AFTER_SAVE)
    manager.save_checkpoint(MODEL)
    assert manager.get_performance_statistics()["hooks"]["h"]["total_calls"] == 1
    assert manager.unregister_hook("h")
    assert manager.list_hooks() == []


def test_managers_of_different_runs_have_hooks_of_their_own(run: ExperimentTracker, tmp_path: Path) -> None:
    recorder = Recorder()
    EnhancedCheckpointManager(run, str(tmp_path / "checkpoints")).register_hook("h", recorder, EVERY)
    with ExperimentTracker("other", database_url=run.database.database_url) as tracker:
        second = EnhancedCheckpointManager(tracker, str(tmp_path / "checkpoints"))
        second.save_checkpoint(MODEL)
        assert recorder.seen == []
        assert second.list_hooks() == []


ASYNC: dict[str, Callable[[HookManager], object]] = {
    "function": lambda h: h.register_hook("wrong", coroutine, AFTER_SAVE),
    "callable": lambda h: h.register_hook("wrong", AsyncCall(), AFTER_SAVE),
    "object": lambda h: h.register_hook(AsyncHook("wrong")),
    "background": lambda h: h.register_hook("wrong", ok, AFTER_SAVE, async_execution=True),
}


@pytest.mark.parametrize("case", ASYNC)
def test_without_async_such_hooks_are_refused_when_they_are_registered(case: str) -> None:
    hooks = HookManager(enable_async=False)
    with pytest.raises(HookRegistrationError, match=r"'wrong'.*handler.*enable_async=False"):
        ASYNC[case](hooks)
    assert hooks.list_hooks() == []


def test_without_async_a_coroutine_of_a_plain_function_is_not_taken_for_success() -> None:
    """A wrapper hides that its function is async: nothing would ever run."""
    hooks = HookManager(enable_async=False)
    hooks.register_hook("hidden", lambda context: coroutine(context), AFTER_SAVE)
    result = hooks.fire_hook(HookEvent.AFTER_CHECKPOINT_SAVE)
    assert not result.success
    assert "enable_async" in str(result.errors["hidden"])


def test_numpys_false_is_a_veto_and_zero_is_not(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    hooks = HookManager()
    answers = iter([np.isfinite(float("nan")), {"continue": np.False_}, 0, 0.0, [], {"continue": 0}])
    hooks.register_hook("guard", lambda context: next(answers), [HookEvent.BEFORE_CHECKPOINT_SAVE])
    stopped = [hooks.fire_hook(HookEvent.BEFORE_CHECKPOINT_SAVE).stopped_by for _ in range(6)]
    assert stopped == ["guard", "guard", None, None, None, None]
