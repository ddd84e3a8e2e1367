"""JAX arrays: bit for bit, by reference, and refused where they have no memory to take."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, np, optional, raw_bytes

from model_checkpoint.arrays import adapter_for
from model_checkpoint.errors import ConfigurationError, UnsupportedValueError

jax = optional("jax")
pytestmark = pytest.mark.skipif(jax is None or np is None, reason="jax is not installed")
DTYPES = ["bool", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, max_checkpoints=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_every_dtype_and_shape_comes_back_bit_for_bit(store: Store, dtype: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    array = jax.numpy.asarray(np.arange(count).reshape(shape) % 2, dtype=dtype)
    back = store.round_trip({"a": array, "again": array})
    assert isinstance(back["a"], jax.Array)
    assert back["a"] is back["again"]
    assert (back["a"].dtype, back["a"].shape) == (array.dtype, array.shape)
    assert raw_bytes(np.asarray(back["a"])) == raw_bytes(np.asarray(array))


def test_taking_an_array_copies_nothing_and_a_snapshot_neither(store: Store) -> None:
    array = jax.numpy.arange(1 << 20, dtype="float32")
    adapter = adapter_for(type(array))
    assert adapter is not None
    host = adapter.to_host(array)
    assert host is not None
    assert np.frombuffer(host.data, np.uint8).ctypes.data == array.unsafe_buffer_pointer()
    assert host.immutable


def test_an_array_that_is_donated_while_its_save_is_pending_is_saved_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path, max_checkpoints=None, max_pending_saves=2)
    release = threading.Event()
    store.manager.register_hook("hold", lambda context: release.wait(60), ["after_checkpoint_save"])
    store.save({"a": np.zeros(1)}, blocking=False)  # its hook holds up the next one
    array = jax.numpy.ones(1 << 18)
    step = jax.jit(lambda a: a * 3, donate_argnums=0)
    saved = store.save({"a": array}, blocking=False)
    for _ in range(5):
        array = step(array)
    assert saved in store.manager.pending()
    release.set()
    store.manager.wait()
    assert float(store.load(saved)["model_state_dict"]["a"].min()) == 1.0
    assert float(array.max()) == 3.0**5


def refused() -> dict[str, Any]:
    if jax is None:
        return {}
    return {"no portable form": lambda: jax.numpy.ones(4, dtype="int4")}


@pytest.mark.parametrize("advice", refused())
def test_arrays_without_plain_memory_are_refused_with_what_to_do(store: Store, advice: str) -> None:
    with pytest.raises(UnsupportedValueError, match=rf"model\.a.*{advice}"):
        store.save({"a": refused()[advice]()})


def test_an_array_under_trace_and_a_deleted_one_are_refused(store: Store) -> None:
    with pytest.raises(UnsupportedValueError, match="outside of jit"):
        jax.jit(lambda a: store.save({"a": a}) and a)(jax.numpy.ones(3))
    gone = jax.numpy.ones(3)
    gone.delete()
    with pytest.raises(UnsupportedValueError, match="donated"):
        store.save({"a": gone})


def test_64_bit_arrays_are_never_narrowed_without_a_word(store: Store) -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        saved = store.save({"a": jax.numpy.arange(3, dtype="int64") + (1 << 40)})
        assert store.load(saved)["model_state_dict"]["a"].tolist() == [(1 << 40) + i for i in range(3)]
    loaded = store.load(saved)["model_state_dict"]["a"]
    assert (str(loaded.dtype), loaded.tolist()) == ("int64", [(1 << 40) + i for i in range(3)])


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_come_back_as_keys_of_their_kind(store: Store, impl: str, shape: tuple[int, ...]) -> None:
    key = jax.random.key(7, impl=impl)
    key = jax.random.split(key, shape) if shape else key
    saved = store.save({"key": key})
    loaded = store.load(saved)["model_state_dict"]["key"]
    assert loaded.dtype == key.dtype
    assert jax.random.key_data(loaded).tolist() == jax.random.key_data(key).tolist()
    data = store.load(saved, framework="numpy")["model_state_dict"]["key"]
    assert data.tolist() == jax.random.key_data(key).tolist()
    target = {"key": jax.random.split(jax.random.key(0, impl=impl), shape) if shape else jax.random.key(0, impl=impl)}
    store.manager.restore(target, checkpoint_id=saved)
    assert jax.random.key_data(target["key"]).tolist() == jax.random.key_data(key).tolist()


def test_a_device_is_named_in_jaxs_words(store: Store) -> None:
    saved = store.save({"a": jax.numpy.ones(3)})
    assert store.load(saved, device="cpu")["model_state_dict"]["a"].device.platform == "cpu"
    with pytest.raises(ConfigurationError, match="cannot take"):
        store.load(saved, device="nonsense")


def test_loading_in_place_replaces_jax_arrays_in_their_container(store: Store) -> None:
    saved = store.save({"layer": {"w": jax.numpy.arange(4.0), "n": 3}})
    target = {"layer": {"w": jax.numpy.zeros(4), "n": 0}}
    store.manager.load_into(target, checkpoint_id=saved)
    assert target["layer"]["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert target["layer"]["n"] == 3
