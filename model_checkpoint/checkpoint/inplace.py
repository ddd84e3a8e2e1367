"""Putting a checkpoint into objects that exist: all is compared and verified first, then filled from the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from model_checkpoint.arrays import HostArray, adapter_for, fill, touched
from model_checkpoint.checkpoint.decoding import Decoder
from model_checkpoint.checkpoint.matching import Filled, Fresh, Match
from model_checkpoint.checkpoint.reader import CheckpointReader, not_stored, span
from model_checkpoint.checkpoint.renaming import Rules, rename
from model_checkpoint.checkpoint.selection import children, key_text
from model_checkpoint.errors import Problem, StateMismatchError
from model_checkpoint.integrity.reading import FileReader
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

Key = tuple[str, str]  # component and name of a stored array
_KEPT = object()  # stands in a decoded state where what is there stays


def put_into(
    reader: CheckpointReader,
    targets: Mapping[str, object],
    threads: int,
    *,
    in_place: bool,
    lenient: bool = False,
    rules: Rules = (),
) -> tuple[dict[str, object], list[Problem], dict[str, str]]:
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

    Returns:
        Component -> the object, or what was made in its place; what does not fit; and what was renamed.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ, and it is not ``lenient``; nothing was changed.
        ConfigurationError: ``rules`` cannot be applied; nothing was changed.
        IntegrityError, MissingDependencyError, UnknownBackendError: as ``CheckpointReader.load``; nothing was changed.
    """
    with reader.decoding():
        tree = reader.tree()
        tree.pop("rng", None)  # random states are no objects' affair
    renamed = rename(tree, rules)
    with reader.decoding():
        decoder = Decoder(not_stored)
        match = Match(decoder.node, in_place)
        for name, target in targets.items():
            if name in tree:
                match.compare_part(tree[name], target, name)
            else:
                match.problems.append(Problem("missing", name, f"{name}: nothing of it was saved"))
        match.find_shared()
    if match.problems and not lenient:
        raise StateMismatchError(match.problems)
    kept = match.kept()
    tree = {name: _without(tree[name], name, kept, decoder) for name in targets if name in tree}
    match.drop(kept)
    with reader.decoding():
        reader.verify_all()
        _fill(reader, [], match.opaque(), decoder, threads)
    refused = _refused(match, decoder)
    if refused:
        raise StateMismatchError([*match.problems, *refused])
    with reader.decoding():
        _fill(reader, match.filled, match.fresh, decoder, threads)
        made = {name: decoder.node(node) for name, node in tree.items()}
    putting = _Putting(match, lenient)
    return (
        {name: putting.put(target, made.get(name, _KEPT)) for name, target in targets.items()},
        match.problems,
        {**renamed, **match.renamed},
    )


def _refused(match: Match, decoder: Decoder) -> list[Problem]:
    """Return what opaque objects say to the states that are for them."""
    refused = []
    for found in match.objects.values():
        if found.adapter.opaque:
            reason = found.adapter.refusal(found.target, decoder.node(found.state))
            refused += [] if reason is None else [Problem("mismatched", found.path, f"{found.path}: {reason}")]
    return refused


def _fill(
    reader: CheckpointReader, to_fill: list[Filled], to_make: list[Fresh], decoder: Decoder, threads: int
) -> None:
    wanted: dict[Key, list[Filled]] = {}
    nodes: dict[Key, dict[str, Any]] = {}
    devices: dict[Key, object] = {}
    for fresh in to_make:
        key = (fresh.node["of"], fresh.node["$array"])
        nodes[key], devices[key] = fresh.node, fresh.device
    for filled in to_fill:
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
            for (component, name), node in nodes.items():
                if name in arrays.get(component, {}):
                    targets = wanted.get((component, name), [])
                    own = all(filled.memory is not None for filled in targets)
                    place = partial(decoder.place, device=devices.get((component, name)))
                    put = partial(_put, file, arrays[component][name], node, targets, decoder.adopt, place)
                    (parallel if own else alone).append(put)
            run(parallel, threads)
            for put in alone:
                put()
    for filled in to_fill:
        if "$view" in filled.node:  # arrays that overlapped were stored as one
            view = decoder.node(filled.node)
            adapter = adapter_for(type(view))
            host = None if adapter is None else adapter.to_host(view)
            fill(filled.target, host or not_stored(filled.node["of"], filled.node["$view"]))


def _put(
    file: FileReader | None,
    stored: HostArray,
    node: dict[str, Any],
    targets: list[Filled],
    adopt: Callable[[dict[str, Any], object], None],
    place: Callable[[dict[str, Any], HostArray], None],
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
        adopt(node, targets[-1].target)
    else:
        place(node, stored if file is None else stored._replace(data=_read(file, begin, end)))


def _read(file: FileReader, begin: int, end: int) -> memoryview:
    memory = fresh_memory(end - begin)
    file.read_into(begin, memory)
    return memory


def _without(tree: Any, path: str, kept: set[str], decoder: Decoder) -> Any:
    """Return ``tree`` with what decodes to ``_KEPT`` in some places."""
    if path in kept:
        marker = {"$array": path, "of": "", "dtype": "", "shape": []}
        decoder.adopt(marker, _KEPT)
        return marker
    pairs = children(tree)
    if not kept or pairs is None:
        return tree
    below = [(key, _without(child, f"{path}.{key_text(key)}", kept, decoder)) for key, child in pairs]
    if isinstance(tree, list):
        return [child for _, child in below]
    tag = next((tag for tag in ("$tuple", "$dict", "$ordered") if tag in tree), None)
    if tag is None:
        return dict(below)
    return {**tree, tag: [child for _, child in below] if tag == "$tuple" else [[key, child] for key, child in below]}


class _Putting:
    """Gives objects what was loaded, from the outside in.

    Args:
        match: how it fits, after its arrays were filled.
        lenient: whether what was not saved stays as it is in objects.
    """

    def __init__(self, match: Match, lenient: bool) -> None:
        self._objects = match.objects
        self._filled = {id(filled.target) for filled in match.filled}
        self._lenient = lenient

    def put(self, there: Any, made: Any) -> Any:
        """Return ``there`` with the values of ``made``, or where it cannot be changed what takes its place.

        In ``made`` there may be others in the place of arrays that were filled: one for several that were saved as one.
        """
        if made is _KEPT or id(there) in self._filled:
            return there
        found = self._objects.get(id(there))
        if found is not None:
            return found.adapter.put_back(there, made if found.adapter.opaque else self._state(found.state, made))
        if isinstance(there, MutableMapping) and isinstance(made, Mapping):
            for key, value in made.items():
                if key in there:
                    there[key] = self.put(there[key], value)
                elif value is not _KEPT:
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
                if made[key] is _KEPT:
                    del made[key]
            for key in there if self._lenient else ():
                made.setdefault(key, there[key])
        elif isinstance(there, (list, tuple)) and isinstance(made, list):
            return _joined(there, made, self._inner)
        elif isinstance(there, (list, tuple)) and isinstance(made, tuple):
            return _like(there, _joined(there, made, self._inner))
        return made

    def _inner(self, there: Any, made: Any) -> Any:
        known = made is _KEPT or id(there) in self._filled or id(there) in self._objects
        return self.put(there, made) if known else self._state(there, made)


def _joined(there: Sequence[Any], made: Sequence[Any], join: Callable[[Any, Any], Any]) -> list[Any]:
    joined = [join(old, value) for old, value in zip(there, made)]
    return joined + [value for value in made[len(there) :] if value is not _KEPT]


def _like(there: Any, items: list[Any]) -> Any:
    """Return ``items`` as a tuple of the class of ``there``, which itself is returned where they are its own."""
    if len(items) == len(there) and all(old is new for old, new in zip(there, items)):
        return there
    return there._make(items) if hasattr(there, "_make") else tuple(items)
