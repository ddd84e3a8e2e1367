"""What Lightning's Trainer saves: one dict, with the state of everything that takes part in training."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.foreign.parts import Foreign, sort_parts, storable
from model_checkpoint.checkpoint.state import encode


def take_apart(content: dict[str, Any]) -> Foreign:
    """Return the parts; of several optimizers and schedulers a list, of one its state.

    What is neither model, optimizer nor scheduler becomes ``extra`` under its own name, without what has no safe form.
    """
    parts = dict(content)
    for name in ("optimizer_states", "lr_schedulers"):
        states = parts.get(name)
        if isinstance(states, list) and len(states) < 2:
            parts[name] = states[0] if states else None
    sorted_ = sort_parts(parts, ("state_dict",))
    left_out: list[str] = []
    extra = storable(sorted_.extra, "extra_state", left_out, encode)
    return sorted_._replace(extra=extra, left_out=tuple(left_out))
