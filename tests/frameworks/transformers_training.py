"""A training script for Hugging Face's Trainer, as a function that a test runs in a process of its own and may kill."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.integrations.transformers import train
from model_checkpoint.tracking.runs import resume_or_start


class KillAt(TrainerCallback):
    """SIGKILL when a step has ended, before it is logged or saved."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def data(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 50, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row.sum() % 2).long()} for row in ids]


def mask_at_random(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch with random numbers of PyTorch and of Python."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.2] = random.randrange(50)
    return batch


def make_trainer(folder: Path, callbacks: Any = None, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
    )
    wanted = {
        "output_dir": str(folder / "hf"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "load_best_model_at_end": False,
        "metric_for_best_model": "eval_loss",
    }
    return Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(**wanted | arguments),
        train_dataset=data(1, 32),
        eval_dataset=data(2, 8),
        callbacks=callbacks,
    )


def run(
    folder: Path,
    kill_at: int | None = None,
    kill_in_save: int | None = None,
    patience: int = 100,
    manager_options: dict[str, Any] | None = None,
    collator: Any = None,
    scaled: bool = False,
    **arguments: Any,
) -> None:
    """Train, and leave in ``folder`` what came out, unless it is killed at a step or in its n-th save."""
    stopping = EarlyStoppingCallback(early_stopping_patience=patience)
    trainer = make_trainer(folder, [KillAt(kill_at), stopping], **arguments)
    trainer.data_collator = collator or trainer.data_collator
    if scaled:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=4)
    tracker = resume_or_start("bert", database_url=f"sqlite:///{folder}/experiments.db")
    manager = EnhancedCheckpointManager(tracker, folder / "checkpoints", **(manager_options or {}))
    if kill_in_save is not None:
        die_in_save(kill_in_save)
    train(trainer, tracker, manager)
    manager.wait()
    times = ("_runtime", "_per_second", "train_loss")
    outcome = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scale": scaled and trainer.accelerator.scaler.state_dict(),
        "step": trainer.state.global_step,
        "metrics": [
            (point["metric_name"], point["step"], point["metric_value"])
            for point in tracker.get_metrics()
            if not point["metric_name"].endswith(times)
        ],
        "log": [
            {name: value for name, value in logged.items() if not name.endswith(times)}
            for logged in trainer.state.log_history
        ],
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "stopping": stopping.state(),
        "checkpoints": [(found["step"], found["best"]) for found in manager.list_checkpoints()],
        "config": tracker.record.config,
        "attempts": len(tracker.attempts),
    }
    torch.save(outcome, folder / "outcome.pt")
    tracker.close()


def die_in_save(number: int) -> None:
    """Kill this process when the files of its n-th checkpoint are written and it is about to be published."""
    publish, seen = os.rename, []

    def rename(source: Any, target: Any, **more: Any) -> None:
        if "staging" in str(source):
            seen.append(target)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        publish(source, target, **more)

    os.rename = rename
