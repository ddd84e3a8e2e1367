"""JAX's pytrees of other classes than dict, list and tuple: Flax's and Equinox's modules, FrozenDict, chex dataclasses.

They cannot be changed, so a new one is made in the place of a template, with what the template has besides arrays.
"""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits


class PytreeAdapter(ObjectAdapter):
    """Objects whose class is registered with ``jax.tree_util``; their children are looked at one level at a time."""

    def owns(self, value: object) -> bool:
        import jax  # somebody has imported it

        plain = value is None or isinstance(value, (dict, list, tuple))
        return not plain and not jax.tree_util.all_leaves([value])

    def traits(self, value: object) -> Traits:
        return Traits(replaces=True)

    def state_of(self, value: object) -> object:
        return {_name(path[0]): child for path, child in _children(value)[0]}

    def put_back(self, value: object, state: Any) -> object:
        import jax

        pairs, form = _children(value)
        return jax.tree_util.tree_unflatten(form, [state[_name(path[0])] for path, _ in pairs])


def _children(value: object) -> tuple[list[tuple[tuple[Any, ...], object]], Any]:
    import jax

    pairs, form = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    return pairs, form


def _name(key: Any) -> Any:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)
