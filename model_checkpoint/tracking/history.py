"""One metric over time, for people and for the libraries that they look at it with."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from model_checkpoint.database.columns import Columns
from model_checkpoint.errors import UnsupportedValueError
from model_checkpoint.utils.jsonable import to_number, to_step
from model_checkpoint.utils.optional import require


@dataclass(frozen=True)
class MetricHistory:
    """Points of one metric in the order in which they were logged; whoever asked for it owns it.

    Attributes:
        name: the metric.
        steps: ints, None where none was given.
        values: ``array("d")``.
        timestamps: ``array("d")``, Unix seconds.
        total: how many points were logged; more than there are here where a shorter curve was asked for.
    """

    name: str
    steps: list[int | None]
    values: array[float]
    timestamps: array[float]
    total: int

    def __len__(self) -> int:
        return len(self.values)

    def _columns(self) -> dict[str, Any]:
        return {"step": self.steps, "value": self.values, "timestamp": self.timestamps}

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with ``step`` (Int64), ``value`` and ``timestamp`` (float64).

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pandas = require("pandas", "dataframes", "to_pandas()")
        types = {"step": "Int64", "value": "float64", "timestamp": "float64"}
        return pandas.DataFrame(
            {name: pandas.Series(column, dtype=types[name]) for name, column in self._columns().items()}
        )

    def to_polars(self) -> Any:
        """Return a ``polars.DataFrame`` with ``step`` (Int64), ``value`` and ``timestamp`` (Float64).

        Raises:
            MissingDependencyError: polars is not installed.
        """
        polars = require("polars", "dataframes", "to_polars()")
        types = {"step": polars.Int64, "value": polars.Float64, "timestamp": polars.Float64}
        return polars.DataFrame({name: list(column) for name, column in self._columns().items()}, schema=types)

    def to_arrow(self) -> Any:
        """Return a ``pyarrow.Table`` with ``step`` (int64), ``value`` and ``timestamp`` (float64).

        Raises:
            MissingDependencyError: pyarrow is not installed.
        """
        arrow = require("pyarrow", "dataframes", "to_arrow()")
        types = {"step": arrow.int64(), "value": arrow.float64(), "timestamp": arrow.float64()}
        return arrow.table({name: arrow.array(column, types[name]) for name, column in self._columns().items()})


def history_of(name: str, columns: Columns, total: int) -> MetricHistory:
    """Return the history that ``columns`` are."""
    return MetricHistory(name, columns.all_steps(), columns.values, columns.times, total)


def to_columns(values: Any, steps: Any, at: float, path: str) -> Columns:
    """Return many values of one metric, logged at one time, as columns without positions: who stores them knows those.

    Args:
        values: a sequence or one-dimensional array of numbers.
        steps: as many integers, or None.
        at: Unix seconds.
        path: the name of ``values`` in errors.

    Raises:
        UnsupportedValueError: they are not, or differ in number.
    """
    numbers = _array("d", values, path, to_number)
    count = len(numbers)
    counted = (
        array("q", bytes(8 * count)) if steps is None else _array("q", steps, "steps", lambda step, _: to_step(step))
    )
    if len(counted) != count:
        raise UnsupportedValueError("steps", steps, f"there are {len(counted)} of them, and {count} values")
    stepless = array("B", b"\1" * count if steps is None else b"")
    return Columns(array("q"), counted, stepless, numbers, array("d", [at]) * count)


def _same_memory(typecode: str, values: Any) -> array[Any] | None:
    """Return a copy of an array whose memory holds its numbers as ``array`` does, as most of NumPy's do; else None."""
    try:
        view = memoryview(values)
    except (TypeError, ValueError, BufferError):
        return None
    if view.itemsize != 8 or view.format not in {"d": ("d",), "q": ("q", "l")}[typecode] or not view.c_contiguous:
        return None
    made = array(typecode)
    made.frombytes(view.tobytes())
    return made


def _array(typecode: str, values: Any, path: str, convert: Callable[[Any, str], Any]) -> array[Any]:
    if hasattr(values, "detach"):  # a tensor of torch's, which may be on a GPU
        values = values.detach().cpu()
    if hasattr(values, "tolist") and not isinstance(values, array):
        if len(getattr(values, "shape", "1")) != 1:
            raise UnsupportedValueError(path, values, "it must have one dimension")
        made = _same_memory(typecode, values)
        if made is not None:
            return made
        values = values.tolist()
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Iterable):
        raise UnsupportedValueError(path, values, "it must be a sequence or array of numbers")
    values = list(values)
    kinds = set(map(type, values))
    if kinds <= {int, float} and not (typecode == "q" and float in kinds):
        try:
            return array(typecode, values)
        except OverflowError:
            pass  # whichever it is, it is named below
    return array(typecode, [convert(value, f"{path}[{i}]") for i, value in enumerate(values)])
