"""A plain JAX loop with Optax that can be killed at any moment and run again: it ends with the bits of an unbroken run.

``python examples/jax_loop.py``, where ``pip install 'model-checkpoint[jax,flax]'`` was run. It writes into the
folder that it is started in.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model_checkpoint import EnhancedCheckpointManager, resume_or_start

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

key = jax.random.key(0)
inputs = jax.random.normal(key, (96, 8))
targets = inputs.sum(1)
params = {"w": jax.random.normal(key, (8, 32)) * 0.3, "v": jax.random.normal(key, (32,)) * 0.3}
optimizer = optax.adamw(1e-2)
moments = optimizer.init(params)


@jax.jit
def update(params: Any, moments: Any, rows: Any, key: Any) -> tuple[Any, Any, Any]:
    """Train on some rows; ``key`` is for the dropout."""

    def mean_error(params: Any) -> Any:
        hidden = jax.nn.relu(inputs[rows] @ params["w"]) * jax.random.bernoulli(key, 0.8, (32,))
        return jnp.mean((hidden @ params["v"] - targets[rows]) ** 2)

    loss, grads = jax.value_and_grad(mean_error)(params)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, loss


with resume_or_start("jax loop") as tracker:
    manager = EnhancedCheckpointManager(tracker, "checkpoints", async_save=True)
    step = 0
    if manager.list_checkpoints():
        restored = manager.restore(params, moments)  # arrays of JAX never change: take the new ones
        step, moments = restored["step"], restored["optimizer"]
    print(f"at step {step}")
    while step < options.steps:
        epoch, batch = divmod(step, 6)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), 96)  # of the step alone, so nothing is to save
        rows, drop = order[batch * 16 : batch * 16 + 16], jax.random.fold_in(key, 1_000_000 + step)
        params, moments, loss = update(params, moments, rows, drop)
        step += 1
        tracker.log_metric("loss", loss, step)
        manager.save_checkpoint(params, moments, step=step, loss=loss)
    manager.close()
print("sum of all weights:", sum(float(weight.sum()) for weight in jax.tree.leaves(params)))
