"""Built-in hooks that look at rotations while a model is trained: quaternions, and losses between rotations.

They work on arrays of torch, NumPy and JAX, by operators and methods that these have in common, and where the arrays
are: of an array on a GPU only a few numbers come to the host. No library is imported for that.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority

__all__ = ["QuaternionValidationHook", "RotationLossValidationHook"]

log = logging.getLogger(__name__)
_QUATERNION = 4
ACTIONS = ("warn", "normalize", "reject")

# What a rotation's array looks like: the last dimensions.
REPRESENTATIONS: dict[str, tuple[int, ...]] = {
    "quaternion": (4,),
    "matrix": (3, 3),
    "rotation_6d": (6,),
    "axis_angle": (3,),
    "euler": (3,),
}
# The range of each loss, and the representations that it is made for. The names behind the ranges are those of Huynh,
# "Metrics for 3D rotations: comparison and analysis", J. Math. Imaging Vis. 35 (2009).
LOSSES: dict[str, tuple[float, tuple[str, ...]]] = {
    "geodesic": (math.pi, tuple(REPRESENTATIONS)),  # the angle between two rotations in radians, phi 6
    "geodesic_degrees": (180.0, tuple(REPRESENTATIONS)),
    "quaternion_angle": (math.pi / 2, ("quaternion",)),  # arccos |q.p|, phi 3
    "quaternion_dot": (1.0, ("quaternion",)),  # 1 - |q.p|, phi 4
    "quaternion_chord": (math.sqrt(2), ("quaternion",)),  # min |q - p|, |q + p|, phi 2
    "chordal": (2 * math.sqrt(2), ("matrix", "rotation_6d")),  # Frobenius norm of R - S, phi 5
    "mse": (math.inf, ("matrix", "rotation_6d", "axis_angle")),
}
_WHY_NOT = {
    ("mse", "quaternion"): "q and -q are the same rotation, and mse tells them apart; use quaternion_chord or geodesic",
    ("mse", "euler"): "angles jump by a turn where the rotation does not; use geodesic, or another representation",
}


class QuaternionValidationHook(BaseHook):
    """Checks that quaternions have unit norm, and that they and the losses are finite.

    It looks at ``inputs`` before a training step, at ``outputs`` after a forward pass and at ``loss`` after the loss
    was computed: an array, or a dict of arrays. One of which the last dimension is not 4 holds no quaternions.

    Args:
        tolerance: how far a norm may be from 1. Of bfloat16, whose steps near 1 are 0.008, take 0.02.
        scalar_first: whether quaternions are (w, x, y, z); False for (x, y, z, w).
        action: what is done about quaternions whose norm is off: ``warn`` logs it; ``normalize`` divides by the norm
            and returns what training should go on with as ``{"normalized": {"outputs": ...}}`` (gradients pass
            through); ``reject`` vetoes the training step, or where it is too late for that fails. NaN, infinities and
            zeros have no direction, stay as they are, and are told of.
        keys: which arrays of a dict are quaternions; None for all whose last dimension is 4.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    events = (HookEvent.BEFORE_TRAINING_STEP, HookEvent.AFTER_FORWARD_PASS, HookEvent.AFTER_LOSS_COMPUTATION)

    def __init__(
        self,
        tolerance: float = 1e-3,
        scalar_first: bool = True,
        action: str = "warn",
        keys: Collection[str] | None = None,
        name: str | None = None,
        priority: int = HookPriority.HIGH,
    ) -> None:
        super().__init__(name, priority=priority)
        _check_tolerance(tolerance)
        if not isinstance(scalar_first, bool):
            raise ConfigurationError(f"scalar_first must be True or False, not {scalar_first!r}")
        if action not in ACTIONS:
            raise ConfigurationError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}")
        if keys is not None and (isinstance(keys, str) or not isinstance(keys, Collection)):
            raise ConfigurationError(f"keys must be a list of names, not {keys!r}")
        self._tolerance, self._action, self._keys = tolerance, action, keys
        self._scalar = 0 if scalar_first else _QUATERNION - 1
        self._counts = dict.fromkeys(("quaternions", "off_norm", "not_finite", "zero", "negative_scalar", "losses"), 0)
        self._worst = 0.0
        self._sum, self._seen = 0.0, 0  # of deviations that are finite

    def execute(self, context: HookContext) -> dict[str, Any] | None:
        """Check what the event brings."""
        if context.event is HookEvent.AFTER_LOSS_COMPUTATION:
            self._counts["losses"] += 1
            bad = sum(map(_not_finite, _values(context.data["loss"])))
            self._counts["not_finite"] += bad
            return self._judge(context, [f"loss has {bad} values that are not finite"] if bad else [], {})
        key = "inputs" if context.event is HookEvent.BEFORE_TRAINING_STEP else "outputs"
        whole = context.data[key]
        missing = [] if self._keys is None or not isinstance(whole, Mapping) else sorted(set(self._keys) - whole.keys())
        problems, normalized = [f"{key}: there is no {name!r}" for name in missing], {}
        for name, array in self._quaternions(key, whole):
            found = self._check(name, array)
            problems += found
            if found and self._action == "normalize":
                normalized[name] = _normalized(array)
        if normalized:
            context.set(key, {**whole, **normalized} if isinstance(whole, Mapping) else normalized[key])
            normalized = {key: context.data[key]}
        return self._judge(context, problems, normalized)

    def summary(self) -> dict[str, Any]:
        """Return what was seen so far.

        Returns:
            Counts: ``quaternions``, ``off_norm``, ``not_finite`` (quaternions and losses), ``zero``,
            ``negative_scalar`` (of which the scalar part is below 0; -q is the same rotation) and ``losses`` (calls);
            ``worst_deviation`` and ``mean_deviation`` of the norms from 1, of those that are finite.
        """
        return {**self._counts, "worst_deviation": self._worst, "mean_deviation": self._sum / max(1, self._seen)}

    def _quaternions(self, key: str, value: Any) -> Iterator[tuple[str, Any]]:
        found = value.items() if isinstance(value, Mapping) else [(key, value)]
        for name, array in found:
            wanted = self._keys is None or not isinstance(value, Mapping) or name in self._keys
            if wanted and tuple(getattr(array, "shape", ()))[-1:] == (_QUATERNION,):
                yield name, array

    def _check(self, name: str, array: Any) -> list[str]:
        """Count what is wrong with an array of quaternions; returns it in words."""
        array = _detached(array)
        norms = _norms(array)
        fine = _finite(norms)
        deviations = abs(norms - 1)
        total, bad = _size(norms), _count(~fine)
        zero = _count(norms == 0)
        off = _count(fine & (deviations > self._tolerance))
        worst = 0.0
        if total > bad:
            finite = deviations[fine]
            worst = float(finite.max())
            self._sum += float(finite.sum())
            self._seen += total - bad
        self._worst = max(self._worst, worst)
        negative = _count(array[..., self._scalar] < 0)
        news = {"quaternions": total, "off_norm": off, "not_finite": bad, "zero": zero, "negative_scalar": negative}
        for count, more in news.items():
            self._counts[count] += more
        problems = [f"{name}: {bad} of {total} quaternions are not finite"] if bad else []
        if off:
            problems.append(f"{name}: the norms of {off} of {total} quaternions are off by up to {worst:.3g}")
        return problems

    def _judge(self, context: HookContext, problems: list[str], normalized: dict[str, Any]) -> dict[str, Any] | None:
        told: dict[str, Any] = {"normalized": normalized} if normalized else {}
        if not problems:
            return None
        text = "; ".join(problems)
        if self._action != "reject":
            log.warning("step %s: %s%s", context.get("step"), text, "; normalized" if normalized else "")
            return {**told, "problems": problems}
        if context.event.can_be_vetoed:
            return {"continue": False, "reason": text}
        raise ValueError(f"step {context.get('step')}: {text}")


class RotationLossValidationHook(BaseHook):
    """Checks that a loss between rotations fits their representation, their shapes, and its own range.

    The loss may be a number, an array, or a dict of these, which all have to be in the range; outputs and targets are
    arrays.

    Args:
        loss: one of ``LOSSES``: ``geodesic``, ``geodesic_degrees``, ``quaternion_angle``, ``quaternion_dot``,
            ``quaternion_chord``, ``chordal`` or ``mse``.
        representation: one of ``REPRESENTATIONS``: ``quaternion``, ``matrix``, ``rotation_6d``, ``axis_angle`` or
            ``euler``.
        reject: whether a loss computation with wrong shapes is vetoed, and a loss out of range is a failure of the
            hook; otherwise both are warnings.
        tolerance: by how much of its range a loss may leave it, for rounding.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used, or a loss that is wrong for the representation; the text
            says why.
    """

    events = (HookEvent.BEFORE_LOSS_COMPUTATION, HookEvent.AFTER_LOSS_COMPUTATION)

    def __init__(
        self,
        loss: str = "geodesic",
        representation: str = "quaternion",
        reject: bool = False,
        tolerance: float = 1e-3,
        name: str | None = None,
        priority: int = HookPriority.HIGH,
    ) -> None:
        super().__init__(name, priority=priority)
        if loss not in LOSSES:
            raise ConfigurationError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
        if representation not in REPRESENTATIONS:
            raise ConfigurationError(
                f"representation must be one of {', '.join(REPRESENTATIONS)}, not {representation!r}"
            )
        _check_tolerance(tolerance)
        self._limit, fitting = LOSSES[loss]
        if representation not in fitting:
            why = _WHY_NOT.get((loss, representation), f"it is made for {', '.join(fitting)}")
            raise ConfigurationError(f"loss {loss} does not fit rotations as {representation}: {why}")
        self._loss, self._shape, self._reject = loss, REPRESENTATIONS[representation], reject
        self._slack = tolerance * (self._limit if self._limit < math.inf else 1.0)
        self._losses = self._out_of_range = self._wrong_shapes = 0
        self._lowest, self._highest = math.inf, -math.inf

    def execute(self, context: HookContext) -> dict[str, Any] | None:
        """Check what the event brings."""
        if context.event is HookEvent.BEFORE_LOSS_COMPUTATION:
            return self._check_shapes(context)
        values = [_detached(value) for value in _values(context.data["loss"])]
        lowest = min((float(v.min()) if hasattr(v, "min") else float(v) for v in values), key=_nan_first)
        highest = max((float(v.max()) if hasattr(v, "max") else float(v) for v in values), key=_nan_last)
        self._losses += 1
        if lowest == lowest and highest == highest:
            self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        if -self._slack <= lowest and highest <= self._limit + self._slack and highest < math.inf:
            return None
        self._out_of_range += 1
        text = f"step {context.get('step')}: {self._loss} loss from {lowest:g} to {highest:g}, not 0 to {self._limit:g}"
        if self._reject:
            raise ValueError(text)
        log.warning("%s", text)
        return {"problems": [text]}

    def summary(self) -> dict[str, Any]:
        """Return ``losses``, ``out_of_range``, ``wrong_shapes`` (counts), and ``lowest`` and ``highest``, or None."""
        seen = self._lowest <= self._highest
        return {
            "losses": self._losses,
            "out_of_range": self._out_of_range,
            "wrong_shapes": self._wrong_shapes,
            "lowest": self._lowest if seen else None,
            "highest": self._highest if seen else None,
        }

    def _check_shapes(self, context: HookContext) -> dict[str, Any] | None:
        shapes = {key: tuple(getattr(context.data[key], "shape", ())) for key in ("outputs", "targets")}
        wanted = "x".join(map(str, self._shape))
        problems = [
            f"{key} have the shape {shape}, which does not end in {wanted}"
            for key, shape in shapes.items()
            if shape[-len(self._shape) :] != self._shape
        ]
        if not problems and shapes["outputs"] != shapes["targets"]:
            problems = [f"outputs have the shape {shapes['outputs']} and targets {shapes['targets']}"]
        if not problems:
            return None
        self._wrong_shapes += 1
        if self._reject:
            return {"continue": False, "reason": "; ".join(problems)}
        log.warning("step %s: %s", context.get("step"), "; ".join(problems))
        return {"problems": problems}


def _detached(array: Any) -> Any:
    """Return the array without its gradients, where it has some: what is computed here is none of the model's."""
    return array.detach() if hasattr(array, "detach") else array


def _norms(array: Any) -> Any:
    return (array * array).sum(-1) ** 0.5


def _normalized(array: Any) -> Any:
    """Return the quaternions divided by their norms; those that have no direction stay as they are."""
    libraries = [base.__module__.partition(".")[0] for base in type(array).__mro__]
    library = next(name for name in libraries if name in ("torch", "numpy", "jax", "jaxlib"))
    where = sys.modules["jax.numpy" if library.startswith("jax") else library].where
    norms = _norms(array)
    usable = (_finite(norms) & (norms > 0))[..., None]
    safe = where(usable, array, 1)  # so that no gradient of 0/0 comes in
    return where(usable, safe / _norms(safe)[..., None], array)


def _finite(array: Any) -> Any:
    return abs(array) < math.inf  # not so for NaN either


def _values(loss: Any) -> list[Any]:
    """Return the losses that there are: numbers or arrays."""
    return list(loss.values()) if isinstance(loss, Mapping) else [loss]


def _not_finite(loss: Any) -> int:
    """Return how many numbers of a loss are not finite."""
    return int(not _finite(loss)) if isinstance(loss, (int, float)) else _count(~_finite(loss))


def _nan_first(value: float) -> tuple[bool, float]:
    return value == value, value


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _check_tolerance(tolerance: object) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ConfigurationError(f"tolerance must be a number between 0 and 1, not {tolerance!r}")


def _count(mask: Any) -> int:
    return int(mask.sum())


def _size(array: Any) -> int:
    return math.prod(array.shape)
