"""Rows in batches: whatever fails or comes together, each is written once, nobody hangs, no thread stays."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from model_checkpoint.performance.batched_writer import BatchedWriter

DEADLINE = 60.0  # seconds that anything may take before it counts as hung


def threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "model-checkpoint-writer"}


def test_many_threads_that_begin_together_share_one_thread_that_ends() -> None:
    before, interval = threads(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            written: list[int] = []
            writer: BatchedWriter[int] = BatchedWriter(lambda rows, _, to=written: to.extend(rows))
            together = threading.Barrier(8)

            def put(row: int, writer: BatchedWriter[int] = writer, together: threading.Barrier = together) -> None:
                together.wait(DEADLINE)
                writer.put(row)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(put, range(8)))
            assert len(threads() - before) == 1
            (thread,) = threads() - before
            writer.end(int)
            thread.join(DEADLINE)
            assert sorted(written) == list(range(8))
            assert threads() == before
    finally:
        sys.setswitchinterval(interval)


def test_an_end_that_cannot_write_says_so_lets_go_and_leaves_no_thread() -> None:
    before = threads()

    def write(rows: list[int], urgent: bool) -> None:
        raise OSError("disk full")

    writer: BatchedWriter[int] = BatchedWriter(write)
    writer.put(1)
    (thread,) = threads() - before
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            writer.flush()
    let_go: list[int] = []
    with pytest.raises(OSError, match="disk full"):
        writer.end(lambda: let_go.append(1))
    thread.join(DEADLINE)
    assert (let_go, threads()) == ([1], before)


def test_after_the_end_nobody_waits_for_a_thread_that_is_gone() -> None:
    written: list[int] = []
    writer: BatchedWriter[int] = BatchedWriter(lambda rows, _: written.extend(rows))
    ends: list[int] = []
    for row in range(3):  # a row that comes after an end begins anew
        writer.put(row)
        writer.end(lambda: ends.append(1))
        late = threading.Thread(target=writer.flush, daemon=True)
        late.start()
        late.join(DEADLINE)
        assert not late.is_alive()
    writer.end(lambda: ends.append(1))
    assert (written, ends) == ([0, 1, 2], [1] * 4)


def test_an_end_within_its_own_thread_does_not_wait_for_itself() -> None:
    """The garbage collector ends what nobody has closed, and it may come in the middle of a write."""
    ended, written = threading.Event(), []

    class Owner:
        def __init__(self) -> None:
            self.me = self
            self.writer: BatchedWriter[int] = BatchedWriter(write)
            weakref.finalize(self, self.writer.end, ended.set, 5.0)

    def write(rows: list[int], urgent: bool) -> None:
        gc.collect()
        written.extend(rows)

    owner: Any = Owner()
    pending = owner.writer
    gc.disable()
    try:
        owner = None
        pending.put(1)
        assert ended.wait(DEADLINE)
    finally:
        gc.enable()
    assert written == [1]


def test_who_does_not_wait_for_ever_is_let_go_and_the_rest_comes_later() -> None:
    go, ended, written = threading.Event(), threading.Event(), []

    def write(rows: list[int], urgent: bool) -> None:
        assert go.wait(DEADLINE)
        written.extend(rows)

    writer: BatchedWriter[int] = BatchedWriter(write)
    writer.put(1)
    writer.end(ended.set, 0.05)
    assert (written, ended.is_set()) == ([], False)
    go.set()
    assert ended.wait(DEADLINE)
    assert written == [1]
