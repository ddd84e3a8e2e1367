"""Something that is done every so often, in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from model_checkpoint.errors import ConfigurationError

log = logging.getLogger(__name__)


class Heartbeat:
    """Calls a function every so often, in a thread, between ``start`` and ``stop``. A forked child has no thread.

    Args:
        seconds: between two calls.
        beat: called in the thread. What it raises is logged.

    Raises:
        ConfigurationError: ``seconds`` is no number of seconds.
    """

    def __init__(self, seconds: float, beat: Callable[[], object]) -> None:
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, (int, float))
            or not 0 < seconds < threading.TIMEOUT_MAX
        ):
            raise ConfigurationError(f"seconds between two heartbeats must be a positive number, not {seconds!r}")
        self._seconds = seconds
        self._beat = beat
        self._stop: threading.Event | None = None

    def start(self) -> None:
        """Begin, anew where it goes on already."""
        self.stop()
        self._stop = threading.Event()
        threading.Thread(target=self._run, args=(self._stop,), name="model-checkpoint-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Call it no more; a call that is under way ends by itself."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._seconds):
            try:
                self._beat()
            except Exception:
                log.exception("a heartbeat failed; the next one tries again")
