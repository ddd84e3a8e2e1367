"""What a tracker holds, and how it is let go of: by ``close``, by the garbage collector, at the interpreter's exit."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.performance.batched_writer import BatchedWriter
from model_checkpoint.tracking.metric_log import MetricLog
from model_checkpoint.tracking.recording import Recording

_LONGEST_WAIT = 3.0  # seconds that the garbage collector waits for what nobody has closed
_exiting = threading.Event()
# At the exit, waiting takes as long as it takes: no thread goes on after it. The handler that runs finalizers then is
# registered with the first of them in a process; one that is registered behind it runs before it.
weakref.finalize(_exiting, bool).atexit = False
atexit.register(_exiting.set)


class Held:
    """What one tracker holds.

    Args:
        recording, writer, metrics: its own.
        database: the connection, if it is its own, too.
    """

    def __init__(
        self,
        recording: Recording,
        writer: BatchedWriter[Any],
        metrics: MetricLog,
        database: EnhancedDatabaseConnection | None,
    ) -> None:
        self._recording = recording
        self._writer = writer
        self._metrics = metrics
        self._database = database

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
        self.let_go(-1.0 if _exiting.is_set() else _LONGEST_WAIT)

    def _close(self) -> None:
        self._metrics.close()
        if self._database is not None:
            self._database.close()
