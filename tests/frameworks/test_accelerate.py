"""Accelerate: exact resume within an epoch, in one process and in two, and the tracker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError
from model_checkpoint.testing import assert_resume_equivalent

os.environ["HF_HUB_OFFLINE"] = "1"
accelerate = pytest.importorskip("accelerate")
torch = pytest.importorskip("torch")

from noisy_data import Noisy  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from model_checkpoint.integrations.accelerate import AcceleratorState, EngineTracker  # noqa: E402
from model_checkpoint.integrations.pytorch import ResumableLoader  # noqa: E402


class Average:
    """An object of the user's own, which is registered."""

    def __init__(self) -> None:
        self.loss = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.loss = state["loss"]


def prepared(**options: Any) -> tuple[Any, Any, Any, Any, Any, Average]:
    accelerate.utils.set_seed(3)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
    average = Average()
    accelerator.register_for_checkpointing(average)
    made = accelerator.prepare(model, optimizer, scheduler, DataLoader(Noisy(), batch_size=4, shuffle=True))
    return accelerator, *made, average


def train(manager: Any, steps: int, experiment_id: str | None = None, kill_at: int = -1, **options: Any) -> Any:
    accelerator, model, optimizer, scheduler, loader, average = prepared(**options)
    state = AcceleratorState(manager, accelerator, loader)
    found = state.restore(experiment_id=experiment_id) or {"epoch": 0, "step": 0}
    step = found["step"]
    for epoch in range(found["epoch"], 1000):
        for x, y in state.loaders[0]:
            with accelerator.accumulate(model):
                loss = (model(x).squeeze(1) - y).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            average.loss = 0.9 * average.loss + 0.1 * loss.item()
            step += 1
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % 4 == 0:
                state.save(epoch, step, loss=loss)
            if step == steps:
                return model
        state.save(epoch + 1, step, notes="end of an epoch")
    return model


def train_alone(manager: EnhancedCheckpointManager, steps: int) -> None:
    train(manager, steps)


def train_seeded_and_stateful(manager: EnhancedCheckpointManager, steps: int) -> None:
    how = accelerate.DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=True)
    train(manager, steps, dataloader_config=how)


@pytest.mark.slow  # processes of their own, each of which imports torch
@pytest.mark.parametrize("how", [train_alone, train_seeded_and_stateful])
def test_a_training_that_is_killed_and_run_again_has_the_bits_of_an_unbroken_one(how: Any) -> None:
    assert assert_resume_equivalent(how, 32, kill_at=[7, 16, 26]) >= 30


def train_in_two_processes(folder: str, kill_at: int) -> None:
    url, main = f"sqlite:///{folder}/runs.db", accelerate.PartialState(cpu=True).is_main_process
    noted = Path(folder, "id.txt")
    if main and not noted.exists():
        with ExperimentTracker("two", database_url=url) as tracker:
            noted.write_text(tracker.experiment_id)
    accelerate.PartialState().wait_for_everyone()
    experiment_id = noted.read_text()
    tracker = ExperimentTracker.resume(experiment_id, url) if main else None
    manager = EnhancedCheckpointManager(tracker, f"{folder}/checkpoints", database_url=None if main else url)
    model = train(manager, 16, experiment_id, kill_at)
    torch.save([part.detach() for part in model.parameters()], f"{folder}/{'main' if main else 'other'}.pt")


@pytest.mark.slow
def test_two_processes_of_which_the_main_one_writes_are_resumed_exactly(tmp_path: Path) -> None:
    def run(name: str, kill_at: int = -1) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, __file__, str(tmp_path / name), str(kill_at)]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    assert run("unbroken") == 0
    for kill_at in (6, 11):
        assert run(str(kill_at), kill_at) != 0
        assert not (tmp_path / str(kill_at) / "main.pt").exists()
        assert run(str(kill_at)) == 0
        for rank in ("main.pt", "other.pt"):
            before, after = (torch.load(tmp_path / name / rank) for name in ("unbroken", str(kill_at)))
            assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert len(list((tmp_path / "11" / "checkpoints").glob("*-*"))) == 1  # one experiment: the other process made none


class Ahead:
    """Fetches one batch ahead, as Accelerate's loaders do."""

    def __init__(self, loader: Any) -> None:
        self.base_dataloader = loader

    def __iter__(self) -> Any:
        batches = iter(self.base_dataloader)
        held = next(batches)
        for batch in batches:
            yield held
            held = batch
        yield held


@pytest.mark.parametrize("how", ["plain", "generator", "workers", "ahead"])
def test_a_resumable_loader_gives_the_rest_of_its_epoch_and_leaves_random_states_alone(how: str) -> None:
    def made() -> ResumableLoader:
        generator = torch.Generator().manual_seed(5) if how == "generator" else None
        workers = 1 if how == "workers" else 0
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator, num_workers=workers)
        return ResumableLoader(Ahead(loader) if how == "ahead" else loader)

    def numbers(loader: Any) -> Any:
        return [(y.tolist(), x.tolist(), torch.rand(1).item()) for x, y in loader]

    torch.manual_seed(1)
    loader = made()
    numbers(loader)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
        torch.rand(1)
    state, random = loader.state_dict(), torch.get_rng_state()
    expected = [(y.tolist(), x.tolist(), torch.rand(1).item()) for x, y in batches] + numbers(loader)

    again = made()
    again.load_state_dict(state)
    torch.set_rng_state(random)
    assert again.state_dict() == state
    assert numbers(again) + numbers(again) == expected
    assert len(expected) == 6 + 10


def test_a_loader_of_other_data_is_refused() -> None:
    class Stream:
        def __init__(self, *batches: int) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[int]:
            return iter(self.batches)

    def first_of(loader: ResumableLoader, state: Any) -> Any:
        loader.load_state_dict(state)
        return next(iter(loader))

    for make in (lambda *batches: list(batches), Stream):
        loader = ResumableLoader(make(1, 2, 3))
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        with pytest.raises(ConfigurationError, match=r"had 3 batches, and this one has 2|were seen .* ends after 2"):
            first_of(ResumableLoader(make(1, 2)), loader.state_dict())
    with pytest.raises(ConfigurationError, match="ResumableLoader needs a data loader"):
        ResumableLoader(5)


def test_what_does_not_fit_the_accelerator_is_refused(
    tracker: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, *_, loader, _average = prepared()
    with EnhancedCheckpointManager(tracker, tmp_path / "c") as manager:
        state = AcceleratorState(manager, accelerator, loader)
        assert state.restore() is None
        saved = state.save(epoch=2, step=5, val_loss=0.5)
        found = state.restore("best:val_loss")
        assert found is not None
        assert (found["epoch"], found["step"], found["best"]) == (2, 5, {"val_loss": 0.5})
        with pytest.raises(CheckpointNotFoundError):
            state.restore("best:accuracy")
        with pytest.raises(ConfigurationError, match="model is the accelerator's own"):
            state.save(model={})
        with pytest.raises(ConfigurationError, match="the places in 1 loaders, and there are 0"):
            AcceleratorState(manager, accelerator).restore(saved)
        monkeypatch.setattr(type(accelerator), "distributed_type", accelerate.DistributedType.FSDP)
        with pytest.raises(ConfigurationError, match="with FSDP each process has a part of the state"):
            AcceleratorState(manager, accelerator, loader)


def test_the_tracker_logs_what_the_accelerator_logs(tracker: ExperimentTracker) -> None:
    accelerator = accelerate.Accelerator(cpu=True, log_with=[EngineTracker(tracker)])
    accelerator.init_trackers("project", config={"lr": 0.1})
    accelerator.log({"loss": 0.5}, step=3)
    assert accelerator.get_tracker("model_checkpoint").tracker is tracker
    accelerator.end_training()
    assert [(point["metric_value"], point["step"]) for point in tracker.get_metrics("loss")] == [(0.5, 3)]
    assert tracker.record.config["lr"] == 0.1
    assert tracker.record.status == "completed"


if __name__ == "__main__":
    accelerate.debug_launcher(train_in_two_processes, (sys.argv[1], int(sys.argv[2])), num_processes=2)
