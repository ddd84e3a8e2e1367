"""Comparing two checkpoints on disk, a piece at a time: what of their states, config and metrics differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.checkpoint.decoding import Decoder
from model_checkpoint.checkpoint.diff import CheckpointDiff, Form, TensorDiff, ValueDiff
from model_checkpoint.checkpoint.differences import Difference, difference
from model_checkpoint.checkpoint.pieces import SavedArray, StoredArrays, Tile, runs, saved_array, tiles
from model_checkpoint.checkpoint.reader import CheckpointReader, not_stored
from model_checkpoint.checkpoint.restoring import CheckpointRestoring
from model_checkpoint.checkpoint.selection import check_keys, children, key_text, references
from model_checkpoint.database.models import decode_details
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.integrity.manifest import FileEntry
from model_checkpoint.utils.optional import find
from model_checkpoint.utils.parallel import run

_PIECE = 1 << 20  # bytes of each side at once; a multiple of every element's size
_CODES: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # bytes of an element -> a code of that size
_BYTES = ("bytes", "bytearray")
_PROGRESS = ("epoch", "step", "loss", "val_loss")


class CheckpointComparison(CheckpointRestoring):
    """Comparing; ``EnhancedCheckpointManager`` sets it up."""

    def diff(self, before: str, after: str, *, keys: str | Collection[str] | None = None) -> CheckpointDiff:
        """Compare two checkpoints of this directory, without loading either: ``print`` what it returns.

        A few MiB of each are in memory at a time, however large an array is. Only compressed files, and those of the
        ``pytorch`` backend, are read whole, one of each checkpoint at a time. Files that have the same SHA-256 were
        saved with the same bytes and are not read, only looked for; whether they still have those bytes is
        ``verify_experiment_integrity``'s to tell. What is read is compared with its digests, as in loading, unless the
        manager was made with ``enable_integrity_checks=False``. No hook runs.

        Args:
            before, after: ids of the checkpoints.
            keys: patterns of the arrays and values to compare, as for ``load_checkpoint``; each must match something in
                one of the checkpoints. Config, metrics and the like are compared at any rate.

        Returns:
            What differs, and what is the same.

        Raises:
            CheckpointNotFoundError: there is none with one of the ids.
            IntegrityError: a file is missing, changed or cannot be decoded; the text names it.
            ConfigurationError: nothing matches ``keys``, or they are no patterns.
            SaveFailedError: an earlier save in the background failed.
            MissingDependencyError: a backend or compression needs a package.
            StorageError: the disk cannot read a file.
        """
        self._settle()
        patterns = check_keys(keys)
        first, second = self._record(before), self._record(after)

        def read_both(a: CheckpointReader) -> CheckpointDiff:
            return self._read(self._integrity, lambda b: compare(a, b, patterns), second)[1]

        return self._read(self._integrity, read_both, first)[1]


class _Side(NamedTuple):
    reader: CheckpointReader
    arrays: dict[str, SavedArray]  # by path
    values: dict[str, Any]  # path -> a node of the tree
    types: dict[str, list[Any]]  # path -> of what is no text or array in it: keys, and whether the array is bytes
    stored: StoredArrays


def compare(a: CheckpointReader, b: CheckpointReader, keys: Sequence[str] | None = None) -> CheckpointDiff:
    """Compare two checkpoints, which may be of different directories, as ``CheckpointComparison.diff`` describes.

    Args:
        a, b: readers of the first and the second; nobody may remove the files meanwhile.
        keys: patterns, or None to compare everything.

    Raises:
        IntegrityError, ConfigurationError, MissingDependencyError, UnknownBackendError, StorageError: see ``diff``.
    """
    with ExitStack() as stack:
        unused = set(keys or ())
        sides = [_side(reader, keys, unused, stack) for reader in (a, b)]
        if unused:
            known = sorted({path for side in sides for path in (*side.arrays, *side.values)})
            raise ConfigurationError(
                f"keys: nothing in either checkpoint matches {min(unused)!r}; they have {len(known)} that match others"
            )
        tensors = _compare_arrays(*sides)
    nodes = _differing(*(side.values for side in sides)) | _differing_types(*sides)
    random = {path.split(".")[1] for path in nodes if path.startswith("rng.")}
    told = [decode_details(reader.manifest.values) for reader in (a, b)]
    return CheckpointDiff(
        before=a.manifest.checkpoint_id,
        after=b.manifest.checkpoint_id,
        tensors=tensors,
        values={
            path: replace(found, before=_decoded(a, found.before), after=_decoded(b, found.after))
            for path, found in nodes.items()
            if not path.startswith("rng.")
        },
        random=tuple(sorted(random)),
        config=_differing_configs(*(values["config"] for values in told)),
        metrics=_differing(*(values["metrics"] for values in told)),
        progress=_differing(*({name: values[name] for name in _PROGRESS} for values in told)),
    )


def _side(reader: CheckpointReader, keys: Sequence[str] | None, unused: set[str], stack: ExitStack) -> _Side:
    side = _Side(reader, {}, {}, {}, StoredArrays(reader, stack))
    names: set[str] = set()

    def matches(path: str) -> bool:
        found = [pattern for pattern in keys or () if fnmatchcase(path, pattern)]
        unused.difference_update(found)
        return bool(found)

    with reader.decoding():
        for component, tree in reader.tree().items():
            for path, types, node in _leaves(tree, component, (), matches, keys is None):
                name = _numbered(path, names)
                names.add(name)
                if isinstance(node, dict) and ("$array" in node or "$view" in node):
                    side.arrays[name] = saved_array(node)
                    kind = node.get("base", node)["kind"]
                    types = (*types, kind) if kind in _BYTES else types
                else:
                    side.values[name] = node
                if types:
                    side.types[name] = [*types]
    return side


def _numbered(name: str, taken: Container[str]) -> str:
    """Return ``name``, or where that is taken, as in ``{"a.b": x, "a": {"b": y}}``, with a number behind it."""
    free, copies = name, 1
    while free in taken:
        copies += 1
        free = f"{name}#{copies}"
    return free


def _leaves(
    tree: Any, path: str, types: tuple[Any, ...], matches: Callable[[str], bool], taken: bool
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Yield of all that holds nothing else, and is within what ``matches`` or was ``taken``: path, types, node."""
    taken = matches(path) or taken
    if isinstance(tree, dict) and "$key" in tree:
        yield from _leaves(tree["$key"], f"{path}.impl", types, matches, taken)
        tree = tree["data"]
    pairs = children(tree)
    if pairs is None and isinstance(tree, dict) and tree.keys() & {"$set", "$frozenset"}:
        (tag,) = tree
        if next(references(tree), None) is not None:  # bytes
            pairs = list(enumerate(tree[tag]))
        tree = {tag: sorted(tree[tag], key=json.dumps)}  # their order says nothing
    for key, child in pairs or ():
        inner = types if isinstance(key, str) else (*types, key)
        yield from _leaves(child, f"{path}.{key_text(key)}", inner, matches, taken)
    if not pairs and taken:
        yield path, types, tree


def _decoded(reader: CheckpointReader, node: Any) -> Any:
    with reader.decoding():
        return Decoder(not_stored).node(node)


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, ValueDiff]:
    """Return what differs of JSON values by name; 1, 1.0 and true are three, and NaN is NaN."""
    found = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            found[name] = ValueDiff("removed", before=before[name])
        elif name not in before:
            found[name] = ValueDiff("added", after=after[name])
        elif json.dumps(before[name], sort_keys=True) != json.dumps(after[name], sort_keys=True):
            found[name] = ValueDiff("changed", before[name], after[name])
    return found


def _differing_types(a: _Side, b: _Side) -> dict[str, ValueDiff]:
    """Return what differs in nothing but its type, with that as its value: ``{1: x}`` and ``{"1": x}``."""
    both = sorted((a.types.keys() | b.types) & (a.arrays.keys() & b.arrays | a.values.keys() & b.values))
    return _differing(*({f"{path} (type)": side.types.get(path, []) for path in both} for side in (a, b)))


def _differing_configs(before: Any, after: Any) -> dict[str, ValueDiff]:
    """Return what differs of two configs, by dotted names; of what has the same names, or none, all of it."""
    return _differing(_settings(before), _settings(after)) or _differing({"config": before}, {"config": after})


def _settings(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _entries(config, ""):
        found[_numbered(name, found)] = value
    return found


def _entries(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of all that a config has, lists by index."""
    pairs = sorted(value.items()) if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    for key, item in pairs:
        yield from _entries(item, f"{name}.{key}" if name else str(key))
    if name and not pairs:
        yield name, value


def _compare_arrays(a: _Side, b: _Side) -> dict[str, TensorDiff]:
    np = find("numpy")
    memory = [memoryview(bytearray(_PIECE)) for _ in range(2)]
    tensors: dict[str, TensorDiff] = {}
    known: dict[tuple[SavedArray, SavedArray], TensorDiff] = {}  # arrays that are tied are compared once
    alike: dict[str, bool] = {}  # component -> whether its files have the same digests
    for path in dict.fromkeys([*a.arrays, *b.arrays]):
        x, y = a.arrays.get(path), b.arrays.get(path)
        before, after = (None if array is None else Form(array.dtype, array.shape) for array in (x, y))
        if x is None or y is None or before != after:
            status = "added" if x is None else "removed" if y is None else "reshaped"
            tensors[path] = TensorDiff(status, before, after)
            continue
        if x.component not in alike:
            alike[x.component] = _are_alike(a.reader, b.reader, x.component)
        if (x, y) not in known:
            same = x == y and (alike[x.component] or _saved_alike([_file(a, x)], [_file(b, y)]))
            found = Difference(math.prod(x.shape)) if same else _difference((a, x), (b, y), memory, np)
            known[x, y] = TensorDiff(
                "changed" if found.differing else "same",
                before,
                after,
                found.relative,
                found.max_abs,
                found.differing,
                found.elements,
            )
        tensors[path] = known[x, y]
    return tensors


def _are_alike(a: CheckpointReader, b: CheckpointReader, component: str) -> bool:
    """Whether all files of a component were saved with the same bytes; if so, makes sure that they are there."""
    files = [reader.files_of(component) for reader in (a, b)]
    if a.manifest.backend != b.manifest.backend or not _saved_alike(*files):
        return False
    for reader, found in zip((a, b), files):
        reader.look_for(found)
    return True


def _saved_alike(a: Sequence[FileEntry], b: Sequence[FileEntry]) -> bool:
    told = [[(file.name, file.sha256, file.compression) for file in files] for files in (a, b)]
    return told[0] == told[1] and all(file.sha256 is not None for file in a)


def _file(side: _Side, array: SavedArray) -> FileEntry:
    with side.reader.decoding():
        return side.stored.file(array)


def _read(side: _Side, array: SavedArray, first: int, memory: memoryview) -> None:
    with side.reader.decoding():
        side.stored.read(array, first, memory)


def _difference(
    a: tuple[_Side, SavedArray], b: tuple[_Side, SavedArray], memory: Sequence[memoryview], np: Any
) -> Difference:
    """Return how two arrays of one dtype and shape differ; ``memory`` is of a piece for each, and is overwritten."""
    dtype, size = a[1].dtype, a[1].itemsize
    turned = tiles(a[1], b[1], math.isqrt(_PIECE // size)) if size in _CODES else None
    if turned is not None:
        found = Difference()
        for tile in turned:
            found = found.joined(difference(dtype, *_read_tile(a, b, tile, memory), np))
        return found
    found, filled = Difference(), 0
    for first_a, first_b, count in runs(a[1], b[1]):
        done = 0
        while done < count:
            taken = min(count - done, (_PIECE - filled) // size)
            parts = [whole[filled : filled + taken * size] for whole in memory]
            reads = [partial(_read, *a, first_a + done, parts[0]), partial(_read, *b, first_b + done, parts[1])]
            if taken * size == _PIECE:
                run(reads, 2)  # what they verify is worth a thread
            else:
                for read in reads:
                    read()
            done, filled = done + taken, filled + taken * size
            if filled == _PIECE:
                found, filled = found.joined(difference(dtype, memory[0], memory[1], np)), 0
    return found.joined(difference(dtype, memory[0][:filled], memory[1][:filled], np))


def _read_tile(
    a: tuple[_Side, SavedArray], b: tuple[_Side, SavedArray], tile: Tile, memory: Sequence[memoryview]
) -> tuple[memoryview, memoryview]:
    """Return the elements of a tile by rows; of the second array they are read by columns, and turned in memory."""
    size = a[1].itemsize
    for side, firsts, count, whole in ((a, tile.a, tile.columns, memory[0]), (b, tile.b, tile.rows, memory[1])):
        for place, first in enumerate(firsts):
            _read(*side, first, whole[place * count * size : (place + 1) * count * size])
    nbytes = tile.rows * tile.columns * size
    columns = memory[1][:nbytes].cast(_CODES[size])
    made = memoryview(bytearray(nbytes))
    rows = made.cast(_CODES[size])
    for column in range(tile.columns):
        rows[column :: tile.columns] = columns[column * tile.rows : (column + 1) * tile.rows]
    return memory[0][:nbytes], made
