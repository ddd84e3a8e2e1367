"""Tensors of a GPU: copied to pinned memory on a stream of their own, and snapshot like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_storage import Store, torch

pytestmark = pytest.mark.skipif(torch is None or not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, max_checkpoints=None)


@pytest.mark.parametrize("blocking", [True, False])
def test_what_was_queued_before_a_save_is_in_it_and_what_comes_after_is_not(store: Store, blocking: bool) -> None:
    weight = torch.zeros(4096, 4096, device="cuda")
    saved = []
    for count in range(8):
        for _ in range(50):
            weight.add_(0.02)  # queued on the GPU, not done when the save begins
        weight.fill_(count)
        saved.append(store.save({"weight": weight, "turned": weight.t()}, epoch=count, blocking=blocking))
        weight.fill_(-1.0)
    store.manager.wait()
    for count, checkpoint in enumerate(saved):
        state = store.load(checkpoint)["model_state_dict"]
        assert state["weight"].device.type == "cpu"
        assert torch.equal(state["weight"], torch.full((4096, 4096), float(count)))
        assert torch.equal(state["turned"], torch.full((4096, 4096), float(count)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "bool", "uint8", "float8_e4m3fn"])
def test_every_dtype_comes_back_bit_for_bit(store: Store, dtype: str) -> None:
    bits = torch.randint(0, 2 if dtype == "bool" else 100, (333, 8), dtype=torch.uint8)
    there = bits.view(getattr(torch, dtype)).cuda()
    back = store.load(store.save({"t": there, "slice": there[5:9], "empty": there[:0]}), device="cuda")
    state = back["model_state_dict"]
    assert state["t"].device.type == "cuda"
    assert torch.equal(state["t"].view(torch.uint8).cpu(), bits)
    assert torch.equal(state["slice"].contiguous().view(torch.uint8).cpu(), bits[5:9])
    assert state["empty"].shape == there[:0].shape


def test_a_model_on_the_gpu_is_loaded_in_its_place(store: Store) -> None:
    net = torch.nn.Linear(64, 64).cuda()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 64, device="cuda")).sum().backward()
    optimizer.step()
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    checkpoint = store.save(net, optimizer)
    where = [parameter.data_ptr() for parameter in net.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    store.manager.load_into(net, optimizer, checkpoint_id=checkpoint)
    assert [parameter.data_ptr() for parameter in net.parameters()] == where
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moment)
