"""Keys of a checkpoint that are called otherwise in what it is loaded into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.checkpoint.objects import find
from model_checkpoint.checkpoint.selection import children
from model_checkpoint.errors import ConfigurationError

Keys = tuple[Any, ...]  # that lead to a part of a state, the component's name first

_SHOWN = 5  # keys that an error lists
_TAGS = ("$dict", "$ordered", "$tuple")
_COMPONENTS = ("model", "optimizer", "scheduler", "extra")


class Rule(NamedTuple):
    """How some keys are renamed.

    Attributes:
        pattern: as the user gave it.
        new_name: returns what a whole name such as ``model.encoder.weight`` becomes, None where the rule is not for it.
    """

    pattern: str
    new_name: Callable[[str], str | None]


Rules = Sequence[Rule]


Forms = dict[Keys, str]  # of the containers of a target: ``list``, ``$tuple`` or ``dict``


class _Branch:
    """A container of a state's tree that can be changed.

    Attributes:
        form: the tag of its node (``$dict``, ``$ordered``, ``$tuple``), ``dict`` or ``list``.
        more: what its node has besides its items, such as the metadata that torch hangs on a module's state.
        items: key -> a branch, or the node of a leaf.
    """

    def __init__(self, form: str, more: Mapping[str, Any]) -> None:
        self.form = form
        self.more = dict(more)
        self.items: dict[Any, Any] = {}


def name_of(keys: Keys) -> str:
    """Return how messages and users call what ``keys`` lead to; the same as ``selection`` calls what was saved."""
    return ".".join(name_of(key) if isinstance(key, tuple) else str(key) for key in keys)


def check_rules(rename: object) -> Rules:
    """Return what a user gave as ``rename``.

    Args:
        rename: old name -> new name, both whole, such as ``model.encoder.weight``. Each ``*`` of an old name stands for
            any text, which takes the place of the ``*`` of the same number in the new one. A compiled regular
            expression is searched for in names, and replaced as by ``re.sub``.

    Raises:
        ConfigurationError: it is no such mapping; the text says what is wrong.
    """
    if rename is None:
        return ()
    if not isinstance(rename, Mapping):
        raise ConfigurationError(f"rename must be a mapping of old to new names, not {rename!r}")
    rules = []
    for old, new in rename.items():
        if not isinstance(new, str) or not new or not isinstance(old, (str, re.Pattern)):
            raise ConfigurationError(f"rename: {old!r}: {new!r} must be two names such as 'model.encoder.weight'")
        if isinstance(old, re.Pattern):
            rules.append(Rule(repr(old.pattern), partial(_searched, old, new)))
            continue
        if old.count("*") != new.count("*"):
            raise ConfigurationError(f"rename: {old!r} and {new!r} must have as many '*'")
        whole = re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL)
        rules.append(Rule(repr(old), partial(_matched, whole, new.split("*"))))
    return rules


def _searched(pattern: re.Pattern[str], new: str, name: str) -> str | None:
    try:
        made, count = pattern.subn(new, name)
    except (re.error, IndexError, TypeError) as error:
        raise ConfigurationError(f"rename: {pattern.pattern!r} cannot become {new!r}: {error}") from error
    return made if count else None


def _matched(pattern: re.Pattern[str], new: list[str], name: str) -> str | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    return "".join(part for pair in zip(new, (*found.groups(), "")) for part in pair)


def rename(tree: dict[str, Any], rules: Rules, targets: Mapping[str, object], decode: Any) -> dict[str, str]:
    """Rename leaves of a state's tree, in place; of several rules for one the first counts.

    A leaf goes where the targets have one of its new name, however their dicts, lists and objects are nested. It takes
    the place of a saved one that has that name and is not renamed itself.

    Args:
        tree: component -> its tree.
        rules, targets: what to rename, and what the checkpoint is for, by component.
        decode: makes an object of a node of the tree, such as a key.

    Returns:
        Old -> new name of those that were renamed.

    Raises:
        ConfigurationError: a rule is for no leaf, two leaves would have one name, one would lie within another one, or
            a list would lose an item that is not its last.
    """
    if not rules:
        return {}
    root = _parsed(tree, decode)
    names = {name_of(keys): keys for keys in _leaves(root, ())}
    moves, unused = _moves(names, rules)
    if unused:
        shown = ", ".join([*names][:_SHOWN])
        raise ConfigurationError(f"rename: nothing in this checkpoint is called {min(unused)}; it has {shown}, ...")
    forms: Forms = {}
    wanted = {name_of(keys): keys for name, target in targets.items() for keys in _leaves_of(target, (name,), forms)}
    taken = {}
    for name in {**moves, **{new: new for new in moves.values() if new in names}}:
        around = _at(root, names[name][:-1])
        taken[name] = (around.items.pop(names[name][-1]), around.more.get("metadata"))
    for old, new in moves.items():
        keys = wanted.get(new) or _within(new, names[old], wanted) or _keys_of(new, names[old])
        try:
            _place(root, keys, forms, *taken[old], names[old][-1])
        except KeyError:
            raise ConfigurationError(
                f"rename: {old} would be {new}, and something lies around or within that"
            ) from None
    built = _built(root, ())
    tree.clear()
    tree.update(built)
    return moves


def _moves(names: Mapping[str, Keys], rules: Rules) -> tuple[dict[str, str], set[str]]:
    """Return old -> new name, and the patterns that are for nothing."""
    unused = {rule.pattern for rule in rules}
    moves: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in names:
        for rule in rules:
            new = rule.new_name(name)
            if new is None:
                continue
            unused.discard(rule.pattern)
            if new.partition(".")[0] not in _COMPONENTS or "." not in new:
                raise ConfigurationError(
                    f"rename: {name} would be {new!r}; names begin with {', '.join(part + '.' for part in _COMPONENTS)}"
                )
            if origin.setdefault(new, name) != name:
                raise ConfigurationError(f"rename: both {origin[new]} and {name} would be {new}")
            moves |= {} if new == name else {name: new}
            break
    return moves, unused


def rename_keys(tree: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename keys of one dict of a state's tree, in place."""
    pairs = next((tree[tag] for tag in ("$dict", "$ordered") if tag in tree), None)
    if pairs is None:
        items = {names.get(key, key): value for key, value in tree.items()}
        tree.clear()
        tree.update(items)
    for pair in pairs or ():
        pair[0] = names.get(pair[0], pair[0]) if isinstance(pair[0], str) else pair[0]


def _leaves_of(target: Any, keys: Keys, forms: Forms) -> Iterator[Keys]:
    """Yield the keys of all leaves of an object, or of nested dicts, lists and tuples of objects; notes their forms."""
    adapter = None if type(target) in (dict, list, tuple) else find(target)
    if adapter is not None and not adapter.traits(target).opaque:
        try:
            target = adapter.state_of(target)
        except Exception:  # noqa: BLE001 - whatever the user's object raises is told when it is compared
            return
    forms[keys] = "dict" if isinstance(target, Mapping) else "list" if isinstance(target, list) else "$tuple"
    if isinstance(target, Mapping):
        pairs = list(target.items())
    elif isinstance(target, (list, tuple)):
        pairs = list(zip(getattr(target, "_fields", range(len(target))), target))
    else:
        yield keys
        return
    for key, child in pairs:
        yield from _leaves_of(child, (*keys, key), forms)


def _within(name: str, old: Keys, wanted: Mapping[str, Keys]) -> Keys | None:
    """Return keys for a name that lies within what a target has: an opaque object, or something that is empty yet."""
    for length in range(1, len(old)):
        around = wanted.get(name.removesuffix(f".{name_of(old[-length:])}"))
        if around is not None:
            return (*around, *old[-length:])
    return None


def _keys_of(name: str, old: Keys) -> Keys:
    """Return keys for a name that no target has: those of the old one as far as they agree, then the rest as one."""
    kept: list[Any] = []
    for key in old[:-1]:
        if not name.startswith(f"{name_of((key,))}."):
            break
        kept.append(key)
        name = name[len(name_of((key,))) + 1 :]
    return (*kept, name) if kept else tuple(name.split(".", 1))


def _parsed(node: Any, decode: Any) -> Any:
    """Return a tree as branches; an empty container is a leaf, as one without a name could not be renamed."""
    pairs = children(node)
    if not pairs:
        return node
    form = "list" if isinstance(node, list) else next((tag for tag in _TAGS if tag in node), "dict")
    branch = _Branch(form, {key: node[key] for key in ("metadata",) if form in _TAGS and key in node})
    branch.items = {decode(key): _parsed(child, decode) for key, child in pairs}
    return branch


def _leaves(node: Any, keys: Keys) -> Iterator[Keys]:
    if not isinstance(node, _Branch):
        yield keys
        return
    for key, child in node.items.items():
        yield from _leaves(child, (*keys, key))


def _at(root: _Branch, keys: Keys) -> _Branch:
    for key in keys:
        root = root.items[key]
    return root


def _place(root: _Branch, keys: Keys, forms: Forms, node: Any, metadata: Any, old_key: Any) -> None:
    """Put a leaf into a tree, in containers such as the target has.

    Args:
        keys: where.
        forms: of the target's containers.
        node, metadata, old_key: the leaf, what torch hangs on the state of the module that it was of, its key there.

    Raises:
        KeyError: it would lie within another leaf, or around some.
    """
    branch: Any = root
    for i, key in enumerate(keys[:-1]):
        if key not in branch.items:
            ordered = metadata is not None and i == len(keys) - 2
            more: dict[str, Any] = {"metadata": {"$ordered": []}} if ordered else {}
            branch.items[key] = _Branch("$ordered" if ordered else forms.get(keys[: i + 1], "dict"), more)
        branch = branch.items[key]
        if not isinstance(branch, _Branch):
            raise KeyError(key)
    if keys[-1] in branch.items and not _is_empty(branch.items[keys[-1]]):
        raise KeyError(keys[-1])
    branch.items[keys[-1]] = node
    if metadata is not None and "metadata" in branch.more:  # versions, by the module's name; of the whole by ""
        own, of_old = branch.more["metadata"], dict(children(metadata) or ())
        for was, now in ((str(old_key).rpartition(".")[0], str(keys[-1]).rpartition(".")[0]), ("", "")):
            if was in of_old and "$ordered" in own and now not in dict(own["$ordered"]):
                own["$ordered"].append([now, of_old[was]])


def _is_empty(node: Any) -> bool:
    return isinstance(node, _Branch) and all(map(_is_empty, node.items.values()))


def _built(node: Any, keys: Keys) -> Any:
    """Return the node of a branch, without the branches that nothing is left of."""
    if not isinstance(node, _Branch):
        return node
    made = {key: _built(child, (*keys, key)) for key, child in node.items.items() if not _is_empty(child)}
    if node.form == "dict" and all(isinstance(key, str) and not key.startswith("$") for key in made):
        return made
    if node.form in ("list", "$tuple") and all(isinstance(key, int) for key in made):
        if sorted(made) != [*range(len(made))]:
            raise ConfigurationError(f"rename: {name_of(keys)} is a list, and would lose an item that is not its last")
        items = [made[i] for i in range(len(made))]
        return items if node.form == "list" else {"$tuple": items}
    if node.form == "$tuple":
        return {"$tuple": [*made.values()], "fields": [*made]}
    pairs = [[{"$tuple": list(key)} if isinstance(key, tuple) else key, child] for key, child in made.items()]
    return {node.form if node.form in _TAGS else "$dict": pairs, **node.more}
