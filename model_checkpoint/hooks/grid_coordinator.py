"""The hook that hands out configurations; ``grid_monitoring`` is where users find it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from model_checkpoint.errors import ClaimLostError, ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.utils.checks import check_count, check_positive
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.heartbeat import Heartbeat
from model_checkpoint.utils.jsonable import dumps, loads, short_text, to_jsonable

log = logging.getLogger(__name__)
_ENDS = ("completed", "failed", "open")


class _Claims(Protocol):
    """See ``database.claims.ClaimTable``."""

    def add(self, grid: str, configs: Sequence[str]) -> None: ...
    def take(self, grid: str, worker: str, now: float, until: float, most: int) -> Any: ...
    def renew(self, grid: str, number: int, worker: str, until: float) -> bool: ...
    def bind(self, grid: str, number: int, worker: str, experiment_id: str) -> bool: ...
    def end(self, grid: str, number: int, worker: str, state: str) -> bool: ...
    def counts(self, grid: str) -> dict[str, int]: ...


class _Database(Protocol):
    """What a coordinator asks of a database; ``EnhancedDatabaseConnection`` has it."""

    @property
    def claims(self) -> Any:
        """The table of claims."""

    @property
    def max_name(self) -> int:
        """Characters of a name."""


@dataclass
class Claim:
    """A configuration that this worker is to run.

    Attributes:
        number: its place in the grid, from 0.
        config: it.
        experiment_id: the experiment of the worker that had it before and died, to go on with; None the first time.
        attempt: 1 the first time.
        lost: whether it has expired and may be another worker's: what is done now does not count any more.
    """

    number: int
    config: dict[str, Any]
    experiment_id: str | None
    attempt: int
    lost: bool = False
    holder: str = field(default_factory=lambda: str(uuid4()), repr=False)  # of this claim: forked workers share no name


class GridCoordinatorHook(BaseHook):
    """Gives each worker the next configuration of a grid, across processes and machines, by way of the database.

    ::

        hooks, database = HookManager(), EnhancedDatabaseConnection(url)
        grid = GridCoordinatorHook(database, "learning rates", [{"lr": 0.1}, {"lr": 0.01}])
        hooks.register_hook(grid)
        while (claim := grid.claim()) is not None:
            with ExperimentTracker(f"run {claim.number}", config=claim.config, database_url=url, hook_manager=hooks):
                train(**claim.config)

    The first experiment that starts after a claim is the claim's, and its end is the claim's end: ``completed``
    completes it; ``failed`` or ``interrupted`` gives it to whoever claims next, or after the last attempt makes it
    failed. A tracker that nobody closes does not end before the process does, and neither does its claim. While it goes
    on, a thread renews the claim. The claim of a worker that died, or was stopped for long, expires and is given to
    another one; the first worker cannot end it any more, so that each configuration is completed once. Machines' clocks
    must agree better than ``lease``. A forked child has no claim.

    Args:
        database: an ``EnhancedDatabaseConnection``, kept open by the caller.
        grid: the grid's name; the same for all of its workers.
        configs: the configurations, the same for all of them: JSON values by name. A longer list adds to the grid, and
            workers with a shorter one are given the others, too.
        lease: seconds after which a claim expires that was not renewed; it is renewed three times as often.
        attempts: how many workers may try one configuration before it counts as failed.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used, or the grid has other configurations.
        UnsupportedValueError: a configuration that cannot be stored; the text names its path.
    """

    events = (HookEvent.ON_EXPERIMENT_START, HookEvent.ON_EXPERIMENT_END)

    def __init__(
        self,
        database: _Database,
        grid: str,
        configs: Sequence[Mapping[str, Any]],
        lease: float = 60.0,
        attempts: int = 3,
        name: str | None = None,
        priority: int = HookPriority.HIGH,
    ) -> None:
        super().__init__(name, priority=priority)
        check_count(attempts=attempts)
        check_positive(lease=lease)
        if not short_text(grid, "grid", database.max_name).strip():
            raise ConfigurationError("grid must be a name, not an empty text")
        if not isinstance(configs, Sequence) or not all(isinstance(config, Mapping) for config in configs):
            raise ConfigurationError(
                f"configs must be a list of dicts, one for each configuration, not {configs!r:.200}"
            )
        self._claims: _Claims = database.claims
        self._grid, self._lease, self._attempts = grid, lease, attempts
        self.after_fork_in_child()
        watch(self)
        self._claims.add(grid, [dumps(to_jsonable(dict(c), f"configs[{n}]")) for n, c in enumerate(configs)])

    def before_fork(self) -> None:
        """Nothing has to rest."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Have no claim: what there is is the parent's."""
        self._lock = threading.Lock()  # around the next four
        self._claim: Claim | None = None
        self._beat: Heartbeat | None = None
        self._experiment_id: str | None = None
        self._ending: str | None = None  # how the claim is to end, while the database does not take that

    def claim(self, wait: bool = True) -> Claim | None:
        """Return the next configuration for this worker; None when none is left.

        Args:
            wait: whether to wait while others are at the last ones, which may become free if they die.

        Raises:
            ConfigurationError: this worker has a claim that has not ended.
        """
        while True:
            with self._lock:
                if self._claim is not None and self._ending is None:
                    raise ConfigurationError(
                        f"configuration {self._claim.number} of {self._grid!r} has not ended: release() it, or let its "
                        "run end with this hook registered; threads need a coordinator each"
                    )
                try:
                    self._end()
                except ClaimLostError as lost:
                    log.warning("%s", lost)
                holder, now = str(uuid4()), time.time()
                found = self._claims.take(self._grid, holder, now, now + self._lease, self._attempts)
                if found is not None:
                    made = Claim(found.number, loads(found.config), found.experiment_id, found.attempt, holder=holder)
                    self._claim, self._experiment_id = made, None
                    self._beat = Heartbeat(self._lease / 3, partial(self._renew, made))
                    return made
            counts = self.counts()
            if not counts["claimed"] + counts["open"] or not wait:
                return None
            time.sleep(min(1.0, self._lease / 4))

    def release(self, state: str = "open") -> None:
        """End the claim: ``completed``, ``failed``, or ``open`` for whoever comes next. So does the end of its run.

        After the last attempt, ``open`` is ``failed``.

        Where the database does not take that now, the claim goes on being renewed, and its end is tried again.

        Raises:
            ConfigurationError: ``state`` is none of these.
            ClaimLostError: it had expired, and another worker has it.
            DatabaseError: the database refused.
        """
        if state not in _ENDS:
            raise ConfigurationError(f"state must be one of {', '.join(_ENDS)}, not {state!r}")
        with self._lock:
            if self._claim is not None:
                last = state == "open" and self._claim.attempt >= self._attempts
                self._ending = "failed" if last else state
                self._end()

    def _end(self) -> None:
        """Let the claim end as it is to; the caller holds the lock."""
        claim, state = self._claim, self._ending
        if claim is None or state is None:
            return
        ended = self._claims.end(self._grid, claim.number, claim.holder, state)
        self._claim = self._ending = None
        if self._beat is not None:
            self._beat.stop()
        if not ended:
            claim.lost = True
            raise ClaimLostError(self._grid, claim.number)

    def counts(self) -> dict[str, int]:
        """Return how many configurations are ``open``, ``claimed``, ``completed`` and ``failed``."""
        return self._claims.counts(self._grid)

    def execute(self, context: HookContext) -> None:
        """Note which experiment is the claim's, and end the claim when that ends."""
        claim = self._claim
        if claim is None or context.experiment_id is None:
            return
        if context.event is HookEvent.ON_EXPERIMENT_START:
            if self._experiment_id is None:
                self._experiment_id = context.experiment_id
                if not self._claims.bind(self._grid, claim.number, claim.holder, context.experiment_id):
                    raise ClaimLostError(self._grid, claim.number)
        elif context.experiment_id == self._experiment_id:
            self.release("completed" if context.data["status"] == "completed" else "open")

    def _renew(self, claim: Claim) -> bool:
        """Keep a claim alive, or end it where that is still to be done; returns whether there is more to do."""
        with self._lock:
            if self._claim is claim and self._ending is not None:
                self._end()  # first: it may have ended already, and only the answer was lost
            if self._claim is not claim:
                return False
        if self._claims.renew(self._grid, claim.number, claim.holder, time.time() + self._lease):
            return True
        with self._lock:
            if self._claim is claim:
                claim.lost = True
                log.warning("%s", ClaimLostError(self._grid, claim.number))
        return False
