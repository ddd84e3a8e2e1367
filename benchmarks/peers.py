"""Us and the peers: each saves and loads the same state in its own way, in a few lines.

``PEERS`` names them. A peer's ``save`` calls ``lap`` with the name of a row whenever it has reached what the row says,
so that one save gives ``torch.save``, ``+ fsync`` and ``+ SHA-256``: exactly what each costs after the one before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import disk
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from states import State

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

Lap = Callable[[str], None]

# DCP says so even where it was told so by no_dist=True.
warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable or uninitialized", UserWarning)


class Peer:
    """One way to save and load a state.

    Args:
        state: what is saved.
        folder: where; the peer makes something named after itself in it.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self.state = state
        self.path = folder / type(self).__name__

    def save(self, lap: Lap) -> None:
        """Save, calling ``lap`` with the name of each row when it is reached."""
        raise NotImplementedError

    def loads(self) -> dict[str, Callable[[], Any]]:
        """Return the ways to load: row -> function whose result ``holds_state`` takes."""
        raise NotImplementedError

    def holds_state(self, loaded: Any) -> bool:
        """Whether that is the state, bit for bit."""
        return self.state.equals(loaded)

    def clear(self) -> None:
        """Remove what was saved, and let the disk come to rest."""
        disk.remove(self.path)

    def close(self) -> None:
        """Let go of everything but the files."""


class Ours(Peer):
    """This package by its public API: one manager for all rounds, as in a training run."""

    def __init__(self, state: State, folder: Path, **options: Any) -> None:
        super().__init__(state, folder)
        self.path.mkdir()
        self.tracker = ExperimentTracker("benchmark", database_url=f"sqlite:///{self.path}/experiments.db")
        self.manager = EnhancedCheckpointManager(
            self.tracker, self.path / "checkpoints", max_checkpoints=None, **options
        )
        self.id = ""
        self._warm: dict[str, Any] = {}

    def save(self, lap: Lap) -> None:
        parts = self.state.parts
        self.id = self.manager.save_checkpoint(parts["model"], parts["optimizer"] or None)
        lap("ours: save, durable, with SHA-256")

    def _load(self, **options: Any) -> dict[str, Any]:
        loaded = self.manager.load_checkpoint(self.id, **options)
        return {"model": loaded["model_state_dict"], "optimizer": loaded["optimizer_state_dict"] or {}}

    def loads(self) -> dict[str, Callable[[], Any]]:
        self._warm = self._load()
        return {
            "ours: load, every byte verified": self._load,
            "ours: load_into warm memory, every byte verified": self._load_into,
            "ours: load, mapped, not verified": partial(self._load, verify_integrity=False),
        }

    def _load_into(self) -> dict[str, Any]:
        self.manager.load_into(self._warm["model"], self._warm["optimizer"] or None, checkpoint_id=self.id)
        return self._warm

    def clear(self) -> None:
        self.manager.delete_checkpoint(self.id)
        self.manager.empty_trash()
        os.sync()

    def close(self) -> None:
        self.manager.close()
        self.tracker.close()


class Torch(Peer):
    """``torch.save`` and ``torch.load`` with their defaults."""

    def save(self, lap: Lap) -> None:
        torch.save(self.state.parts, self.path)
        lap("torch.save")
        disk.fsync(self.path)
        lap("torch.save + fsync")
        disk.sha256(self.path)
        lap("torch.save + fsync + SHA-256")

    def loads(self) -> dict[str, Callable[[], Any]]:
        return {"torch.load": partial(torch.load, self.path), "SHA-256 + torch.load": self._checked}

    def _checked(self) -> Any:
        disk.sha256(self.path)
        return torch.load(self.path)


class SafeTensors(Peer):
    """``save_file`` and ``load_file``, which maps the file: its data is read when it is touched."""

    def save(self, lap: Lap) -> None:
        save_file(self.state.flat, self.path)
        lap("safetensors save_file")
        disk.fsync(self.path)
        lap("safetensors save_file + fsync")
        disk.sha256(self.path)
        lap("safetensors save_file + fsync + SHA-256")

    def loads(self) -> dict[str, Callable[[], Any]]:
        return {
            "safetensors load_file (maps, reads nothing)": partial(load_file, self.path),
            "safetensors load_file + copy to memory": self._copied,
        }

    def _copied(self) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in load_file(self.path).items()}

    def holds_state(self, loaded: Any) -> bool:
        return all(torch.equal(tensor, loaded[key]) for key, tensor in self.state.flat.items())


class Dcp(Peer):
    """``torch.distributed.checkpoint`` in one process; its writer fsyncs each file, which is its default.

    It loads into tensors that are there. With "new memory" they are allocated within the time, which is what the other
    loads do; "warm memory" was filled before, as that of a model that already ran.
    """

    threads = 1

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._warm: dict[str, dict[str, torch.Tensor]] = {}

    def save(self, lap: Lap) -> None:
        writer = dcp.FileSystemWriter(self.path, thread_count=self.threads, sync_files=True)
        dcp.save(self.state.parts, storage_writer=writer, no_dist=True)
        lap(f"DCP save, {self.threads} thread{'s' * (self.threads > 1)}, fsync")

    def loads(self) -> dict[str, Callable[[], Any]]:
        self._warm = self._load(self.state.empty())
        return {
            "DCP load into new memory": lambda: self._load(self.state.empty()),
            "DCP load into warm memory": lambda: self._load(self._warm),
        }

    def _load(self, target: Any) -> Any:
        dcp.load(target, checkpoint_id=self.path, no_dist=True)
        return target


class DcpTwoThreads(Dcp):
    """The same, written by two threads."""

    threads = 2


class Orbax(Peer):
    """Orbax on JAX arrays, in a process of its own (orbax_server.py), whose threads sleep until it is told to go."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        program = Path(__file__).with_name("orbax_server.py")
        self._server = subprocess.Popen(
            [sys.executable, program, state.name, self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("build")

    def ask(self, command: str) -> Any:
        """Let the server carry out a command; returns its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(command, file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the Orbax process ended with {self._server.wait()} at {command!r}; see its output above"
            )
        return json.loads(answer)

    def save(self, lap: Lap) -> None:
        self.ask("start")
        self.ask("wait")
        lap("Orbax save until finished")

    def loads(self) -> dict[str, Callable[[], Any]]:
        return {"Orbax restore": partial(self.ask, "load")}

    def holds_state(self, loaded: Any) -> bool:
        return bool(self.ask("compare"))

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "torch": Torch,
    "safetensors": SafeTensors,
    "dcp": Dcp,
    "dcp2": DcpTwoThreads,
    "orbax": Orbax,
}
