"""Which worker is at which configuration of a grid: the SQL and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from model_checkpoint.errors import ConfigurationError

if TYPE_CHECKING:
    from model_checkpoint.database.enhanced_connection import EnhancedDatabaseConnection

STATES = ("open", "claimed", "completed", "failed")


class Claimed(NamedTuple):
    """A configuration that a worker has claimed.

    Attributes:
        number: its place in the grid, from 0.
        config: it, as text.
        experiment_id: the experiment of the worker that had it before, or None.
        attempt: how many workers have claimed it, this one included.
    """

    number: int
    config: str
    experiment_id: str | None
    attempt: int


class ClaimTable:
    """The table of claims. A claim is its worker's until it expires; only who holds it can end it.

    Args:
        db: the database that it is in.
    """

    def __init__(self, db: EnhancedDatabaseConnection) -> None:
        self._db = db

    def add(self, grid: str, configs: Sequence[str]) -> None:
        """Let the grid have these configurations, each in its place; others may have added them already.

        Raises:
            ConfigurationError: the grid has another configuration in one of these places.
        """
        with self._db.transaction(durable=True) as connection:
            found = connection.execute(
                "SELECT number, config FROM claims WHERE grid = :grid", {"grid": grid}
            ).fetchall()
            known = {int(number): config for number, config in found}
            for number, config in enumerate(configs):
                if known.get(number, config) != config:
                    raise ConfigurationError(
                        f"grid {grid!r} has another configuration in place {number}: {known[number]}, not {config}; "
                        "give this grid another name"
                    )
            connection.executemany(
                "INSERT INTO claims (grid, number, config, state, attempts) "
                "VALUES (:grid, :number, :config, 'open', 0)",
                [{"grid": grid, "number": n, "config": c} for n, c in enumerate(configs) if n not in known],
            )

    def take(self, grid: str, worker: str, now: float, until: float, most: int) -> Claimed | None:
        """Claim the next configuration that is open, or whose claim has expired; None when there is none.

        Args:
            grid, worker: which and whose.
            now, until: Unix seconds.
            most: how many workers may claim one; what the last of them left is ``failed``.
        """
        bind = {"grid": grid, "now": now, "most": most}
        expired = "(state = 'claimed' AND expires_at <= :now)"
        with self._db.transaction(durable=True) as connection:
            connection.execute(
                f"UPDATE claims SET state = 'failed' WHERE grid = :grid AND attempts >= :most AND {expired}", bind
            )
            found = connection.execute(
                "SELECT number, config, experiment_id, attempts FROM claims WHERE grid = :grid "
                f"AND (state = 'open' OR {expired}) ORDER BY attempts, number LIMIT 1",
                bind,
            ).fetchone()
            if found is None:
                return None
            claimed = Claimed(int(found[0]), found[1], found[2], int(found[3]) + 1)
            connection.execute(
                "UPDATE claims SET state = 'claimed', worker = :worker, expires_at = :until, attempts = attempts + 1 "
                "WHERE grid = :grid AND number = :number",
                {"grid": grid, "number": claimed.number, "worker": worker, "until": until},
            )
            return claimed

    def renew(self, grid: str, number: int, worker: str, until: float) -> bool:
        """Put off the end of a claim; returns whether it is still this worker's."""
        return self._change("expires_at = :until", grid, number, worker, until=until)

    def bind(self, grid: str, number: int, worker: str, experiment_id: str) -> bool:
        """Note in which experiment the configuration is run; returns whether the claim is still this worker's."""
        return self._change("experiment_id = :experiment", grid, number, worker, experiment=experiment_id)

    def end(self, grid: str, number: int, worker: str, state: str) -> bool:
        """Let a claim be ``completed``, ``failed`` or ``open`` again; returns whether it was this worker's.

        It may be told twice: the answer to the first time may have been lost.
        """
        return self._change("state = :state", grid, number, worker, "('claimed', :state)", state=state)

    def _change(
        self, change: str, grid: str, number: int, worker: str, states: str = "('claimed')", **bind: object
    ) -> bool:
        mine = {"grid": grid, "number": number, "worker": worker}
        with self._db.transaction(durable=True) as connection:
            changed = connection.execute(
                f"UPDATE claims SET {change} "
                f"WHERE grid = :grid AND number = :number AND worker = :worker AND state IN {states}",
                {**mine, **bind},
            )
            return bool(changed.rowcount)

    def counts(self, grid: str) -> dict[str, int]:
        """Return state -> how many configurations of the grid are in it."""
        found = self._db.query("SELECT state, COUNT(*) FROM claims WHERE grid = :grid GROUP BY state", {"grid": grid})
        return {**dict.fromkeys(STATES, 0), **{state: int(count) for state, count in found}}
