"""How a checkpoint's trees fit objects that exist: what goes where, and what does not fit. No object is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NamedTuple

from model_checkpoint.arrays import HostArray, Layout, adapter_for
from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits, find
from model_checkpoint.checkpoint.places import Place, overlaps_itself, own_memory, place_of, shared
from model_checkpoint.checkpoint.renaming import Keys, name_of, rename_keys
from model_checkpoint.checkpoint.selection import children, has_arrays, references
from model_checkpoint.errors import Problem

_VALUES = ("bytes", "numpy.scalar", "jax", "tensorflow")  # kinds of arrays that nobody can change
_FROZEN = "lies in what cannot be changed, such as a tuple; use a list or a dict, or restore()"
KEPT: dict[str, Any] = {"$array": "", "of": "", "dtype": "", "shape": []}  # in a tree: what is there stays


class Filled(NamedTuple):
    """An array to fill.

    Attributes:
        path: the keys that lead to it.
        node: what the checkpoint's tree says of it.
        target: the array that exists.
        memory: the target's own memory, flat, where that is in host memory and C order; else None.
    """

    path: Keys
    node: dict[str, Any]
    target: object
    memory: memoryview | None


class Fresh(NamedTuple):
    """An array to make anew: there is none yet, as in a new optimizer, or it cannot be changed.

    Attributes:
        path: the keys that lead to it, or to what it lies in.
        node: what the checkpoint's tree says of it.
        device: where to put it (a JAX sharding), None for host memory.
    """

    path: Keys
    node: dict[str, Any]
    device: object = None


class Found(NamedTuple):
    """An object that is taken apart.

    Attributes:
        target: the object.
        adapter, traits: of its library, and what that says of it.
        state: what its adapter says its state is; of an opaque one, the saved one's tree.
        path: the keys that lead to it.
    """

    target: object
    adapter: ObjectAdapter
    traits: Traits
    state: object
    path: Keys


class Misfit(NamedTuple):
    """A place that does not fit.

    Attributes:
        at: the keys that lead to what stays as it is, should the rest be restored.
        problem: what is told of it.
    """

    at: Keys
    problem: Problem


class _At(NamedTuple):
    """Where a comparison is, and what holds there.

    Attributes:
        path: the keys that lead there.
        fixed: whether it cannot be replaced: it is the target itself, or lies in tuples and the like only.
        strict: whether every key must be on both sides; otherwise only those of arrays.
        bare: whether it lies in dicts, lists and tuples of the user's own, and in no object.
        complete: whether the object that it lies in has the same keys at all times.
        grows: whether arrays may be of other shapes than before, or be none, because the object takes what it is given.
    """

    path: Keys
    fixed: bool = True
    strict: bool = True
    bare: bool = True
    complete: bool = True
    grows: bool = False


class Match:
    """Compares the trees of a checkpoint with the state that exists. Trees are changed to have the forms of targets.

    Args:
        decode: makes an object of a part of a tree that has no arrays.
        in_place: whether what cannot be changed, such as what lies in a tuple, is a problem; else it is made anew.

    Attributes:
        filled: the saved arrays that have a counterpart, with it.
        fresh: those that are made anew.
        objects: id of an object -> how it is taken apart.
        renamed: paths of saved arrays that are called otherwise in what exists -> what they are called there.
        misfits: what does not fit.
        again: keys that lead to an object which is restored elsewhere.
    """

    def __init__(self, decode: Callable[[Any], Any], in_place: bool) -> None:
        self._decode = decode
        self._in_place = in_place
        self.filled: list[Filled] = []
        self.fresh: list[Fresh] = []
        self.objects: dict[int, Found] = {}
        self.renamed: dict[str, str] = {}
        self.misfits: list[Misfit] = []
        self.again: set[Keys] = set()
        self._memory: list[Place] = []
        # Id of what can be changed -> where it was met, and what goes there.
        self._seen: dict[int, tuple[Keys, object]] = {}

    def compare_part(self, tree: Any, target: object, name: str) -> None:
        """Note how a component's tree fits an object, or nested dicts, lists and tuples of objects and arrays."""
        at = _At((name,))
        if isinstance(target, type):
            self._mismatch(at, f"{target.__name__} is a class; pass an object of it")
        elif find(target) is None and not isinstance(target, (Mapping, list, tuple)) and self._in_place:
            self._mismatch(at, f"a {type(target).__name__} cannot be filled; pass it within a dict or list")
        else:
            self._compare(tree, target, at)

    def miss(self, at: Keys, path: Keys, text: str = "is there, was not saved") -> None:
        """Note that nothing was saved for ``path``, which lies at or below ``at``."""
        self.misfits.append(Misfit(at, Problem("missing", name_of(path), f"{name_of(path)}: {text}")))

    def _mismatch(self, at: _At, text: str) -> None:
        name = name_of(at.path)
        self.misfits.append(Misfit(at.path, Problem("mismatched", name, f"{name}: {text}")))

    def _anew(self, tree: Any, at: _At) -> None:
        self.fresh += [Fresh(at.path, node) for node in references(tree)]

    def _compare(self, tree: Any, state: Any, at: _At) -> None:
        saved = children(tree)
        adapter = None if _plain(state) else find(state)
        if adapter is not None:
            self._object(tree, state, adapter, at)
        elif isinstance(tree, dict) and ("$array" in tree or "$view" in tree):
            self._array(tree, state, at)
        elif isinstance(tree, dict) and "$key" in tree:
            self._key(tree, state, at)
        elif saved is None:
            self._value(tree, state, at)
        elif isinstance(state, (Mapping, list, tuple)) and not state and len(at.path) > 1 and not (at.fixed and saved):
            self._anew(tree, at)
        elif not isinstance(state, (Mapping, list, tuple)) or _is_sequence(tree) != isinstance(state, (list, tuple)):
            if at.grows:
                self._anew(tree, at)
            elif at.strict or has_arrays(tree):
                self._mismatch(at, f"{_kind_of(tree)} was saved, there is a {type(state).__name__}")
        elif not (at.bare and isinstance(state, (MutableMapping, list)) and self._twice(tree, state, at)):
            self._container(tree, saved, state, at)

    def _twice(self, tree: Any, target: object, at: _At) -> bool:
        """Whether the target was met before; a problem where something else goes there."""
        goes = tree["$array"] if "$array" in tree else [node["$array"] for node in references(tree)]
        first, before = self._seen.setdefault(id(target), (at.path, goes))
        if first == at.path:
            return False
        self.again.add(at.path)
        if before != goes:
            self._mismatch(at, f"is the very object that is {name_of(first)}, and something else was saved there")
        return True

    def _object(self, tree: Any, target: object, adapter: ObjectAdapter, at: _At) -> None:
        traits = adapter.traits(target)
        if traits.setter is not None and not callable(getattr(target, traits.setter, None)):
            self._mismatch(at, f"{type(target).__name__} has state_dict() and no {traits.setter}()")
            return
        if traits.opaque:
            self.objects[id(target)] = Found(target, adapter, traits, tree, at.path)
            saved = tree.get("class") if isinstance(tree, dict) else None
            if traits.kind not in (None, saved):
                self._mismatch(at, f"{f'a {saved}' if saved else _kind_of(tree)} was saved, there is a {traits.kind}")
            self._anew(tree, at)
            return
        try:
            state: Any = adapter.state_of(target)
        except Exception as error:  # noqa: BLE001 - it is the user's object: whatever it raises is no damage of a file
            self._mismatch(at, str(error) if type(error) is ValueError else f"its state cannot be had: {error!r}")
            return
        self.objects[id(target)] = Found(target, adapter, traits, state, at.path)
        if isinstance(state, (Mapping, list, tuple)) and not _takes(state, tree):
            empty = "nothing" if children(tree) == [] else _kind_of(tree)
            self._mismatch(at, f"{empty} was saved, there is a {type(target).__name__}")
            return
        self._rename(tree, state, traits.plain_name, at)
        objection = adapter.objection(target, tree)
        if objection is not None:
            self._mismatch(at, objection)
            return
        # Optimizers and schedulers have keys that come and go; load_state_dict() knows them.
        strict = traits.complete or at.path == ("model",)
        fixed = at.fixed and traits.replaces
        self._compare(tree, state, _At(at.path, fixed, strict, bare=False, complete=strict, grows=traits.grows))

    def _rename(self, tree: Any, state: Any, plain_name: Callable[[str], str], at: _At) -> None:
        """Give the keys of an object's tree the names that its state has, where they were saved within a wrapper."""
        if not isinstance(state, Mapping):
            return
        saved = {key for key, _ in children(tree) or () if isinstance(key, str)}
        plain = {key: plain_name(key) for key in saved if key not in state}
        names = {old: new for old, new in plain.items() if new in state and new not in saved}
        rename_keys(tree, names)
        self.renamed |= {name_of((*at.path, old)): name_of((*at.path, new)) for old, new in names.items()}

    def _container(self, tree: Any, saved: list[tuple[Any, Any]], state: Any, at: _At) -> None:
        there = _items(tree, state)
        groups = "param_groups" in at.path
        if groups and len(saved) != len(there) and isinstance(state, list):
            self._mismatch(at, f"{len(saved)} were saved, there are {len(there)}")
        replaceable = at.bare and isinstance(state, (MutableMapping, MutableSequence))
        at = at._replace(fixed=at.fixed and not replaceable)
        below = at._replace(strict=at.strict and at.bare)  # what lies deeper in a module's state is the module's
        for node, child in saved:
            key = self._decode(node)
            inner = below._replace(path=(*at.path, key), grows=at.grows or str(key).endswith("_extra_state"))
            if key in there:
                self._compare(child, there.pop(key), inner)
            elif at.grows or (isinstance(state, list) and not at.strict and not groups):
                self._anew(child, inner)  # lists of any length
            elif has_arrays(child) or at.fixed or (at.strict and not at.bare) or hasattr(state, "_fields"):
                name = name_of(inner.path)
                problem = Problem("unexpected", name, f"{name}: was saved, there is no place for it")
                self.misfits.append(Misfit(inner.path, problem))
        for key, left in there.items():
            path = (*at.path, key)
            for missing in [path] if at.strict else _arrays_in(left, path) if at.complete else ():
                self.miss(path, missing)
        if isinstance(tree, dict) and "fields" in tree and hasattr(state, "_fields"):  # in the order of the target's
            by_name = dict(zip(tree["fields"], tree["$tuple"]))
            tree["$tuple"] = [by_name.get(name, KEPT) for name in state._fields]
            tree["fields"] = list(state._fields)

    def _value(self, tree: Any, state: Any, at: _At) -> None:
        is_array = described(state) is not None
        if at.strict and (is_array or next(_arrays_in(state, at.path), None) is not None):
            self._mismatch(at, f"no array was saved, there is a {type(state).__name__}")
        elif self._in_place and at.fixed and (is_array or self._decode(tree) != state):
            self._mismatch(at, f"{state!r:.50} {_FROZEN}")

    def _key(self, tree: dict[str, Any], target: Any, at: _At) -> None:
        data = tree["data"]
        if not _is_key(target):
            self._mismatch(at, f"a key of JAX was saved, there is a {type(target).__name__}")
            return
        from jax import random  # its own key is here, so it is loaded

        own = f"{random.key_impl(target)}{list(target.shape)}"
        if f"{tree['$key']}{data['shape'][:-1]}" != own:
            self._mismatch(at, f"keys {tree['$key']}{data['shape'][:-1]} were saved, there are {own}")
        elif self._in_place and at.fixed:
            self._mismatch(at, _FROZEN)
        data["kind"] = "jax"
        self._anew(tree, at)

    def _array(self, tree: dict[str, Any], target: object, at: _At) -> None:
        found, advice = _looked_at(target)
        saved = f"{tree['dtype']}{list(tree['shape'])}"
        if found is None and _is_key(target) and "$array" in tree and not at.grows:
            self._raw_key(tree, target, at)
        elif found is None and not at.grows and not (type(target) in (int, float) and tree["shape"] == []):
            self._mismatch(at, f"{saved} was saved, there is a {type(target).__name__}{advice}")
        elif found is None:
            self._anew(tree, at)
        elif found.kind == tree["kind"] == "bytes":
            self._replaced(tree, target, found.kind, at)  # a value, of any length
        elif (found.dtype, list(found.shape)) != (tree["dtype"], list(tree["shape"])):
            if at.grows:
                self._anew(tree, at)
            else:
                self._mismatch(at, f"{saved} was saved, there is {found.dtype}{list(found.shape)}")
        elif found.kind in _VALUES or (found.kind.startswith("memoryview") and found.data.readonly):
            self._replaced(tree, target, found.kind, at)
        elif not getattr(getattr(target, "flags", None), "writeable", True):
            self._mismatch(at, "is read-only")
        elif isinstance(found.identity, Layout) and overlaps_itself(found.identity):
            self._mismatch(at, "several of its elements are one place in memory, as after expand()")
        else:
            tree["as"] = f"filled {len(self.filled)}"
            self.filled.append(Filled(at.path, tree, target, own_memory(found)))
            place = place_of(found, tree, name_of(at.path))
            self._memory += [] if place is None else [place]
            if place is None and "$array" in tree:
                self._twice(tree, target, at)

    def _replaced(self, tree: dict[str, Any], target: Any, kind: str, at: _At) -> None:
        """Note that an array is made anew, in the library and on the devices of what is there."""
        device = target.sharding if getattr(target, "committed", False) else None
        for node in (tree, *references(tree)):
            node |= {"kind": kind, "as": f"{kind} {'' if device is None else id(device)}"}
        self.fresh += [Fresh(at.path, node, device) for node in references(tree)]
        if at.fixed and self._in_place:
            self._mismatch(at, f"cannot be changed, and {_FROZEN}")

    def _raw_key(self, tree: dict[str, Any], target: Any, at: _At) -> None:
        """Make a key of data that was saved without its kind, as by another framework: this one's node becomes it."""
        from jax import random  # its own key is here, so it is loaded

        own, node = random.key_data(target), {**tree, "kind": "jax"}
        if (str(own.dtype), list(own.shape)) != (tree["dtype"], list(tree["shape"])):
            saved = f"{tree['dtype']}{list(tree['shape'])}"
            self._mismatch(at, f"{saved} was saved, there is a key of {own.dtype}{list(own.shape)}")
        tree.clear()
        tree.update({"$key": str(random.key_impl(target)), "data": node})
        self.fresh.append(Fresh(at.path, node))

    def find_shared(self) -> None:
        """Refuse targets that share memory otherwise than what goes there did when it was saved."""
        paths = {name_of(filled.path): filled.path for filled in self.filled}
        for name, text in shared(self._memory):
            self.misfits.append(Misfit(paths[name], Problem("mismatched", name, text)))


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
    fields = tree.get("fields", ()) if isinstance(tree, dict) else ()
    if fields and (hasattr(state, "_fields") or len(state) == len(fields)):
        return dict(zip(getattr(state, "_fields", None) or fields, state))
    return dict(enumerate(state))


def _takes(state: Any, tree: Any) -> bool:
    """Whether an object with this state can be asked what it makes of the saved one."""
    if children(tree) is None or (state and not children(tree)):
        return False
    return _is_sequence(tree) == isinstance(state, (list, tuple))


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, list) or (isinstance(tree, dict) and "$tuple" in tree)


def _kind_of(tree: Any) -> str:
    if children(tree) is None:
        return "a value"
    what = "list" if _is_sequence(tree) else "dict"
    return f"a {what} of arrays" if has_arrays(tree) else f"a {what}"


def described(value: object) -> HostArray | None:
    """Return what an array is, without its data; None for anything else, and for an array that cannot be saved."""
    return _looked_at(value)[0]


def _looked_at(value: object) -> tuple[HostArray | None, str]:
    adapter = adapter_for(type(value))
    try:
        return None if adapter is None else adapter.describe(value), ""
    except ValueError as error:
        return None, f": {error}"  # an array that cannot be saved, so it was not


def _arrays_in(state: Any, path: Keys) -> Iterator[Keys]:
    if isinstance(state, Mapping):
        for key, item in state.items():
            yield from _arrays_in(item, (*path, key))
    elif isinstance(state, (list, tuple)):
        for i, item in enumerate(state):
            yield from _arrays_in(item, (*path, i))
    elif not isinstance(state, (str, bytes)) and described(state) is not None:
        yield path
