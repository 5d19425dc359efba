"""How numbers are computed, decided once: mixed precision, loss scaling, attention and memory format."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from util import distributed

# what --amp takes, and the dtype of each
DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
AMP_FLAG = (
    "--amp",
    ("auto", *DTYPES),
    "auto",
    "mixed precision; auto: bf16 where the device computes it natively, else fp16 on CUDA, else off",
)


def resolve_amp(amp: str, device: torch.device) -> str:
    """Return what --amp auto is on a device, and print why; return other values as they are."""
    if amp != "auto":
        return amp
    native = distributed.supports_bf16(device)
    amp = "bf16" if native else "fp16" if device.type == "cuda" else "off"
    distributed.print0(f"--amp {amp}: this {device.type} {'computes' if native else 'does not compute'} bf16 natively")
    return amp


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 under autocast too: logits in half precision would tie."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


@dataclass
class Precision:
    """Mixed precision and memory format, so that the training loop has no branch for them.

    `dtype` None means float32 throughout. Losses are scaled for fp16 only. Weights, statistics of norm layers, EMA,
    losses and the logits of a linear classifier are float32 whatever `dtype` is.
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

    @property
    def fused_attn(self) -> bool:
        """Whether to use torch's fused attention, and not two products and a softmax: see BENCHMARKS.md."""
        return self.device.type != "cpu" or self.dtype is None

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the run's device and memory format, choose its attention, and return it."""
        for module in model.modules():
            if not self.fused_attn and hasattr(module, "fused_attn"):
                module.fused_attn = False
        if self.dtype is not None:
            # one, or two in distilled models; models that are not timm's have no such method
            classifiers = getattr(model, "get_classifier", tuple)()
            for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
                if type(classifier) is nn.Linear:
                    # in place: parameters, hooks and the module's name stay as they are
                    classifier.__class__ = Float32Linear
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
