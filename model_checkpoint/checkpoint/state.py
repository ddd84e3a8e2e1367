"""Training state <-> a JSON tree of plain values plus named arrays in host memory. No pickle, no framework imported.

The tree is ordinary JSON; what JSON cannot say is an object with a key that begins with ``$``:
``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}``, ``{"$ordered": ...}``, ``{"$set": [...]}``,
``{"$int": "0x..."}``, ``{"$float": "nan"}``, ``{"$complex": [re, im]}``, ``{"$torch": "float32"}``,
``{"$array": key, ...}``.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from model_checkpoint.arrays import DTYPES, HostArray, Layout, adapter_for, from_host, settle, view
from model_checkpoint.checkpoint.ties import Placed, merge_overlaps
from model_checkpoint.errors import FormatError, UnsupportedValueError

_ADVICE = (
    "pass arrays, numbers, strings, bytes, lists, tuples, dicts, or an object with state_dict(); "
    "nothing is pickled, so convert it to one of these first"
)
MAX_DEPTH = 100  # containers within containers; decoding takes up to five frames a level of Python's 1,000
_ATOMS = (str, bool, type(None))


class EncodedState(NamedTuple):
    """A state as it is stored.

    Attributes:
        tree: component name (``model``, ``optimizer``, ...) -> its JSON tree.
        arrays: component name -> key -> the array; the memory is borrowed from the caller's objects.
    """

    tree: dict[str, Any]
    arrays: dict[str, dict[str, HostArray]]

    def to_json(self) -> bytes:
        """Return the tree as the bytes of ``state.json``."""
        return json.dumps(self.tree, separators=(",", ":"), allow_nan=False).encode()


def encode(components: Mapping[str, object]) -> EncodedState:
    """Take training objects apart.

    Args:
        components: name -> object: anything with ``state_dict()``, or a nested dict, list or tuple of arrays, such
            objects and plain values; None for one that there is not. Nothing of it is changed.

    Raises:
        UnsupportedValueError: a value that has no safe form; it names the path, the type and what to do.
    """
    encoder = _Encoder()
    for name, value in components.items():
        if value is None:
            continue
        encoder.component = encoder.arrays.setdefault(name, {})
        encoder.tree[name] = encoder.node(value, (name,))
    placed = sorted(encoder.placed, key=_address)
    if placed and placed[-1][0].device != "cpu":  # layouts sort by device: "cuda:0" comes after "cpu"
        settle()
    end = 0
    for layout, span, _ in placed:
        if layout.address < end:
            merge_overlaps(encoder.arrays, placed, encoder.kept)
            break
        end = layout.address + span
    return EncodedState(encoder.tree, encoder.arrays)


_address = itemgetter(0)  # a Layout sorts by device, then address


def path_text(path: tuple[object, ...]) -> str:
    """Return ``("config", "betas", 1)`` as ``config.betas[1]``, as errors print it."""
    text = str(path[0])
    for part in path[1:]:
        text += f".{part}" if isinstance(part, str) else f"[{part!r}]"
    return text


_TO_HOST: WeakKeyDictionary[type, Callable[[object], HostArray | None] | None] = WeakKeyDictionary()


class _Encoder:
    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.arrays: dict[str, dict[str, HostArray]] = {}
        self.component: dict[str, HostArray] = {}
        self.kept: list[object] = []  # every array met, so that no address is used a second time while encoding
        self.placed: list[Placed] = []
        self._tied: dict[object, dict[str, Any]] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: tuple[object, ...]) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < 64 else {"$int": hex(value)}
        if kind is float:
            return value if value - value == 0 else {"$float": repr(value)}
        if kind in (dict, list, tuple, OrderedDict):
            return self._container(value, kind, path)
        if kind not in _TO_HOST:
            adapter = adapter_for(kind)
            _TO_HOST[kind] = None if adapter is None else adapter.to_host
        to_host = _TO_HOST[kind]
        if to_host is not None:
            try:
                array = to_host(value)
            except ValueError as error:
                raise UnsupportedValueError(path_text(path), value, str(error)) from error
            if array is not None:
                return self._array(value, array, path)
        return self._rare(value, kind, path)

    def _array(self, value: object, array: HostArray, path: tuple[object, ...]) -> dict[str, Any]:
        tie = (array.kind, array.identity)
        if array.identity is not None and tie in self._tied:
            return self._tied[tie]
        key = ".".join(map(str, path[1:])) or str(path[0])
        key = key.encode("utf-8", "backslashreplace").decode()
        base, copies = key, 1
        while key in self.component or key == "__metadata__":  # {"a.b": x, "a": {"b": y}}, or SafeTensors' own name
            copies += 1
            key = f"{base}#{copies}"
        self.component[key] = array
        self.kept.append(value)
        reference = {
            "$array": key,
            "of": str(path[0]),
            "kind": array.kind,
            "dtype": array.dtype,
            "shape": list(array.shape),
        }
        if array.identity is not None:
            self._tied[tie] = reference
            if isinstance(array.identity, Layout):
                reach = sum([(n - 1) * s for n, s in zip(array.shape, array.identity.strides)]) + 1
                self.placed.append((array.identity, reach * DTYPES[array.dtype].bits // 8, reference))
        return reference

    def _container(self, value: Any, kind: type, path: tuple[object, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise UnsupportedValueError(path_text(path[:4]), value, f"it is nested more than {MAX_DEPTH} levels deep")
        if id(value) in self._open:
            raise UnsupportedValueError(path_text(path), value, "it contains itself; break the cycle first")
        self._open.add(id(value))
        node = self.node
        made: Any
        if kind is dict or kind is OrderedDict:
            named = kind is dict
            for k in value:
                named = named and type(k) is str and not k.startswith("$")
            if named:
                made = {}
                for k, v in value.items():
                    made[k] = node(v, (*path, k))
            else:
                pairs = [[node(k, (*path, k)), node(v, (*path, k))] for k, v in value.items()]
                made = {"$dict" if kind is dict else "$ordered": pairs}
                if hasattr(value, "_metadata"):  # what torch hangs on a state_dict: versions of each module's layout
                    made["metadata"] = node(value._metadata, (*path, "_metadata"))
        else:
            items = [node(v, (*path, i)) for i, v in enumerate(value)]
            made = items if kind is list else {"$tuple": items}
        self._open.discard(id(value))
        return made

    def _rare(self, value: Any, kind: type, path: tuple[object, ...]) -> Any:
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            state = value.state_dict()
            if not isinstance(state, dict):
                raise UnsupportedValueError(path_text(path), value, f"its state_dict() is a {type(state).__name__}")
            self.kept.append(state)
            return self.node(state, path)
        if kind is complex:
            return {"$complex": [self.node(value.real, path), self.node(value.imag, path)]}
        if kind in (set, frozenset):
            try:
                ordered = sorted(value)
            except TypeError:
                ordered = list(value)
            return {f"${kind.__name__}": self._container(ordered, list, path)}
        if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
            return {"$torch": str(value), "type": kind.__name__}
        for base in (OrderedDict, dict, list, tuple):  # subclasses, such as defaultdict, torch.Size and named tuples
            if isinstance(value, base):
                return self._container(value, base, path)
        if isinstance(value, str):  # an Enum or the like: what it is beneath, not what str() makes of it
            return str.__str__(value)
        for plain in (int, float):
            if isinstance(value, plain):
                return self.node(plain(value), path)
        raise UnsupportedValueError(path_text(path), value, _ADVICE)


class Decoder:
    """Builds objects from a tree; tied arrays come back as one object.

    Args:
        fetch: ``(component, key)`` -> the stored array, its dtype and shape those of the file.
        device: where arrays of a library with devices go; None leaves them in host memory.
        kind: the kind that every array shall have; None for the kind that it had when it was saved.
    """

    def __init__(self, fetch: Callable[[str, str], HostArray], device: object = None, kind: str | None = None) -> None:
        self._fetch = fetch
        self._device = device
        self._kind = kind
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
            name: tuple[object, ...] = (tree["of"], tree["$array"])
        else:
            name = (tree["of"], tree["$view"], tree["offset"], *tree["shape"], *tree["strides"])
        told = (tree["dtype"], tree["shape"])
        if self._told.setdefault(name, told) != told:  # a view of it would be measured by the wrong one
            raise FormatError(f"state.json says of {name[1]!r} that it is {told} and {self._told[name]}")
        if name not in self._made:
            self._made[name] = self._load(tree) if "$array" in tree else self._view(tree)
        return self._made[name]

    def array(self, component: str, key: str, array: HostArray) -> object:
        """Return what the tree's references to this array have become; makes it where there is none."""
        if (component, key) not in self._made:
            self._made[component, key] = from_host(array._replace(kind=self._kind or array.kind), self._device)
        return self._made[component, key]

    def place(self, tree: dict[str, Any], stored: HostArray) -> None:
        """Make the array that the node ``tree`` refers to from what was ``stored``, before the tree is decoded."""
        self._told[tree["of"], tree["$array"]] = (tree["dtype"], tree["shape"])
        self._made[tree["of"], tree["$array"]] = self._make(tree, stored)

    def adopt(self, tree: dict[str, Any], array: object) -> None:
        """Let the node ``tree`` decode to ``array``, which holds the stored values already."""
        self._told[tree["of"], tree["$array"]] = (tree["dtype"], tree["shape"])
        self._made[tree["of"], tree["$array"]] = array

    def _load(self, tree: dict[str, Any]) -> object:
        return self._make(tree, self._fetch(tree["of"], tree["$array"]))

    def _make(self, tree: dict[str, Any], stored: HostArray) -> object:
        dtype, shape = tree["dtype"], tuple(tree["shape"])
        if dtype not in DTYPES or not _are_counts(shape) or stored.data.nbytes * 8 != _bits(shape, DTYPES[dtype].bits):
            raise FormatError(
                f"array {tree['$array']!r} of {tree['of']} is {stored.dtype}{list(stored.shape)} in its file, "
                f"but {dtype}{list(shape)} in state.json"
            )
        return from_host(stored._replace(dtype=dtype, shape=shape, kind=self._kind or tree["kind"]), self._device)

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

    def ordered(self, pairs: list[list[Any]], tree: dict[str, Any]) -> OrderedDict[Any, Any]:
        """Return an ``OrderedDict``, with torch's ``_metadata`` on it where it was saved."""
        made = OrderedDict(self._pairs(pairs))
        if "metadata" in tree:
            made._metadata = self.node(tree["metadata"])  # type: ignore[attr-defined]
        return made


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
    "$torch": lambda d, text, tree: _torch_value(text, tree["type"]),
}
