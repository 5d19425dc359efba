"""How numbers are computed, decided once."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Precision:
    """Mixed precision and memory layout: the loop has no branch for them. `dtype` None is full precision."""

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def lay_out(self, images: Tensor) -> Tensor:
        """Give images [B, C, H, W] in the layout the model wants."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def __str__(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.") + ", channels-last" * self.channels_last
