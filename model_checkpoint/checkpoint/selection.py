"""Parts of a state's JSON tree: the arrays that it refers to, and what is left of it when only some keys are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from model_checkpoint.errors import ConfigurationError

_SHOWN = 5  # keys that an error lists
_NOTHING = object()


def references(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of ``tree`` that refers to a stored array."""
    if isinstance(tree, list):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        if "$array" in tree:
            yield tree
        elif "$view" in tree:
            yield tree["base"]
        else:
            for item in tree.values():
                yield from references(item)


def has_arrays(tree: Any) -> bool:
    """Whether a tree refers to stored arrays."""
    return next(references(tree), None) is not None


def check_keys(keys: object) -> tuple[str, ...] | None:
    """Return the patterns that a user gave as a tuple, None for None; raises ConfigurationError for anything else."""
    if keys is None:
        return None
    made = (keys,) if isinstance(keys, str) else tuple(keys) if isinstance(keys, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in made):
        raise ConfigurationError(f"keys must be a pattern such as 'model.encoder.*', or a list of them, not {keys!r}")
    if not made:
        raise ConfigurationError("keys is empty, so nothing would be loaded; leave it out to load everything")
    return made


def select(components: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Return of each component's tree only what matches a pattern.

    A leaf's path is its component and keys, joined by dots, as in ``model.encoder.0.weight``. What matches is kept with
    everything below it. Of lists and tuples the other items become None, so that the places stay.

    Raises:
        ConfigurationError: a pattern matches nothing; the text names some keys that there are.
    """
    unused = set(patterns)

    def matches(path: str) -> bool:
        found = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
        unused.difference_update(found)
        return bool(found)

    kept = {name: _prune(tree, name, matches) for name, tree in components.items()}
    if unused:
        known = [path for name, tree in components.items() for path in _leaves(tree, name)]
        raise ConfigurationError(
            f"keys: nothing in this checkpoint matches {min(unused)!r}; it has {len(known)} keys"
            + (f" such as {', '.join(known[:_SHOWN])}" if known else "")
        )
    return {name: tree for name, tree in kept.items() if tree is not _NOTHING}


def _prune(tree: Any, path: str, matches: Any) -> Any:
    if matches(path):
        for below in _leaves(tree, path):
            matches(below)  # so that a pattern within what another one takes counts as used
        return tree
    pairs = children(tree)
    if pairs is None:
        return _NOTHING
    kept = [(key, _prune(child, f"{path}.{key_text(key)}", matches)) for key, child in pairs]
    if all(child is _NOTHING for _, child in kept):
        return _NOTHING
    if isinstance(tree, list):
        return [None if child is _NOTHING else child for _, child in kept]
    if "$tuple" in tree:
        return {**tree, "$tuple": [None if child is _NOTHING else child for _, child in kept]}
    left = [[key, child] for key, child in kept if child is not _NOTHING]
    for tag in ("$dict", "$ordered"):
        if tag in tree:
            return {**tree, tag: left}
    return dict(left)


def children(tree: Any) -> list[tuple[Any, Any]] | None:
    """Return the (key, child) pairs of a container, None for a leaf."""
    if isinstance(tree, list):
        return list(enumerate(tree))
    if not isinstance(tree, dict):
        return None
    if "$tuple" in tree:
        return list(zip(tree.get("fields") or range(len(tree["$tuple"])), tree["$tuple"]))
    for tag in ("$dict", "$ordered"):
        if tag in tree:
            return [(key, child) for key, child in tree[tag]]
    if any(key.startswith("$") for key in tree):
        return None
    return list(tree.items())


def _leaves(tree: Any, path: str) -> Iterator[str]:
    pairs = children(tree)
    if not pairs:
        yield path
    for key, child in pairs or ():
        yield from _leaves(child, f"{path}.{key_text(key)}")


def key_text(key: Any) -> str:
    """Return a key as ``str`` shows the object; keys that are no plain values stand in the tree as tagged nodes."""
    return ".".join(map(key_text, key["$tuple"])) if isinstance(key, dict) and "$tuple" in key else str(key)
