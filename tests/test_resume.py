"""Whether a resumed training is what an unbroken one is: who says so, and what that names where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import walks

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.testing import ResumeDiffersError, assert_resume_equivalent


def test_a_plain_training_is_resumed_exactly() -> None:
    assert assert_resume_equivalent(walks.walk, 4, kill_at=2) == 4


@pytest.mark.parametrize("train", [walks.walk_without_random_states, walks.walk_without_saving_random_states])
def test_the_first_step_and_tensor_that_differ_are_named(train: Any) -> None:
    with pytest.raises(ResumeDiffersError, match=r"first in step 3, there first in model\.y\n") as caught:
        assert_resume_equivalent(train, 4, kill_at=3)
    assert caught.value.diff is not None
    assert (caught.value.kill_at, caught.value.step, [*caught.value.diff.changed]) == (3, 3, ["model.y"])


def test_a_step_that_one_run_saved_and_the_other_did_not_is_named() -> None:
    with pytest.raises(ResumeDiffersError, match="saved no checkpoint of step 3 and epoch 0"):
        assert_resume_equivalent(walks.leave_out_a_step, 4, kill_at=3)


@pytest.mark.parametrize(
    ("train", "kill_at", "problem"),
    [
        (walks.fail, 1, "ArithmeticError: no data"),
        (walks.save_nothing, 1, "saved no checkpoint"),
        (walks.walk, 9, "ended before it could be killed at step 9"),
    ],
)
def test_what_cannot_be_compared_is_said(train: Any, kill_at: int, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        assert_resume_equivalent(train, 3, kill_at)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((walks.walk, 0, 1), "steps"),
        ((walks.walk, 3, 0), "kill_at"),
        ((walks.walk, 3, []), "one step"),
        ((3, 3, 1), "function"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        assert_resume_equivalent(*arguments)
