"""A training of PyTorch with all that can make a resumed run differ; a module of its own, so that it loads at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from model_checkpoint import EnhancedCheckpointManager


def train_torch(manager: EnhancedCheckpointManager, steps: int) -> None:
    """Dropout, shuffling by NumPy, noise by Python; saved in the middle of epochs."""
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    data = torch.randn(40, 6)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
        *(torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    average = torch.optim.swa_utils.AveragedModel(model)
    position: dict[str, Any] = {"order": np.random.permutation(40), "at": 0}
    generator = np.random.default_rng(4)
    extra = {"position": position, "average": average, "generator": generator}
    step = manager.restore(model, optimizer, scheduler, extra)["step"] if manager.list_checkpoints() else 0
    while step < steps:
        if position["at"] == 40:
            position.update(order=np.random.permutation(40), at=0)
        rows = data[torch.from_numpy(position["order"][position["at"] : position["at"] + 8])]
        position["at"] += 8
        noise = random.gauss(0, 0.1) + float(generator.normal())
        loss = (model(rows).squeeze(1) - rows.sum(1) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        step += 1
        if step % 3 == 0:
            manager.save_checkpoint(model, optimizer, scheduler, step=step, loss=loss, extra_state=extra)
