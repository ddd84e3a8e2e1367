"""Row 11: what a background save holds is the state at one moment, and what it takes for that is bounded.

Every element of every array carries the same counter, which training changes in place as soon as a save has returned,
and a thread goes on changing while saves run. A loaded state that carries two counters was torn.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, needs_proc
from helpers_storage import needs_torch, np, raw_bytes, torch

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

DEADLINE = 120.0  # seconds after which a child counts as hung


class Counted:
    """A state of which every element is a counter.

    Args:
        chance: for the sizes.
    """

    def __init__(self, chance: random.Random) -> None:
        sizes = [chance.randrange(1, 3000) for _ in range(6)] + [50_000]
        self.plain: dict[str, Any] = {f"plain {i}": array("d", [0]) * size for i, size in enumerate(sizes)}
        self.tensors: dict[str, Any] = {}
        if torch is not None:
            base = torch.zeros(5000, dtype=torch.float64)
            self.tensors = {f"tensor {i}": torch.zeros(size, dtype=torch.float64) for i, size in enumerate(sizes)}
            self.tensors |= {"low": base[:3000], "high": base[2000:], "gaps": torch.zeros(600, 4).double()[:, ::2]}
        if np is not None:
            self.tensors |= {f"array {i}": np.zeros(size) for i, size in enumerate(sizes)}
        self.lock = threading.Lock()
        self.value = 0

    def set(self, value: int) -> None:
        for each in self.plain.values():
            each[:] = array("d", [value]) * len(each)
        for each in self.tensors.values():
            each[:] = value
        self.value = value


def is_all(state: dict[str, Any], value: int) -> bool:
    """Whether every element of a loaded state is ``value``."""
    one = array("d", [value]).tobytes()
    return all(raw_bytes(each) == one * (len(raw_bytes(each)) // 8) for each in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["safetensors", pytest.param("pytorch", marks=needs_torch)])
def test_every_loaded_state_carries_one_counter(
    backend: str,
    tmp_path: Path,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    saves = effort(250, 2500)  # of each backend
    state, ended = Counted(chance), threading.Event()
    expected: dict[str, int] = {}
    with ExperimentTracker("torn", database_url=f"sqlite:///{tmp_path}/e.db") as tracker:
        manager = EnhancedCheckpointManager(
            tracker, tmp_path / "c", backend, async_save=True, max_pending_saves=2, max_checkpoints=None, io_threads=3
        )

        def train() -> None:
            while not ended.is_set():
                with state.lock:  # a state must not be changed while save_checkpoint() has not returned
                    state.set(state.value + 1)

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            for _ in range(saves):
                with state.lock:
                    expected[manager.save_checkpoint({**state.plain, **state.tensors})] = state.value
                    state.set(state.value + 1)
                if len(expected) >= 10:
                    check(manager, expected, keep=2)
        finally:
            ended.set()
            trainer.join()
        check(manager, expected, keep=0)
    tried(saves)


def check(manager: EnhancedCheckpointManager, expected: dict[str, int], keep: int) -> None:
    """Load and delete all but the newest."""
    for checkpoint_id in list(expected)[: len(expected) - keep]:
        loaded = manager.load_checkpoint(checkpoint_id)["model_state_dict"]
        assert is_all(loaded, expected.pop(checkpoint_id))
        manager.delete_checkpoint(checkpoint_id)
    manager.empty_trash()


MEMORY = """
import sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, register_storage_backend
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import SaveFailedError

def rss():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM"))

class Failing(SafeTensorsBackend):
    name = "failing"

    def plan(self, state, size):
        raise OSError(28, "no space")

register_storage_backend("failing", Failing)
folder, backend = sys.argv[1:]
tracker = ExperimentTracker("memory", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", backend, async_save=True, max_checkpoints=1)
state, kept = {"w": array("d", bytes(32 << 20))}, []
before = rss()
for epoch in range(20):
    try:
        manager.save_checkpoint(state, epoch=epoch)
        manager.wait()
    except SaveFailedError as error:
        kept.append(error)
print(rss() - before, len(kept))
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("backend", ["safetensors", "failing"])
def test_20_saves_need_the_memory_of_one_snapshot_also_when_they_fail(tmp_path: Path, backend: str) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
    grown, failed = map(int, done.stdout.split())
    assert failed == (20 if backend == "failing" else 0)
    assert grown < 2 * 32 + 24, done.stderr
