"""What only the paper's ablations need: the values of DHVT's arguments for them, and the layers that they put in.

Tables 5, 6, 8, 9, 10, 11 and appendix B.2.2 of arXiv 2210.05958. The arguments, the paper's model first:

    sope         True, False: timm's PatchEmbed, one convolution (Table 5)
    daff         True, False: a feed-forward of linear layers, `ffn` says which (Table 5)
    head_tokens  True, False: timm's Attention (Table 6)
    pos_embed    none, learn: DeiT's absolute position embedding, of class token and patches (Table 5)
    affine       True, False: no affine maps around SOPE's convolutions (B.2.2)
    shortcut     True, False: no shortcut around DAFF's depth-wise convolution (Table 9)
    aggregate    cls, all, none: which tokens DAFF's weights multiply (Table 9)
    sope_norm    bn, ln: layer norm over the channels of each token (Table 11); the names of the modules stay
    daff_norm    as sope_norm
    ffn          mlp, split, split_aggregate, split_avgpool: see the classes below (Table 8)

The number of heads (Table 10) is timm's `num_heads`. Without `sope`, `daff` and `head_tokens`, and with `pos_embed`
learn, DHVT is DeiT. Shape comments as in dhvt.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp, get_device_dtype
from torch import Tensor, nn


class SplitMlp(Mlp):
    """Table 8, `split`: an MLP for the patch tokens only, past the class token; [B, 1+HW, C] -> [B, 1+HW, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], super().forward(x[:, 1:])], dim=1)  # B, 1+HW, C


class SplitAggregateMlp(Mlp):
    """Table 8, `split_aggregate`: the class token is re-weighted as in DAFF, by the average of the MLP's output."""

    def __init__(self, in_features: int, *args, **kwargs) -> None:
        super().__init__(in_features, *args, **kwargs)
        dd = get_device_dtype(self)
        self.compress = nn.Linear(in_features, in_features // 4, **dd)
        self.excitation = nn.Linear(in_features // 4, in_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        cls = x[:, :1]  # B, 1, C
        x = super().forward(x[:, 1:])  # B, HW, C
        w = self.excitation(self.act(self.compress(x.mean(dim=1, keepdim=True))))  # B, 1, C
        return torch.cat([cls * w, x], dim=1)  # B, 1+HW, C


class SplitAvgPoolMlp(Mlp):
    """Table 8, `split_avgpool`: as `split`, with 3x3 average pooling of the patches' hidden channels, after GELU.

    The pooling replaces DAFF's depth-wise convolution, and equals one with all weights 1/9: stride 1, with zero padding
    included in the average. The paper gives no details; we leave out DAFF's norm layers, shortcut and second GELU. DHVT
    sets `grid_size` (H, W).
    """

    grid_size = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        cls = x[:, :1]  # B, 1, C
        x = self.drop1(self.act(self.fc1(x[:, 1:])))  # B, HW, 4C
        x = x.transpose(1, 2).unflatten(2, self.grid_size)  # B, 4C, H, W
        x = F.avg_pool2d(x, 3, stride=1, padding=1).flatten(2).transpose(1, 2)  # B, HW, 4C
        return torch.cat([cls, self.drop2(self.fc2(self.norm(x)))], dim=1)  # B, 1+HW, C


FFNS = {"mlp": Mlp, "split": SplitMlp, "split_aggregate": SplitAggregateMlp, "split_avgpool": SplitAvgPoolMlp}
NORMS = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}

# the values of each argument, the paper's model first
VALUES = {
    "sope": (True, False),
    "daff": (True, False),
    "head_tokens": (True, False),
    "pos_embed": ("none", "learn"),
    "affine": (True, False),
    "shortcut": (True, False),
    "aggregate": ("cls", "all", "none"),
    "sope_norm": tuple(NORMS),
    "daff_norm": tuple(NORMS),
    "ffn": tuple(FFNS),
}
# an argument has an effect only where another one has this value
NEEDS = {
    "affine": ("sope", True),
    "shortcut": ("daff", True),
    "aggregate": ("daff", True),
    "sope_norm": ("sope", True),
    "daff_norm": ("daff", True),
    "ffn": ("daff", False),
}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Check DHVT's arguments for ablations. Raises ValueError for an unknown value, or one without effect."""
    given = {name: kwargs.get(name, values[0]) for name, values in VALUES.items()}
    for name, value in given.items():
        values = VALUES[name]
        if value not in values:
            raise ValueError(f"{name}={value} must be {' or '.join(map(str, values))}")
        part, needed = NEEDS.get(name, (name, value))
        if value != values[0] and given[part] != needed:
            raise ValueError(f"{name}={value} needs {part}={needed}")
