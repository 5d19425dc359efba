"""DHVT written out plainly, as the paper's text reads: the reference that models/dhvt.py is compared with.

It shares no code with models/ and needs only torch and einops: convolutions over B x C x H x W, and attention as a
matrix product, a softmax and a matrix product. Parameter names are those of the checkpoints. It has no dropout, no
stochastic depth and no initialisation of its own: fill it with `load_state_dict`.

Letters in shape comments: B images, N tokens (class token first), C channels, h heads, d = C / h, H x W patch grid.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn


class Affine(nn.Module):
    """x * alpha + beta, one of each per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


def conv_norm(dim: int, out: int) -> nn.Sequential:
    """Halve the resolution: a 3x3 convolution of stride 2, then batch norm."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out))


class SOPE(nn.Module):
    """Sequential overlapping patch embedding: an image [B, 3, *, *] to a map of patches [B, C, H, W]."""

    def __init__(self, patch_size: int, C: int) -> None:
        super().__init__()
        if patch_size == 16:
            self.proj = nn.Sequential(
                conv_norm(3, C // 8),
                nn.GELU(),
                conv_norm(C // 8, C // 4),
                nn.GELU(),
                conv_norm(C // 4, C // 2),
                nn.GELU(),
                conv_norm(C // 2, C),
            )
        elif patch_size == 4:
            self.proj = nn.Sequential(conv_norm(3, C // 2), nn.GELU(), conv_norm(C // 2, C))
        else:
            self.proj = nn.Sequential(conv_norm(3, C), nn.GELU())
        self.pre_affine = Affine(3)
        self.post_affine = Affine(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_affine(self.proj(self.pre_affine(x)))


class Attention(nn.Module):
    """Head-interacted multi-head self-attention: [B, N, C] to [B, N, C]."""

    def __init__(self, C: int, h: int) -> None:
        super().__init__()
        self.h, self.d = h, C // h
        self.pos_embed = nn.Parameter(torch.zeros(1, h, C))
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.ht_proj = nn.Linear(self.d, C)
        self.ht_norm = nn.LayerNorm(self.d, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[1]
        # one token for each head, from the mean of its slice of the channels
        t = reduce(x, "B N (h d) -> B h d", "mean", h=self.h)
        t = rearrange(self.ht_proj(t), "B t (h d) -> B t h d", h=self.h)
        t = F.gelu(self.ht_norm(t))
        t = rearrange(t, "B t h d -> B t (h d)") + self.pos_embed
        # ordinary attention, the head tokens last
        x = torch.cat([x, t], dim=1)  # B, N+h, C
        q, k, v = rearrange(self.qkv(x), "B N (three h d) -> three B h N d", three=3, h=self.h)
        weights = (q @ k.transpose(-2, -1) * self.d**-0.5).softmax(dim=-1)  # B, h, N+h, N+h
        x = self.proj(rearrange(weights @ v, "B h N d -> B N (h d)"))
        # the class token takes the mean of what the head tokens found
        patches, heads = x[:, 1:N], x[:, N:]
        cls = x[:, :1] + reduce(heads, "B h C -> B 1 C", "mean")
        return torch.cat([cls, patches], dim=1)


class DAFF(nn.Module):
    """Dynamic aggregation feed-forward: [B, 1 + HW, C] to the same, on a grid of H x W patches."""

    def __init__(self, C: int) -> None:
        super().__init__()
        D = 4 * C
        self.conv1 = nn.Conv2d(C, D, 1)
        self.conv2 = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.conv3 = nn.Conv2d(D, C, 1)
        self.bn1 = nn.BatchNorm2d(D)
        self.bn2 = nn.BatchNorm2d(D)
        self.bn3 = nn.BatchNorm2d(C)
        self.compress = nn.Linear(C, C // 4)
        self.excitation = nn.Linear(C // 4, C)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        cls, x = x[:, :1], rearrange(x[:, 1:], "B (H W) C -> B C H W", H=H, W=W)
        s = F.gelu(self.bn1(self.conv1(x)))
        x = F.gelu(self.bn2(self.conv2(s))) + s
        x = self.bn3(self.conv3(x))
        w = self.excitation(F.gelu(self.compress(reduce(x, "B C H W -> B C", "mean"))))
        return torch.cat([cls * rearrange(w, "B C -> B 1 C"), rearrange(x, "B C H W -> B (H W) C")], dim=1)


class Block(nn.Module):
    def __init__(self, C: int, h: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = Attention(C, h)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = DAFF(C)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x), H, W)


class PlainDHVT(nn.Module):
    """The whole model: images [B, 3, *, *] of any size to logits [B, num_classes]."""

    def __init__(self, patch_size: int, embed_dim: int, num_heads: int, num_classes: int, depth: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = SOPE(patch_size, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # B, C, H, W
        B, _, H, W = x.shape
        x = torch.cat([self.cls_token.expand(B, -1, -1), rearrange(x, "B C H W -> B (H W) C")], dim=1)
        for block in self.blocks:
            x = block(x, H, W)
        return self.head(self.norm(x)[:, 0])
