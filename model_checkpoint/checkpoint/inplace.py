"""Putting a checkpoint into objects that exist: all is compared and verified first, then filled from the files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.arrays import HostArray, adapter_for, fill, touched
from model_checkpoint.checkpoint.decoding import Decoder
from model_checkpoint.checkpoint.matching import KEPT, Filled, Found, Fresh, Match, Misfit
from model_checkpoint.checkpoint.reader import CheckpointReader, not_stored, span
from model_checkpoint.checkpoint.renaming import Keys, Rules, name_of, rename
from model_checkpoint.checkpoint.selection import children
from model_checkpoint.errors import Problem, RestoreFailedError, StateMismatchError
from model_checkpoint.integrity.reading import FileReader
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

Key = tuple[str, str]  # component and name of a stored array
Inside = dict[Keys, dict[Any, None]]
_STAYS = object()  # what KEPT decodes to


class Restored(NamedTuple):
    """What became of the objects.

    Attributes:
        objects: component -> the object that was given, or what was made in its place.
        problems: what did not fit, and was left as it is.
        renamed: old -> new name of arrays.
    """

    objects: dict[str, object]
    problems: list[Problem]
    renamed: dict[str, str]


def put_into(
    reader: CheckpointReader,
    targets: Mapping[str, object],
    threads: int,
    *,
    in_place: bool,
    lenient: bool = False,
    rules: Rules = (),
) -> Restored:
    """Fill objects with a checkpoint. All is compared, and every byte verified, before the first of them is changed.

    Args:
        reader: the checkpoint.
        targets: component -> an object that ``objects`` knows, or nested dicts, lists and tuples of such and of arrays.
            Arrays in host memory in C order are read from the files straight into their place, others one by one by way
            of memory of their own. Then the object is given all of it, with the arrays that were filled.
        threads: how many read at once.
        in_place: whether what cannot be changed is a problem; else it is made anew, and is in what is returned only.
        lenient: whether to leave as it is what does not fit.
        rules: what to rename, see ``renaming``.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ, and it is not ``lenient``; nothing was changed.
        ConfigurationError: ``rules`` cannot be applied; nothing was changed.
        IntegrityError, MissingDependencyError, UnknownBackendError: as ``CheckpointReader.load``; nothing was changed.
    """
    decoder = Decoder(not_stored)
    with reader.decoding():
        tree = reader.tree()
        tree.pop("rng", None)  # random states are no objects' affair
        renamed = rename(tree, rules, targets, decoder.node)
        match = _compared(tree, targets, decoder, in_place)
    if match.misfits and not lenient:
        raise StateMismatchError([misfit.problem for misfit in match.misfits])
    with reader.decoding():
        reader.verify_all()
        opaque = [found for found in match.objects.values() if found.traits.opaque]
        early = {found.path for found in opaque}
        _fill(reader, [], [fresh for fresh in match.fresh if fresh.path in early], decoder, threads)
        match.misfits += _refused(opaque, [misfit.at for misfit in match.misfits], decoder)
    if match.misfits and not lenient:
        raise StateMismatchError([misfit.problem for misfit in match.misfits])
    stays = _staying(match)
    decoder.adopt(KEPT, _STAYS)
    with reader.decoding():
        inside: Inside = {}
        for place in stays:
            for length in range(1, len(place)):
                inside.setdefault(place[:length], {})[place[length]] = None
        tree = {name: _leave(tree.get(name, KEPT), (name,), stays, inside, decoder.node) for name in targets}
        filled = [each for each in match.filled if not _lies_in(each.path, stays)]
        fresh = [each for each in match.fresh if each.path not in early and not _lies_in(each.path, stays)]
        _fill(reader, filled, fresh, decoder, threads)
        made = {name: decoder.node(node) for name, node in tree.items()}
    putting = _Putting(match.objects, filled)
    objects = {name: putting.put(target, made[name]) for name, target in targets.items()}
    return Restored(objects, [misfit.problem for misfit in match.misfits], {**renamed, **match.renamed})


def _compared(tree: dict[str, Any], targets: Mapping[str, object], decoder: Decoder, in_place: bool) -> Match:
    match = Match(decoder.node, in_place)
    for name, target in targets.items():
        if name in tree:
            match.compare_part(tree[name], target, name)
        else:
            match.miss((name,), (name,), "nothing of it was saved")
    match.find_shared()
    return match


def _refused(opaque: Sequence[Found], misfits: Collection[Keys], decoder: Decoder) -> list[Misfit]:
    """Return what opaque objects say to the states that are for them."""
    refused = []
    for found in opaque:
        if found.path not in misfits:
            state, name = decoder.node(found.state), name_of(found.path)
            try:
                reason = found.adapter.refusal(found.target, state)
            except Exception as error:  # noqa: BLE001 - it is the user's object: no file is to blame
                reason = f"it cannot be asked whether it takes its state: {error!r}"
            refused += [] if reason is None else [Misfit(found.path, Problem("mismatched", name, f"{name}: {reason}"))]
    return refused


def _staying(match: Match) -> set[Keys]:
    """Return what stays as it is because it does not fit, or belongs together with something that does not fit."""
    together = [found.path for found in match.objects.values() if found.traits.together]
    stays = set(match.again)
    for misfit in match.misfits:
        around = [path for path in together if misfit.at[: len(path)] == path]
        if not around and misfit.at[0] in ("optimizer", "scheduler"):
            around = [misfit.at[:1]]  # of plain arrays
        stays.add(min(around, key=len, default=misfit.at))
    return stays


def _lies_in(path: Keys, places: Collection[Keys]) -> bool:
    return any(path[:length] in places for length in range(1, len(path) + 1))


def _leave(tree: Any, path: Keys, stays: Collection[Keys], inside: Inside, decode: Callable[[Any], Any]) -> Any:
    """Return ``tree`` with ``KEPT`` in the places of ``stays``, where nothing was saved, too.

    Args:
        path: the keys that lead to it.
        stays: the keys that lead to what stays.
        inside: keys that lead to what holds some of that -> the keys of those in it.
        decode: makes an object of a node, such as a key.
    """
    if path in stays:
        return KEPT
    pairs = children(tree)
    if pairs is None or path not in inside:
        return tree
    below = [(key, _leave(child, (*path, decode(key)), stays, inside, decode)) for key, child in pairs]
    known = {decode(key) for key, _ in pairs}
    new = [key for key in inside[path] if key not in known and (*path, key) in stays]
    if isinstance(tree, list):
        return [child for _, child in below] + [KEPT] * len(new)
    if "$tuple" in tree:
        return {**tree, "$tuple": [child for _, child in below] + [KEPT] * len(new)}
    tag = next((tag for tag in ("$dict", "$ordered") if tag in tree), None)
    if tag is None and all(isinstance(key, str) and not key.startswith("$") for key in new):
        return {**dict(below), **dict.fromkeys(new, KEPT)}
    added = [[{"$tuple": list(key)} if isinstance(key, tuple) else key, KEPT] for key in new]
    return {**(tree if tag else {}), tag or "$dict": [[key, child] for key, child in below] + added}


def _fill(
    reader: CheckpointReader, to_fill: list[Filled], to_make: list[Fresh], decoder: Decoder, threads: int
) -> None:
    """Read the stored arrays that are wanted, each once, into all places that want it."""
    filled: dict[Key, list[Filled]] = {}
    fresh: dict[Key, dict[object, Fresh]] = {}
    nodes: dict[Key, dict[str, Any]] = {}
    for each in to_make:
        key = (each.node["of"], each.node["$array"])
        nodes[key] = each.node
        fresh.setdefault(key, {})[each.node.get("as")] = each
    for target in to_fill:
        node = target.node if "$array" in target.node else target.node["base"]
        key = (node["of"], node["$array"])
        nodes[key] = node
        if "$array" in target.node:
            filled.setdefault(key, []).append(target)
        else:
            fresh.setdefault(key, {}).setdefault(node.get("as"), Fresh(target.path, node))
    with ExitStack() as stack:
        if not reader.verified:
            for _ in reader.located(nodes, stack):
                pass  # a file that is missing, or whose head is damaged, is found before anything is changed
        for file, arrays in reader.located(nodes, stack):
            parallel: list[partial[None]] = []
            alone: list[partial[None]] = []  # on the caller's own stream of the device
            for component, name in nodes:
                if name in arrays.get(component, {}):
                    targets = filled.get((component, name), [])
                    anew = list(fresh.get((component, name), {}).values())
                    put = partial(_put, file, arrays[component][name], targets, anew, decoder)
                    (parallel if all(each.memory is not None for each in targets) else alone).append(put)
            run(parallel, threads)
            for put in alone:
                put()
    for target in to_fill:
        if "$view" in target.node:  # arrays that overlapped were stored as one
            view = decoder.node(target.node)
            adapter = adapter_for(type(view))
            host = None if adapter is None else adapter.to_host(view)
            fill(target.target, host or not_stored(target.node["of"], target.node["$view"]))


def _put(
    file: FileReader | None, stored: HostArray, targets: list[Filled], anew: list[Fresh], decoder: Decoder
) -> None:
    """Bring one stored array to its targets, and into memory of its own for those that are made anew."""
    begin, end = (0, stored.data.nbytes) if file is None else span(file, stored)
    copy: HostArray | None = stored if file is None else None
    for filled in targets:
        node = filled.node
        if file is not None and filled.memory is not None and filled.memory.nbytes == end - begin:
            touched(filled.target)  # first: a read that fails may have changed a part
            file.read_into(begin, filled.memory)
        else:
            if copy is None and file is not None:
                copy = stored._replace(data=_read(file, begin, end))
            dtype, shape = node["dtype"], tuple(node["shape"])
            fill(filled.target, (copy or stored)._replace(dtype=dtype, shape=shape, kind=node["kind"]))
        decoder.adopt(node, filled.target)
    for fresh in anew:
        own = stored if file is None else stored._replace(data=_read(file, begin, end))
        decoder.place(fresh.node, own, fresh.device)


def _read(file: FileReader, begin: int, end: int) -> memoryview:
    memory = fresh_memory(end - begin)
    file.read_into(begin, memory)
    return memory


class _Putting:
    """Gives objects what was loaded, from the outside in.

    Args:
        objects: how each is taken apart, by its id.
        filled: the arrays that have their values already.
    """

    def __init__(self, objects: Mapping[int, Found], filled: Sequence[Filled]) -> None:
        self._objects = objects
        self._filled = {id(each.target) for each in filled}

    def put(self, there: Any, made: Any) -> Any:
        """Return ``there`` with the values of ``made``, or where it cannot be changed what takes its place.

        In ``made`` there may be others in the place of arrays that were filled: one for several that were saved as one.
        """
        if made is _STAYS or id(there) in self._filled:
            return there
        found = self._objects.get(id(there))
        if found is not None:
            state = made if found.traits.opaque else self._state(found.state, made)
            try:
                return found.adapter.put_back(there, state)
            except Exception as error:
                raise RestoreFailedError(name_of(found.path), there, error) from error
        if isinstance(there, MutableMapping) and isinstance(made, Mapping):
            for key, value in made.items():
                if key in there:
                    there[key] = self.put(there[key], value)
                elif value is not _STAYS:
                    there[key] = value
            return there
        if isinstance(there, MutableSequence) and isinstance(made, list):
            there[:] = _joined(there, made, self.put)
            return there
        if isinstance(there, tuple) and isinstance(made, tuple):
            return _like(there, _joined(there, made, self.put))
        return self._state(there, made)

    def _state(self, there: Any, made: Any) -> Any:
        """Return ``made`` in the form of ``there``, of which nothing is changed but the objects that lie in it."""
        if isinstance(there, Mapping) and isinstance(made, MutableMapping):
            for key, value in list(made.items()):
                made[key] = self._inner(there[key], value) if key in there else value
                if made[key] is _STAYS:
                    del made[key]
        elif isinstance(there, (list, tuple)) and isinstance(made, list):
            return _joined(there, made, self._inner)
        elif isinstance(there, (list, tuple)) and isinstance(made, tuple):
            return _like(there, _joined(there, made, self._inner))
        elif type(there).__name__ == "PRNGKeyArray" and getattr(there, "committed", False):
            return _beside(there, made)
        return made

    def _inner(self, there: Any, made: Any) -> Any:
        known = made is _STAYS or id(there) in self._filled or id(there) in self._objects
        return self.put(there, made) if known else self._state(there, made)


def _beside(there: Any, made: Any) -> Any:
    """Return a key of JAX on the devices of another one."""
    import jax  # its own key is here, so it is loaded

    return jax.device_put(made, there.sharding)


def _joined(there: Sequence[Any], made: Sequence[Any], join: Callable[[Any, Any], Any]) -> list[Any]:
    joined = [join(old, value) for old, value in zip(there, made)]
    return joined + [value for value in made[len(there) :] if value is not _STAYS]


def _like(there: Any, items: list[Any]) -> Any:
    """Return ``items`` as a tuple of the class of ``there``, which itself is returned where they are its own."""
    if len(items) == len(there) and all(old is new for old, new in zip(there, items)):
        return there
    return there._make(items) if hasattr(there, "_make") else tuple(items)
