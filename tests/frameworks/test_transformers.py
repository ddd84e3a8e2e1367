"""Hugging Face's Trainer under the manager: killed and resumed, it arrives at the bits of unbroken training."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", minversion="5.3")
pytest.importorskip("accelerate")

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.integrations.transformers import train
from model_checkpoint.tracking.runs import resume_or_start
from tests.frameworks.processes import in_process
from tests.frameworks.transformers_training import make_trainer, mask_at_random, run


def outcome_of(folder: Path, killed: bool = False, **options: Any) -> Any:
    """Run the training script in a process of its own and return its outcome; None where it was killed."""
    in_process(run, folder, killed=killed, **options)
    return None if killed else torch.load(folder / "outcome.pt", weights_only=True)


def assert_same(one: Any, other: Any, path: str = "outcome") -> None:
    """Fail, with the place, where two outcomes differ by a bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key, value in one.items():
            assert_same(value, other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, value in enumerate(one):
            assert_same(value, other[i], f"{path}[{i}]")
    else:
        assert one == other, path


TRAINED = ("model", "optimizer", "scheduler", "scale", "step", "log", "metrics", "best", "stopping")


def trained(outcome: Any) -> dict[str, Any]:
    return {name: outcome[name] for name in TRAINED}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome_of(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    ("kill", "manager_options"),
    [
        ({"kill_at": 5}, {}),  # resumes at 3, in the middle of what is logged together
        ({"kill_at": 11}, {"async_save": True}),
        ({"kill_at": 17}, {"storage_backend": "pytorch"}),
        ({"kill_in_save": 3}, {}),
    ],
    ids=["step 5", "step 11, saving in the background", "step 17, torch's format", "in the middle of a save"],
)
def test_killed_mid_epoch_and_run_again_it_ends_with_the_same_bits(
    unbroken: Any, tmp_path: Path, kill: dict[str, int], manager_options: dict[str, Any]
) -> None:
    outcome_of(tmp_path, killed=True, manager_options=manager_options, **kill)
    resumed = outcome_of(tmp_path, manager_options=manager_options)

    assert_same(trained(unbroken), trained(resumed))
    assert len(set(resumed["metrics"])) == len(resumed["metrics"])  # no point is there twice
    assert not list((tmp_path / "hf").glob("checkpoint-*"))  # the Trainer writes none of its own


@pytest.mark.parametrize(
    ("kill_at", "options"),
    [
        (17, {"scaled": True}),  # resumes before the last batch of an epoch
        (11, {"accelerator_config": {"use_seedable_sampler": False}}),
        (5, {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 3, "save_steps": 2}),
    ],
    ids=["shuffled by a seed, loss scaled", "shuffled by the random state", "grouped by length"],
)
def test_batches_that_are_made_at_random_are_the_same_again(
    tmp_path: Path, kill_at: int, options: dict[str, Any]
) -> None:
    """The next batch is made before a step, with other random numbers than the checkpoint after that step has."""
    options = {"collator": mask_at_random, **options}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = outcome_of(whole, **options)
    outcome_of(broken, killed=True, kill_at=kill_at, **options)

    assert_same(trained(unbroken), trained(outcome_of(broken, **options)))


def test_everything_that_is_logged_and_all_arguments_are_tracked(unbroken: Any) -> None:
    by_name = {name: [step for n, step, _ in unbroken["metrics"] if n == name] for name in ("loss", "eval_loss")}

    assert by_name == {"loss": list(range(2, 25, 2)), "eval_loss": list(range(3, 25, 3))}
    assert unbroken["config"]["training"]["learning_rate"] == 1e-2
    assert unbroken["config"]["model"]["hidden_dropout_prob"] == 0.3


def test_a_corrupt_latest_checkpoint_in_a_folder_that_was_moved_is_passed_over(unbroken: Any, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    outcome_of(before, killed=True, kill_at=11)
    before.rename(after)
    newest = max((after / "checkpoints").glob("*/*/model.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)

    assert_same(trained(unbroken), trained(outcome_of(after)))


def test_the_best_outlives_rotation_and_a_kill_and_is_what_the_trainer_ends_with(tmp_path: Path) -> None:
    """At such a rate it gets no better: training stops early, at the same step, long after its best checkpoint."""
    diverging = {
        "learning_rate": 0.3,
        "warmup_steps": 0,
        "num_train_epochs": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "gradient_accumulation_steps": 3,
        "eval_on_start": True,
        "load_best_model_at_end": True,
        "patience": 4,
        "manager_options": {"max_checkpoints": 2},
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = outcome_of(whole, **diverging)
    outcome_of(broken, killed=True, kill_at=unbroken["step"] - 1, **diverging)
    resumed = outcome_of(broken, **diverging)

    assert_same(trained(unbroken), trained(resumed))
    assert unbroken["step"] < 30
    best, last = resumed["best"][1], resumed["step"]
    assert best < last - 3  # it is not among the last two
    kept = dict(resumed["checkpoints"])
    assert "val_loss" in kept[best]
    assert last in kept
    assert len(kept) <= 3  # of 7 saves: the last, the best, and the one of the best training loss
    with EnhancedCheckpointManager(
        None, broken / "checkpoints", database_url=f"sqlite:///{broken}/experiments.db"
    ) as m:
        (found,) = [c for c in m.list_checkpoints() if c["step"] == best]
        assert_same(dict(m.load_checkpoint(found["checkpoint_id"])["model_state_dict"]), dict(resumed["model"]))


class StopAt(TrainerCallback):
    """Stops training for the time being, as a time limit does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 6


def train_here(folder: Path, *callbacks: Any, **arguments: Any) -> tuple[Any, ExperimentTracker, Any]:
    """Train as a script does that is started again; what it leaves open tells of the run as a crash would."""
    trainer = make_trainer(folder, list(callbacks), **arguments)
    tracker = resume_or_start("bert", database_url=f"sqlite:///{folder}/experiments.db")
    output = train(trainer, tracker, EnhancedCheckpointManager(tracker, folder / "checkpoints"))
    tracker.flush()
    return trainer, tracker, output


_STOPS_EARLY = {"num_train_epochs": 9, "learning_rate": 0.3, "eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("options", "callbacks"),
    [({"num_train_epochs": 1}, []), (_STOPS_EARLY | {"load_best_model_at_end": True}, [EarlyStoppingCallback(1)])],
    ids=["all epochs", "stopped early"],
)
def test_a_script_that_died_after_training_gets_the_model_and_trains_no_more(
    tmp_path: Path, options: dict[str, Any], callbacks: list[Any]
) -> None:
    first, _, output = train_here(tmp_path, *callbacks, **options)
    again, _, nothing = train_here(tmp_path, *callbacks, **options)

    assert nothing.global_step == output.global_step < 9 * 8
    assert math.isnan(nothing.training_loss)
    assert_same(dict(first.model.state_dict()), dict(again.model.state_dict()))


def test_who_wants_more_epochs_gets_them(tmp_path: Path) -> None:
    train_here(tmp_path, num_train_epochs=1)

    assert train_here(tmp_path, num_train_epochs=2)[2].global_step == 16


def test_training_that_a_callback_stopped_for_the_time_being_goes_on(unbroken: Any, tmp_path: Path) -> None:
    _, stopped, _ = train_here(tmp_path, StopAt())
    assert stopped.record.status == "interrupted"
    trainer, tracker, _ = train_here(tmp_path)

    assert tracker.experiment_id == stopped.experiment_id
    assert tracker.record.status == "running"
    assert_same(dict(unbroken["model"]), dict(trainer.model.state_dict()))


def test_training_is_the_trainers_own_to_the_bit(unbroken: Any, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path)
    plain.train()

    assert_same(dict(unbroken["model"]), dict(plain.model.state_dict()))


def test_the_trainer_is_itself_again_afterwards(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    tracker = resume_or_start("bert", database_url=f"sqlite:///{tmp_path}/experiments.db")
    callbacks = list(trainer.callback_handler.callbacks)
    train(trainer, tracker, EnhancedCheckpointManager(tracker, tmp_path / "checkpoints"))

    assert trainer.callback_handler.callbacks == callbacks
    assert trainer._save_checkpoint.__func__ is type(trainer)._save_checkpoint


def test_what_cannot_be_gone_on_with_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, metric_for_best_model="eval_f1", greater_is_better=False)
    tracker = ExperimentTracker("bert", database_url=f"sqlite:///{tmp_path}/experiments.db")
    manager = EnhancedCheckpointManager(tracker, tmp_path / "checkpoints")
    with pytest.raises(ConfigurationError, match=r"best_metrics=\{'eval_f1': 'min'\}"):
        train(trainer, tracker, manager)

    for foreign in (None, {"trainer": "x"}, {"trainer": "5"}, {"trainer": {"a": 1}}):
        manager.save_checkpoint({"w": torch.zeros(1)}, extra_state=foreign)
        with pytest.raises(ConfigurationError, match="was not saved by train"):
            train(make_trainer(tmp_path), tracker, manager)
    assert tracker.get_metrics() == []


def test_the_manager_of_another_run_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/experiments.db"
    tracker, other = (ExperimentTracker(name, database_url=url) for name in ("bert", "other"))
    for manager in (
        EnhancedCheckpointManager(other, tmp_path / "checkpoints"),
        EnhancedCheckpointManager(None, tmp_path / "checkpoints", database_url=url),
    ):
        with pytest.raises(ConfigurationError, match=tracker.experiment_id):
            train(make_trainer(tmp_path), tracker, manager)
