"""Loading into objects that exist: which saved array goes into which of theirs, and filling it from the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import ExitStack
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from model_checkpoint.arrays import HostArray, Layout, adapter_for, fill
from model_checkpoint.checkpoint.reader import CheckpointReader, not_stored, span
from model_checkpoint.checkpoint.selection import children, references
from model_checkpoint.checkpoint.state import Decoder
from model_checkpoint.errors import StateMismatchError
from model_checkpoint.integrity.reading import FileReader
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

_VALUES = ("bytes", "numpy.scalar", "jax")  # kinds of arrays that nobody can change


class Filled(NamedTuple):
    """An array to fill.

    Attributes:
        node: what the checkpoint's tree says of it.
        target: the array that exists.
        memory: the target's own memory, flat, where that is in host memory and C order; else None.
    """

    node: dict[str, Any]
    target: object
    memory: memoryview | None


class Match:
    """Compares the trees of a checkpoint with the state that exists.

    Args:
        decode: makes an object of a part of a tree that has no arrays.

    Attributes:
        filled: the saved arrays that have a counterpart, with it.
        fresh: the nodes of those that have none because there is no state yet, such as a new optimizer's.
        problems: what does not fit, a line each.
    """

    def __init__(self, decode: Callable[[Any], Any]) -> None:
        self._decode = decode
        self.filled: list[Filled] = []
        self.fresh: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._places: dict[object, tuple[str, str, str]] = {}  # where in memory -> the saved array, and who met it

    def compare(self, tree: Any, state: Any, path: str, fixed: bool = True) -> None:
        """Note how ``tree`` fits ``state``.

        Args:
            tree, state: what was saved, and what is there.
            path: what messages call it.
            fixed: whether it cannot be replaced: it is the target itself, or lies in tuples of the target only.
        """
        saved = children(tree)
        if isinstance(tree, dict) and ("$array" in tree or "$view" in tree):
            self._array(tree, state, path, fixed)
        elif saved is None and fixed:
            if _described(state) is not None or self._decode(tree) != state:
                self.problems.append(f"{path}: {state!r:.50} is in a tuple, which cannot be changed; use a list")
        elif saved is None or (isinstance(state, (Mapping, list, tuple)) and not state and "." in path):
            self.fresh += references(tree)
        elif not isinstance(state, (Mapping, list, tuple)):
            if _has_arrays(tree):
                self.problems.append(f"{path}: a container of arrays was saved, there is a {type(state).__name__}")
        else:
            there = dict(state) if isinstance(state, Mapping) else dict(enumerate(state))
            if path.startswith("optimizer.param_groups") and len(saved) != len(there) and isinstance(state, list):
                self.problems.append(f"{path}: {len(saved)} were saved, there are {len(there)}")
            fixed = fixed and isinstance(state, tuple)
            for node, child in saved:
                key = self._decode(node)
                if key in there:
                    self.compare(child, there.pop(key), f"{path}.{key}", fixed)
                elif _has_arrays(child):
                    self.problems.append(f"{path}.{key}: was saved, there is no place for it")
            for key, left in there.items():
                self.problems += [f"{name}: is there, was not saved" for name in _arrays_in(left, f"{path}.{key}")]

    def _array(self, tree: dict[str, Any], target: object, path: str, fixed: bool) -> None:
        found = _described(target)
        saved = f"{tree['dtype']}{list(tree['shape'])}"
        if found is None:
            self.problems.append(f"{path}: {saved} was saved, there is a {type(target).__name__}")
        elif (found.dtype, list(found.shape)) != (tree["dtype"], list(tree["shape"])):
            self.problems.append(f"{path}: {saved} was saved, there is {found.dtype}{list(found.shape)}")
        elif found.kind in _VALUES or (found.kind.startswith("memoryview") and found.data.readonly):
            self.fresh += references(tree)  # it is replaced
            if fixed:
                self.problems.append(f"{path}: cannot be changed, and is in a tuple, which cannot either; use a list")
        elif not getattr(getattr(target, "flags", None), "writeable", True):
            self.problems.append(f"{path}: is read-only")
        elif isinstance(found.identity, Layout) and _overlaps_itself(found.identity):
            self.problems.append(f"{path}: several of its elements are one place in memory, as after expand()")
        else:
            self.filled.append(Filled(tree, target, _own_memory(found)))
            self._note_place(found.identity, tree, path)

    def _note_place(self, identity: object, tree: dict[str, Any], path: str) -> None:
        """Refuse that two saved arrays go into one: arrays that are tied now, and were not then."""
        base = tree if "$array" in tree else tree["base"]
        place = identity[:2] if isinstance(identity, Layout) else identity
        first = self._places.setdefault(place, (base["of"], base["$array"], path))
        if place is not None and first[:2] != (base["of"], base["$array"]):
            self.problems.append(f"{path}: shares its memory with {first[2]}, they were saved as two arrays")


def load_into(reader: CheckpointReader, targets: Mapping[str, object], threads: int) -> None:
    """Fill objects with a checkpoint. All is compared, and every byte verified, before the first of them is changed.

    Args:
        reader: the checkpoint.
        targets: component -> an object with ``state_dict()`` and ``load_state_dict()``, or a nested dict or list.
            Arrays in host memory in C order are read from the files straight into their place, others one by one by way
            of memory of their own. Then ``load_state_dict`` is given all of it, with the arrays that were filled.
        threads: how many read at once.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
        IntegrityError, MissingDependencyError, UnknownBackendError: as ``CheckpointReader.load``; nothing was changed.
    """
    states = {name: _state_of(target) for name, target in targets.items()}
    with reader.decoding():
        tree = reader.tree()
        decoder = Decoder(not_stored)
        match = Match(decoder.node)
        for name, state in states.items():
            if name in tree:
                match.compare(tree[name], state, name)
            else:
                match.problems.append(f"{name}: nothing of it was saved")
    if match.problems:
        raise StateMismatchError(match.problems)
    with reader.decoding():
        reader.verify_all()
        _fill(reader, match, decoder, threads)
        made = {name: decoder.node(tree[name]) for name in targets}
    for name, target in targets.items():
        if states[name] is target:
            assign(target, made[name])
        else:  # of arrays alone, too: state_dict() may have returned copies
            target.load_state_dict(made[name])  # type: ignore[attr-defined]


def _state_of(target: object) -> Any:
    return target.state_dict() if callable(getattr(target, "state_dict", None)) else target  # type: ignore[attr-defined]


def _fill(reader: CheckpointReader, match: Match, decoder: Decoder, threads: int) -> None:
    wanted: dict[tuple[str, str], list[Filled]] = {}
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    for node in match.fresh:
        nodes[node["of"], node["$array"]] = node
    for filled in match.filled:
        node = filled.node if "$array" in filled.node else filled.node["base"]
        nodes[node["of"], node["$array"]] = node
        if "$array" in filled.node:
            wanted.setdefault((node["of"], node["$array"]), []).append(filled)
    with ExitStack() as stack:
        for file, arrays in reader.located(nodes, stack):
            tasks = [
                partial(_put, file, arrays[component][key], node, wanted.get((component, key), []), decoder)
                for (component, key), node in nodes.items()
                if key in arrays.get(component, {})
            ]
            run(tasks, threads, Event())
    for filled in match.filled:
        if "$view" in filled.node:  # arrays that overlapped were stored as one
            view = decoder.node(filled.node)
            adapter = adapter_for(type(view))
            host = None if adapter is None else adapter.to_host(view)
            fill(filled.target, host or not_stored(filled.node["of"], filled.node["$view"]))


def _put(
    file: FileReader | None, stored: HostArray, node: dict[str, Any], targets: list[Filled], decoder: Decoder
) -> None:
    """Bring one stored array to its targets, or where it has none into memory of its own."""
    begin, end = (0, stored.data.nbytes) if file is None else span(file, stored)
    copy: HostArray | None = stored if file is None else None
    for filled in targets:
        if file is not None and filled.memory is not None and filled.memory.nbytes == end - begin:
            file.read_into(begin, filled.memory)
            continue
        if copy is None and file is not None:
            copy = stored._replace(data=_read(file, begin, end))
        dtype, shape = node["dtype"], tuple(node["shape"])
        fill(filled.target, (copy or stored)._replace(dtype=dtype, shape=shape, kind=node["kind"]))
    if targets:
        decoder.adopt(node, targets[-1].target)
    else:
        decoder.place(node, stored if file is None else stored._replace(data=_read(file, begin, end)))


def _read(file: FileReader, begin: int, end: int) -> memoryview:
    memory = fresh_memory(end - begin)
    file.read_into(begin, memory)
    return memory


def assign(state: Any, made: Any) -> None:
    """Put the values of ``made`` into the containers of ``state``; arrays that were filled are in both already."""
    pairs = made.items() if isinstance(made, Mapping) else enumerate(made)
    for key, value in pairs:
        old = state.get(key) if isinstance(state, Mapping) else state[key] if key < len(state) else None
        if isinstance(old, (Mapping, list)) and isinstance(value, (Mapping, list)) and old:
            assign(old, value)
        elif isinstance(state, MutableMapping) or (isinstance(state, MutableSequence) and key < len(state)):
            state[key] = value
        elif isinstance(state, MutableSequence):
            state.append(value)


def _described(value: object) -> HostArray | None:
    adapter = adapter_for(type(value))
    try:
        return None if adapter is None else adapter.describe(value)
    except ValueError:
        return None  # an array that cannot be saved, so it was not


def _overlaps_itself(layout: Layout) -> bool:
    return any(length > 1 and stride == 0 for length, stride in zip(layout.shape, layout.strides))


def _own_memory(array: HostArray) -> memoryview | None:
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


def _has_arrays(tree: Any) -> bool:
    return next(references(tree), None) is not None


def _arrays_in(state: Any, path: str) -> Iterator[str]:
    if isinstance(state, Mapping):
        for key, item in state.items():
            yield from _arrays_in(item, f"{path}.{key}")
    elif isinstance(state, (list, tuple)):
        for i, item in enumerate(state):
            yield from _arrays_in(item, f"{path}.{i}")
    elif not isinstance(state, (str, bytes)) and _described(state) is not None:
        yield path
