"""Rows collected in memory and written in batches by a thread, so that the caller never waits for the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from model_checkpoint.utils.fork import watch

log = logging.getLogger(__name__)
Row = TypeVar("Row")


class _Ticket:
    """A caller that waits for everything collected so far to be written."""

    def __init__(self, then: Callable[[], object] | None = None) -> None:
        self.done = threading.Lock()  # taken until it is; waiting for it can be interrupted at any moment
        self.done.acquire()
        self.error: Exception | None = None
        self.then = then  # what to call after the last batch; the thread ends with it


class BatchedWriter(Generic[Row]):
    """Hands rows to ``write`` in the order of ``extend``, by age, by count, on ``flush`` and at the ``end``.

    Only the writer's own thread calls ``write``: a Ctrl-C, which goes to the main thread, cannot come between a batch's
    commit and the note that it is written. A batch that cannot be written stays in memory and is tried again, the same
    rows and no others. A forked child starts empty: what the parent had collected is the parent's to write.

    Args:
        write: called with a batch and whether somebody waits for it; stores it whole or raises. Without somebody who
            waits it is called when there are rows only.
        max_rows: rows that are not left waiting for their age.
        max_age: seconds that a row waits at most before it is written.

    Attributes:
        pending: rows not written yet; always the same list.
    """

    def __init__(
        self, write: Callable[[list[Row], bool], object], max_rows: int = 10_000, max_age: float = 0.5
    ) -> None:
        self.pending: list[Row] = []
        self._write = write
        self._max_rows = max_rows
        self._max_age = max_age
        self._start_afresh()
        watch(self)

    def _start_afresh(self) -> None:
        self._thread: threading.Thread | None = None
        self._calls: SimpleQueue[_Ticket | None] = SimpleQueue()  # None: there are rows
        self._called = False  # whether the thread knows that there are rows
        self._full = False  # and that they are enough
        self._starting = threading.Lock()
        self._writing = threading.Lock()
        self._resting = False
        self._warned = False
        self._tried = 0  # rows of the batch that could not be written

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
        self._start_afresh()

    def put(self, row: Row) -> None:
        """Collect a row and return; it is on its way to ``write`` within ``max_age`` seconds."""
        self.pending.append(row)
        if not self._called or (len(self.pending) >= self._max_rows and not self._full):
            self._call()

    def extend(self, rows: Iterable[Row]) -> None:
        """Collect rows and return; see ``put``."""
        self.pending.extend(rows)
        if not self._called or (len(self.pending) >= self._max_rows and not self._full):
            self._call()

    def _call(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="model-checkpoint-writer", daemon=True)
                self._thread.start()
            self._called = True
            self._full = len(self.pending) >= self._max_rows
            self._calls.put(None)

    def _run(self) -> None:
        ticket: _Ticket | None = None
        while ticket is None or ticket.then is None:
            ticket = self._calls.get()
            deadline = time.monotonic() + self._max_age
            while ticket is None and len(self.pending) < self._max_rows and deadline > time.monotonic():
                try:
                    ticket = self._calls.get(timeout=max(0.0, deadline - time.monotonic()))
                except Empty:
                    break
            self._called = self._full = False
            self._try_to_write(ticket)
        with self._starting:  # nobody asks this thread for anything from here on
            self._thread = None
            self._called = self._full = False
            while not self._calls.empty():
                ticket = self._calls.get()
                if ticket is not None:
                    ticket.done.release()

    def _try_to_write(self, ticket: _Ticket | None) -> None:
        try:
            self._write_pending(ticket is not None)
            self._warned = False
        except Exception as error:  # noqa: BLE001 - whatever write() raises, the thread goes on and tries again
            if ticket is not None:
                ticket.error = error
            elif not self._warned:
                log.warning("%s rows could not be written, they are kept and tried again: %s", len(self.pending), error)
                self._warned = True
            self._calls.put(None)
        finally:
            if ticket is not None:
                try:
                    if ticket.then is not None:
                        ticket.then()
                except Exception as error:  # noqa: BLE001 - whoever waits is told
                    ticket.error = ticket.error or error
                finally:
                    ticket.done.release()

    def _write_pending(self, urgent: bool) -> None:
        with self._writing:
            if self._tried:
                self._write_first(self._tried, urgent)
            if self.pending or urgent:
                self._write_first(len(self.pending), urgent)

    def _write_first(self, count: int, urgent: bool) -> None:
        self._tried = count
        self._write(self.pending[:count], urgent)
        del self.pending[:count]  # others may only have added behind them
        self._tried = 0

    def flush(self) -> None:
        """Write everything collected so far; raises what ``write`` raises, with the rows kept."""
        self._wait_for(_Ticket())

    def end(self, then: Callable[[], object], timeout: float = -1.0) -> None:
        """Write everything, call ``then`` and end the thread; ``then`` is called also when something was not written.

        Args:
            then: lets go of what ``write`` needs. Where there is a thread, it calls this.
            timeout: seconds to wait for that; below 0: for ever. The garbage collector, which ends what nobody has
                closed, runs in any thread and within any call: it may hold the very lock that the thread waits for.

        Raises:
            Exception: what ``write`` raised.
        """
        if not self._wait_for(_Ticket(then), timeout):
            then()

    def _wait_for(self, ticket: _Ticket, timeout: float = -1.0) -> bool:
        """Return whether there was a thread to wait for; without one, nothing was collected since the last end."""
        with self._starting:
            thread = self._thread
            if thread is None:
                return False
            self._calls.put(ticket)
        if thread is not threading.current_thread() and ticket.done.acquire(timeout=timeout) and ticket.error:
            raise ticket.error
        return True
