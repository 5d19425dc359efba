"""DHVT, the Dynamic Hybrid Vision Transformer (arXiv 2210.05958), as timm's VisionTransformer with plugged layers.

Only what differs from a ViT is here: SOPE (the patch embedding), HI-MHSA (the attention), DAFF (the feed-forward),
and the table of variants. Module and parameter names, and their order, are those of the published checkpoints.

Letters in shape comments: B images, N tokens (class token first), C channels, h heads, d = C / h, H x W patch grid.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, to_2tuple, trunc_normal_
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_notrace_function,
)
from timm.models.vision_transformer import Block
from torch import Tensor, _assert, nn

from models.conv_norm import Foldable, conv_norm, conv_norm_gelu, statistics_kept
from models.variants import register_variants

__all__ = ["DAFF", "DHVT", "SOPE", "Affine", "HeadInteractedAttention"]


class Affine(nn.Module):
    """Scale and shift each channel of [B, C, H, W]: x * alpha + beta."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class SOPE(Foldable):
    """Sequential overlapping patch embedding (section 3.1): [B, in_chans, H, W] -> [B, H'W', C].

    A stack of 3x3 convolutions of stride 2, each with a BatchNorm, between two affine maps. A side of s pixels gives
    ceil(s / patch_size) patches.
    """

    # channels of each convolution as a divisor of C; GELU between the pairs, and after a single one
    DIVISORS = {16: (8, 4, 2, 1), 4: (2, 1), 2: (1,)}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        bias: bool = True,  # timm's ViT passes these two on to every patch embedding
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if patch_size not in self.DIVISORS:
            raise ValueError(f"SOPE knows patch sizes {sorted(self.DIVISORS)}, not {patch_size}")
        if dynamic_img_pad:
            raise ValueError("SOPE has one input size: dynamic_img_pad=True is not supported")
        dd = {"device": device, "dtype": dtype}
        self.patch_size = to_2tuple(patch_size)
        self.set_input_size(img_size)
        layers, dim = [], in_chans
        for divisor in self.DIVISORS[patch_size]:
            out = embed_dim // divisor
            conv = nn.Conv2d(dim, out, 3, stride=2, padding=1, bias=False, **dd)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(out, **dd)), nn.GELU()]
            dim = out
        self.proj = nn.Sequential(*layers[: max(2, len(layers) - 1)])
        self.pre_affine = Affine(in_chans, **dd)
        self.post_affine = Affine(embed_dim, **dd)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"SOPE's patch size is fixed at {self.patch_size[0]}: build another variant")
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return -(-img_size[0] // self.patch_size[0]), -(-img_size[1] // self.patch_size[1])

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2], x.shape[-1]
        # one assertion a side: FX cannot trace the `and` of two comparisons
        _assert(H == self.img_size[0], f"Input height {H} is not the model's {self.img_size[0]}: see set_input_size()")
        _assert(W == self.img_size[1], f"Input width {W} is not the model's {self.img_size[1]}: see set_input_size()")
        x = self.pre_affine(x)
        x = self.proj(x) if torch.jit.is_scripting() else self.project(x)
        return self.post_affine(x).flatten(2).transpose(1, 2)  # B, H'W', C

    def conv_norms(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(pair[0], pair[1]) for pair in self.proj if isinstance(pair, nn.Sequential)]

    def project(self, x: Tensor) -> Tensor:
        """Do what `proj` does, channels-last, so that tokens need no transposition: [B, 3, H, W] -> [B, C, H', W']."""
        x = x.contiguous(memory_format=torch.channels_last)
        activated = len(self.proj) // 2  # every pair but the last, and that one too where it is the only one
        for i, (conv, norm) in enumerate(self.conv_norms()):
            x = conv_norm_gelu(conv, norm, x) if i < activated else conv_norm(conv, norm, x)
        return x  # B, C, H', W'


@torch.fx.wrap
@register_notrace_function  # FX would take the mask, a symbol while it traces, for one that was given
def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("HI-MHSA mixes all tokens in its head tokens: it takes no mask")


class HeadInteractedAttention(Attention):
    """HI-MHSA (section 3.3): one more token a head, through which the heads exchange what they see; [B, N, C] -> same.

    Dropout (`proj_drop`) acts on the output, after the head tokens are merged into the class token.
    """

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads=num_heads, device=device, dtype=dtype, **kwargs)
        dd = {"device": device, "dtype": dtype}
        self.pos_embed = nn.Parameter(torch.empty(1, num_heads, dim, **dd))
        self.ht_proj = nn.Linear(self.head_dim, dim, **dd)
        self.ht_norm = nn.LayerNorm(self.head_dim, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)

    def head_tokens(self, x: Tensor) -> Tensor:
        """Summarise each head's slice of the channels as a token: [B, N, C] -> [B, h, C]."""
        B, _, C = x.shape
        h, d = self.num_heads, self.head_dim
        t = self.ht_proj(x.mean(dim=1).reshape(B, h, d))  # B, h, C
        t = F.gelu(self.ht_norm(t.reshape(B, h, h, d)))  # B, h, h, d
        return t.reshape(B, h, C) + self.pos_embed

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the tokens and, after them, the head tokens: [B, N, C] -> q, k, v of [B, h, N+h, d]."""
        x = torch.cat([x, self.head_tokens(x)], dim=1)  # B, N+h, C
        qkv = self.qkv(x).reshape(x.shape[0], -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def class_weights(self, x: Tensor) -> Tensor:
        """Give what the class token gives each token, the head tokens last: [B, N, C] -> [B, h, N+h], rows of sum 1."""
        q, k, _ = self.split(x)
        return (q[:, :, :1] * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        B, N, C = x.shape
        q, k, v = self.split(x)  # B, h, N+h, d
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            x = self.attn_drop(attn) @ v
        x = self.proj(self.norm(x.transpose(1, 2).reshape(B, -1, C)))  # B, N+h, C
        cls = x[:, :1] + x[:, N:].mean(dim=1, keepdim=True)
        return self.proj_drop(torch.cat([cls, x[:, 1:N]], dim=1))  # B, N, C


class DAFF(Foldable):
    """Dynamic aggregation feed-forward (section 3.2): convolutions over the patches, re-weighting of the class token.

    `grid_size` (H, W) is set by DHVT, which knows the input size. `drop` is accepted for timm's block and unused: the
    published DAFF has no dropout.
    """

    grid_size: tuple[int, int]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        C, D = in_features, hidden_features
        self.grid_size = (0, 0)
        self.act = act_layer()
        self.has_gelu = isinstance(self.act, nn.GELU)
        self.conv1 = nn.Conv2d(C, D, 1, bias=bias, **dd)
        self.conv2 = nn.Conv2d(D, D, 3, padding=1, groups=D, bias=bias, **dd)
        self.conv3 = nn.Conv2d(D, C, 1, bias=bias, **dd)
        self.bn1 = nn.BatchNorm2d(D, **dd)
        self.bn2 = nn.BatchNorm2d(D, **dd)
        self.bn3 = nn.BatchNorm2d(C, **dd)
        self.compress = nn.Linear(C, C // 4, **dd)
        self.excitation = nn.Linear(C // 4, C, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        cls, x = x[:, :1], x[:, 1:]  # B, 1, C and B, HW, C
        x = x.transpose(1, 2).reshape(B, C, self.grid_size[0], self.grid_size[1])  # B, C, H, W: a view, channels last
        x = self.convolve_plainly(x) if torch.jit.is_scripting() or not self.has_gelu else self.convolve(x)
        x = x.flatten(2)  # B, C, HW
        w = self.excitation(self.act(self.compress(x.mean(dim=2)))).unsqueeze(1)  # B, 1, C
        return torch.cat([cls * w, x.transpose(1, 2)], dim=1)  # B, 1+HW, C

    def convolve_plainly(self, x: Tensor) -> Tensor:
        s = self.act(self.bn1(self.conv1(x)))  # B, 4C, H, W
        x = s + self.act(self.bn2(self.conv2(s)))
        return self.bn3(self.conv3(x))  # B, C, H, W

    def convolve(self, x: Tensor) -> Tensor:
        """Do what `convolve_plainly` does, each convolution with its norm and GELU: [B, C, H, W] -> same."""
        s = conv_norm_gelu(self.conv1, self.bn1, x)  # B, 4C, H, W
        x = conv_norm_gelu(self.conv2, self.bn2, s, residual=s)
        return conv_norm(self.conv3, self.bn3, x)  # B, C, H, W

    def conv_norms(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class DHVTBlock(Block):
    """timm's block, which may be computed again in the backward pass; its norms see a batch once all the same."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_checkpointed(x, attn_mask, is_causal)
        return self.forward_once(x, attn_mask, is_causal)

    def forward_once(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def forward_checkpointed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        contexts = partial(_recompute_contexts, self)
        return checkpoint(self.forward_once, x, attn_mask, is_causal, use_reentrant=False, context_fn=contexts)


def _recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), statistics_kept(block)


class DHVT(VisionTransformer):
    """DHVT: SOPE, class token, blocks of HI-MHSA and DAFF, no position embedding. Arguments as timm's ViT.

    The input size is fixed by `img_size` (a number, or height and width) until `set_input_size`; any other is refused.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, **kwargs) -> None:
        super().__init__(
            img_size=img_size,
            pos_embed="none",
            embed_layer=SOPE,
            block_fn=DHVTBlock,
            attn_layer=HeadInteractedAttention,
            mlp_layer=DAFF,
            **kwargs,
        )
        self._set_grid()

    def _set_grid(self) -> None:
        for block in self.blocks:
            block.mlp.grid_size = self.patch_embed.grid_size

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)  # as published; timm starts it at 1e-6

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for block in self.blocks:
            block.grad_checkpointing = enable

    @torch.jit.ignore
    def fold_norms(self) -> None:
        """Fold all batch norms into their convolutions for inference, until `unfold_norms`, `train` or other weights.

        Not again for weights that were changed in place since. Raises RuntimeError in training mode.
        """
        for module in self.modules():
            if isinstance(module, Foldable):
                module.reparameterize()

    @torch.jit.ignore
    def unfold_norms(self) -> None:
        for module in self.modules():
            if isinstance(module, Foldable):
                module.unfold()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    @torch.jit.ignore
    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._set_grid()


def filter_state_dict(state_dict: dict[str, Tensor], model: DHVT) -> dict[str, Tensor]:
    """Fit SOPE's first affine map to a model with other input channels; timm fits the first convolution itself."""
    state_dict = state_dict.get("model", state_dict)
    out = dict(state_dict)
    for name in ("patch_embed.pre_affine.alpha", "patch_embed.pre_affine.beta"):
        if name in out and out[name].shape[1] != model.in_chans:
            out[name] = out[name].mean(dim=1, keepdim=True).expand(-1, model.in_chans, -1, -1).clone()
    return out


def _dhvt(variant: str, pretrained: bool, **kwargs) -> DHVT:
    size, patch_size, embed_dim, num_heads = VARIANTS[variant][:4]
    kwargs = {"patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads, "img_size": size} | kwargs
    return build_model_with_cfg(
        DHVT,
        variant,
        pretrained,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


# name: image size, patch size, C, h, classes
VARIANTS = {
    "dhvt_tiny_cifar_patch4": (32, 4, 192, 4, 100),
    "dhvt_small_cifar_patch4": (32, 4, 384, 8, 100),
    "dhvt_tiny_cifar_patch2": (32, 2, 192, 4, 100),
    "dhvt_small_cifar_patch2": (32, 2, 384, 8, 100),
    "dhvt_tiny_domain_patch16": (224, 16, 192, 4, 345),
    "dhvt_small_domain_patch16": (224, 16, 384, 6, 345),
    "dhvt_tiny_imagenet_patch16": (224, 16, 192, 3, 1000),
    "dhvt_small_imagenet_patch16": (224, 16, 384, 6, 1000),
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": num_classes,
            "input_size": (3, size, size),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj.0.0",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for name, (size, _, _, _, num_classes) in VARIANTS.items()
    }
)


register_variants(__name__, VARIANTS, _dhvt, "DHVT; no weights were ever published, so pretrained=True is an error.")
