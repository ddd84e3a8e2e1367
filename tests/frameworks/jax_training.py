"""A training of JAX with all that can make a resumed run differ; a module of its own, so that it loads at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model_checkpoint import EnhancedCheckpointManager


class Moments(NamedTuple):
    count: Any
    mean: Any


def train_jax(manager: EnhancedCheckpointManager, steps: int) -> None:
    """Dropout by a typed key, shuffling by NumPy, Adam's moments in named tuples of our own."""
    np.random.seed(5)
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (6, 8)), "v": jnp.zeros(8)}
    moments = Moments(jnp.zeros((), "int32"), jax.tree.map(jnp.zeros_like, params))
    data = jax.random.normal(jax.random.key(1), (40, 6))
    extra: dict[str, Any] = {"key": key, "order": np.random.permutation(40)}
    step = 0
    if manager.list_checkpoints():
        restored = manager.restore(params, moments, extra_state=extra)
        step, moments = restored["step"], restored["optimizer"]

    @jax.jit
    def update(params: Any, moments: Moments, rows: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            hidden = jnp.tanh(rows @ params["w"]) * jax.random.bernoulli(key, 0.5, (8,))
            return jnp.mean((hidden @ params["v"] - rows.sum(1)) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        mean = jax.tree.map(lambda m, g: 0.9 * m + g, moments.mean, grads)
        return value, jax.tree.map(lambda p, m: p - 0.01 * m, params, mean), Moments(moments.count + 1, mean)

    while step < steps:
        at = step * 8 % 40
        if at == 0:
            extra["order"] = np.random.permutation(40)
        extra["key"], drop = jax.random.split(extra["key"])
        loss, params, moments = update(params, moments, data[extra["order"][at : at + 8]], drop)
        step += 1
        if step % 3 == 0:
            manager.save_checkpoint(params, moments, step=step, loss=loss, extra_state=extra)
