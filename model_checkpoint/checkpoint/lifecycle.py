"""What a manager does besides saving, loading and removing: hooks, waiting, safe points, repair, closing."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

from model_checkpoint.checkpoint.arguments import check_id, check_seconds, save_arguments
from model_checkpoint.checkpoint.exchange import CheckpointExchange
from model_checkpoint.checkpoint.preemption import SignalWatch
from model_checkpoint.checkpoint.recovery import RecoveryReport, rebuild, recover
from model_checkpoint.errors import ConfigurationError, SaveFailedError
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.hooks.hook_manager import as_hook, inside_hook
from model_checkpoint.hooks.threads import finish

_open: WeakSet[ManagerLifecycle] = WeakSet()  # those that were not closed
Manager = TypeVar("Manager", bound="ManagerLifecycle")


class ManagerLifecycle(CheckpointExchange):
    """The manager's own life; ``EnhancedCheckpointManager`` sets it up."""

    _signals: SignalWatch | None
    _at_signal: Callable[[], Mapping[str, Any]]
    save_checkpoint: Callable[..., str]

    def register_hook(self, *arguments: Any, **options: Any) -> None:
        """Register a hook; takes what ``HookManager.register_hook`` takes, and raises what it raises.

        Raises:
            ConfigurationError: the manager was made with ``enable_hooks=False``.
        """
        self._hooks().register_hook(*arguments, **options)

    def unregister_hook(self, name: str) -> bool:
        """Forget a hook; returns whether it was there."""
        return self._hooks().unregister_hook(name)

    def list_hooks(self, event: HookEvent | None = None) -> list[dict[str, Any]]:
        """Return what is registered, see ``HookManager.list_hooks``."""
        return self._hooks().list_hooks(event)

    def _hooks(self) -> HookManager:
        if self.hook_manager is None:
            raise ConfigurationError("this manager has no hooks; make it with enable_hooks=True")
        return self.hook_manager

    def _begin(self) -> None:
        """Repair what a crash left, and tell that the manager is there."""
        if self.hook_manager is not getattr(self._tracker, "hook_manager", None):  # the tracker tells its own
            self._db.on_error(self._tell_database_error)
        self._tell_recovery(recover(self._directory, self._db, self._best_metrics), "open")
        self._tell_life(HookEvent.ON_SYSTEM_START)
        _open.add(self)

    def _tell_end(self) -> None:
        if self in _open:
            _open.discard(self)
            self._tell_life(HookEvent.ON_SYSTEM_SHUTDOWN)

    def pending(self) -> list[str]:
        """Return the ids of the background saves that are not durable yet, in the order of their calls."""
        return list(self._queue.jobs)

    def wait(self, checkpoint_id: str | None = None, timeout: float | None = None) -> bool:
        """Wait until background saves are durable.

        Args:
            checkpoint_id: which; all that are pending now when None.
            timeout: seconds, from 0; None waits for as long as it takes.

        Returns:
            True, also for what was removed since. False when ``timeout`` went by before they were, and in a hook of a
            background save, where nothing can become durable meanwhile.

        Raises:
            SaveFailedError: it failed (for None: one of them did), and nobody was told yet.
            CheckpointNotFoundError: ``checkpoint_id`` is neither pending nor saved.
            ConfigurationError: ``timeout`` is no number of seconds.
        """
        check_seconds(timeout=timeout)
        if checkpoint_id is not None:
            check_id(checkpoint_id)
        ended = self._queue.wait(None if checkpoint_id is None else [checkpoint_id], timeout)
        self._queue.raise_failure(checkpoint_id)
        if (
            checkpoint_id is not None
            and ended
            and checkpoint_id not in self._db.tombstones.buried(self._directory.store_id)
        ):
            self._record(checkpoint_id)
        return ended

    def recover(self) -> RecoveryReport | None:
        """Finish or undo what crashes left half done, as opening the directory did; harmless at any time.

        Returns:
            What was done; None while a save or load elsewhere is under way, or when the directory is read-only.
        """
        self._queue.wait()
        report = recover(self._directory, self._db, self._best_metrics)
        self._tell_recovery(report, "recover")
        return report

    def rebuild_index(self) -> RecoveryReport:
        """Make the database say what the manifests in the directory say, for one that was damaged or fell behind.

        Rows that are missing are added, values and files of the others are put right, and best flags are found anew.
        Pins and verifications stay. Nothing on disk is changed, other than by ``recover``.

        Returns:
            What was done.

        Raises:
            LockTimeoutError: saves of other processes kept the directory busy for 10 seconds.
        """
        self._queue.wait()
        report = rebuild(self._directory, self._db, self._best_metrics)
        self._tell_recovery(report, "rebuild_index")
        return report

    def close(self) -> None:
        """Finish what is pending and let go of the database, unless it is the tracker's. Closing twice does nothing.

        Raises:
            SaveFailedError: a background save failed, and nobody was told yet; everything is closed all the same.
            Preempted: a signal came that ``save_on_signal`` watches for, and no safe point after it.
        """
        self._queue.wait()
        signals, self._signals = self._signals, None
        try:
            self._tell_end()
            if self._tracker is None:
                self._db.close()
            self._queue.raise_failure()
        finally:
            if signals is not None and signals.may_end():
                signals.end()  # it came when there was no safe point any more
            elif signals is not None:
                signals.stop()

    def save_on_signal(
        self, state: Callable[[], Mapping[str, Any]], signals: Collection[int] = (signal.SIGTERM, signal.SIGUSR1)
    ) -> None:
        """Save when the process is told to end, once, where training says that its state is whole; then let it end.

        A signal is only noted. At the next ``safe_point()``, or ``save_checkpoint()``, which is one too, the state is
        saved, and the process goes the way that the signal would have sent it: an earlier Python handler is called;
        where there was none, ``Preempted`` (a SystemExit with status 128 + the signal) unwinds the program; a signal
        that was ignored is ignored again. Call this again to replace ``state``; ``close`` ends it.

        Args:
            state: called at the safe point; returns the arguments of ``save_checkpoint``, as a dict.
            signals: numbers of ``signal``.

        Raises:
            ConfigurationError: this is not the main thread, or a signal cannot be handled; an earlier call holds on.
        """
        if not callable(state):
            raise ConfigurationError(f"save_on_signal wants a function that returns arguments, not {state!r}")
        self._signals, self._at_signal = SignalWatch(signals, self, self._signals), state

    def safe_point(self) -> None:
        """Say that the training state is whole: if a signal came (see ``save_on_signal``), it is saved and we end.

        Raises:
            Preempted: a signal came; the state is durable.
            ConfigurationError: what the function returned is not what ``save_checkpoint`` takes; nothing was saved.
            Exception: what that function or ``save_checkpoint`` raises; the signal is still noted, for the next safe
                point and for ``close``.
        """
        if self._signals is None or not self._signals.may_end() or inside_hook():
            return
        with as_hook():  # a safe point within the function is none
            wanted = save_arguments(self._at_signal(), self.save_checkpoint)
        self.save_checkpoint(**{**wanted, "blocking": True})

    def _must_save(self) -> bool:
        """Whether the state must be saved now, as a signal came, whatever failed before; close() will raise that."""
        return self._signals is not None and self._signals.may_end()

    def _after_save(self, checkpoint_id: str) -> None:
        """Do what was put off until a save has ended: raise a Ctrl-C that came in a hook, end by a signal."""
        self._raise_interrupt()
        if self._signals is not None and self._signals.may_end() and not inside_hook():
            self._end(checkpoint_id)

    def _end(self, checkpoint_id: str) -> None:
        """Let the process end by the signal that came, now that ``checkpoint_id`` holds its state."""
        self._queue.wait()
        self._queue.raise_failure(checkpoint_id)
        signals, self._signals = self._signals, None
        if signals is not None:
            signals.end()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot copy or pickle a manager; pass checkpoint_dir and experiment_id, and make one there")

    def __enter__(self: Manager) -> Manager:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except SaveFailedError:
            if kind is None:
                raise  # otherwise what the block raised is the better one to see; the failure was logged


@atexit.register
def _tell_ends() -> None:
    """Tell the hooks of managers that nobody has closed that this is the end."""
    for manager in list(_open):
        manager._tell_end()
    finish()


os.register_at_fork(after_in_child=_open.clear)  # they are the parent's to tell of
