"""What runs beside a tracker: the slow part of the capture, once, and the sampling of system metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import DatabaseError
from model_checkpoint.tracking.capture import Capture, folder, later
from model_checkpoint.tracking.gpus import find_nvml
from model_checkpoint.tracking.system_metrics import Log, SystemSampler

log = logging.getLogger(__name__)
_LONGEST_WAIT = 3.0  # seconds for a capture at the end of its run


class Recording:
    """The threads of one tracker. In a forked child there are none.

    Args:
        database: where the experiment is.
        experiment_id: which.
    """

    def __init__(self, database: EnhancedDatabaseConnection, experiment_id: str) -> None:
        self._database = database
        self._experiment_id = experiment_id
        self._capturing: threading.Thread | None = None
        self._sampler: SystemSampler | None = None

    def begin(self, wanted: Capture, found: dict[str, Any] | None, log_: Log, resumed: bool = False) -> None:
        """Find out the rest in the background and store it, and sample system metrics until ``stop``.

        Args:
            wanted: what of it.
            found: what is known already; None: nothing is to be found out.
            log_: see ``SystemSampler``.
            resumed: whether what is found is an entry of the list ``resumed`` of the capture that there is.
        """
        find_nvml()  # imports it here: a fork while a thread does would leave the child unable to
        if found is not None:
            self._capture(wanted, found, resumed)
        if wanted.system_metrics:
            self._sampler = SystemSampler(log_, wanted.interval)
            _started(self._sampler.start)

    def _capture(self, wanted: Capture, found: dict[str, Any], resumed: bool) -> None:
        arguments = (self._database, self._experiment_id, wanted, found, folder(), resumed)
        thread = threading.Thread(target=_capture, args=arguments, name="model-checkpoint-capture", daemon=True)
        self._capturing = thread if _started(thread.start) else None

    def stop(self) -> None:
        """End the sampling, and wait for the capture for at most three seconds."""
        if self._sampler is not None:
            self._sampler.stop()
        # The garbage collector can end a tracker in any thread.
        if self._capturing is not None and self._capturing is not threading.current_thread():
            self._capturing.join(_LONGEST_WAIT)


def _started(start: Callable[[], None]) -> bool:
    try:
        start()
    except RuntimeError as error:  # the system gives no more threads
        log.debug("nothing is captured in the background: %s", error)
        return False
    return True


def _capture(
    database: EnhancedDatabaseConnection,
    experiment_id: str,
    wanted: Capture,
    found: dict[str, Any],
    cwd: str | None,
    resumed: bool,
) -> None:
    found = {**found, **later(wanted, cwd)}
    try:
        with database.transaction(durable=True):
            known = database.experiments.captured(experiment_id)
            if known is not None:  # something was captured when it started
                change = {"resumed": [*known.get("resumed", []), found]} if resumed else found
                database.experiments.set_captured(experiment_id, {**known, **change})
    except DatabaseError as error:
        log.debug("the capture of experiment %s could not be stored: %s", experiment_id, error)
