"""The random states of the process, put back: what ``state.random_states`` noted at a save."""

from __future__ import annotations

import logging
import random
import sys
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.utils.optional import require

log = logging.getLogger(__name__)

Setter = Callable[[], object]


def setters(saved: Any) -> list[Setter]:
    """Return calls that put back what was saved, of Python and of the libraries that are imported.

    Whatever can be wrong with it is found here, before the first of them is called.

    Args:
        saved: as ``state.random_states`` returned it; None where nothing was saved.

    Raises:
        FormatError, ValueError, KeyError, TypeError: it is no such thing.
        ConfigurationError: NumPy's global generator is of another kind now.
    """
    if saved is None:
        return []
    if not isinstance(saved, dict):
        raise FormatError("the random states are no JSON object")
    found = []
    for name, module, make in _LIBRARIES:
        if name in saved and module in sys.modules:
            found += make(saved[name])
    return found


def _python(saved: Any) -> list[Setter]:
    state = (saved["version"], tuple(array("I", bytes.fromhex(saved["words"]))), saved["gauss"])
    random.Random().setstate(state)  # raises for what is no state
    return [partial(random.setstate, state)]


def _numpy(saved: Any) -> list[Setter]:
    import numpy as np

    own = np.random.get_state(legacy=False)["bit_generator"]
    if own != saved["bit_generator"]:
        raise ConfigurationError(
            f"NumPy's global generator is {own}, and was {saved['bit_generator']} when the checkpoint was saved; "
            "call numpy.random.set_bit_generator() as then, or pass restore_rng=False"
        )
    if not hasattr(np.random, own):
        raise ConfigurationError(f"NumPy's global generator is a {own} of your own; pass restore_rng=False")
    dtype = _WORDS.get(own, "uint64")

    def arrays(parts: dict[str, Any]) -> dict[str, Any]:
        return {name: np.array(part, dtype=dtype) if isinstance(part, list) else part for name, part in parts.items()}

    state = arrays({**saved, "state": arrays(saved["state"])})
    np.random.RandomState(getattr(np.random, own)()).set_state(state)
    return [partial(np.random.set_state, state)]


def _torch(saved: Any) -> list[Setter]:
    import torch

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8, device="cpu")

    torch.Generator().set_state(tensor(saved["cpu"]))
    found: list[Setter] = [partial(torch.set_rng_state, tensor(saved["cpu"]))]
    devices = torch.cuda.device_count() if saved["cuda"] else 0
    if devices < len(saved["cuda"]):
        log.warning("random states of %d GPUs were saved, and %d are here", len(saved["cuda"]), devices)
    found += [partial(torch.cuda.set_rng_state, tensor(text), i) for i, text in enumerate(saved["cuda"][:devices])]
    return found


def _tensorflow(saved: Any) -> list[Setter]:
    tf = _tf()

    found: list[Setter] = []
    if saved["seed"] is not None:
        state = (3, tuple(saved["words"]), saved["gauss"])
        random.Random().setstate(state)
        found.append(partial(_seed_tensorflow, saved["seed"], state))
    if saved["generator"] is not None:
        made = tf.random.Generator.from_state(saved["generator"]["state"], saved["generator"]["alg"])
        found.append(partial(_reset_global, made))
    return found


def _tf() -> Any:
    return require("tensorflow", "tensorflow", "restoring random states")


def _seed_tensorflow(seed: int, state: Any) -> None:
    tf = _tf()
    context = require("tensorflow.python.eager.context", "tensorflow", "restoring random states")

    tf.random.set_seed(seed)
    context.context()._rng.setstate(state)  # what op seeds are drawn from; TensorFlow has no public name for it


def _reset_global(made: Any) -> None:
    tf = _tf()

    own = tf.random.get_global_generator()
    if own.algorithm == made.algorithm:
        own.state.assign(made.state)  # compiled functions go on using the variable
    else:
        tf.random.set_global_generator(made)


def _keras(saved: Any) -> list[Setter]:
    module = require("keras.src.random.seed_generator", "keras", "restoring random states")
    return [lambda: module.global_seed_generator().state.assign(saved)]


_WORDS = {"MT19937": "uint32"}  # of NumPy's bit generators; the others have 64 bits
# The name in the state, the module without which nobody can have drawn a number, and what makes its setters.
_LIBRARIES: list[tuple[str, str, Callable[[Any], list[Setter]]]] = [
    ("python", "random", _python),
    ("numpy", "numpy.random", _numpy),
    ("torch", "torch", _torch),
    ("tensorflow", "tensorflow", _tensorflow),
    ("keras", "keras", _keras),
]
