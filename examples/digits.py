"""Train on real images, kill the process in the middle of an epoch, resume, and arrive at the very same bits.

Run it with ``make demo``, or ``python examples/digits.py`` where ``pip install 'model-checkpoint[demo]'`` was run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.hooks import BaseHook, HookContext, HookEvent

BATCH = 64  # images
BATCHES = 20  # in an epoch, the last one smaller
LEARNING_RATE = 3e-3
KEPT = 4  # checkpoints; few, so that the demo removes some


def load_images() -> dict[str, tuple[Tensor, Tensor]]:
    """Return 1,797 handwritten digits of 8 x 8 pixels and their labels, in a split that never changes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split([1257, 270, 270])))
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def make_model() -> nn.Module:
    """Return a small convolutional network; its dropout draws random numbers in every batch."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, 10)),
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return loss and accuracy (0 to 1)."""
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return nn.functional.cross_entropy(logits, labels).item(), accuracy.item()


class Journal(BaseHook):
    """Writes a line for every checkpoint saved or removed, from which the demo's last table is made."""

    events = (HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_DELETE)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def execute(self, context: HookContext) -> None:
        """Note the event's facts: epoch, val_loss and size of a save, the reason of a removal."""
        with self.path.open("a") as file:
            print(json.dumps({"id": context.checkpoint_id, **context.data}), file=file)


class Training:
    """One training run and everything that changes as it goes on, which is what its checkpoints hold."""

    def __init__(self, folder: Path, tracker: ExperimentTracker, epochs: int) -> None:
        torch.manual_seed(1)  # initial weights and dropout
        self.epochs = epochs
        self.epoch = self.step = 0
        self.images = load_images()
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.shuffler = torch.Generator().manual_seed(2)  # order of the training images
        self.tracker = tracker
        self.manager = EnhancedCheckpointManager(tracker, str(folder / "checkpoints"), max_checkpoints=KEPT)
        self.journal = folder / "journal.jsonl"
        self.manager.register_hook(Journal(self.journal))

    def run(self, on_batch: Callable[[int, int], None] = lambda epoch, batch: None) -> None:
        """Train until the last epoch, with a checkpoint after each; ``on_batch`` is told of every batch."""
        with tqdm(total=self.epochs * BATCHES, initial=self.step, unit="batch", disable=None) as bar:
            while self.epoch < self.epochs:
                self.epoch += 1
                bar.set_description(f"epoch {self.epoch}/{self.epochs}")
                losses = []
                for loss in self.train_epoch():
                    self.step += 1
                    losses.append(loss)
                    self.tracker.log_metric("train_loss", loss, step=self.step)
                    bar.update()
                    on_batch(self.epoch, len(losses))
                self.save(sum(losses) / len(losses))

    def train_epoch(self) -> Iterator[float]:
        """Go once through the training images in a new order; yields the loss of each batch."""
        images, labels = self.images["train"]
        self.model.train()
        for chosen in torch.randperm(len(images), generator=self.shuffler).split(BATCH):
            loss = nn.functional.cross_entropy(self.model(images[chosen]), labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()
        self.scheduler.step()

    def save(self, loss: float) -> None:
        """Log the validation metrics and save a checkpoint with all that exact resume needs."""
        val_loss, accuracy = evaluate(self.model, *self.images["val"])
        self.tracker.log_metrics({"val_loss": val_loss, "val_accuracy": accuracy}, step=self.step)
        self.manager.save_checkpoint(
            self.model,
            self.optimizer,
            self.scheduler,
            epoch=self.epoch,
            step=self.step,
            loss=loss,
            val_loss=val_loss,
            metrics={"val_accuracy": accuracy},
            extra_state={"shuffler": self.shuffler},
        )

    def resume(self) -> None:
        """Go back to the latest checkpoint; every byte of it is verified before it is used."""
        extra = {"shuffler": self.shuffler}
        checkpoint = self.manager.restore(self.model, self.optimizer, self.scheduler, extra)
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]

    def outcome(self) -> dict[str, Any]:
        """Return what two runs must agree in: the last checkpoint as it is stored, and the metric history.

        What the killed run logged after its last checkpoint is logged again by the resumed run, so the history is taken
        by metric and step, and the last value counts.
        """
        checkpoint = self.manager.load_checkpoint()
        del checkpoint["_checkpoint_metadata"]  # the ids, which differ
        history = {f"{p['metric_name']} at step {p['step']}": p["metric_value"] for p in self.tracker.get_metrics()}
        return {**checkpoint, "history": history}


def train_until_killed(folder: Path, epochs: int, parent: Connection) -> None:
    """Child process: train until the middle of an epoch, report that to the parent, and wait for the kill."""
    configure_torch()
    tqdm.set_lock(threading.RLock())  # its own lock for processes would outlive a killed one, with a warning
    with open_tracker(folder, epochs) as tracker:

        def report(epoch: int, batch: int) -> None:
            if (epoch, batch) == (epochs // 2 + 1, BATCHES // 2):
                tracker.flush()  # metrics wait half a second at most; stored, they show what a resume must deal with
                parent.send(f"epoch {epoch}, batch {batch}")
                signal.pause()

        Training(folder, tracker, epochs).run(report)


def train_and_kill(folder: Path, epochs: int) -> None:
    """Start the training in a child process, and kill it the moment it reports the middle of an epoch."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=train_until_killed, args=(folder, epochs, sender))
    child.start()
    sender.close()  # the child's copy is the last one: should it fail, recv() raises EOFError instead of waiting
    where = receiver.recv()
    child.kill()
    child.join()
    print(f"\n   Process {child.pid} was in {where} when SIGKILL ended it (exit code {child.exitcode}).")


def database_url(folder: Path) -> str:
    """Return the URL of a run's database."""
    return f"sqlite:///{folder.resolve() / 'experiments.db'}"


def open_tracker(folder: Path, epochs: int) -> ExperimentTracker:
    """Return the tracker of a new run in a folder of its own."""
    folder.mkdir(parents=True)
    config = {"epochs": epochs, "batch": BATCH, "learning_rate": LEARNING_RATE}
    return ExperimentTracker("digits", "demo", ["cnn"], config, database_url(folder))


def reopen_tracker(folder: Path) -> ExperimentTracker:
    """Return the tracker of the run in a folder, of which nothing is known any more but where it is."""
    with EnhancedCheckpointManager(checkpoint_dir=str(folder / "checkpoints"), database_url=database_url(folder)) as it:
        found = it.list_checkpoints()
    print(f"   Checkpoints found: {len(found)}, the latest of epoch {found[-1]['epoch']}.")
    return ExperimentTracker.resume(found[-1]["experiment_id"], database_url(folder))


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Return where two nested states differ first, bit for bit, or None."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and one.numpy().tobytes() == other.numpy().tobytes()
        return None if same else where
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                return f"{where}[{key!r}], which only one of them has"
            found = first_difference(one[key], other[key], f"{where}[{key!r}]")
            if found:
                return found
        return None
    return None if repr(one) == repr(other) else f"{where}: {one!r} and {other!r}"


def compare(unbroken: dict[str, Any], training: Training) -> None:
    """Exit with an error unless the resumed training arrived where the unbroken one did."""
    resumed = training.outcome()
    difference = first_difference(unbroken, resumed)
    if difference:
        sys.exit(f"FAILED: the resumed run is not the unbroken one; they differ at {difference}")
    points = len(training.tracker.get_metrics())
    twice = points - len(resumed["history"])
    print("   Weights, optimizer, scheduler, random states and metric history are the same, bit for bit.")
    print(f"   {twice} of {points} metric points were logged twice: by the killed run after its last checkpoint, and")
    print("   again after the resume. By metric and step, the last value is the one compared.")


def evaluate_best(training: Training) -> None:
    """Load the best model by validation loss into a new network and evaluate it on images never used before."""
    best = training.manager.load_checkpoint(checkpoint_type="best_val_loss", verify_integrity=True)
    model = make_model()
    model.load_state_dict(best["model_state_dict"])
    loss, accuracy = evaluate(model, *training.images["test"])
    print(f"   Epoch {best['epoch']}, val_loss {best['val_loss']:.4f}: test loss {loss:.4f}, accuracy {accuracy:.1%}.")


def print_checkpoints(training: Training) -> None:
    """Print what became of every checkpoint, and why."""
    told: dict[str, dict[str, Any]] = {}
    for line in training.journal.read_text().splitlines():
        facts = json.loads(line)
        told.setdefault(facts["id"], {}).update(facts)
    kept = training.manager.retention_plan().kept
    trash = {item["checkpoint_id"] for item in training.manager.list_trash()}
    print("\n   epoch  checkpoint  val_loss     size  now       why")
    for key, facts in told.items():
        now = "kept" if key in kept else "in trash" if key in trash else "removed"
        size = f"{facts['size'] / 1024:.0f} KiB"
        why = kept.get(key) or facts["reason"]
        print(f"   {facts['epoch']:5}  {key[:8]:10}  {facts['val_loss']:8.4f}  {size:>7}  {now:8}  {why}")


def configure_torch() -> None:
    """Make every run on this machine compute the same bits."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Train, kill, resume, and compare bit for bit.")
    parser.add_argument("--epochs", type=int, default=15, help="epochs to train, at least 2 (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=Path("demo_run"), help="where the runs go; earlier ones are replaced (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2, so that there is a checkpoint before the kill")
    return arguments


def main() -> None:
    """Tell the story in six steps."""
    arguments = parse_arguments()
    epochs, unbroken, interrupted = arguments.epochs, arguments.dir / "unbroken", arguments.dir / "interrupted"
    for folder in (unbroken, interrupted):
        shutil.rmtree(folder, ignore_errors=True)
    configure_torch()
    print(f"1. Train for {epochs} epochs without a break, in {unbroken}.")
    with open_tracker(unbroken, epochs) as tracker:
        training = Training(unbroken, tracker, epochs)
        training.run()
        expected = training.outcome()
    print(f"2. Train the same in a child process, in {interrupted}, and kill it in the middle of an epoch.")
    train_and_kill(interrupted, epochs)
    print("3. Open the directory again, which runs recovery, and go on from the latest checkpoint to the end.")
    with reopen_tracker(interrupted) as tracker:
        training = Training(interrupted, tracker, epochs)
        training.resume()
        training.run()
        print("4. Compare the resumed run with the unbroken one.")
        compare(expected, training)
        print("5. Load the best checkpoint by val_loss, verified, and evaluate it on the test images.")
        evaluate_best(training)
        print(f"6. What became of the checkpoints of the interrupted run, of which at most {KEPT} are kept:")
        print_checkpoints(training)
        tracker.set_status("completed")
        print(f"\n   Report with all metrics: {tracker.generate_report(output_dir=str(arguments.dir))}")


if __name__ == "__main__":
    main()
