"""A dataset whose examples differ each time, so that a resumed run shows whether the random states are right."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset


class Noisy(Dataset):  # type: ignore[type-arg]
    """Draws from the process's random states whenever an example is fetched."""

    def __init__(self) -> None:
        self.x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 0.1 * torch.randn(6), self.x[i].sum()
