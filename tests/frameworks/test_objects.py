"""Training objects of PyTorch, JAX, Flax and scikit-learn beyond those of the matrix, one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from time import struct_time
from typing import Any

import pytest
from helpers_storage import Store, exact

from model_checkpoint.errors import StateMismatchError, UnsupportedValueError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


class TestTorch:
    SCHEDULERS = (
        *("LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR"),
        *("PolynomialLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"),
        *("ReduceLROnPlateau", "SequentialLR", "ChainedScheduler"),
    )
    OPTIMIZERS = (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD", "SparseAdam"),
    )

    @staticmethod
    def scheduler(torch: Any, name: str, optimizer: Any) -> Any:
        kinds = torch.optim.lr_scheduler
        options: dict[str, Any] = {
            "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
            "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
            "StepLR": {"step_size": 2},
            "MultiStepLR": {"milestones": [2, 3]},
            "ExponentialLR": {"gamma": 0.9},
            "CosineAnnealingLR": {"T_max": 5},
            "CosineAnnealingWarmRestarts": {"T_0": 2},
            "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
            "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
        }
        if name in ("SequentialLR", "ChainedScheduler"):
            parts = [kinds.ConstantLR(optimizer), kinds.ExponentialLR(optimizer, 0.9)]
            return (
                kinds.SequentialLR(optimizer, parts, [2]) if name == "SequentialLR" else kinds.ChainedScheduler(parts)
            )
        return getattr(kinds, name)(optimizer, **options.get(name, {}))

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_every_scheduler_goes_on_where_it_was(self, store: Store, name: str) -> None:
        torch = pytest.importorskip("torch")

        def make() -> tuple[Any, Any]:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.05, momentum=0.9)
            return optimizer, self.scheduler(torch, name, optimizer)

        def go_on(optimizer: Any, scheduler: Any) -> list[float]:
            rates = []
            for _ in range(4):
                optimizer.step()
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                rates.append(optimizer.param_groups[0]["lr"])
            return rates

        optimizer, scheduler = make()
        go_on(optimizer, scheduler)
        store.save({}, optimizer, scheduler)
        expected = go_on(optimizer, scheduler)
        fresh = make()
        store.manager.restore(optimizer=fresh[0], scheduler=fresh[1])
        assert go_on(*fresh) == expected

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("trained", [True, False])
    def test_every_optimizer_goes_on_where_it_was(self, store: Store, name: str, trained: bool) -> None:
        torch = pytest.importorskip("torch")

        def make(seed: int) -> tuple[Any, Any]:
            torch.manual_seed(seed)
            sparse = name == "SparseAdam"
            model = torch.nn.Embedding(5, 3, sparse=sparse) if sparse else torch.nn.Linear(3, 2)
            return model, getattr(torch.optim, name)(model.parameters())

        def go_on(model: Any, optimizer: Any) -> None:
            for step in range(3):
                rows = torch.tensor([step, 4]) if name == "SparseAdam" else torch.full((2, 3), float(step))

                def loss(rows: Any = rows) -> Any:
                    optimizer.zero_grad()
                    value = model(rows).square().sum()
                    value.backward()
                    return value

                optimizer.step(loss)

        model, optimizer = make(1)
        go_on(model, optimizer)
        store.save(model, optimizer)
        go_on(model, optimizer)
        target = make(2)
        if trained:
            go_on(*target)
        store.manager.restore(*target)
        go_on(*target)
        assert exact(target[0].state_dict()) == exact(model.state_dict())
        assert exact(target[1].state_dict()) == exact(optimizer.state_dict())

    def test_moments_for_parameters_of_another_shape_are_told_and_left_out(self, store: Store) -> None:
        torch = pytest.importorskip("torch")

        def make(classes: int, steps: int) -> tuple[Any, Any]:
            model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, classes))
            optimizer = torch.optim.AdamW(model.parameters())
            for _ in range(steps):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            return model, optimizer

        store.save(*make(1, steps=2))
        model, optimizer = make(5, steps=0)
        with pytest.raises(StateMismatchError, match=r"optimizer: exp_avg of shape \[1, 3\] was saved for parameter 2"):
            store.manager.restore(optimizer=optimizer)
        report = store.manager.restore(model, optimizer, strict="skip")["report"]
        assert [line.partition(":")[0] for line in report["mismatched"]] == [
            "model.1.weight",
            "model.1.bias",
            "optimizer",
        ]
        assert not optimizer.state_dict()["state"]
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    @pytest.mark.parametrize(
        ("saved", "target"), [("AdamW", "SGD"), ("SGD", "AdamW"), ("AdamW", "RMSprop"), ("Adagrad", "Adam")]
    )
    def test_an_optimizer_or_scheduler_of_another_class_is_refused(self, store: Store, saved: str, target: str) -> None:
        torch = pytest.importorskip("torch")
        parameter = torch.nn.Parameter(torch.ones(1))
        first, other = (getattr(torch.optim, name)([parameter], lr=0.1) for name in (saved, target))
        store.save({}, first, self.scheduler(torch, "StepLR", first))
        with pytest.raises(StateMismatchError, match="optimizer: one of another class was saved"):
            store.manager.restore(optimizer=other)
        with pytest.raises(StateMismatchError, match=r"scheduler: one of another class was saved: it has .*step_size"):
            store.manager.restore(scheduler=self.scheduler(torch, "CosineAnnealingLR", other))

    def test_an_optimizer_takes_what_schedulers_users_and_versions_have_added_or_left_out(self, store: Store) -> None:
        torch = pytest.importorskip("torch")
        parameter = torch.nn.Parameter(torch.ones(2))

        def make(**more: Any) -> Any:
            return torch.optim.Adam([{"params": [parameter], **more}])

        saved = make(layer_name="a")
        torch.optim.lr_scheduler.OneCycleLR(saved, 0.1, total_steps=4)
        state = saved.state_dict()
        del state["param_groups"][0]["decoupled_weight_decay"]  # as an older version
        store.save({}, state)
        for target in (make(), make(other="b")):
            assert store.manager.restore(optimizer=target)["report"]["mismatched"] == []
            assert "max_lr" in target.param_groups[0]

        class Layerwise(torch.optim.Optimizer):
            def __init__(self) -> None:
                super().__init__([parameter], {"rate": 1.0})
                self.state[parameter]["exp_avg"] = torch.ones(7)

        store.save({}, Layerwise())
        target = Layerwise()
        target.state[parameter]["exp_avg"].zero_()
        store.manager.restore(optimizer=target)
        assert target.state[parameter]["exp_avg"].tolist() == [1.0] * 7

    def test_a_gan_is_two_models_and_two_optimizers_in_lists_and_dicts(self, store: Store) -> None:
        torch = pytest.importorskip("torch")

        def make(seed: int) -> tuple[Any, Any]:
            torch.manual_seed(seed)
            models = {"generator": torch.nn.Linear(2, 2), "critic": torch.compile(torch.nn.Linear(2, 1))}
            return models, [torch.optim.Adam(model.parameters()) for model in models.values()]

        saved, target = make(1), make(2)
        for optimizer in saved[1]:
            optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
            optimizer.step()
        store.save(*saved)
        store.manager.restore(*target)
        for name in saved[0]:
            assert exact(target[0][name].state_dict()) == exact(saved[0][name].state_dict())
        assert exact([each.state_dict() for each in target[1]]) == exact([each.state_dict() for each in saved[1]])

    @pytest.mark.parametrize("workers", [0, 2])
    def test_torchdatas_loader_goes_on_in_the_middle_of_a_shuffled_epoch(self, store: Store, workers: int) -> None:
        torch = pytest.importorskip("torch")
        loaders = pytest.importorskip("torchdata.stateful_dataloader")

        def make() -> Any:
            return loaders.StatefulDataLoader(list(range(20)), batch_size=3, shuffle=True, num_workers=workers)

        torch.manual_seed(1)
        loader = make()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        store.save({}, extra_state={"loader": loader})
        expected = [batch.tolist() for batch in batches] + [batch.tolist() for batch in loader]
        torch.manual_seed(2)
        fresh = make()
        store.manager.restore(extra_state={"loader": fresh})
        assert [batch.tolist() for batch in fresh] + [batch.tolist() for batch in fresh] == expected

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("seen", [0, 3, 7])
    def test_any_loader_of_torchs_goes_on_in_the_middle_of_a_shuffled_epoch(
        self, store: Store, workers: int, seen: int
    ) -> None:
        torch = pytest.importorskip("torch")
        from model_checkpoint.integrations.pytorch import ResumableLoader

        def make() -> Any:
            return ResumableLoader(
                torch.utils.data.DataLoader(list(range(20)), batch_size=3, shuffle=True, num_workers=workers)
            )

        torch.manual_seed(1)
        loader = make()
        batches = iter(loader)
        for _ in range(seen):
            next(batches)
        store.save({}, extra_state=loader)
        rest = list(batches) if seen else []
        expected = [batch.tolist() for batch in rest] + [batch.tolist() for batch in loader]
        torch.manual_seed(2)
        fresh = make()
        store.manager.restore(extra_state=fresh)
        again = [batch.tolist() for batch in fresh] + ([batch.tolist() for batch in fresh] if seen else [])
        assert again == expected

    def test_a_ddp_module_is_saved_by_the_names_of_the_module_in_it(self, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        done = subprocess.run(
            [sys.executable, "-c", DDP, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        assert done.stdout.split() == ["weight", "bias", "True"], done.stderr


DDP = """
import sys, torch
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
folder = sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
tracker = ExperimentTracker("ddp", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c")
wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
manager.save_checkpoint(torch.compile(wrapped))
print(*manager.load_checkpoint()["model_state_dict"])
plain = torch.nn.Linear(2, 2)
manager.restore(plain)
again = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
manager.restore(again)
print(torch.equal(plain.weight, wrapped.module.weight) and torch.equal(again.module.bias, plain.bias))
torch.distributed.destroy_process_group()
"""


class TestJax:
    def test_a_class_of_ones_own_that_is_a_pytree_comes_back_with_what_it_has_besides_arrays(
        self, store: Store
    ) -> None:
        jax = pytest.importorskip("jax")

        @jax.tree_util.register_pytree_with_keys_class
        class Layer:
            def __init__(self, w: Any, name: str) -> None:
                self.w, self.name = w, name

            def tree_flatten_with_keys(self) -> Any:
                return [(jax.tree_util.GetAttrKey("w"), self.w)], self.name

            @classmethod
            def tree_unflatten(cls, name: str, children: Any) -> Any:
                return cls(*children, name)

        store.save({"layers": [Layer(jax.numpy.arange(3.0), "saved"), None]})
        target = {"layers": [Layer(jax.numpy.zeros(3), "mine"), None]}
        store.manager.restore(target)
        layer = target["layers"][0]
        assert (type(layer), layer.name, layer.w.tolist()) == (Layer, "mine", [0.0, 1.0, 2.0])
        with pytest.raises(
            StateMismatchError, match=r"model\.layers\.0\.w: float32\[3\] was saved, there is float32\[2"
        ):
            store.manager.restore({"layers": [Layer(jax.numpy.zeros(2), "mine"), None]})

    def test_arrays_go_back_to_the_devices_where_those_of_the_target_are(self, tmp_path: Path) -> None:
        pytest.importorskip("jax")
        done = subprocess.run(
            [sys.executable, "-c", SHARDED, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        assert done.stdout.split() == ["4", "True", "1", "True"], done.stderr

    def test_optax_states_come_back_as_themselves_with_a_template(self, store: Store) -> None:
        jax = pytest.importorskip("jax")
        optax = pytest.importorskip("optax")
        params = {"w": jax.numpy.ones((3, 2)), "b": jax.numpy.zeros(2)}
        chains = {
            "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 9))),
            "parts": optax.partition({"a": optax.sgd(0.1, momentum=0.9), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}),
            "averaged": optax.chain(optax.lion(0.1), optax.ema(0.9)),
            "schedule": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
            "steps": optax.MultiSteps(optax.adam(0.1), 2),
            "whole": optax.apply_if_finite(optax.adafactor(0.1), 3),
        }
        for name, chain in chains.items():
            state, grads = chain.init(params), jax.tree.map(jax.numpy.ones_like, params)
            for _ in range(3):
                _, state = chain.update(grads, state, params)
            store.save(params, state)
            restored = store.manager.restore(optimizer=chain.init(params))["optimizer"]
            assert jax.tree.structure(restored) == jax.tree.structure(state), name
            assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, restored, state)), name
            chain.update(grads, restored, params)


SHARDED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
folder = sys.argv[1]
tracker = ExperimentTracker("sharded", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c")
rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
manager.save_checkpoint({"w": jax.device_put(np.arange(8.0, dtype="float32"), rows), "free": jax.numpy.ones(2)})
target = {"w": jax.device_put(np.zeros(8, dtype="float32"), rows), "free": jax.numpy.zeros(2)}
manager.restore(target)
print(len(target["w"].sharding.device_set), target["w"].sharding == rows)
print(len(target["free"].sharding.device_set), (target["w"][:2] + target["free"]).tolist() == [1.0, 2.0])
"""


class TestFlax:
    def test_streams_of_random_keys_go_on_where_they_were(self, store: Store) -> None:
        nnx = pytest.importorskip("flax.nnx")
        saved, target = nnx.Rngs(0, dropout=1), nnx.Rngs(5, dropout=6)
        saved.dropout()
        store.save({}, extra_state={"rngs": saved})
        store.manager.restore(extra_state={"rngs": target})
        import jax

        for stream in ("dropout", "default"):
            drawn = [jax.random.key_data(getattr(rngs, stream)()).tolist() for rngs in (saved, target)]
            assert drawn[0] == drawn[1]

    def test_a_shared_layer_is_stored_once_and_stays_shared(self, store: Store) -> None:
        nnx = pytest.importorskip("flax.nnx")

        class Tied(nnx.Module):
            def __init__(self, rngs: Any) -> None:
                self.first = nnx.Linear(2, 2, rngs=rngs)
                self.again = self.first

        saved, target = Tied(nnx.Rngs(0)), Tied(nnx.Rngs(1))
        loaded = store.load(store.save(saved))["model_state_dict"]
        assert len(loaded) == 1
        store.manager.restore(target)
        assert target.again is target.first
        assert (target.first.kernel[...] == saved.first.kernel[...]).all()

    def test_a_module_with_another_layer_takes_the_rest(self, store: Store) -> None:
        nnx = pytest.importorskip("flax.nnx")

        class Net(nnx.Module):
            def __init__(self, width: int, seed: int) -> None:
                self.body = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
                self.head = nnx.Linear(3, width, rngs=nnx.Rngs(seed))

        saved, target = Net(2, 1), Net(5, 2)
        kept = target.head.kernel[...]
        store.save(saved)
        with pytest.raises(StateMismatchError, match=r"model\.head\.kernel: float32\[3, 2\] was saved"):
            store.manager.restore(target)
        report = store.manager.restore(target, strict="skip")["report"]
        assert [line.partition(":")[0] for line in report["mismatched"]] == ["model.head.bias", "model.head.kernel"]
        assert (target.body.kernel[...] == saved.body.kernel[...]).all()
        assert (target.head.kernel[...] == kept).all()


ESTIMATORS = """
from sklearn.ensemble import RandomForestClassifier as Forest
from sklearn.linear_model import SGDRegressor
x, y = [[i / 30, i % 3 / 7] for i in range(30)], [i % 2 for i in range(30)]
made = {"forest": Forest(3, random_state=1).fit(x, y), "sgd": SGDRegressor(random_state=0).fit(x, y)}
"""
SAVE = """
import hashlib, sys
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
with ExperimentTracker("other", database_url=sys.argv[1]) as tracker:
    manager = EnhancedCheckpointManager(tracker, sys.argv[2])
    state = manager.load_checkpoint(manager.save_checkpoint(made))["model_state_dict"]
    print(*(hashlib.sha256(state[name]["skops"]).hexdigest() for name in ("forest", "sgd")))
"""


class TestSklearn:
    def test_a_pipeline_comes_back_and_the_file_is_one_that_skops_reads(self, store: Store) -> None:
        sklearn = pytest.importorskip("sklearn")
        skops = pytest.importorskip("skops.io")
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        x, y = [[float(i), float(i % 3)] for i in range(30)], [i % 2 for i in range(30)]
        saved = make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=1)).fit(x, y)
        loaded = store.load(store.save(saved))["model_state_dict"]
        read = skops.loads(loaded["skops"], trusted=["sklearn.tree._tree.Tree"])
        assert (read.predict(x) == saved.predict(x)).all()
        target = make_pipeline(StandardScaler(), RandomForestClassifier(2))
        assert store.manager.restore(target)["model"] is target
        assert (target.predict_proba(x) == saved.predict_proba(x)).all()
        assert sklearn.base.is_classifier(target)

    def test_an_estimator_that_did_not_change_is_saved_as_the_same_bytes(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        skops = pytest.importorskip("skops.io")
        names: dict[str, Any] = {}
        exec(ESTIMATORS, names)
        saved = store.save(names["made"])
        with monkeypatch.context() as patch:
            patch.setattr("time.localtime", lambda *_: struct_time((2001, 2, 3, 4, 5, 6, 5, 34, 0)))
            later = store.save(names["made"])
        assert store.manager.diff(saved, later).same_state
        state = store.load(saved)["model_state_dict"]
        command = [sys.executable, "-c", ESTIMATORS + SAVE, store.url, str(store.folder)]
        told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert told.split() == [sha256(state[name]["skops"]).hexdigest() for name in ("forest", "sgd")]

        target = {"forest": names["Forest"](), "sgd": names["SGDRegressor"]()}
        store.manager.restore(target, checkpoint_id=saved)
        assert store.manager.diff(saved, store.save(target)).same_state
        assert (target["forest"].predict(names["x"]) == names["made"]["forest"].predict(names["x"])).all()
        read = skops.loads(state["sgd"]["skops"])
        assert (read.coef_ == names["made"]["sgd"].coef_).all()

    def test_objects_that_are_not_known_to_be_safe_are_named_and_not_made(self, store: Store) -> None:
        pytest.importorskip("skops")
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer

        store.save(make_pipeline(FunctionTransformer(Own().method)), extra_state={"beside": bytearray(b"new")})
        target, beside = make_pipeline(FunctionTransformer()), {"beside": bytearray(b"old")}
        with pytest.raises(StateMismatchError, match=r"model: it holds objects of .*Own"):
            store.manager.restore(target, extra_state=beside)
        assert target[0].func is None
        assert beside == {"beside": bytearray(b"old")}
        store.manager.restore(extra_state=beside)
        assert beside == {"beside": bytearray(b"new")}

    def test_classes_that_the_target_has_as_parts_are_its_users_own(self, store: Store) -> None:
        pytest.importorskip("skops")
        from sklearn.base import BaseEstimator
        from sklearn.pipeline import make_pipeline

        class Scaling(BaseEstimator):
            def __init__(self, factor: float = 1.0) -> None:
                self.factor = factor

        globals()["Scaling"], Scaling.__qualname__ = Scaling, "Scaling"
        store.save(make_pipeline(Scaling(3.0)))
        target = make_pipeline(Scaling())
        store.manager.restore(target)
        assert target[0].factor == 3.0

    def test_an_estimator_of_another_class_is_refused(self, store: Store) -> None:
        pytest.importorskip("skops")
        from sklearn.linear_model import LinearRegression, Ridge

        store.save(Ridge().fit([[1.0], [2.0]], [1.0, 2.0]))
        target = LinearRegression()
        with pytest.raises(StateMismatchError, match="a Ridge was saved, there is a LinearRegression"):
            store.manager.restore(target)
        assert not hasattr(target, "coef_")

    def test_an_xgboost_estimator_that_is_not_fitted_cannot_be_saved_and_can_be_filled(self, store: Store) -> None:
        xgboost = pytest.importorskip("xgboost")
        with pytest.raises(UnsupportedValueError, match="it is not fitted"):
            store.save(xgboost.XGBClassifier())
        x, y = [[float(i)] for i in range(20)], [i % 2 for i in range(20)]
        saved = xgboost.XGBClassifier(n_estimators=3).fit(x, y)
        store.save(saved)
        target = xgboost.XGBClassifier()
        store.manager.restore(target)
        assert (target.predict_proba(x) == saved.predict_proba(x)).all()
        assert target.get_params()["n_estimators"] == 3


class Own:
    def method(self, x: Any) -> Any:
        return x
