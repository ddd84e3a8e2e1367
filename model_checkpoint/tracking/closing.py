"""What a tracker holds, and how it is let go of: by ``close``, by the garbage collector, at the interpreter's exit."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import DatabaseError, Preempted
from model_checkpoint.performance.batched_writer import BatchedWriter
from model_checkpoint.tracking.metric_log import MetricLog
from model_checkpoint.tracking.recording import Recording

log = logging.getLogger(__name__)
_LONGEST_WAIT = 3.0  # seconds that the garbage collector waits for what nobody has closed
_exiting = threading.Event()
# At the exit, waiting takes as long as it takes: no thread goes on after it. The handler that runs finalizers then is
# registered with the first of them in a process; one that is registered behind it runs before it.
weakref.finalize(_exiting, bool).atexit = False
atexit.register(_exiting.set)


def status_after(error: BaseException | None) -> str:
    """Return the status of a run that ended with this exception, or None."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "completed"
    return "interrupted" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed"


def _status_at_exit() -> str | None:
    """Return the status of runs that nobody has closed; None in a child, which may have them from its parent."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        return None
    # In a session that somebody types into, the last error did not end anything.
    return status_after(None if hasattr(sys, "ps1") else getattr(sys, "last_value", None))


class Held:
    """What one tracker holds.

    Args:
        recording, writer, metrics: its own.
        database: the connection, if it is its own, too.
        conclude: gives the run a final status, unless it has one.
    """

    def __init__(
        self,
        recording: Recording,
        writer: BatchedWriter[Any],
        metrics: MetricLog,
        database: EnhancedDatabaseConnection | None,
        conclude: Callable[[str], object],
    ) -> None:
        self._recording = recording
        self._writer = writer
        self._metrics = metrics
        self._database = database
        self._conclude = conclude
        self._process = os.getpid()
        self._status: str | None = None

    def let_go(self, timeout: float = -1.0) -> None:
        """Write what is buffered and close everything; waits ``timeout`` seconds for that, or for ever.

        Raises:
            DatabaseError: neither the database nor the spool took what was buffered.
        """
        try:
            self._recording.stop()
        finally:
            self._writer.end(self._close, timeout)

    def let_go_of_abandoned(self) -> None:
        """Do that for the garbage collector, which runs in any thread and may hold a lock that the writer waits for."""
        if not _exiting.is_set():
            self.let_go(_LONGEST_WAIT)
            return
        if self._process == os.getpid():
            self._status = _status_at_exit()
        self.let_go()

    def _close(self) -> None:
        self._metrics.close()
        if self._status is not None:
            try:
                self._conclude(self._status)
            except DatabaseError as error:
                log.warning("a run ended as %s, which the database could not note: %s", self._status, error)
        if self._database is not None:
            self._database.close()
