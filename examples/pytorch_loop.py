"""A plain PyTorch loop that can be killed at any moment and run again: it ends with the bits of an unbroken run.

``python examples/pytorch_loop.py``, where ``pip install 'model-checkpoint[torch]'`` was run. It writes into the
folder that it is started in.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from model_checkpoint import EnhancedCheckpointManager, resume_or_start

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

torch.manual_seed(0)
inputs = torch.randn(100, 8)
targets = inputs.sum(1, keepdim=True)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
epoch: dict[str, Any] = {"order": torch.randperm(100), "next": 0}  # where training is in the data

with resume_or_start("pytorch loop") as tracker:
    manager = EnhancedCheckpointManager(tracker, "checkpoints", async_save=True)
    step = manager.restore(model, optimizer, scheduler, epoch)["step"] if manager.list_checkpoints() else 0
    print(f"at step {step}")
    while step < options.steps:
        if epoch["next"] >= 100:
            epoch.update(order=torch.randperm(100), next=0)
        rows = epoch["order"][epoch["next"] : epoch["next"] + 16]
        epoch["next"] += 16
        loss = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step += 1
        tracker.log_metric("loss", loss.item(), step)
        manager.save_checkpoint(model, optimizer, scheduler, step=step, loss=loss, extra_state=epoch)
    manager.close()
print("sum of all weights:", sum(weight.double().sum().item() for weight in model.parameters()))
