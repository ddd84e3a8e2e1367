"""Us and the peers that save in the background; ``ASYNC_PEERS`` names them."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import disk
import torch.distributed.checkpoint as dcp
from matmul import Matmul, slow_down
from peers import Orbax, Ours
from states import State
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class AsyncPeer:
    """One way to save in the background."""

    def start(self) -> None:
        """Begin a save; returns when the state may be changed again. What passes until then is the stall."""
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until it is durable."""
        raise NotImplementedError

    def slow_down(self, matmul: Matmul) -> list[float]:
        """Return slow-down and extra seconds of a matmul loop, see matmul.py."""
        return slow_down(matmul, self.start, self.wait)

    def clear(self) -> None:
        """Remove what was saved, and let the disk come to rest."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything but the files."""


class OursAsync(AsyncPeer):
    """This package with ``async_save=True``."""

    def __init__(self, state: State, folder: Path) -> None:
        self._ours = Ours(state, folder, async_save=True)

    def start(self) -> None:
        parts = self._ours.state.parts
        self._ours.id = self._ours.manager.save_checkpoint(parts["model"], parts["optimizer"] or None)

    def wait(self) -> None:
        self._ours.manager.wait()

    def clear(self) -> None:
        self._ours.clear()

    def close(self) -> None:
        self._ours.close()


class DcpAsync(AsyncPeer):
    """``dcp.async_save`` in a thread; the files are fsynced.

    Args:
        state, folder: as for a ``Peer``.
        reuse: one stager for all saves, whose buffers stay; else DCP makes one for each save.
    """

    def __init__(self, state: State, folder: Path, reuse: bool) -> None:
        self._state, self._path = state, folder / f"DcpAsync-{reuse}"
        # Pinned memory and staging in the background want an accelerator; shared memory serves other processes.
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if reuse else None
        self._save: Future[Any] = Future()

    def start(self) -> None:
        response = dcp.async_save(self._state.parts, checkpoint_id=self._path, async_stager=self._stager, no_dist=True)
        assert isinstance(response, Future)
        self._save = response

    def wait(self) -> None:
        self._save.result()

    def clear(self) -> None:
        disk.remove(self._path)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class OrbaxAsync(AsyncPeer):
    """Orbax's StandardCheckpointer, which saves in the background; the matmul loop runs in its process."""

    def __init__(self, state: State, folder: Path) -> None:
        self._orbax = Orbax(state, folder)

    def start(self) -> None:
        self._orbax.ask("start")

    def wait(self) -> None:
        self._orbax.ask("wait")

    def slow_down(self, matmul: Matmul) -> list[float]:
        found: list[float] = self._orbax.ask("slow_down")
        return found

    def clear(self) -> None:
        self._orbax.clear()

    def close(self) -> None:
        self._orbax.close()


ASYNC_PEERS = {
    "ours": OursAsync,
    "DCP, reused stager": partial(DcpAsync, reuse=True),
    "DCP, a stager for each": partial(DcpAsync, reuse=False),
    "Orbax": OrbaxAsync,
}
