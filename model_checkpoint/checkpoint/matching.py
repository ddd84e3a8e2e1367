"""How a checkpoint's trees fit objects that exist: what goes where, and what does not fit. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NamedTuple

from model_checkpoint.arrays import HostArray, Layout, adapter_for
from model_checkpoint.checkpoint.objects import ObjectAdapter, find
from model_checkpoint.checkpoint.places import Place, overlaps_itself, place_of, shared
from model_checkpoint.checkpoint.renaming import rename_key
from model_checkpoint.checkpoint.selection import children, references
from model_checkpoint.errors import Problem

_VALUES = ("bytes", "numpy.scalar", "jax", "tensorflow")  # kinds of arrays that nobody can change


class Filled(NamedTuple):
    """An array to fill.

    Attributes:
        path: what messages call it.
        node: what the checkpoint's tree says of it.
        target: the array that exists.
        memory: the target's own memory, flat, where that is in host memory and C order; else None.
    """

    path: str
    node: dict[str, Any]
    target: object
    memory: memoryview | None


class Fresh(NamedTuple):
    """An array to make anew: there is none yet, as in a new optimizer, or it cannot be changed.

    Attributes:
        path: what messages call it, or what it lies in.
        node: what the checkpoint's tree says of it.
        device: where to put it (a JAX sharding), None for host memory.
    """

    path: str
    node: dict[str, Any]
    device: object = None


class Found(NamedTuple):
    """An object that is taken apart.

    Attributes:
        target: the object.
        adapter: of its library.
        state: what its adapter says its state is; of an opaque one, the saved one's tree.
        path: what messages call it.
    """

    target: object
    adapter: ObjectAdapter
    state: object
    path: str


class Match:
    """Compares the trees of a checkpoint with the state that exists.

    Args:
        decode: makes an object of a part of a tree that has no arrays.
        in_place: whether what cannot be changed, such as what lies in a tuple, is a problem; else it is made anew.

    Attributes:
        filled: the saved arrays that have a counterpart, with it.
        fresh: those that are made anew.
        objects: id of an object -> how it is taken apart.
        renamed: paths of saved arrays that are called otherwise in what exists -> what they are called there.
        problems: what does not fit.
    """

    def __init__(self, decode: Callable[[Any], Any], in_place: bool) -> None:
        self._decode = decode
        self._in_place = in_place
        self.filled: list[Filled] = []
        self.fresh: list[Fresh] = []
        self.objects: dict[int, Found] = {}
        self.problems: list[Problem] = []
        self.renamed: dict[str, str] = {}
        self._bare = False  # whether what is compared lies in dicts and lists of the user's own
        self._complete = True  # or in an object whose keys are always the same
        self._memory: list[Place] = []

    def compare_part(self, tree: Any, target: object, name: str) -> None:
        """Note how a component's tree fits an object, or nested dicts, lists and tuples of objects and arrays."""
        if isinstance(target, type):
            self._mismatch(name, f"{target.__name__} is a class; pass an object of it")
        elif find(target) is None and not isinstance(target, (Mapping, list, tuple)) and self._in_place:
            self._mismatch(name, f"a {type(target).__name__} cannot be filled; pass it within a dict or list")
        else:
            self._bare = True
            self._compare(tree, target, name, fixed=True, strict=True)

    def _mismatch(self, path: str, text: str) -> None:
        self.problems.append(Problem("mismatched", path, f"{path}: {text}"))

    def _compare(self, tree: Any, state: Any, path: str, fixed: bool, strict: bool) -> None:
        """Note how ``tree`` fits ``state``.

        Args:
            tree, state: what was saved, and what is there.
            path: what messages call it.
            fixed: whether it cannot be replaced: it is the target itself, or lies in tuples of the target only.
            strict: whether every key must be on both sides; otherwise only those of arrays.
        """
        saved = children(tree)
        adapter = None if _plain(state) else find(state)
        if adapter is not None:
            self._object(tree, state, adapter, path)
        elif isinstance(tree, dict) and ("$array" in tree or "$view" in tree):
            self._array(tree, state, path, fixed)
        elif isinstance(tree, dict) and "$key" in tree:
            self._key(tree, state, path)
        elif saved is None:
            self._value(tree, state, path, fixed, strict)
        elif isinstance(state, (Mapping, list, tuple)) and not state and "." in path and not (fixed and saved):
            self.fresh += [Fresh(path, node) for node in references(tree)]
        elif not isinstance(state, (Mapping, list, tuple)) or _is_sequence(tree) != isinstance(state, (list, tuple)):
            if strict or has_arrays(tree):
                self._mismatch(path, f"{_kind_of(tree)} was saved, there is a {type(state).__name__}")
        else:
            self._container(tree, saved, state, path, fixed, strict)

    def _object(self, tree: Any, target: object, adapter: ObjectAdapter, path: str) -> None:
        setter = adapter.setter(target)
        if setter is not None and not callable(getattr(target, setter, None)):
            self._mismatch(path, f"{type(target).__name__} has state_dict() and no {setter}()")
            return
        if adapter.opaque:
            self.objects[id(target)] = Found(target, adapter, tree, path)
            self._opaque(tree, adapter.class_of(target), path)
            return
        try:
            state = adapter.state_of(target)
        except ValueError as error:
            self._mismatch(path, str(error))
            return
        self.objects[id(target)] = Found(target, adapter, state, path)
        self._rename(tree, state, adapter, path)
        before = self._bare, self._complete
        # Optimizers and schedulers have keys that come and go; load_state_dict() knows them.
        self._bare, self._complete = False, adapter.complete(target) or path == "model"
        self._compare(tree, state, path, fixed=False, strict=self._complete)
        self._bare, self._complete = before

    def _rename(self, tree: Any, state: Any, adapter: ObjectAdapter, path: str) -> None:
        """Give the keys of an object's tree the names that its state has, where they were saved within a wrapper."""
        if not isinstance(state, Mapping) or not isinstance(tree, dict):
            return
        for old, new in [(key, adapter.known_as(key)) for key, _ in children(tree) or () if isinstance(key, str)]:
            if old not in state and new in state:
                rename_key(tree, old, new)
                self.renamed[f"{path}.{old}"] = f"{path}.{new}"

    def _opaque(self, tree: Any, own: str | None, path: str) -> None:
        saved = tree.get("class") if isinstance(tree, dict) else None
        if own is not None and own != saved:
            self._mismatch(path, f"{f'a {saved}' if saved else _kind_of(tree)} was saved, there is a {own}")
        self.fresh += [Fresh(path, node) for node in references(tree)]

    def _container(
        self, tree: Any, saved: list[tuple[Any, Any]], state: Any, path: str, fixed: bool, strict: bool
    ) -> None:
        there = _items(tree, state)
        if ".param_groups" in path and len(saved) != len(there) and isinstance(state, list):
            self._mismatch(path, f"{len(saved)} were saved, there are {len(there)}")
        fixed = fixed and not isinstance(state, (MutableMapping, MutableSequence))
        below = strict and self._bare  # what lies deeper in a module's state is the module's
        for node, child in saved:
            key = self._decode(node)
            if key in there:
                self._compare(child, there.pop(key), f"{path}.{key}", fixed, below)
            elif isinstance(state, list) and not strict and ".param_groups" not in path:
                self.fresh += [Fresh(path, reference) for reference in references(child)]  # lists of any length
            elif has_arrays(child) or fixed or (strict and not self._bare):
                name = f"{path}.{key}"
                self.problems.append(Problem("unexpected", name, f"{name}: was saved, there is no place for it"))
        for key, left in there.items():
            found = [f"{path}.{key}"] if strict else _arrays_in(left, f"{path}.{key}") if self._complete else ()
            self.problems += [Problem("missing", name, f"{name}: is there, was not saved") for name in found]

    def _value(self, tree: Any, state: Any, path: str, fixed: bool, strict: bool) -> None:
        is_array = described(state) is not None
        if strict and (is_array or next(_arrays_in(state, path), None) is not None):
            self._mismatch(path, f"no array was saved, there is a {type(state).__name__}")
        elif self._in_place and fixed and (is_array or self._decode(tree) != state):
            self._mismatch(path, f"{state!r:.50} is in a tuple, which cannot be changed; use a list")

    def _key(self, tree: dict[str, Any], target: object, path: str) -> None:
        if not _is_key(target):
            self._mismatch(path, f"a key of JAX was saved, there is a {type(target).__name__}")
        elif list(target.shape) != tree["data"]["shape"][:-1]:  # type: ignore[attr-defined]
            shape = list(target.shape)  # type: ignore[attr-defined]
            self._mismatch(path, f"keys of shape {tree['data']['shape'][:-1]} were saved, there are {shape}")
        self.fresh += [Fresh(path, node) for node in references(tree)]

    def _raw_key(self, tree: dict[str, Any], target: object, path: str) -> None:
        """Make a key of data that was saved without its kind, as by another framework: this one's node becomes it."""
        from jax import random  # its own key is here, so it is loaded

        data: Any = random.key_data(target)  # type: ignore[arg-type]
        node = {**tree, "kind": "jax"}
        if (str(data.dtype), list(data.shape)) != (tree["dtype"], list(tree["shape"])):
            saved = f"{tree['dtype']}{list(tree['shape'])}"
            self._mismatch(path, f"{saved} was saved, there is a key of {data.dtype}{list(data.shape)}")
        tree.clear()
        tree.update({"$key": str(random.key_impl(target)), "data": node})  # type: ignore[arg-type]
        self.fresh.append(Fresh(path, node))

    def _array(self, tree: dict[str, Any], target: object, path: str, fixed: bool) -> None:
        found = described(target)
        saved = f"{tree['dtype']}{list(tree['shape'])}"
        if found is None and _is_key(target) and "$array" in tree:
            self._raw_key(tree, target, path)
        elif found is None:
            self._mismatch(path, f"{saved} was saved, there is a {type(target).__name__}")
        elif (found.dtype, list(found.shape)) != (tree["dtype"], list(tree["shape"])):
            self._mismatch(path, f"{saved} was saved, there is {found.dtype}{list(found.shape)}")
        elif found.kind in _VALUES or (found.kind.startswith("memoryview") and found.data.readonly):
            for node in (tree, *references(tree)):
                node["kind"] = found.kind  # of the library of the target, not of the one that wrote it
            device = target.sharding if getattr(target, "committed", False) else None  # type: ignore[attr-defined]
            self.fresh += [Fresh(path, node, device) for node in references(tree)]
            if fixed and self._in_place:
                self._mismatch(path, "cannot be changed, and is in a tuple, which cannot either; use a list")
        elif not getattr(getattr(target, "flags", None), "writeable", True):
            self._mismatch(path, "is read-only")
        elif isinstance(found.identity, Layout) and overlaps_itself(found.identity):
            self._mismatch(path, "several of its elements are one place in memory, as after expand()")
        else:
            self.filled.append(Filled(path, tree, target, _own_memory(found)))
            place = place_of(found, tree, path)
            self._memory += [] if place is None else [place]

    def kept(self) -> set[str]:
        """Return the paths where what is there stays, when what does not fit is left out.

        An optimizer's parts belong together: where one does not fit, all of it stays.
        """
        together = [f"{found.path}." for found in self.objects.values() if not found.adapter.complete(found.target)]
        kept = set()
        for problem in self.problems:
            whole = next((path for path in together if problem.path.startswith(path)), None)
            if whole is not None:
                kept.add(whole[:-1])
            elif problem.kind != "missing":
                kept.add(problem.path)
        return kept

    def drop(self, paths: set[str]) -> None:
        """Forget the arrays and opaque objects at and below some paths."""
        below = tuple(f"{path}." for path in paths)

        def stays(path: str) -> bool:
            return path not in paths and not path.startswith(below)

        self.filled = [filled for filled in self.filled if stays(filled.path)]
        self.fresh = [fresh for fresh in self.fresh if stays(fresh.path)]
        self.objects = {
            key: found for key, found in self.objects.items() if not found.adapter.opaque or stays(found.path)
        }

    def opaque(self) -> list[Fresh]:
        """Return the arrays of opaque objects."""
        paths = {found.path for found in self.objects.values() if found.adapter.opaque}
        return [fresh for fresh in self.fresh if fresh.path in paths]

    def find_shared(self) -> None:
        """Refuse targets that share memory otherwise than what goes there did when it was saved."""
        self.problems += [Problem("mismatched", path, text) for path, text in shared(self._memory)]


def _plain(state: object) -> bool:
    """Whether this is an array or a value of JSON, as most leaves are: nothing to take apart."""
    return (
        isinstance(state, (str, int, float, bytes, type(None)))
        or type(state) in (dict, list, tuple)
        or (adapter_for(type(state)) is not None and described(state) is not None)
    )


def _is_key(value: object) -> bool:
    return type(value).__name__ == "PRNGKeyArray"


def _items(tree: Any, state: Any) -> dict[Any, Any]:
    """Return the children of a container that is there, by the keys that the tree of the saved one has."""
    if isinstance(state, Mapping):
        return dict(state)
    if isinstance(tree, dict) and "fields" in tree and hasattr(state, "_fields"):
        return dict(zip(state._fields, state))
    if isinstance(tree, dict) and "fields" in tree and len(state) == len(tree["fields"]):
        return dict(zip(tree["fields"], state))
    return dict(enumerate(state))


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, list) or (isinstance(tree, dict) and "$tuple" in tree)


def _kind_of(tree: Any) -> str:
    if children(tree) is None:
        return "a value"
    what = "list" if _is_sequence(tree) else "dict"
    return f"a {what} of arrays" if has_arrays(tree) else f"a {what}"


def described(value: object) -> HostArray | None:
    """Return what an array is, without its data; None for anything else, and for an array that cannot be saved."""
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


def has_arrays(tree: Any) -> bool:
    """Whether a tree refers to stored arrays."""
    return next(references(tree), None) is not None


def _arrays_in(state: Any, path: str) -> Iterator[str]:
    if isinstance(state, Mapping):
        for key, item in state.items():
            yield from _arrays_in(item, f"{path}.{key}")
    elif isinstance(state, (list, tuple)):
        for i, item in enumerate(state):
            yield from _arrays_in(item, f"{path}.{i}")
    elif not isinstance(state, (str, bytes)) and described(state) is not None:
        yield path
