"""Loading a part with ``keys``: what comes back, and that only the chunks that hold it are read and verified."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, exact, needs_torch, needs_zstandard, torch

import model_checkpoint.integrity.sha256 as sha256
from model_checkpoint.errors import ConfigurationError, IntegrityError

CHUNK = sha256.CHUNK
NESTED: dict[str, Any] = {
    "encoder": {"0": {"w": array("d", [1, 2]), "b": array("d", [3])}, "1": {"w": array("d", [4])}},
    "head": [array("f", [5]), {"w": array("f", [6])}, (array("f", [7]), array("f", [8]))],
    "by number": {0: array("h", [9]), 10: array("h", [10]), (1, 2): array("h", [11])},
    "ordered": OrderedDict(a=array("b", [12]), b=array("b", [13])),
    "plain": {"lr": 0.5, "name": "x", "none": None},
    "odd.name": array("b", [14]),
    "[odd]": array("b", [15]),
    "$dollar": array("b", [16]),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


EXPECTED: dict[str, tuple[Any, Any]] = {
    "a leaf": ("model.encoder.0.w", {"encoder": {"0": {"w": array("d", [1, 2])}}}),
    "a container, with all below it": ("model.encoder", {"encoder": NESTED["encoder"]}),
    "a glob over levels": (
        "model.*.w",
        {
            "encoder": {"0": {"w": array("d", [1, 2])}, "1": {"w": array("d", [4])}},
            "head": [None, {"w": array("f", [6])}, None],
        },
    ),
    "an item of a list": ("model.head.0", {"head": [array("f", [5]), None, None]}),
    "an item of a tuple": ("model.head.2.1", {"head": [None, None, (None, array("f", [8]))]}),
    "an integer": ("model.by number.10", {"by number": {10: array("h", [10])}}),
    "a tuple as key": ("model.by number.1.2", {"by number": {(1, 2): array("h", [11])}}),
    "an ordered dict stays one": ("model.ordered.b", {"ordered": OrderedDict(b=array("b", [13]))}),
    "plain values": ("model.plain.l*", {"plain": {"lr": 0.5}}),
    "a name with a dot": ("model.odd.name", {"odd.name": array("b", [14])}),
    "brackets are those of file names": ("model.[[]odd]", {"[odd]": array("b", [15])}),
    "a name with a dollar": ("model.$dollar", {"$dollar": array("b", [16])}),
    "a question mark": ("model.encoder.?.b", {"encoder": {"0": {"b": array("d", [3])}}}),
    "several": (
        ["model.encoder.1", "model.odd.name", "model.encoder.1.w"],
        {"encoder": {"1": {"w": array("d", [4])}}, "odd.name": array("b", [14])},
    ),
    "everything": ("*", NESTED),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_matches_comes_with_all_below_it_and_in_its_place(store: Store, case: str) -> None:
    keys, expected = EXPECTED[case]
    saved = store.save(NESTED, {"state": {0: {"m": array("f", [1])}}})
    for verify in (True, False):
        loaded = store.load(saved, keys=keys, verify_integrity=verify)
        assert exact(loaded["model_state_dict"]) == exact(expected)
        assert (loaded["optimizer_state_dict"] is not None) == (keys == "*")


def test_other_components_are_chosen_in_the_same_way(store: Store) -> None:
    moments = {"state": {0: {"m": array("f", [1])}, 1: {"m": array("f", [2])}}}
    saved = store.save({"w": array("f", [0])}, moments, {"epoch": 3}, extra_state={"rng": b"seed", "other": 1})
    loaded = store.load(saved, keys=["optimizer.state.1", "scheduler", "extra.rng"])
    assert loaded["model_state_dict"] is None
    assert loaded["optimizer_state_dict"] == {"state": {1: {"m": array("f", [2])}}}
    assert loaded["scheduler_state_dict"] == {"epoch": 3}
    assert loaded["extra_state"] == {"rng": b"seed"}
    with pytest.raises(ConfigurationError, match="optimizer"):
        store.load(saved, keys="optimizer.*", load_optimizer=False)


@pytest.mark.parametrize("keys", ["model.nothing", ["model.w", "model.nothing.*"], [], 5, [5], ""])
def test_keys_that_match_nothing_or_are_none_are_refused(store: Store, keys: Any) -> None:
    saved = store.save({"w": array("f", [0]), "v": array("f", [0])})
    with pytest.raises(ConfigurationError, match="keys"):
        store.load(saved, keys=keys)
    assert store.row(saved)["status"] == "committed"


# Large files: what is read


def large(count: int = 6) -> dict[str, array[float]]:
    """Return arrays that begin and end in the midst of chunks."""
    return {f"layer.{i}": array("d", [i + 1]) * ((CHUNK + CHUNK // 2) // 8 + i) for i in range(count)}


def damage(path: Path, at: int, length: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + length] = bytes(255 - byte for byte in content[at : at + length])
    path.write_bytes(content)


@pytest.mark.parametrize("shards", [1 << 30, 3 * CHUNK])
def test_only_the_chunks_that_hold_what_is_wanted_are_read(store: Store, shards: int, tmp_path: Path) -> None:
    sharded = Store(tmp_path / "sharded", max_shard_size=shards, io_threads=3)
    state = large(3)
    saved = sharded.save(state)
    files = sorted(sharded.path(saved).glob("model*.safetensors"))
    assert (len(files) > 1) == (shards < 1 << 30)
    for file in files:  # where an array begins tells which chunks it lies in
        content = file.read_bytes()
        for name, values in state.items():
            begin = content.find(array("d", [values[0]]).tobytes() * 100)
            if begin < 0:
                continue
            chunks = range(begin // CHUNK, (begin + len(values) * 8 - 1) // CHUNK + 1)
            for chunk in range(-(-len(content) // CHUNK)):
                damage(file, min(len(content) - 1, chunk * CHUNK + CHUNK // 3))
                if chunk in chunks or chunk == 0:  # the first one has the header
                    with pytest.raises(IntegrityError, match=file.name):
                        sharded.load(saved, keys=f"model.{name}")
                else:
                    found = sharded.load(saved, keys=f"model.{name}")["model_state_dict"]
                    assert found == {name: values}
                file.write_bytes(content)
        break
    assert sharded.load(saved)["model_state_dict"] == state
    assert sharded.row(saved)["status"] == "committed"
    sharded.close()


def test_files_of_other_components_and_shards_may_be_missing(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", max_shard_size=CHUNK)
    state = large(3)
    saved = store.save(state, {"m": array("d", [1.0])})
    (store.path(saved) / "optimizer.safetensors").unlink()
    assert store.load(saved, keys="model.layer.1")["model_state_dict"] == {"layer.1": state["layer.1"]}
    with pytest.raises(IntegrityError, match=r"optimizer\.safetensors"):
        store.load(saved, keys="optimizer.m")
    store.close()


def test_a_damaged_part_marks_the_checkpoint_and_a_sound_part_vouches_for_nothing(store: Store) -> None:
    state = large(3)
    saved = store.save(state)
    file = store.path(saved) / "model.safetensors"
    damage(file, file.stat().st_size - 1)
    assert store.load(saved, keys="model.layer.0")["model_state_dict"] == {"layer.0": state["layer.0"]}
    assert store.row(saved)["verification"] is None
    with pytest.raises(IntegrityError):
        store.load(saved, keys="model.layer.2")
    assert store.row(saved)["status"] == "corrupt"
    store.load(saved, keys="model.layer.0")
    assert store.row(saved)["status"] == "corrupt"


@pytest.mark.parametrize("lacks", ["saving", "loading", "both"])
def test_without_libcrypto_parts_are_loaded_and_whole_files_verified(
    store: Store, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        return None

    state = large(3)
    with monkeypatch.context() as patch:
        if lacks != "loading":
            patch.setattr(sha256, "_libcrypto", missing)
        saved = store.save(state)
    if lacks != "saving":
        monkeypatch.setattr(sha256, "_libcrypto", missing)
    for _ in range(2):
        assert store.load(saved, keys="model.layer.1")["model_state_dict"] == {"layer.1": state["layer.1"]}
    assert store.load(saved)["model_state_dict"] == state
    assert store.manager.verify_experiment_integrity()["failed"] == 0
    file = store.path(saved) / "model.safetensors"
    damage(file, file.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        store.load(saved, keys="model.layer.0")


def test_forged_states_between_chunks_do_not_pass(store: Store) -> None:
    from helpers_storage import reseal

    saved = store.save(large(3))
    folder = store.path(saved)

    def forge(manifest: dict[str, Any]) -> None:
        (entry,) = [entry for entry in manifest["files"] if entry["states"]]
        entry["states"][1] = "0" * 64

    reseal(folder, forge)
    with pytest.raises(IntegrityError):
        store.load(saved, keys="model.layer.1")
    with pytest.raises(IntegrityError):
        store.load(saved)


# Every form


FORMS = [
    ("safetensors", False),
    pytest.param("safetensors", True, marks=needs_zstandard),
    pytest.param("pytorch", False, marks=needs_torch),
    pytest.param("pytorch", True, marks=[needs_torch, needs_zstandard]),
]


@needs_torch
@pytest.mark.parametrize(("backend", "compressed"), FORMS)
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_tensors_ties_and_views_come_as_in_a_whole_load(
    backend: str, compressed: bool, device: str | None, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s", backend, enable_compression=compressed)
    model = torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(70, 900), second=torch.nn.Linear(900, 1200)))
    base = torch.arange(1_500_000.0)
    state = {"model": model, "low": base[:1_000_000], "high": base[500_000:], "tied": base[:1_000_000]}
    state["gaps"], state["scalar"], state["empty"] = torch.arange(10)[::3], torch.tensor(5), torch.zeros(0, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 70)).sum().backward()
    optimizer.step()
    saved = store.save(state, optimizer)
    whole = store.load(saved, device=device)
    keys = ["model.low", "model.tied", "model.high", "model.gaps", "model.scalar", "model.empty", "optimizer.state.2.*"]
    part = store.load(saved, keys=[*keys, "model.model.second.*"], device=device)
    found, all_of_it = part["model_state_dict"], whole["model_state_dict"]
    del all_of_it["model"]["first.weight"], all_of_it["model"]["first.bias"]
    assert list(found) == list(all_of_it)
    compare: Callable[[Any], Any] = exact if device != "meta" else lambda t: (t.shape, t.dtype, t.device.type)
    for name in ("low", "high", "tied", "gaps", "scalar", "empty"):
        assert compare(found[name]) == compare(all_of_it[name])
        assert found[name].device.type == (device or "cpu")
    for name in ("second.weight", "second.bias"):
        assert compare(found["model"][name]) == compare(all_of_it["model"][name])
    assert found["low"] is found["tied"]
    if device != "meta":
        found["low"][700_000] = -1.0
        assert found["high"][200_000] == -1.0  # one memory
    moments = part["optimizer_state_dict"]["state"]
    assert list(moments) == [2]
    assert compare(moments[2]["exp_avg"]) == compare(whole["optimizer_state_dict"]["state"][2]["exp_avg"])
    with pytest.raises(ConfigurationError, match="device"):
        store.load(saved, keys="model.low", device="no such device")
    store.close()


@needs_torch
def test_an_array_tied_across_components_is_found_in_the_file_of_the_other(store: Store) -> None:
    weight = torch.arange(5.0)
    saved = store.save({"w": weight}, {"master": weight, "own": torch.ones(2)})
    part = store.load(saved, keys="optimizer.master")
    assert part["model_state_dict"] is None
    assert torch.equal(part["optimizer_state_dict"]["master"], weight)


def test_random_parts_of_random_states_are_those_parts(store: Store, chance: random.Random) -> None:
    state = {f"k{i}": array("d", [i]) * chance.randrange(1, 400_000) for i in range(25)}
    saved = store.save(state)
    for _ in range(20):
        names = chance.sample(sorted(state), chance.randrange(1, 5))
        found = store.load(saved, keys=[f"model.{name}" for name in names])["model_state_dict"]
        assert found == {name: state[name] for name in state if name in names}
