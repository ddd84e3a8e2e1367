"""The checkpoint manager through its public calls: saving, finding, loading, removing, and what bad input does."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.checkpoint.retention import KeepBest, KeepLast
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    FormatVersionError,
    IntegrityError,
    LockTimeoutError,
    StorageError,
    UnknownBackendError,
    UnknownCheckpointTypeError,
    UnsupportedValueError,
)

MODEL = {"weight": array("f", [1.0, 2.0, 3.0]), "layers": [{"bias": array("d", [0.5])}]}


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    with EnhancedCheckpointManager(tracker, str(tmp_path / "checkpoints")) as manager:
        yield manager


def folders(directory: Path) -> list[str]:
    """Return the ids of the published checkpoints, read from the disk."""
    return sorted(path.parent.name for path in directory.glob("*/*/checkpoint.json"))


def test_save_returns_a_uuid_and_load_returns_what_was_saved(manager: EnhancedCheckpointManager) -> None:
    saved = manager.save_checkpoint(
        MODEL,
        optimizer={"lr": 0.1},
        scheduler={"last": 3},
        epoch=2,
        step=70,
        loss=0.5,
        val_loss=0.25,
        metrics={"f1": 0.75},
        config={"layers": (1, 2)},
        notes="first",
        model_name="tiny",
        extra_state={"seed": 7},
    )
    assert str(uuid.UUID(saved)) == saved
    loaded = manager.load_checkpoint(saved)
    flags = loaded.pop("_checkpoint_metadata")
    assert loaded == {
        "model_state_dict": MODEL,
        "optimizer_state_dict": {"lr": 0.1},
        "scheduler_state_dict": {"last": 3},
        "extra_state": {"seed": 7},
        "epoch": 2,
        "step": 70,
        "loss": 0.5,
        "val_loss": 0.25,
        "metrics": {"f1": 0.75},
        "config": {"layers": [1, 2]},
    }
    assert flags == {
        "checkpoint_id": saved,
        "experiment_id": manager.list_checkpoints()[0]["experiment_id"],
        "epoch": 2,
        "step": 70,
        "checkpoint_type": "regular",
        "is_best_loss": True,
        "is_best_val_loss": True,
        "is_best_metric": True,
    }


def test_parts_that_are_not_wanted_are_neither_saved_nor_loaded(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL, {"o": 1}, {"s": 1}, save_optimizer=False, save_scheduler=False)
    loaded = manager.load_checkpoint()
    assert (loaded["optimizer_state_dict"], loaded["scheduler_state_dict"]) == (None, None)
    manager.save_checkpoint(MODEL, {"o": 1}, {"s": 1})
    loaded = manager.load_checkpoint(load_optimizer=False, load_scheduler=False)
    assert (loaded["optimizer_state_dict"], loaded["scheduler_state_dict"]) == (None, None)
    assert manager.load_checkpoint()["optimizer_state_dict"] == {"o": 1}


def test_every_type_to_load_by_finds_its_checkpoint(manager: EnhancedCheckpointManager) -> None:
    rows: list[dict[str, Any]] = [
        {"loss": 3.0, "val_loss": 1.0, "metrics": {"accuracy": 0.1, "wer": 0.9}},
        {"loss": 1.0, "val_loss": 3.0, "metrics": {"accuracy": 0.2, "wer": 0.5}},
        {"loss": 2.0, "val_loss": 2.0, "metrics": {"accuracy": 0.9, "wer": 0.7}},
        {"loss": 9.0, "val_loss": 9.0, "metrics": {"accuracy": 0.0, "wer": 1.0}, "checkpoint_type": "milestone"},
    ]
    for epoch, row in enumerate(rows):
        manager.save_checkpoint(MODEL, epoch=epoch, **row)
    found = {
        kind: manager.load_checkpoint(checkpoint_type=kind)["epoch"]
        for kind in ("latest", "best_loss", "best_val_loss", "best_metric", "best:wer", "best:loss", "milestone")
    }
    assert found == {
        "latest": 3,
        "best_loss": 1,
        "best_val_loss": 0,
        "best_metric": 2,  # the first metric ever saved, accuracy
        "best:wer": 1,
        "best:loss": 1,
        "milestone": 3,
    }


def test_best_metrics_override_direction_and_choose_the_primary(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), best_metrics={"wer": "max", "f1": "min"})
    for epoch, (wer, f1) in enumerate([(0.5, 0.5), (0.9, 0.9), (0.1, 0.1)]):
        manager.save_checkpoint(MODEL, epoch=epoch, metrics={"f1": f1, "wer": wer})
    assert manager.load_checkpoint(checkpoint_type="best_metric")["epoch"] == 1
    assert manager.load_checkpoint(checkpoint_type="best:f1")["epoch"] == 2


def test_nan_is_never_best_and_a_tie_keeps_the_earlier(manager: EnhancedCheckpointManager) -> None:
    for epoch, loss in enumerate([math.nan, 2.0, 2.0, math.nan, math.inf]):
        manager.save_checkpoint(MODEL, epoch=epoch, loss=loss)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 1
    manager.save_checkpoint(MODEL, epoch=5, loss=-math.inf)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 5
    losses = [row["loss"] for row in manager.list_checkpoints()]
    assert [str(loss) for loss in losses] == ["nan", "2.0", "2.0", "nan", "inf", "-inf"]


def test_exactly_one_checkpoint_holds_each_flag(manager: EnhancedCheckpointManager) -> None:
    for epoch in range(8):
        manager.save_checkpoint(MODEL, epoch=epoch, loss=8 - epoch, metrics={"f1": (epoch * 5) % 8})
    rows = manager.list_checkpoints()
    assert [sum(row[flag] for row in rows) for flag in ("is_best_loss", "is_best_metric")] == [1, 1]
    assert [row["epoch"] for row in rows if row["is_best_metric"]] == [3]


def test_update_best_false_keeps_a_checkpoint_out_of_the_competition(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL, epoch=0, loss=1.0)
    manager.save_checkpoint(MODEL, epoch=1, loss=0.0, update_best=False)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 0
    manager.delete_checkpoint(
        manager.load_checkpoint(checkpoint_type="best_loss")["_checkpoint_metadata"]["checkpoint_id"]
    )
    with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint not found: best_loss"):
        manager.load_checkpoint(checkpoint_type="best_loss")


def test_a_new_process_goes_on_from_the_best_in_the_database(tmp_path: Path) -> None:
    script = """
import sys
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
url, run = f"sqlite:///{sys.argv[1]}/e.db", sys.argv[2]
tracker = ExperimentTracker("a", database_url=url) if run == "new" else ExperimentTracker.resume(run, url)
manager = EnhancedCheckpointManager(tracker, sys.argv[1] + "/c")
manager.save_checkpoint({"n": 1}, epoch=int(sys.argv[3]), loss=float(sys.argv[4]))
print(tracker.experiment_id, manager.load_checkpoint(checkpoint_type="best_loss")["epoch"])
"""

    def run(experiment: str, epoch: str, loss: str) -> tuple[str, str]:
        command = [sys.executable, "-c", script, str(tmp_path), experiment, epoch, loss]
        return tuple(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())  # type: ignore

    experiment, best = run("new", "0", "0.5")
    assert (best, run(experiment, "1", "0.7")[1], run(experiment, "2", "0.3")[1]) == ("0", "0", "2")


def test_scalars_of_array_libraries_are_numbers(manager: EnhancedCheckpointManager) -> None:
    np = pytest.importorskip("numpy")
    manager.save_checkpoint(
        MODEL, epoch=np.int64(4), loss=np.float32(0.5), metrics={"f1": np.array(0.25)}, config={"lr": np.float64(0.1)}
    )
    loaded = manager.load_checkpoint()
    assert (loaded["epoch"], loaded["loss"], loaded["metrics"], loaded["config"]) == (4, 0.5, {"f1": 0.25}, {"lr": 0.1})


def test_the_manager_works_without_a_tracker_on_a_named_experiment(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/e.db"
    with ExperimentTracker("a", database_url=url) as tracker:
        experiment = tracker.experiment_id
    with EnhancedCheckpointManager(None, str(tmp_path / "c"), database_url=url) as manager:
        saved = manager.save_checkpoint(MODEL, experiment_id=experiment)
        assert manager.load_checkpoint(experiment_id=experiment)["_checkpoint_metadata"]["checkpoint_id"] == saved
        assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL


# Retention through the manager; the rules themselves are tested in checkpoint/test_retention.py.


def test_retention_keeps_protected_and_periodic_checkpoints(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(
        tracker, str(tmp_path / "c"), max_checkpoints=4, save_frequency=5, protected_types=["milestone"]
    )
    for epoch in range(12):
        kind = "milestone" if epoch == 3 else None
        manager.save_checkpoint(MODEL, epoch=epoch, loss=abs(epoch - 1), checkpoint_type=kind)
    epochs = [row["epoch"] for row in manager.list_checkpoints()]
    assert epochs == [1, 3, 10, 11]  # best, protected, periodic, newest
    assert len(folders(tmp_path / "c")) == 4
    plan = manager.retention_plan()
    assert list(plan.kept.values()) == [
        "best loss",
        "type milestone is protected",
        "within 4 checkpoints",
        "the newest",
    ]


def test_retention_plan_shows_what_a_policy_would_do_without_acting(tracker: ExperimentTracker, tmp_path: Path) -> None:
    with EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=None) as keep_all:
        ids = [
            keep_all.save_checkpoint(MODEL, epoch=e, metrics={"f1": f1}) for e, f1 in enumerate([0.5, 0.9, 0.7, 0.1])
        ]
    policy = KeepLast(1) | KeepBest(2, "f1")
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), retention_policy=policy)
    plan = manager.retention_plan()
    assert plan.removed == {ids[0]: "no rule keeps it"}
    assert plan.kept == {ids[1]: "best f1", ids[2]: "one of the best 2 by f1", ids[3]: "the newest"}
    assert folders(tmp_path / "c") == sorted(ids)


def test_pinned_checkpoints_outlive_retention_and_cannot_be_deleted(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=1)
    pinned = manager.save_checkpoint(MODEL, epoch=1)
    manager.pin(pinned)
    for epoch in range(2, 5):
        manager.save_checkpoint(MODEL, epoch=epoch)
    assert [row["epoch"] for row in manager.list_checkpoints()] == [1, 4]
    with pytest.raises(ConfigurationError, match="pinned"):
        manager.delete_checkpoint(pinned)
    manager.unpin(pinned)
    assert manager.delete_checkpoint(pinned) is True
    assert pinned not in folders(tmp_path / "c")


def test_a_deleted_checkpoint_comes_back_with_its_flags_until_the_trash_is_emptied(
    manager: EnhancedCheckpointManager,
) -> None:
    best, other = (manager.save_checkpoint(MODEL, epoch=e, loss=loss) for e, loss in enumerate([0.1, 0.2]))
    manager.delete_checkpoint(best)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 1
    with pytest.raises(CheckpointNotFoundError, match=f"^Checkpoint not found: {best}"):
        manager.load_checkpoint(best)
    manager.undelete(best)
    assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 0
    assert [row["epoch"] for row in manager.list_checkpoints()] == [0, 1]
    manager.unpin(best)
    manager.delete_checkpoint(best)
    manager.delete_checkpoint(other)
    assert {row["checkpoint_id"] for row in manager.list_trash()} == {best, other}
    assert manager.empty_trash() > 0
    assert manager.list_trash() == []
    for gone in (best, other):
        with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint not found"):
            manager.undelete(gone)


def test_what_retention_removed_can_be_undone_for_one_more_pass(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"), max_checkpoints=1, save_frequency=1)
    first = manager.save_checkpoint(MODEL, epoch=1)
    manager.save_checkpoint(MODEL, epoch=2)
    assert [row["checkpoint_id"] for row in manager.list_trash()] == [first]
    manager.undelete(first)
    assert manager.load_checkpoint(first)["epoch"] == 1
    manager.unpin(first)
    for epoch in (3, 4, 5):
        manager.save_checkpoint(MODEL, epoch=epoch)
    assert len(manager.list_trash()) == 2  # this pass's and the one before's; older ones are gone for good
    with pytest.raises(CheckpointNotFoundError):
        manager.undelete(first)


def test_statistics_add_up(manager: EnhancedCheckpointManager) -> None:
    for epoch in range(3):
        manager.save_checkpoint(MODEL, epoch=epoch, loss=3.0 - epoch, checkpoint_type="a" if epoch else None)
    manager.load_checkpoint()
    found = manager.get_experiment_statistics()
    rows = manager.list_checkpoints()
    assert found["total_checkpoints"] == 3
    assert found["total_size"] == sum(row["size"] for row in rows)
    assert found["by_type"] == {"regular": 1, "a": 2}
    assert (found["first_epoch"], found["last_epoch"], found["pinned"], found["corrupt"]) == (0, 2, 0, 0)
    assert found["best"] == {"loss": {"checkpoint_id": rows[2]["checkpoint_id"], "value": 1.0}}
    did = manager.get_performance_statistics()
    assert (did["saves"], did["loads"], did["bytes_written"]) == (3, 1, found["total_size"])
    assert did["save_seconds"] > 0
    assert did["load_seconds"] > 0


def test_list_checkpoints_filters_and_can_leave_metadata_out(manager: EnhancedCheckpointManager) -> None:
    for epoch in range(3):
        manager.save_checkpoint(MODEL, epoch=epoch, loss=epoch, checkpoint_type="even" if epoch % 2 == 0 else "odd")
    assert [row["epoch"] for row in manager.list_checkpoints(checkpoint_type="even")] == [0, 2]
    assert [row["epoch"] for row in manager.list_checkpoints(checkpoint_type="best_loss")] == [0]
    assert [row["epoch"] for row in manager.list_checkpoints(checkpoint_type="latest")] == [2]
    assert manager.list_checkpoints(experiment_id=str(uuid.uuid4())) == []
    (bare, *_) = manager.list_checkpoints(include_metadata=False)
    assert "loss" not in bare
    assert "notes" not in bare
    assert bare["is_best_loss"] is True


# On disk


def test_the_manifest_names_every_file_by_relative_path_with_its_sha256(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    manager.save_checkpoint(MODEL, {"momentum": array("f", [0.0])})
    (folder,) = (path.parent for path in (tmp_path / "checkpoints").glob("*/*/checkpoint.json"))
    manifest = json.loads((folder / "checkpoint.json").read_text())
    names = {entry["name"] for entry in manifest["files"]}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.name for path in folder.iterdir()} == names | {"checkpoint.json"}
    for entry in manifest["files"]:
        printed = subprocess.run(["sha256sum", folder / entry["name"]], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == entry["sha256"]
        assert (folder / entry["name"]).stat().st_size == entry["size"]


def test_a_moved_directory_still_opens(tracker: ExperimentTracker, tmp_path: Path) -> None:
    with EnhancedCheckpointManager(tracker, str(tmp_path / "here")) as manager:
        saved = manager.save_checkpoint(MODEL)
    os.rename(tmp_path / "here", tmp_path / "there")
    with EnhancedCheckpointManager(tracker, str(tmp_path / "there")) as manager:
        assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL
        assert manager.verify_experiment_integrity()["verified"] == 1


def test_names_from_outside_never_become_paths(tmp_path: Path) -> None:
    hostile = "../../escape\u0301/%2e%2e/" + "x" * 4000
    url = f"sqlite:///{tmp_path}/e.db"
    with ExperimentTracker(hostile, hostile, tags=[hostile], config={hostile: hostile}, database_url=url) as tracker:
        manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
        saved = manager.save_checkpoint({hostile: array("f", [1])}, notes=hostile, model_name=hostile)
        assert manager.load_checkpoint(saved)["model_state_dict"] == {hostile: array("f", [1])}
        made = {path.name for path in (tmp_path / "c").rglob("*")}
    assert made == {
        *(".engine", "staging", "trash", "format.json", "gc.lock"),
        *(tracker.experiment_id, saved, "checkpoint.json", "model.safetensors", "state.json"),
    }
    with pytest.raises(ExperimentNotFoundError):
        manager_of(tmp_path, url).save_checkpoint(MODEL, experiment_id="../../etc")
    with pytest.raises(CheckpointNotFoundError):
        manager_of(tmp_path, url).load_checkpoint("../../etc/passwd")


def manager_of(folder: Path, url: str) -> EnhancedCheckpointManager:
    return EnhancedCheckpointManager(None, str(folder / "c"), database_url=url)


# Bad input gets a clear error and loses nothing


def test_a_missing_experiment_is_named_as_the_design_says(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, f"sqlite:///{tmp_path}/e.db")
    with pytest.raises(ValueError, match=r"^No experiment_id provided"):
        manager.save_checkpoint(MODEL)
    with pytest.raises(ValueError, match=r"^Must provide experiment_id"):
        manager.load_checkpoint()
    with pytest.raises(ValueError, match=r"^Checkpoint not found"):
        manager.load_checkpoint(str(uuid.uuid4()))
    with pytest.raises(ExperimentNotFoundError, match="ExperimentTracker"):
        manager.save_checkpoint(MODEL, experiment_id=str(uuid.uuid4()))
    with pytest.raises(ExperimentNotFoundError, match="is not in"):
        manager.load_checkpoint(experiment_id=str(uuid.uuid4()))
    manager.close()


def test_an_unknown_checkpoint_type_lists_the_known_ones(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL, checkpoint_type="milestone")
    with pytest.raises(UnknownCheckpointTypeError, match=r"latest, best_loss, .*best:<metric>, milestone") as caught:
        manager.load_checkpoint(checkpoint_type="bset_loss")
    assert caught.value.checkpoint_type == "bset_loss"


def test_what_is_no_id_is_not_found(manager: EnhancedCheckpointManager) -> None:
    manager.save_checkpoint(MODEL)
    for wrong in ("", "x", "\ud800", 5, [], b""):  # an empty text must not mean the latest
        with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint not found"):
            manager.load_checkpoint(wrong)  # type: ignore[arg-type]
    with pytest.raises(UnknownCheckpointTypeError):
        manager.load_checkpoint(checkpoint_type=None)  # type: ignore[arg-type]


def test_a_policy_that_fails_never_makes_a_save_look_failed(tracker: ExperimentTracker, tmp_path: Path) -> None:
    class Broken:
        def keeps(self, records: object, now: float) -> dict[str, str]:
            raise RuntimeError("no idea")

    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", retention_policy=Broken())
    saved = [manager.save_checkpoint(MODEL, epoch=epoch) for epoch in range(2)]
    assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == saved


def test_a_read_only_directory_can_be_loaded_from_and_says_so_when_saved_to(small_disk: Path, tmp_path: Path) -> None:
    with ExperimentTracker("archive", database_url=f"sqlite:///{tmp_path}/old.db") as tracker:
        manager = EnhancedCheckpointManager(tracker, small_disk / "c")
        saved = manager.save_checkpoint(MODEL, epoch=3)
        experiment = tracker.experiment_id
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    manager = EnhancedCheckpointManager(None, small_disk / "c", database_url=f"sqlite:///{tmp_path}/new.db")
    assert manager.load_checkpoint(experiment_id=experiment)["epoch"] == 3
    assert manager.verify_experiment_integrity(experiment)["verified"] == 1
    with pytest.raises(StorageError) as caught:
        manager.save_checkpoint(MODEL, experiment_id=experiment)
    assert caught.value.errno == errno.EROFS
    assert [row["checkpoint_id"] for row in manager.list_checkpoints(experiment)] == [saved]
    manager.close()


@pytest.mark.parametrize("label", ["latest", "best_loss", "best:f1", "", "a b", "../x", "x" * 65, 5])
def test_a_label_that_cannot_be_one_is_refused(manager: EnhancedCheckpointManager, label: Any) -> None:
    with pytest.raises(ConfigurationError, match="checkpoint_type"):
        manager.save_checkpoint(MODEL, checkpoint_type=label)
    assert manager.list_checkpoints() == []


def test_an_unknown_backend_lists_the_known_ones(tracker: ExperimentTracker, tmp_path: Path) -> None:
    with pytest.raises(UnknownBackendError, match=r"known: .*pytorch.*register_storage_backend"):
        EnhancedCheckpointManager(tracker, str(tmp_path / "c"), storage_backend="tensorflow")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_checkpoints": 0},
        {"max_checkpoints": "ten"},
        {"save_frequency": 0},
        {"max_shard_size": 0},
        {"cache_size": 0},
        {"cache_size": None},
        {"experiment_tracker": "my_run"},
        {"retention_policy": 5},
        {"best_metrics": ["f1"]},
        {"checkpoint_dir": "a\0b"},
        {"checkpoint_dir": 5},
        {"checkpoint_dir": ""},
        {"best_metrics": {"f1": "up"}},
        {"protected_types": "milestone"},
        {"database_url": "sqlite:///other.db"},
    ],
)
def test_a_wrong_argument_is_named(tracker: ExperimentTracker, tmp_path: Path, arguments: dict[str, Any]) -> None:
    given = {"experiment_tracker": tracker, "checkpoint_dir": tmp_path / "c", **arguments}
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        EnhancedCheckpointManager(**given)


def test_what_cannot_be_stored_is_refused_by_path_and_leaves_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    kept = manager.save_checkpoint(MODEL)
    with pytest.raises(UnsupportedValueError, match=r"model\.layers\[1\]\.act: cannot store a .*function.*pickled"):
        manager.save_checkpoint({"layers": [1, {"act": len}]})
    with pytest.raises(TypeError, match=r"config\.optimizer\.betas\[1\]"):
        manager.save_checkpoint(MODEL, config={"optimizer": {"betas": [0.9, {1}]}})
    with pytest.raises(TypeError, match=r"metrics\.f1"):
        manager.save_checkpoint(MODEL, metrics={"f1": "high"})
    with pytest.raises(TypeError, match="loss"):
        manager.save_checkpoint(MODEL, loss=[1.0])
    with pytest.raises(TypeError, match=r"epoch.*must be an integer"):
        manager.save_checkpoint(MODEL, epoch=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metrics.*must be a dict"):
        manager.save_checkpoint(MODEL, metrics=[("f1", 0.5)])  # type: ignore[arg-type]
    assert folders(tmp_path / "checkpoints") == [kept]
    assert os.listdir(tmp_path / "checkpoints" / ".engine" / "staging") == []


def test_a_file_in_the_way_of_the_directory_is_named(tracker: ExperimentTracker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(ConfigurationError, match="is a file"):
            EnhancedCheckpointManager(tracker, str(tmp_path / path))
    assert (tmp_path / "file").read_text() == ""


def test_an_unwritable_directory_is_a_storage_error_naming_it(tracker: ExperimentTracker) -> None:
    with pytest.raises(StorageError, match="may write to") as caught:
        EnhancedCheckpointManager(tracker, "/proc/checkpoints")  # no file system lets anybody write there
    assert caught.value.errno is not None
    assert caught.value.filename == "/proc/checkpoints"


@pytest.mark.parametrize("backend", ["safetensors", pytest.param("pytorch", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_storage_error_and_the_next_save_works(tmp_path: Path, backend: str) -> None:
    if backend == "pytorch":
        pytest.importorskip("torch")
    script = """
import errno, os, resource, signal, sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tracker = ExperimentTracker("a", database_url=f"sqlite:///{sys.argv[1]}/e.db")
manager = EnhancedCheckpointManager(tracker, sys.argv[1] + "/c", storage_backend=sys.argv[2])
kept = manager.save_checkpoint({"w": array("f", [1.0])}, epoch=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    manager.save_checkpoint({"w": array("f", bytes(8 << 20))}, epoch=2)
except StorageError as error:
    print(error.errno == errno.EFBIG, "checkpoint file" in str(error), error.filename is not None)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(os.listdir(sys.argv[1] + "/c/.engine/staging"), [row["epoch"] for row in manager.list_checkpoints()])
manager.save_checkpoint({"w": array("f", bytes(8 << 20))}, epoch=3)
print([row["epoch"] for row in manager.list_checkpoints()], manager.verify_experiment_integrity()["verified"])
"""
    command = [sys.executable, "-c", script, str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True True True", "[] [1]", "[1, 3] 2"], done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_disk_without_space_is_named_and_earlier_checkpoints_stay(
    tracker: ExperimentTracker, small_disk: Path, compressed: bool
) -> None:
    manager = EnhancedCheckpointManager(tracker, str(small_disk / "c"), enable_compression=compressed)
    kept = manager.save_checkpoint(MODEL, epoch=1)
    noise = {"w": array("Q", os.urandom(4 << 20))}
    with pytest.raises(StorageError, match="free some space or lower max_checkpoints") as caught:
        manager.save_checkpoint(noise, epoch=2)
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk) in caught.value.filename
    assert folders(small_disk / "c") == [kept]
    assert os.listdir(small_disk / "c" / ".engine" / "staging") == []
    assert manager.load_checkpoint()["epoch"] == 1
    manager.save_checkpoint({"w": array("Q", os.urandom(1 << 18))}, epoch=3)
    assert manager.verify_experiment_integrity()["verified"] == 2


def test_a_full_disk_below_the_database_is_a_database_error_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    tracker = ExperimentTracker("full", database_url=f"sqlite:///{small_disk}/e.db")
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
    kept = manager.save_checkpoint(MODEL, epoch=1)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(os.urandom(4 << 20))

    def save_until_it_is_full() -> None:
        for epoch in range(2, 100):  # a few rows may still fit into pages that are there
            manager.save_checkpoint(MODEL, epoch=epoch, notes="n" * 4000)

    with pytest.raises(DatabaseError, match="nothing was stored"):
        save_until_it_is_full()
    filler.unlink()
    saved = manager.save_checkpoint(MODEL, epoch=100)
    listed = [row["checkpoint_id"] for row in manager.list_checkpoints()]
    assert (listed[0], listed[-1]) == (kept, saved)
    assert manager.verify_experiment_integrity()["failed"] == 0
    tracker.close()


def test_a_newer_checkpoint_directory_is_refused_unchanged(tracker: ExperimentTracker, tmp_path: Path) -> None:
    EnhancedCheckpointManager(tracker, str(tmp_path / "c")).close()
    stamp = tmp_path / "c" / ".engine" / "format.json"
    newer = json.dumps({**json.loads(stamp.read_text()), "format_version": 99})
    stamp.write_text(newer)
    with pytest.raises(FormatVersionError, match=r"version 99.*Upgrade"):
        EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
    assert stamp.read_text() == newer
    stamp.write_text("{")
    with pytest.raises(ConfigurationError, match="damaged"):
        EnhancedCheckpointManager(tracker, str(tmp_path / "c"))


def test_a_directory_without_its_engine_folder_opens_and_keeps_its_checkpoints(
    tracker: ExperimentTracker, tmp_path: Path
) -> None:
    ids = [EnhancedCheckpointManager(tracker, tmp_path / "c").save_checkpoint(MODEL, epoch=e, loss=e) for e in (1, 2)]
    shutil.copytree(tmp_path / "c", tmp_path / "copy", ignore=shutil.ignore_patterns(".engine"))
    shutil.rmtree(tmp_path / "c" / ".engine")
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    assert [(row["checkpoint_id"], row["is_best_loss"]) for row in manager.list_checkpoints()] == [
        (ids[0], True),
        (ids[1], False),
    ]
    copy = EnhancedCheckpointManager(tracker, tmp_path / "copy")  # the database has them elsewhere, and there they are
    assert copy.list_checkpoints() == []
    assert len(folders(tmp_path / "copy")) == 2
    shutil.rmtree(tmp_path / "c")
    assert EnhancedCheckpointManager(tracker, tmp_path / "copy").load_checkpoint()["epoch"] == 2


def test_a_backup_opened_beside_its_original_harms_neither(tracker: ExperimentTracker, tmp_path: Path) -> None:
    original = EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=2, save_frequency=1)
    first = [original.save_checkpoint(MODEL, epoch=epoch) for epoch in (1, 2)]
    shutil.copytree(tmp_path / "c", tmp_path / "backup")
    for epoch in range(3, 9):  # retention removes the first two for good
        original.save_checkpoint(MODEL, epoch=epoch)
    listed = original.list_checkpoints()
    for _ in range(2):
        backup = EnhancedCheckpointManager(tracker, tmp_path / "backup", max_checkpoints=None)
        assert folders(tmp_path / "backup") == sorted(first)
        assert [row["checkpoint_id"] for row in backup.list_checkpoints()] == first
        assert backup.load_checkpoint(first[0])["epoch"] == 1
    assert original.list_checkpoints() == listed
    assert {row["status"] for row in listed} == {"committed"}
    assert original.load_checkpoint()["epoch"] == 8


def test_a_save_that_recovery_finishes_late_is_not_taken_for_the_newest(
    tracker: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    manager.save_checkpoint(MODEL, epoch=1)
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise DatabaseError("the commit was refused")

        patch.setattr(type(tracker.database.checkpoints), "commit", refuse)
        with pytest.raises(DatabaseError):
            manager.save_checkpoint(MODEL, epoch=2)
    manager.save_checkpoint(MODEL, epoch=3)
    assert [row["epoch"] for row in manager.list_checkpoints()] == [1, 3]
    again = EnhancedCheckpointManager(tracker, tmp_path / "c")
    assert [row["epoch"] for row in again.list_checkpoints()] == [1, 2, 3]
    assert again.load_checkpoint()["epoch"] == 3


def test_loading_a_part_does_not_vouch_for_the_whole(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    saved = manager.save_checkpoint(MODEL, {"momentum": array("f", [0.0])})
    (file,) = (tmp_path / "c").glob("*/*/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert manager.verify_experiment_integrity()["failed"] == 1
    assert manager.load_checkpoint(saved, load_optimizer=False)["model_state_dict"] == MODEL
    (row,) = manager.list_checkpoints()
    assert (row["status"], row["verification"]["verified"]) == ("corrupt", False)


INTERRUPTED = """
import random, signal, sqlite3, sys, threading
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

folder, seed = sys.argv[1:]
chance = random.Random(int(seed))
tracker = ExperimentTracker("interrupted", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", max_checkpoints=3)
outside = sqlite3.connect(folder + "/e.db", timeout=30)

def committed(checkpoint):
    found = outside.execute("SELECT status FROM checkpoints WHERE id = ?", (checkpoint,)).fetchone()
    return found in (("committed",), ("trashed",))

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = epoch = logged = 0
state = {"w": array("d", bytes(8000))}
while interrupts < 300:
    epoch += 1
    try:
        tracker.log_metric("loss", 1 / epoch)
        logged += 1
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.006))
        saved = manager.save_checkpoint(state, epoch=epoch, loss=1 / epoch)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
        saved = manager.save_checkpoint(state, epoch=epoch, loss=1 / epoch)  # where training scripts do it
        tracker.log_metric("rescued", 1.0)
        logged += 1
        tracker.flush()
    assert committed(saved), epoch
other = threading.Thread(target=manager.save_checkpoint, args=(state,), kwargs={"epoch": epoch}, daemon=True)
other.start()
other.join(30)
assert not other.is_alive(), "another thread is blocked for ever"
last = manager.save_checkpoint(state, epoch=epoch + 1, loss=0.0)
assert manager.load_checkpoint()["_checkpoint_metadata"]["checkpoint_id"] == last
assert manager.verify_experiment_integrity()["failed"] == 0
stored = len(tracker.get_metrics())
assert stored == logged, (stored, logged)
tracker.close()
with EnhancedCheckpointManager(None, folder + "/c", database_url=f"sqlite:///{folder}/e.db") as again:
    assert again.load_checkpoint(experiment_id=tracker.experiment_id)["_checkpoint_metadata"]["checkpoint_id"] == last
    assert again.verify_experiment_integrity()["failed"] == 0
print("done")
"""


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_save_leaves_a_manager_that_goes_on(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_what_a_user_puts_back_from_a_backup_is_taken_in_and_pinned(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None)
    gone, kept = (manager.save_checkpoint(MODEL, epoch=epoch) for epoch in (1, 2))
    folder = tmp_path / "c" / tracker.experiment_id / gone
    shutil.copytree(folder, tmp_path / "backup")
    manager.delete_checkpoint(gone)
    manager.empty_trash()
    shutil.copytree(tmp_path / "backup", folder)
    for _ in range(3):
        again = EnhancedCheckpointManager(tracker, tmp_path / "c")
        listed = [(row["checkpoint_id"], row["pinned"]) for row in again.list_checkpoints()]
        assert listed == [(gone, True), (kept, False)]
    assert again.load_checkpoint(gone)["epoch"] == 1


def test_the_trash_of_one_experiment_is_not_emptied_by_another(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    deleted = manager.save_checkpoint(MODEL)
    manager.delete_checkpoint(deleted)
    with ExperimentTracker("other", database_url=tracker.database.database_url) as other_run:
        other = EnhancedCheckpointManager(other_run, tmp_path / "c", max_checkpoints=1)
        for epoch in range(5):
            other.save_checkpoint(MODEL, epoch=epoch)
        other.empty_trash()
    assert [row["checkpoint_id"] for row in manager.list_trash()] == [deleted]
    manager.undelete(deleted)
    assert manager.load_checkpoint(deleted)["model_state_dict"] == MODEL


def test_deleting_in_a_read_only_directory_changes_nothing(small_disk: Path, tmp_path: Path) -> None:
    with ExperimentTracker("archive", database_url=f"sqlite:///{tmp_path}/e.db") as tracker:
        manager = EnhancedCheckpointManager(tracker, small_disk / "c")
        saved = manager.save_checkpoint(MODEL)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(StorageError, match="nothing was changed"):
            manager.delete_checkpoint(saved)
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [saved]
        assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL


def test_a_database_deleted_under_an_open_manager_is_reported_not_written_to(tmp_path: Path) -> None:
    tracker = ExperimentTracker("gone", database_url=f"sqlite:///{tmp_path}/e.db")
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    saved = manager.save_checkpoint(MODEL, epoch=1)
    for path in tmp_path.glob("e.db*"):
        path.rename(tmp_path / f"away-{path.name}")
    with pytest.raises(DatabaseError, match="deleted or replaced"):
        manager.save_checkpoint(MODEL, epoch=2)
    for path in tmp_path.glob("away-*"):
        path.rename(tmp_path / path.name.removeprefix("away-"))
    manager.save_checkpoint(MODEL, epoch=3)
    assert [row["epoch"] for row in manager.list_checkpoints()] == [1, 3]
    assert manager.load_checkpoint(saved)["epoch"] == 1
    tracker.close()


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_managers_and_trackers_say_how_to_be_passed_on(
    manager: EnhancedCheckpointManager, tracker: ExperimentTracker, copying: Any
) -> None:
    for thing in (manager, tracker):
        with pytest.raises(TypeError, match="experiment_id"):
            copying(thing)


def test_folders_that_vanish_under_an_open_manager_do_not_stop_it(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c")
    manager.save_checkpoint(MODEL, epoch=1)
    shutil.rmtree(tmp_path / "c" / tracker.experiment_id)
    manager.save_checkpoint(MODEL, epoch=2)
    assert manager.load_checkpoint()["epoch"] == 2
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(StorageError, match="removed or unmounted"):
        manager.save_checkpoint(MODEL, epoch=3)


def test_while_the_best_is_corrupt_the_best_that_loads_is_kept_too(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=2, save_frequency=1)
    best, second = (manager.save_checkpoint(MODEL, epoch=epoch, loss=epoch) for epoch in (1, 2))
    (file,) = (tmp_path / "c").glob(f"*/{best}/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert manager.verify_experiment_integrity()["failed"] == 1
    for epoch in (3, 4, 5):
        manager.save_checkpoint(MODEL, epoch=epoch, loss=epoch)
    assert [row["epoch"] for row in manager.list_checkpoints()] == [1, 2, 5]
    assert manager.retention_plan().kept[second] == "best loss"


def test_a_checkpoint_in_another_directory_is_pointed_at(tracker: ExperimentTracker, tmp_path: Path) -> None:
    EnhancedCheckpointManager(tracker, str(tmp_path / "one")).save_checkpoint(MODEL)
    other = EnhancedCheckpointManager(tracker, str(tmp_path / "two"))
    with pytest.raises(CheckpointNotFoundError, match=f"it has checkpoints in {tmp_path}/one"):
        other.load_checkpoint()


def test_a_missing_or_changed_file_is_an_integrity_error_and_other_checkpoints_load(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    ids = [manager.save_checkpoint(MODEL, epoch=epoch) for epoch in range(3)]
    (missing,) = (tmp_path / "checkpoints").glob(f"*/{ids[0]}/model.safetensors")
    missing.unlink()
    (changed,) = (tmp_path / "checkpoints").glob(f"*/{ids[1]}/model.safetensors")
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model.safetensors: the file is missing"):
        manager.load_checkpoint(ids[0])
    with pytest.raises(IntegrityError, match="SHA-256") as caught:
        manager.load_checkpoint(ids[1])
    assert caught.value.path == str(changed)
    assert len(caught.value.expected) == len(caught.value.actual) == 64
    assert manager.load_checkpoint()["epoch"] == 2
    assert [row["status"] for row in manager.list_checkpoints()] == ["corrupt", "corrupt", "committed"]


def test_two_managers_on_one_directory_see_each_other_and_lose_nothing(
    tracker: ExperimentTracker, tmp_path: Path
) -> None:
    one = EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
    two = EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
    ids = [(one, two)[epoch % 2].save_checkpoint(MODEL, epoch=epoch, loss=9 - epoch) for epoch in range(6)]
    for manager in (one, two):
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == ids
        assert manager.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 5
    one.delete_checkpoint(ids[5])
    assert two.load_checkpoint(checkpoint_type="best_loss")["epoch"] == 4
    assert two.load_checkpoint()["epoch"] == 4


def test_removal_waits_for_a_save_under_way_and_says_so(
    manager: EnhancedCheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = manager.save_checkpoint(MODEL)
    monkeypatch.setattr("model_checkpoint.checkpoint.removal._PATIENCE", 0.05)
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoints" / ".engine" / "gc.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(LockTimeoutError, match="try again"):
        manager.delete_checkpoint(saved)
    holder.communicate(b"\n")
    assert manager.load_checkpoint(saved)["model_state_dict"] == MODEL
    assert manager.delete_checkpoint(saved)


def test_closing_twice_and_using_a_closed_manager(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, f"sqlite:///{tmp_path}/e.db")
    manager.close()
    manager.close()
    with pytest.raises(RuntimeError, match="closed"):
        manager.list_checkpoints()
