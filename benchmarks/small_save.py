"""What does a save of 1 MB cost above its own fsyncs?

A small save is a few fsyncs, which the disk bounds, and our own work, which is what counts here. ``os.fsync`` is
wrapped in this process: what passes while at least one thread is inside is the time of our own fsyncs (their sum is
larger where files are synced at once). The database syncs its log once, at the commit and inside SQLite, where it
cannot be wrapped. That sync is taken from a SQLite database of its own next to the checkpoints, in the same mode: a
transaction that writes 4 KB is timed with ``synchronous=FULL`` and with ``NORMAL``, which syncs nothing; the difference
is the sync. (``strace -f -T -e trace=fsync,fdatasync`` shows one ``fdatasync`` for each save, as long as that.) One of
each goes with every save, so that noise strikes all three. What is left of the save without both is our own work:
encoding, SHA-256, writing and SQLite's work included.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from peers import Ours
from report import Figure, Section, progress
from states import build

SAVES = 50
LIMIT = 0.003  # seconds


class FsyncTimer:
    """Takes the time of every ``os.fsync``.

    Attributes:
        seconds: in which at least one thread was inside.
        total: the sum over all calls.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.total = 0.0
        self._fsync = os.fsync
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def _timed(self, descriptor: int) -> None:
        start = time.perf_counter()
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            self._fsync(descriptor)
        finally:
            with self._lock:
                self._inside -= 1
                self.total += time.perf_counter() - start
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap ``os.fsync`` for the length of a ``with`` block."""
        os.fsync = self._timed  # type: ignore[assignment]
        try:
            yield
        finally:
            os.fsync = self._fsync


def _commit(connection: sqlite3.Connection, synchronous: str) -> None:
    connection.execute(f"PRAGMA synchronous={synchronous}")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO rows VALUES (?)", (os.urandom(4096),))
    connection.execute("COMMIT")


def measure_small(folder: Path) -> tuple[Section, Figure]:
    """Return the parts of a small save, and the one to reach."""
    progress("saves of 1 MB")
    state = build("small")
    section = Section(f"save of small, {len(state.flat)} tensors, {state.nbytes / 1e6:.2f} MB, {SAVES} times")
    place = folder / "small"
    place.mkdir()
    peer = Ours(state, place)
    with closing(sqlite3.connect(place / "commit.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE rows (content BLOB)")
        for _ in range(SAVES + 1):
            timer = FsyncTimer()
            with timer.installed():
                peer.save(section.stopwatch())
            section.add("in its own fsyncs", timer.seconds)
            section.add("in its own fsyncs, sum over threads", timer.total)
            section.timed("equivalent SQLite commit, synced", lambda: _commit(connection, "FULL"))
            section.timed("equivalent SQLite commit, not synced", lambda: _commit(connection, "NORMAL"))
    peer.close()
    whole, fsyncs, _, full, normal = section.rows.values()
    above = [w - f - (c - n) for w, f, c, n in zip(whole, fsyncs, full, normal)]
    section.rows["ours: above its own fsyncs"] = above
    return section, Figure("save of 1 MB above its own fsyncs", statistics.median(above[1:]) * 1e3, LIMIT * 1e3, "ms")
