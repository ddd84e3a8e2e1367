"""The hook that hands out configurations; ``grid_monitoring`` is where users find it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from model_checkpoint.errors import ClaimLostError, ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.utils.heartbeat import Heartbeat
from model_checkpoint.utils.jsonable import dumps, loads, to_jsonable

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Claim:
    """A configuration that this worker is to run.

    Attributes:
        number: its place in the grid, from 0.
        config: it.
        experiment_id: the experiment of the worker that had it before and died, to go on with; None the first time.
        attempt: 1 the first time.
    """

    number: int
    config: dict[str, Any]
    experiment_id: str | None
    attempt: int


class GridCoordinatorHook(BaseHook):
    """Gives each worker the next configuration of a grid, across processes and machines, by way of the database.

    ::

        hooks, database = HookManager(), EnhancedDatabaseConnection(url)
        grid = GridCoordinatorHook(database, "learning rates", [{"lr": 0.1}, {"lr": 0.01}])
        hooks.register_hook(grid)
        while (claim := grid.claim()) is not None:
            with ExperimentTracker(f"run {claim.number}", config=claim.config, database_url=url, hook_manager=hooks):
                train(**claim.config)

    The first experiment that starts after a claim is the claim's, and its end is the claim's end: ``completed`` makes
    it done; ``failed`` or ``interrupted`` gives it to whoever claims next, or after the last attempt makes it failed.
    While it goes on, a thread renews the claim. The claim of a worker that died, or was stopped for long, expires and
    is given to another one; the first worker cannot end it any more, so that each configuration is done once. Machines'
    clocks must agree better than ``lease``.

    Args:
        database: an ``EnhancedDatabaseConnection``, kept open by the caller.
        grid: the grid's name; the same for all of its workers.
        configs: the configurations, the same for all of them: JSON values by name.
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
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise ConfigurationError(f"attempts must be an integer of at least 1, not {attempts!r}")
        self._claims: _Claims = database.claims
        self._grid, self._lease, self._attempts = grid, lease, attempts
        self._beat = Heartbeat(lease / 3 if isinstance(lease, (int, float)) else lease, self._renew)
        self._worker = str(uuid4())
        self._claim: Claim | None = None
        self._experiment_id: str | None = None
        self._claims.add(grid, [dumps(to_jsonable(dict(c), f"configs[{n}]")) for n, c in enumerate(configs)])

    def claim(self, wait: bool = True) -> Claim | None:
        """Return the next configuration for this worker; None when none is left.

        Args:
            wait: whether to wait while others are at the last ones, which may become free if they die.

        Raises:
            ConfigurationError: this worker has a claim that has not ended.
        """
        if self._claim is not None:
            raise ConfigurationError(f"configuration {self._claim.number} of grid {self._grid!r} has not ended yet")
        while True:
            now = time.time()
            found = self._claims.take(self._grid, self._worker, now, now + self._lease, self._attempts)
            if found is not None:
                self._claim = Claim(found.number, loads(found.config), found.experiment_id, found.attempt)
                self._experiment_id = None
                self._beat.start()
                return self._claim
            if not wait or not self._claims.counts(self._grid)["claimed"]:
                return None
            time.sleep(min(1.0, self._lease / 4))

    def release(self, state: str = "open") -> None:
        """End the claim: ``done``, ``failed``, or ``open`` for whoever comes next. The end of its run does so, too.

        Raises:
            ClaimLostError: it had expired, and another worker has it.
        """
        claim, self._claim = self._claim, None
        self._beat.stop()
        if claim is not None and not self._claims.end(self._grid, claim.number, self._worker, state):
            raise ClaimLostError(self._grid, claim.number)

    def counts(self) -> dict[str, int]:
        """Return how many configurations are ``open``, ``claimed``, ``done`` and ``failed``."""
        return self._claims.counts(self._grid)

    def execute(self, context: HookContext) -> None:
        """Note which experiment is the claim's, and end the claim when that ends."""
        claim = self._claim
        if claim is None or context.experiment_id is None:
            return
        if context.event is HookEvent.ON_EXPERIMENT_START:
            if self._experiment_id is None:
                self._experiment_id = context.experiment_id
                if not self._claims.bind(self._grid, claim.number, self._worker, context.experiment_id):
                    raise ClaimLostError(self._grid, claim.number)
        elif context.experiment_id == self._experiment_id:
            again = "open" if claim.attempt < self._attempts else "failed"
            self.release("done" if context.data["status"] == "completed" else again)

    def _renew(self) -> None:
        claim = self._claim
        if claim is not None and not self._claims.renew(
            self._grid, claim.number, self._worker, time.time() + self._lease
        ):
            self._beat.stop()
            if self._claim is claim:
                log.warning("%s", ClaimLostError(self._grid, claim.number))
