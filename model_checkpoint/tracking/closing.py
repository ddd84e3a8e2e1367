"""What a tracker holds, and how it is let go of: by ``close``, by the garbage collector, at the interpreter's exit."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import DatabaseError, ModelCheckpointError, Preempted
from model_checkpoint.hooks.threads import finish
from model_checkpoint.performance.batched_writer import BatchedWriter
from model_checkpoint.tracking.events import RunEvents
from model_checkpoint.tracking.metric_log import MetricLog
from model_checkpoint.tracking.recording import Recording

log = logging.getLogger(__name__)
_LONGEST_WAIT = 3.0  # seconds that the garbage collector waits for what nobody has closed
_exiting = threading.Event()
# At the exit, waiting takes as long as it takes: no thread goes on after it. The handler that runs finalizers then is
# registered with the first of them in a process; one that is registered behind it runs before it.
weakref.finalize(_exiting, bool).atexit = False
atexit.register(_exiting.set)
_collected: dict[str, tuple[str, int]] = {}  # experiment -> the URL of its database, and the process


def status_after(error: BaseException | None) -> str:
    """Return the status of a run that ended with this exception, or None."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "completed"
    return "interrupted" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed"


def _status_at_exit() -> str | None:
    """Return the status of runs that nobody has closed; None where another process speaks for them."""
    processes = sys.modules.get("multiprocessing.process")
    if (processes is not None and processes.parent_process() is not None) or os.environ.get("RANK", "0") != "0":
        return None
    if Preempted.raised:
        return "interrupted"
    error, trace = getattr(sys, "last_value", None), getattr(sys, "last_traceback", None)
    # What was raised below a prompt or a window's event loop ended nothing: only the program's own first line counts.
    ended = trace is not None and trace.tb_frame.f_globals.get("__name__") in ("__main__", "runpy")
    return status_after(error if ended and not hasattr(sys, "ps1") else None)


@atexit.register
def _conclude_collected() -> None:
    """Give runs whose trackers the garbage collector has ended a status; how they ended, nobody knows any more."""
    status = _status_at_exit()
    places: dict[str, list[str]] = {}
    for experiment_id, (place, process) in _collected.items():
        if process == os.getpid():
            places.setdefault(place, []).append(experiment_id)
    for place, experiment_ids in places.items() if status else ():
        try:
            database = EnhancedDatabaseConnection(place, create=False)
            try:
                database.experiments.conclude(experiment_ids, "interrupted" if Preempted.raised else "completed")
            finally:
                database.close()
        except ModelCheckpointError as error:  # it was there for a while only
            log.debug("the status of %d runs could not be noted: %s", len(experiment_ids), error)


class Held:
    """What one tracker holds.

    Args:
        recording, writer, metrics: its own.
        database: the connection.
        owned: whether that is its own, too.
        events: of its run.

    Attributes:
        status: how the run ended; None while it goes on.
    """

    def __init__(
        self,
        recording: Recording,
        writer: BatchedWriter[Any],
        metrics: MetricLog,
        database: EnhancedDatabaseConnection,
        owned: bool,
        events: RunEvents,
    ) -> None:
        self._recording = recording
        self._writer = writer
        self._metrics = metrics
        self._database = database
        self._owned = owned
        self._events = events
        self._experiment_id = events.experiment_id
        self._process = os.getpid()
        self._lender: Held | None = None
        self.status: str | None = None

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
            if not self._database.in_memory:
                _collected[self._experiment_id] = self._database.database_url, self._process
            self.let_go(_LONGEST_WAIT)
            return
        status = _status_at_exit()
        try:
            self._writer.flush()
            if status is not None:
                self.conclude(status)
            if self._process == os.getpid():  # a forked child's end is not the run's
                self._events.ended()
        finally:
            self.let_go()
            finish()

    def end_with(self, lender: Held) -> None:
        """Store what is buffered, and give the run the status of ``lender``, when that closes the connection."""
        self._lender = lender
        self._database.before_close(self._end)

    def _end(self) -> None:
        self._writer.flush()
        if self._lender is not None and self._lender.status is not None:
            self.conclude(self._lender.status)

    def conclude(self, status: str) -> None:
        """Give the run a final status, unless this tracker has. A failure overrules that another tracker is done."""
        if self.status is None and self._process == os.getpid():  # of a tracker that was forked, the parent knows
            self.status = status
            over = "running" if status == "completed" else "completed"
            try:
                self._database.experiments.conclude([self._experiment_id], status, over)
            except DatabaseError as error:
                log.warning("a run ended as %s, which the database could not note: %s", status, error)
            self._events.status_changed(status)

    def _close(self) -> None:
        self._metrics.close()
        if self._owned:
            self._database.close()
