"""The built-in hooks that look at rotations, on arrays of each library."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.hooks.quaternion_validation import (
    LOSSES,
    REPRESENTATIONS,
    QuaternionValidationHook,
    RotationLossValidationHook,
)

NAN, INF = float("nan"), float("inf")
STEP, FORWARD = HookEvent.BEFORE_TRAINING_STEP, HookEvent.AFTER_FORWARD_PASS
BEFORE_LOSS, AFTER_LOSS = HookEvent.BEFORE_LOSS_COMPUTATION, HookEvent.AFTER_LOSS_COMPUTATION
MIXED = [
    [1.0, 0, 0, 0],
    [0.6, 0.8, 0, 0],
    [2.0, 0, 0, 0],
    [-0.5, 0.5, 0.5, 0.5],
    [0, 0, 0, 0],
    [NAN, 0, 0, 0],
    [INF, 1, 0, 0],
]
Make = Callable[[Any], Any]


@pytest.fixture(params=["numpy", "torch", "jax"])
def make(request: pytest.FixtureRequest) -> Make:
    """How the library makes a float32 array."""
    library: Any = pytest.importorskip(request.param)
    if request.param == "jax":
        return lambda values: library.numpy.array(values, dtype="float32")
    if request.param == "torch":
        return lambda values: library.tensor(values, dtype=library.float32)
    return lambda values: library.array(values, dtype="float32")


def hooks_with(hook: Any) -> HookManager:
    hooks = HookManager()
    hooks.register_hook(hook)
    return hooks


def rows(array: Any) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in array.tolist()]


def test_norms_and_numbers_that_are_none_are_found_and_counted(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    hook = QuaternionValidationHook()
    hooks = hooks_with(hook)
    with caplog.at_level(logging.WARNING):
        result = hooks.fire_hook(FORWARD, step=7, outputs=make(MIXED))
    assert result.success
    problems = result.results["QuaternionValidationHook"]["problems"]
    assert problems == [
        "outputs: 2 of 7 quaternions are not finite",
        "outputs: the norms of 2 of 7 quaternions are off by up to 1",
    ]
    assert "step 7" in caplog.text
    summary = hook.summary()
    assert summary.pop("mean_deviation") == pytest.approx((1 + 1) / 5, abs=1e-6)
    assert summary == {
        "quaternions": 7,
        "off_norm": 2,
        "not_finite": 2,
        "zero": 1,
        "negative_scalar": 1,
        "losses": 0,
        "worst_deviation": 1.0,
    }


def test_good_quaternions_are_no_problem_in_any_shape(make: Make) -> None:
    hook = QuaternionValidationHook(tolerance=0.01)
    hooks = hooks_with(hook)
    for array in (make([1.0, 0, 0, 0]), make([[[0.0, 1.005, 0, 0]]] * 3), make([[1.0, 2.0, 3.0]]), make([]), make(5.0)):
        assert hooks.fire_hook(FORWARD, step=1, outputs=array).results == {"QuaternionValidationHook": None}
    assert (hook.summary()["quaternions"], hook.summary()["off_norm"]) == (4, 0)
    assert hooks.list_hooks()[0]["failures"] == 0


def test_the_scalar_part_is_where_the_argument_says(make: Make) -> None:
    quaternions = make([[-1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, -1.0]])
    for scalar_first, negative in ((True, 1), (False, 1)):
        hook = QuaternionValidationHook(scalar_first=scalar_first)
        hooks_with(hook).fire_hook(FORWARD, step=0, outputs=quaternions)
        assert hook.summary()["negative_scalar"] == negative
    hook = QuaternionValidationHook(scalar_first=False)
    hooks_with(hook).fire_hook(FORWARD, step=0, outputs=make([[-1.0, 0, 0, 0]]))
    assert hook.summary()["negative_scalar"] == 0


def test_normalized_arrays_come_as_a_result_and_for_the_hooks_that_follow(make: Make) -> None:
    seen: list[Any] = []
    hooks = hooks_with(QuaternionValidationHook(action="normalize"))
    hooks.register_hook("next", lambda context: seen.append(context.get("outputs")), [FORWARD])
    given = make(MIXED)
    result = hooks.fire_hook(FORWARD, step=0, outputs=given)
    normalized = result.get_result("QuaternionValidationHook")["normalized"]["outputs"]
    assert type(normalized) is type(given)
    good = [[1, 0, 0, 0], [0.6, 0.8, 0, 0], [1, 0, 0, 0], [-0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]
    assert rows(normalized[:5]) == good
    assert str(normalized[5:].tolist()) == str([[NAN, 0.0, 0.0, 0.0], [INF, 1.0, 0.0, 0.0]])
    assert seen[0] is normalized
    assert rows(given[2:3]) == [[2, 0, 0, 0]]  # the caller's own stay as they are


def test_gradients_pass_through_what_was_normalized() -> None:
    torch = pytest.importorskip("torch")
    raw = torch.tensor([[2.0, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 1, 1, 1]], requires_grad=True)
    result = hooks_with(QuaternionValidationHook(action="normalize")).fire_hook(FORWARD, step=0, outputs=raw)
    normalized = result.get_result("QuaternionValidationHook")["normalized"]["outputs"]
    normalized.sum().backward()
    expected = torch.nn.functional.normalize(raw.detach(), dim=-1)
    assert torch.allclose(normalized[[0, 2]], expected[[0, 2]])
    assert torch.isfinite(raw.grad).all()  # the zero has no direction, and must not spoil the rest
    assert torch.allclose(raw.grad[0], torch.tensor([0.0, 0.5, 0.5, 0.5]))


def test_a_dict_is_looked_at_by_names_or_by_shape(make: Make) -> None:
    data = {"pose": make([[2.0, 0, 0, 0]]), "bias": make([[9.0, 9, 9, 9]]), "image": make([[1.0, 2]])}
    named = hooks_with(QuaternionValidationHook(action="normalize", keys=["pose"]))
    result = named.fire_hook(STEP, step=0, inputs=data).get_result("QuaternionValidationHook")
    changed = result["normalized"]["inputs"]
    assert rows(changed["pose"]) == [[1, 0, 0, 0]]
    assert changed["bias"] is data["bias"]
    assert changed["image"] is data["image"]
    by_shape = QuaternionValidationHook()
    hooks_with(by_shape).fire_hook(STEP, step=0, inputs=data)
    assert by_shape.summary()["off_norm"] == 2


def test_rejected_inputs_veto_the_step_and_rejected_outputs_fail(make: Make) -> None:
    hooks = hooks_with(QuaternionValidationHook(action="reject"))
    result = hooks.fire_hook(STEP, step=3, inputs=make([[2.0, 0, 0, 0]]))
    assert (result.success, result.stopped_by) == (False, "QuaternionValidationHook")
    assert "off by up to 1" in str(result.reason)
    late = hooks.fire_hook(FORWARD, step=3, outputs=make([[2.0, 0, 0, 0]]))
    assert not late.success
    assert "step 3: outputs" in str(late.errors["QuaternionValidationHook"])
    loss = hooks.fire_hook(AFTER_LOSS, step=3, loss=make(NAN))
    assert "not finite" in str(loss.errors["QuaternionValidationHook"])
    assert hooks.fire_hook(AFTER_LOSS, step=3, loss=make([0.5, 0.25])).success


def test_losses_may_be_numbers_and_dicts(make: Make) -> None:
    hook = QuaternionValidationHook()
    hooks = hooks_with(hook)
    hooks.register_hook(RotationLossValidationHook("geodesic"))
    for loss in (0.5, 1, {"a": 0.5, "b": make([0.25])}):
        result = hooks.fire_hook(AFTER_LOSS, step=0, loss=loss)
        assert (result.success, list(result.results.values())) == (True, [None, None])
    for loss in (NAN, {"a": 0.5, "b": make([NAN, 0.25])}, INF):
        result = hooks.fire_hook(AFTER_LOSS, step=0, loss=loss)
        assert result.success
        assert all(answer["problems"] for answer in result.results.values())
    assert hook.summary()["not_finite"] == 3


def test_a_dict_may_have_more_in_it_and_a_misspelt_key_is_told(make: Make) -> None:
    data = {"pose": make([[1.0, 0, 0, 0]]), "ids": [1, 2], "name": "x"}
    hooks = hooks_with(QuaternionValidationHook(action="reject", keys=["pose", "rotaton"]))
    result = hooks.fire_hook(STEP, step=0, inputs=data)
    assert "there is no 'rotaton'" in str(result.reason)
    assert hooks_with(QuaternionValidationHook()).fire_hook(STEP, step=0, inputs=data).success


def test_arrays_of_derived_classes_are_normalized() -> None:
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")

    class Rotation(torch.Tensor):  # type: ignore[misc]
        """As packages for rotations have it."""

    class Mine(np.ndarray):  # type: ignore[misc]
        """A subclass."""

    for array in (torch.tensor([[2.0, 0, 0, 0]]).as_subclass(Rotation), np.array([[2.0, 0, 0, 0]]).view(Mine)):
        hooks = hooks_with(QuaternionValidationHook(action="normalize"))
        result = hooks.fire_hook(FORWARD, step=0, outputs=array).get_result("QuaternionValidationHook")
        assert rows(result["normalized"]["outputs"]) == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": NAN}, "tolerance"),
        ({"tolerance": "1e-3"}, "tolerance"),
        ({"action": "drop"}, "action"),
        ({"keys": "pose"}, "keys"),
        ({"keys": 5}, "keys"),
        ({"scalar_first": "no"}, "scalar_first"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        QuaternionValidationHook(**arguments)


# --- losses -------------------------------------------------------------------------------------------------------


def test_a_loss_is_held_against_its_range(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    hook = RotationLossValidationHook("geodesic")
    hooks = hooks_with(hook)
    for good in (make(0.0), make([0.5, math.pi]), make(-1e-4)):
        assert hooks.fire_hook(AFTER_LOSS, step=0, loss=good).results == {"RotationLossValidationHook": None}
    assert caplog.records == []
    for bad in (make(3.2), make(-0.1), make(NAN), make([0.5, INF])):
        assert hooks.fire_hook(AFTER_LOSS, step=9, loss=bad).results["RotationLossValidationHook"]["problems"]
    assert len(caplog.records) == 4
    assert "step 9: geodesic loss from" in caplog.text
    summary = hook.summary()
    assert (summary["losses"], summary["out_of_range"]) == (7, 4)
    assert summary["lowest"] == pytest.approx(-0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_ranges_are_those_that_random_rotations_reach(loss: str) -> None:
    np = pytest.importorskip("numpy")
    chance = np.random.default_rng(7)
    q, p = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in chance.normal(size=(2, 100_000, 4)))
    p[0] = q[0]  # the same rotation
    p[1] = [-q[1][1], q[1][0], -q[1][3], q[1][2]]  # half a turn from it
    dot = np.minimum(1, abs((q * p).sum(-1)))
    angle = 2 * np.arccos(dot)
    values = {
        "geodesic": angle,
        "geodesic_degrees": np.degrees(angle),
        "quaternion_angle": np.arccos(dot),
        "quaternion_dot": 1 - dot,
        "quaternion_chord": np.minimum(np.linalg.norm(q - p, axis=-1), np.linalg.norm(q + p, axis=-1)),
        "chordal": 2 * math.sqrt(2) * np.sin(angle / 2),
        "mse": chance.random(10),
    }[loss]
    limit, fitting = LOSSES[loss]
    assert values.min() == pytest.approx(0, abs=1e-3 if loss != "mse" else 1)
    assert math.isinf(limit) or values.max() == pytest.approx(limit, rel=1e-6)
    hooks = hooks_with(RotationLossValidationHook(loss, fitting[0], reject=True))
    assert hooks.fire_hook(AFTER_LOSS, step=0, loss=values).success


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_shapes_are_held_against_the_representation(make: Make, representation: str) -> None:
    shape = REPRESENTATIONS[representation]

    def zeros(*sizes: int) -> Any:
        values: Any = 0.0
        for size in reversed(sizes):
            values = [values] * size
        return make(values)

    hook = RotationLossValidationHook("geodesic", representation, reject=True)
    hooks = hooks_with(hook)
    assert hooks.fire_hook(BEFORE_LOSS, step=0, outputs=zeros(2, *shape), targets=zeros(2, *shape)).success
    wrong = hooks.fire_hook(BEFORE_LOSS, step=0, outputs=zeros(2, 5), targets=zeros(2, *shape))
    assert wrong.stopped_by == "RotationLossValidationHook"
    assert "outputs have the shape (2, 5)" in str(wrong.reason)
    differ = hooks.fire_hook(BEFORE_LOSS, step=0, outputs=zeros(3, *shape), targets=zeros(2, *shape))
    assert "and targets" in str(differ.reason)
    assert hook.summary()["wrong_shapes"] == 2


@pytest.mark.parametrize(
    ("loss", "representation", "text"),
    [
        ("mse", "quaternion", "same rotation"),
        ("mse", "euler", "jump"),
        ("quaternion_dot", "matrix", "made for quaternion"),
        ("chordal", "quaternion", "made for matrix"),
        ("huber", "quaternion", "loss must be one of"),
        ("geodesic", "spinor", "representation must be one of"),
    ],
)
def test_a_loss_that_is_wrong_for_the_representation_is_refused(loss: str, representation: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RotationLossValidationHook(loss, representation)
    with pytest.raises(ConfigurationError, match="tolerance"):
        RotationLossValidationHook(tolerance=NAN)
