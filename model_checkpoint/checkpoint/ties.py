"""Arrays that share memory: stored once as one 1-D array, and put back as views of it."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from model_checkpoint.arrays import DTYPES, HostArray, Layout

Placed = tuple[
    Layout, int, dict[str, Any]
]  # where an array lies, the bytes that it spans, its node in the state's tree


def merge_overlaps(arrays: dict[str, dict[str, HostArray]], placed: list[Placed], owners: list[object]) -> None:
    """Replace arrays whose memory overlaps by the memory that they cover, and their tree nodes by views of it.

    Only overlapping arrays of one library and dtype in host memory are merged; parts of one allocation that lie side
    by side stay arrays of their own. So do views so sparse that the memory they span is larger than they are, such as
    overlapping column ranges of a wide matrix: those come back apart.

    Args:
        arrays: component -> key -> array; changed in place.
        placed: every array that has a layout, in the order of their addresses; the tree nodes are changed in place.
        owners: the objects whose memory it is; the new arrays keep them alive.
    """
    for group in _overlapping(placed):
        first, node = group[0][0], group[0][2]
        size = DTYPES[first.dtype].bits // 8
        nbytes = max(layout.address + span for layout, span, _ in group) - first.address
        buffer: Any = (ctypes.c_ubyte * nbytes).from_address(first.address)
        buffer.owner = owners
        data = memoryview(buffer).cast("B")
        base = {**node, "shape": [nbytes // size]}
        for layout, _, member in group:
            del arrays[member["of"]][member["$array"]]
            offset = (layout.address - first.address) // size
            member["$view"] = member.pop("$array")
            member.update(strides=list(layout.strides), offset=offset, base=base)
        arrays[base["of"]][base["$array"]] = HostArray(first.dtype, (nbytes // size,), data, base["kind"])


def _overlapping(placed: list[Placed]) -> list[list[Placed]]:
    groups: list[list[Placed]] = []
    end = -1
    for item in placed:
        if item[0].device != "cpu":
            continue
        if item[0].address >= end:
            groups.append([])
        groups[-1].append(item)
        end = max(end, item[0].address + item[1])
    return [group for group in groups if len(group) > 1 and _mergeable(group)]


def _mergeable(group: list[Placed]) -> bool:
    first = group[0][0]
    size = DTYPES[first.dtype].bits // 8
    kind = group[0][2]["kind"]
    span = max(layout.address + reach for layout, reach, _ in group) - first.address
    return span <= sum(math.prod(layout.shape) * size for layout, _, _ in group) and all(
        layout.dtype == first.dtype and node["kind"] == kind and (layout.address - first.address) % size == 0
        for layout, _, node in group
    )
