"""Checkpoints that Lightning, Orbax, PyTorch DCP and transformers write are adopted, and damaged ones refused."""

from __future__ import annotations

import argparse
import enum
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ConfigurationError, FormatError

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> EnhancedCheckpointManager:
    return EnhancedCheckpointManager(tracker, tmp_path / "c")


def equal(left: Any, right: Any) -> bool:
    """Whether two states are the same, arrays bit for bit."""
    if isinstance(left, torch.Tensor) or hasattr(left, "tobytes"):
        left, right = (x if isinstance(x, torch.Tensor) else np.asarray(x) for x in (left, right))
        same = (left.dtype, left.shape) == (right.dtype, right.shape)
        return bool(
            same and (left.equal(right) if isinstance(left, torch.Tensor) else left.tobytes() == right.tobytes())
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def nothing_left(manager: EnhancedCheckpointManager, folder: Path) -> bool:
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != ".engine"]
    return manager.list_checkpoints() == [] and files == []


# Lightning


def lightning_file(folder: Path, **hyper_parameters: Any) -> Path:
    """Train for two epochs, and return what ModelCheckpoint wrote."""
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.layers(batch[0]).square().mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=4)
    callback = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="net", monitor="train_loss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=2,
            callbacks=[callback],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(Net(**hyper_parameters), loader)
    return Path(callback.best_model_path)


@pytest.mark.parametrize("copy", [True, False])
def test_nothing_of_a_lightning_checkpoint_is_lost(
    manager: EnhancedCheckpointManager, tmp_path: Path, copy: bool
) -> None:
    path = lightning_file(tmp_path, width=4, name="net")
    content = torch.load(path, weights_only=True)
    loaded = manager.load_checkpoint(manager.import_checkpoint(path, copy=copy))
    assert equal(loaded["model_state_dict"], content["state_dict"])
    assert equal([loaded["optimizer_state_dict"]], content["optimizer_states"])
    assert equal([loaded["scheduler_state_dict"]], content["lr_schedulers"])
    assert (loaded["epoch"], loaded["step"]) == (content["epoch"], content["global_step"])
    homes = {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"}
    assert equal(loaded["extra_state"], {key: value for key, value in content.items() if key not in homes})
    assert loaded["extra_state"]["hyper_parameters"] == {"width": 4, "name": "net"}
    assert {"loops", "callbacks"} <= loaded["extra_state"].keys()


class Settings:
    pass


def test_hyper_parameters_without_a_safe_form_are_left_out_and_named(
    manager: EnhancedCheckpointManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = lightning_file(tmp_path, width=4, settings=Settings())
    with pytest.raises(ConfigurationError, match=r"Settings.*trust=True"):
        manager.import_checkpoint(path)
    assert nothing_left(manager, tmp_path / "c")
    loaded = manager.load_checkpoint(manager.import_checkpoint(path, trust=True))
    assert loaded["extra_state"]["hyper_parameters"] == {"width": 4}
    assert "extra_state.hyper_parameters.settings" in caplog.text
    assert "hyper_parameters.settings" in manager.list_checkpoints()[0]["notes"]


# Orbax


def arrays() -> dict[str, Any]:
    jnp = pytest.importorskip("jax.numpy")
    weights = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
    return {"layer": weights, "list": [np.arange(3), np.float32(2.5) * np.ones(())], "count": 3}


@pytest.mark.parametrize("how", ["standard", "tree", "zarr", "step", "item"])
def test_orbax_checkpoints_come_in_whole(manager: EnhancedCheckpointManager, tmp_path: Path, how: str) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    state, path = arrays(), tmp_path / "orbax"
    if how in ("standard", "tree"):
        with (ocp.StandardCheckpointer if how == "standard" else ocp.PyTreeCheckpointer)() as checkpointer:
            checkpointer.save(path, state)
    elif how == "zarr":
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(path, state)
    else:
        save = ocp.args.StandardSave(state)
        if how == "item":
            save = ocp.args.Composite(state=save, about=ocp.args.JsonSave({"seed": 1}))
        with ocp.CheckpointManager(path) as steps:
            steps.save(3, args=save)
            steps.wait_until_finished()
        path = path / "3"
    loaded = manager.load_checkpoint(manager.import_checkpoint(path))
    expected = {**state, "about": {"seed": 1}} if how == "item" else state
    assert equal(loaded["model_state_dict"], expected)
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(path, copy=False)


MANY_DEVICES = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 4
parts = NamedSharding(mesh, PartitionSpec("x"))
whole = NamedSharding(mesh, PartitionSpec())
state = {"w": jax.device_put(np.arange(32.0).reshape(8, 4), parts), "count": jax.device_put(np.int32(7), whole), "n": 3}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], state)
"""


def test_arrays_of_devices_that_are_not_here_come_into_host_memory(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    pytest.importorskip("orbax.checkpoint")
    options = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MANY_DEVICES, str(tmp_path / "orbax")]
    subprocess.run(command, env={**os.environ, **options}, check=True, timeout=120)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "orbax"))["model_state_dict"]
    assert equal(loaded, {"w": np.arange(32, dtype="float32").reshape(8, 4), "count": np.int32(7), "n": 3})
    assert isinstance(loaded["w"], np.ndarray)


def test_a_train_state_of_flax_is_sorted_into_parts(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    optax = pytest.importorskip("optax")
    train_state = pytest.importorskip("flax.training.train_state")
    params = arrays()["layer"]
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(step=5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "orbax"))
    assert equal(loaded["model_state_dict"], params)
    assert equal(loaded["optimizer_state_dict"][0]["mu"], state.opt_state[0].mu)
    assert loaded["step"] == 5


def harm_orbax(path: Path, how: str) -> None:
    data = sorted(p for p in path.rglob("d/*") if p.is_file())
    if how == "cut":
        for file in data:
            file.write_bytes(file.read_bytes()[:-20])
    elif how == "lost":
        for file in data:
            file.unlink()
    elif how == "pipe":
        os.mkfifo(data[-1].parent / "pipe")
    elif how == "link":
        data[-1].rename(path.parent / "secret")
        data[-1].symlink_to(path.parent / "secret")
    else:
        (path / "_METADATA").write_text("{" if how == "metadata" else json.dumps({"tree_metadata": {}}))


@pytest.mark.parametrize("how", ["cut", "lost", "pipe", "link", "metadata", "tree"])
def test_damaged_orbax_checkpoints_are_refused(manager: EnhancedCheckpointManager, tmp_path: Path, how: str) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", arrays())
    harm_orbax(tmp_path / "orbax", how)
    with pytest.raises(FormatError):
        manager.import_checkpoint(tmp_path / "orbax")
    assert nothing_left(manager, tmp_path / "c")


def test_orbax_arrays_without_their_chunks_are_refused(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "orbax", arrays())
    (tmp_path / "orbax" / "layer.w" / "0.0").unlink()
    with pytest.raises(FormatError, match=r"layer\.w"):
        manager.import_checkpoint(tmp_path / "orbax")


# DCP


def trained() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def save_dcp(state: dict[str, Any], path: Path, **options: Any) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)


@pytest.mark.parametrize("one_file", [True, False])
def test_a_dcp_checkpoint_comes_in_and_its_optimizer_goes_on(
    manager: EnhancedCheckpointManager, tmp_path: Path, one_file: bool
) -> None:
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 4,
        "more": [torch.ones(2), {"a": (1, 2)}],
    }
    save_dcp(state, tmp_path / "dcp", single_file_per_rank=one_file)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp"))
    assert equal(loaded["model_state_dict"], dict(model.state_dict()))
    assert equal(loaded["optimizer_state_dict"], optimizer.state_dict())
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    assert loaded["epoch"] == 4
    assert equal(loaded["extra_state"], {"more": state["more"]})
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path / "dcp", copy=False)


def test_a_flat_dcp_layout_without_the_planners_notes_is_sorted_by_its_names(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    model, optimizer = trained()
    save_dcp({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "epoch": 4}, tmp_path / "dcp")

    def forget(metadata: Any) -> None:
        metadata.planner_data = None

    rewrite_metadata(tmp_path / "dcp", forget)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp"))
    assert equal(loaded["model_state_dict"], dict(model.state_dict()))
    assert equal(loaded["optimizer_state_dict"]["1.exp_avg"], optimizer.state_dict()["state"][1]["exp_avg"])
    assert loaded["epoch"] == 4


def test_items_of_a_dcp_checkpoint_that_need_more_say_so(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    save_dcp({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "dcp")
    with pytest.raises(ConfigurationError, match=r"args.*argparse\.Namespace.*trust=True"):
        manager.import_checkpoint(tmp_path / "dcp")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp", trust=True))
    assert loaded["extra_state"] == {"args": {"lr": 0.1}}


def test_flat_dcp_keys_stay_as_they_are(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model, _ = trained()
    save_dcp({f"model.{key}": value for key, value in model.state_dict().items()}, tmp_path / "dcp")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp"))
    assert equal(loaded["model_state_dict"], {f"model.{key}": value for key, value in model.state_dict().items()})


def rewrite_metadata(path: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 - this test wrote it
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_tensor_of_several_ranks_is_put_together(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    """Two tensors of one rank each become the halves of one, as a DTensor of two ranks is stored."""
    metadata_of = pytest.importorskip("torch.distributed.checkpoint.metadata")
    whole = torch.arange(12.0).view(4, 3)
    save_dcp({"a": whole[:2].clone(), "b": whole[2:].clone()}, tmp_path / "dcp")

    def join(metadata: Any) -> None:
        chunks = [metadata_of.ChunkStorageMetadata(torch.Size([i, 0]), torch.Size([2, 3])) for i in (0, 2)]
        properties = metadata.state_dict_metadata["a"].properties
        metadata.state_dict_metadata = {"w": metadata_of.TensorStorageMetadata(properties, whole.shape, chunks)}
        infos = {index.fqn: info for index, info in metadata.storage_data.items()}
        places = {"a": [0, 0], "b": [2, 0]}
        metadata.storage_data = {metadata_of.MetadataIndex("w", places[k]): info for k, info in infos.items()}
        metadata.planner_data = {"w": ("w",)}

    rewrite_metadata(tmp_path / "dcp", join)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp"))
    assert equal(loaded["model_state_dict"], {"w": whole})

    def overlap(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].chunks[1].offsets = torch.Size([1, 0])
        (first, info), (_, other) = metadata.storage_data.items()
        metadata.storage_data = {first: info, metadata_of.MetadataIndex("w", [1, 0]): other}

    shutil.copytree(tmp_path / "dcp", tmp_path / "overlap")
    rewrite_metadata(tmp_path / "overlap", overlap)
    with pytest.raises(FormatError, match="overlap"):
        manager.import_checkpoint(tmp_path / "overlap")

    def lie(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].size = torch.Size([10**6, 10**6])

    rewrite_metadata(tmp_path / "dcp", lie)
    with pytest.raises(FormatError, match="do not make"):
        manager.import_checkpoint(tmp_path / "dcp")


def test_a_sharded_checkpoint_of_lightning_is_one_of_lightning(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    """Its strategies write model and optimizers with DCP, and the rest beside them (FSDPStrategy.save_checkpoint)."""
    path = lightning_file(tmp_path, width=4)
    content = torch.load(path, weights_only=True)
    expected = manager.load_checkpoint(manager.import_checkpoint(path))
    states = content.pop("optimizer_states")
    sharded = {"model": content.pop("state_dict"), **{f"optimizer_{i}": state for i, state in enumerate(states)}}
    save_dcp(sharded, tmp_path / "sharded")
    torch.save(content, tmp_path / "sharded" / "meta.pt")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "sharded"))
    for name in ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "extra_state", "epoch", "step"):
        assert equal(loaded[name], expected[name]), name


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class EnumsByGetattr(pickle.Pickler):
    """Pickles members of an Enum as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_a_dcp_checkpoint_that_python_3_11_2_wrote_comes_in(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model = trained()[0]
    save_dcp({"model": model.state_dict()}, tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())  # noqa: S301 - this test wrote it
    with open(tmp_path / "dcp" / ".metadata", "wb") as file:
        EnumsByGetattr(file, 4).dump(metadata)
    assert b"getattr" in (tmp_path / "dcp" / ".metadata").read_bytes()
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "dcp"))
    assert equal(loaded["model_state_dict"], dict(model.state_dict()))


def harm_dcp(path: Path, how: str) -> None:
    if how == "getattr":
        (path / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nVmro\ntR.")
    elif how == "code":
        (path / ".metadata").write_bytes(pickle.dumps(Evil(path.parent / "owned")))
    elif how == "class":  # which would change torch's own class for this process
        text = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}(Vversion\nctorch\nSize\nutb."
        (path / ".metadata").write_bytes(text)
    elif how == "cut":
        (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-30])
    elif how == "lost":
        (path / "__0_0.distcp").unlink()
    elif how == "garbage":
        (path / ".metadata").write_bytes(b"\x80\x04K\x01.")
    elif how == "link":
        (path / "__0_0.distcp").rename(path.parent / "secret")
        (path / "__0_0.distcp").symlink_to(path.parent / "secret")
    else:
        shutil.copy(path / "__0_0.distcp", path.parent / "x")

        def point(metadata: Any) -> None:
            for info in metadata.storage_data.values():
                info.relative_path = "../x"

        rewrite_metadata(path, point)


@pytest.mark.parametrize("how", ["code", "getattr", "class", "cut", "lost", "garbage", "link", "outside"])
def test_damaged_and_hostile_dcp_checkpoints_are_refused(
    manager: EnhancedCheckpointManager, tmp_path: Path, how: str
) -> None:
    save_dcp({"model": trained()[0].state_dict()}, tmp_path / "dcp")
    harm_dcp(tmp_path / "dcp", how)
    with pytest.raises(FormatError):
        manager.import_checkpoint(tmp_path / "dcp")
    assert nothing_left(manager, tmp_path / "c")
    assert not (tmp_path / "owned").exists()
    assert pytest.importorskip("torch.distributed.checkpoint.metadata").Metadata.version is None


# transformers


def tiny_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_transformers_folder_comes_in_and_goes_out_again(
    manager: EnhancedCheckpointManager, tmp_path: Path, shard: str, copy: bool
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() is (shard == "8KB")
    made = manager.import_checkpoint(tmp_path / "hf", copy=copy)
    loaded = manager.load_checkpoint(made)
    state = model.state_dict()
    found = loaded["model_state_dict"]
    assert state.keys() - found.keys() <= {"lm_head.weight"}
    assert equal(found, {key: state[key] for key in found})
    assert loaded["config"] == json.loads((tmp_path / "hf" / "config.json").read_text())
    assert manager.verify_experiment_integrity()["failed"] == 0

    manager.export_checkpoint(made, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert equal(dict(again.state_dict()), dict(state))


def test_a_model_with_ties_is_exported_for_from_pretrained(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model = tiny_model()
    saved = manager.save_checkpoint(model, config=json.loads(model.config.to_json_string()))
    manager.export_checkpoint(saved, tmp_path / "out")
    again, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_of_transformers_come_in(
    manager: EnhancedCheckpointManager, tmp_path: Path, shards: int
) -> None:
    state = dict(tiny_model().state_dict())
    keys, names = sorted(state), ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for i, name in enumerate(names):
        torch.save({key: state[key] for key in keys[i::shards]}, tmp_path / name)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path))
    assert equal(loaded["model_state_dict"], state)
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path, copy=False)


def test_a_folder_of_the_transformers_trainer_brings_its_optimizer(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_model()
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = transformers.TrainingArguments(
        tmp_path / "runs", max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "runs" / "checkpoint-2"))
    assert equal(loaded["optimizer_state_dict"], trainer.optimizer.state_dict())
    assert loaded["scheduler_state_dict"] == trainer.lr_scheduler.state_dict()
    assert loaded["step"] == 2
    assert loaded["extra_state"]["trainer_state"]["max_steps"] == 2
    assert "training_args.bin" in manager.list_checkpoints()[0]["notes"]


def test_what_accelerate_saves_brings_its_optimizer(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared = accelerator.prepare(model, optimizer, scheduler)
    accelerator.save_state(str(tmp_path / "state"))
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "state"))
    assert equal(loaded["model_state_dict"], dict(accelerator.unwrap_model(prepared[0]).state_dict()))
    assert equal(loaded["optimizer_state_dict"], prepared[1].state_dict())
    assert loaded["scheduler_state_dict"] == prepared[2].state_dict()
    assert "random_states_0.pkl" in manager.list_checkpoints()[0]["notes"]
