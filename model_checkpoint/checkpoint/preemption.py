"""Saving when the process is told to end: a signal is noted, and acted upon where training says that it may be."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from operator import index
from types import FrameType
from typing import Any
from weakref import ref

from model_checkpoint.checkpoint.background import default_handler, end_after_saves
from model_checkpoint.errors import ConfigurationError, Preempted


class SignalWatch:
    """Notes the first of some signals until ``end`` lets the process end by it.

    Args:
        signals: their numbers.
        owner: who acts on what is received; when it is gone, the signals go the way that they went before.
        earlier: the watch that this one takes the place of, with what it received; it is stopped.

    Attributes:
        received: the signal that came, or None.

    Raises:
        ConfigurationError: this is not the main thread, or a signal cannot be handled.
    """

    def __init__(self, signals: Iterable[int], owner: object, earlier: SignalWatch | None = None) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("save_on_signal() must be called in the main thread: Python handles signals there")
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._process, self._stopped = os.getpid(), False
        self._owner = ref(owner, self._abandoned)
        try:
            for number in dict.fromkeys(map(index, signals)):
                self._previous[number] = signal.signal(number, self._note)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            self.stop()
            advice = "pass numbers such as [signal.SIGTERM]; what an earlier call set holds on"
            raise ConfigurationError(f"save_on_signal: {signals!r} cannot be handled: {error}; {advice}") from error
        if earlier is not None:
            self.received = self.received if earlier.received is None else earlier.received
            earlier.stop()
            self._previous = {number: self._earlier(number) for number in self._previous}

    def _abandoned(self, _: object) -> None:
        """The owner is gone, and nobody will act on what came; the handler, which finds that out, is called again."""
        if self.received is not None and not self._stopped and os.getpid() == self._process:
            os.kill(os.getpid(), self.received)

    def _notes(self) -> bool:
        """Whether signals are noted: not when stopped by another thread, without an owner, or in a child."""
        return not self._stopped and self._owner() is not None and os.getpid() == self._process

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._notes():
            signal.signal(number, self._earlier(number))
            signal.raise_signal(number)
        elif self.received is None:
            self.received = number

    def _earlier(self, number: int) -> Any:
        """Return the handler that was there before this one, and before other watches that note nothing any more."""
        previous = self._previous.get(number)
        watch = getattr(previous, "__self__", None)
        if isinstance(watch, SignalWatch) and not watch._notes():
            return watch._earlier(number)
        return default_handler(number) if previous in (None, signal.SIG_DFL) else previous

    def stop(self) -> None:
        """Put the handlers back that were there before; where that is not possible now, when the next signal comes."""
        self._stopped = True
        for number in self._previous:
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == self._note:
                signal.signal(number, self._earlier(number))

    def may_end(self) -> bool:
        """Whether a signal came, and this is the thread in which the process can be brought to its end."""
        return self.received is not None and threading.current_thread() is threading.main_thread()

    def end(self) -> None:
        """Let the process end by the signal that came: its earlier handler runs; where there was none, it exits.

        Returns where the signal was ignored before.

        Raises:
            Preempted: there was none; the exit status is 128 + the signal's number, as a shell reports it.
        """
        number = self.received or signal.SIGTERM
        previous = self._earlier(number)
        self.stop()
        if callable(previous) and previous is not end_after_saves:
            signal.raise_signal(number)
        elif previous != signal.SIG_IGN:
            raise Preempted(128 + number)
