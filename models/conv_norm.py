"""A convolution, its batch norm and the GELU after them, run together: cheaper, with the results of the modules.

Three ways, which `conv_norm` and `conv_norm_gelu` choose from:
- folded, for inference: the norm is part of the convolution's weights, and the GELU overwrites what it is given;
- saving, for training on the CPU in eager mode: the norm's output is computed again in the backward pass instead of
  being kept, and the GELU and the sum after it overwrite it;
- the modules as they are: for torch.compile, which fuses by itself, on accelerators, and under autocast.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve [B, C, H, W] and normalise; one convolution where the norm is folded into it."""
    weight = getattr(conv, "folded_weight", None)
    if weight is None:
        return norm(conv(x))
    return F.conv2d(x, weight, conv.folded_bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_norm_gelu(conv: nn.Conv2d, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Give GELU(norm(conv(x))), plus `residual` if there is one."""
    if getattr(conv, "folded_weight", None) is not None:
        return _gelu_over(conv_norm(conv, norm, x), residual)
    if type(norm) is nn.BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None:
        statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        return _norm_gelu(conv(x), residual, norm.weight, norm.bias, *statistics, norm.momentum, norm.eps)
    y = F.gelu(norm(conv(x)))
    return y if residual is None else residual + y


@torch.fx.wrap
@register_notrace_function  # a leaf for FX: the tensor's device, dtype and whether gradients are wanted decide
def _norm_gelu(
    y: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    num_batches_tracked.add_(1)
    if y.device.type == "cpu" and y.dtype == weight.dtype and not torch.compiler.is_compiling():
        return NormGELU.apply(y, residual, weight, bias, running_mean, running_var, momentum, eps)
    y = F.gelu(F.batch_norm(y, running_mean, running_var, weight, bias, True, momentum, eps))
    return y if residual is None else residual + y


@torch.fx.wrap
@register_notrace_function
def _gelu_over(y: Tensor, residual: Tensor | None) -> Tensor:
    """Give GELU(y), plus `residual` if there is one, in the memory of `y` where no gradient needs it."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and y.requires_grad):
        y = F.gelu(y)
        return y if residual is None else residual + y
    y = aten.gelu_(y)
    return y if residual is None else y.add_(residual)


class NormGELU(torch.autograd.Function):
    """GELU(batch norm(y)) + residual with the batch's statistics; of the maps, only `y` is kept for the backward pass.

    The norm's output is what its statistics make of `y` by a product and a sum: as cheap to compute again as to read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, invstd = torch.native_batch_norm(y, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(y, weight, bias, mean, invstd)
        ctx.eps = eps
        out = aten.gelu_(out)
        return out if residual is None else out.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, invstd = ctx.saved_tensors
        scale = weight * invstd
        z = torch.addcmul((bias - mean * scale)[:, None, None], y, scale[:, None, None])  # the norm's output
        dz = aten.gelu_backward.grad_input(grad, z, grad_input=z)
        dy, dweight, dbias = aten.native_batch_norm_backward(
            dz,
            y,
            weight,
            None,
            None,
            mean,
            invstd,
            True,
            ctx.eps,
            ctx.needs_input_grad[0:1] + ctx.needs_input_grad[2:4],
        )
        return dy, grad if ctx.needs_input_grad[1] else None, dweight, dbias, None, None, None, None


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Put a norm's statistics, scale and shift into a second set of the convolution's weights.

    They are buffers, so that they follow `.to()` and copies, and no part of the state dict, which stays as it was.
    """
    wide = torch.float32 if conv.weight.device.type == "mps" else torch.float64  # the widest there
    scale = norm.weight.to(wide) * (norm.running_var.to(wide) + norm.eps).rsqrt()
    shift = norm.bias.to(wide) - norm.running_mean.to(wide) * scale
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide) * scale
    weight = (conv.weight.to(wide) * scale[:, None, None, None]).to(conv.weight)
    conv.register_buffer("folded_weight", weight, persistent=False)
    conv.register_buffer("folded_bias", shift.to(conv.weight), persistent=False)


class Foldable(nn.Module):
    """What SOPE and DAFF share: their norms can be folded, until they train or load other weights.

    `reparameterize` is what timm's `reparameterize_model` looks for.
    """

    def conv_norms(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        raise TypeError(f"{type(self).__name__} does not list its convolutions and norms")

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norms for inference; again is no change. Raises RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("norms are folded for inference: call eval() first")
        for conv, norm in self.conv_norms():
            if getattr(conv, "folded_weight", None) is None:
                fold(conv, norm)

    @torch.jit.ignore
    def unfold(self) -> None:
        """Go back to the norms themselves."""
        for conv, _ in self.conv_norms():
            for name in ("folded_weight", "folded_bias"):
                conv._buffers.pop(name, None)
                conv._non_persistent_buffers_set.discard(name)

    def train(self, mode: bool = True) -> "Foldable":
        if mode:
            self.unfold()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)


@contextmanager
def statistics_kept(module: nn.Module):
    """Leave the running statistics of a module's norms alone: while it is computed again, they have seen the batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
