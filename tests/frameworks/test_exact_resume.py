"""Training with dropout and shuffling, killed at three points and resumed, ends with the bits of unbroken training."""

from __future__ import annotations

import pytest

from model_checkpoint.testing import assert_resume_equivalent

pytest.importorskip("numpy")


def test_a_torch_training_with_dropout_and_shuffling_is_resumed_exactly() -> None:
    pytest.importorskip("torch")
    from torch_training import train_torch

    assert assert_resume_equivalent(train_torch, 21, kill_at=[4, 11, 18]) == 21


def test_a_jax_training_with_dropout_and_shuffling_is_resumed_exactly() -> None:
    pytest.importorskip("jax")
    from jax_training import train_jax

    assert assert_resume_equivalent(train_jax, 21, kill_at=[4, 11, 18]) == 21
