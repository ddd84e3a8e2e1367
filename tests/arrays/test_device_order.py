"""The order of copies from a GPU, with a stand-in for it: streams here do their work only when they are waited for.

A real one is tested in test_cuda.py, where there is one. What a stand-in can show is what the adapter asks for: a
stream of its own that waits for what training has queued, copies to pinned memory that do not block, memory that is not
given away before it is read, and nobody reading the copies before they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers_storage import needs_torch, torch

from model_checkpoint.arrays import adapter_for
from model_checkpoint.arrays.torch import TorchAdapter
from model_checkpoint.checkpoint.state import encode

pytestmark = needs_torch


class Stream:
    """Work in its order, done when somebody waits for it."""

    def __init__(self, device: object = None) -> None:
        self.queued: list[Callable[[], object]] = []

    def wait_stream(self, other: Stream) -> None:
        self.queued.append(other.synchronize)

    def synchronize(self) -> None:
        while self.queued:
            self.queued.pop(0)()


class Gpu:
    """What of ``torch.cuda`` the adapter uses.

    Attributes:
        training: the stream that training uses.
        current: the one that copies go to now.
        made: the streams that were made.
        pinned: how many copies went to pinned memory.
        recorded: the tensors whose memory is kept for a stream.
    """

    def __init__(self) -> None:
        self.training = self.current = Stream()
        self.made: list[Stream] = []
        self.pinned = 0
        self.recorded: list[tuple[int, Stream]] = []

    def make(self, device: object) -> Stream:
        self.made.append(Stream(device))
        return self.made[-1]

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu, empty = Gpu(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", gpu.make)
    monkeypatch.setattr(torch.cuda, "stream", gpu.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Any:
        gpu.pinned += pin_memory
        return empty(*shape, **options)  # this build of torch cannot pin

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(
        "model_checkpoint.arrays._loaded", {"model_checkpoint.arrays.torch:TorchAdapter": TorchAdapter()}
    )
    monkeypatch.setattr("model_checkpoint.checkpoint.state._TO_HOST", {})
    return gpu


def on(gpu: Gpu, values: list[float]) -> Any:
    """Return a tensor that says it is on the GPU; copies of it wait in the current stream if they do not block."""

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda:0"))

        def record_stream(self, stream: Stream) -> None:
            gpu.recorded.append((self.data_ptr(), stream))

        def cpu(self) -> Any:
            raise AssertionError("a copy that waits for the GPU")

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
                target, source = args[0], args[1].as_subclass(torch.Tensor)
                gpu.current.queued.append(lambda: target.copy_(source))
                return target
            return super().__torch_function__(function, types, args, kwargs or {})

    return torch.tensor(values).as_subclass(OnGpu)


def test_copies_hold_what_was_queued_before_them_and_are_whole_when_the_state_is_taken(gpu: Gpu) -> None:
    first, second = on(gpu, [1.0, 2.0]), on(gpu, [3.0])
    plain = first.as_subclass(torch.Tensor)
    gpu.training.queued.append(lambda: plain.mul_(10))  # training has queued it, and it is not done yet
    state = encode({"model": {"first": first, "second": second, "here": torch.tensor([7.0])}})
    found = {key: torch.frombuffer(a.data, dtype=torch.float32).tolist() for key, a in state.arrays["model"].items()}
    assert found == {"first": [10.0, 20.0], "second": [3.0], "here": [7.0]}
    (side,) = gpu.made  # one stream, and not that of training
    assert side is not gpu.training
    assert gpu.pinned == 2
    assert gpu.recorded == [(first.data_ptr(), side), (second.data_ptr(), side)]
    assert all(state.arrays["model"][key].immutable for key in ("first", "second"))  # no snapshot copies them again


def test_looking_at_what_a_target_is_copies_nothing(gpu: Gpu) -> None:
    target = on(gpu, [1.0, 2.0])
    adapter = adapter_for(type(target))
    assert adapter is not None
    found = adapter.describe(target)
    assert found is not None
    assert (found.dtype, found.shape, found.data.nbytes) == ("float32", (2,), 0)
    assert (gpu.made, gpu.pinned, gpu.training.queued) == ([], 0, [])
