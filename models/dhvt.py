"""DHVT, the Dynamic Hybrid Vision Transformer, as timm's VisionTransformer with its layers plugged in.

Paper: Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets,
arXiv 2210.05958. Published code: https://github.com/ArieSeirack/DHVT

Only what differs from a ViT is here: SOPE (patch embedding), HI-MHSA (attention) and DAFF (feed-forward). Names of
modules and parameters, and their order, are those of the published code, so that its checkpoints load. The arguments
of the paper's ablations, and the layers that only they need, are described in ablations.py.

Shape comments: B images, N tokens (class token first), C channels, h heads, d = C / h, H x W patches.
`dd` is the device and dtype of new parameters, as in timm.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, _assert, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.ablations import FFNS, NORMS, check_arguments

# timm adds the names of the variants
__all__ = ["DHVT"]


class GELU(nn.Module):
    """GELU that works in place when gradients are disabled: a new feature map costs page faults on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class Affine(nn.Module):
    """Scale and shift each channel of [B, C, H, W]: x * alpha + beta."""

    def __init__(self, dim: int, **dd) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1, **dd))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class ConvEmbed(PatchEmbed):
    """Patch embedding by padded convolutions: a side of s pixels gives ceil(s / patch_size) patches."""

    # makes timm round the grid up; the padding itself is the convolutions'. A class attribute, since timm's constructor
    # computes the grid before it sets the attribute.
    dynamic_img_pad = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "dynamic_img_pad": True})

    def _init_img_size(self, img_size: int | tuple[int, int]) -> tuple:
        img_size = to_2tuple(img_size)
        grid_size = self.dynamic_feat_size(img_size)
        return img_size, grid_size, grid_size[0] * grid_size[1]


class SOPE(ConvEmbed):
    """Sequential overlapping patch embedding (section 3.1): images [B, in_chans, *, *] -> tokens [B, HW, C].

    3x3 convolutions of stride 2 with batch norms, between two affine maps. Patch size 8 is not in the paper.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        affine: bool = True,
        norm: str = "bn",
        **kwargs,
    ) -> None:
        if patch_size not in (2, 4, 8, 16):
            raise ValueError(f"SOPE has patch sizes 2, 4, 8 and 16, not {patch_size}")
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        dd = get_device_dtype(self)
        # each convolution halves the sides; for patch size 16 they have C / 8, C / 4, C / 2 and C channels
        dims = [embed_dim >> i for i in reversed(range(int(math.log2(patch_size))))]
        layers = []
        for dim, out_dim in pairwise([in_chans, *dims]):
            conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)
            layers.append(nn.Sequential(conv, NORMS[norm](out_dim, **dd)))
            layers.append(GELU())
        # replaces timm's single convolution; no GELU after the last convolution, unless it is the only one
        self.proj = nn.Sequential(*layers[: max(2, len(layers) - 1)])
        self.pre_affine = Affine(in_chans, **dd) if affine else nn.Identity()
        self.post_affine = Affine(embed_dim, **dd) if affine else nn.Identity()

    def reparameterize(self) -> None:
        """Fold the batch norms for inference; timm's `reparameterize_model` calls this on a copy of a model."""
        for i, layer in enumerate(self.proj):
            if isinstance(layer, nn.Sequential) and not isinstance(layer[1], nn.LayerNorm):
                self.proj[i] = fuse_conv_bn_eval(*layer)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        _assert(size == self.img_size, f"Input size {size} is not the model's {self.img_size}: see set_input_size()")
        # channels-last, so that the feature map becomes tokens without a copy
        x = self.pre_affine(x).contiguous(memory_format=torch.channels_last)
        x = self.post_affine(self.proj(x))  # B, C, H, W
        return x.flatten(2).transpose(1, 2)  # B, HW, C


class HeadInteractedAttention(Attention):
    """HI-MHSA (section 3.3): one more token per head, through which the heads interact; [B, N, C] -> [B, N, C].

    Dropout (`proj_drop`) acts on the output, after the head tokens are merged into the class token.
    """

    def __init__(self, dim: int, num_heads: int = 8, proj_drop: float = 0.0, **kwargs) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = get_device_dtype(self)
        # head embedding, by the published name; with weight decay, as published
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim, **dd))  # 1, h, C
        self.ht_proj = nn.Linear(self.head_dim, dim, **dd)
        self.ht_norm = nn.LayerNorm(self.head_dim, **dd)
        self.out_drop = nn.Dropout(proj_drop)

    def init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)

    def append_head_tokens(self, x: Tensor) -> Tensor:
        """Append a token for each head, made from the head's segment of the channels: [B, N, C] -> [B, N+h, C]."""
        h = self.num_heads
        # average pooling over the tokens; each head has its segment of the channels
        t = x.mean(dim=1).unflatten(1, (h, self.head_dim))  # B, h, d
        # linear projection of each segment to all channels, then norm and GELU per segment
        t = self.ht_proj(t).unflatten(2, (h, self.head_dim))  # B, h, h, d
        t = F.gelu(self.ht_norm(t)).flatten(2)  # B, h, C
        # head embedding, and concatenation
        return torch.cat([x, t + self.pos_embed], dim=1)  # B, N+h, C

    def forward(self, x: Tensor, attn_mask=None, is_causal=False) -> Tensor:
        # the last two arguments are accepted for timm's block, and unused
        N = x.shape[1]
        # vanilla multi-head self-attention of all tokens, head tokens included
        x = super().forward(self.append_head_tokens(x))  # B, N+h, C
        # head tokens are averaged and added to the class token
        cls = x[:, :1] + x[:, N:].mean(dim=1, keepdim=True)  # B, 1, C
        return self.out_drop(torch.cat([cls, x[:, 1:N]], dim=1))  # B, N, C


class DAFF(nn.Module):
    """Dynamic aggregation feed-forward (section 3.2); [B, 1+HW, C] -> [B, 1+HW, C].

    DHVT sets `grid_size` (H, W). `norm_layer`, `bias` and `drop` of timm's blocks are unused: the published DAFF has
    batch norms, biases and no dropout. An `act_layer` whose backward pass reads its output (ReLU) cannot be trained.
    The arguments after those are for ablations: see ablations.py.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer=None,
        bias=True,
        drop=0.0,
        shortcut: bool = True,
        aggregate: str = "cls",
        norm: str = "bn",
        **dd,
    ) -> None:
        super().__init__()
        make_norm = NORMS[norm]
        self.shortcut = shortcut
        self.aggregate = aggregate
        self.grid_size = (0, 0)
        self.act = act_layer()
        self.conv1 = nn.Conv2d(in_features, hidden_features, 1, **dd)
        self.conv2 = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features, **dd)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1, **dd)
        self.bn1 = make_norm(hidden_features, **dd)
        self.bn2 = make_norm(hidden_features, **dd)
        self.bn3 = make_norm(in_features, **dd)
        if aggregate != "none":
            self.compress = nn.Linear(in_features, in_features // 4, **dd)
            self.excitation = nn.Linear(in_features // 4, in_features, **dd)

    def reparameterize(self) -> None:
        """Fold the batch norms for inference; timm's `reparameterize_model` calls this on a copy of a model."""
        # folded already, or layer norms
        if not isinstance(self.bn1, nn.BatchNorm2d):
            return
        self.conv1 = fuse_conv_bn_eval(self.conv1, self.bn1)
        self.conv2 = fuse_conv_bn_eval(self.conv2, self.bn2)
        self.conv3 = fuse_conv_bn_eval(self.conv3, self.bn3)
        self.bn1 = self.bn2 = self.bn3 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # split into class token and patch tokens; a view of these is a channels-last feature map
        cls = x[:, :1]  # B, 1, C
        x = x[:, 1:].transpose(1, 2).unflatten(2, self.grid_size)  # B, C, H, W
        # expansion: point-wise convolution
        s = self.act(self.bn1(self.conv1(x)))  # B, 4C, H, W
        # depth-wise convolution with a shortcut, added in place: GELU's backward pass reads its input, not this output
        x = self.act(self.bn2(self.conv2(s)))
        if self.shortcut:
            x += s
        # projection: point-wise convolution
        x = self.bn3(self.conv3(x)).flatten(2)  # B, C, HW
        # squeeze: average pooling over the patches; excitation: weights for the channels of the class token
        if self.aggregate != "none":
            w = self.excitation(self.act(self.compress(x.mean(dim=2))))  # B, C
            cls = cls * w.unsqueeze(1)
            if self.aggregate == "all":
                x = x * w.unsqueeze(2)
        return torch.cat([cls, x.transpose(1, 2)], dim=1)  # B, 1+HW, C


class DHVT(VisionTransformer):
    """SOPE, class token, blocks of HI-MHSA and DAFF; no position embedding. Arguments as timm's ViT.

    The input size is fixed by `img_size` (a number, or height and width) until `set_input_size`. The arguments before
    `act_layer` leave out or replace parts, for the paper's ablations: see ablations.py.
    """

    def __init__(
        self,
        *,
        sope: bool = True,
        daff: bool = True,
        head_tokens: bool = True,
        pos_embed: str = "none",
        affine: bool = True,
        shortcut: bool = True,
        aggregate: str = "cls",
        sope_norm: str = "bn",
        daff_norm: str = "bn",
        ffn: str = "mlp",
        act_layer: type[nn.Module] = GELU,
        **kwargs,
    ) -> None:
        sope_layer = partial(SOPE, affine=affine, norm=sope_norm)
        daff_layer = partial(DAFF, shortcut=shortcut, aggregate=aggregate, norm=daff_norm)
        super().__init__(
            **kwargs,
            act_layer=act_layer,
            class_token=True,
            reg_tokens=0,
            pos_embed=pos_embed,
            embed_layer=sope_layer if sope else PatchEmbed,
            attn_layer=HeadInteractedAttention if head_tokens else Attention,
            mlp_layer=daff_layer if daff else FFNS[ffn],
        )
        # hands the grid to the blocks
        self.set_input_size()

    def set_input_size(self, *args, **kwargs) -> None:
        super().set_input_size(*args, **kwargs)
        for block in self.blocks:
            block.mlp.grid_size = self.patch_embed.grid_size

    def init_weights(self, *args, **kwargs) -> None:
        super().init_weights(*args, **kwargs)
        # as published; timm starts it at 1e-6
        trunc_normal_(self.cls_token, std=0.02)

    # without timm's argument attn_mask, so that FX can trace the forward pass
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs) -> dict:
    # classes, input size, crop ratio, mean and std are timm's defaults (ImageNet) unless given
    return {
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj.0.0",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


# timm reads these; no weights were ever published
default_cfgs = generate_default_cfgs(
    {
        "dhvt_tiny_cifar_patch4": _cfg(num_classes=100, input_size=(3, 32, 32)),
        "dhvt_small_cifar_patch4": _cfg(num_classes=100, input_size=(3, 32, 32)),
        "dhvt_tiny_cifar_patch2": _cfg(num_classes=100, input_size=(3, 32, 32)),
        "dhvt_small_cifar_patch2": _cfg(num_classes=100, input_size=(3, 32, 32)),
        "dhvt_tiny_domain_patch16": _cfg(num_classes=345),
        "dhvt_small_domain_patch16": _cfg(num_classes=345),
        "dhvt_tiny_imagenet_patch16": _cfg(),
        "dhvt_small_imagenet_patch16": _cfg(),
    }
)


def _create_dhvt(variant: str, pretrained: bool, kwargs: dict, **model_args) -> DHVT:
    check_arguments(kwargs)
    return build_model_with_cfg(
        DHVT,
        variant,
        pretrained,
        # without antialiasing, as fine-tuning in this repository
        pretrained_filter_fn=partial(checkpoint_filter_fn, antialias=False),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **dict(model_args, **kwargs),
    )


@register_model
def dhvt_tiny_cifar_patch4(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for 32 px, patch size 4, 100 classes."""
    return _create_dhvt("dhvt_tiny_cifar_patch4", pretrained, kwargs, patch_size=4, embed_dim=192, num_heads=4)


@register_model
def dhvt_small_cifar_patch4(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for 32 px, patch size 4, 100 classes."""
    return _create_dhvt("dhvt_small_cifar_patch4", pretrained, kwargs, patch_size=4, embed_dim=384, num_heads=8)


@register_model
def dhvt_tiny_cifar_patch2(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for 32 px, patch size 2, 100 classes."""
    return _create_dhvt("dhvt_tiny_cifar_patch2", pretrained, kwargs, patch_size=2, embed_dim=192, num_heads=4)


@register_model
def dhvt_small_cifar_patch2(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for 32 px, patch size 2, 100 classes."""
    return _create_dhvt("dhvt_small_cifar_patch2", pretrained, kwargs, patch_size=2, embed_dim=384, num_heads=8)


@register_model
def dhvt_tiny_domain_patch16(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for 224 px, patch size 16, 345 classes (DomainNet)."""
    return _create_dhvt("dhvt_tiny_domain_patch16", pretrained, kwargs, patch_size=16, embed_dim=192, num_heads=4)


@register_model
def dhvt_small_domain_patch16(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for 224 px, patch size 16, 345 classes (DomainNet)."""
    return _create_dhvt("dhvt_small_domain_patch16", pretrained, kwargs, patch_size=16, embed_dim=384, num_heads=6)


@register_model
def dhvt_tiny_imagenet_patch16(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for 224 px, patch size 16, 1000 classes (ImageNet-1k)."""
    return _create_dhvt("dhvt_tiny_imagenet_patch16", pretrained, kwargs, patch_size=16, embed_dim=192, num_heads=3)


@register_model
def dhvt_small_imagenet_patch16(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for 224 px, patch size 16, 1000 classes (ImageNet-1k)."""
    return _create_dhvt("dhvt_small_imagenet_patch16", pretrained, kwargs, patch_size=16, embed_dim=384, num_heads=6)
