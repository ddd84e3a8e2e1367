"""``recover``, ``rebuild_index`` and ``on_corruption="fallback"``: back to what is sound, and nothing is removed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, reseal

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    IntegrityError,
    LockTimeoutError,
    StorageError,
    UnknownCheckpointTypeError,
)
from model_checkpoint.hooks import HookContext, HookEvent

SCORES = [0.5, 0.3, 0.1, 0.4]  # the third is the best, the second the next


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


def state_of(epoch: int) -> dict[str, Any]:
    return {"weight": array("d", [epoch] * 50), "epoch": epoch}


def save_four(store: Store) -> list[str]:
    """Save epochs 1 to 4, of which the even ones have a label."""
    return [
        store.save(
            state_of(epoch),
            {"m": array("f", [epoch])},
            epoch=epoch,
            step=epoch * 10,
            loss=score,
            val_loss=-score,
            metrics={"f1": score, "nan": float("nan")},
            notes=f"epoch {epoch}",
            checkpoint_type="even" if epoch % 2 == 0 else None,
        )
        for epoch, score in enumerate(SCORES, 1)
    ]


def sql(store: Store, *statements: str) -> None:
    """Change the database behind the engine's back."""
    with contextlib.closing(sqlite3.connect(store.url.removeprefix("sqlite:///"), timeout=30)) as connection:
        with connection:
            for statement in statements:
                connection.execute(statement)


def spoil(store: Store, checkpoint_id: str, how: str = "flip") -> None:
    folder = store.folder / store.tracker.experiment_id / checkpoint_id
    file = folder / "model.safetensors"
    if how == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "manifest":
        (folder / "checkpoint.json").write_bytes(b"{}")
    elif how == "file":
        file.unlink()
    elif how == "folder":
        folder.rename(folder.parents[2] / checkpoint_id)
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 1)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(rows: list[dict[str, Any]]) -> str:
    return repr([{key: value for key, value in row.items() if key != "verification"} for row in rows])


# Fallback


@pytest.mark.parametrize("how", ["flip", "manifest", "file", "folder", "truncated"])
def test_the_newest_sound_one_is_loaded_in_place_of_a_corrupt_latest(
    store: Store, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = save_four(store)
    spoil(store, ids[3], how)
    before = snapshot(store.folder)
    with pytest.raises(IntegrityError):
        store.manager.load_checkpoint()
    with caplog.at_level(logging.WARNING):
        loaded = store.manager.load_checkpoint(on_corruption="fallback")
    assert loaded["model_state_dict"] == state_of(3)
    assert loaded["_checkpoint_metadata"]["checkpoint_id"] == ids[2]
    assert loaded["_checkpoint_metadata"]["fallback_from"] == [ids[3]]
    assert [r for r in caplog.records if r.levelno == logging.WARNING and ids[2] in r.getMessage()]
    assert snapshot(store.folder) == before
    assert store.row(ids[3])["status"] == "corrupt"
    with pytest.raises(IntegrityError):  # a latest that is corrupt is never silently another one
        store.manager.load_checkpoint()
    assert "fallback_from" not in store.load(ids[2], on_corruption="fallback")["_checkpoint_metadata"]


def test_several_that_are_corrupt_are_walked_past_in_order(store: Store) -> None:
    ids = save_four(store)
    for bad in (3, 2, 1):
        spoil(store, ids[bad])
    loaded = store.manager.load_checkpoint(on_corruption="fallback")
    assert loaded["epoch"] == 1
    assert loaded["_checkpoint_metadata"]["fallback_from"] == [ids[3], ids[2], ids[1]]
    again = store.manager.load_checkpoint(on_corruption="fallback")  # known to be corrupt by now: not read again
    assert (again["epoch"], again["_checkpoint_metadata"]["fallback_from"]) == (1, [ids[3]])
    spoil(store, ids[0])
    with pytest.raises(IntegrityError, match=ids[0]):
        store.manager.load_checkpoint(on_corruption="fallback")
    assert {row["status"] for row in store.manager.list_checkpoints()} == {"corrupt"}


@pytest.mark.parametrize(
    ("kind", "asked", "given"),
    [
        ("best_loss", 3, 2),
        ("best_val_loss", 1, 4),
        ("best_metric", 1, 4),  # f1, of which more is better
        ("best:f1", 1, 4),
        ("even", 4, 2),
        ("latest", 4, 3),
    ],
)
def test_the_next_of_its_kind_is_taken(store: Store, kind: str, asked: int, given: int) -> None:
    ids = save_four(store)
    assert store.manager.load_checkpoint(checkpoint_type=kind)["epoch"] == asked
    spoil(store, ids[asked - 1])
    loaded = store.manager.load_checkpoint(checkpoint_type=kind, on_corruption="fallback")
    assert (loaded["epoch"], loaded["_checkpoint_metadata"]["fallback_from"]) == (given, [ids[asked - 1]])


def test_of_a_label_none_is_taken_that_has_another(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[1])
    spoil(store, ids[3])
    with pytest.raises(IntegrityError):
        store.manager.load_checkpoint(checkpoint_type="even", on_corruption="fallback")
    with pytest.raises(UnknownCheckpointTypeError):
        store.manager.load_checkpoint(checkpoint_type="odd", on_corruption="fallback")


def test_in_place_of_an_id_the_one_before_it_is_taken_never_a_later_one(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[2])
    assert store.load(ids[2], on_corruption="fallback")["epoch"] == 2
    spoil(store, ids[0])
    with pytest.raises(IntegrityError):
        store.load(ids[0], on_corruption="fallback")
    with pytest.raises(CheckpointNotFoundError):
        store.load("00000000-0000-4000-8000-000000000000", on_corruption="fallback")
    with pytest.raises(ConfigurationError, match="on_corruption"):
        store.load(ids[1], on_corruption="ignore")


def test_a_part_falls_back_as_the_whole_does(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[3])
    loaded = store.manager.load_checkpoint(keys="model.weight", on_corruption="fallback")
    assert loaded["model_state_dict"] == {"weight": array("d", [3] * 50)}
    assert store.row(ids[3])["status"] == "corrupt"
    assert store.manager.load_checkpoint(keys="optimizer.m")["epoch"] == 4  # that part of it is sound


def test_a_run_whose_newest_are_corrupt_goes_on_and_keeps_the_sound_one(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[3])
    store.manager.load_checkpoint(on_corruption="fallback")
    fifth = store.save(state_of(5), epoch=5)
    assert store.manager.load_checkpoint()["epoch"] == 5
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == [*ids, fifth]


# The index


WRONG = {
    "values": "UPDATE checkpoints SET epoch = 99, step = 7, details = replace(details, '\"epoch\": ', '\"epoch\": 9')",
    "what cannot be read": "UPDATE checkpoints SET details = '{'",
    "types": "UPDATE checkpoints SET checkpoint_type = 'wrong', details = replace(details, 'even', 'wrong')",
    "best flags": "UPDATE best SET checkpoint_id = (SELECT id FROM checkpoints WHERE epoch = 1)",
    "values of best flags": "UPDATE best SET value = '-1e9'",
    "no best flags": "DELETE FROM best",
    "a flag too many": "INSERT INTO best SELECT experiment_id, 'metrics.new', id, '1.0', 9 FROM checkpoints LIMIT 1",
    "order": "UPDATE checkpoints SET sequence = 100 - sequence",
    "sizes": "UPDATE checkpoints SET size = 1",
    "lengths of files": "UPDATE files SET size = size + 1",
    "digests of files": "UPDATE files SET sha256 = 'x'",
    "names of files": "UPDATE files SET name = 'x' || name",
    "no files": "DELETE FROM files",
    "the manifests' digests": "UPDATE checkpoints SET manifest_sha256 = 'x'",
    "no digests": "UPDATE checkpoints SET manifest_sha256 = NULL",
    "all corrupt": "UPDATE checkpoints SET status = 'corrupt'",
    "never finished": "UPDATE checkpoints SET status = 'saving'",
    "failed": "UPDATE checkpoints SET status = 'failed'",
    "times": "UPDATE checkpoints SET created_at = 0",
    "backends": "UPDATE checkpoints SET backend = 'pytorch'",
    "kept out": "UPDATE checkpoints SET update_best = 0",
    "no rows": "DELETE FROM checkpoints",
    "another run's": "UPDATE checkpoints SET experiment_id = (SELECT id FROM experiments WHERE name = 'other')",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_index_is_made_to_say_what_the_manifests_say(store: Store, wrong: str) -> None:
    other = ExperimentTracker("other", database_url=store.url)
    ids = save_four(store)
    before, content = told(store.manager.list_checkpoints()), snapshot(store.folder)
    cleanup = ("DELETE FROM files", "DELETE FROM best") if wrong == "no rows" else ()
    sql(store, *cleanup, WRONG[wrong], "UPDATE stores SET revision = revision + 1")
    report = store.manager.rebuild_index()
    assert told(store.manager.list_checkpoints()) == before
    assert snapshot(store.folder) == content
    assert report.corrupt == []
    for epoch, saved in enumerate(ids, 1):
        assert store.load(saved)["model_state_dict"] == state_of(epoch)
    for kind, epoch in (("latest", 4), ("best_loss", 3), ("best_metric", 1), ("even", 4)):
        assert store.manager.load_checkpoint(checkpoint_type=kind)["epoch"] == epoch
    assert store.manager.verify_experiment_integrity()["failed"] == 0
    again = store.manager.rebuild_index()
    assert (again.corrected, again.rolled_forward, again.corrupt) == ([], [], [])
    assert store.manager.list_checkpoints()[-1]["checkpoint_id"] == ids[3]
    other.close()


def test_pins_verifications_and_the_trash_outlive_a_rebuild(store: Store) -> None:
    ids = save_four(store)
    store.manager.pin(ids[0])
    store.manager.delete_checkpoint(ids[1])
    store.manager.verify_experiment_integrity()
    sql(store, "UPDATE checkpoints SET epoch = 99")
    assert sorted(store.manager.rebuild_index().corrected) == sorted(set(ids) - {ids[1]})
    assert store.row(ids[0])["pinned"]
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == [ids[0], *ids[2:]]
    assert [row["checkpoint_id"] for row in store.manager.list_trash()] == [ids[1]]
    assert store.row(ids[0])["verification"]["verified"]


@pytest.mark.parametrize("repair", ["recover", "rebuild_index", "reopen"])
@pytest.mark.parametrize("wrong", ["no rows", "rows of no directory"])
def test_what_is_in_the_trash_can_be_brought_back_after_its_row_was_lost(store: Store, repair: str, wrong: str) -> None:
    ids = save_four(store)
    store.manager.delete_checkpoint(ids[1])
    if wrong == "no rows":
        sql(store, *(f"DELETE FROM {table}" for table in ("files", "best", "verifications", "checkpoints")))
    else:
        sql(store, "PRAGMA foreign_keys = OFF", "UPDATE checkpoints SET store_id = 'zz'")
    if repair == "reopen":
        store.manager = EnhancedCheckpointManager(store.tracker, store.folder)
    else:
        getattr(store.manager, repair)()
    assert [row["checkpoint_id"] for row in store.manager.list_trash()] == [ids[1]]
    store.manager.undelete(ids[1])
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == ids
    assert store.load(ids[1])["model_state_dict"] == state_of(2)


def test_a_manifest_that_was_sealed_with_nonsense_does_not_keep_the_others_from_repair(store: Store) -> None:
    ids = save_four(store)
    reseal(store.path(ids[0]), lambda manifest: manifest["values"].update(config={"$float": "nope"}))
    reseal(store.path(ids[1]), lambda manifest: manifest["experiment"].update(config={"$float": [1]}))
    sql(store, "UPDATE checkpoints SET epoch = 77")
    report = store.manager.rebuild_index()
    assert sorted(report.corrected) == sorted(ids[2:])
    assert sorted(report.left_alone) == sorted(ids[:2])
    assert [row["epoch"] for row in store.manager.list_checkpoints()][2:] == [3, 4]


def test_a_directory_that_the_database_has_lost_is_entered_again(store: Store) -> None:
    ids = save_four(store)
    sql(store, "PRAGMA foreign_keys = OFF", "DELETE FROM stores")
    with pytest.raises(DatabaseError, match="rebuild_index"):
        store.load(ids[0])
    store.manager.rebuild_index()
    assert store.load(ids[0])["epoch"] == 1
    assert store.save(state_of(5), epoch=5)


def test_the_trash_of_a_copied_directory_does_not_touch_what_was_brought_back_in_the_original(
    store: Store, tmp_path: Path
) -> None:
    ids = save_four(store)
    store.manager.delete_checkpoint(ids[0])
    shutil.copytree(store.folder, tmp_path / "copy")
    store.manager.undelete(ids[0])
    with EnhancedCheckpointManager(store.tracker, tmp_path / "copy") as copied:
        report = copied.recover()
    assert report is not None
    assert ids[0] in report.copies
    store.manager.recover()
    assert store.load(ids[0])["model_state_dict"] == state_of(1)


def test_a_row_with_a_nul_in_a_name_is_corrupt_until_it_is_written_anew(store: Store) -> None:
    ids = save_four(store)
    sql(store, "UPDATE files SET name = 'a' || char(0) || name")
    report = store.manager.recover()
    assert report is not None
    assert sorted(report.corrupt) == sorted(ids)
    store.manager.rebuild_index()
    assert {row["status"] for row in store.manager.list_checkpoints()} == {"committed"}


@pytest.mark.parametrize("wrong", ["", 5, b"x", "nope", ["x"]])
def test_what_is_no_id_of_an_experiment_is_refused_wherever_one_is_asked_for(store: Store, wrong: Any) -> None:
    save_four(store)
    store.manager.delete_checkpoint(store.manager.list_checkpoints()[0]["checkpoint_id"])
    calls = ("list_checkpoints", "list_trash", "empty_trash", "retention_plan", "get_experiment_statistics")
    for name in (*calls, "verify_experiment_integrity", "load_checkpoint"):
        with pytest.raises(ExperimentNotFoundError, match="ids are UUIDs as text"):
            getattr(store.manager, name)(experiment_id=wrong)
    assert len(store.manager.list_trash()) == 1
    with pytest.raises(UnknownCheckpointTypeError):
        store.manager.list_checkpoints(checkpoint_type=[wrong])  # type: ignore[arg-type]


def test_a_rebuild_tells_of_corrupt_ones_and_leaves_them_where_they_are(store: Store) -> None:
    ids = save_four(store)
    for number, how in enumerate(["flip", "manifest", "truncated", "file"]):
        spoil(store, ids[number], how)
    content = snapshot(store.folder)
    report = store.manager.rebuild_index()
    assert set(report.corrupt) == set(ids)
    assert snapshot(store.folder) == content
    assert {row["status"] for row in store.manager.list_checkpoints()} == {"corrupt"}


def test_a_restored_file_is_found_sound_again_by_a_rebuild(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[3])
    store.manager.rebuild_index()
    assert store.row(ids[3])["status"] == "corrupt"
    spoil(store, ids[3])  # the same bit: as it was
    store.manager.rebuild_index()
    assert store.manager.load_checkpoint()["epoch"] == 4


def test_a_lost_database_is_built_anew(store: Store, tmp_path: Path) -> None:
    ids = save_four(store)
    before = store.manager.list_checkpoints()
    url = f"sqlite:///{tmp_path}/new.db"
    with EnhancedCheckpointManager(None, store.folder, database_url=url) as manager:
        rows = manager.list_checkpoints()
        assert told(rows) == told(before)
        assert manager.rebuild_index().corrected == []
        assert manager.load_checkpoint(ids[2])["model_state_dict"] == state_of(3)
        found = manager.load_checkpoint(experiment_id=store.tracker.experiment_id, checkpoint_type="best_loss")
        assert found["epoch"] == 3


def test_a_folder_that_a_user_brings_back_is_taken_in_by_recover(store: Store, tmp_path: Path) -> None:
    ids = save_four(store)
    folder = store.path(ids[3])
    shutil.copytree(folder, tmp_path / "copy")
    sql(store, "DELETE FROM best", "DELETE FROM files", "DELETE FROM checkpoints")
    report = store.manager.recover()
    assert report is not None
    assert sorted(report.rolled_forward) == sorted(ids)
    shutil.rmtree(folder)
    report = store.manager.recover()
    assert report is not None
    assert report.corrupt == [ids[3]]
    shutil.copytree(tmp_path / "copy", folder)
    assert store.manager.load_checkpoint(ids[3])["epoch"] == 4
    assert store.row(ids[3])["status"] == "committed"
    assert not store.manager.recover()


@pytest.mark.parametrize("repair", ["recover", "rebuild_index"])
def test_repair_waits_for_pending_saves_and_harms_none(tmp_path: Path, repair: str) -> None:
    store = Store(tmp_path / "s", async_save=True, max_pending_saves=3)
    for epoch in range(5):
        store.save(state_of(epoch), epoch=epoch)
        act: Callable[[], Any] = getattr(store.manager, repair)
        assert not act()
    assert [row["epoch"] for row in store.manager.list_checkpoints()] == [0, 1, 2, 3, 4]
    store.close()


def test_a_directory_in_use_is_left_to_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import model_checkpoint.checkpoint.recovery as recovery

    monkeypatch.setattr(recovery, "_PATIENCE", 0.05)
    save_four(store)
    with store.manager._directory.shared():
        assert store.manager.recover() is None
        with pytest.raises(LockTimeoutError):
            store.manager.rebuild_index()
    assert store.manager.rebuild_index().corrected == []


def test_the_next_one_is_taken_when_what_would_be_loaded_in_place_is_deleted_meanwhile(store: Store) -> None:
    ids = save_four(store)
    spoil(store, ids[3])

    def delete_third(context: HookContext) -> None:
        if context.checkpoint_id == ids[2]:
            with EnhancedCheckpointManager(
                None, store.manager.checkpoint_dir, database_url=store.manager._db.database_url
            ) as other:
                other.delete_checkpoint(ids[2])

    store.manager.register_hook("delete", delete_third, [HookEvent.BEFORE_CHECKPOINT_LOAD])
    loaded = store.manager.load_checkpoint(on_corruption="fallback")
    assert loaded["model_state_dict"] == state_of(2)
    assert loaded["_checkpoint_metadata"]["fallback_from"] == [ids[3]]


@pytest.mark.parametrize("name", ["trash", "staging"])
def test_folders_of_the_engine_that_were_removed_to_gain_space_are_made_again(store: Store, name: str) -> None:
    first, second, third, _ = save_four(store)
    store.manager.delete_checkpoint(first)
    calls: list[Callable[[], object]] = [
        store.manager.recover,
        store.manager.rebuild_index,
        store.manager.empty_trash,
        lambda: store.manager.delete_checkpoint(second),
    ]
    for call in calls:
        shutil.rmtree(store.folder / ".engine" / name)
        call()
    assert store.manager.load_checkpoint(third)["epoch"] == 3
    shutil.rmtree(store.folder / ".engine" / name)
    (store.folder / ".engine" / name).write_text("in the way")
    with pytest.raises(StorageError, match="move away what stands in its place"):
        store.manager.recover()


def test_a_row_whose_directory_the_database_does_not_know_comes_back_to_the_one_where_it_lies(store: Store) -> None:
    ids = save_four(store)
    sql(store, f"UPDATE checkpoints SET store_id = 'garbage' WHERE id = '{ids[1]}'")
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == [ids[0], *ids[2:]]
    assert ids[1] in store.manager.rebuild_index().adopted
    assert [row["checkpoint_id"] for row in store.manager.list_checkpoints()] == ids
    assert store.manager.load_checkpoint(ids[1])["epoch"] == 2
