"""What ``test_keras.py`` runs on each backend, in one process: objects of all kinds, and what the callback does.

It takes the backend and a folder, and prints a JSON object: name of a check -> None, or how it failed. With a third
argument it restores what other backends saved, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

backend, root = sys.argv[1], Path(sys.argv[2])
os.environ["KERAS_BACKEND"] = backend

import keras  # noqa: E402 - its backend is chosen before it is imported
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import layers as kl  # noqa: E402

from model_checkpoint import (  # noqa: E402
    EnhancedCheckpointManager,
    ExperimentTracker,
    KeepBest,
    KeepLast,
    Queries,
)
from model_checkpoint.errors import ConfigurationError, StateMismatchError, UnsupportedValueError  # noqa: E402
from model_checkpoint.integrations.keras import CheckpointCallback  # noqa: E402

x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
y = x[:, :2] * 2
Check = Callable[[EnhancedCheckpointManager, Path], None]


def values(thing: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable.value) for variable in thing.variables]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(values(one), values(other), strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def sequential() -> Any:
    first = [kl.Dense(8), kl.BatchNormalization(), kl.Dropout(0.4), kl.Dense(8, name="dense_9999")]
    return keras.Sequential([keras.Input((6,)), *first, kl.Dense(2)])


def functional() -> Any:
    """A layer that is shared, a model within a model, and a name that the user gave."""
    a, b, shared = keras.Input((6,)), keras.Input((6,)), kl.Dense(4)
    inner = keras.Sequential([keras.Input((4,)), kl.Dense(3), kl.Dense(3)])
    return keras.Model([a, b], kl.Dense(2)(inner(kl.Dense(4, name="mine")(kl.Add()([shared(a), shared(b)])))))


def recurrent() -> Any:
    given = keras.Input((5, 3))
    z = kl.Bidirectional(kl.LSTM(4, return_sequences=True, dropout=0.2))(given)
    z = kl.RNN([kl.LSTMCell(3), kl.GRUCell(3)], return_sequences=True)(z)
    z = kl.LayerNormalization()(kl.MultiHeadAttention(2, 3, dropout=0.1)(z, z))
    return keras.Model(given, kl.TimeDistributed(kl.Dense(2))(z))


class Block(kl.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [kl.Dense(6), kl.Dense(6)]
        self.named = {"gate": kl.Dense(6)}
        self.drop = kl.Dropout(0.5)

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(), name="scale")
        for part in (*self.parts, *self.named.values()):
            part.build(shape)

    def call(self, z: Any, training: bool = False) -> Any:
        for part in self.parts:
            z = part(z)
        return self.drop(self.named["gate"](z) * self.scale, training=training)


class Net(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = Block(), Block(), kl.Dense(2)
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, z: Any, training: bool = False) -> Any:
        return self.out(self.two(self.one(z, training=training), training=training))


def subclassed() -> Any:
    net = Net()
    net(x[:1])
    return net


def compiled(optimizer: Any = None, **given: Any) -> Any:
    model = sequential()
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", **given)
    return model


def models_of_every_kind_whose_automatic_names_have_counted_on(manager: EnhancedCheckpointManager, _: Path) -> None:
    for make in (sequential, functional, recurrent, subclassed):
        saved = make()
        checkpoint = manager.save_checkpoint(saved)
        make()
        again = make()
        assert not same(saved, again), make.__name__
        manager.restore(again, checkpoint_id=checkpoint)
        assert same(saved, again), make.__name__


def names_are_paths_that_begin_anew_in_each_model(manager: EnhancedCheckpointManager, _: Path) -> None:
    sequential()
    state = manager.load_checkpoint(manager.save_checkpoint(functional()))["model_state_dict"]
    kernels = [name for name in state if name.endswith("kernel")]
    inner = ["sequential/dense/kernel", "sequential/dense_1/kernel"]
    assert kernels == ["dense/kernel", "mine/kernel", *inner, "dense_1/kernel"], kernels
    picked = manager.load_checkpoint(manager.save_checkpoint(functional()), keys="model.sequential/*")
    assert len(picked["model_state_dict"]) == 4


def optimizers_go_on_as_if_they_had_never_stopped(manager: EnhancedCheckpointManager, _: Path) -> None:
    optimizers = keras.optimizers
    kinds: list[Callable[[], Any]] = [
        lambda: optimizers.SGD(0.01, momentum=0.9),
        lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), initial_scale=8.0),
        lambda: optimizers.AdamW(optimizers.schedules.CosineDecay(0.1, 30)),
        lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    ]
    keras.utils.set_random_seed(4)
    for make in kinds:
        saved, again = compiled(make()), compiled(make())
        saved.fit(x, y, batch_size=8, verbose=0)
        checkpoint = manager.save_checkpoint(saved, saved.optimizer)
        saved.fit(x, y, batch_size=8, verbose=0)
        again.optimizer.build(again.trainable_variables)
        again.evaluate(x, y, verbose=0)  # else fit() draws numbers to make the metrics
        manager.restore(again, again.optimizer, checkpoint_id=checkpoint)
        again.fit(x, y, batch_size=8, verbose=0)
        assert same(saved, again), type(saved.optimizer).__name__
        assert same(saved.optimizer, again.optimizer), type(saved.optimizer).__name__


def metrics_and_seeds_go_on(manager: EnhancedCheckpointManager, _: Path) -> None:
    def make() -> dict[str, Any]:
        return {
            "metrics": [keras.metrics.AUC(), keras.metrics.MeanSquaredError()],
            "seeds": keras.random.SeedGenerator(),
        }

    saved, again = make(), make()
    saved["metrics"][0].update_state([0, 1, 1], [0.2, 0.4, 0.9])
    saved["metrics"][1].update_state([1.0], [0.0])
    manager.restore(again, checkpoint_id=manager.save_checkpoint(saved))
    assert [float(m.result()) for m in again["metrics"]] == [float(m.result()) for m in saved["metrics"]]
    draws = [keras.ops.convert_to_numpy(keras.random.normal((3,), seed=it["seeds"])) for it in (saved, again)]
    assert np.array_equal(*draws)


def the_global_seed_generator_is_put_back(manager: EnhancedCheckpointManager, _: Path) -> None:
    keras.utils.set_random_seed(1)
    keras.random.normal((2,))
    checkpoint = manager.save_checkpoint({"epoch": 1})
    drawn = keras.ops.convert_to_numpy(keras.random.normal((3,)))
    keras.utils.set_random_seed(7)
    manager.restore({"epoch": 0}, checkpoint_id=checkpoint)
    assert np.array_equal(drawn, keras.ops.convert_to_numpy(keras.random.normal((3,))))


def what_is_not_built_says_what_to_do(manager: EnhancedCheckpointManager, _: Path) -> None:
    checkpoint = manager.save_checkpoint(subclassed())
    refusals: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UnsupportedValueError, "call it on data", lambda: manager.save_checkpoint(Net())),
        (UnsupportedValueError, "call it on data", lambda: manager.save_checkpoint(keras.Sequential([kl.Dense(3)]))),
        (StateMismatchError, "call it on data", lambda: manager.restore(Net(), checkpoint_id=checkpoint)),
        (UnsupportedValueError, "build.model.trainable", lambda: manager.save_checkpoint(x, keras.optimizers.Adam())),
    ]
    for kind, text, refused in refusals:
        with pytest.raises(kind, match=text):
            refused()


def low_precision_is_kept(manager: EnhancedCheckpointManager, _: Path) -> None:
    for policy in ("mixed_float16", "bfloat16"):
        keras.config.set_dtype_policy(policy)
        try:
            saved, again = sequential(), sequential()
            manager.restore(again, checkpoint_id=manager.save_checkpoint(saved))
            assert same(saved, again), policy
        finally:
            keras.config.set_dtype_policy("float32")


def a_part_is_restored_where_not_all_fits(manager: EnhancedCheckpointManager, _: Path) -> None:
    saved = sequential()
    checkpoint = manager.save_checkpoint(saved)
    head = keras.Sequential([keras.Input((6,)), kl.Dense(8, name="stem"), kl.Dense(5)])
    before = values(head.layers[1])
    report = manager.restore(
        head,
        checkpoint_id=checkpoint,
        strict="warn",
        rename={"model.*/dense/*": "model.*/stem/*", "model.*/dense_2/*": "model.*/dense/*"},
    )["report"]
    assert same(saved.layers[0], head.layers[0])
    assert np.array_equal(before[0], values(head.layers[1])[0])
    assert any("dense/kernel" in line for line in report["mismatched"]), report


def fit(folder: Any, epochs: int, model: Any = None, **given: Any) -> Any:
    """Train with the callback; extra arguments that ``fit`` has are for it, the rest for the callback."""
    keras.utils.set_random_seed(5)
    model = model or compiled(metrics=["mae"])
    also = given.get("also", [])
    saving = CheckpointCallback(folder, **given)
    history = model.fit(x, y, batch_size=8, epochs=epochs, validation_split=0.25, verbose=0, callbacks=[*also, saving])
    return model, history


def metrics_and_config_are_tracked_once(_: EnhancedCheckpointManager, folder: Path) -> None:
    fit(folder, 2, every_n_epochs=2)
    whole, history = fit(folder, 4, every_n_epochs=2)
    with Queries(f"sqlite:///{folder}/experiments.db") as queries:
        (run,) = queries.search_experiments()
        tracker = ExperimentTracker.resume(run.id, f"sqlite:///{folder}/experiments.db")
    points = [(point["step"], point["metric_value"]) for point in tracker.get_metrics("val_mae")]
    tracker.close()
    assert points == list(enumerate(history.history["val_mae"])), (points, history.history)
    assert history.epoch == [0, 1, 2, 3], history.epoch
    assert run.config["keras_backend"] == backend
    assert run.config["epochs"] == 4
    assert run.config["optimizer"]["class"] == "Adam"
    assert abs(run.config["optimizer"]["learning_rate"] - 0.01) < 1e-8
    straight, _history = fit(folder.with_name("straight"), 4)
    assert same(whole, straight)


def the_best_so_far_is_known_after_a_resume_and_kept(_: EnhancedCheckpointManager, folder: Path) -> None:
    class Scored(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["score"] = [0.5, 0.9, 0.6, 0.8, 0.7][epoch]

    def train(tracker: ExperimentTracker, epochs: int) -> set[tuple[int, bool]]:
        policy = KeepLast(1) | KeepBest(1, "score")
        manager = EnhancedCheckpointManager(tracker, folder, retention_policy=policy)
        keras.utils.set_random_seed(5)
        saving = CheckpointCallback(manager, tracker=tracker)
        compiled().fit(x, y, epochs=epochs, verbose=0, callbacks=[Scored(), saving])
        found = [(it["epoch"], "metrics.score" in it["best"]) for it in manager.list_checkpoints()]
        manager.close()
        tracker.close()
        return set(found)  # and what has the lowest loss

    url = f"sqlite:///{folder}.db"
    tracker = ExperimentTracker("one", database_url=url)
    assert train(tracker, 3) >= {(1, True), (2, False)}
    assert train(ExperimentTracker.resume(tracker.experiment_id, url), 5) >= {(1, True), (4, False)}


def early_stopping_counts_on_and_stays_stopped(_: EnhancedCheckpointManager, folder: Path) -> None:
    def train(where: Path, epochs: int) -> Any:
        stopping = keras.callbacks.EarlyStopping(
            "mae", patience=3, min_delta=1e6, start_from_epoch=1, restore_best_weights=True
        )
        return fit(where, epochs, also=[stopping])

    straight, history = train(folder / "straight", 9)
    assert history.epoch == [0, 1, 2, 3, 4], history.epoch
    for epochs in (2, 4, 9, 12):  # the last one finds that training has stopped
        parts, history = train(folder / "parts", epochs)
    assert history.epoch == [0, 1, 2, 3, 4], history.epoch
    assert same(straight, parts)


def a_folder_that_was_moved_is_gone_on_with(_: EnhancedCheckpointManager, folder: Path) -> None:
    fit(folder, 1)
    moved = folder.rename(folder.with_name("elsewhere"))
    _model, history = fit(moved, 3)
    assert history.epoch == [0, 1, 2]
    _model, history = fit(moved, 1, run_name="another")
    assert history.epoch == [0]


def a_background_save_holds_what_was_there_when_it_was_called(_: EnhancedCheckpointManager, folder: Path) -> None:
    tracker = ExperimentTracker("background", database_url=f"sqlite:///{folder}.db")
    manager = EnhancedCheckpointManager(tracker, folder, async_save=True, max_checkpoints=None)
    seen = {}

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen[int(self.model.optimizer.iterations)] = values(self.model)

    keras.utils.set_random_seed(5)
    model = compiled()
    model.fit(
        x, y, batch_size=8, epochs=2, verbose=0, callbacks=[Seen(), CheckpointCallback(manager, every_n_batches=1)]
    )
    found = manager.list_checkpoints()
    assert len(found) == 6, found
    for checkpoint in found:
        again = compiled()
        manager.restore(again, checkpoint_id=checkpoint["checkpoint_id"])
        pairs = zip(values(again), seen[checkpoint["step"]], strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), checkpoint["step"]
    manager.close()
    tracker.close()


def a_corrupt_checkpoint_is_passed_over(_: EnhancedCheckpointManager, folder: Path) -> None:
    fit(folder, 2)
    newest = max((folder / "checkpoints").glob("*/*/model.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    model, history = fit(folder, 3)
    assert history.epoch == [0, 1, 2], history.epoch
    straight, _history = fit(folder.with_name("sound"), 3)
    assert same(model, straight)


def any_checkpoint_or_none_is_begun_with(_: EnhancedCheckpointManager, folder: Path) -> None:
    fit(folder, 3)
    with Queries(f"sqlite:///{folder}/experiments.db") as queries:
        first = queries.search_checkpoints("epoch == 0")[0].id
    _model, history = fit(folder, 2, resume=first)
    assert history.epoch == [0, 1]
    _model, history = fit(folder, 1, resume=False)
    assert history.epoch == [0]
    with Queries(f"sqlite:///{folder}/experiments.db") as queries:
        assert len(queries.search_experiments()) == 2


def interrupted(folder: Path, **given: Any) -> None:
    """Train until the second of three batches, and leave a checkpoint there."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                raise KeyboardInterrupt

    keras.utils.set_random_seed(5)
    saving = CheckpointCallback(folder, every_n_batches=1, **given)
    callbacks = [*given.get("also", []), saving, Stop()]
    with pytest.raises(KeyboardInterrupt):
        compiled(metrics=["mae"]).fit(x[:18], y[:18], batch_size=8, verbose=0, callbacks=callbacks)
    saving.manager.close()
    saving.tracker.close()


def other_callbacks_count_each_batch_once(_: EnhancedCheckpointManager, folder: Path) -> None:
    class Counted(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seen += 1

    interrupted(folder, also=[Counted()])
    counted = Counted()
    fit(folder, 2, also=[counted])
    assert counted.seen == 6, counted.seen


def what_cannot_be_gone_on_with_is_refused(_: EnhancedCheckpointManager, folder: Path) -> None:
    interrupted(folder)
    with pytest.raises(ConfigurationError, match="metrics of the model"):
        fit(folder, 2, compiled(metrics=["mae", "mse"]))
    _model, history = fit(folder, 2)
    assert history.epoch == [0, 1]
    if backend == "tensorflow":  # the others build it when fit is called
        unbuilt = keras.Sequential([kl.Dense(2)])
        unbuilt.compile("adam", "mse")
        with pytest.raises(ConfigurationError, match="not built yet"):
            fit(folder, 3, unbuilt)
    for arguments in ({"every_n_batches": 0}, {"every_n_epochs": True}, {"tracker": object()}, {"resume": None}):
        with pytest.raises(ConfigurationError):
            CheckpointCallback(folder, **arguments)


def a_checkpoint_is_left_for_the_other_backends(_: EnhancedCheckpointManager, folder: Path) -> None:
    keras.utils.set_random_seed(8)
    model = compiled()
    model.fit(x, y, verbose=0)
    shared = shared_manager(backend)
    shared.save_checkpoint(model, model.optimizer, extra_state={"seeds": keras.random.SeedGenerator(11)})
    shared.close()
    np.savez(root / f"{backend}.npz", *values(model), *values(model.optimizer))


def shared_manager(whose: str) -> EnhancedCheckpointManager:
    url = f"sqlite:///{root}/{whose}.db"
    if not (root / f"{whose}.db").exists():
        return EnhancedCheckpointManager(ExperimentTracker(whose, database_url=url), root / f"of {whose}")
    with Queries(url) as queries:
        (run,) = queries.search_experiments()
    return EnhancedCheckpointManager(ExperimentTracker.resume(run.id, url), root / f"of {whose}")


def check_other(whose: str) -> None:
    model, seeds = compiled(), keras.random.SeedGenerator(1)
    model.optimizer.build(model.trainable_variables)
    manager = shared_manager(whose)
    manager.restore(model, model.optimizer, extra_state={"seeds": seeds})
    with np.load(root / f"{whose}.npz") as saved:
        for mine, theirs in zip([*values(model), *values(model.optimizer)], saved.values(), strict=True):
            assert np.array_equal(mine, theirs), whose
    assert keras.ops.convert_to_numpy(seeds.state.value).tolist() == [11, 0]
    manager.close()
    model.fit(x, y, verbose=0)


CHECKS: list[Check] = [
    models_of_every_kind_whose_automatic_names_have_counted_on,
    names_are_paths_that_begin_anew_in_each_model,
    optimizers_go_on_as_if_they_had_never_stopped,
    metrics_and_seeds_go_on,
    the_global_seed_generator_is_put_back,
    what_is_not_built_says_what_to_do,
    low_precision_is_kept,
    a_part_is_restored_where_not_all_fits,
    metrics_and_config_are_tracked_once,
    the_best_so_far_is_known_after_a_resume_and_kept,
    early_stopping_counts_on_and_stays_stopped,
    a_folder_that_was_moved_is_gone_on_with,
    a_background_save_holds_what_was_there_when_it_was_called,
    a_corrupt_checkpoint_is_passed_over,
    any_checkpoint_or_none_is_begun_with,
    other_callbacks_count_each_batch_once,
    what_cannot_be_gone_on_with_is_refused,
    a_checkpoint_is_left_for_the_other_backends,
]


def main() -> None:
    warnings.simplefilter("ignore")
    if len(sys.argv) > 3:
        for whose in sys.argv[3].split(","):
            check_other(whose)
        return
    told: dict[str, str | None] = {}
    for check in CHECKS:
        folder = root / backend / check.__name__
        tracker = ExperimentTracker(check.__name__, database_url=f"sqlite:///{root}/{backend}-checks.db")
        manager = EnhancedCheckpointManager(tracker, root / backend / "objects", max_checkpoints=None)
        try:
            folder.mkdir(parents=True)
            check(manager, folder / "run")
            told[check.__name__] = None
        except Exception:  # noqa: BLE001 - the test tells of it
            told[check.__name__] = traceback.format_exc()
        manager.close()
        tracker.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
