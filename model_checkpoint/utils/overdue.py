"""A second way for what takes long, gone by one thread of the process while the first one is still tried."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from model_checkpoint.utils.fork import renew_in_child

log = logging.getLogger(__name__)


class _Block:
    """A ``with`` block that is being executed."""

    def __init__(self, late: Callable[[], object], deadline: float) -> None:
        self.late: Callable[[], object] | None = late  # None when it has ended
        self.deadline = deadline
        self.ended = threading.Lock()  # taken until it has
        self.ended.acquire()
        self.deciding = threading.Lock()  # taken while ``late`` runs


class Overdue:
    """Calls a function for each block that takes long, again and again until it ends, in a thread that stays.

    Args:
        seconds: how long a block may take, and how long it is between two calls. It is the same for all, so that they
            come due in turn.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._blocks: SimpleQueue[_Block] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        for name, make in (("_blocks", SimpleQueue), ("_thread", type(None)), ("_starting", threading.Lock)):
            renew_in_child(self, name, make)

    @contextmanager
    def otherwise(self, late: Callable[[], object]) -> Iterator[None]:
        """Run a block; ``late`` is called every so often while it runs, and not any more when this returns.

        Args:
            late: called in another thread. What it raises is logged.
        """
        block = _Block(late, time.monotonic() + self._seconds)
        if self._is_watching():
            self._blocks.put(block)
        try:
            yield
        finally:
            with block.deciding:
                block.late = None
            block.ended.release()

    def _is_watching(self) -> bool:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="model-checkpoint-overdue", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends, and takes no thread any more
                    return False
                self._thread = thread
            return True

    def _run(self) -> None:
        while True:
            block = self._blocks.get()
            block.ended.acquire(timeout=max(0.0, block.deadline - time.monotonic()))
            with block.deciding:
                if block.late is None:
                    continue
                try:
                    block.late()
                except Exception:
                    log.exception("what takes long could not be gone another way")
            block.deadline = time.monotonic() + self._seconds
            self._blocks.put(block)
