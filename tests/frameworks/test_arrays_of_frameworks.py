"""One suite for the arrays of NumPy, PyTorch, JAX and TensorFlow: exact, without copies, from one to another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store
from rows import bits

from model_checkpoint.arrays import DTYPES, FRAMEWORKS, adapter_for
from model_checkpoint.errors import ConfigurationError, UnsupportedValueError

np = pytest.importorskip("numpy")
ml_dtypes = pytest.importorskip("ml_dtypes")
ROOT = Path(__file__).parents[2]

NAMES = [name for name, dtype in DTYPES.items() if dtype.bits >= 8 and name not in ("complex32", "float4_e2m1fn_x2")]
ABSENT = {"torch": set(), "numpy": set(), "jax": set(), "tensorflow": {"float8_e8m0fnu"}}
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0), (5,), (3, 4)]


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


def pattern(name: str, shape: tuple[int, ...]) -> Any:
    """Return a NumPy array with many different bits, none of which is an invalid bool."""
    dtype = np.dtype(name if not hasattr(ml_dtypes, name) else getattr(ml_dtypes, name))
    count = int(np.prod(shape))
    words = (np.arange(count * dtype.itemsize) * 37 % 120).astype(np.uint8)
    return (words % 2).astype(bool).reshape(shape) if name == "bool" else words.view(dtype)[:count].reshape(shape)


def make(framework: str, array: Any) -> Any:
    """Return the same array in a framework, made without the engine."""
    if framework == "torch":
        import torch

        dtype = getattr(torch, array.dtype.name)
        if not array.size:
            return torch.empty(array.shape, dtype=dtype)
        return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape)
    if framework == "jax":
        import jax

        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            return jax.numpy.asarray(array)
    if framework == "tensorflow":
        import tensorflow as tf

        return tf.constant(array)
    return array.copy()


def has(framework: str, name: str) -> bool:
    return name not in ABSENT[framework]


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(store: Store, framework: str, name: str) -> None:
    if not has(framework, name):
        pytest.skip(f"{framework} has no {name}")
    arrays = {str(shape): make(framework, pattern(name, shape)) for shape in SHAPES}
    loaded = store.round_trip({**arrays, "again": arrays["(5,)"]})
    assert bits(list(loaded.values())[:-1]) == bits(list(arrays.values()))
    assert bits(loaded) == bits([pattern(name, shape) for shape in (*SHAPES, (5,))])
    assert {type(value) for value in loaded.values()} == {type(value) for value in arrays.values()}
    assert loaded["again"] is loaded["(5,)"]


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_and_shape_loads_as_an_array_of_every_other_framework(
    store: Store, framework: str, name: str
) -> None:
    if not has(framework, name):
        pytest.skip(f"{framework} has no {name}")
    arrays = {str(shape): make(framework, pattern(name, shape)) for shape in SHAPES}
    saved = store.save(arrays)
    for other in filter(find_spec, FRAMEWORKS):
        if not has(other, name):
            with pytest.raises(ConfigurationError, match=f"(?i){other} cannot take {name}"):
                store.load(saved, framework=other)
            continue
        loaded = store.load(saved, framework=other)["model_state_dict"]
        assert bits(loaded) == bits(arrays)
        assert {type(value).__module__.partition(".")[0].removesuffix("lib") for value in loaded.values()} == {other}


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)


def test_taking_an_array_copies_nothing(framework: str) -> None:
    array = make(framework, pattern("float32", (1000,)))
    adapter = adapter_for(type(array))
    assert adapter is not None
    first, second = (adapter.to_host(array) for _ in range(2))
    assert first is not None
    assert second is not None
    assert address_of(first.data) == address_of(second.data)
    if framework == "numpy":
        assert address_of(first.data) == array.ctypes.data
    elif framework == "torch":
        assert address_of(first.data) == array.data_ptr()
    elif framework == "jax":
        assert address_of(first.data) == array.unsafe_buffer_pointer()
    else:
        assert address_of(first.data) == address_of(memoryview(array))


def test_tied_arrays_and_views_of_one_keep_their_values_in_every_framework(store: Store) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0)
    state = {"low": base[:8], "high": base[4:], "turned": base[:6].view(2, 3).T, "tied": base[:8]}
    saved = store.save(state)
    for other in filter(find_spec, FRAMEWORKS):
        loaded = store.load(saved, framework=other)["model_state_dict"]
        assert [np.asarray(loaded[name]).tolist() for name in state] == [state[name].tolist() for name in state]
        assert loaded["tied"] is loaded["low"]


def test_strings_of_bytes_stay_what_they_are(store: Store, framework: str) -> None:
    saved = store.save({"text": b"abc", "buffer": bytearray(b"de"), "array": np.arange(3), "scalar": np.float32(2.5)})
    loaded = store.load(saved, framework=framework)["model_state_dict"]
    assert (loaded["text"], loaded["buffer"]) == (b"abc", bytearray(b"de"))
    assert type(loaded["text"]) is bytes
    assert (np.asarray(loaded["array"]).tolist(), float(loaded["scalar"])) == ([0, 1, 2], 2.5)


def test_a_framework_that_there_is_not_is_refused(store: Store) -> None:
    saved = store.save({"a": np.arange(3)})
    for name in ("mxnet", "", 3, "Torch"):
        with pytest.raises(ConfigurationError, match="framework must be one of numpy, torch, jax, tensorflow"):
            store.load(saved, framework=name)


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name != "numpy"])
def test_a_framework_that_is_not_installed_is_refused_with_what_to_install(tmp_path: Path, name: str) -> None:
    program = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda fullname, *rest: None if fullname.partition(".")[0] == {name!r} else find(fullname, *rest)
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import MissingDependencyError
tracker = ExperimentTracker("x", database_url="sqlite:///{tmp_path}/e.db")
manager = EnhancedCheckpointManager(tracker, {str(tmp_path / "c")!r})
manager.save_checkpoint({{"a": array("f", [1.0])}})
try:
    manager.load_checkpoint(framework={name!r})
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert f"loading with framework='{name}' needs the package '{name}'" in done.stdout, done.stderr


# TensorFlow's own


tf = pytest.importorskip("tensorflow") if find_spec("tensorflow") else None
needs_tensorflow = pytest.mark.skipif(tf is None, reason="tensorflow is not installed")


@needs_tensorflow
def test_a_variable_is_saved_as_it_was_though_it_is_assigned_to_before_the_save_ends(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", async_save=True)
    variable = tf.Variable(tf.zeros(1 << 20))
    saved = store.save({"v": variable})
    for _ in range(20):
        variable.assign_add(tf.ones_like(variable))
        variable.scatter_nd_update([[0]], [9.0])
    store.manager.wait()
    assert float(tf.reduce_max(tf.abs(store.load(saved)["model_state_dict"]["v"]))) == 0.0
    store.close()


@needs_tensorflow
def test_variables_are_filled_where_they_are_and_tensors_replaced(store: Store) -> None:
    saved = store.save({"v": tf.Variable([1.0, 2.0]), "t": tf.constant([3]), "scalar": tf.Variable(4.0)})
    target = {"v": tf.Variable([0.0, 0.0]), "t": tf.constant([0]), "scalar": tf.Variable(0.0)}
    variable = target["v"]
    store.manager.restore(target, checkpoint_id=saved)
    assert target["v"] is variable
    assert [target[name].numpy().tolist() for name in target] == [[1.0, 2.0], [3], 4.0]
    loaded = store.load(saved)["model_state_dict"]
    assert all(isinstance(value, tf.Tensor) for value in loaded.values())


@needs_tensorflow
@pytest.mark.parametrize(
    ("make_one", "advice"),
    [
        (lambda: tf.constant(["text"]), "no portable form"),
        (lambda: tf.cast(tf.constant([1, 2]), tf.qint8), "no portable form"),
        (lambda: tf.ragged.constant([[1], [2, 3]]), "several parts"),
        (lambda: tf.sparse.from_dense([[0, 1]]), "several parts"),
    ],
)
def test_tensors_without_plain_memory_are_refused_with_what_to_do(store: Store, make_one: Any, advice: str) -> None:
    with pytest.raises(UnsupportedValueError, match=rf"model\.a.*{advice}"):
        store.save({"a": make_one()})
    found: list[str] = []

    @tf.function
    def traced(value: Any) -> Any:
        try:
            store.save({"a": value})
        except UnsupportedValueError as error:
            found.append(str(error))
        return value

    traced(tf.constant(1.0))
    assert "symbolic" in found[0]


@needs_tensorflow
def test_a_device_is_named_in_tensorflows_words(store: Store) -> None:
    saved = store.save({"a": tf.constant([1.0])})
    assert "CPU:0" in store.load(saved, device="/CPU:0")["model_state_dict"]["a"].device
    with pytest.raises(ConfigurationError, match="cannot take"):
        store.load(saved, device="nonsense")
