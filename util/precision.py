"""How numbers are computed, decided once: mixed precision, loss scaling and memory format."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from util import distributed


def resolve_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of --amp, or None for float32; auto is bf16 or else fp16 on CUDA, and off elsewhere."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if distributed.supports_bf16(device) else "fp16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(amp)


@dataclass
class Precision:
    """Mixed precision and memory format, so that the training loop has no branch for them.

    `dtype` None is float32 throughout. Losses are scaled for fp16 only.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the run's device and memory format, and return it."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        return model.to(self.device, memory_format=memory_format)

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W] in the run's memory format."""
        if not self.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def __str__(self) -> str:
        name = str(self.dtype or torch.float32).removeprefix("torch.")
        return f"{name}, channels-last" if self.channels_last else name
