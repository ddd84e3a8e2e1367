"""``manager.diff``: what it finds of arrays, values, config and metrics, what it reads of them, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from operator import mul
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, needs_ml_dtypes, needs_numpy, needs_torch, np, replace_file, torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model_checkpoint.checkpoint.comparison as comparison
import model_checkpoint.integrity.reading as reading
from model_checkpoint import CheckpointDiff, TensorDiff
from model_checkpoint.arrays import DTYPES
from model_checkpoint.checkpoint.comparison import compare
from model_checkpoint.checkpoint.differences import Difference, difference
from model_checkpoint.checkpoint.pieces import SavedArray, tiles
from model_checkpoint.checkpoint.reader import CheckpointReader
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, IntegrityError
from model_checkpoint.hooks import HookEvent
from model_checkpoint.integrity.reading import FileReader
from model_checkpoint.integrity.sha256 import CHUNK
from model_checkpoint.integrity.verification import read_manifest

WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


def diff(store: Store, before: object, after: object, **options: Any) -> CheckpointDiff:
    """Save two models and compare them."""
    return store.manager.diff(store.save(before), store.save(after), **options)


def about(found: Difference) -> tuple[object, ...]:
    """Return a difference so that NaN equals NaN, and numbers that were rounded otherwise equal each other."""
    return found[:2] + tuple(None if x != x else pytest.approx(x, rel=1e-12) for x in found[2:])


def told(found: Difference) -> tuple[object, ...]:
    return found[:2] + tuple(None if x != x else x for x in found[2:])


# Arithmetic


@st.composite
def two_arrays(draw: st.DrawFn) -> tuple[str, bytes, bytes]:
    dtype = draw(st.sampled_from(WHOLE_BYTES))
    size = DTYPES[dtype].bits // 8
    pool = draw(st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=5))
    pairs = draw(st.lists(st.tuples(st.sampled_from(pool), st.sampled_from(pool)), max_size=30))
    return dtype, b"".join(a for a, _ in pairs), b"".join(b for _, b in pairs)


@needs_numpy
@settings(max_examples=200, deadline=None)
@given(two_arrays())
def test_the_standard_library_and_numpy_compute_the_same(case: tuple[str, bytes, bytes]) -> None:
    dtype, a, b = case[0], memoryview(case[1]), memoryview(case[2])
    by_hand = difference(dtype, a, b, None)
    assert told(by_hand) == about(difference(dtype, a, b, np))
    assert by_hand.elements == a.nbytes * 8 // DTYPES[dtype].bits
    assert (by_hand.differing == 0) == (a == b)


@needs_numpy
def test_the_standard_library_and_numpy_compute_the_same_of_many_blocks() -> None:
    chance = random.Random(1)
    a = array("d", [chance.gauss(0, 1) for _ in range(100_000)])
    b = array("d", [x + chance.choice((0, 1e-9)) for x in a])
    pieces = [memoryview(x).cast("B") for x in (a, b)]
    found = difference("float64", *pieces, None)
    assert told(found) == about(difference("float64", *pieces, np))
    assert found.distance == pytest.approx(math.dist(a, b))
    assert found.norm == pytest.approx(math.hypot(*a))
    assert found.differing == sum(x != y for x, y in zip(a, b))


@needs_torch
@needs_numpy
@pytest.mark.parametrize("dtype", [name for name in WHOLE_BYTES if hasattr(torch, name)])
def test_torch_finds_the_same(dtype: str) -> None:
    if dtype.startswith("float4"):
        pytest.skip("torch cannot convert it")
    chance = random.Random(2)
    raw = [bytearray(chance.randbytes(1600)) for _ in range(2)]
    raw[1][:800] = raw[0][:800]
    if dtype == "bool":
        raw = [bytearray(byte & 1 for byte in side) for side in raw]
    size = DTYPES[dtype].bits // 8
    a, b = (torch.frombuffer(side, dtype=torch.uint8).view(getattr(torch, dtype)) for side in raw)
    bits = [torch.frombuffer(side, dtype=torch.uint8).view(-1, size) for side in raw]
    equal = (bits[0] == bits[1]).all(1)
    wide = torch.complex128 if dtype.startswith("complex") else torch.float64
    x, y = (side.to(wide) for side in (a, b))
    gaps = (x - y).abs().masked_fill(equal, 0)
    parts = torch.view_as_real(x).flatten() if dtype.startswith("complex") else x
    expected = Difference(
        len(a),
        int((~equal).sum()),
        gaps.max().item(),
        math.nan if gaps.isnan().any() else math.hypot(*gaps.tolist()),
        math.hypot(*parts[parts.isfinite()].tolist()),
    )
    for numpy in (np, None):
        assert told(difference(dtype, *map(memoryview, raw), numpy)) == about(expected)


@needs_ml_dtypes
@needs_numpy
@pytest.mark.parametrize("dtype", [name for name in WHOLE_BYTES if name.startswith("float8")])
def test_every_number_of_eight_bits_is_that_of_ml_dtypes(dtype: str) -> None:
    import ml_dtypes

    every = np.arange(256, dtype="u1").view(getattr(ml_dtypes, dtype)).astype("f8")
    nothing = 0x7F if dtype.endswith("e8m0fnu") else 0  # 1, or 0: they have other bits than what they are taken from
    for byte, number in enumerate(every):
        found = difference(dtype, memoryview(bytes([byte])), memoryview(bytes([nothing])), None)
        gap = abs(number - every[nothing]) if byte != nothing else 0.0
        assert told(found)[2] == (None if gap != gap else gap)
        assert found.norm == (abs(number) if math.isfinite(number) else 0)


BOTH = pytest.mark.parametrize("numpy", [None, pytest.param(np, marks=needs_numpy)], ids=["stdlib", "numpy"])
NAN, INF = math.nan, math.inf


@BOTH
@pytest.mark.parametrize(
    ("code", "a", "b", "expected", "relative"),
    [
        ("d", [1, 2], [1, 2], (2, 0, 0, 0), 0),
        ("d", [3, 4], [3, 4.5], (2, 1, 0.5, 0.5), 0.1),
        ("d", [0.0], [-0.0], (1, 1, 0, 0), 0),
        ("d", [0.0], [2], (1, 1, 2, 2), INF),
        ("d", [], [], (0, 0, 0, 0), 0),
        ("d", [NAN, 1], [NAN, 3], (2, 1, 2, 2), 2),
        ("d", [NAN, 1], [0, 1], (2, 1, NAN, NAN), NAN),
        ("d", [INF, 1, INF], [INF, 1, -INF], (3, 1, INF, INF), INF),
        ("d", [INF, 1], [INF, 2], (2, 1, 1, 1), 1),
        ("d", [INF, 1], [0, NAN], (2, 2, NAN, NAN), NAN),
        ("d", [0.0], [NAN], (1, 1, NAN, NAN), NAN),
        ("d", [3e200, 4e200], [0, 0], (2, 2, 4e200, 5e200), 1),
        ("d", [5e-324], [0], (1, 1, 5e-324, 5e-324), 1),
        ("q", [2**62, -(2**63)], [2**62 + 1, -(2**63)], (2, 1, 1, 1), 1 / math.hypot(2**62, 2**63)),
        ("q", [-(2**63)], [2**63 - 1], (1, 1, 2.0**64, 2.0**64), 2),
        ("Q", [2**64 - 1, 0], [2**64 - 2, 0], (2, 1, 1, 1), 2.0**-64),
    ],
)
def test_what_counts_as_a_difference(
    numpy: Any, code: str, a: list[Any], b: list[Any], expected: tuple[float, ...], relative: float
) -> None:
    dtype = {"d": "float64", "q": "int64", "Q": "uint64"}[code]
    found = difference(dtype, *(memoryview(array(code, side).tobytes()) for side in (a, b)), numpy)
    assert found[:4] == pytest.approx(expected, nan_ok=True, rel=1e-15)
    assert found.relative == pytest.approx(relative, nan_ok=True, rel=1e-15)


@BOTH
def test_a_complex_number_is_one_element(numpy: Any) -> None:
    a, b = array("d", [3, 4, 1, 1]), array("d", [0, 0, 1, 1])
    found = difference("complex128", *(memoryview(side.tobytes()) for side in (a, b)), numpy)
    assert found == (2, 1, 5, 5, pytest.approx(math.sqrt(27)))


# What is found


def test_each_array_and_value_is_told_of(store: Store) -> None:
    before = {
        "same": array("f", [1, 2]),
        "changed": array("d", [3, 4]),
        "retyped": array("d", [1]),
        "reshaped": array("f", [1, 2]),
        "removed": array("b", [1]),
        "list": [array("h", [1]), {"deep": array("h", [2])}],
        "gone": "text",
        "lr": 0.1,
        "nan": NAN,
        "becomes an array": 5,
        7: (1, 2),
    }
    after = {
        **before,
        "same": array("f", [1, 2]),
        "changed": array("d", [3, 4.5]),
        "retyped": array("f", [1]),
        "reshaped": array("f", [1, 2, 3]),
        "added": array("b", [1]),
        "list": [array("h", [1]), {"deep": array("h", [5])}],
        "lr": 0.2,
        "becomes an array": b"5",
        7: (1, True),
    }
    del after["removed"], after["gone"]
    found = diff(store, before, after)
    assert found.tensors["model.same"] == TensorDiff("same", ("float32", (2,)), ("float32", (2,)), 0, 0, 0, 2)
    assert found.tensors["model.changed"] == TensorDiff(
        "changed", ("float64", (2,)), ("float64", (2,)), pytest.approx(0.1), 0.5, 1, 2
    )
    assert found.reshaped == {
        "model.retyped": TensorDiff("reshaped", ("float64", (1,)), ("float32", (1,))),
        "model.reshaped": TensorDiff("reshaped", ("float32", (2,)), ("float32", (3,))),
    }
    assert found.removed == {"model.removed": TensorDiff("removed", ("int8", (1,)), None)}
    assert set(found.added) == {"model.added", "model.becomes an array"}
    assert list(found.changed) == ["model.list.1.deep", "model.changed"], "the largest relative change first"
    assert found.tensors["model.list.0"].status == "same"
    values = {path: (value.status, value.before, value.after) for path, value in found.values.items()}
    assert values == {
        "model.gone": ("removed", "text", None),
        "model.lr": ("changed", 0.1, 0.2),
        "model.becomes an array": ("removed", 5, None),
        "model.7.1": ("changed", 2, True),
    }
    assert not found.same_state
    assert not {**found.config, **found.metrics, **found.progress}


def test_a_checkpoint_is_identical_with_itself_and_with_what_was_saved_alike(store: Store) -> None:
    state = {"w": array("d", [1, NAN]), "set": {"a", 1, (2, 3)}, "bytes": {b"x", b"y"}, "nan": NAN, "empty": {}}
    first, second = (store.save(state, loss=NAN, metrics={"f1": NAN}, config={"a": [1, NAN]}) for _ in range(2))
    for other in (first, second):
        found = store.manager.diff(first, other)
        assert found.identical
        assert {tensor.status for tensor in found.tensors.values()} == {"same"}
        assert len(found.tensors) == 3
    assert store.manager.diff(first, store.save(state, epoch=1)).same_state


def test_config_metrics_and_progress_are_compared(store: Store) -> None:
    first = store.save(
        {"w": 1}, epoch=1, step=5, loss=NAN, config={"lr": 1, "opt": {"betas": [1, 2]}}, metrics={"f": 1}
    )
    second = store.save(
        {"w": 1}, epoch=2, step=5, loss=NAN, val_loss=1, config={"opt": {"betas": [1, 3]}}, metrics={"g": INF}
    )
    found = store.manager.diff(first, second)
    shown = {
        name: {key: (value.status, value.before, value.after) for key, value in getattr(found, name).items()}
        for name in ("config", "metrics", "progress")
    }
    assert shown == {
        "config": {"lr": ("removed", 1, None), "opt.betas.1": ("changed", 2, 3)},
        "metrics": {"f": ("removed", 1, None), "g": ("added", None, INF)},
        "progress": {"epoch": ("changed", 1, 2), "val_loss": ("changed", None, 1)},
    }
    assert found.same_state
    assert not found.identical


def test_printed_it_is_a_table_of_some_lines(store: Store) -> None:
    before = {f"layer{i}": array("d", [1.0]) for i in range(30)}
    after = {f"layer{i}": array("d", [1.0 + i / 8]) for i in range(30)}
    lines = str(diff(store, {**before, "x": 1, "old": b"1"}, {**after, "x": 2})).splitlines()
    assert lines[1] == "tensors: 29 changed, 1 removed, 1 same"
    assert re.fullmatch(r"\s+relative\s+max abs\s+differing", lines[2])
    assert lines[3].split() == ["model.layer29", "3.62e+00", "3.62e+00", "1", "of", "1"]
    assert lines[23] == "  ... and 10 more"
    assert lines[24:] == ["values: 1 differ", "  model.x  1 -> 2"]
    assert "removed  " in str(diff(store, {"old": b"1"}, {}))


@pytest.mark.parametrize(
    ("keys", "arrays", "values"),
    [
        ("model.a", {"model.a"}, set()),
        ("model.list.*", {"model.list.1"}, {"model.list.0"}),
        (["model.list", "model.new"], {"model.list.1", "model.new"}, {"model.list.0"}),
        ("*", {"model.a", "model.list.1", "model.new"}, {"model.list.0", "model.lr"}),
    ],
)
def test_keys_choose_what_is_compared(store: Store, keys: Any, arrays: set[str], values: set[str]) -> None:
    before = {"a": array("b", [1]), "list": [1, array("b", [2])], "lr": 1}
    after = {"a": array("b", [2]), "list": [2, array("b", [3])], "lr": 2, "new": array("b", [4])}
    found = diff(store, before, after, keys=keys)
    assert set(found.tensors) == arrays
    assert set(found.values) == values


def test_keys_that_match_nothing_are_refused(store: Store) -> None:
    for keys in ("model.nothing", ["model.a", "model.b.*"], [], 5):
        with pytest.raises(ConfigurationError, match="keys"):
            diff(store, {"a": b"1"}, {"a": b"2"}, keys=keys)


def test_numpy_is_not_needed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"w": array("f", [1, 2, 3]), "q": array("q", [2**60])}
    after = {"w": array("f", [1, 2, 4]), "q": array("q", [2**60 + 1])}
    with_numpy = diff(store, before, after)
    monkeypatch.setattr(comparison, "find", lambda package: None)
    without = diff(store, before, after)
    assert {path: (t.max_abs, t.differing) for path, t in without.changed.items()} == {
        "model.w": (1, 1),
        "model.q": (1, 1),
    }
    assert without.tensors == with_numpy.tensors


@needs_torch
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [name for name in WHOLE_BYTES if hasattr(torch, name)])
def test_every_dtype_of_torch_is_compared(store: Store, dtype: str) -> None:
    size = DTYPES[dtype].bits // 8
    before = torch.zeros(6 * size, dtype=torch.uint8)
    after = before.clone()
    after[0] = 1
    made = [raw.view(getattr(torch, dtype)).reshape(2, 3) for raw in (before, after)]
    found = diff(store, {"w": made[0], "v": made[0].clone()}, {"w": made[1], "v": made[0].clone()})
    assert (found.tensors["model.w"].differing, found.tensors["model.w"].elements) == (1, 6)
    assert found.tensors["model.w"].before == (dtype, (2, 3))
    assert found.tensors["model.v"].status == "same"


@needs_torch
def test_training_on_changes_all_of_it(store: Store) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()

    step()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    first = store.save(model, optimizer)
    step()
    optimizer.param_groups[0]["lr"] = 0.01
    found = store.manager.diff(first, store.save(model, optimizer))
    for name, value in model.state_dict().items():
        tensor, x, y = found.changed[f"model.{name}"], old[name].double(), value.double()
        assert tensor.relative == pytest.approx(((x - y).norm() / x.norm()).item() if x.norm() else INF)
        assert tensor.max_abs == (x - y).abs().max().item()
    assert "optimizer.state.0.exp_avg" in found.changed
    assert {path: value.after for path, value in found.values.items()} == {"optimizer.param_groups.0.lr": 0.01}


@needs_torch
def test_arrays_that_share_memory_are_compared_as_they_are_seen(store: Store) -> None:
    def views(change: int) -> dict[str, Any]:
        base = torch.arange(24.0).reshape(4, 6).clone()
        base[1, 2] += change
        return {
            "w": base,
            "t": base.t(),
            "first": base[:2],
            "part": base[:, 1:3],
            "even": base.flatten()[::2],
            "tie": base,
        }

    apart = {name: value.clone() for name, value in views(1).items()}
    for state in (views(1), apart):
        found = diff(store, views(0), state)
        assert {path.removeprefix("model."): t.differing for path, t in found.tensors.items()} == {
            "w": 1,
            "t": 1,
            "first": 1,
            "part": 1,
            "even": 1,
            "tie": 1,
        }
        assert found.tensors["model.t"].after == ("float32", (6, 4))
    assert diff(store, views(1), apart).same_state
    assert diff(store, apart, views(1)).same_state
    assert diff(store, views(1), views(1)).same_state
    assert diff(store, {**views(0), "t": views(0)["w"].reshape(6, 4)}, views(0)).tensors["model.t"].differing == 22


@needs_torch
@pytest.mark.parametrize(
    "change",
    [{"shape": [6, 5]}, {"offset": 1}, {"offset": -1}, {"strides": [1]}, {"strides": [1, -6]}, {"dtype": "int32"}],
    ids=str,
)
def test_views_that_reach_beyond_what_was_stored_are_refused(store: Store, change: dict[str, Any]) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    ids: list[str] = []
    for number in range(2):
        values = base + number
        ids.append(store.save({"w": values, "t": values.t()}))
        tree = json.loads((store.path(ids[-1]) / "state.json").read_bytes())
        tree["model"]["t"].update(change)
        replace_file(store.path(ids[-1]), "state.json", json.dumps(tree).encode())
    readers = [CheckpointReader(str(store.path(i)), read_manifest(str(store.path(i)))[0], True, 1) for i in ids]
    with pytest.raises(IntegrityError, match=f"{ids[0]}: a file cannot be decoded"):
        compare(*readers)


def test_names_that_look_the_same_are_kept_apart(store: Store) -> None:
    before = {"a.b": array("b", [1]), "a": {"b": array("b", [2]), "c": 1}, "a.c": 2}
    after = {"a.b": array("b", [1]), "a": {"b": array("b", [3]), "c": 1}, "a.c": 3}
    found = diff(store, before, after)
    assert {path: tensor.max_abs for path, tensor in found.tensors.items()} == {"model.a.b": 0, "model.a.b#2": 1}
    assert {path: value.after for path, value in found.values.items()} == {"model.a.c#2": 3}


def test_the_order_of_a_set_and_of_a_dict_does_not_count(store: Store) -> None:
    orders = [[0, 8, "x"], [8, 0, "x"]]  # these two numbers collide
    assert list(set(orders[0])) != list(set(orders[1]))
    states = [{"set": set(order), **{str(key): key for key in order}} for order in orders]
    assert diff(store, *states).same_state
    assert set(diff(store, {"set": {1, "x"}}, {"set": {2, "x"}}).values) == {"model.set"}


def test_nan_is_the_largest_change_and_infinity_the_next(store: Store) -> None:
    before = {"a": array("d", [1]), "b": array("d", [0]), "c": array("d", [1])}
    after = {"a": array("d", [2]), "b": array("d", [5]), "c": array("d", [NAN])}
    assert list(diff(store, before, after).changed) == ["model.c", "model.b", "model.a"]


@needs_torch
def test_what_torch_hangs_on_a_state_dict_does_not_count(store: Store) -> None:
    model = torch.nn.Linear(2, 2)
    plain = OrderedDict(model.state_dict().items())
    assert diff(store, model, dict(plain)).same_state


# What is read


def large(changed: int | None = None, count: int = 3) -> dict[str, array[float]]:
    """Return arrays that begin and end in the midst of chunks."""
    state = {f"layer{i}": array("d", [i + 1]) * (CHUNK // 8 + 999 + i) for i in range(count)}
    if changed is not None:
        state[f"layer{changed}"][-1] += 1
    return state


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {"max_shard_size": CHUNK + 9999},
    "gzip": {"enable_compression": True},
    "without digests": {"enable_integrity_checks": False},
    "pytorch": {"backend": "pytorch"},
}


@needs_torch
@pytest.mark.parametrize("second", OPTIONS)
@pytest.mark.parametrize("first", ["plain", "shards"])
def test_how_they_were_saved_makes_no_difference(tmp_path: Path, first: str, second: str) -> None:
    stores = [Store(tmp_path / "s", **OPTIONS[name], max_checkpoints=None) for name in (first, second)]
    states = [{name: torch.tensor(values, dtype=torch.float64) for name, values in large(i).items()} for i in (None, 1)]
    ids = [store.save(state) for store, state in zip(stores, states)]
    assert len(list(stores[0].path(ids[0]).glob("*.safetensors"))) == (3 if first == "shards" else 1)
    for pair, store in ((ids, stores[0]), (ids[::-1], stores[1])):
        found = store.manager.diff(*pair)
        assert {path: (t.differing, t.max_abs) for path, t in found.changed.items()} == {"model.layer1": (1, 1)}
        assert len(found.tensors) == 3
    again = stores[1].save(states[1], epoch=0)
    assert stores[1].manager.diff(ids[1], again).identical
    for store in stores:
        store.close()


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of arrays that were read, one for each read."""
    names: list[str] = []
    read_into = FileReader.read_into

    def noted(self: FileReader, position: int, memory: memoryview) -> None:
        names.append(Path(self.path).name)
        read_into(self, position, memory)

    monkeypatch.setattr(FileReader, "read_into", noted)
    return names


def test_files_with_the_same_digest_are_not_read(tmp_path: Path, read_bytes: list[str]) -> None:
    store = Store(tmp_path / "s", max_shard_size=CHUNK + 9999)
    ids = [store.save(large(change), {"m": array("f", [1])}) for change in (None, 0, 0)]
    read_bytes.clear()
    found = store.manager.diff(*ids[:2])
    assert list(found.changed) == ["model.layer0"]
    assert "optimizer.safetensors" not in read_bytes
    heads = read_bytes.count("model-00002-of-00003.safetensors")
    assert 0 < heads <= 8, "only what says which arrays are in it"
    read_bytes.clear()
    assert store.manager.diff(*ids[1:]).identical
    assert set(read_bytes) == {"state.json"}
    store.close()


def test_a_chunk_is_verified_once(store: Store, read_bytes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{f"w{i}": array("d", [i, change]) for i in range(500)} for change in (0, 1)]
    ids = [store.save(state) for state in many]
    checked: list[int] = []
    check = FileReader.check

    def noted(self: FileReader, begin: int, end: int) -> None:
        checked.append(begin)
        check(self, begin, end)

    monkeypatch.setattr(FileReader, "check", noted)
    assert len(store.manager.diff(*ids).changed) == 500
    assert checked == [0, 0]


@needs_torch
def test_what_is_tied_or_turned_round_is_read_in_few_reads(store: Store, read_bytes: list[str]) -> None:
    tied = torch.zeros(300, 200)
    ids = []
    for change in (0, 1):
        turned = torch.zeros(300, 200)
        turned[5, 7] = tied[1, 2] = change
        ids.append(store.save({"w": turned, "t": turned.t(), **{f"tie{i}": tied for i in range(50)}}))
    read_bytes.clear()
    assert len(store.manager.diff(*ids).changed) == 52
    assert read_bytes.count("model.safetensors") <= 2 * (2 + 1 + 3), "two of the head, one to verify, three arrays"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tiles_have_each_element_once_with_its_counterpart(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))

    def array_of(order: list[int]) -> SavedArray:
        strides, reach = [0] * len(shape), 1
        for axis in order:
            strides[axis] = data.draw(st.sampled_from([reach, reach, reach, 0]))
            reach *= shape[axis] + data.draw(st.integers(0, 1))
        return SavedArray("model", "w", "float32", shape, tuple(strides), data.draw(st.integers(0, 3)), reach)

    a, b = (array_of(data.draw(st.permutations(range(len(shape))))) for _ in range(2))
    made = tiles(a, b, data.draw(st.integers(1, 4)))
    if made is None:
        return
    found = [(y + j, x + i) for tile in made for i, y in enumerate(tile.a) for j, x in enumerate(tile.b)]
    places = product(*map(range, shape))
    expected = [[sum(map(mul, place, side.strides), side.offset) for side in (a, b)] for place in places]
    assert sorted(found) == sorted(map(tuple, expected))


@needs_torch
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_an_array_that_is_stored_turned_round_is_read_in_tiles(
    store: Store, read_bytes: list[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(comparison, "_PIECE", 64 * 64 * 8)
    base = torch.arange(3 * 200 * 150).remainder(120).to(getattr(torch, dtype)).reshape(3, 200, 150)
    turned = base.transpose(1, 2)
    dense = turned.contiguous()
    saved = store.save({"b": base, "t": turned})
    for differing in (0, 1):
        dense[1, 140, 7] += differing
        read_bytes.clear()
        other = store.save({"b": base, "t": dense})
        for pair in ((saved, other), (other, saved)):
            found = store.manager.diff(*pair).tensors["model.t"]
            assert (found.differing, found.max_abs, found.elements) == (differing, differing, 90_000)
        assert len(read_bytes) < 2 * 90_000 / 10


def test_reading_a_file_twice_does_not_count_as_reading_another(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", enable_compression=True, max_shard_size=100)
    parts = [{"m": array("d", [2, 3])} for _ in range(3)]
    ids = [
        store.save({f"w{i}": array("d", [n]) * 10 for i in range(3)}, *parts[:2], extra_state=parts[2]) for n in (1, 2)
    ]
    assert len(list(store.path(ids[1]).iterdir())) == 1 + 1 + 4 + 3, "manifest, tree, index and shards, the other parts"
    (file,) = store.path(ids[1]).glob("optimizer.*")
    damage(file, -1)
    assert store.manager.verify_experiment_integrity()["failed"] == 1
    assert len(store.manager.diff(*ids).changed) == 3
    assert store.row(ids[1])["status"] == "corrupt"
    store.close()


MEASURE = """
import sys
from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.utils.optional import find
import model_checkpoint.checkpoint.comparison as comparison
import model_checkpoint.integrity.reading as reading

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, url, before, after, numpy = sys.argv[1:]
if numpy == "no":
    comparison.find = lambda package: None
else:
    find("numpy")
with EnhancedCheckpointManager(None, folder, database_url=url) as manager:
    manager.diff(before, before)
    start = peak()
    found = manager.diff(before, after)
    assert found.tensors["model.w"].differing == 1, found
    print(peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
@pytest.mark.parametrize("numpy", [pytest.param("yes", marks=needs_numpy), "no"])
def test_the_memory_does_not_depend_on_the_size(store: Store, numpy: str) -> None:
    state = {"w": array("f", [1]) * (64 << 18)}
    first = store.save(state)
    state["w"][123_456] = 2
    command = [sys.executable, "-c", MEASURE, str(store.folder), store.url, first, store.save(state), numpy]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 20


# What goes wrong


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("hello", "bye"),
        ("x", None),
        ([], None),
        ({}, []),
        ({"": 1}, {"": 2}),
        ({"a": []}, {}),
        ({"a": [1]}, {"a": {"0": 1}}),
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": 9, "a": {"b": 2}}),
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": 1, "a": {"b": 9}}),
    ],
    ids=str,
)
def test_no_difference_of_configs_is_overlooked(store: Store, before: Any, after: Any) -> None:
    ids = [store.save({"w": 1}, config=config) for config in (before, after)]
    for pair in (ids, ids[::-1]):
        found = store.manager.diff(*pair)
        assert found.config
        assert not found.identical
    assert store.manager.diff(ids[0], ids[0]).identical


def test_the_order_of_a_configs_keys_does_not_count(store: Store) -> None:
    configs: list[Any] = [{"a.b": 1, "a": {"b": 2}}, {"a": {"b": 2}, "a.b": 1}]
    assert store.manager.diff(*(store.save({"w": 1}, config=config) for config in configs)).identical


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({1: 5}, {"1": 5}),
        ({None: array("d", [5])}, {"None": array("d", [5])}),
        ({(1, 2): 5}, {1: {2: 5}}),
        (b"a", array("B", b"a")),
        (b"a", bytearray(b"a")),
    ],
    ids=str,
)
def test_keys_and_bytes_that_only_look_the_same_differ(store: Store, before: Any, after: Any) -> None:
    for states in ((before, after), (after, before)):
        found = diff(store, *({"x": state} for state in states))
        assert [path.rpartition(" ")[2] for path in found.values] == ["(type)"]
        assert not found.same_state
    assert diff(store, {"x": before}, {"x": before}).same_state
    assert diff(store, {"x": {1: 5}}, {"x": {1: 5, 2: 6}}).values.keys() == {"model.x.2"}


def test_typed_keys_of_other_kinds_differ(store: Store) -> None:
    random = pytest.importorskip("jax.random")
    first, other = (random.key(0, impl=impl) for impl in ("rbg", "unsafe_rbg"))
    found = diff(store, {"k": first}, {"k": other})
    assert (found.values["model.k.impl"].before, found.values["model.k.impl"].after) == ("rbg", "unsafe_rbg")
    assert found.tensors["model.k"].status == "same"
    assert not diff(store, {"k": first}, {"k": random.key_data(first)}).same_state
    assert diff(store, {"k": first}, {"k": first}).same_state


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at", [5, 200, -1])
def test_a_changed_byte_is_refused_and_noted_of_the_right_one(store: Store, which: int, at: int) -> None:
    ids = [store.save(large(change)) for change in (None, 2)]
    file = store.path(ids[which]) / "model.safetensors"
    damage(file, at)
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        store.manager.diff(*ids)
    assert [store.row(i)["status"] for i in ids] == [
        "corrupt" if number == which else "committed" for number in range(2)
    ]


@pytest.mark.parametrize("name", ["state.json", "checkpoint.json", "model.safetensors"])
@pytest.mark.parametrize("alike", [True, False])
def test_a_missing_file_is_named(store: Store, name: str, alike: bool) -> None:
    ids = [store.save({"w": array("f", [1])}), store.save({"w": array("f", [1 if alike else 2])})]
    file = store.path(ids[1]) / name
    file.unlink()
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        store.manager.diff(*ids)


def test_what_is_not_read_is_not_verified(store: Store) -> None:
    ids = [store.save({"w": array("f", [1])}) for _ in range(2)]
    damage(store.path(ids[1]) / "model.safetensors", -1)
    assert store.manager.diff(*ids).identical, "the digests say what was saved"
    assert store.manager.verify_experiment_integrity()["failed"] == 1


def test_a_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", enable_compression=True)
    ids = [store.save({"w": array("f", [value])}) for value in (1, 2)]
    (file,) = store.path(ids[0]).glob("model.safetensors.*")
    damage(file, -1)
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        store.manager.diff(*ids)
    store.close()


def test_ids_that_are_none_are_not_found(store: Store) -> None:
    saved = store.save({"w": 1})
    for other in ("00000000-0000-0000-0000-000000000000", "nonsense", None, 5):
        for pair in ((saved, other), (other, saved)):
            with pytest.raises(CheckpointNotFoundError):
                store.manager.diff(*pair)
    gone = store.save({"w": 2})
    store.manager.delete_checkpoint(gone)
    with pytest.raises(CheckpointNotFoundError):
        store.manager.diff(saved, gone)


def test_nothing_is_removed_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [store.save({"w": array("f", [value])}) for value in (1, 2)]
    other = Store(store.folder.parent)
    recovered: list[object] = []

    def while_comparing(*arguments: Any) -> CheckpointDiff:
        recovered.append(other.manager.recover())
        return compare(*arguments)

    monkeypatch.setattr(comparison, "compare", while_comparing)
    assert store.manager.diff(*ids).changed
    assert recovered == [None], "it holds the directory's lock"
    assert other.manager.recover() is not None
    other.close()


def test_a_background_save_is_waited_for(store: Store) -> None:
    ids = [store.save({"w": array("f", [value])}, blocking=False) for value in (1, 2)]
    assert store.manager.diff(*ids).tensors["model.w"].max_abs == 1


def test_no_hook_runs(store: Store) -> None:
    ids = [store.save({"w": array("f", [value])}) for value in (1, 2)]
    fired: list[object] = []
    store.manager.register_hook("all", fired.append, list(HookEvent))
    damage(store.path(ids[1]) / "model.safetensors", -1)
    with pytest.raises(IntegrityError):
        store.manager.diff(*ids)
    assert fired == []


def test_without_libcrypto_a_file_is_verified_whole_and_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [store.save(large(change)) for change in (None, 2)]
    monkeypatch.setattr(reading, "can_resume", lambda: False)
    assert list(store.manager.diff(*ids).changed) == ["model.layer2"]
    file = store.path(ids[1]) / "model.safetensors"
    damage(file, -1)
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        store.manager.diff(*ids, keys="model.layer0")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"shape": [3]},
        {"shape": [-4]},
        {"dtype": "float4_e2m1fn"},
        {"dtype": "nonsense"},
        {"$array": "nothing"},
    ],
    ids=str,
)
def test_a_tree_that_does_not_fit_the_files_is_refused(store: Store, change: dict[str, Any]) -> None:
    ids = [store.save({"w": array("d", [number, 1])}) for number in range(2)]
    for saved in ids:  # in both, so that they are not reshaped only
        tree = json.loads((store.path(saved) / "state.json").read_bytes())
        tree["model"]["w"].update(change)
        replace_file(store.path(saved), "state.json", json.dumps(tree).encode())
    readers = [CheckpointReader(str(store.path(i)), read_manifest(str(store.path(i)))[0], True, 1) for i in ids]
    with pytest.raises(IntegrityError, match=f"{ids[0]}: a file cannot be decoded"):
        compare(*readers)


# Below the manager


def test_checkpoints_of_two_directories_are_compared(tmp_path: Path) -> None:
    stores = [Store(tmp_path / name) for name in ("one", "other")]
    readers = []
    for number, store in enumerate(stores):
        folder = str(store.path(store.save({"w": array("f", [number]), "n": number}, epoch=number)))
        readers.append(CheckpointReader(folder, read_manifest(folder)[0], True, 1))
    found = compare(*readers)
    assert (found.tensors["model.w"].max_abs, found.tensors["model.w"].relative) == (1, INF)
    assert set(found.values) == {"model.n"}
    assert set(found.progress) == {"epoch"}
    assert compare(readers[0], readers[0]).identical
    for store in stores:
        store.close()
