"""PyTorch's modules, optimizers and the like, by the names that they have without torch.compile and DDP."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from model_checkpoint.checkpoint.objects import Traits
from model_checkpoint.checkpoint.objects.methods import GetStateAdapter, StateDictAdapter
from model_checkpoint.checkpoint.selection import children

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_LIKE_PARAMETERS = {  # names of optimizers' states that have the shape of their parameter
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "ax", "step_size"),
}
_OF_SCHEDULERS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
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

        saved = dict(children(tree) or ())
        if isinstance(value, torch.optim.Optimizer):
            groups = saved.get("param_groups")
            first = groups[0] if isinstance(groups, list) and groups else {}
            return _other_keys(first, value.defaults) or _misshaped(value, saved)
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            return _other_keys(tree, value.state_dict())
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


def _other_keys(tree: Any, own: Mapping[str, Any]) -> str | None:
    """Say that a state is of another class, as where each side has what the other has not; versions add keys only."""
    saved = {str(key) for key, _ in children(tree) or ()} - _OF_SCHEDULERS
    more, fewer = sorted(saved - own.keys()), sorted(own.keys() - saved)
    if more and fewer:
        return f"one of another class was saved: it has {', '.join(more)}, and here are {', '.join(fewer)}"
    return None


def _misshaped(optimizer: Any, saved: Mapping[str, Any]) -> str | None:
    """Say that moments were saved for parameters of another shape: torch takes them, and fails at the next step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in children(saved.get("state", {})) or ():
        for name, node in children(state) or ():
            alike = name in _LIKE_PARAMETERS and isinstance(node, dict) and "shape" in node and str(index).isdecimal()
            if alike and int(index) < len(parameters) and list(parameters[int(index)].shape) != node["shape"]:
                own = list(parameters[int(index)].shape)
                return f"{name} of shape {node['shape']} was saved for parameter {index}, which has shape {own}"
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
