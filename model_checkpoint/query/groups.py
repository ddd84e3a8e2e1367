"""Numbers of one group of runs: how many, their mean, and how sure one may be of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Any

from model_checkpoint.utils.jsonable import LARGEST

# Student's t at 97.5 %, for 1 to 30 degrees of freedom; from any table of it.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


@dataclass(frozen=True)
class Group:
    """Runs that share a value.

    Attributes:
        value: what they share; None for those that have none.
        n: how many of them have a number.
        mean: of their numbers; None where there is none, NaN with infinities of both signs.
        std: the standard deviation of a sample; None below two, and with an infinity.
        interval: within which the mean of all such runs lies at 95 %, by Student's t; None where ``std`` is.
    """

    value: Any
    n: int
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None


def group_of(value: Any, numbers: Sequence[float]) -> Group:
    """Return the group of runs with these numbers."""
    n = len(numbers)
    middle = mean(map(float, numbers)) if n else None
    if middle is None or n < 2 or not math.isfinite(middle):
        return Group(value, n, middle, None, None)
    try:
        std = stdev(numbers)
    except OverflowError:  # of their squares
        std = stdev([number / LARGEST for number in numbers]) * LARGEST
    half = _t(n - 1) * std / math.sqrt(n)
    return Group(value, n, middle, std, (middle - half, middle + half))


def _t(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom)  # the first term of its expansion; the next is below 0.0005 here


def differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return name -> id -> value of what is not the same everywhere; None where one has none.

    Args:
        values: id -> name -> value.
    """
    names = dict.fromkeys(name for each in values.values() for name in each)
    table = {name: {id: each.get(name) for id, each in values.items()} for name in names}
    return {name: row for name, row in table.items() if len(set(map(repr, row.values()))) > 1}
