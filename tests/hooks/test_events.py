"""Every event that is declared is fired by the engine, with what docs/hooks.md says that it brings."""

from __future__ import annotations

import re
import sqlite3
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, KeepLast
from model_checkpoint.errors import ConfigurationError, DatabaseError, HookVetoError, IntegrityError, StorageError
from model_checkpoint.hooks import HookContext, HookEvent, HookManager

MODEL = {"weights": b"\x01\x02\x03\x04"}
DEADLINE = 20.0
DOCS = Path(__file__).parents[2] / "docs" / "hooks.md"
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
    "array": (array,),
    "None": (type(None),),
}


class Heard:
    """A handler of every event, and what it was given."""

    def __init__(self, hooks: HookManager) -> None:
        self.hooks = hooks
        self.contexts: list[HookContext] = []
        hooks.register_hook("heard", self.hear, tuple(HookEvent))

    def hear(self, context: HookContext) -> None:
        self.contexts.append(context)

    def of(self, event: HookEvent) -> list[HookContext]:
        assert self.hooks.wait(DEADLINE)
        return [context for context in self.contexts if context.event is event]

    def one(self, event: HookEvent) -> HookContext:
        (context,) = self.of(event)
        return context


@pytest.fixture
def heard() -> Heard:
    return Heard(HookManager())


@pytest.fixture
def run(tmp_path: Path, heard: Heard) -> Iterator[ExperimentTracker]:
    tracker = ExperimentTracker("run", "p", database_url=f"sqlite:///{tmp_path}/runs.db", hook_manager=heard.hooks)
    yield tracker
    tracker.close()


def train(hooks: HookManager, steps: int) -> None:
    """Training as a user writes it, who lets the built-in hooks look at it."""
    weight = 0.0
    for step in range(steps):
        inputs, targets = array("d", [1.0, 2.0]), array("d", [2.0, 4.0])
        hooks.fire_hook(HookEvent.BEFORE_TRAINING_STEP, step=step, inputs=inputs)
        outputs = array("d", [weight * x for x in inputs])
        hooks.fire_hook(HookEvent.AFTER_FORWARD_PASS, step=step, outputs=outputs)
        hooks.fire_hook(HookEvent.BEFORE_LOSS_COMPUTATION, step=step, outputs=outputs, targets=targets)
        errors = [y - t for y, t in zip(outputs, targets)]
        hooks.fire_hook(HookEvent.AFTER_LOSS_COMPUTATION, step=step, loss=array("d", [sum(e * e for e in errors)]))
        weight -= 0.1 * sum(e * x for e, x in zip(errors, inputs))


def damage(manager: EnhancedCheckpointManager, checkpoint_id: str) -> None:
    (told,) = [c for c in manager.list_checkpoints() if c["checkpoint_id"] == checkpoint_id]
    with open(Path(told["path"]) / "state.json", "ab") as file:
        file.write(b" ")


def everything(tmp_path: Path, heard: Heard) -> None:
    """Do everything that fires an event."""
    url, folder = f"sqlite:///{tmp_path}/runs.db", tmp_path / "checkpoints"
    with ExperimentTracker("run", "p", ["t"], {"lr": 0.1}, url, hook_manager=heard.hooks) as tracker:
        tracker.watch_metric("loss", above=10.0)
        tracker.log_metrics({"loss": 11.0, "accuracy": 0.5}, step=1)
        tracker.flush()
        with EnhancedCheckpointManager(tracker, folder, max_checkpoints=1) as manager:
            lost = manager.save_checkpoint(MODEL, epoch=1, loss=0.5, metrics={"accuracy": 0.5}, config={"a": [1]})
            manager.load_checkpoint(manager.save_checkpoint(MODEL, epoch=2, loss=0.25, val_loss=0.3, notes="n"))
        with sqlite3.connect(tmp_path / "runs.db") as raw:
            raw.execute("DELETE FROM checkpoints WHERE id != ?", [lost])
        raw.close()
        with EnhancedCheckpointManager(tracker, folder, max_checkpoints=1) as manager:  # finds the row again
            manager.verify_experiment_integrity()
            damage(manager, manager.list_checkpoints()[-1]["checkpoint_id"])
            manager.verify_experiment_integrity()
            staging = folder / ".engine" / "staging"
            staging.rmdir()
            with pytest.raises(StorageError):
                manager.save_checkpoint(MODEL)
            staging.mkdir()
            manager.delete_checkpoint(manager.list_checkpoints()[-1]["checkpoint_id"])
        with pytest.raises(DatabaseError):
            tracker.database.query("SELECT what FROM nowhere")
        heard.hooks.register_hook("broken", lambda context: 1 / 0, [HookEvent.BEFORE_TRAINING_STEP])
        train(heard.hooks, 2)
    assert heard.hooks.wait(DEADLINE)


def documented() -> dict[HookEvent, dict[str, str]]:
    """Return event -> key -> type, as docs/hooks.md has them."""
    found: dict[HookEvent, dict[str, str]] = {}
    for part in re.split(r"^### ", DOCS.read_text(), flags=re.MULTILINE)[1:]:
        event = HookEvent[part.split("\n", 1)[0]]
        rows = re.findall(r"^\| (`.*?) \| (.*?) \|", part, flags=re.MULTILINE)
        assert rows or "No keys." in part
        found[event] = {key: kind for keys, kind in rows for key in re.findall(r"`(\w+)`", keys)}
    return found


def test_every_declared_event_is_fired_with_the_documented_keys_and_types(tmp_path: Path, heard: Heard) -> None:
    everything(tmp_path, heard)
    fired = {context.event for context in heard.contexts}
    assert [event.name for event in HookEvent if event not in fired] == []
    tables = documented()
    assert list(tables) == list(HookEvent)  # documented, and in the order in which they are declared
    for context in heard.contexts:
        table = tables[context.event]
        assert sorted(context.data) == sorted(table), context.event
        for key, value in context.data.items():
            allowed = [each for name in table[key].split(" or ") if name != "any" for each in TYPES[name]]
            assert not allowed or type(value) in allowed, (context.event, key, value)


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_tracker_and_its_managers_share_their_hooks(tmp_path: Path, run: ExperimentTracker, heard: Heard) -> None:
    first, second = (EnhancedCheckpointManager(run, tmp_path / name) for name in "ab")
    assert first.hook_manager is second.hook_manager is run.hook_manager is heard.hooks
    child = run.child("c")
    assert child.hook_manager is heard.hooks
    child.close()
    alone = EnhancedCheckpointManager(None, tmp_path / "c", database_url=run.database.database_url)
    assert alone.hook_manager is not None
    assert alone.hook_manager is not heard.hooks
    with pytest.raises(ConfigurationError, match="hook_manager"):
        EnhancedCheckpointManager(run, tmp_path / "d", hook_manager="h")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="enable_hooks=True"):
        EnhancedCheckpointManager(run, tmp_path / "d", hook_manager=heard.hooks, enable_hooks=False)
    with pytest.raises(ConfigurationError, match="hook_manager"):
        ExperimentTracker("x", database_url=run.database.database_url, hook_manager=5)  # type: ignore[arg-type]


def test_the_best_model_is_told_when_it_is_saved_removed_and_brought_back(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c")
    good = manager.save_checkpoint(MODEL, epoch=1, loss=0.5, metrics={"accuracy": 0.9})
    better = manager.save_checkpoint(MODEL, epoch=2, loss=0.25, metrics={"accuracy": 0.8})
    manager.save_checkpoint(MODEL, epoch=3, loss=0.75, metrics={"accuracy": 0.7})  # the best of nothing
    manager.delete_checkpoint(better)
    manager.undelete(better)
    told = [(c.checkpoint_id, c.data["cause"], c.data["criteria"]) for c in heard.of(HookEvent.ON_BEST_MODEL_UPDATE)]
    assert told == [
        (good, "saved", {"loss": 0.5, "metrics.accuracy": 0.9}),
        (better, "saved", {"loss": 0.25}),
        (good, "removed", {"loss": 0.5}),
        (better, "undeleted", {"loss": 0.25}),
    ]


def test_that_nothing_is_the_best_any_more_is_told_too(tmp_path: Path, run: ExperimentTracker, heard: Heard) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c")
    only = manager.save_checkpoint(MODEL, loss=0.5)
    manager.delete_checkpoint(only)
    last = heard.of(HookEvent.ON_BEST_MODEL_UPDATE)[-1]
    assert last.checkpoint_id is None
    assert last.data == {"criteria": {"loss": None}, "cause": "removed", "epoch": None, "step": None}


def test_damage_is_told_with_file_and_digests_by_verification_and_by_loads(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c")
    checkpoint = manager.save_checkpoint(MODEL)
    damage(manager, checkpoint)
    manager.verify_experiment_integrity()
    with pytest.raises(IntegrityError):
        manager.load_checkpoint(checkpoint)
    by_check, by_load = heard.of(HookEvent.ON_INTEGRITY_FAILURE)
    assert (by_check.checkpoint_id, by_check.data["operation"]) == (checkpoint, "verification")
    assert (by_load.checkpoint_id, by_load.data["operation"]) == (checkpoint, "load")
    for context in (by_check, by_load):
        (file,) = context.data["files"]
        assert "state.json" in file["name"]
        assert file["expected"] != file["actual"]
        assert file["problem"]


def test_a_policy_that_a_hook_returns_decides_the_retention_pass(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c", max_checkpoints=None, save_best=False)
    pinned = manager.save_checkpoint(MODEL, epoch=0)
    manager.pin(pinned)
    manager.register_hook("advice", lambda c: {"retention_policy": KeepLast(2)}, [HookEvent.BEFORE_RETENTION])
    saved = [manager.save_checkpoint(MODEL, epoch=epoch) for epoch in range(1, 5)]
    assert [c["epoch"] for c in manager.list_checkpoints()] == [0, 3, 4]  # what is pinned stays, whatever a hook says
    passes = heard.of(HookEvent.AFTER_RETENTION)
    assert [list(c.data["removed"]) for c in passes] == [[], [], [], [saved[0]], [saved[1]]]
    assert passes[-1].data["reclaimed"] > 0
    manager.register_hook("no", lambda context: False, [HookEvent.BEFORE_RETENTION])
    manager.save_checkpoint(MODEL, epoch=5)
    assert [c["epoch"] for c in manager.list_checkpoints()] == [0, 3, 4, 5]


def test_advice_that_is_no_policy_removes_nothing_and_fails_no_save(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c", max_checkpoints=1)
    manager.register_hook("bad", lambda context: {"retention_policy": 3}, [HookEvent.BEFORE_RETENTION])
    for epoch in range(3):
        manager.save_checkpoint(MODEL, epoch=epoch)
    assert len(manager.list_checkpoints()) == 3
    errors = heard.of(HookEvent.ON_ERROR)
    assert [(c.data["source"], c.data["error_type"]) for c in errors] == [("retention", "ConfigurationError")] * 3


def test_the_start_and_end_of_a_manager_are_told_once_each(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    manager = EnhancedCheckpointManager(run, tmp_path / "c")
    assert heard.one(HookEvent.ON_SYSTEM_START).data["checkpoint_dir"] == str(tmp_path / "c")
    assert heard.of(HookEvent.ON_SYSTEM_SHUTDOWN) == []
    manager.close()
    manager.close()
    assert heard.one(HookEvent.ON_SYSTEM_SHUTDOWN).data == heard.one(HookEvent.ON_SYSTEM_START).data


# --- experiments and metrics --------------------------------------------------------------------------------------


def test_the_life_of_an_experiment_is_told(tmp_path: Path, heard: Heard) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    tracker = ExperimentTracker("run", "p", ["t"], {"lr": 0.1}, url, hook_manager=heard.hooks)
    child = tracker.child("child")
    child.close("failed")
    tracker.set_status("running")  # as it was: nothing to tell
    tracker.close()
    ExperimentTracker.resume(tracker.experiment_id, url, hook_manager=heard.hooks).close("interrupted")
    starts = [(c.experiment_id, c.data["name"], c.data["resumed"]) for c in heard.of(HookEvent.ON_EXPERIMENT_START)]
    mine, its = tracker.experiment_id, child.experiment_id
    assert starts == [(mine, "run", False), (its, "child", False), (mine, "run", True)]
    assert heard.of(HookEvent.ON_EXPERIMENT_START)[1].data["parent_id"] == mine
    changes = heard.of(HookEvent.ON_EXPERIMENT_STATUS_CHANGE)
    assert [(c.experiment_id, c.data["previous"], c.data["status"]) for c in changes] == [
        (its, "running", "failed"),
        (mine, "running", "completed"),
        (mine, "completed", "running"),
        (mine, "running", "interrupted"),
    ]
    ends = [(c.experiment_id, c.data["status"]) for c in heard.of(HookEvent.ON_EXPERIMENT_END)]
    assert ends == [(its, "failed"), (mine, "completed"), (mine, "interrupted")]


def test_a_vetoed_metric_is_not_logged_and_says_so(run: ExperimentTracker, heard: Heard) -> None:
    def finite(context: HookContext) -> Any:
        bad = [name for name, value in context.data["metrics"].items() if value != value]
        return {"continue": False, "reason": f"NaN in {bad}"} if bad else None

    run.hook_manager.register_hook("finite", finite, [HookEvent.BEFORE_METRIC_COLLECTION])
    run.log_metrics({"a": 1.0, "b": 2.0}, step=1)
    with pytest.raises(HookVetoError, match="NaN in"):
        run.log_metrics({"a": 2.0, "b": float("nan")}, step=2)
    with pytest.raises(HookVetoError, match="finite"):
        run.log_metric("a", float("nan"))
    run.log_arrays("a", [3.0, 4.0])
    run.flush()
    assert [row["metric_value"] for row in run.get_metrics("a")] == [1.0, 3.0, 4.0]
    assert [row["metric_value"] for row in run.get_metrics("b")] == [2.0]
    asked = [(c.data["metrics"], c.data["step"]) for c in heard.of(HookEvent.BEFORE_METRIC_COLLECTION)]
    assert asked[0] == ({"a": 1.0, "b": 2.0}, 1)
    assert asked[-1] == ({"a": [3.0, 4.0]}, None)


def test_stored_batches_are_told_with_a_summary_of_each_metric(run: ExperimentTracker, heard: Heard) -> None:
    for step, value in enumerate([3.0, 1.0, 2.0]):
        run.log_metric("loss", value, step)
    run.flush()
    batches = heard.of(HookEvent.AFTER_METRIC_COLLECTION)
    assert sum(c.data["points"] for c in batches) == 3
    assert not any(c.data["spooled"] for c in batches)
    parts = [c.data["metrics"]["loss"] for c in batches]  # several where the writer's half second was up between
    assert sum(part["count"] for part in parts) == 3
    assert (parts[-1]["last"], parts[-1]["step"]) == (2.0, 2)
    assert (min(part["min"] for part in parts), max(part["max"] for part in parts)) == (1.0, 3.0)
    run.log_arrays("odd", [float("nan"), 1.0, 2.0])
    run.flush()
    odd = heard.of(HookEvent.AFTER_METRIC_COLLECTION)[-1].data["metrics"]["odd"]
    assert (odd["min"], odd["max"]) == (1.0, 2.0)


def test_a_threshold_is_told_when_it_is_crossed_and_again_after_a_return(run: ExperimentTracker, heard: Heard) -> None:
    run.watch_metric("loss", above=10.0, below=0.0)
    batches = [[1.0, 11.0, 12.0], [13.0], [5.0], [-1.0, 4.0, float("nan")], [3.0], [float("nan")]]
    for number, batch in enumerate(batches):
        run.log_arrays("loss", batch, [10 * number + place for place in range(len(batch))])
        run.flush()
    told = [(c.data["direction"], c.data["step"], c.data["count"]) for c in heard.of(HookEvent.ON_METRIC_THRESHOLD)]
    assert told == [("above", 1, 2), ("below", 30, 2), ("nan", 50, 1)]
    for wrong in ({}, {"above": "1"}, {"below": float("nan")}, {"above": True}, {"above": 1.0, "below": 5.0}):
        with pytest.raises(ConfigurationError, match="watch_metric"):
            run.watch_metric("loss", **wrong)  # type: ignore[arg-type]


def test_errors_of_the_database_are_told_while_training_goes_on(
    tmp_path: Path, run: ExperimentTracker, heard: Heard
) -> None:
    with sqlite3.connect(tmp_path / "runs.db") as raw:
        raw.execute("ALTER TABLE series RENAME TO away")
    run.log_metric("loss", 1.0)
    run.flush()  # into the spool
    failed = heard.of(HookEvent.ON_DATABASE_ERROR)
    assert failed
    assert "series" in failed[0].data["error"]
    assert all(c.data["spooled"] for c in heard.of(HookEvent.AFTER_METRIC_COLLECTION))
    with sqlite3.connect(tmp_path / "runs.db") as raw:
        raw.execute("ALTER TABLE away RENAME TO series")
    raw.close()
    run.flush()
    assert [row["metric_value"] for row in run.get_metrics("loss")] == [1.0]


def test_a_hook_of_database_errors_that_causes_one_ends(run: ExperimentTracker, heard: Heard) -> None:
    def again(context: HookContext) -> None:
        run.database.query("SELECT worse FROM nowhere")

    run.hook_manager.register_hook("again", again, [HookEvent.ON_DATABASE_ERROR])
    with pytest.raises(DatabaseError):
        run.database.query("SELECT what FROM elsewhere")
    assert "elsewhere" in heard.one(HookEvent.ON_DATABASE_ERROR).data["error"]
    assert run.hook_manager.get_performance_stats("again")["failed_calls"] == 1
