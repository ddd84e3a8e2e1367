"""Adapters of array libraries: what they promise of memory, identity and errors, and loading without the library."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from array import array
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import (
    Store,
    exact,
    ml_dtypes,
    needs_ml_dtypes,
    needs_numpy,
    needs_torch,
    needs_zstandard,
    np,
    raw_bytes,
    torch,
)

from model_checkpoint.arrays import CODES, DTYPES, HostArray, Layout, adapter_for, from_host, view
from model_checkpoint.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def host(value: Any) -> HostArray:
    """Return ``value`` as its adapter sees it."""
    adapter = adapter_for(type(value))
    assert adapter is not None
    made = adapter.to_host(value)
    assert made is not None
    return made


# A writable array of four elements, 1 to 4, of each kind, and how to make its first element 9.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "bytearray": (lambda: bytearray([1, 2, 3, 4]), lambda a: a.__setitem__(0, 9)),
    "array.array": (lambda: array("h", [1, 2, 3, 4]), lambda a: a.__setitem__(0, 9)),
    "memoryview": (lambda: memoryview(array("d", [1, 2, 3, 4])), lambda a: a.__setitem__(0, 9)),
}
if np is not None:
    KINDS["numpy"] = (lambda: np.arange(1, 5, dtype=np.int32), lambda a: a.__setitem__(0, 9))
if torch is not None:
    KINDS["torch"] = (lambda: torch.arange(1.0, 5.0), lambda a: a.__setitem__(0, 9))
    KINDS["torch-parameter"] = (lambda: torch.nn.Parameter(torch.arange(1.0, 5.0)), lambda a: a.data.__setitem__(0, 9))


class TestEveryAdapter:
    @pytest.fixture(params=KINDS)
    def kind(self, request: pytest.FixtureRequest) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        return KINDS[request.param]

    def test_taking_an_array_copies_nothing(self, kind: Any) -> None:
        make, set_first = kind
        value = make()
        taken = host(value)
        before = bytes(taken.data)
        set_first(value)
        assert bytes(taken.data) != before
        assert bytes(taken.data)[len(before) // 4 :] == before[len(before) // 4 :]

    def test_the_data_are_flat_bytes_of_the_size_that_dtype_and_shape_ask_for(self, kind: Any) -> None:
        taken = host(kind[0]())
        assert (taken.data.format, taken.data.ndim, taken.data.c_contiguous) == ("B", 1, True)
        assert taken.shape == (4,)
        assert taken.data.nbytes == prod(taken.shape) * DTYPES[taken.dtype].bits // 8

    def test_the_data_keep_the_memory_alive(self, kind: Any) -> None:
        value = kind[0]()
        expected = raw_bytes(value) if not isinstance(value, bytearray) else bytes(value)
        data = host(value).data
        del value
        gc.collect()
        assert bytes(data) == expected

    def test_identity_is_equal_for_the_same_array_and_not_for_an_equal_one(self, kind: Any) -> None:
        value, other = kind[0](), kind[0]()
        assert host(value).identity == host(value).identity
        assert host(value).identity is not None
        assert host(value).identity != host(other).identity

    def test_there_and_back_is_the_same_array(self, kind: Any) -> None:
        value = kind[0]()
        back = from_host(host(value)._replace(data=memoryview(bytearray(host(value).data)), source=None))
        plain = value.detach() if hasattr(value, "detach") else value
        assert exact(back) == exact(plain)

    def test_what_comes_back_can_be_written(self, kind: Any) -> None:
        taken = host(kind[0]())
        back = from_host(taken._replace(data=memoryview(bytearray(taken.data)), source=None))
        kind[1](back)
        assert back[0] == 9


class TestWhatIsNoArray:
    @pytest.mark.parametrize(
        "value",
        [1, 1.5, "x", None, True, [1], {}, set(), 1j, object(), len, Path("x")],
        ids=lambda value: type(value).__name__,
    )
    def test_other_values_are_nobodys(self, value: object) -> None:
        adapter = adapter_for(type(value))
        assert adapter is None or (adapter.to_host(value) is None and adapter.describe(value) is None)

    def test_a_class_of_ones_own_is_nobodys(self) -> None:
        assert adapter_for(type("Mine", (), {})) is None

    def test_subclasses_of_arrays_are_arrays(self) -> None:
        assert host(type("MyBytes", (bytes,), {})(b"abc")).kind in ("bytes", "MyBytes")
        assert adapter_for(type("MyArray", (array,), {})) is not None

    def test_looking_for_an_adapter_imports_no_library(self) -> None:
        program = """
import sys
from model_checkpoint.arrays import adapter_for
from model_checkpoint.checkpoint.state import encode
adapter_for(dict), adapter_for(type("T", (), {"__module__": "jax"}))
encode({"model": {"a": b"x", "b": [1.5, bytearray(3), {1, 2}]}})
print(sorted({"numpy", "torch", "ml_dtypes", "safetensors", "jax"} & set(sys.modules)))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.stdout == "[]\n", done.stderr


class TestPlain:
    @pytest.mark.parametrize("code", "bBhHiIlLqQfd")
    def test_every_type_code_of_array_keeps_its_width_and_values(self, code: str) -> None:
        value = array(code, [0, 1, 100])
        taken = host(value)
        assert DTYPES[taken.dtype].bits == value.itemsize * 8
        assert exact(from_host(taken)) == exact(value)

    @pytest.mark.parametrize("format", "bBhHiIlLqQnNfdc?")
    def test_every_format_of_memoryview_keeps_its_width_and_values(self, format: str) -> None:
        value = memoryview(bytearray(b"\1\0\1\0\1\0\1\0")).cast(format)
        assert exact(from_host(host(value))) == exact(value)

    def test_a_memoryview_in_two_dimensions_keeps_its_shape(self) -> None:
        value = memoryview(bytes(range(24))).cast("H", (3, 4))
        assert host(value).shape == (3, 4)
        assert exact(from_host(host(value))) == exact(value)

    @needs_numpy
    def test_a_memoryview_of_half_floats_keeps_its_bits(self) -> None:
        value = np.array([1.5, -0.0], dtype=np.float16)
        assert from_host(host(memoryview(value))).tobytes() == value.tobytes()

    def test_bytes_come_back_as_bytes_that_nobody_can_change(self) -> None:
        memory = bytearray(b"abc")
        back = from_host(HostArray("uint8", (3,), memoryview(memory), "bytes"))
        memory[0] = 0
        assert back == b"abc"

    @pytest.mark.parametrize(
        "value", [array("u", "ab"), memoryview(b"12345678").cast("P")], ids=["characters", "pointers"]
    )
    def test_elements_without_a_portable_meaning_are_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match="no portable"):
            host(value)


@needs_numpy
class TestNumpy:
    def test_layouts_other_than_c_are_laid_out_as_c(self) -> None:
        value = np.arange(6, dtype=np.int16).reshape(2, 3)
        for other in (np.asfortranarray(value), value[::-1], value.T, value[:, ::2], np.broadcast_to(value[0], (4, 3))):
            assert bytes(host(other).data) == other.tobytes()

    def test_big_endian_values_are_stored_little_endian(self) -> None:
        taken = host(np.array([1, 2], dtype=">i4"))
        assert bytes(taken.data) == b"\1\0\0\0\2\0\0\0"
        assert taken.identity is None

    def test_identity_tells_layouts_of_one_memory_apart(self) -> None:
        base = np.arange(12.0)
        same = [base, base[:], base.view(), base.reshape(12), np.asarray(base)]
        assert len({host(value).identity for value in same}) == 1
        others = [base, base[:6], base[1:], base[::2], base.reshape(3, 4), base.reshape(3, 4).T, base.view(np.int64)]
        assert len({host(value).identity for value in others}) == len(others)

    def test_what_cannot_be_tied_has_no_identity(self) -> None:
        table = np.zeros(3, dtype=[("a", "f4"), ("b", "f8")])
        for value in (np.empty(0), np.float64(1), np.arange(3)[::-1], table["b"]):
            assert host(value).identity is None

    def test_from_host_shares_the_memory_it_is_given(self) -> None:
        memory = bytearray(16)
        back = from_host(HostArray("float64", (2,), memoryview(memory), "numpy"))
        back[1] = 1.0
        assert memory[8:] != bytes(8)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: np.array([object()]),
            lambda: np.array(["text"]),
            lambda: np.array([b"bytes"]),
            lambda: np.zeros(2, dtype=[("a", "f4")]),
            lambda: np.array(["2020"], dtype="M8[D]"),
            lambda: np.zeros(2, dtype="V4"),
            lambda: np.str_("x"),
        ],
    )
    def test_dtypes_without_a_portable_form_are_refused_with_what_to_do(self, make: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=r"no portable form; .*astype"):
            host(make())

    def test_a_masked_array_is_refused_with_what_to_do(self) -> None:
        with pytest.raises(ValueError, match=r"\.data and its \.mask"):
            host(np.ma.masked_array([1, 2], [0, 1]))

    def test_views_share_the_memory_of_their_base(self) -> None:
        base = np.arange(6.0)
        part = view(base, Layout("", 0, "float64", (2, 2), (3, 1)), 1)
        assert part.tolist() == [[1, 2], [4, 5]]
        part[0, 0] = 42
        assert base[1] == 42

    def test_the_table_agrees_with_numpy_about_sizes(self) -> None:
        for name, dtype in DTYPES.items():
            if dtype.format is not None or dtype.name in ("complex64", "complex128"):
                assert np.dtype(name).itemsize * 8 == dtype.bits, name

    @needs_ml_dtypes
    def test_narrow_floats_are_those_of_ml_dtypes(self) -> None:
        for name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu"):
            value = np.ones(3, dtype=getattr(ml_dtypes, name))
            taken = host(value)
            assert taken.dtype == name
            assert exact(from_host(taken)) == exact(value)


@needs_torch
class TestTorch:
    def test_layouts_other_than_c_are_laid_out_as_c(self) -> None:
        value = torch.arange(6.0).reshape(2, 3)
        for other in (value.T, value[:, ::2], value[0].expand(4, 3), value.T.contiguous().T):
            assert bytes(host(other).data) == raw_bytes(other)

    def test_identity_tells_layouts_of_one_memory_apart(self) -> None:
        base = torch.arange(12.0)
        same = [base, base[:], base.view(12), base.detach(), torch.nn.Parameter(base)]
        assert len({host(value).identity for value in same}) == 1
        others = [base, base[:6], base[1:], base[::2], base.view(3, 4), base.view(3, 4).T, base.view(torch.int32)]
        assert len({host(value).identity for value in others}) == len(others)

    def test_empty_and_lazily_conjugated_tensors_have_no_identity(self) -> None:
        z = torch.tensor([1 + 2j])
        for value in (torch.empty(0), torch.empty(3, 0), z.conj(), z.conj().imag):
            assert host(value).identity is None

    def test_from_host_shares_writable_memory_and_copies_what_is_read_only(self) -> None:
        memory = bytearray(16)
        from_host(HostArray("float64", (2,), memoryview(memory), "torch"))[1] = 1.0
        assert memory[8:] != bytes(8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of tensors over memory that must not be written
            back = from_host(HostArray("float64", (2,), memoryview(bytes(16)), "torch"))
        back[0] = 1.0
        assert back.tolist() == [1, 0]

    def test_memory_off_the_elements_boundary_is_copied(self) -> None:
        memory = memoryview(bytearray(17))[1:]
        back = from_host(HostArray("float64", (2,), memory, "torch"))
        assert back.data_ptr() % 8 == 0
        assert back.tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("make", "advice"),
        [
            (lambda: torch.eye(2).to_sparse(), "to_dense"),
            (lambda: torch.eye(2).to_sparse_csr(), "to_dense"),
            (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
            (lambda: torch.empty(2, device="meta"), "materialise"),
            (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "unbind"),
        ],
        ids=["sparse", "csr", "quantized", "meta", "nested"],
    )
    @pytest.mark.filterwarnings("ignore")  # torch's own, of prototypes
    def test_tensors_without_plain_memory_are_refused_with_what_to_do(
        self, make: Callable[[], Any], advice: str
    ) -> None:
        with pytest.raises(ValueError, match=advice):
            host(make())

    def test_a_device_that_cannot_be_used_is_a_configuration_error(self) -> None:
        taken = host(torch.ones(1))
        for device in ("nonsense", [1], "cuda:99", True, 1.5, torch.float16):
            with pytest.raises(ConfigurationError, match="device="):
                from_host(taken, device)

    def test_views_share_the_memory_of_their_base(self) -> None:
        base = torch.arange(6.0)
        part = view(base, Layout("", 0, "float32", (2, 2), (1, 3)), 1)
        assert part.tolist() == [[1, 4], [2, 5]]
        part[0, 1] = 42
        assert base[4] == 42

    def test_the_table_agrees_with_torch_about_sizes(self) -> None:
        shared = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]
        assert len(shared) > 15
        for name in shared:
            assert getattr(torch, name).itemsize * 8 == DTYPES[name].bits, name


def test_every_code_stands_for_one_type_and_lanes_add_up() -> None:
    for name, dtype in DTYPES.items():
        assert dtype.name == name
        assert dtype.code in CODES
        if dtype.lanes > 1 or dtype.name == CODES[dtype.code].name:
            assert CODES[dtype.code].bits * dtype.lanes == dtype.bits
    assert CODES["U8"].name == "uint8"


CHILD = """
import importlib.abc, json, sys
blocked, folder, url, checkpoint_id = json.loads(sys.argv[1]), *sys.argv[2:]

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from model_checkpoint import EnhancedCheckpointManager
with EnhancedCheckpointManager(None, folder, database_url=url) as manager:
    try:
        state = manager.load_checkpoint(checkpoint_id)["model_state_dict"]
        told = {
            key: [type(v).__module__ + "." + type(v).__name__, str(getattr(v, "dtype", "")),
                  list(getattr(v, "shape", [])), v.tobytes().hex() if hasattr(v, "tobytes") else repr(v)]
            for key, v in state.items()
        }
    except Exception as error:
        told = {"error": type(error).__name__, "text": str(error)}
    told["status"] = manager.list_checkpoints()[0]["status"]
print(json.dumps(told))
"""


class TestLoadingWithoutTheLibrary:
    @pytest.fixture
    def load_without(self, tmp_path: Path) -> Any:
        """Save a state here, load it in a process where some packages cannot be imported; returns what came back."""
        stores: list[Store] = []

        def load(state: Any, blocked: list[str], backend: str = "safetensors", **options: Any) -> dict[str, Any]:
            store = Store(tmp_path, backend, **options)
            stores.append(store)
            arguments = [json.dumps(blocked), str(store.folder), store.url, store.save(state)]
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr
            return dict(json.loads(done.stdout))

        yield load
        for store in stores:
            store.close()

    @needs_torch
    @needs_ml_dtypes
    def test_tensors_come_back_as_numpy_arrays_where_torch_is_missing(self, load_without: Any) -> None:
        base = torch.arange(6.0)
        state = {
            "f32": torch.tensor([[1.5, -0.0]]),
            "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 2),
            "base": base,
            "columns": base.reshape(2, 3).T,
            "dtype": torch.float16,
        }
        told = load_without(state, ["torch"])
        assert told.pop("status") == "committed"
        assert told.pop("dtype")[3] == "'torch.float16'"
        for key, (kind, dtype, shape, data) in told.items():
            assert kind == "numpy.ndarray", key
            assert dtype == str(state[key].dtype).removeprefix("torch.")
            assert shape == list(state[key].shape)
            assert bytes.fromhex(data) == raw_bytes(state[key])

    @needs_torch
    def test_tensors_come_back_as_memoryviews_where_numpy_is_missing_too(self, load_without: Any) -> None:
        base, narrow = torch.arange(6.0), torch.arange(6.0).bfloat16()
        state = {
            "f32": torch.tensor([[1.5, -0.0]]),
            "f16": torch.tensor([1.5], dtype=torch.float16),
            "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
            "base": base,
            "part": base[2:5],
            "narrow": narrow,
            "narrow_part": narrow[2:5],
        }
        told = load_without(state, ["torch", "numpy", "ml_dtypes"])
        assert told.pop("status") == "committed"
        for key, (kind, _, _, data) in told.items():
            assert kind == "builtins.memoryview", key
            assert bytes.fromhex(data) == raw_bytes(state[key]), key
        assert told["f32"][2] == [1, 2]

    @needs_numpy
    def test_numpy_arrays_come_back_as_memoryviews_where_numpy_is_missing(self, load_without: Any) -> None:
        told = load_without({"x": np.arange(6, dtype=np.int64).reshape(2, 3), "s": np.float32(2)}, ["torch", "numpy"])
        assert told["x"][0] == "builtins.memoryview"
        assert told["x"][2] == [2, 3]
        assert bytes.fromhex(told["x"][3]) == np.arange(6, dtype=np.int64).tobytes()
        assert bytes.fromhex(told["s"][3]) == np.float32(2).tobytes()

    @needs_torch
    def test_a_transposed_tie_asks_for_a_library_and_marks_nothing_corrupt(self, load_without: Any) -> None:
        base = torch.arange(6.0).reshape(2, 3)
        told = load_without({"base": base, "t": base.T}, ["torch", "numpy"])
        assert told["error"] != "IntegrityError", told["text"]
        assert "install" in told["text"]
        assert told["status"] == "committed"

    @needs_torch
    def test_the_pytorch_backend_without_torch_names_the_extra_and_marks_nothing_corrupt(
        self, load_without: Any
    ) -> None:
        told = load_without({"w": torch.ones(1)}, ["torch"], "pytorch")
        assert told["error"] == "MissingDependencyError"
        assert "pip install 'model-checkpoint[torch]'" in told["text"]
        assert told["status"] == "committed"

    @needs_zstandard
    def test_zstd_files_without_zstandard_name_the_extra_and_mark_nothing_corrupt(self, load_without: Any) -> None:
        told = load_without({"w": b"1"}, ["zstandard"], enable_compression=True)
        assert told["error"] == "MissingDependencyError"
        assert "pip install 'model-checkpoint[zstd]'" in told["text"]
        assert told["status"] == "committed"


class TestMemoryThatIsNotThere:
    @needs_torch
    def test_a_tensor_whose_storage_was_freed_or_shrunk_is_refused(self) -> None:
        freed, shrunk = torch.ones(1000), torch.ones(1000)
        inside, gaps, part = shrunk[10:20], shrunk[::2], shrunk[15:25]
        freed.untyped_storage().resize_(0)
        shrunk.untyped_storage().resize_(80)
        for tensor in (freed, shrunk, torch._efficientzerotensor(4), gaps, part):
            with pytest.raises(ValueError, match="its memory was freed, or was never there"):
                host(tensor)
        assert bytes(host(inside).data) == raw_bytes(torch.ones(10))

    def test_subclasses_of_bytes_are_bytes_whatever_they_are_called(self) -> None:
        for base in (bytes, bytearray):
            for name in ("Mine", "torch", "numpy"):
                found = host(type(name, (base,), {})(b"abc"))
                assert (found.kind, from_host(found)) == (base.__name__, b"abc")

    @needs_numpy
    def test_describing_an_array_with_gaps_copies_nothing(self) -> None:
        for gaps in (np.ones((64, 64))[:, ::2], np.ones((8, 8)).T):
            adapter = adapter_for(type(gaps))
            assert adapter is not None
            found, whole = adapter.describe(gaps), host(gaps)
            assert found is not None
            assert found.data.nbytes == 0
            assert (found.dtype, found.shape, found.identity) == (whole.dtype, whole.shape, whole.identity)
