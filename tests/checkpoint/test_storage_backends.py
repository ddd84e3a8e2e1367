"""One conformance suite for every storage backend, and what belongs to single ones."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from array import array
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers_storage import (
    Store,
    documented_block,
    documented_class,
    exact,
    ml_dtypes,
    needs_ml_dtypes,
    needs_numpy,
    needs_torch,
    np,
    optional,
    raw_bytes,
    register_documented_backend,
    reopen_without_database,
    replace_file,
    torch,
    zstandard,
)

from model_checkpoint import EnhancedCheckpointManager, register_storage_backend
from model_checkpoint.checkpoint import storage
from model_checkpoint.checkpoint.storage import PlannedFile, StorageBackend
from model_checkpoint.errors import (
    ConfigurationError,
    IntegrityError,
    UnknownBackendError,
    UnsupportedValueError,
)

BACKENDS = ["safetensors", "pytorch", "raw"]
VARIANTS = [f"{backend}-{compression}" for backend in BACKENDS for compression in ("plain", "compressed")]

TORCH_DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]
NUMPY_DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def patterns(width: int) -> bytes:
    """Return elements of ``width`` bytes: every pattern of up to two bytes, else signs, NaNs and random ones."""
    if width == 1:
        return bytes(range(256))
    if width == 2:
        return array("H", range(65536)).tobytes()
    zeros = b"\0" * (width - 1)
    special = [zeros + b"\x80", b"\xff" * width, zeros + b"\0", b"\x01" + zeros[1:] + b"\xff"]  # -0.0, NaN, 0, ...
    special += [(0x7F800001).to_bytes(width, "little"), (0x7FF0000000000001).to_bytes(max(width, 8), "little")[:width]]
    return b"".join(special) + Random(7).randbytes(width * 64)


def torch_of(name: str) -> Any:
    dtype = getattr(torch, name)
    data = bytes([0, 1, 1]) if name == "bool" else patterns(dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


def numpy_of(name: str) -> Any:
    dtype = np.dtype(getattr(ml_dtypes, name) if name in ML_DTYPES else name)
    return np.frombuffer(bytes([0, 1, 1]) if name == "bool" else patterns(dtype.itemsize), dtype)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone with it; the document's backend stays."""
    register_documented_backend()
    monkeypatch.setattr(storage, "_BACKENDS", dict(storage._BACKENDS))


def open_store(folder: Path, backend: str, compressed: bool) -> Store:
    if backend == "pytorch" and torch is None:
        pytest.skip("torch is not installed")
    return Store(folder, backend, enable_compression=compressed)


@pytest.fixture(params=VARIANTS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each backend, with and without compression."""
    backend, compression = request.param.split("-")
    made = open_store(tmp_path, backend, compression == "compressed")
    yield made
    made.close()


@pytest.fixture(params=BACKENDS)
def uncompressed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each backend, for what comes before any byte is written."""
    made = open_store(tmp_path, request.param, False)
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Store]:
    """A store of the default backend."""
    made = Store(tmp_path)
    yield made
    made.close()


def same_memory(first: Any, second: Any) -> bool:
    if isinstance(first, memoryview):
        return first is second
    if torch is not None and isinstance(first, torch.Tensor):
        return bool(first.data_ptr() == second.data_ptr())
    return bool(first.ctypes.data == second.ctypes.data)


def data_size(store: Store, checkpoint_id: str) -> int:
    """Return the bytes of everything on disk that is no JSON."""
    return sum(path.stat().st_size for path in store.path(checkpoint_id).iterdir() if ".json" not in path.name)


class TestArraysRoundTripBitForBit:
    @needs_torch
    @pytest.mark.filterwarnings("ignore:ComplexHalf")
    def test_every_torch_dtype_keeps_every_bit_pattern(self, store: Store) -> None:
        state = {name: torch_of(name) for name in TORCH_DTYPES if hasattr(torch, name)}
        loaded = store.round_trip(state)
        assert len(state) >= 20
        for name, tensor in state.items():
            assert exact(loaded[name]) == exact(tensor), name

    @needs_numpy
    def test_every_numpy_dtype_keeps_every_bit_pattern(self, store: Store) -> None:
        state = {name: numpy_of(name) for name in NUMPY_DTYPES + (ML_DTYPES if ml_dtypes else [])}
        loaded = store.round_trip(state)
        for name, values in state.items():
            assert exact(loaded[name]) == exact(values), name

    @needs_ml_dtypes
    def test_numpy_dtypes_below_a_byte_round_trip_or_are_refused_when_saving(self, store: Store) -> None:
        for name in ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int4", "uint4"):
            values = np.array([0, 1, 1, 0], dtype=getattr(ml_dtypes, name))
            assert self.save_and_load_or_refuse(store, values) in (exact(values), "refused"), name

    def save_and_load_or_refuse(self, store: Store, values: Any) -> Any:
        try:
            checkpoint_id = store.save({"x": values})
        except UnsupportedValueError:
            return "refused"
        return exact(store.load(checkpoint_id)["model_state_dict"]["x"])

    @needs_torch
    def test_torch_layouts_keep_shape_and_values(self, store: Store) -> None:
        base = torch.arange(60.0).reshape(3, 4, 5)
        state = {
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0),
            "empty3": torch.empty(2, 0, 3, dtype=torch.int8),
            "strided": torch.arange(20.0)[::3],
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            "permuted": base.clone().permute(2, 0, 1),
            "expanded": torch.tensor([1.0, 2.0]).expand(4, 2),
            "expanded_scalar": torch.tensor(7).expand(3, 3),
            "channels_last": torch.rand(2, 3, 4, 4, generator=torch.manual_seed(1)).to(
                memory_format=torch.channels_last
            ),
            "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
            "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "needs_grad": torch.ones(2, requires_grad=True) * 2,
        }
        loaded = store.round_trip(state)
        for name, tensor in state.items():
            assert loaded[name].shape == tensor.shape, name
            assert loaded[name].dtype == tensor.dtype, name
            assert raw_bytes(loaded[name]) == raw_bytes(tensor), name

    @needs_numpy
    def test_numpy_layouts_keep_shape_and_values(self, store: Store) -> None:
        state = {
            "scalar": np.array(3.5),
            "empty": np.empty((0,)),
            "empty3": np.empty((2, 0, 3), dtype=np.int8),
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "reversed": np.arange(5, dtype=np.int16)[::-1],
            "strided": np.arange(20, dtype=np.uint32)[::3],
            "broadcast": np.broadcast_to(np.float32([1, 2]), (3, 2)),
            "readonly": np.frombuffer(b"abcd", np.uint8),
            "unaligned": np.frombuffer(b"xabcdefgh", np.uint8)[1:].view(np.float32),
        }
        loaded = store.round_trip(state)
        for name, values in state.items():
            assert exact(loaded[name]) == exact(values), name

    @needs_numpy
    def test_big_endian_arrays_keep_their_values(self, store: Store) -> None:
        values = np.array([1.5, -2.25, 1e300], dtype=">f8")
        loaded = store.round_trip({"x": values})["x"]
        assert loaded.tolist() == values.tolist()
        assert loaded.dtype == np.float64

    @needs_numpy
    def test_numpy_scalars_come_back_as_scalars_of_their_type(self, store: Store) -> None:
        state = [
            np.float64("nan"),
            np.float32(-0.0),
            np.int8(-5),
            np.bool_(True),
            np.complex64(1 - 2j),
            np.uint64(2**63),
        ]
        assert exact(store.round_trip(state)) == exact(state)

    def test_buffers_of_the_standard_library_come_back_as_what_they_were(self, store: Store) -> None:
        grid = memoryview(array("i", range(6))).cast("B").cast("i", (2, 3))
        state = {
            "bytes": b"\0\xff\n",
            "no_bytes": b"",
            "bytearray": bytearray(b"abc"),
            "view": memoryview(b"view"),
            "grid": grid,
            "every_other": memoryview(bytes(range(9)))[::2],
            "scalar_view": memoryview(b"abcd").cast("B").cast("i", ()),
            **{f"array_{code}": array(code, [0, 1, 100]) for code in "bBhHiIlLqQfd"},
            "empty_array": array("d"),
        }
        assert exact(store.round_trip(state)) == exact(state)

    @needs_torch
    def test_tensors_below_a_list_a_tuple_and_integer_keys_are_found_again(self, store: Store) -> None:
        state = {0: [torch.ones(1), (torch.zeros(2),)], "0": torch.full((1,), 2.0), (1, "x"): {"y": torch.ones(3)}}
        assert exact(store.round_trip(state)) == exact(state)


class TestPlainValues:
    def test_nested_values_come_back_equal_and_of_the_same_types(self, store: Store) -> None:
        state = {
            "none": None,
            "flags": [True, False, 1, 0],
            "integers": [2**63, -(2**64), 10**400, 2**3000, -1],
            "floats": [0.1, -0.0, float("nan"), float("inf"), float("-inf"), 5e-324],
            "complex": [1 - 2j, complex(float("nan"), -0.0), complex(float("inf"), 1)],
            "text": ["", "naïve ☃ \0 \n", "\ud800"],
            "tuple": (1, (2, [3, ()])),
            "sets": [{1, 2}, set(), frozenset({"a", (1, 2)}), {frozenset({1})}],
            "ordered": OrderedDict([("b", 1), ("a", OrderedDict())]),
            "keys": {1: "int", "1": "text", None: 0, 2.5: 0, (1, 2): 0, b"k": 0, frozenset({3}): 0},
            "dollar": {"$tuple": [1], "$array": "x", "$": {"$$": 2}},
            "buffer": b"so that the backend has an array to store",
        }
        assert exact(store.round_trip(state)) == exact(state)

    def test_subclasses_of_containers_come_back_as_their_base(self, store: Store) -> None:
        point = namedtuple("point", "x y")
        loaded = store.round_trip({"default": defaultdict(list, a=[1]), "point": point(1, 2)})
        assert exact(loaded) == exact({"default": {"a": [1]}, "point": (1, 2)})

    def test_an_empty_state_and_no_model_come_back(self, store: Store) -> None:
        assert store.round_trip({}) == {}
        assert store.round_trip(None) is None

    def test_parts_that_were_not_saved_load_as_none(self, store: Store) -> None:
        loaded = store.load(store.save({"w": b"1"}, {"lr": 1}, {"t": 2}, save_optimizer=False, save_scheduler=False))
        parts = ("optimizer_state_dict", "scheduler_state_dict", "extra_state")
        assert [loaded[part] for part in parts] == [None, None, None]

    @needs_torch
    def test_dtypes_devices_and_sizes_of_torch_come_back(self, store: Store) -> None:
        state = [torch.float8_e5m2, torch.bool, torch.device("cuda", 1), torch.device("meta"), torch.ones(1)]
        loaded = store.round_trip([*state, torch.Size([2, 3])])
        assert exact(loaded[:5]) == exact(state)
        assert loaded[5] == torch.Size([2, 3])

    @pytest.mark.parametrize(
        "keys",
        [
            ["__metadata__", "../../etc/passwd", "/etc/passwd", "ключ", "nul\0key", "", "$array", "$", "a/b", "\ud800"],
            ["a.b", "a.b#2", "a", "model", "#2", " ", "state.json", "-" * 5000],
        ],
    )
    def test_any_text_can_be_a_key_and_none_becomes_a_path(self, store: Store, keys: list[str]) -> None:
        state = {key: bytes([i]) for i, key in enumerate(keys)}
        checkpoint_id = store.save(state)
        assert exact(store.load(checkpoint_id)["model_state_dict"]) == exact(state)
        assert all(path.is_file() for path in store.path(checkpoint_id).iterdir())
        assert all(len(path.name) < 60 for path in store.path(checkpoint_id).iterdir())

    def test_keys_that_join_to_the_same_path_stay_apart(self, store: Store) -> None:
        state = {"a.b": b"1", "a": {"b": b"2", "": b"3"}, "a.": b"4", 1: b"5", "1": b"6", "a.b#2": b"7", "": {"": b"8"}}
        assert exact(store.round_trip(state)) == exact(state)


@needs_torch
class TestTorchObjects:
    def test_a_module_loads_back_strictly_with_its_metadata(self, store: Store) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        loaded = store.round_trip(model)
        assert exact(loaded) == exact(model.state_dict())
        assert loaded._metadata["1"]["version"] == 2
        fresh = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        fresh.load_state_dict(loaded, strict=True)
        assert exact(fresh.state_dict()) == exact(model.state_dict())

    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    def test_training_goes_on_bit_for_bit_where_it_was(self, store: Store, kind: str) -> None:
        def parts() -> tuple[Any, Any, Any]:
            torch.manual_seed(3)
            model = torch.nn.Linear(4, 2)
            options = {"momentum": 0.9, "nesterov": True} if kind == "SGD" else {"amsgrad": True}
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
            return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 10)

        def step(model: Any, optimizer: Any, scheduler: Any) -> None:
            optimizer.zero_grad()
            model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
            optimizer.step()
            scheduler.step()

        trained, resumed = parts(), parts()
        step(*trained)
        loaded = store.load(store.save(*trained))
        for part, name in zip(resumed, ("model", "optimizer", "scheduler")):
            part.load_state_dict(loaded[f"{name}_state_dict"])
        step(*trained)
        step(*resumed)
        for one, other in zip(trained, resumed):
            assert exact(one.state_dict()) == exact(other.state_dict())

    def test_objects_with_state_dict_may_be_anywhere(self, store: Store) -> None:
        generator, critic = torch.nn.Linear(1, 2), torch.nn.Linear(2, 1)
        loaded = store.round_trip({"nets": [generator, (critic,)], "name": "gan"})
        assert exact(loaded["nets"][0]) == exact(generator.state_dict())
        assert exact(loaded["nets"][1][0]) == exact(critic.state_dict())

    def test_the_random_states_load_back_as_extra_state(self, store: Store) -> None:
        state = {"torch": torch.get_rng_state(), "python": Random(5).getstate()}
        loaded = store.load(store.save({}, extra_state=state))["extra_state"]
        assert exact(loaded) == exact(state)
        torch.set_rng_state(loaded["torch"])
        Random().setstate(loaded["python"])

    def test_the_device_argument_places_tensors(self, store: Store) -> None:
        loaded = store.round_trip({"w": torch.ones(3)}, device="meta")
        assert loaded["w"].device.type == "meta"

    def test_a_device_that_does_not_exist_never_marks_the_checkpoint_corrupt(self, store: Store) -> None:
        checkpoint_id = store.save({"w": torch.ones(3)})
        for device in ("nonsense", [1]):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
                store.load(checkpoint_id, device=device)
            assert not isinstance(caught.value, IntegrityError)
        assert store.row(checkpoint_id)["status"] == "committed"


class TestSharedMemory:
    @needs_torch
    def test_tied_tensors_are_stored_once_and_come_back_tied(self, store: Store) -> None:
        weight = torch.rand(64, 64, generator=torch.manual_seed(1))
        once = store.save({"embed": weight})
        tied = store.save({"embed": weight, "head": weight, "again": weight.view(64, 64)})
        assert data_size(store, tied) < data_size(store, once) + 2000  # names only; the tensor has 16,384 bytes
        loaded = store.load(tied)["model_state_dict"]
        loaded["embed"][0, 0] = 42
        assert loaded["head"][0, 0] == 42
        assert loaded["again"][0, 0] == 42

    @needs_torch
    def test_a_tied_module_comes_back_tied(self, store: Store) -> None:
        class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.embed = torch.nn.Embedding(5, 3)
                self.head = torch.nn.Linear(3, 5, bias=False)
                self.head.weight = self.embed.weight

        loaded = store.round_trip(Tied())
        assert same_memory(loaded["embed.weight"], loaded["head.weight"])

    @needs_torch
    def test_ties_reach_across_model_optimizer_and_extra_state(self, store: Store) -> None:
        shared = torch.rand(100)
        loaded = store.load(store.save({"w": shared}, {"master": shared}, extra_state={"average": [shared[10:]]}))
        loaded["model_state_dict"]["w"][10] = 42
        assert loaded["optimizer_state_dict"]["master"][10] == 42
        assert loaded["extra_state"]["average"][0][0] == 42

    @needs_torch
    @pytest.mark.parametrize("part", ["model", "extra"])
    def test_a_tie_into_the_optimizer_loads_without_the_optimizer(self, store: Store, part: str) -> None:
        shared = torch.arange(5.0)
        parts = (
            {"model": {"w": shared}, "extra_state": None} if part == "model" else {"model": {}, "extra_state": shared}
        )
        loaded = store.load(store.save(**parts, optimizer={"w": shared}), load_optimizer=False)
        found = loaded["model_state_dict"]["w"] if part == "model" else loaded["extra_state"]
        assert found.tolist() == [0, 1, 2, 3, 4]
        assert loaded["optimizer_state_dict"] is None

    @needs_torch
    def test_overlapping_views_of_torch_share_memory_again(self, store: Store) -> None:
        base = torch.arange(24.0).reshape(4, 6)
        state = {
            "base": base,
            "row": base[1],
            "column": base[:, 2],
            "t": base.T,
            "cut": base[1:3, ::2],
            "e": base[0, :1].expand(3),
        }
        before = exact(copy.deepcopy(state))
        checkpoint_id = store.save(state)
        loaded = store.load(checkpoint_id)["model_state_dict"]
        assert exact(loaded) == before
        loaded["base"][1, 2] = 42
        assert [loaded["row"][2], loaded["column"][1], loaded["t"][2, 1], loaded["cut"][0, 1]] == [42] * 4

    @needs_numpy
    def test_overlapping_views_of_numpy_share_memory_again(self, store: Store) -> None:
        base = np.arange(24.0).reshape(4, 6)
        state = {"base": base, "row": base[1], "t": base.T, "cut": base[1:3, ::2], "tied": base, "flip": base[::-1]}
        loaded = store.round_trip(state)
        assert exact(loaded) == exact(state)
        loaded["base"][1, 2] = 42
        assert [loaded["row"][2], loaded["t"][2, 1], loaded["cut"][0, 1], loaded["tied"][1, 2]] == [42] * 4

    def test_one_buffer_in_two_places_comes_back_as_one(self, store: Store) -> None:
        buffer, numbers = bytearray(b"abc"), array("i", [1, 2])
        loaded = store.round_trip({"a": buffer, "b": [buffer], "c": numbers, "d": numbers, "other": bytearray(b"abc")})
        loaded["a"][0] = 0
        loaded["c"][0] = 9
        assert (loaded["b"][0][0], loaded["d"][0], loaded["other"]) == (0, 9, bytearray(b"abc"))

    @needs_torch
    def test_equal_tensors_in_memory_of_their_own_stay_apart(self, store: Store) -> None:
        loaded = store.round_trip({"a": torch.zeros(3), "b": torch.zeros(3)})
        loaded["a"][0] = 1
        assert loaded["b"].tolist() == [0, 0, 0]

    @needs_torch
    def test_views_of_one_memory_as_two_dtypes_keep_their_values(self, store: Store) -> None:
        numbers = torch.tensor([1.5, -2.5])
        state = {"float": numbers, "int": numbers.view(torch.int32), "bytes": numbers.view(torch.uint8)[1:6]}
        assert exact(store.round_trip(state)) == exact(state)

    @needs_torch
    def test_lazy_conjugates_and_negatives_keep_their_own_values(self, store: Store) -> None:
        z = torch.tensor([1 + 2j, 3 - 4j])
        state = {"z": z, "conj": z.conj(), "real": z.real, "imag": z.imag, "negative": z.conj().imag}
        loaded = store.round_trip(state)
        for name, tensor in state.items():
            assert raw_bytes(loaded[name]) == raw_bytes(tensor), name

    @needs_torch
    @needs_numpy
    def test_torch_and_numpy_over_one_memory_keep_their_types(self, store: Store) -> None:
        values = np.arange(5, dtype=np.float32)
        state = {"numpy": values, "torch": torch.from_numpy(values), "view": torch.from_numpy(values)[1:]}
        assert exact(store.round_trip(state)) == exact(state)

    @needs_numpy
    def test_strides_that_are_no_whole_elements_keep_their_values(self, store: Store) -> None:
        table = np.zeros(6, dtype=[("a", "f4"), ("b", "f8")])
        table["a"], table["b"] = range(6), range(10, 16)
        for state in ({"b": table["b"], "some": table["b"][::2]}, {"a": table["a"], "b": table["b"]}):
            assert exact(store.round_trip(state)) == exact(state)

    @needs_torch
    def test_slices_side_by_side_do_not_drag_in_the_whole_allocation(self, store: Store) -> None:
        pool = torch.rand(100_000, generator=torch.manual_seed(1))
        checkpoint_id = store.save({"first": pool[:10], "second": pool[10:20], "far": pool[90_000:90_010]})
        assert data_size(store, checkpoint_id) < 10_000
        assert exact(store.load(checkpoint_id)["model_state_dict"]["far"]) == exact(pool[90_000:90_010])

    @needs_torch
    def test_columns_of_a_large_matrix_do_not_drag_in_the_matrix(self, store: Store) -> None:
        matrix = torch.rand(300, 300, generator=torch.manual_seed(1))  # 360,000 bytes, a column 1,200
        state = {"first": matrix[:, 0], "second": matrix[:, 1]}
        checkpoint_id = store.save(state)
        assert data_size(store, checkpoint_id) < 20_000
        assert exact(store.load(checkpoint_id)["model_state_dict"]) == exact(state)


VIEWS_OF_FRESH_MEMORY = """
import gc, os, sys
from array import array
from helpers_storage import Path, Store, np, register_documented_backend, torch
from model_checkpoint.hooks import HookEvent

class Fresh:
    def state_dict(self):
        state = {"array": array("d", [7.0]) * 50_000}
        if torch is not None:
            tensor = torch.full((50_000,), 7.0)
            state.update(torch=tensor, torch_part=tensor[10:])
        if np is not None:
            values = np.full(50_000, 7.0)
            state.update(numpy=values, numpy_part=values[10:])
        return state

def reuse_memory(context):
    gc.collect()
    reuse_memory.kept = [bytearray(b"x" * size) for size in (200_000, 400_000) * 8]

register_documented_backend()
for backend in ("safetensors", "raw") + (("pytorch",) if torch is not None else ()):
    store = Store(Path(sys.argv[1]) / backend, backend)
    store.manager.register_hook("reuse", reuse_memory, [HookEvent.BEFORE_CHECKPOINT_SAVE])
    loaded = store.round_trip(Fresh())
    print(backend, *sorted(name for name, values in loaded.items() if set(values.tolist()) != {7.0}))
"""


@pytest.mark.slow
def test_arrays_that_only_the_state_holds_are_kept_until_they_are_written(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    arguments = [sys.executable, "-c", VIEWS_OF_FRESH_MEMORY, str(tmp_path)]  # a crash there is a failure here
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)
    backends = ["safetensors", "raw"] + (["pytorch"] if torch is not None else [])
    assert (done.returncode, done.stdout.split("\n")) == (0, [*backends, ""]), done.stderr


class TestOwnership:
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"buffer": bytearray(b"12345678"), "view": memoryview(b"12345678")}
        if np is not None:
            state["numpy"] = np.arange(500.0)
        if torch is not None:
            state["torch"] = torch.arange(500.0)
        return state

    @pytest.mark.parametrize("verify", [True, False])
    def test_loaded_arrays_outlive_the_checkpoint(self, store: Store, verify: bool) -> None:
        state = self.state()
        checkpoint_id = store.save(state)
        folder = store.path(checkpoint_id)
        loaded = store.load(checkpoint_id, verify_integrity=verify)["model_state_dict"]
        store.manager.delete_checkpoint(checkpoint_id)
        store.manager.empty_trash()
        assert not folder.exists()
        assert exact(loaded) == exact(state)

    @pytest.mark.parametrize("verify", [True, False])
    def test_writing_to_loaded_arrays_changes_neither_file_nor_later_loads(self, store: Store, verify: bool) -> None:
        state = self.state()
        checkpoint_id = store.save(state)
        files = {path: path.read_bytes() for path in store.path(checkpoint_id).iterdir()}
        loaded = store.load(checkpoint_id, verify_integrity=verify)["model_state_dict"]
        for values in loaded.values():
            values[0] = 7
        assert {path: path.read_bytes() for path in files} == files
        assert exact(store.load(checkpoint_id, verify_integrity=verify)["model_state_dict"]) == exact(state)

    def test_saving_takes_the_values_of_that_moment_and_changes_nothing(self, store: Store) -> None:
        state = self.state()
        before = exact(state)
        checkpoint_id = store.save(state)
        assert exact(state) == before
        for name in ("buffer", "numpy", "torch"):
            if name in state:
                state[name][0] = 0
        assert exact(store.load(checkpoint_id)["model_state_dict"]) == before


def build_cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append({"inner": cycle})
    return cycle


def nest(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "dict": lambda v: {"a": v},
    "intdict": lambda v: {1: v},
    "ordered": lambda v: OrderedDict(a=v),
}


DEEPEST = 99  # the list around it is one more level


class TestRefusals:
    def refused(self, store: Store, model: object, **more: object) -> UnsupportedValueError:
        with pytest.raises(UnsupportedValueError) as caught:
            store.save(model, **more)
        assert store.files() == []
        assert store.manager.list_checkpoints() == []
        return caught.value

    @pytest.mark.parametrize(
        "value",
        [len, lambda: None, object(), (1).__class__, range(3), Ellipsis, Path("x"), iter(())],
        ids=lambda value: type(value).__name__,
    )
    def test_a_value_without_a_safe_form_is_named_and_leaves_nothing_behind(self, plain: Store, value: object) -> None:
        error = self.refused(plain, {"layers": [b"array", {"fn": value}], "after": 1})
        assert error.path == "model.layers[1].fn"
        assert error.value_type is type(value)
        assert str(error).startswith(f"model.layers[1].fn: cannot store a {type(value).__module__}.")
        assert "state_dict()" in str(error)

    def test_the_path_names_the_part_that_was_passed(self, uncompressed: Store) -> None:
        assert self.refused(uncompressed, {}, optimizer={"a b": {3: len}}).path == "optimizer.a b[3]"
        assert self.refused(uncompressed, {}, extra_state=len).path == "extra"
        assert self.refused(uncompressed, {}, scheduler=({1, len},)).path.startswith("scheduler[0]")

    @needs_torch
    @pytest.mark.filterwarnings("ignore:Sparse CSR")
    def test_tensors_without_plain_memory_are_refused_by_path(self, uncompressed: Store) -> None:
        values = {
            "sparse": torch.eye(2).to_sparse(),
            "csr": torch.eye(2).to_sparse_csr(),
            "meta": torch.empty(2, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        }
        for name, value in values.items():
            assert self.refused(uncompressed, {"ok": torch.ones(1), name: value}).path == f"model.{name}"

    @needs_numpy
    def test_numpy_arrays_without_a_portable_form_are_refused_by_path(self, uncompressed: Store) -> None:
        values = [
            np.array([object()]),
            np.array(["text"]),
            np.zeros(2, dtype=[("a", "f4")]),
            np.ma.masked_array([1], [True]),
            np.array(["2020"], "M8[D]"),
            np.str_("x"),
        ]
        for value in values:
            assert self.refused(uncompressed, [value]).path == "model[0]"

    def test_a_state_that_contains_itself_is_refused(self, uncompressed: Store) -> None:
        error = self.refused(uncompressed, {"a": build_cycle()})
        assert error.path == "model.a[0].inner"
        assert "contains itself" in str(error)

    def test_an_object_that_is_its_own_state_is_refused(self, uncompressed: Store) -> None:
        class Endless:
            def state_dict(self) -> Endless:
                return self

        assert self.refused(uncompressed, {"a": Endless()}).path.startswith("model")

    def test_the_same_list_twice_is_no_cycle(self, uncompressed: Store) -> None:
        shared = [1, 2]
        assert uncompressed.round_trip({"a": shared, "b": [shared, shared]}) == {"a": [1, 2], "b": [[1, 2], [1, 2]]}

    def test_a_state_nested_to_the_limit_loads_and_one_beyond_is_refused(self, uncompressed: Store) -> None:
        for name, wrap in WRAPS.items():
            state = [b"array", nest(DEEPEST, wrap)]
            assert exact(uncompressed.round_trip(state)) == exact(state), name
            with pytest.raises(UnsupportedValueError, match="nested more than 100 levels deep"):
                uncompressed.save([b"array", nest(DEEPEST + 1, wrap)])

    def test_nested_frozensets_load_or_are_refused(self, uncompressed: Store) -> None:
        for depth in (50, 90, 400):
            state = [b"array", nest(depth, lambda v: frozenset([v]))]
            assert self.loads_or_is_refused(uncompressed, state)

    def loads_or_is_refused(self, store: Store, state: object) -> bool:
        try:
            checkpoint_id = store.save(state)
        except UnsupportedValueError:
            return True
        return bool(store.load(checkpoint_id)["model_state_dict"] == state)

    @pytest.mark.parametrize("wrap", [WRAPS["list"], WRAPS["ordered"]], ids=["list", "ordered"])
    def test_a_state_100_000_deep_is_refused(self, plain: Store, wrap: Callable[[Any], Any]) -> None:
        error = self.refused(plain, nest(100_000, wrap))
        assert "nested" in str(error)
        assert len(str(error)) < 1000

    @needs_torch
    def test_a_class_in_place_of_its_object_is_refused_by_path(self, uncompressed: Store) -> None:
        assert self.refused(uncompressed, {"net": torch.nn.Linear}).path == "model.net"

    def test_a_save_that_was_refused_does_not_disturb_the_next(self, uncompressed: Store) -> None:
        self.refused(uncompressed, {"fn": len})
        assert uncompressed.round_trip({"w": b"1"}) == {"w": b"1"}


HOSTILE_NODES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a stride beyond the memory": lambda tree: tree["c"].update(strides=[2**36]),
    "one element too far": lambda tree: tree["c"].update(offset=2),
    "a stride backwards": lambda tree: tree["c"].update(strides=[-1]),
    "an offset before the memory": lambda tree: tree["c"].update(offset=-1),
    "more elements than there are": lambda tree: tree["c"].update(shape=[64], strides=[1]),
    "a shape that is negative": lambda tree: tree["c"].update(shape=[-3]),
    "a shape of another rank": lambda tree: tree["c"].update(shape=[1, 3]),
    "a stride that is a fraction": lambda tree: tree["c"].update(strides=[1.5]),
    "a base that is negative": lambda tree: tree["c"]["base"].update(shape=[-2, -3]),
    "a base that is a view": lambda tree: tree["c"].update(base=dict(tree["a"])),
    "a base that another node has made": lambda tree: tree.update(
        {"0": {**tree["c"]["base"]}, "c": {**tree["c"], "base": {**tree["c"]["base"], "shape": [99]}, "offset": 50}}
    ),
    "a stride beyond 64 bits": lambda tree: tree["c"].update(strides=[2**70]),
    "more bytes than 63 bits count": lambda tree: tree["c"].update(shape=[2**62, 4], strides=[0, 0]),
    "an array that is negative": lambda tree: tree.update(c={**tree["c"]["base"], "shape": [6, 1, -1, -1]}),
    "a function of torch": lambda tree: tree.update(c={"$torch": "torch.load", "type": "dtype"}),
    "no device of torch": lambda tree: tree.update(c={"$torch": "nowhere", "type": "device"}),
}


class TestDamagedContent:
    @pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04" + bytes(60)])
    def test_nonsense_with_the_right_digest_is_an_integrity_error(
        self, store: Store, tmp_path: Path, content: bytes
    ) -> None:
        checkpoint_id = store.save({"w": b"0123456789"})
        folder = store.path(checkpoint_id)
        (name,) = [path.name for path in folder.iterdir() if ".json" not in path.name]
        store.close()
        replace_file(folder, name, content)
        with reopen_without_database(tmp_path) as manager, pytest.raises(IntegrityError):
            manager.load_checkpoint(checkpoint_id)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'{"model": {"$unknown": 1}}', b"[" * 100_000])
    def test_a_tree_that_is_none_is_an_integrity_error(self, plain: Store, tmp_path: Path, content: bytes) -> None:
        checkpoint_id = plain.save({"w": b"0123456789"})
        folder = plain.path(checkpoint_id)
        plain.close()
        replace_file(folder, "state.json", content)
        with reopen_without_database(tmp_path) as manager, pytest.raises(IntegrityError):
            manager.load_checkpoint(checkpoint_id)

    @pytest.mark.parametrize(
        "kind", [pytest.param("torch", marks=needs_torch), pytest.param("numpy", marks=needs_numpy)]
    )
    @pytest.mark.parametrize("harm", HOSTILE_NODES)
    def test_a_sealed_tree_that_reaches_beyond_its_arrays_is_an_integrity_error(
        self, tmp_path: Path, kind: str, harm: str
    ) -> None:
        plain = Store(tmp_path, "safetensors")
        whole = torch.arange(6.0) if kind == "torch" else np.arange(6.0, dtype=np.float32)
        checkpoint_id = plain.save({"a": whole[:4], "b": whole[2:], "c": whole.reshape(3, 2)[:, 0]})
        folder = plain.path(checkpoint_id)
        assert plain.load(checkpoint_id)["model_state_dict"]["c"].tolist() == [0.0, 2.0, 4.0]
        plain.close()
        tree = json.loads((folder / "state.json").read_bytes())
        assert "$view" in tree["model"]["c"]
        HOSTILE_NODES[harm](tree["model"])
        replace_file(folder, "state.json", json.dumps(tree).encode())
        with reopen_without_database(tmp_path) as manager, pytest.raises(IntegrityError):
            manager.load_checkpoint(checkpoint_id)


class TestSingleParts:
    @pytest.fixture(params=["safetensors", "raw"])
    def parted(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
        """A store of a backend with one file for each part."""
        made = Store(tmp_path, request.param)
        yield made
        made.close()

    @pytest.mark.parametrize("harm", ["delete", "change"])
    def test_parts_that_are_left_out_are_not_read(self, parted: Store, harm: str) -> None:
        checkpoint_id = parted.save({"w": b"1"}, {"m": b"2"}, {"s": b"3"})
        for name in ("optimizer", "scheduler"):
            (path,) = parted.path(checkpoint_id).glob(f"{name}.*")
            if harm == "delete":
                path.unlink()
            else:
                path.write_bytes(bytes(path.stat().st_size))
        loaded = parted.load(checkpoint_id, load_optimizer=False, load_scheduler=False)
        assert loaded["model_state_dict"] == {"w": b"1"}
        with pytest.raises(IntegrityError, match="optimizer"):
            parted.load(checkpoint_id, load_scheduler=False)


class TestSharding:
    def shards(self, store: Store, state: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        checkpoint_id = store.save(state)
        assert exact(store.load(checkpoint_id)["model_state_dict"]) == exact(state)
        folder = store.path(checkpoint_id)
        return folder, json.loads((folder / "model.safetensors.index.json").read_bytes())

    def test_shards_are_named_and_indexed_the_hugging_face_way(self, tmp_path: Path) -> None:
        store = Store(tmp_path, max_shard_size=250)
        state = {f"layer.{i}": array("d", [i] * 10) for i in range(8)}  # 80 bytes each: three to a shard
        folder, index = self.shards(store, state)
        names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith("model-")) == names
        assert index["metadata"]["total_size"] == 640
        assert set(index["weight_map"]) == set(state)
        safetensors = optional("safetensors.numpy")
        if safetensors is not None and np is not None:
            for key, name in index["weight_map"].items():
                found = safetensors.numpy.load_file(folder / name)[key]
                assert found.tolist() == state[key].tolist()
        store.close()

    def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(self, tmp_path: Path) -> None:
        store = Store(tmp_path, max_shard_size=10)
        folder, index = self.shards(store, {"small": b"123", "large": bytes(50), "last": b"4"})
        assert index["weight_map"] == {
            "small": "model-00001-of-00003.safetensors",
            "large": "model-00002-of-00003.safetensors",
            "last": "model-00003-of-00003.safetensors",
        }
        assert not (folder / "model.safetensors").exists()
        store.close()

    def test_compressed_shards_load(self, tmp_path: Path) -> None:
        store = Store(tmp_path, max_shard_size=10, enable_compression=True)
        state = {"a": bytes(20), "b": bytes(30)}
        assert exact(store.round_trip(state)) == exact(state)
        store.close()

    @needs_torch
    def test_tied_tensors_in_shards_are_stored_once(self, tmp_path: Path) -> None:
        store = Store(tmp_path, max_shard_size=1000)
        weight, other = torch.ones(200), torch.zeros(200)
        checkpoint_id = store.save({"a": weight, "b": other, "c": weight})
        index = json.loads((store.path(checkpoint_id) / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == 1600
        loaded = store.load(checkpoint_id)["model_state_dict"]
        assert same_memory(loaded["a"], loaded["c"])
        store.close()


@needs_torch
class TestPyTorchFile:
    def test_torch_load_reads_the_file_with_weights_only(self, tmp_path: Path) -> None:
        store = Store(tmp_path, "pytorch")
        model = torch.nn.Linear(2, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint_id = store.save(model, optimizer, extra_state={"rng": torch.get_rng_state(), "best": 0.5})
        found = torch.load(store.path(checkpoint_id) / "checkpoint.pt", weights_only=True)
        assert exact(found["model_state_dict"]) == exact(model.state_dict())
        assert exact(found["optimizer_state_dict"]) == exact(optimizer.state_dict())
        assert found["extra_state_dict"]["best"] == 0.5
        torch.nn.Linear(2, 3).load_state_dict(found["model_state_dict"])
        store.close()

    @pytest.mark.parametrize(
        "value",
        [
            {1, 2},
            frozenset({1}),
            {frozenset({1}): 1},
            {frozenset({1}), (frozenset({2}),)},
            2**3000,
            -(2**2040),
            {2**3000: 1},
            1 - 2j,
            b"x",
            bytearray(b"x"),
            array("d", [1]),
            memoryview(b"x"),
            OrderedDict(a=1),
            {None: 1, (1, 2): 3},
            "\ud800",
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_every_value_that_is_saved_stays_readable_with_weights_only(self, tmp_path: Path, value: object) -> None:
        store = Store(tmp_path, "pytorch")
        checkpoint_id = store.save({"value": value, "w": torch.ones(1)})
        found = torch.load(store.path(checkpoint_id) / "checkpoint.pt", weights_only=True)
        assert found["model_state_dict"]["w"].tolist() == [1]
        assert exact(store.load(checkpoint_id)["model_state_dict"]["value"]) == exact(value)
        store.close()

    def test_tied_tensors_are_tied_for_torch_load_too(self, tmp_path: Path) -> None:
        store = Store(tmp_path, "pytorch")
        weight = torch.ones(4)
        checkpoint_id = store.save({"a": weight, "b": weight, "c": weight[1:]})
        found = torch.load(store.path(checkpoint_id) / "checkpoint.pt", weights_only=True)["model_state_dict"]
        found["a"][1] = 5
        assert (found["b"][1], found["c"][0]) == (5, 5)
        store.close()


class TestFaultyBackend:
    def test_a_backend_that_fails_half_way_leaves_nothing_behind(self, tmp_path: Path) -> None:
        raw = register_documented_backend()["RawBackend"]

        class Faulty(raw):  # type: ignore[misc, valid-type]
            name = "faulty"
            broken = True

            def plan(self, state: Any, max_shard_size: int) -> Any:
                planned = super().plan(state, max_shard_size)
                return [*planned, PlannedFile("late.raw", None, None, self.fail)]

            def fail(self, sink: Any) -> None:
                sink.write(b"half of it")
                if type(self).broken:
                    raise RuntimeError("the format's own trouble")

        register_storage_backend("faulty", Faulty)
        store = Store(tmp_path, "faulty")
        with pytest.raises(RuntimeError, match="own trouble"):
            store.save({"w": b"1"})
        assert store.files() in ([], [store.tracker.experiment_id])
        assert store.manager.list_checkpoints() == []
        Faulty.broken = False
        checkpoint_id = store.save({"w": b"1"})
        assert (store.path(checkpoint_id) / "late.raw").read_bytes() == b"half of it"
        store.close()


class TestRegistry:
    def test_the_documented_backend_is_complete_and_short(self) -> None:
        assert len(documented_block().splitlines()) < 60
        assert issubclass(register_documented_backend()["RawBackend"], StorageBackend)

    def test_an_unknown_backend_is_refused_with_those_that_are_known(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownBackendError, match=r"'zipp'.*pytorch, raw, safetensors") as caught:
            Store(tmp_path, "zipp")
        assert caught.value.name == "zipp"
        assert "register_storage_backend" in str(caught.value)

    def test_a_backend_that_lacks_a_method_is_refused_when_registered(self) -> None:
        class Half(StorageBackend):
            name = "half"

            def plan(self, state: object, max_shard_size: int) -> list[Any]:  # type: ignore[override]
                return []

        with pytest.raises(ConfigurationError, match=r"half.*Half lacks read"):
            register_storage_backend("half", Half)

    def test_what_is_no_backend_is_refused_when_registered(self) -> None:
        with pytest.raises(ConfigurationError, match="must be a subclass of StorageBackend"):
            register_storage_backend("dict", dict)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="'module:Class'"):
            register_storage_backend("text", "no colon")

    def test_a_backend_under_a_name_that_is_not_its_own_is_refused(self) -> None:
        class Nameless(StorageBackend):
            def plan(self, state: object, max_shard_size: int) -> list[Any]:  # type: ignore[override]
                return []

            def read(self, files: object) -> dict[str, Any]:  # type: ignore[override]
                return {}

        class Other(Nameless):
            name = "other"

        for backend in (Nameless, Other):
            with pytest.raises(ConfigurationError, match="name"):
                register_storage_backend("mine", backend)

    def test_a_taken_name_is_refused_and_the_same_again_is_not(self) -> None:
        raw = register_documented_backend()["RawBackend"]
        register_storage_backend("raw", raw)
        with pytest.raises(ConfigurationError, match="registered already"):
            register_storage_backend("raw", type("Raw", (raw,), {}))
        with pytest.raises(ConfigurationError, match="registered already"):
            register_storage_backend("safetensors", raw)

    @pytest.mark.parametrize("target", ["json:nothing", "no_such_module_at_all:X", "json:loads"])
    def test_a_lazy_target_that_is_not_there_is_refused_on_use(self, tmp_path: Path, target: str) -> None:
        name = target.replace(":", "_")
        register_storage_backend(name, target)
        with pytest.raises(ConfigurationError, match=name):
            Store(tmp_path, name)

    def test_a_lazy_target_is_imported_on_use(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lazy_backend_module.py").write_text(documented_class("lazy"))
        monkeypatch.syspath_prepend(tmp_path)
        register_storage_backend("lazy", "lazy_backend_module:RawBackend")
        assert "lazy_backend_module" not in sys.modules
        store = Store(tmp_path, "lazy")
        assert store.round_trip({"w": b"1"}) == {"w": b"1"}
        store.close()

    def test_loading_without_the_backend_says_so_and_leaves_the_checkpoint_committed(self, tmp_path: Path) -> None:
        store = Store(tmp_path, "raw")
        checkpoint_id = store.save({"w": b"1"})
        program = """
import sys
from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import UnknownBackendError
with EnhancedCheckpointManager(None, sys.argv[1], database_url=sys.argv[2]) as manager:
    try:
        manager.load_checkpoint(sys.argv[3])
    except UnknownBackendError as error:
        print(error.name, manager.list_checkpoints()[0]["status"])
"""
        arguments = [sys.executable, "-c", program, str(store.folder), store.url, checkpoint_id]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
        assert done.stdout == "raw committed\n", done.stderr
        store.close()

    def test_an_installed_package_brings_its_backend_by_entry_point(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "packaged_backend.py").write_text(documented_class("packaged"))
        info = tmp_path / "packaged_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged-backend\nVersion: 1.0\n")
        group = "[model_checkpoint.storage_backends]\npackaged = packaged_backend:RawBackend\n"
        (info / "entry_points.txt").write_text(group)
        with pytest.raises(UnknownBackendError):
            EnhancedCheckpointManager(
                None, str(tmp_path / "no"), "packaged", database_url=f"sqlite:///{tmp_path}/no.db"
            )
        monkeypatch.syspath_prepend(tmp_path)
        store = Store(tmp_path, "packaged")
        checkpoint_id = store.save({"w": b"1"})
        assert store.load(checkpoint_id)["model_state_dict"] == {"w": b"1"}
        assert store.row(checkpoint_id)["backend"] == "packaged"
        with pytest.raises(UnknownBackendError, match="packaged"):
            Store(tmp_path, "missing")
        store.close()


def test_compression_makes_files_that_the_common_tools_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    if zstandard is not None:
        store = Store(tmp_path / "zstd", enable_compression=True)
        path = store.path(store.save({"w": bytes(10_000)})) / "model.safetensors.zst"
        assert path.stat().st_size < 1000
        assert zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).endswith(bytes(10_000))
        store.close()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    store = Store(tmp_path / "gzip", enable_compression=True)
    path = store.path(store.save({"w": bytes(10_000)})) / "model.safetensors.gz"
    assert path.stat().st_size < 1000
    assert gzip.decompress(path.read_bytes()).endswith(bytes(10_000))
    store.close()
