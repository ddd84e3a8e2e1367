"""Where targets of a restore lie in memory, and which of them share it otherwise than what was saved did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from model_checkpoint.arrays import DTYPES, HostArray, Layout
from model_checkpoint.checkpoint.reader import address_of

_TRIES = 8  # offsets to look at in one dimension; more make a search of it, and are taken for sharing


class Place(NamedTuple):
    """Where one target lies.

    Attributes:
        device, begin, end: the address space, the first byte, and the one after the last.
        path: what messages call it; no two have the same.
        block: bytes that lie together.
        steps: from one block to the next and how many of them, for each dimension, in bytes, the smallest first.
        owner: the saved array that goes there: its component and key.
        form: of two targets of one owner that share memory, these are equal if they do so as what was saved did.
    """

    device: str
    begin: int
    end: int
    path: str
    block: int
    steps: tuple[tuple[int, int], ...]
    owner: tuple[str, str]
    form: object


def place_of(found: HostArray, node: dict[str, Any], path: str) -> Place | None:
    """Return where a target lies; None for one without memory.

    Args:
        found: the target, as ``describe`` has it.
        node: of the checkpoint's tree, what goes there.
        path: what messages call it.
    """
    base = node if "$array" in node else node["base"]
    owner = (base["of"], base["$array"])
    layout = found.identity
    if isinstance(layout, Layout):
        item = block = DTYPES[layout.dtype].bits // 8
        steps = [(step * item, length) for step, length in sorted(zip(layout.strides, layout.shape)) if length > 1]
        end = layout.address + sum((length - 1) * step for step, length in steps) + item
        while steps and steps[0][0] == block:
            block *= steps.pop(0)[1]
        form = _form(layout, node, item)
        return Place(layout.device, layout.address, end, path, block, tuple(steps), owner, form)
    if not found.data.nbytes:
        return None
    begin, size = address_of(found.data), found.data.nbytes
    return Place("cpu", begin, begin + size, path, size, (), owner, begin)


def _form(layout: Layout, node: dict[str, Any], item: int) -> object:
    """Return where the saved array would begin, of a part that has its strides; else the very place."""
    long = [i for i, length in enumerate(layout.shape) if length > 1]
    if "$view" in node and all(node["strides"][i] == layout.strides[i] for i in long):
        return layout.address - node["offset"] * item
    return (layout.address, [layout.strides[i] for i in long], node.get("offset"), node.get("strides"))


def shared(places: Iterable[Place]) -> list[tuple[str, str]]:
    """Return path and problem of each target that shares memory otherwise than what goes there did when saved."""
    problems: list[tuple[str, str]] = []
    before: list[Place] = []  # that reach beyond the beginning of the next one
    for place in sorted(places, key=lambda place: place[:4]):
        before = [other for other in before if other.device == place.device and other.end > place.begin]
        for other in before:
            as_saved = other.owner == place.owner and other.form == place.form
            if not as_saved and _may_share(other, place):
                saved = "as two arrays" if other.owner != place.owner else "otherwise"
                text = f"{place.path}: shares its memory with {other.path}, they were saved {saved}"
                problems.append((place.path, text))
                break
        before.append(place)
    return problems


def _may_share(one: Place, other: Place) -> bool:
    """Whether two places have a byte in common, or too many blocks to tell."""
    steps = sorted({step for step, _ in (*one.steps, *other.steps)}, reverse=True)
    return _meet(steps, one, other, other.begin - one.begin)


def _meet(steps: Sequence[int], one: Place, other: Place, apart: int) -> bool:
    """Whether blocks meet that are ``apart`` bytes from one another, give or take any numbers of ``steps``."""
    if not steps:
        return -other.block < apart < one.block
    step = steps[0]
    reach, other_reach = (
        place.block + sum((length - 1) * small for small, length in place.steps if small < step)
        for place in (one, other)
    )
    first = max((apart - reach) // step + 1, 1 - dict(other.steps).get(step, 1))
    last = min((apart + other_reach - 1) // step, dict(one.steps).get(step, 1) - 1)
    if last - first >= _TRIES:
        return True
    return any(_meet(steps[1:], one, other, apart - number * step) for number in range(first, last + 1))


def overlaps_itself(layout: Layout) -> bool:
    """Whether several elements of an array are one place in memory, as after ``expand()``."""
    reach = 1  # elements that the dimensions of smaller strides cover
    for step, length in sorted(zip(layout.strides, layout.shape)):
        if length > 1:
            if step < reach:
                return True
            reach += (length - 1) * step
    return False


def own_memory(array: HostArray) -> memoryview | None:
    """Return the memory of the array itself; None where ``data`` is a copy, or cannot be written."""
    layout = array.identity
    if array.data.readonly or not array.data.nbytes:
        return None
    if not isinstance(layout, Layout):
        return array.data if array.kind.partition(":")[0] in ("bytearray", "array") else None
    step = 1
    for length, stride in reversed(list(zip(layout.shape, layout.strides))):
        if length > 1 and stride != step:
            return None
        step *= length
    return array.data if layout.device == "cpu" else None
