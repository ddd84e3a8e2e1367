"""The states that the benchmarks save and load, made of torch tensors; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class State:
    """Named tensors in host memory, each with storage of its own.

    Attributes:
        name: what ``--state`` calls it.
        parts: ``model`` and ``optimizer`` -> name -> tensor; a state without an optimizer has none there.
    """

    name: str
    parts: dict[str, dict[str, Tensor]]

    @property
    def flat(self) -> dict[str, Tensor]:
        """All tensors in one dict, which is what SafeTensors' own functions take."""
        return {f"{part}.{key}": tensor for part, tensors in self.parts.items() for key, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.flat.values())

    def buffers(self) -> Iterator[memoryview]:
        """Yield the tensors' own memory, as bytes."""
        for tensor in self.flat.values():
            yield memoryview(tensor.reshape(-1).numpy()).cast("B")

    def empty(self) -> dict[str, dict[str, Tensor]]:
        """Return ``parts`` with new tensors of the same shapes, whose memory has not been touched."""
        return {
            part: {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
            for part, tensors in self.parts.items()
        }

    def equals(self, parts: dict[str, dict[str, Tensor]]) -> bool:
        """Whether ``parts`` hold the same tensors, bit for bit."""
        return all(
            tensors.keys() == parts[part].keys() and all(torch.equal(t, parts[part][key]) for key, t in tensors.items())
            for part, tensors in self.parts.items()
        )


def gpt2_shapes() -> Shapes:
    """Return GPT-2 small's 148 parameters, 124,439,808 numbers."""
    width, inner = 768, 3072
    block: Shapes = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for i in range(12):
        shapes |= {f"h.{i}.{key}": shape for key, shape in block.items()}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _adam(shapes: Shapes) -> Shapes:
    """Return what Adam keeps of each parameter."""
    return {
        f"{key}.{name}": kept
        for key, shape in shapes.items()
        for name, kept in (("exp_avg", shape), ("exp_avg_sq", shape), ("step", ()))
    }


def _mixed_shapes() -> Shapes:
    """Return 200 tensors, 150 of them tiny (3 KB), with the bytes of ``large``."""
    tiny: Shapes = {f"bias.{i}": (768,) for i in range(150)}
    rest = prod(_LARGE) - 150 * 768
    return tiny | {f"weight.{i}": (rest // 50,) for i in range(50)}


_LARGE = (15_625, 16_000)  # 1.0 GB in fp32
_SHAPES: dict[str, Callable[[], tuple[Shapes, Shapes]]] = {
    "gpt2": lambda: (gpt2_shapes(), _adam(gpt2_shapes())),  # 592 tensors, 1.49 GB
    "tiny": lambda: ({f"layer.{i}.weight": (1024,) for i in range(2000)}, {}),  # 8.2 MB
    "large": lambda: ({"weight": _LARGE}, {}),
    "mixed": lambda: (_mixed_shapes(), {}),  # 1.0 GB
    "small": lambda: ({f"layer.{i}.weight": (256, 256) for i in range(4)}, {}),  # 1.05 MB
}
STATES = ("gpt2", "tiny", "large")  # those of ``--state``


def build(name: str) -> State:
    """Return a state of random numbers, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    model, optimizer = _SHAPES[name]()
    parts = {
        part: {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
        for part, shapes in (("model", model), ("optimizer", optimizer))
    }
    return State(name, parts)
