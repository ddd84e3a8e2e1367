"""Orbax on JAX arrays: carries out the commands that come by standard input, and answers each with a line of JSON.

    python benchmarks/orbax_server.py STATE FOLDER

It is a process of its own so that JAX's and TensorStore's threads do not disturb what else is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from matmul import Matmul, slow_down
from states import build


class Server:
    """One state and its checkpointer.

    Args:
        name: of the state.
        path: where it is saved.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._path = path
        parts = build(name).parts
        self._state = jax.tree.map(lambda tensor: jax.numpy.array(tensor.numpy()), parts)  # a copy
        self._target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._state)
        self._checkpointer = ocp.StandardCheckpointer()
        self._loaded: Any = None

    def build(self) -> None:
        """Nothing is left to do; that it answers says that the state is there."""

    def start(self) -> None:
        """Begin a save; returns when the state may be changed again."""
        self._checkpointer.save(self._path, self._state)

    def wait(self) -> None:
        """Wait until the save is finished."""
        self._checkpointer.wait_until_finished()

    def load(self) -> None:
        """Load into new memory."""
        self._loaded = None
        self._loaded = jax.block_until_ready(self._checkpointer.restore(self._path, self._target))

    def compare(self) -> bool:
        """Whether the state that was loaded is the one that was saved; lets go of it."""
        pairs = zip(jax.tree.leaves(self._loaded), jax.tree.leaves(self._state))
        same = all(np.array_equal(loaded, saved) for loaded, saved in pairs)
        self._loaded = None
        return same

    def slow_down(self) -> list[float]:
        """See matmul.py."""
        shutil.rmtree(self._path, ignore_errors=True)
        return slow_down(Matmul(), self.start, self.wait)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    server = Server(sys.argv[1], Path(sys.argv[2]))
    commands: dict[str, Callable[[], Any]] = {
        name: getattr(server, name) for name in ("build", "start", "wait", "load", "compare", "slow_down")
    }
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
