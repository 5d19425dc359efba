"""EViT: a DeiT in which some blocks keep the tokens that the class token attends to, and drop or fuse the others.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800.
Published code: https://github.com/youweiliang/evit

Only what differs from timm's VisionTransformer is here. Parameters have DeiT's names, so that its checkpoints load.

Shape comments: B images, N tokens (class token first), P patches, C channels, h heads, d = C / h, k kept tokens.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

# timm adds the names of the variants
__all__ = ["EViT"]


class ScoringAttention(Attention):
    """Self-attention that also scores the tokens: how much the class token attends to each (attentiveness)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, N, C], and the scores [B, N-1] of the tokens after the class token."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # B, N, 3, h, d
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B, h, N, d
        k = self.k_norm(k)
        q = self.q_norm(q)
        # the class token's row of the attention matrix, computed separately so that the attention can stay fused
        scores = (q[:, :, :1] * self.scale @ k.transpose(2, 3)).softmax(dim=-1)  # B, h, 1, N
        scores = scores[:, :, 0, 1:].mean(dim=1)  # B, N-1
        # the attention itself, as timm's
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        else:
            attn = (q * self.scale @ k.transpose(2, 3)).softmax(dim=-1)  # B, h, N, N
            x = self.attn_drop(attn) @ v
        x = self.norm(x.transpose(1, 2).flatten(2))  # B, N, C
        return self.proj_drop(self.proj(x)), scores


# an FX leaf, like the other wrapped functions: FX cannot trace branches that depend on numbers
@torch.fx.wrap
def reorganise_tokens(x: Tensor, scores: Tensor, keep: int, fuse_token: bool) -> tuple[Tensor, Tensor | None]:
    """Keep the class token and the `keep` tokens of the highest scores; drop the others, or fuse them into one.

    Returns the tokens [B, 1+k, C], or [B, 2+k, C] with the fused token last, and the indices [B, k] of those kept
    among the N-1 after the class token. If `keep` is at least N-1, returns `x` unchanged, and None.
    """
    if keep >= scores.shape[1]:
        return x, None
    others = x[:, 1:]  # B, N-1, C
    # attentive tokens, by descending score
    index = scores.topk(keep, dim=1).indices  # B, k
    kept = others.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))  # B, k, C
    tokens = [x[:, :1], kept]
    if fuse_token:
        # inattentive tokens, weighted by their scores; autocast would compute a matrix product in half precision
        weights = scores.scatter(1, index, 0.0).unsqueeze(2)  # B, N-1, 1
        fused = (weights * others).sum(dim=1, keepdim=True)  # B, 1, C
        tokens.append(fused)
    return torch.cat(tokens, dim=1), index


class ReorganisingBlock(Block):
    """timm's block, which reorganises the tokens between attention and MLP."""

    def forward(self, x: Tensor, keep: int, fuse_token: bool) -> tuple[Tensor, Tensor | None]:
        """Return the tokens after the MLP, and the kept tokens' indices or None: see `reorganise_tokens`."""
        # attention, and its residual
        x_attn, scores = self.attn(self.norm1(x))
        x = x + self.drop_path1(self.ls1(x_attn))
        # the MLP sees the tokens that are left
        x, index = reorganise_tokens(x, scores, keep, fuse_token)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, index


def create_block(drop_loc: Sequence[int], depth: int, **kwargs) -> Block:
    """Return block number `depth`: timm's own, unless it is one of `drop_loc`."""
    if depth not in drop_loc:
        return Block(depth=depth, **kwargs)
    kwargs["attn_layer"] = ScoringAttention
    return ReorganisingBlock(depth=depth, **kwargs)


@torch.fx.wrap
def count_tokens(
    num_patches: int,
    keep_rates: Sequence[float],
    fuse_token: bool,
    override: float | None,
) -> list[int]:
    """Return how many tokens each block keeps, the class token and the fused one not counted.

    `override` takes the place of keep rates below 1. Raises ValueError if it is not above 0 and at most 1.
    """
    if override is not None and not 0.0 < override <= 1.0:
        raise ValueError(f"keep_rate {override} must be above 0 and at most 1")
    counts = []
    # tokens before each block, without the class token
    n = num_patches
    for rate in keep_rates:
        if override is not None and rate < 1.0:
            rate = override
        keep = math.ceil(rate * n)
        counts.append(keep)
        # the fused token is one of the next block's tokens
        n = keep + 1 if fuse_token and keep < n else keep
    return counts


@torch.fx.wrap
def resample_pos_embed(pos_embed: Tensor, size: tuple[int, int], old_size: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, 1+P, C] between grids (H, W), without antialiasing, as published."""
    if size == old_size:
        return pos_embed
    # timm's resample_abs_pos_embed computes in float32; the class token's position stays
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, old_size)  # 1, C, H, W
    patches = F.interpolate(patches, size=size, mode="bicubic")
    patches = patches.flatten(2).transpose(1, 2)  # 1, P, C
    return torch.cat([pos_embed[:, :1], patches], dim=1)


class EViT(VisionTransformer):
    """DeiT whose blocks `drop_loc` (counted from 0) keep `base_keep_rate` of their tokens. Arguments as timm's ViT.

    With `fuse_token` the other tokens are fused into one, else dropped. With `base_keep_rate` 1 no block reorganises.
    Images of other sizes than `img_size` are taken too: the position embedding is resampled for them, as published.
    """

    def __init__(
        self,
        base_keep_rate: float = 0.7,
        drop_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = False,
        depth: int = 12,
        dynamic_img_size: bool = True,
        **kwargs,
    ) -> None:
        if not 0.0 < base_keep_rate <= 1.0:
            raise ValueError(f"base_keep_rate {base_keep_rate} must be above 0 and at most 1")
        if set(drop_loc) - set(range(depth)):
            raise ValueError(f"drop_loc {tuple(drop_loc)} must be numbers of blocks, from 0 to {depth - 1}")
        super().__init__(
            depth=depth,
            dynamic_img_size=dynamic_img_size,
            block_fn=partial(create_block, drop_loc if base_keep_rate < 1.0 else ()),
            # DeiT's embedding, and no other
            class_token=True,
            reg_tokens=0,
            no_embed_class=False,
            pos_embed="learn",
            patch_drop_rate=0.0,
            **kwargs,
        )
        self.base_keep_rate = base_keep_rate
        self.drop_loc = tuple(sorted(set(drop_loc)))
        self.fuse_token = fuse_token
        self.keep_rates = [base_keep_rate if i in drop_loc else 1.0 for i in range(depth)]

    def init_weights(self, *args, **kwargs) -> None:
        super().init_weights(*args, **kwargs)
        # as published; timm starts it at 1e-6
        trunc_normal_(self.cls_token, std=0.02)

    def set_input_size(self, *args, **kwargs) -> None:
        # resample before timm does
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(*args, **kwargs)
        pos_embed = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, old_size)
        self.pos_embed = nn.Parameter(pos_embed, self.pos_embed.requires_grad)
        # timm's, which would antialias, finds an embedding that fits
        super().set_input_size(*args, **kwargs)

    def _pos_embed(self, x: Tensor) -> Tensor:
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            # timm's patch embedding leaves the patches in their grid
            _, H, W, _ = x.shape
            pos_embed = resample_pos_embed(pos_embed, (H, W), self.patch_embed.grid_size)
            x = x.flatten(1, 2)  # B, P, C
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # B, 1+P, C
        return self.pos_drop(x + pos_embed)

    def count_tokens(self, x: Tensor, keep_rate: float | None) -> list[int]:
        """Return how many tokens each block keeps of images [B, in_chans, H, W]."""
        H, W = self.patch_embed.dynamic_feat_size(x.shape[2:])
        return count_tokens(H * W, self.keep_rates, self.fuse_token, keep_rate)

    # torch.compile would bake in the keep rate, a Python float, and recompile for every new rate
    count_tokens_eagerly = torch.compiler.disable(count_tokens)

    def forward(self, x: Tensor, keep_rate: float | None = None) -> Tensor:
        """Classify images [B, in_chans, H, W]; `keep_rate` overrides that of the blocks which reorganise."""
        count = self.count_tokens if keep_rate is None else self.count_tokens_eagerly
        return self.forward_head(self.forward_blocks(x, count(x, keep_rate)))

    def forward_features(self, x: Tensor, keep_rate: float | None = None) -> Tensor:
        """Return the normalised tokens [B, N, C] that are left after the last block."""
        return self.forward_blocks(x, self.count_tokens(x, keep_rate))

    def forward_blocks(self, x: Tensor, counts: list[int]) -> Tensor:
        for tokens, _ in self.iter_blocks(x, counts):
            x = tokens
        return self.norm(x)

    def iter_blocks(self, x: Tensor, counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's tokens [B, N, C], and the places [B, N-1] of those after the class token.

        A place is the index of the patch that a token stands for, row by row; a token that block i fused has P + i.
        """
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))  # B, 1+P, C
        P = x.shape[1] - 1
        places = torch.arange(P, device=x.device).expand(x.shape[0], -1)  # B, P
        for i, block in enumerate(self.blocks):
            run = partial(checkpoint, block) if self.grad_checkpointing else block
            # one of timm's blocks
            if self.keep_rates[i] == 1.0:
                x = run(x)
                yield x, places
                continue
            x, index = run(x, counts[i], self.fuse_token)
            # the places follow their tokens
            if index is not None:
                places = places.gather(1, index)  # B, k
                if self.fuse_token:
                    places = F.pad(places, (0, 1), value=P + i)  # B, k+1
            yield x, places

    def trace_tokens(self, x: Tensor, keep_rate: float | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the logits, and for each block of `drop_loc` the places of the tokens after it: see `iter_blocks`."""
        counts = self.count_tokens(x, keep_rate)
        places_after = {}
        for i, (tokens, places) in enumerate(self.iter_blocks(x, counts)):
            x = tokens
            if i in self.drop_loc:
                places_after[i] = places
        return self.forward_head(self.norm(x)), places_after

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
        attn_mask: None = None,
        keep_rate: float | None = None,
    ) -> list | tuple | dict:
        """As timm's, with whole grids: kept tokens at their patches' places, zeros where a patch was dropped."""
        assert attn_mask is None, "tokens are selected by unmasked attention"
        assert output_fmt in ("NCHW", "NLC"), f"output_fmt {output_fmt} must be NCHW or NLC"
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        H, W = self.patch_embed.dynamic_feat_size(x.shape[2:])
        intermediates = []
        prefix_tokens = []
        for i, (tokens, places) in enumerate(self.iter_blocks(x, self.count_tokens(x, keep_rate))):
            if i in take_indices:
                # undo the reorganisation
                y = self.norm(tokens) if norm else tokens
                prefix_tokens.append(y[:, :1])
                y = scatter_tokens(y[:, 1:], places, H * W)  # B, P, C
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(2, (H, W))  # B, C, H, W
                intermediates.append(y)
            if stop_early and i == max_index:
                break
        # the forms of timm's result
        if output_dict:
            out = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                out["image_intermediates_prefix"] = prefix_tokens
            if not intermediates_only:
                out["image_features"] = self.norm(tokens)
            return out
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        return intermediates if intermediates_only else (self.norm(tokens), intermediates)


def scatter_tokens(tokens: Tensor, places: Tensor, num_patches: int) -> Tensor:
    """Return tokens [B, k, C] at their places [B, k] among the patches: [B, P, C], zero where there is none."""
    B, _, C = tokens.shape
    # fused tokens, whose places are P and more, go to a row that is cut off
    rows = places.clamp(max=num_patches).unsqueeze(2).expand(-1, -1, C)  # B, k, C
    return tokens.new_zeros(B, num_patches + 1, C).scatter(1, rows, tokens)[:, :num_patches]


def _cfg(**kwargs) -> dict:
    # classes, input size, crop ratio, mean and std are timm's defaults (ImageNet) unless given
    return {
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "deit_tiny_patch16_shrink_base": _cfg(),
        "deit_small_patch16_shrink_base": _cfg(),
        "deit_base_patch16_shrink_base": _cfg(),
    }
)


def _create_evit(variant: str, pretrained: bool, kwargs: dict, **model_args) -> EViT:
    return build_model_with_cfg(
        EViT,
        variant,
        pretrained,
        # as published; timm antialiases
        pretrained_filter_fn=partial(checkpoint_filter_fn, antialias=False),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **dict(model_args, **kwargs),
    )


@register_model
def deit_tiny_patch16_shrink_base(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-Tiny, which the paper does not have."""
    return _create_evit("deit_tiny_patch16_shrink_base", pretrained, kwargs, embed_dim=192, num_heads=3)


@register_model
def deit_small_patch16_shrink_base(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-Small."""
    return _create_evit("deit_small_patch16_shrink_base", pretrained, kwargs, embed_dim=384, num_heads=6)


@register_model
def deit_base_patch16_shrink_base(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-Base."""
    return _create_evit("deit_base_patch16_shrink_base", pretrained, kwargs, embed_dim=768, num_heads=12)
