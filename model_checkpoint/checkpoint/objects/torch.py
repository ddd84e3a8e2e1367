"""PyTorch's modules, optimizers and the like, by the names that they have without torch.compile and DDP."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from model_checkpoint.checkpoint.objects import Traits
from model_checkpoint.checkpoint.objects.methods import GetStateAdapter, StateDictAdapter
from model_checkpoint.checkpoint.selection import children

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_LIKE_PARAMETERS = {  # names of optimizers' states that have the shape of their parameter
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "ax", "step_size"),
}
_COMMON = {  # options of many optimizers, and what every scheduler has
    *("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused", "capturable", "eps"),
    *("base_lrs", "last_epoch", "verbose"),
}
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of a part of a module
_WRAPPED = "module."  # what DDP and DataParallel put before all names


class TorchAdapter(StateDictAdapter):
    """Whatever of torch has ``state_dict()``; what wraps a module is taken off."""

    def owns(self, value: object) -> bool:
        return super().owns(value) or GetStateAdapter().owns(value)

    def traits(self, value: object) -> Traits:
        import torch  # its own object is here, so it is loaded

        if not super().owns(value):
            return GetStateAdapter().traits(value)
        if isinstance(value, torch.nn.Module):
            return Traits(setter="load_state_dict", plain_name=_plain_name)
        return super().traits(value)._replace(grows=not isinstance(value, torch.optim.Optimizer))

    def objection(self, value: Any, tree: Any) -> str | None:
        import torch  # its own object is here, so it is loaded

        if isinstance(value, torch.optim.Optimizer):
            saved = dict(pair for pair in children(tree) or () if isinstance(pair[0], str))
            groups = [_text_keys(group) for _, group in children(saved.get("param_groups")) or ()]
            other = _other_class(groups[0], value.defaults) if groups else None
            own = type(value).__module__.startswith("torch.optim")  # what others keep of a parameter may have any shape
            return other or (_misshaped(value, saved.get("state"), groups) if own else None)
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            return _other_class(_text_keys(tree), value.state_dict())
        return None

    def state_of(self, value: Any) -> object:
        if not super().owns(value):
            return GetStateAdapter().state_of(value)
        state: Any = super().state_of(unwrapped(value))
        if not any(_is_compiled(key) for key in state):
            return state
        made = _renamed(state, _without_compiled)
        if len(made) != len(state):
            raise ValueError(f"two of its keys are one without {_COMPILED!r}; save its state_dict() under other names")
        return made

    def put_back(self, value: Any, state: Any) -> object:
        if not super().owns(value):
            return GetStateAdapter().put_back(value, state)
        inner = unwrapped(value)
        if self.traits(inner).complete:
            names = {_without_compiled(key): key for key in inner.state_dict() if _is_compiled(key)}
            state = _renamed(state, lambda key: names.get(key, key)) if names else state
        super().put_back(inner, state)
        return value


def unwrapped(value: Any) -> Any:
    """Return the module within torch.compile's, DDP's and DataParallel's wrappers."""
    while type(value).__module__.partition(".")[0] == "torch" and type(value).__name__ in _WRAPPERS:
        value = getattr(value, _WRAPPERS[type(value).__name__])
    return value


def _without_compiled(key: str) -> str:
    return key.replace(_COMPILED, "")


def _plain_name(key: str) -> str:
    return _without_compiled(key).removeprefix(_WRAPPED)


def _text_keys(tree: Any) -> dict[str, Any]:
    return {key: node for key, node in children(tree) or () if isinstance(key, str)}


def _other_class(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Say that a state is of another class: of what only this one has, nothing was saved.

    Versions of torch add and drop keys, schedulers and users add some to an optimizer's groups.
    """
    special = {key for key in own if key not in _COMMON and not key.startswith("_")}
    if special and special.isdisjoint(saved):
        return f"one of another class was saved: it has {', '.join(saved)}, and none of {', '.join(sorted(special))}"
    return None


def _misshaped(optimizer: Any, saved: Any, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Say that moments were saved for parameters of another shape: torch takes them, and fails at the next step."""
    shapes = {
        index: list(parameter.shape)
        for group, own in zip(groups, optimizer.param_groups)
        for (_, index), parameter in zip(children(group.get("params")) or (), own["params"])
        if isinstance(index, int)
    }
    for index, state in children(saved) or ():
        shape = shapes.get(int(index)) if str(index).isdecimal() else None
        for name, node in _text_keys(state).items():
            told = node.get("shape") if isinstance(node, dict) else None
            if shape is not None and name in _LIKE_PARAMETERS and told and told != shape:
                return f"{name} of shape {told} was saved for parameter {index}, which has shape {shape}"
    return None


def _is_compiled(key: object) -> bool:
    return isinstance(key, str) and _COMPILED in key


def _renamed(state: Any, name: Any) -> Any:
    made = OrderedDict((name(key), value) for key, value in state.items())
    if hasattr(state, "_metadata"):  # versions of each module's layout
        made._metadata = OrderedDict(  # type: ignore[attr-defined]
            (name(f"{key}.")[:-1] if key else key, value) for key, value in state._metadata.items()
        )
    return made
