"""A small real training in each framework: the rows of the matrix.

Run as a program, it tries all cells of one row in a process of its own, which Keras needs: a process has one backend.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from array import array
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.arrays import adapter_for

CELLS = ("save", "load", "cross-framework load", "in-place restore", "exact resume")
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow")
X = [[((i * j) % 7) / 7 for j in range(1, 5)] for i in range(24)]
Y = [sum(row) for row in X]


class Row(NamedTuple):
    """A training.

    Attributes:
        needs: packages.
        make: seed -> the objects that are saved and restored, by the names of ``save_checkpoint``.
        train: goes on for a few steps with the objects, which it may replace in the dict.
        arrays: the objects -> what can be compared: a list of nested lists of numbers.
    """

    needs: tuple[str, ...]
    make: Callable[[int], dict[str, Any]]
    train: Callable[[dict[str, Any]], None]
    arrays: Callable[[dict[str, Any]], list[Any]]


def missing(row: Row) -> list[str]:
    """Return the packages of a row that are not installed here."""
    return [name for name in row.needs if find_spec(name) is None]


def _numpy_make(seed: int) -> dict[str, Any]:
    import numpy as np

    np.random.seed(seed)
    return {"model": {"w": np.random.rand(4)}, "extra_state": {"noise": np.random.default_rng(seed)}}


def _numpy_train(it: dict[str, Any]) -> None:
    import numpy as np

    for _ in range(3):
        rows = np.random.permutation(24)[:8]
        x, y = np.array(X)[rows], np.array(Y)[rows]
        error = x @ it["model"]["w"] - y + it["extra_state"]["noise"].normal(0, 0.1, 8)
        it["model"]["w"] -= 0.1 * x.T @ error


def _torch_make(seed: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    layers = (torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    extra = {
        "average": torch.optim.swa_utils.AveragedModel(model),
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0),
    }
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra_state": extra}


def _torch_train(it: dict[str, Any]) -> None:
    import torch

    scaler = it["extra_state"]["scaler"]
    for _ in range(3):
        rows = torch.randperm(24)[:8]
        loss = (it["model"](torch.tensor(X)[rows]).squeeze(1) - torch.tensor(Y)[rows]).square().mean()
        it["optimizer"].zero_grad()
        scaler.scale(loss).backward()
        scaler.step(it["optimizer"])
        scaler.update()
        it["scheduler"].step()
        it["extra_state"]["average"].update_parameters(it["model"])


def _torch_arrays(it: dict[str, Any]) -> list[Any]:
    states = [
        it["model"].state_dict(),
        it["extra_state"]["average"].state_dict(),
        it["extra_state"]["scaler"].state_dict(),
    ]
    values = [value for state in states for value in state.values()]
    values += [value for state in it["optimizer"].state_dict()["state"].values() for value in state.values()]
    return [value.tolist() if hasattr(value, "tolist") else value for value in values] + [it["scheduler"].get_last_lr()]


def _optax_make(seed: int) -> dict[str, Any]:
    import jax
    import optax

    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (4, 8)), "v": jax.random.normal(key, (8,))}
    return {"model": params, "optimizer": optax.adamw(0.01).init(params), "extra_state": {"key": key}}


def _optax_train(it: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    for _ in range(3):
        it["extra_state"]["key"], drop, order = jax.random.split(it["extra_state"]["key"], 3)
        rows = jax.random.permutation(order, 24)[:8]

        def loss(params: Any, drop: Any = drop, rows: Any = rows) -> Any:
            hidden = jnp.tanh(jnp.array(X)[rows] @ params["w"]) * jax.random.bernoulli(drop, 0.5, (8,))
            return jnp.mean((hidden @ params["v"] - jnp.array(Y)[rows]) ** 2)

        updates, it["optimizer"] = optax.adamw(0.01).update(jax.grad(loss)(it["model"]), it["optimizer"], it["model"])
        it["model"] = optax.apply_updates(it["model"], updates)


def _leaves(it: dict[str, Any]) -> list[Any]:
    import jax
    import numpy as np

    leaves = jax.tree_util.tree_leaves([it["model"], it.get("optimizer")])
    return [np.asarray(leaf).tolist() for leaf in leaves if type(leaf).__name__ != "PRNGKeyArray"]


def _linen_make(seed: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(1)])
    params = model.init(jax.random.key(seed), jnp.array(X))["params"]
    return {"model": TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.05, momentum=0.9))}


def _linen_train(it: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    for _ in range(3):
        state = it["model"]

        def loss(params: Any, state: Any = state) -> Any:
            return jnp.mean((state.apply_fn({"params": params}, jnp.array(X))[:, 0] - jnp.array(Y)) ** 2)

        it["model"] = state.apply_gradients(grads=jax.grad(loss)(state.params))


def _nnx_make(seed: int) -> dict[str, Any]:
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.dropout(self.norm(self.first(x))))

    model = Net(nnx.Rngs(seed))
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)}


def _nnx_train(it: dict[str, Any]) -> None:
    import jax.numpy as jnp
    from flax import nnx

    for _ in range(3):
        grads = nnx.grad(lambda model: jnp.mean((model(jnp.array(X))[:, 0] - jnp.array(Y)) ** 2))(it["model"])
        it["optimizer"].update(it["model"], grads)


def _nnx_arrays(it: dict[str, Any]) -> list[Any]:
    from flax import nnx

    return _leaves({"model": nnx.state(it["model"]), "optimizer": nnx.state(it["optimizer"])})


def _tensorflow_make(seed: int) -> dict[str, Any]:
    import tensorflow as tf

    class Net(tf.Module):
        def __init__(self) -> None:
            self.layers = [tf.Variable(tf.random.normal((4, 8))), tf.Variable(tf.random.normal((8, 1)))]
            self.momentum = [tf.Variable(tf.zeros_like(layer)) for layer in self.layers]

    tf.random.set_seed(seed)
    return {"model": Net(), "extra_state": {"generator": tf.random.Generator.from_seed(seed)}}


def _tensorflow_train(it: dict[str, Any]) -> None:
    import tensorflow as tf

    model = it["model"]
    for _ in range(3):
        rows = tf.random.shuffle(tf.range(24))[:8]
        keep = tf.cast(it["extra_state"]["generator"].uniform((8,)) < 0.5, tf.float32)
        with tf.GradientTape() as tape:
            hidden = tf.tanh(tf.gather(tf.constant(X), rows) @ model.layers[0]) * keep
            loss = tf.reduce_mean((tf.squeeze(hidden @ model.layers[1]) - tf.gather(tf.constant(Y), rows)) ** 2)
        for layer, momentum, grad in zip(model.layers, model.momentum, tape.gradient(loss, model.layers)):
            momentum.assign(0.9 * momentum + grad)
            layer.assign_sub(0.01 * momentum)


def _keras_make(seed: int) -> dict[str, Any]:
    import keras

    keras.utils.set_random_seed(seed)
    layers = [keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.optimizer.build(model.trainable_variables)
    return {"model": model, "optimizer": model.optimizer}


def _keras_train(it: dict[str, Any]) -> None:
    import numpy as np

    it["model"].fit(np.array(X), np.array(Y), batch_size=8, epochs=2, verbose=0)


def _keras_arrays(it: dict[str, Any]) -> list[Any]:
    import keras

    variables = it["model"].variables + it["optimizer"].variables
    return [keras.ops.convert_to_numpy(variable.value).tolist() for variable in variables]


def _sklearn_make(seed: int) -> dict[str, Any]:
    from sklearn.linear_model import SGDRegressor

    return {"model": SGDRegressor(random_state=None, shuffle=True)}


def _sklearn_train(it: dict[str, Any]) -> None:
    for _ in range(3):
        it["model"].partial_fit(X, Y)


def _xgboost_make(seed: int) -> dict[str, Any]:
    import xgboost

    options: dict[str, Any] = {"n_estimators": 3, "max_depth": 2, "n_jobs": 1, "random_state": seed, "subsample": 0.5}
    return {"model": xgboost.XGBRegressor(**options, seed_per_iteration=True)}


def _xgboost_train(it: dict[str, Any]) -> None:
    import numpy as np

    model = it["model"]
    model.fit(np.array(X), np.array(Y), xgb_model=model if model.__sklearn_is_fitted__() else None)


def _xgboost_arrays(it: dict[str, Any]) -> list[Any]:
    return list(it["model"].get_booster().get_dump(with_stats=True))


ROWS = {
    "numpy": Row(("numpy",), _numpy_make, _numpy_train, lambda it: [it["model"]["w"].tolist()]),
    "torch": Row(("torch",), _torch_make, _torch_train, _torch_arrays),
    "jax-optax": Row(("jax", "optax"), _optax_make, _optax_train, _leaves),
    "flax-linen": Row(("jax", "flax", "optax"), _linen_make, _linen_train, _leaves),
    "flax-nnx": Row(("jax", "flax", "optax"), _nnx_make, _nnx_train, _nnx_arrays),
    "tensorflow": Row(
        ("tensorflow",),
        _tensorflow_make,
        _tensorflow_train,
        lambda it: [v.numpy().tolist() for v in it["model"].variables],
    ),
    "sklearn": Row(
        ("sklearn", "skops"),
        _sklearn_make,
        _sklearn_train,
        lambda it: [getattr(it["model"], "coef_", array("d")).tolist()],
    ),
    "xgboost": Row(("xgboost", "numpy"), _xgboost_make, _xgboost_train, _xgboost_arrays),
}
for _backend in ("jax", "torch", "tensorflow"):
    ROWS[f"keras-{_backend}"] = Row(("keras", _backend), _keras_make, _keras_train, _keras_arrays)


def restore(manager: EnhancedCheckpointManager, it: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Restore all objects; those that cannot be changed are replaced in the dict."""
    restored = manager.restore(**it, **options)
    it.update({name: restored[name] for name in it})
    return restored


def save(manager: EnhancedCheckpointManager, row: Row) -> None:
    it = row.make(1)
    row.train(it)
    saved = manager.save_checkpoint(**it, step=3)
    assert manager.verify_experiment_integrity()["verified"] == 1
    assert [found["checkpoint_id"] for found in manager.list_checkpoints()] == [saved]
    row.train(it)  # a save leaves nothing behind that training would meet


def load(manager: EnhancedCheckpointManager, row: Row) -> None:
    it = row.make(1)
    row.train(it)
    loaded = manager.load_checkpoint(manager.save_checkpoint(**it, step=3))
    assert loaded["step"] == 3
    state = {name: loaded[name if name == "extra_state" else f"{name}_state_dict"] for name in it}
    again = manager.load_checkpoint(manager.save_checkpoint(**state))
    assert bits([again[f"{name}_state_dict"] for name in ("model", "optimizer")]) == bits(
        [loaded[f"{name}_state_dict"] for name in ("model", "optimizer")]
    )
    other = row.make(2)
    row.train(other)
    restore(manager, other)  # what was loaded is as good as the objects that it is of
    assert row.arrays(other) == row.arrays(it)


def cross_framework_load(manager: EnhancedCheckpointManager, row: Row) -> None:
    it = row.make(1)
    row.train(it)
    saved = manager.save_checkpoint(**it)
    plain = bits(manager.load_checkpoint(saved)["model_state_dict"])
    for framework in FRAMEWORKS:
        if find_spec(framework) is None:
            continue
        loaded = manager.load_checkpoint(saved, framework=framework)
        assert bits(loaded["model_state_dict"]) == plain
        kinds = {type(leaf).__module__.partition(".")[0] for leaf in arrays_of(loaded["model_state_dict"])}
        assert kinds <= {framework, {"jax": "jaxlib"}.get(framework, framework), "builtins"}, kinds
        state = {name: loaded[name if name == "extra_state" else f"{name}_state_dict"] for name in it}
        manager.save_checkpoint(**state)
        target = row.make(2)
        row.train(target)
        restore(manager, target)  # and back into the framework that it came from
        assert row.arrays(target) == row.arrays(it)


def arrays_of(state: Any) -> list[Any]:
    """Return the arrays and strings of bytes of a nested state, in order."""
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in arrays_of(value)]
    if isinstance(state, (list, tuple)):
        return [leaf for value in state for leaf in arrays_of(value)]
    return [state] if hasattr(state, "dtype") or isinstance(state, bytes) else []


def bits(state: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of every array of a nested state; of a typed key of JAX those of its data."""
    found = []
    for leaf in arrays_of(state):
        if type(leaf).__name__ == "PRNGKeyArray":
            import jax

            leaf = jax.random.key_data(leaf)
        adapter = adapter_for(type(leaf))
        taken = adapter and adapter.to_host(leaf)
        assert taken
        found.append((taken.dtype, taken.shape, bytes(taken.data)))
    return found


def in_place_restore(manager: EnhancedCheckpointManager, row: Row) -> None:
    it, other = row.make(1), row.make(2)
    row.train(it)
    row.train(other)
    row.train(other)
    manager.save_checkpoint(**it, step=3, loss=0.5)
    assert row.arrays(other) != row.arrays(it)
    restored = restore(manager, other)
    assert row.arrays(other) == row.arrays(it)
    assert (restored["step"], restored["loss"], restored["best"]["loss"]) == (3, 0.5, 0.5)
    assert restored["report"] == {"missing": [], "unexpected": [], "mismatched": [], "renamed": {}}


def exact_resume(manager: EnhancedCheckpointManager, row: Row) -> None:
    it = row.make(1)
    row.train(it)
    manager.save_checkpoint(**it)
    row.train(it)
    unbroken = row.arrays(it)
    resumed = row.make(2)
    row.train(resumed)
    restore(manager, resumed)
    row.train(resumed)
    assert row.arrays(resumed) == unbroken


TRIALS = dict(zip(CELLS, (save, load, cross_framework_load, in_place_restore, exact_resume)))


def try_cell(row: str, cell: str, folder: Path) -> None:
    """Try one cell of the matrix; raises AssertionError, or whatever went wrong."""
    with ExperimentTracker("matrix", database_url=f"sqlite:///{folder}/experiments.db") as tracker:
        with EnhancedCheckpointManager(tracker, folder / "checkpoints", max_checkpoints=None) as manager:
            TRIALS[cell](manager, ROWS[row])


def main(row: str) -> None:
    """Print a JSON object: cell -> None, or what went wrong."""
    outcome: dict[str, str | None] = {}
    for cell in CELLS:
        outcome[cell] = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                try_cell(row, cell, Path(folder))
            except Exception:  # noqa: BLE001 - the test that reads this fails with it
                outcome[cell] = traceback.format_exc()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1])
