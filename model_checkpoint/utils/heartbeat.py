"""Something that is done every so often, in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from model_checkpoint.utils.checks import check_positive

log = logging.getLogger(__name__)


class Heartbeat:
    """Calls a function every so often, in a thread, from now until ``stop``. A forked child has no such thread.

    Args:
        seconds: between two calls.
        beat: called in the thread; returns whether to go on. What it raises is logged, and it goes on.

    Raises:
        ConfigurationError: ``seconds`` is no number of seconds.
    """

    def __init__(self, seconds: float, beat: Callable[[], bool]) -> None:
        check_positive(seconds=seconds)
        self._seconds = seconds
        self._beat = beat
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="model-checkpoint-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Call it no more; a call that is under way ends by itself."""
        self._stop.set()

    def _run(self) -> None:
        going = True
        while going and not self._stop.wait(self._seconds):
            try:
                going = self._beat()
            except Exception:
                log.exception("a heartbeat failed; the next one tries again")
