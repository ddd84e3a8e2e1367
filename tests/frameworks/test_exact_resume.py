"""Training with dropout and shuffling, killed at three points and resumed, ends with the bits of unbroken training."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest

from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.testing import assert_resume_equivalent

np = pytest.importorskip("numpy")
jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow  # processes of their own, each of which imports a framework


def train_torch(manager: EnhancedCheckpointManager, steps: int) -> None:
    """Dropout, shuffling by NumPy, noise by Python; saved in the middle of epochs."""
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    data = torch.randn(40, 6)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
        *(torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    average = torch.optim.swa_utils.AveragedModel(model)
    position: dict[str, Any] = {"order": np.random.permutation(40), "at": 0}
    generator = np.random.default_rng(4)
    extra = {"position": position, "average": average, "generator": generator}
    step = manager.restore(model, optimizer, scheduler, extra)["step"] if manager.list_checkpoints() else 0
    while step < steps:
        if position["at"] == 40:
            position.update(order=np.random.permutation(40), at=0)
        rows = data[torch.from_numpy(position["order"][position["at"] : position["at"] + 8])]
        position["at"] += 8
        noise = random.gauss(0, 0.1) + float(generator.normal())
        loss = (model(rows).squeeze(1) - rows.sum(1) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        step += 1
        if step % 3 == 0:
            manager.save_checkpoint(model, optimizer, scheduler, step=step, loss=loss, extra_state=extra)


def train_jax(manager: EnhancedCheckpointManager, steps: int) -> None:
    """Dropout by a typed key, shuffling by NumPy, Adam's moments in named tuples of our own."""
    import jax.numpy as jnp

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


class Moments(NamedTuple):
    count: Any
    mean: Any


def test_a_torch_training_with_dropout_and_shuffling_is_resumed_exactly() -> None:
    assert assert_resume_equivalent(train_torch, 21, kill_at=[4, 11, 18]) == 21


def test_a_jax_training_with_dropout_and_shuffling_is_resumed_exactly() -> None:
    assert assert_resume_equivalent(train_jax, 21, kill_at=[4, 11, 18]) == 21
