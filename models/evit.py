"""EViT (arXiv 2202.07800): a DeiT some of whose blocks keep the tokens that the class token attends to.

Only what differs from timm's VisionTransformer is here: attention that gives the class token's scores, the block that
reorganises tokens, the way of tokens through the model, and the table of variants. Names are those of DeiT's
checkpoints, which load as they are.

Letters in shape comments: B images, N tokens (class token first), P patches, C channels, h heads, d = C / h, k kept
tokens.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, trunc_normal_
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

from models.variants import register_variants

__all__ = ["EViT", "ReorganisingBlock", "ScoringAttention"]


class ScoringAttention(Attention):
    """Attention that can also tell how much the class token attends to each other token; [B, N, C] -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.split(x))

    def forward_scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the output [B, N, C], and the class token's softmax weights for the others [B, N-1], heads averaged.

        The weights are computed beside the attention, so that it stays fused.
        """
        qkv = self.split(x)
        q, k = qkv[0][:, :, :1] * self.scale, qkv[1]
        scores = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # B, h, 1, N
        return self.attend(qkv), scores[:, :, 0, 1:].mean(dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v  # B, h, N, d

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = qkv
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).flatten(2))  # B, N, C
        return self.proj_drop(self.proj(x))


@torch.fx.wrap
@register_notrace_function  # a leaf for FX: whether anything is dropped is not known while it traces
def keep_highest(scores: Tensor, keep: int | None) -> Tensor | None:
    """Give the indices [B, k] of the `keep` highest scores [B, N-1], highest first; None if that is all of them."""
    return None if keep is None or keep >= scores.shape[1] else scores.topk(keep, dim=1)[1]


@torch.fx.wrap
@register_notrace_function
def gather_tokens(x: Tensor, scores: Tensor, index: Tensor | None, fuse: bool) -> Tensor:
    """Go on with the class token, the tokens of `index` [B, k] and, with `fuse`, the rest's sum weighted by score.

    `x` is [B, N, C], `scores` [B, N-1]; gives [B, 1+k, C], or [B, 2+k, C] with the fused token last.
    """
    if index is None:
        return x
    others = x[:, 1:]
    tokens = [x[:, :1], others.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))]
    if fuse:
        rest = scores.scatter(1, index, 0.0).unsqueeze(1)  # B, 1, N-1: the kept ones weigh nothing
        tokens.append(rest.to(x.dtype) @ others)
    return torch.cat(tokens, dim=1)


class ReorganisingBlock(Block):
    """A transformer block that, told how many tokens to keep, drops or fuses the others before its MLP."""

    def __init__(self, *args, drop_loc: Sequence[int] = (), fuse_token: bool = False, depth: int = 0, **kwargs) -> None:
        super().__init__(*args, depth=depth, **kwargs)
        self.reorganises = depth in drop_loc
        self.fuse_token = fuse_token

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """`keep` is the number of tokens to keep besides the class token; None keeps all."""
        return self.forward_indexed(x, keep)[0]

    def forward_indexed(self, x: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Give the tokens, and the indices [B, k] of the kept ones among those besides the class token, or None."""
        if not self.reorganises:
            return self.feed(x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))), None
        out, scores = self.attn.forward_scored(self.norm1(x))
        x = x + self.drop_path1(self.ls1(out))
        index = keep_highest(scores, keep)
        return self.feed(gather_tokens(x, scores, index, self.fuse_token)), index

    def feed(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@torch.fx.wrap
@register_notrace_function
def count_tokens(patches: int, rates: list[float], fuse: bool, override: float | None) -> list[int | None]:
    """Give how many tokens each block keeps besides the class token, of an image of `patches` patches.

    `rates` are the blocks' own keep rates, 1 where a block does not reorganise; `override` takes the place of those
    below 1. None stands for blocks that keep all, from the first on: as tokens only become fewer, either the first
    block that reorganises drops some, or none does. Raises ValueError for an override that is no rate.
    """
    if override is not None and not 0.0 < override <= 1.0:
        raise ValueError(f"keep_rate {override} must be above 0 and at most 1")
    counts: list[int | None] = []
    n, dropping = patches, False
    for own in rates:
        rate = own if override is None or own >= 1.0 else override
        keep = int(math.ceil(rate * n))
        dropping = dropping or keep < n
        if own < 1.0 and dropping:
            counts.append(keep)
            n = keep + 1 if fuse else keep
        else:
            counts.append(None)
    return counts


@torch.compiler.disable
def carry_counts(patches: int, rates: list[float], fuse: bool, override: float) -> Tensor | None:
    """Count as `count_tokens` does, outside of what torch.compile compiles; None when every block keeps all.

    The counts come back as the sizes of an empty tensor, [0, k, k, ...], one for each block that reorganises: sizes
    may vary in a compiled graph from its first call on. A float that sizes depend on would make a new graph each time.
    """
    kept = [count for count in count_tokens(patches, rates, fuse, override) if count is not None]
    if not kept:
        return None
    carrier = torch.empty(0, *kept)
    torch._dynamo.maybe_mark_dynamic(carrier, list(range(1, carrier.ndim)))
    return carrier


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(pos_embed: Tensor, size: tuple[int, int], old_size: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, 1+P, C], class token first, from one grid (H, W) to another, as published."""
    if size == old_size:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, old_size)  # 1, C, H, W
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches = F.interpolate(patches.to(dtype), size=size, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def scatter_back(tokens: Tensor, places: Tensor, patches: int) -> Tensor:
    """Put tokens [B, k, C] at their places [B, k] among the patches: [B, P, C], zero where there is none."""
    B, _, C = tokens.shape
    slots = places.clamp(max=patches).unsqueeze(-1).expand(-1, -1, C)  # fused tokens have a slot that is cut off
    return tokens.new_zeros(B, patches + 1, C).scatter(1, slots, tokens)[:, :patches]


EMBEDDING = {
    "class_token": True,
    "reg_tokens": 0,
    "no_embed_class": False,
    "pos_embed": "learn",
    "patch_drop_rate": 0.0,
}


class EViT(VisionTransformer):
    """DeiT whose blocks of `drop_loc` (counted from 0) keep `base_keep_rate` of the tokens, and drop or fuse the rest.

    Arguments as timm's VisionTransformer. Images of other sizes than `img_size` are taken too, the position embedding
    being resampled for them, as published. With `base_keep_rate` 1 no block reorganises.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        base_keep_rate: float = 0.7,
        drop_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = False,
        depth: int = 12,
        dynamic_img_size: bool = True,
        **kwargs,
    ) -> None:
        if not 0 < base_keep_rate <= 1:
            raise ValueError(f"base_keep_rate {base_keep_rate} must be above 0 and at most 1")
        wrong = [i for i in drop_loc if not (isinstance(i, int) and 0 <= i < depth)]
        if wrong or len(set(drop_loc)) < len(drop_loc):
            raise ValueError(f"drop_loc {tuple(drop_loc)} must be different numbers of blocks, from 0 to {depth - 1}")
        for name, only in EMBEDDING.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"EViT has DeiT's embedding: {name}={kwargs[name]} is not supported, only {only}")
        reorganising = tuple(sorted(drop_loc)) if base_keep_rate < 1 else ()
        block = partial(ReorganisingBlock, drop_loc=reorganising, fuse_token=fuse_token)
        super().__init__(
            img_size=img_size,
            depth=depth,
            dynamic_img_size=dynamic_img_size,
            block_fn=block,
            attn_layer=ScoringAttention,
            **kwargs,
        )
        self.drop_loc = tuple(sorted(drop_loc))
        self.base_keep_rate, self.fuse_token = float(base_keep_rate), fuse_token
        self.keep_rates = [float(base_keep_rate) if i in reorganising else 1.0 for i in range(depth)]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)  # as published; timm starts it at 1e-6

    @torch.jit.ignore
    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.patch_embed.grid_size != old:
            resampled = resample_pos_embed(self.pos_embed.detach(), self.patch_embed.grid_size, old)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # finds the embedding fitting

    def _pos_embed(self, x: Tensor) -> Tensor:
        pos_embed = self.pos_embed
        if self.dynamic_img_size:  # x is B, H, W, C
            pos_embed = resample_pos_embed(pos_embed, (x.shape[1], x.shape[2]), self.patch_embed.grid_size)
            x = x.flatten(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # B, N, C
        return self.pos_drop(x + pos_embed)

    def forward(self, x: Tensor, keep_rate: float | None = None) -> Tensor:
        """Classify images [B, in_chans, H, W]; `keep_rate` takes the place of the blocks' own, where they have one."""
        P = self.count_patches(x)
        if keep_rate is not None and not torch.jit.is_scripting() and torch.compiler.is_compiling():
            carrier = carry_counts(P, self.keep_rates, self.fuse_token, keep_rate)
            sizes = iter(() if carrier is None else carrier.shape[1:])
            counts = [None if carrier is None or rate == 1.0 else next(sizes) for rate in self.keep_rates]
        else:
            counts = count_tokens(P, self.keep_rates, self.fuse_token, keep_rate)
        return self.forward_head(self.forward_counted(x, counts))

    def forward_features(self, x: Tensor, keep_rate: float | None = None) -> Tensor:
        """Give the tokens that are left after the last block, the class token first, normalised: [B, N, C]."""
        return self.forward_counted(x, count_tokens(self.count_patches(x), self.keep_rates, self.fuse_token, keep_rate))

    def forward_counted(self, x: Tensor, counts: list[int | None]) -> Tensor:
        """Give the normalised tokens when block i keeps `counts[i]` of them besides the class token; None: all."""
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, counts[i])
            else:
                x = block(x, counts[i])
        return self.norm(x)

    def embed(self, x: Tensor) -> Tensor:
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def count_patches(self, x: Tensor) -> int:
        H, W = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return H * W

    def walk(self, x: Tensor, keep_rate: float | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's tokens [B, N, C] and the places [B, N-1] of those besides the class token.

        A place is the number of the patch that a token is, row by row; a token that block i fused has number P + i.
        """
        P = self.count_patches(x)
        counts = count_tokens(P, self.keep_rates, self.fuse_token, keep_rate)
        x = self.embed(x)
        places = torch.arange(P, device=x.device).expand(len(x), P)
        for i, block in enumerate(self.blocks):
            step = block.forward_indexed
            x, index = checkpoint(step, x, counts[i]) if self.grad_checkpointing else step(x, counts[i])
            if index is not None:
                places = places.gather(1, index)
                if self.fuse_token:
                    places = F.pad(places, (0, 1), value=P + i)
            yield x, places

    def trace_tokens(self, x: Tensor, keep_rate: float | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Give the logits, and for each block of `drop_loc` the places of the tokens after it: see `walk`."""
        places = {}
        for i, step in enumerate(self.walk(x, keep_rate)):
            if i in self.drop_loc:
                places[i] = step[1]
        return self.forward_head(self.norm(step[0])), places

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        keep_rate: float | None = None,
    ) -> list | tuple[Tensor, list] | dict[str, Any]:
        """As timm's, with full grids: a kept token stands at its patch's place, and zeros where a patch was dropped.

        `keep_rate` as in `forward`. Raises ValueError for masks, and for an `output_fmt` that is not NCHW or NLC.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("EViT's tokens change their number and places: it takes no mask")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt} must be NCHW or NLC")
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        maps, prefixes = [], []
        for i, (tokens, places) in enumerate(self.walk(x, keep_rate)):
            if i in take:
                y = self.norm(tokens) if norm else tokens
                full = scatter_back(y[:, 1:], places, grid[0] * grid[1])  # B, P, C
                maps.append(full.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else full)
                prefixes.append(y[:, :1])
            if stop_early and i == last:
                break
        if output_dict:
            found = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            return found if intermediates_only else found | {"image_features": self.norm(tokens)}
        maps = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return maps if intermediates_only else (self.norm(tokens), maps)


def _evit(variant: str, pretrained: bool, **kwargs) -> EViT:
    embed_dim, num_heads = VARIANTS[variant]
    kwargs = {"patch_size": 16, "embed_dim": embed_dim, "num_heads": num_heads} | kwargs
    return build_model_with_cfg(
        EViT,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, antialias=False),  # as published; timm antialiases
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


# name: C, h
VARIANTS = {
    "deit_tiny_patch16_shrink_base": (192, 3),
    "deit_small_patch16_shrink_base": (384, 6),
    "deit_base_patch16_shrink_base": (768, 12),
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for name in VARIANTS
    }
)


register_variants(__name__, VARIANTS, _evit, "EViT; DeiT's checkpoints load as they are.")
