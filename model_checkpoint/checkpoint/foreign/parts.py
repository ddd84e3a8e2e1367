"""What a foreign checkpoint is made of, and which part of ours each of its parts becomes."""

from __future__ import annotations

import argparse
import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from model_checkpoint.checkpoint.arguments import numbers
from model_checkpoint.checkpoint.storage import LinkedFile, PlannedFile
from model_checkpoint.errors import UnsupportedValueError
from model_checkpoint.utils.jsonable import MAX_DEPTH, is_deep, to_jsonable, to_number


class Source(NamedTuple):
    """What is to be imported.

    Attributes:
        path: absolute, without links.
        trust: whether pickles may run code.
        copy: whether the bytes will be copied; if not, ``Foreign.files`` is wanted, and nothing need be read.
    """

    path: str
    trust: bool
    copy: bool


class Foreign(NamedTuple):
    """A foreign checkpoint as we would save it.

    Attributes:
        model, optimizer, scheduler, extra: what ``save_checkpoint`` takes; their arrays belong to nobody else.
        epoch, step, loss, val_loss, metrics, config: what the file says of itself.
        left_out: paths of what has no safe form, and files of the folder that are not of its format.
        backend: name of the storage backend that reads ``files``.
        files: the files that hold the arrays, where a backend reads them as they are; else empty.
    """

    model: object
    optimizer: object = None
    scheduler: object = None
    extra: object = None
    epoch: int = 0
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    metrics: Mapping[str, float] = {}
    config: Any = None
    left_out: tuple[str, ...] = ()
    backend: str = ""
    files: Sequence[PlannedFile | LinkedFile] = ()

    def components(self) -> dict[str, object]:
        """Return what ``encode`` takes."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "extra": self.extra}


# Files of torch.save that were imported in place are taken apart by these names again whenever they are read: whoever
# changes them must keep these for files named ``pytorch_backend.FOREIGN_NAME``, and give new ones another name.
_MODEL = ("model_state_dict", "state_dict", "model", "module", "net")
_STATES = {
    "optimizer": ("optimizer_state_dict", "optimizer_states", "optimizer", "optim"),
    "scheduler": ("scheduler_state_dict", "lr_scheduler_state_dict", "lr_schedulers", "lr_scheduler", "scheduler"),
}
_EXTRA = ("extra_state", "extra_state_dict")


def _integer(value: Any) -> int:
    number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(number)
    return number


_FACTS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "epoch": (("epoch",), _integer),
    "step": (("global_step", "step", "global_steps", "iteration", "iter"), _integer),
    "loss": (("loss",), lambda value: to_number(value, "loss")),
    "val_loss": (("val_loss",), lambda value: to_number(value, "val_loss")),
    "metrics": (("metrics",), numbers),
    "config": (("config",), lambda value: to_jsonable(value, "config")),
}


def sort_parts(content: object, model_names: Sequence[str] = _MODEL) -> Foreign:
    """Return the parts of a checkpoint that was one object; what has no place of its own becomes ``extra``.

    Args:
        content: a dict of parts with the names that people use, or the model's state itself.
        model_names: what the model may be called.
    """
    if not isinstance(content, Mapping):
        return Foreign(content)
    left = dict(content)
    model = _taken(left, model_names)
    if (
        model is None and left.get("model_state_dict", left) is not None
    ):  # None is how an export says that there is none
        return Foreign(content)
    found = {part: _taken(left, names) for part, names in _STATES.items()}
    arrays = left.get("arrays")
    if isinstance(arrays, Mapping) and arrays.keys() <= {"model", *_STATES, "extra"}:
        del left["arrays"]  # with which our own pytorch backend names the tensors of the other parts again
    facts = _facts(left)
    extra = next((left.pop(name) for name in _EXTRA if left.get(name) is not None), None)
    known = {*model_names, *_EXTRA, *sum(_STATES.values(), ()), *sum((names for names, _ in _FACTS.values()), ())}
    plain = {
        key: vars(value) if isinstance(value, argparse.Namespace) else value
        for key, value in left.items()
        if value is not None or key not in known
    }
    if plain:
        extra = plain if extra is None else {"extra_state": extra, **plain}
    return Foreign(model, **found, extra=extra, **facts)


def _facts(left: dict[Any, Any]) -> dict[str, Any]:
    """Remove what a checkpoint says of itself, and return that; what means something else is left as it is."""
    facts = {}
    for fact, (names, convert) in _FACTS.items():
        for name in names:
            if left.get(name) is None:
                continue
            try:
                facts[fact] = convert(left[name])
            except (TypeError, ValueError):
                continue
            del left[name]
            break
    return facts


def _taken(left: dict[Any, Any], names: Sequence[str]) -> Any:
    """Remove the first of ``names`` that holds a state, and return that; None where there is none."""
    for name in names:
        value = left.get(name)
        is_state = isinstance(value, (Mapping, list, tuple)) or callable(getattr(value, "state_dict", None))
        if is_state or (value is not None and "state" in name):
            return left.pop(name)
    return None


def storable(
    value: Any,
    path: str,
    left_out: list[str],
    encode: Callable[[Mapping[str, object]], object],
    levels: int = MAX_DEPTH,
) -> Any:
    """Return ``value`` without what has no safe form, or lies deeper; the paths of that are added to ``left_out``."""
    if not is_deep(value, levels - 1):
        with contextlib.suppress(UnsupportedValueError):
            encode({path: value})
            return value
    if type(value) is not dict or levels == 0:
        left_out.append(path)
        return None
    kept = {}
    for key, item in value.items():
        before = len(left_out)
        made = storable(item, f"{path}.{key}", left_out, encode, levels - 1)
        if made is not None or len(left_out) == before:
            kept[key] = made
    return kept
