"""Names made to lead out of the directory, and links put in the place of what the engine made.

Everything is stored under ids that the engine makes. So no text can become a path, and a link in the place of a file or
folder of the store is nothing of ours: nothing outside is read, changed or removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common import tree
from helpers_storage import Store, reopen_without_database, reseal

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, errors
from model_checkpoint.errors import CheckpointNotFoundError, ModelCheckpointError

Tried = Callable[[int], None]
UUID = "11111111-1111-4111-8111-1111111111ab"

# {outside} is a folder beside the store that holds what nobody may touch, {id} a checkpoint there.
PATHS = {
    "the folder above": "..",
    "nothing": "",
    "above": "../../../outside",
    "above, to a checkpoint": "../../outside/{id}",
    "above, encoded": "%2e%2e%2f%2e%2e%2foutside",
    "above, encoded twice": "%252e%252e%252foutside",
    "above, overlong": "\xc0\xae\xc0\xae/outside",
    "above, the other way": "..\\..\\outside",
    "above, in full width": "\uff0e\uff0e\uff0foutside",
    "absolute": "{outside}",
    "absolute, to a checkpoint": "{outside}/{id}",
    "a checkpoint and up again": UUID + "/../../../outside",
    "a NUL": "a\0b",
    "a NUL behind an id": UUID + "\0",
    "a line end behind an id": UUID + "\n",
    "a slash": "a/b",
    "the engine's folder": ".engine",
    "the lock": ".engine/gc.lock",
    "the trash": ".engine/trash",
    "the manifest": "checkpoint.json",
    "a file of a checkpoint": "model.safetensors",
    "4 KB": "x" * 4096,
    "4 KB of folders": "../" * 1400,
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "a home": "~root",
    "a pattern": "*",
    "markup": "<script>alert(1)</script>",
    "right to left": "\u202egnp.exe",
    "an id in capitals": UUID.upper(),
    "an id without dashes": UUID.replace("-", ""),
    "an id in braces": "{{" + UUID + "}}",
    "an id as a URN": "urn:uuid:" + UUID,
    "an id in full width": UUID.replace("1", "\uff11"),
}
ENGINES_OWN = {"format.json", "gc.lock", "staging", "trash"}


class World:
    """A store with a neighbour that holds a whole checkpoint and other files, of which nothing may change.

    Attributes:
        root: the folder of both; whatever is found there, but for ``store``, was not made by the engine.
        outside: the neighbour: the published folder of an experiment of another store.
        inside: ids of this store's own checkpoints.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        neighbour = Store(root / "neighbour")
        self.foreign = neighbour.save({"secret": array("d", [4711.0])}, epoch=4711)
        self.outside = root / "outside"
        shutil.copytree(neighbour.path(self.foreign).parent, self.outside)
        neighbour.close()
        (self.outside / "precious").write_text("mine")
        self.store = Store(root / "store")
        self.inside = [self.store.save({"w": array("d", [n])}, epoch=n, loss=n) for n in (1, 2)]
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        return tree(self.root, lambda path: (self.root / "store") in [path, *path.parents])

    def name(self, key: str) -> str:
        return PATHS[key].format(outside=self.outside, id=self.foreign)

    def check(self) -> None:
        """Nothing beside the store has changed; in it all is named by ids and by what the engine calls its files."""
        assert self.state() == self.before
        for path in self.store.folder.rglob("*"):
            parts = path.relative_to(self.store.folder).parts
            if parts[0] == ".engine":
                assert len(parts) == 1 or parts[1] in ENGINES_OWN, path
                parts = parts[2:]
            for part in parts[:2]:
                assert str(uuid.UUID(part)) == part, path
            for part in parts[2:]:
                assert part.startswith(("model", "optimizer", "extra", "state.json", "checkpoint.json")), path
                assert "/" not in part, path
                assert len(parts) == 3, path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("key", PATHS)
def test_any_text_is_kept_as_a_name_or_refused_and_none_becomes_a_path(world: World, key: str, tried: Tried) -> None:
    name, store = world.name(key), world.store
    given: dict[str, Any] = {"metrics": {name: 1.5}, "config": {name: name}, "notes": name, "model_name": name}
    if "\0" in name:  # no database keeps it
        for part in given:
            with pytest.raises(ModelCheckpointError):
                store.save({"w": array("d", [1.0])}, **{part: given[part]})
        given = {"metrics": {}, "config": None}
    saved = store.save({name: array("d", [1.0]), "deep": {name: {name: array("f", [2.0])}}}, epoch=3, **given)
    loaded = store.load(saved)
    assert loaded["model_state_dict"] == {name: array("d", [1.0]), "deep": {name: {name: array("f", [2.0])}}}
    assert (loaded["metrics"], loaded["config"]) == (given["metrics"], given["config"])
    if "notes" in given:
        assert store.row(saved)["notes"] == store.row(saved)["model_name"] == name
        by_metric = store.manager.load_checkpoint(checkpoint_type=f"best:{name}")
        assert by_metric["_checkpoint_metadata"]["checkpoint_id"] == saved
    for label in (name, f"best:{name}"):  # labels must look like labels: refused, or else kept as they are
        try:
            assert store.row(store.save({"w": array("d", [5.0])}, checkpoint_type=label))["checkpoint_type"] == label
        except ModelCheckpointError:
            continue
    try:
        tracker = ExperimentTracker(name, name, database_url=store.url)
    except ModelCheckpointError:
        tracker = ExperimentTracker("named otherwise", database_url=store.url)
    with tracker:
        for call in (lambda: tracker.add_tags([name]), lambda: tracker.log_metrics({name: 1.0}, step=1)):
            try:
                call()
            except ModelCheckpointError:
                continue
        with EnhancedCheckpointManager(tracker, str(store.folder)) as manager:
            other = manager.save_checkpoint({name: array("d", [6.0])})
            assert manager.load_checkpoint(other)["model_state_dict"] == {name: array("d", [6.0])}
            manager.delete_checkpoint(other)
            manager.empty_trash()
    world.check()
    tried(10)


def test_names_that_only_look_the_same_stay_apart(world: World) -> None:
    names = [
        "caf\u00e9",
        "cafe\u0301",
        "CAF\u00c9",
        "\u212b",
        "\u00c5",
        "A\u030a",
        "\ufb01",
        "fi",
        "a",
        "a\u200b",
        "\u0430",
    ]
    state = {name: array("d", [number]) for number, name in enumerate(names)}
    saved = world.store.save(state, metrics={name: float(number) for number, name in enumerate(names)})
    loaded = world.store.load(saved)
    assert loaded["model_state_dict"] == state
    assert list(loaded["metrics"]) == names
    with reopen_without_database(world.root / "store") as manager:
        assert manager.load_checkpoint(saved)["model_state_dict"] == state
        assert manager.load_checkpoint(saved)["metrics"] == loaded["metrics"]
    world.check()


@pytest.mark.parametrize("key", PATHS)
def test_what_is_no_id_is_not_found_in_any_call_and_touches_nothing(world: World, key: str, tried: Tried) -> None:
    name, manager, store = world.name(key), world.store.manager, tree(world.store.folder)
    not_found = (CheckpointNotFoundError, errors.ExperimentNotFoundError, errors.UnknownCheckpointTypeError)
    calls: list[Callable[[], object]] = [
        *[lambda call=call: getattr(manager, call)(name) for call in ("pin", "unpin", "delete_checkpoint", "undelete")],
        lambda: manager.load_checkpoint(name),
        lambda: manager.load_checkpoint(experiment_id=name or "x"),
        lambda: manager.load_checkpoint(checkpoint_type=name),
        lambda: manager.load_checkpoint(checkpoint_type=f"best:{name}"),
        lambda: manager.save_checkpoint({"w": array("d", [1.0])}, experiment_id=name or "x"),
    ]
    for call in calls:
        with pytest.raises(not_found):
            call()
    names = ("list_checkpoints", "list_trash", "verify_experiment_integrity", "get_experiment_statistics")
    for call_name in (*names, "retention_plan", "empty_trash"):
        with pytest.raises(not_found):
            getattr(manager, call_name)(experiment_id=name)
    assert manager.list_checkpoints(checkpoint_type=name) == []
    tried(len(calls) + 7)
    assert tree(world.store.folder) == store
    world.check()


@pytest.mark.parametrize("key", PATHS)
def test_a_manifest_whose_seal_fits_cannot_name_a_file_elsewhere(world: World, key: str, tried: Tried) -> None:
    """The named file is whole and its digest fits: only its name gives it away."""
    folder, name = world.store.path(world.inside[0]), world.name(key)
    content = b'{"model": {"secret": 4711}}'
    secret = world.root / "secret.json"
    secret.write_bytes(content)
    names = [name, f"{name}/state.json", f"../../../../{secret.name}", str(secret), f"./{secret.name}"]
    world.store.close()
    manifest = (folder / "checkpoint.json").read_bytes()
    world.before = world.state()
    for number, hostile in enumerate(names):
        (folder / "checkpoint.json").write_bytes(manifest)
        digest = hashlib.sha256(content).hexdigest()
        told = {"name": hostile, "size": len(content), "sha256": digest}
        reseal(folder, lambda sealed, told=told: sealed["files"][0].update(told))
        url = f"sqlite:///{world.root}/store/rebuilt-{number}.db"
        with EnhancedCheckpointManager(None, str(world.store.folder), database_url=url) as manager:
            assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == world.inside[1:]
            with pytest.raises(CheckpointNotFoundError):
                manager.load_checkpoint(world.inside[0])
    tried(len(names))
    world.check()


# Links in the place of what the engine made


def replace_by_link(path: Path, target: Path) -> None:
    path.rename(path.with_name(f"{path.name}.aside"))
    path.symlink_to(target)


def move_out_and_link(world: World, path: Path) -> Path:
    """Move a part of the store beside it, and put a link in its place: an exact copy, but not ours to touch."""
    target = world.root / "moved"
    path.rename(target)
    path.symlink_to(target)
    return target


def swap_experiment(world: World) -> None:
    move_out_and_link(world, world.store.path(world.inside[0]).parent)


def swap_experiment_for_another(world: World) -> None:
    """What lies there has the right names: every checkpoint of ours, with the content of another."""
    ours = world.store.path(world.inside[0]).parent
    for checkpoint_id in world.inside:
        shutil.copytree(world.outside / world.foreign, world.outside / checkpoint_id)
    replace_by_link(ours, world.outside)


def swap_checkpoint(world: World) -> None:
    move_out_and_link(world, world.store.path(world.inside[0]))


def swap_checkpoint_for_another(world: World) -> None:
    replace_by_link(world.store.path(world.inside[0]), world.outside / world.foreign)


def swap_files(world: World) -> None:
    outside = world.root / "files"
    outside.mkdir()
    for path in list(world.store.path(world.inside[0]).iterdir()):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)


def swap_staging(world: World) -> None:
    """Behind the link lies what recovery takes for the rest of a save that was killed."""
    replace_by_link(world.store.folder / ".engine" / "staging", world.outside)


def swap_trash(world: World) -> None:
    """Behind the link lies a folder that is named like the checkpoint in the trash."""
    world.store.manager.delete_checkpoint(world.inside[0])
    shutil.copytree(world.outside / world.foreign, world.outside / world.inside[0])
    replace_by_link(world.store.folder / ".engine" / "trash", world.outside)


def swap_trashed(world: World) -> None:
    world.store.manager.delete_checkpoint(world.inside[0])
    move_out_and_link(world, world.store.folder / ".engine" / "trash" / world.inside[0])


def swap_engine(world: World) -> None:
    target = move_out_and_link(world, world.store.folder / ".engine")
    shutil.copytree(world.outside / world.foreign, target / "staging" / str(uuid.uuid4()))


def swap_lock(world: World) -> None:
    replace_by_link(world.store.folder / ".engine" / "gc.lock", world.outside / "precious")


def swap_format(world: World) -> None:
    replace_by_link(world.store.folder / ".engine" / "format.json", world.outside / "precious")


SWAPS = [
    *(swap_experiment, swap_experiment_for_another, swap_checkpoint, swap_checkpoint_for_another, swap_files),
    *(swap_staging, swap_trash, swap_trashed, swap_engine, swap_lock, swap_format),
]


def use(manager: EnhancedCheckpointManager, world: World, experiment: str) -> Iterator[str]:
    """Do everything that a user can, errors by type aside; yields what must not be."""
    model = {"w": array("d", [9.0])}
    calls: list[Callable[[], object]] = [
        *[lambda i=i: manager.load_checkpoint(i) for i in (*world.inside, world.foreign)],
        *[lambda i=i: manager.load_checkpoint(i, verify_integrity=False) for i in world.inside],
        lambda: manager.load_checkpoint(experiment_id=experiment),
        lambda: manager.verify_experiment_integrity(experiment) and None,
        lambda: manager.save_checkpoint(model, experiment_id=experiment) and None,
        *[lambda i=i: manager.delete_checkpoint(i) and None for i in (*world.inside, world.foreign)],
        *[lambda i=i: manager.undelete(i) for i in (world.inside[0], world.foreign)],
        *[lambda i=i: manager.unpin(i) for i in world.inside],
        *[lambda i=i: manager.delete_checkpoint(i) and None for i in world.inside],
        lambda: manager.empty_trash(experiment) and None,
        lambda: manager.save_checkpoint(model, experiment_id=experiment) and None,
    ]
    for number, call in enumerate(calls):
        try:
            loaded = call()
        except ModelCheckpointError:
            continue
        except Exception as error:  # noqa: BLE001 - a finding, and the next calls are still made
            yield f"call {number}: {error!r}"
            continue
        if isinstance(loaded, dict) and "secret" in loaded["model_state_dict"]:
            yield f"call {number}: read what lies outside"


@pytest.mark.parametrize("when", ["in use", "opened", "opened without its database"])
@pytest.mark.parametrize("swap", SWAPS)
def test_what_lies_behind_a_link_is_neither_read_nor_changed_nor_removed(
    world: World, swap: Callable[[World], None], when: str, tried: Tried
) -> None:
    experiment, store = world.store.tracker.experiment_id, world.store
    swap(world)
    if when != "in use":
        store.close()
    world.before = world.state()
    found: list[str] = []
    if when == "in use":
        found += use(store.manager, world, experiment)
    else:
        name = "experiments" if when == "opened" else "rebuilt"
        url = f"sqlite:///{world.root}/store/{name}.db"
        for _ in range(2):  # the second time, too: what the first one left is recovered
            try:
                with EnhancedCheckpointManager(None, str(store.folder), database_url=url) as manager:
                    found += use(manager, world, experiment)
            except ModelCheckpointError:
                pass
            except Exception as error:  # noqa: BLE001
                found.append(f"opening: {error!r}")
    tried(18)
    after = world.state()
    changed = sorted(name for name in {*after, *world.before} if after.get(name) != world.before.get(name))
    assert (found, changed) == ([], [])


@pytest.mark.parametrize("when", ["in use", "opened"])
def test_a_file_that_is_linked_hard_to_one_outside_keeps_its_bytes_there(world: World, when: str, tried: Tried) -> None:
    """Nothing is ever written in place or cut to size, and what is removed is the name alone."""
    outside, store = world.root / "hard", world.store
    store.manager.delete_checkpoint(world.inside[1])
    garbage = store.folder / ".engine" / "staging" / str(uuid.uuid4())
    garbage.mkdir()
    (garbage / "model.safetensors").write_bytes(b"half of it")
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    outside.mkdir()
    for path in files:
        os.link(path, outside / str(path.relative_to(store.folder)).replace("/", "~"))
    world.before = world.state()
    experiment = store.tracker.experiment_id
    if when == "in use":
        found = [*use(store.manager, world, experiment)]
    else:
        store.close()
        with EnhancedCheckpointManager(None, str(store.folder), database_url=store.url) as manager:
            found = [*use(manager, world, experiment)]
    tried(len(files))
    assert found == []
    assert not garbage.exists() or when == "in use"
    assert not (store.folder / experiment / world.inside[0]).exists(), "nothing was removed: nothing was tried"
    assert world.state() == world.before
