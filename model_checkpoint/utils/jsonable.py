"""Config, metadata and tags: any JSON value, with the scalars of NumPy and torch taken as numbers.

Stored as strict JSON; NaN and the infinities as ``{"$float": "nan"}``, a key that begins with ``$`` gets one more.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from model_checkpoint.errors import UnsupportedValueError

LARGEST = sys.float_info.max  # stands for infinity in numbers to search by: MySQL has none
MAX_DEPTH = 100  # lists and dicts within one another
_MAX_BITS = 14_000  # Python reads integers of up to 4,300 digits from text
_ADVICE = "use a string, number, boolean, None, list or dict with string keys, or convert it with str()"


def to_jsonable(value: Any, path: str) -> Any:
    """Return ``value`` as plain JSON types; tuples become lists, scalars of array libraries become numbers.

    Args:
        value: what the user passed; it is not changed and not referred to by the result.
        path: its name in errors (``config``).

    Raises:
        UnsupportedValueError: a part of it that cannot be stored; the text names its path: ``config.betas[1]``.
    """
    try:
        made = _plain(value, path)
    except RecursionError:
        made = None
    if (made is None and value is not None) or is_deep(made, MAX_DEPTH):
        raise UnsupportedValueError(path, value, f"it is nested more than {MAX_DEPTH} levels deep, or contains itself")
    return made


def is_deep(value: Any, levels: int) -> bool:
    """Whether lists and dicts of ``value`` lie within one another more than ``levels`` deep."""
    found = [value]
    for _ in range(levels + 1):
        below = [item.values() if isinstance(item, dict) else item for item in found if isinstance(item, (dict, list))]
        if not below:
            return False
        found = [item for items in below for item in items]
    return True


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, str):
        return text(value, path)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UnsupportedValueError(path, value, "an integer of that many digits is no JSON number; use a string")
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UnsupportedValueError(f"{path}[{key!r}]", key, "keys must be strings; convert it with str()")
        return {text(key, f"{path}[{key!r}]"): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    number = scalar(value)
    if number is None:
        raise UnsupportedValueError(path, value, _ADVICE)
    return number


def text(value: Any, path: str) -> str:
    """Return ``value`` as plain text that every database can store.

    Raises:
        UnsupportedValueError: it is no text, or holds half a surrogate pair or a NUL; the text names ``path``.
    """
    if not isinstance(value, str):
        raise UnsupportedValueError(path, value, "it must be text; convert it with str()")
    if "\0" in value or (not value.isascii() and value.encode("utf-8", "ignore").decode() != value):
        raise UnsupportedValueError(path, value, "it holds NUL or half a surrogate pair, which no database stores")
    return str.__str__(value)  # the text itself, also of an Enum that is a str


def short_text(value: Any, path: str, limit: int) -> str:
    """Return ``value`` as ``text`` does, if it has no more than ``limit`` characters.

    Raises:
        UnsupportedValueError: it is longer, or what ``text`` refuses.
    """
    if len(text(value, path)) > limit:
        raise UnsupportedValueError(path, value, f"it has {len(value):,} characters, and may have {limit:,} there")
    return str(value)


def to_step(value: Any) -> int:
    """Return a step as an int that every database can store.

    Raises:
        UnsupportedValueError: it is no integer, or does not fit into 64 bits.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UnsupportedValueError("step", value, "it must be an integer") from None
    if not -(2**63) <= number < 2**63:
        raise UnsupportedValueError("step", value, "it does not fit into 64 bits")
    return number


def scalar(value: Any) -> Any:
    """Return a zero-dimensional array or array scalar (NumPy, torch, JAX ...) as a Python number, else None."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        number = value.item()
        if isinstance(number, (bool, int, float, str)):
            return number
    return None


def to_number(value: Any, path: str) -> float:
    """Return a metric's value as a float: any real number or scalar of an array library; NaN and infinities are kept.

    Raises:
        UnsupportedValueError: it is none; the text names ``path``.
    """
    if type(value) is float:
        return value
    found = value if isinstance(value, (bool, int, float)) else scalar(value)
    if not isinstance(found, (bool, int, float)):
        raise UnsupportedValueError(
            path, value, "a metric is one real number; reduce arrays first, for example .mean()"
        )
    try:
        return float(found)
    except OverflowError:
        raise UnsupportedValueError(path, value, "the integer is too large for a float") from None


def dumps(value: Any) -> str:
    """Return what ``to_jsonable`` made as strict JSON text."""
    return json.dumps(escape(value), allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """Undo ``dumps``."""
    value = json.loads(text)
    return unescape(value) if '"$' in text else value


def escape(value: Any) -> Any:
    """Return ``value`` with nothing in it that strict JSON cannot say."""
    if isinstance(value, Mapping):
        return {f"${k}" if k.startswith("$") else k: escape(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return {"$float": repr(value)}
    return value


def unescape(value: Any) -> Any:
    """Undo ``escape``."""
    if isinstance(value, list):
        return [unescape(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$float"}:
        return float(value["$float"])
    return {k[1:] if k.startswith("$") else k: unescape(v) for k, v in value.items()}


def storable(value: float) -> float:
    """Return what stands for a number, not NaN, in a column of floats."""
    return float(max(-LARGEST, min(LARGEST, value)))


def exact(value: Any) -> Any:
    """Undo ``storable``: return the infinity that a number stands for; anything else is returned as it is."""
    if isinstance(value, (int, float)) and abs(value) >= LARGEST:
        return math.copysign(math.inf, value)
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None, str | None]]:
    """Yield every leaf as (dotted name, number or None, text or None); booleans are numbers, lists count by index.

    LARGEST stands for what is larger, and NaN is what is not there.
    """
    for name, value in config.items():
        full = f"{prefix}{name}"
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{full}.")
        elif value != value:
            yield full, None, None
        elif isinstance(value, (bool, int, float)):
            yield full, storable(value), repr(value)
        else:
            yield full, None, value
