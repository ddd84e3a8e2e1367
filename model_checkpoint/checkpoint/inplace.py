"""Loading into objects that exist: which saved array goes into which of theirs, and filling it from the file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.arrays import HostArray, Layout, adapter_for, fill, touched
from model_checkpoint.checkpoint.places import Place, overlaps_itself, place_of, shared
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
        self._bare = False
        self._places: list[Place] = []

    def compare_part(self, tree: Any, target: object, state: Any, name: str) -> None:
        """Note how a component's tree fits an object.

        Args:
            tree: what was saved.
            target, state: the object, and its ``state_dict()``, or itself where it has none.
            name: the component's.
        """
        if isinstance(target, type):
            self.problems.append(f"{name}: {target.__name__} is a class; pass an object of it")
        elif state is target and not isinstance(target, (Mapping, list, tuple)):
            self.problems.append(f"{name}: a {type(target).__name__} cannot be filled; pass it within a dict or list")
        elif state is not target and not callable(getattr(target, "load_state_dict", None)):
            self.problems.append(f"{name}: {type(target).__name__} has state_dict() and no load_state_dict()")
        elif _is_sequence(tree) != isinstance(state, (list, tuple)):
            self.problems.append(f"{name}: {_kind_of(tree)} was saved, there is a {type(state).__name__}")
        else:
            self._bare = state is target
            # Optimizers and schedulers have keys that come and go; load_state_dict() knows them.
            self._compare(tree, state, name, fixed=self._bare, strict=self._bare or name == "model")

    def _compare(self, tree: Any, state: Any, path: str, fixed: bool, strict: bool) -> None:
        """Note how ``tree`` fits ``state``.

        Args:
            tree, state: what was saved, and what is there.
            path: what messages call it.
            fixed: whether it cannot be replaced: it is the target itself, or lies in tuples of the target only.
            strict: whether every key must be on both sides; otherwise only those of arrays.
        """
        saved = children(tree)
        if isinstance(tree, dict) and ("$array" in tree or "$view" in tree):
            self._array(tree, state, path, fixed)
        elif saved is None:
            self._value(tree, state, path, fixed, strict)
        elif isinstance(state, (Mapping, list, tuple)) and not state and "." in path and not (fixed and saved):
            self.fresh += references(tree)
        elif not isinstance(state, (Mapping, list, tuple)) or _is_sequence(tree) != isinstance(state, (list, tuple)):
            if strict or _has_arrays(tree):
                self.problems.append(f"{path}: {_kind_of(tree)} was saved, there is a {type(state).__name__}")
        else:
            self._container(saved, state, path, fixed, strict)

    def _container(self, saved: list[tuple[Any, Any]], state: Any, path: str, fixed: bool, strict: bool) -> None:
        there = dict(state) if isinstance(state, Mapping) else dict(enumerate(state))
        if path.startswith("optimizer.param_groups") and len(saved) != len(there) and isinstance(state, list):
            self.problems.append(f"{path}: {len(saved)} were saved, there are {len(there)}")
        fixed = fixed and not isinstance(state, (MutableMapping, MutableSequence))
        below = strict and self._bare  # what lies deeper in a module's state is the module's
        for node, child in saved:
            key = self._decode(node)
            if key in there:
                self._compare(child, there.pop(key), f"{path}.{key}", fixed, below)
            elif _has_arrays(child) or fixed or (strict and not self._bare):
                self.problems.append(f"{path}.{key}: was saved, there is no place for it")
        for key, left in there.items():
            found = [f"{path}.{key}"] if strict else _arrays_in(left, f"{path}.{key}")
            self.problems += [f"{name}: is there, was not saved" for name in found]

    def _value(self, tree: Any, state: Any, path: str, fixed: bool, strict: bool) -> None:
        is_array = _described(state) is not None
        if strict and (is_array or next(_arrays_in(state, path), None) is not None):
            self.problems.append(f"{path}: no array was saved, there is a {type(state).__name__}")
        elif fixed and (is_array or self._decode(tree) != state):
            self.problems.append(f"{path}: {state!r:.50} is in a tuple, which cannot be changed; use a list")

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
        elif isinstance(found.identity, Layout) and overlaps_itself(found.identity):
            self.problems.append(f"{path}: several of its elements are one place in memory, as after expand()")
        else:
            self.filled.append(Filled(tree, target, _own_memory(found)))
            place = place_of(found, tree, path)
            self._places += [] if place is None else [place]

    def find_shared(self) -> None:
        """Refuse targets that share memory otherwise than what goes there did when it was saved."""
        self.problems += shared(self._places)


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
                match.compare_part(tree[name], targets[name], state, name)
            else:
                match.problems.append(f"{name}: nothing of it was saved")
        match.find_shared()
    if match.problems:
        raise StateMismatchError(match.problems)
    with reader.decoding():
        reader.verify_all()
        _fill(reader, match, decoder, threads)
        made = {name: decoder.node(tree[name]) for name in targets}
    for name, target in targets.items():
        if states[name] is target:
            assign(target, made[name], {id(filled.target) for filled in match.filled})
        else:  # of arrays alone, too: state_dict() may have returned copies
            target.load_state_dict(made[name])  # type: ignore[attr-defined]


def _state_of(target: object) -> Any:
    has_state = callable(getattr(target, "state_dict", None)) and not isinstance(target, type)
    return target.state_dict() if has_state else target  # type: ignore[attr-defined]


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
        if not reader.verified:
            for _ in reader.located(nodes, stack):
                pass  # a file that is missing, or whose head is damaged, is found before anything is changed
        for file, arrays in reader.located(nodes, stack):
            parallel: list[partial[None]] = []
            alone: list[partial[None]] = []  # on the caller's own stream of the device
            for (component, key), node in nodes.items():
                if key in arrays.get(component, {}):
                    targets = wanted.get((component, key), [])
                    own = all(filled.memory is not None for filled in targets)
                    put = partial(_put, file, arrays[component][key], node, targets, decoder)
                    (parallel if own else alone).append(put)
            run(parallel, threads)
            for put in alone:
                put()
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
            touched(filled.target)  # first: a read that fails may have changed a part
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


def assign(state: Any, made: Any, filled: Collection[int]) -> None:
    """Put the values of ``made`` into the containers of ``state``, but for arrays that were filled (by their ids).

    In ``made`` there may be others in their place: one for several that were saved as one.
    """
    changeable = isinstance(state, (MutableMapping, MutableSequence))
    pairs = made.items() if isinstance(made, Mapping) else enumerate(made)
    for key, value in pairs:
        old = state.get(key) if isinstance(state, Mapping) else state[key] if key < len(state) else None
        if id(old) in filled:
            continue
        inside = isinstance(old, (MutableMapping, list)) and isinstance(value, (Mapping, list))
        if (inside and old) or (not changeable and isinstance(old, (Mapping, list, tuple))):
            assign(old, value, filled)
        elif isinstance(state, MutableMapping) or (changeable and key < len(state)):
            state[key] = value
        elif changeable:
            state.append(value)
    if isinstance(state, MutableSequence):
        del state[len(made) :]


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, list) or (isinstance(tree, dict) and "$tuple" in tree)


def _kind_of(tree: Any) -> str:
    if children(tree) is None:
        return "a value"
    what = "list" if _is_sequence(tree) else "dict"
    return f"a {what} of arrays" if _has_arrays(tree) else f"a {what}"


def _described(value: object) -> HostArray | None:
    adapter = adapter_for(type(value))
    try:
        return None if adapter is None else adapter.describe(value)
    except ValueError:
        return None  # an array that cannot be saved, so it was not


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
