"""Rows collected in memory and written in batches by a thread, so that the caller never waits for the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from model_checkpoint.utils.fork import watch

log = logging.getLogger(__name__)
Row = TypeVar("Row")


class BatchedWriter(Generic[Row]):
    """Hands rows to ``write`` in the order of ``extend``, by age, by count, on ``flush`` and on ``close``.

    A batch that cannot be written stays in memory and is tried again. A forked child starts empty: what the parent had
    collected is the parent's to write.

    Args:
        write: stores a batch whole or raises.
        max_rows: rows that are not left waiting for their age.
        max_age: seconds that a row waits at most before it is written.

    Attributes:
        pending: rows not written yet; always the same list.
    """

    def __init__(self, write: Callable[[list[Row]], object], max_rows: int = 10_000, max_age: float = 0.5) -> None:
        self.pending: list[Row] = []
        self._write = write
        self._max_rows = max_rows
        self._max_age = max_age
        self._start()
        watch(self)

    def before_fork(self) -> None:
        """Let a batch that is being written come to its end."""
        self._writing.acquire()
        self._resting = True

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._resting:
            self._resting = False
            self._writing.release()

    def after_fork_in_child(self) -> None:
        """Start empty, with a thread of its own."""
        self.pending.clear()
        self._start()

    def _start(self) -> None:
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._some = threading.Event()
        self._many = threading.Event()
        self._closed = False
        self._resting = False
        self._warned = False

    def extend(self, rows: Iterable[Row]) -> None:
        """Collect rows and return; they are on their way to ``write`` within ``max_age`` seconds."""
        self.pending.extend(rows)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="model-checkpoint-writer", daemon=True)
            self._thread.start()
        self._some.set()
        if len(self.pending) >= self._max_rows:
            self._many.set()

    def _run(self) -> None:
        while not self._closed:
            self._some.wait()
            self._some.clear()
            self._many.wait(self._max_age)
            self._many.clear()
            try:
                self.flush()
                self._warned = False
            except Exception as error:  # noqa: BLE001 - whatever write() raises, the thread goes on and tries again
                if not self._warned:
                    log.warning(
                        "%s rows could not be written, they are kept and tried again: %s", len(self.pending), error
                    )
                self._warned = True
                self._some.set()

    def flush(self) -> None:
        """Write everything collected so far; raises what ``write`` raises, with the rows kept."""
        with self._writing:
            batch = self.pending[:]
            if batch:
                self._write(batch)
                del self.pending[: len(batch)]  # others may only have added behind them

    def close(self) -> None:
        """Write everything and stop the thread; raises what ``write`` raises. Closing twice does nothing."""
        self._closed = True
        self._some.set()
        self._many.set()
        self.flush()
