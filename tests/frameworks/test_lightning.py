"""Lightning: exact resume through the callback, Lightning's own checkpoints through a manager, and the logger."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, FormatError, UnsupportedValueError
from model_checkpoint.testing import assert_resume_equivalent

pl = pytest.importorskip("lightning.pytorch")
torch = pytest.importorskip("torch")
torchmetrics = pytest.importorskip("torchmetrics")

from noisy_data import Noisy  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from model_checkpoint.integrations.lightning import (  # noqa: E402
    CheckpointCallback,
    ManagerCheckpointIO,
    TrackerLogger,
)

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Has no length, and an order that is drawn anew each epoch."""

    def __iter__(self) -> Any:
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        return iter([(x[i], x[i].sum()) for i in torch.randperm(40)])


class Model(pl.LightningModule):  # type: ignore[misc]
    """Dropout and batch norm; a learning rate and a stop that hang on averages of whole epochs."""

    def __init__(self, width: int = 16, plateau: str = "train_loss") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.5), torch.nn.Linear(width, 1)),
        )
        self.error = torchmetrics.MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x).squeeze(1)
        loss = (out - y).square().mean()
        self.error(out, y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_error", self.error, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self.net(x).squeeze(1) - y).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.3)
        return [optimizer], [
            {"scheduler": cosine, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": self.hparams["plateau"]},
        ]


def trainer(callbacks: list[Any], **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(one, pl.callbacks.Checkpoint) for one in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(callbacks=callbacks, **{**quiet, **options})


def fit(
    manager: EnhancedCheckpointManager, data: Any, plateau: str = "train_loss", every: int = 3, **options: Any
) -> Any:
    pl.seed_everything(7, verbose=False)
    model = Model(plateau=plateau)
    stop = pl.callbacks.EarlyStopping(plateau, patience=3)
    made = trainer([stop, CheckpointCallback(manager, every_n_train_steps=every, every_n_epochs=1)], **options)
    made.fit(model, data, DataLoader(TensorDataset(torch.ones(8, 6), torch.ones(8)), batch_size=4))
    return made


def loader(**options: Any) -> Any:
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **options)


def train_epochs(manager: EnhancedCheckpointManager, steps: int) -> None:
    fit(manager, loader(), max_epochs=steps // 10, num_sanity_val_steps=1)


def train_with_validations_within(manager: EnhancedCheckpointManager, steps: int) -> None:
    fit(
        manager,
        loader(),
        "val_loss",
        max_epochs=steps // 10,
        val_check_interval=0.3,
        accumulate_grad_batches=2,
        every=1,
    )


def train_steps_of_a_stream(manager: EnhancedCheckpointManager, steps: int) -> None:
    fit(manager, DataLoader(Stream(), batch_size=4), max_steps=steps)


def train_two_loaders_in_half_precision(manager: EnhancedCheckpointManager, steps: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    pl.seed_everything(7, verbose=False)
    a = StatefulDataLoader(Noisy(), batch_size=4, shuffle=True)
    b = DataLoader(TensorDataset(torch.ones(20, 6), torch.ones(20)), batch_size=4, shuffle=True)

    class Both(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([torch.cat(parts) for parts in zip(*batch)], batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    half = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    made = trainer(
        [CheckpointCallback(manager, every_n_train_steps=3, every_n_epochs=1)], max_steps=steps, plugins=[half]
    )
    made.fit(Both(), [a, b])
    assert scaler.get_scale() > 1024.0


@pytest.mark.slow  # processes of their own, each of which imports Lightning
@pytest.mark.parametrize(
    ("train", "kill_at"),
    [
        (train_epochs, [5, 12, 21]),
        (train_with_validations_within, [3, 8, 11]),
        (train_steps_of_a_stream, [5, 12]),
        (train_two_loaders_in_half_precision, [5, 12]),
    ],
)
def test_a_fit_that_is_killed_and_run_again_has_the_bits_of_an_unbroken_one(train: Any, kill_at: list[int]) -> None:
    assert assert_resume_equivalent(train, 30, kill_at=kill_at) >= 20


def train_in_two_processes(folder: str, kill_at: int) -> None:
    class Kill(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    manager, rank = None, int(os.environ.get("LOCAL_RANK", "0"))
    if rank == 0:
        url, noted = f"sqlite:///{folder}/runs.db", Path(folder, "id.txt")
        known = noted.exists()
        tracker = (
            ExperimentTracker.resume(noted.read_text(), url) if known else ExperimentTracker("n", database_url=url)
        )
        noted.write_text(tracker.experiment_id)
        manager = EnhancedCheckpointManager(tracker, f"{folder}/checkpoints")
    pl.seed_everything(7, verbose=False)
    torch.manual_seed(rank)
    model = Model()
    callbacks = [Kill(), CheckpointCallback(manager, every_n_train_steps=2)]
    trainer(callbacks, max_epochs=3, devices=2, strategy="ddp").fit(model, loader())
    torch.save([*weights(model), torch.rand(1).item()], f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_of_which_the_first_one_writes_are_resumed_exactly(tmp_path: Path) -> None:
    def run(name: str, kill_at: int = -1) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, __file__, str(tmp_path / name), str(kill_at)]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    assert run("unbroken") == 0
    assert run("killed", kill_at=9) != 0
    assert not (tmp_path / "killed" / "0.pt").exists()
    assert run("killed") == 0
    for rank in ("0.pt", "1.pt"):
        before, after = (torch.load(tmp_path / name / rank) for name in ("unbroken", "killed"))
        assert before == after


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> Any:
    with EnhancedCheckpointManager(tracker, tmp_path / "checkpoints") as made:
        yield made


def weights(model: Any) -> list[float]:
    return torch.cat([part.detach().flatten() for part in model.parameters()]).tolist()


def test_the_best_so_far_and_the_newest_are_neither_forgotten_nor_removed_by_a_resumed_fit(tmp_path: Path) -> None:
    class Scored(Model):
        scores = [3.0, 1.0, 2.0, 5.0, 4.0]  # noqa: RUF012

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_loss", self.scores[self.current_epoch])
            return super().training_step(batch, batch_idx)

    url = f"sqlite:///{tmp_path}/runs.db"
    with ExperimentTracker("run", database_url=url) as tracker:
        with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=2) as manager:
            trainer([CheckpointCallback(manager)], max_epochs=3).fit(Scored(), loader())
    with ExperimentTracker.resume(tracker.experiment_id, url) as tracker:
        with EnhancedCheckpointManager(tracker, tmp_path / "c", max_checkpoints=2) as manager:
            trainer([CheckpointCallback(manager)], max_epochs=5).fit(Scored(), loader())
            kept = {one["epoch"]: one["val_loss"] for one in manager.list_checkpoints()}
            assert (kept[1], kept[4]) == (1.0, 4.0)
            assert manager.load_checkpoint(checkpoint_type="best_val_loss")["epoch"] == 1


def test_a_validated_metric_is_noted_only_for_the_weights_that_it_was_measured_of(manager: Any) -> None:
    fit(manager, loader(), "val_loss", every=2, max_epochs=2, val_check_interval=5)
    noted = {one["step"]: one["val_loss"] is not None for one in manager.list_checkpoints()}
    assert noted == {**dict.fromkeys((2, 4, 6, 8, 12, 14, 16, 18), False), 10: True, 20: True}


def test_an_old_validated_metric_is_not_taken_for_a_new_one_after_a_resume(manager: Any) -> None:
    def train(epochs: int) -> None:
        callbacks = [CheckpointCallback(manager)]
        made = trainer(callbacks, max_epochs=epochs, check_val_every_n_epoch=2, num_sanity_val_steps=0)
        made.fit(Model(), loader(), DataLoader(TensorDataset(torch.ones(8, 6), torch.ones(8)), batch_size=4))

    train(2)
    train(4)
    assert [one["val_loss"] is not None for one in manager.list_checkpoints()] == [False, True, False, True]


def test_resume_says_what_a_fit_begins_with(manager: Any) -> None:
    first = fit(manager, loader(), max_epochs=1)
    begun = []

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            begun.append(trainer.global_step)

    def begin(resume: Any) -> None:
        callbacks = [Watch(), pl.callbacks.EarlyStopping("train_loss"), CheckpointCallback(manager, 100, resume=resume)]
        trainer(callbacks, max_steps=first.global_step + 1).fit(Model(), loader())

    third = next(one["checkpoint_id"] for one in manager.list_checkpoints() if one["step"] == 3)
    for resume in ("latest", third, False):
        begin(resume)
    assert begun == [10, 3, 0]
    with pytest.raises(CheckpointNotFoundError):
        begin("best:nothing")
    with pytest.raises(ConfigurationError, match="resume is True"):
        CheckpointCallback(manager, resume=True)
    with pytest.raises(ConfigurationError, match="every_n_epochs is 0"):
        CheckpointCallback(manager, every_n_epochs=0)
    made = trainer([CheckpointCallback(manager)])
    made.strategy.__class__ = type("FSDPStrategy", (type(made.strategy),), {})
    with pytest.raises(ConfigurationError, match="with FSDPStrategy each process has a part of the state"):
        made.fit(Model(), loader())


def test_a_fit_that_was_stopped_within_an_epoch_goes_on_from_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> tuple[int, list[float]]:
        manager.append(EnhancedCheckpointManager(tracker[folder], tmp_path / folder))
        begun: list[int] = []

        class Watch(pl.Callback):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                begun.append(trainer.global_step)

        pl.seed_everything(7, verbose=False)
        model = Model()
        callbacks = [Watch(), CheckpointCallback(manager[-1], every_n_train_steps=6)]
        trainer(callbacks, max_steps=steps).fit(model, loader())
        return begun[0], weights(model)

    url = f"sqlite:///{tmp_path}/runs.db"
    tracker = {name: ExperimentTracker(name, database_url=url) for name in ("unbroken", "stopped")}
    manager: list[EnhancedCheckpointManager] = []
    expected = train("unbroken", 25)
    train("stopped", 15)
    newest = manager[-1].list_checkpoints()[-1]
    assert (newest["step"], newest["epoch"]) == (15, 1)
    Path(newest["path"], "model.safetensors").write_bytes(b"damaged")
    assert train("stopped", 15)[0] == 12
    assert train("stopped", 25) == (15, expected[1])
    saved = len(manager[-1].list_checkpoints())
    trainer([CheckpointCallback(manager[-1])], fast_dev_run=True).fit(Model(), loader())
    assert len(manager[-1].list_checkpoints()) == saved
    for one in tracker.values():
        one.close()


def test_background_saves_hold_the_state_of_the_step_that_they_were_made_at(tmp_path: Path) -> None:
    seen: dict[int, list[float]] = {}

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen[trainer.global_step] = weights(pl_module)

    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as tracker:
        with EnhancedCheckpointManager(tracker, tmp_path / "c", async_save=True, max_checkpoints=None) as manager:
            trainer([Watch(), CheckpointCallback(manager, every_n_train_steps=1)], max_epochs=1).fit(Model(), loader())
            assert manager.pending() == []
            for one in manager.list_checkpoints():
                saved = Model()
                saved.load_state_dict(manager.load_checkpoint(one["checkpoint_id"])["model_state_dict"])
                assert weights(saved) == seen[one["step"]]
    assert len(seen) == 10


def test_lightnings_own_model_checkpoint_saves_rotates_and_resumes_through_a_manager(
    manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(epochs: int, ckpt_path: Any = None) -> Any:
        pl.seed_everything(3, verbose=False)
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path / "kept", "{epoch}", monitor="train_loss", save_top_k=2, save_last=True
        )
        made = trainer([keep], max_epochs=epochs, plugins=[ManagerCheckpointIO(manager)])
        made.fit(Model(), loader(), ckpt_path=ckpt_path)
        return made

    monkeypatch.setattr("torch.save", None)
    first = train(3)
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(names) == 3
    assert "last.ckpt" in names
    assert len(manager.list_checkpoints()) == 3
    assert all(one["pinned"] and one["metrics"]["train_loss"] > 0 for one in manager.list_checkpoints())

    loaded = ManagerCheckpointIO(manager).load_checkpoint(tmp_path / "kept" / "last.ckpt")
    assert loaded["hyper_parameters"] == {"width": 16, "plateau": "train_loss"}
    assert loaded["global_step"] == first.global_step == 30
    resumed = train(4, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert resumed.global_step == 40
    assert resumed.checkpoint_callback.best_model_score <= first.checkpoint_callback.best_model_score

    io = ManagerCheckpointIO(manager)
    io.remove_checkpoint(resumed.checkpoint_callback.best_model_path)
    assert len(manager.list_checkpoints()) == 2
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        io.load_checkpoint(resumed.checkpoint_callback.best_model_path)
    (tmp_path / "kept").rename(tmp_path / "moved")
    assert io.load_checkpoint(tmp_path / "moved" / "last.ckpt")["global_step"] == 40
    (tmp_path / "other.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError, match=r"other\.ckpt does not name a checkpoint"):
        io.load_checkpoint(tmp_path / "other.ckpt")


def test_hyperparameters_are_kept_paths_and_namespaces_as_plain_values(manager: Any, tmp_path: Path) -> None:
    given = {"root": Path("/data"), "parsed": argparse.Namespace(lr=0.1, steps=[1, 2]), "betas": (0.9, 0.99)}
    checkpoint = {"epoch": 0, "global_step": 0, "state_dict": {}, "hyper_parameters": given, "callbacks": {}}
    io = ManagerCheckpointIO(manager)
    io.save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    expected = {"root": "/data", "parsed": {"lr": 0.1, "steps": [1, 2]}, "betas": (0.9, 0.99)}
    assert io.load_checkpoint(tmp_path / "x.ckpt")["hyper_parameters"] == expected
    with pytest.raises(ConfigurationError, match="storage_options"):
        io.save_checkpoint(checkpoint, tmp_path / "x.ckpt", storage_options={})


def test_what_cannot_be_stored_without_pickle_is_refused_with_its_path(manager: Any, tmp_path: Path) -> None:
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "state_dict": {},
        "hyper_parameters": {"loss": torch.nn.functional.relu},
    }
    with pytest.raises(UnsupportedValueError, match=r"hyper_parameters\.loss"):
        ManagerCheckpointIO(manager).save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_the_logger_writes_metrics_and_hyperparameters_and_how_training_ended(tmp_path: Path) -> None:
    class Broken(Model):
        def on_train_epoch_end(self) -> None:
            raise ZeroDivisionError

    def status(model: Any) -> str:
        url = f"sqlite:///{tmp_path}/runs.db"
        tracker = ExperimentTracker("run", project_name="digits", database_url=url)
        logger = TrackerLogger(tracker)
        assert (logger.name, logger.version) == ("digits", tracker.experiment_id)
        logger.log_hyperparams({"activation": torch.relu})
        try:
            trainer([], logger=logger, max_epochs=1, log_every_n_steps=5).fit(model, loader())
            assert [point["step"] for point in tracker.get_metrics("loss")] == [4, 9]
            assert len(tracker.get_metrics("train_loss")) == 1
        except ZeroDivisionError:
            pass
        assert tracker.record.config["width"] == 16
        assert "relu" in tracker.record.config["activation"]
        return tracker.record.status

    assert status(Model()) == "completed"
    assert status(Broken()) == "failed"


if __name__ == "__main__":
    train_in_two_processes(sys.argv[1], int(sys.argv[2]))
