"""A stand-in for training: matrix products in a loop, to see how much a save in the background takes from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

SIDE = 768  # one product takes 5 to 15 ms on two cores: short against a save, long against Python
BASELINE = 0.75  # seconds measured without a save, before and after each one with


class Matmul:
    """Multiplies matrices of a fixed size with all of torch's threads, as training does."""

    def __init__(self) -> None:
        self._left, self._right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
        self._product = torch.empty(SIDE, SIDE)

    def run(self, wanted: Callable[[], bool]) -> tuple[float, int]:
        """Multiply for as long as it is ``wanted``; returns seconds and products."""
        count = 0
        start = time.perf_counter()
        while wanted():
            torch.mm(self._left, self._right, out=self._product)
            count += 1
        return time.perf_counter() - start, count

    def for_a_while(self) -> float:
        """Multiply for ``BASELINE`` seconds; returns the seconds of one product."""
        until = time.perf_counter() + BASELINE
        seconds, count = self.run(lambda: time.perf_counter() < until)
        return seconds / count


def slow_down(matmul: Matmul, start: Callable[[], object], wait: Callable[[], object]) -> list[float]:
    """Multiply while a save runs; returns [slow-down, extra seconds].

    The rate without a save is taken just before and just after. ``start()`` begins one, whose stall is not counted
    here, and products are made until ``wait()``, in a thread of its own that sleeps, returns. The slow-down is the rate
    without over the rate with, while the save runs. The extra seconds are how much longer the products took than
    without: what the save costs a loop of any number of products that outlasts it, so a short save that takes much and
    a long one that takes little compare fairly.
    """
    before = matmul.for_a_while()
    start()
    waiting = threading.Thread(target=wait)
    waiting.start()
    seconds, count = matmul.run(waiting.is_alive)
    waiting.join()
    each = (before + matmul.for_a_while()) / 2
    return [seconds / max(count, 1) / each, seconds - count * each]
