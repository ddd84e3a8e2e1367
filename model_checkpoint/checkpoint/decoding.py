"""A state's JSON tree and its stored arrays -> objects. What the tree looks like is told in ``state.py``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from model_checkpoint.arrays import DTYPES, HostArray, Layout, from_host, kind_in, view
from model_checkpoint.errors import FormatError
from model_checkpoint.utils.optional import find as find_package


class Decoder:
    """Builds objects from a tree; tied arrays come back as one object.

    Args:
        fetch: ``(component, key)`` -> the stored array, its dtype and shape those of the file.
        device: where arrays of a library with devices go; None leaves them in host memory.
        framework: whose arrays to make of all; None for those of the library that each was saved from.
    """

    def __init__(
        self, fetch: Callable[[str, str], HostArray], device: object = None, framework: str | None = None
    ) -> None:
        self._fetch = fetch
        self._device = device
        self._framework = framework
        self._made: dict[tuple[object, ...], object] = {}
        self._told: dict[tuple[object, ...], tuple[Any, Any]] = {}  # dtype and shape of what was made

    def node(self, tree: Any) -> Any:
        """Return the object that ``tree`` describes.

        Raises:
            FormatError: a construct that this version does not know, or an array that is not what the tree says.
        """
        if isinstance(tree, list):
            return [self.node(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if "$array" in tree or "$view" in tree:
            return self._array(tree)
        tag = next((key for key in tree if key.startswith("$")), None)
        if tag is None:
            return {key: self.node(value) for key, value in tree.items()}
        if tag not in _TAGS:
            raise FormatError(f"state.json holds {tag!r}, which this version does not know; upgrade model-checkpoint")
        return _TAGS[tag](self, tree[tag], tree)

    def _array(self, tree: dict[str, Any]) -> object:
        if "$array" in tree:
            name: tuple[object, ...] = _name(tree)
        else:
            name = (tree["of"], tree["$view"], tree.get("as"), tree["offset"], *tree["shape"], *tree["strides"])
        told = (tree["dtype"], tree["shape"])
        if self._told.setdefault(name, told) != told:  # a view of it would be measured by the wrong one
            raise FormatError(f"state.json says of {name[1]!r} that it is {told} and {self._told[name]}")
        if name not in self._made:
            self._made[name] = self._load(tree) if "$array" in tree else self._view(tree)
        return self._made[name]

    def array(self, component: str, key: str, array: HostArray) -> object:
        """Return what the tree's references to this array have become; makes it where there is none."""
        name = (component, key, None)
        if name not in self._made:
            self._made[name] = from_host(array._replace(kind=self._kind(array.kind)), self._device)
        return self._made[name]

    def place(self, tree: dict[str, Any], stored: HostArray, device: object = None) -> None:
        """Make the array that the node ``tree`` refers to from what was ``stored``, before the tree is decoded."""
        self._told[_name(tree)] = (tree["dtype"], tree["shape"])
        self._made[_name(tree)] = self._make(tree, stored, device)

    def adopt(self, tree: dict[str, Any], array: object) -> None:
        """Let the node ``tree`` decode to ``array``, which holds the stored values already."""
        self._told[_name(tree)] = (tree["dtype"], tree["shape"])
        self._made[_name(tree)] = array

    def _load(self, tree: dict[str, Any]) -> object:
        return self._make(tree, self._fetch(tree["of"], tree["$array"]))

    def _kind(self, kind: str) -> str:
        return kind if self._framework is None else kind_in(self._framework, kind)

    def _make(self, tree: dict[str, Any], stored: HostArray, device: object = None) -> object:
        dtype, shape = tree["dtype"], tuple(tree["shape"])
        if dtype not in DTYPES or not _are_counts(shape) or stored.data.nbytes * 8 != _bits(shape, DTYPES[dtype].bits):
            raise FormatError(
                f"array {tree['$array']!r} of {tree['of']} is {stored.dtype}{list(stored.shape)} in its file, "
                f"but {dtype}{list(shape)} in state.json"
            )
        return from_host(
            stored._replace(dtype=dtype, shape=shape, kind=self._kind(tree["kind"])), device or self._device
        )

    def _view(self, tree: dict[str, Any]) -> object:
        shape, strides, offset, base = tuple(tree["shape"]), tuple(tree["strides"]), tree["offset"], tree["base"]
        counts = _are_counts((*shape, *strides, offset)) and _bits(shape, 64) < 2**63  # bytes, as libraries count
        if len(shape) != len(strides) or not counts or "$array" not in base:
            raise FormatError(f"a view of {base.get('$array')!r} has shape {shape}, strides {strides}, offset {offset}")
        made = self._array(base)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides)) if 0 not in shape else offset - 1
        if last >= _bits(base["shape"], 1):  # libraries would look there, and find what is somebody else's
            raise FormatError(f"a view of {base['$array']!r} reaches beyond it, to element {last}")
        return view(made, Layout("", 0, tree["dtype"], shape, strides), offset)

    def _pairs(self, pairs: list[list[Any]]) -> list[tuple[Any, Any]]:
        return [(self.node(key), self.node(value)) for key, value in pairs]

    def frozen(self, items: list[Any]) -> Any:
        """Return a frozenset of ``items``."""
        return frozenset(items)

    def large(self, number: int) -> Any:
        """Return an integer of more than 64 bits."""
        return number

    def key(self, data: Any, name: str) -> object:
        """Return a typed key of JAX; where JAX is not installed, or another framework was asked for, its data."""
        if self._framework in (None, "jax") and find_package("jax") is not None:
            from jax import random

            return random.wrap_key_data(data, impl=name)
        return data

    def ordered(self, pairs: list[list[Any]], tree: dict[str, Any]) -> OrderedDict[Any, Any]:
        """Return an ``OrderedDict``, with torch's ``_metadata`` on it where it was saved."""
        made = OrderedDict(self._pairs(pairs))
        if "metadata" in tree:
            made._metadata = self.node(tree["metadata"])  # type: ignore[attr-defined]
        return made


def _name(tree: dict[str, Any]) -> tuple[object, ...]:
    """Return what a node's array is kept by; ``as`` tells apart those of one stored array that become several."""
    return tree["of"], tree["$array"], tree.get("as")


def _are_counts(numbers: Iterable[object]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _bits(shape: Iterable[int], bits: int) -> int:
    for length in shape:
        bits *= length
    return bits


def _torch_value(text: str, kind: str) -> object:
    try:
        import torch
    except ModuleNotFoundError:
        return text  # without torch nobody can use the object; its name is the best there is
    try:
        made = torch.device(text) if kind == "device" else getattr(torch, text.removeprefix("torch."))
    except RuntimeError as error:
        raise FormatError(f"state.json holds {text!r}, which is no {kind} of this torch: {error}") from error
    if not isinstance(made, (torch.device, torch.dtype)):
        raise FormatError(f"state.json holds {text!r}, which is no {kind} of torch")
    return made


_TAGS: dict[str, Callable[[Decoder, Any, dict[str, Any]], Any]] = {
    "$tuple": lambda d, items, _: tuple(d.node(items)),
    "$set": lambda d, items, _: set(d.node(items)),
    "$frozenset": lambda d, items, _: d.frozen(d.node(items)),
    "$dict": lambda d, pairs, _: dict(d._pairs(pairs)),
    "$ordered": lambda d, pairs, tree: d.ordered(pairs, tree),
    "$float": lambda d, text, _: float(text),
    "$int": lambda d, text, _: d.large(int(text, 16)),
    "$complex": lambda d, parts, _: complex(*d.node(parts)),
    "$key": lambda d, name, tree: d.key(d.node(tree["data"]), name),
    "$torch": lambda d, text, tree: _torch_value(text, tree["type"]),
}
