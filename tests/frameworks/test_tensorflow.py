"""TensorFlow's own objects: modules, checkpoints' graphs, variables in dicts, and random states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import StateMismatchError, UnsupportedValueError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf: Any = pytest.importorskip("tensorflow")
np: Any = pytest.importorskip("numpy")


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> Iterator[EnhancedCheckpointManager]:
    with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=None) as manager:
        yield manager


def linear(rows: int, columns: int, seed: int) -> Any:
    module = tf.Module()
    module.w = tf.Variable(tf.random.stateless_normal((rows, columns), (seed, 1)))
    module.b = tf.Variable(tf.zeros((columns,), tf.bfloat16) + seed)
    return module


def network(seed: int) -> Any:
    """Lists, dicts, tuples, a module that two attributes lead to, itself, and dtypes that NumPy does not have."""
    module = tf.Module()
    module.layers = [linear(3, 4, seed), linear(4, 4, seed + 1)]
    module.parts = {"x": linear(2, 2, seed + 2), "y": tf.Variable(seed, dtype=tf.int64)}
    module.again = module.layers[0]
    module.me = module
    module.flags = (tf.Variable(seed > 4), tf.Variable(float(seed), dtype=tf.float64))
    module.empty = tf.Variable(tf.zeros((0, 3)))
    return module


def values(module: Any) -> list[Any]:
    return [variable.numpy() for variable in module.variables]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other))
    return len(one) == len(other) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("way", ["restore", "load_into"])
def test_a_module_is_filled_where_it_is(manager: EnhancedCheckpointManager, way: str) -> None:
    saved, there = network(1), network(7)
    variables = list(there.variables)
    manager.save_checkpoint(saved)

    getattr(manager, way)(there)

    assert same(values(saved), values(there))
    assert all(old is new for old, new in zip(variables, there.variables))


def test_names_are_the_attributes_that_lead_there(manager: EnhancedCheckpointManager) -> None:
    checkpoint = manager.save_checkpoint(network(1))

    names = list(manager.load_checkpoint(checkpoint)["model_state_dict"])
    part = manager.load_checkpoint(checkpoint, keys="model.layers.0.*")["model_state_dict"]

    assert names[:4] == ["layers.0.w", "layers.0.b", "layers.1.w", "layers.1.b"]
    assert {"parts.x.w", "parts.y", "flags.0", "empty"} < set(names)
    assert len(names) == len(network(1).variables)
    assert set(part) == {"layers.0.w", "layers.0.b"}


def test_a_background_save_holds_the_values_of_the_call(manager: EnhancedCheckpointManager) -> None:
    module = network(1)
    before = values(module)
    manager.save_checkpoint(module, blocking=False)
    for variable in module.variables:
        variable.assign(tf.zeros_like(variable))
    manager.wait()

    there = network(7)
    manager.restore(there)

    assert same(before, values(there))


def test_a_graph_of_tf_train_checkpoint_is_restored(manager: EnhancedCheckpointManager) -> None:
    saved, there = ((tf.train.Checkpoint(net=network(seed), step=tf.Variable(seed))) for seed in (3, 5))
    manager.save_checkpoint(saved)

    manager.restore(there)

    assert same(values(saved.net), values(there.net))
    assert int(there.step) == 3


def test_variables_in_a_dict_are_filled_and_tensors_replaced(manager: EnhancedCheckpointManager) -> None:
    def state(number: float) -> dict[str, Any]:
        low = [tf.Variable(number, dtype=tf.bfloat16)]
        return {
            "v": tf.Variable([number]),
            "t": tf.constant([number]),
            "low": low,
            "pair": (tf.constant(number), number),
        }

    there = state(0.0)
    variable, low = there["v"], there["low"][0]
    manager.save_checkpoint(state(3.0))

    restored = manager.restore(there)["model"]

    assert restored["v"] is variable
    assert restored["low"][0] is low
    assert (variable.numpy().tolist(), float(low.numpy())) == ([3.0], 3.0)
    assert restored["t"].numpy().tolist() == [3.0]
    assert (float(restored["pair"][0]), restored["pair"][1]) == (3.0, 3.0)


def test_what_does_not_fit_is_told_with_both_shapes_and_the_rest_can_be_restored(
    manager: EnhancedCheckpointManager,
) -> None:
    saved = network(1)
    manager.save_checkpoint(saved)
    there = tf.Module()
    there.blocks = [linear(3, 4, 7), linear(4, 5, 8)]

    with pytest.raises(StateMismatchError, match="was saved, there is no place for it"):
        manager.restore(there)
    report = manager.restore(there, strict="skip", rename={"model.layers.*": "model.blocks.*"})["report"]

    assert same(values(saved.layers[0]), values(there.blocks[0]))
    assert "model.blocks.1.w: float32[4, 4] was saved, there is float32[4, 5]" in report["mismatched"]


def test_content_that_is_in_no_variable_is_refused_and_not_left_out(manager: EnhancedCheckpointManager) -> None:
    tables = tf.Module()
    tables.fixed = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1]), 0)
    tables.v = tf.Variable(1.0)
    assert list(manager.load_checkpoint(manager.save_checkpoint(tables))["model_state_dict"]) == ["v"]

    tables.grown = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    for refused in (tables, tf.train.Checkpoint(data=iter(tf.data.Dataset.range(4)))):
        with pytest.raises(UnsupportedValueError, match="in no variable"):
            manager.save_checkpoint(refused)


def test_a_generator_goes_on_and_one_of_another_algorithm_is_refused(manager: EnhancedCheckpointManager) -> None:
    saved, there = tf.random.Generator.from_seed(3), tf.random.Generator.from_seed(9)
    saved.normal((3,))
    manager.save_checkpoint({"g": saved})

    manager.restore({"g": there})

    assert np.array_equal(saved.normal((2,)), there.normal((2,)))
    with pytest.raises(StateMismatchError):
        manager.restore({"g": tf.random.Generator.from_seed(9, alg="threefry")})


@pytest.mark.parametrize("since", ["nothing", "another seed", "another generator"])
def test_the_random_states_of_the_process_are_put_back(manager: EnhancedCheckpointManager, since: str) -> None:
    def draw() -> list[Any]:
        drawn = [tf.random.normal((2,)), tf.random.shuffle(range(9)), tf.random.get_global_generator().normal((2,))]
        return [it.numpy().tolist() for it in drawn]

    tf.random.set_seed(4)
    tf.random.set_global_generator(tf.random.Generator.from_seed(2))
    draw()
    manager.save_checkpoint({"epoch": 1})
    expected = draw()
    assert draw() != expected
    if since == "another seed":
        tf.random.set_seed(9)
    elif since == "another generator":
        tf.random.set_global_generator(tf.random.Generator.from_seed(1, alg="threefry"))

    manager.restore({"epoch": 0})

    assert draw() == expected


def test_a_compiled_function_draws_from_the_generator_that_was_put_back(manager: EnhancedCheckpointManager) -> None:
    @tf.function
    def draw() -> Any:
        return tf.random.get_global_generator().normal((2,))

    tf.random.set_global_generator(tf.random.Generator.from_seed(2))
    draw()
    manager.save_checkpoint({"epoch": 1})
    expected = draw().numpy().tolist()

    manager.restore({"epoch": 0})

    assert draw().numpy().tolist() == expected
