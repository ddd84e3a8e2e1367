"""What a comparison of two checkpoints found, as users see it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_TENSORS = 20  # lines of a table
_OTHERS = 5  # lines for each kind of values


class Form(NamedTuple):
    """Element type (NumPy's name) and dimensions of an array; as text ``float32[3, 4]``."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class TensorDiff:
    """How one array of the second checkpoint is to that of the first.

    Attributes:
        status: ``same`` (every bit), ``changed``, ``reshaped`` (another dtype or shape; the elements are not compared),
            ``added`` or ``removed``.
        before, after: dtype and shape in the first and in the second checkpoint; None where there is none.
        relative: the Euclidean norm of the difference by that of the first array, in float64; 0 where nothing differs
            but the sign of zeros, infinite where only the first array's norm is 0. NaNs and infinities of the first
            array do not count towards its norm.
        max_abs: the largest absolute difference of two elements. Of NaN and anything else it is NaN, which outdoes
            infinity; elements of the same bits, NaN too, differ by 0.
        differing, elements: how many elements have other bits, and how many there are. These four are None for
            ``reshaped``, ``added`` and ``removed``.
    """

    status: str
    before: Form | None
    after: Form | None
    relative: float | None = None
    max_abs: float | None = None
    differing: int | None = None
    elements: int | None = None


@dataclass(frozen=True)
class ValueDiff:
    """A value that differs.

    Attributes:
        status: ``changed``, ``added`` or ``removed``.
        before, after: what it is in the first and in the second checkpoint; None where it is not there.
    """

    status: str
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        if self.status == "changed":
            return f"{self.before!r:.40} -> {self.after!r:.40}"
        return f"{self.status}: {self.before if self.status == 'removed' else self.after!r:.80}"


@dataclass(frozen=True)
class CheckpointDiff:
    """How the second of two checkpoints is to the first. Printed, it is a table with the largest change first.

    Attributes:
        before, after: ids of the first and of the second checkpoint.
        tensors: path, as ``keys`` of ``load_checkpoint`` has it (``model.encoder.weight``) -> every array of both.
        values: path -> what is no array and differs. What kind of dict or sequence holds it does not count, nor the
            order of a dict's keys, nor whether arrays are tied. Where keys are equal as text only, as 1 and ``"1"``, or
            only one of two arrays is bytes, it is under ``<path> (type)``.
        config: dotted name -> what differs of the config given to the saves; ``config`` for all of it, where that is no
            dict or list.
        metrics: name -> what differs of the metrics.
        progress: which of ``epoch``, ``step``, ``loss`` and ``val_loss`` differ.
        random: whose random states differ, such as ``numpy``.
    """

    before: str
    after: str
    tensors: Mapping[str, TensorDiff]
    values: Mapping[str, ValueDiff]
    config: Mapping[str, ValueDiff]
    metrics: Mapping[str, ValueDiff]
    progress: Mapping[str, ValueDiff]
    random: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether nothing at all differs."""
        return self.same_state and not (self.config or self.metrics or self.progress or self.random)

    @property
    def same_state(self) -> bool:
        """Whether the components are the same: every array, bit by bit, and every value in them."""
        return not self.values and all(tensor.status == "same" for tensor in self.tensors.values())

    @property
    def changed(self) -> dict[str, TensorDiff]:
        """The arrays that have other elements, the largest relative change first."""
        return dict(sorted(self._having("changed").items(), key=_change))

    @property
    def reshaped(self) -> dict[str, TensorDiff]:
        """The arrays that have another dtype or shape."""
        return self._having("reshaped")

    @property
    def added(self) -> dict[str, TensorDiff]:
        """The arrays that only the second checkpoint has."""
        return self._having("added")

    @property
    def removed(self) -> dict[str, TensorDiff]:
        """The arrays that only the first checkpoint has."""
        return self._having("removed")

    def _having(self, status: str) -> dict[str, TensorDiff]:
        return {path: tensor for path, tensor in self.tensors.items() if tensor.status == status}

    def __str__(self) -> str:
        kinds = {name: self._having(name) for name in ("changed", "reshaped", "added", "removed")}
        counts = [f"{len(found)} {name}" for name, found in kinds.items() if found]
        counts.append(f"{len(self._having('same'))} same")
        lines = [f"{self.before} -> {self.after}", f"tensors: {', '.join(counts)}"]
        rows = [_row(path, tensor) for path, tensor in self.changed.items()]
        rows += [
            _row(path, tensor) for name in ("reshaped", "added", "removed") for path, tensor in kinds[name].items()
        ]
        if rows:
            lines += _table([("", "relative", "max abs", "differing"), *rows[:_TENSORS]])
            lines += _rest(len(rows) - _TENSORS)
        for name in ("values", "config", "metrics", "progress"):
            lines += _listed(name, getattr(self, name))
        lines += [f"random states: {', '.join(self.random)} differ"] if self.random else []
        return "\n".join(lines)


def _change(item: tuple[str, TensorDiff]) -> tuple[float, float, str]:
    path, tensor = item
    return _down(tensor.relative), _down(tensor.max_abs), path


def _down(number: float | None) -> float:
    """Return what sorts a number from the largest down; NaN is as large as can be."""
    return -math.inf if number is None or number != number else -number


def _row(path: str, tensor: TensorDiff) -> tuple[str, str, str, str]:
    if tensor.status == "changed":
        return path, f"{tensor.relative:.2e}", f"{tensor.max_abs:.2e}", f"{tensor.differing:,} of {tensor.elements:,}"
    forms = " -> ".join(str(form) for form in (tensor.before, tensor.after) if form is not None)
    return path, tensor.status, "", forms


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _listed(name: str, found: Mapping[str, ValueDiff]) -> Iterator[str]:
    if found:
        yield f"{name}: {len(found)} differ"
        yield from (f"  {path}  {value}" for path, value in list(found.items())[:_OTHERS])
        yield from _rest(len(found) - _OTHERS)


def _rest(count: int) -> list[str]:
    return [f"  ... and {count} more"] if count > 0 else []
