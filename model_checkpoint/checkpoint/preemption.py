"""Saving when the process is told to end: a signal is noted, and acted upon where training says that it may be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from model_checkpoint.checkpoint.background import end_after_saves
from model_checkpoint.errors import ConfigurationError, Preempted


class SignalWatch:
    """Notes the first of some signals until ``end`` lets the process end by it.

    Args:
        signals: their numbers.

    Attributes:
        received: the signal that came, or None.

    Raises:
        ConfigurationError: this is not the main thread, or a signal cannot be handled.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("save_on_signal() must be called in the main thread: Python handles signals there")
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        for number in dict.fromkeys(signals):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except (OSError, ValueError, TypeError) as error:
                self.stop()
                raise ConfigurationError(f"save_on_signal: signal {number!r} cannot be handled: {error}") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number

    def stop(self) -> None:
        """Put the handlers back that were there before, where they are still ours to take away."""
        for number, previous in self._previous.items():
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def may_end(self) -> bool:
        """Whether a signal came, and this is the thread in which the process can be brought to its end."""
        return self.received is not None and threading.current_thread() is threading.main_thread()

    def end(self) -> None:
        """Let the process end by the signal that came: its earlier handler runs; where there was none, it exits.

        Raises:
            Preempted: there was none; the exit status is 128 + the signal's number, as a shell reports it.
        """
        number = self.received or signal.SIGTERM
        previous = self._previous.get(number)
        self.stop()
        if callable(previous) and previous is not end_after_saves:
            signal.raise_signal(number)
        else:
            raise Preempted(128 + number)
