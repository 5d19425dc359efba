"""What a vision transformer does with an image: its attention weights, and what is worked out from them.

Shape comments: N tokens (prefix tokens, of which the class token is first, P patches, DHVT's head tokens), h heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from util.config import ModelConfig
from util.errors import printable


class TokenLayout(NamedTuple):
    """The order of an attention matrix's tokens: `prefix` tokens, a `grid` of patches (rows, columns), head tokens."""

    prefix: int
    grid: tuple[int, int]

    @property
    def patches(self) -> slice:
        return slice(self.prefix, self.prefix + self.grid[0] * self.grid[1])

    def count_head_tokens(self, weights: np.ndarray) -> int:
        """Return the number of head tokens among the N of attention weights [..., N]."""
        return weights.shape[-1] - self.patches.stop

    def to_maps(self, rows: np.ndarray) -> np.ndarray:
        """Return the part of attention rows [..., N] that goes to the patches, in their grid: [..., rows, columns]."""
        return rows[..., self.patches].reshape(*rows.shape[:-1], *self.grid)


def record_weights(model: nn.Module, image: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return a ViT's logits for an image [1, 3, H, W], and its attention weights after softmax: [blocks, h, N, N]."""
    weights = []
    layers = [module for module in model.blocks.modules() if hasattr(module, "fused_attn")]
    were_fused = [layer.fused_attn for layer in layers]
    # fused kernels do not return the weights; unfused, they are what dropout is applied to
    hooks = [layer.attn_drop.register_forward_pre_hook(lambda _, args: weights.append(args[0])) for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    logits = model(image)
    # leave the model as it was
    for layer, hook, fused in zip(layers, hooks, were_fused, strict=True):
        hook.remove()
        layer.fused_attn = fused
    return logits, torch.cat(weights).float().cpu().numpy()


class View(NamedTuple):
    """What a model does with one image, pixels [H, W, 3], and a line of text about it."""

    text: str
    color: str
    pixels: np.ndarray
    layout: TokenLayout
    # attention weights [blocks, h, N, N], or for masks the places from EViT.trace_tokens
    record: Any


def undo_normalization(image: Tensor, config: ModelConfig) -> np.ndarray:
    """Return the pixels, exactly, of an image [3, H, W], either uint8 or normalized as `config` says: [H, W, 3]."""
    pixels = image.cpu().permute(1, 2, 0)  # H, W, 3
    if pixels.is_floating_point():
        pixels = (255 * (pixels * torch.tensor(config.std) + torch.tensor(config.mean))).round().clamp(0, 255).byte()
    return pixels.numpy()


def view_images(
    kind: str,
    model: nn.Module,
    samples: Iterable[tuple[Tensor, str | None, str]],
    classes: Sequence[str] | None,
    autocast: Callable,
    device: torch.device,
    config: ModelConfig,
) -> Iterator[View]:
    """Yield what a model does with each image."""
    # a head may have more outputs than there are names
    names = dict(enumerate(classes or ()))
    for image, label, source in samples:
        pixels = undo_normalization(image, config)
        # the model pads the image to whole patches, or else leaves out what is less than a patch
        layout = TokenLayout(model.num_prefix_tokens, model.patch_embed.dynamic_feat_size(pixels.shape[:2]))
        H, W = np.multiply(layout.grid, model.patch_embed.feat_ratio(as_scalar=False))
        pixels = pixels[:H, :W]

        # The forward pass, and what is recorded of it
        image = image[None].to(device)  # 1, 3, H, W
        with torch.inference_mode(), autocast():
            if kind == "mask":
                logits, record = model.trace_tokens(image)
            else:
                logits, record = record_weights(model, image)

        # Name the prediction
        probability, best = logits[0].float().softmax(dim=0).max(dim=0)
        predicted = names.get(int(best), f"{best}")
        text = f"{'' if label is None else f'label {label}, '}prediction {predicted} ({probability:.0%}), {source}"
        color = "black" if label in (None, predicted) else "red"
        yield View(printable(text), color, pixels, layout, record)


def head_token_rows(weights: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Return the attention of each head token in its own head: weights [blocks, h, N, N] -> [blocks, h, N]."""
    heads = np.arange(layout.count_head_tokens(weights))
    return weights[:, heads, layout.patches.stop + heads]


def rollout(weights: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Return how much of the class token comes from each patch after each block: [blocks, rows, columns].

    Attention rollout (Quantifying Attention Flow in Transformers, arXiv 2005.00928) of weights [blocks, h, N, N]: the
    mean of the heads, plus the identity for the residual connection, rows normalised, multiplied through the blocks.
    Head tokens exist within one block only. As in DHVT, they are made from the mean of the other tokens, and the mean
    of their outputs is added to the class token. The shares of all patches sum to 1.
    """
    heads = layout.count_head_tokens(weights)
    tokens = layout.patches.stop
    shares = np.eye(tokens)
    rows = []
    for attention in weights.mean(axis=1, dtype=np.float64):
        # head tokens are appended
        inputs = np.vstack([shares, np.tile(shares.mean(axis=0), (heads, 1))])  # N, prefix + P
        outputs = attention @ inputs  # N, prefix + P
        # residual connection
        shares = shares + outputs[:tokens]
        # head tokens are merged into the class token
        if heads:
            shares[0] += outputs[tokens:].mean(axis=0)
        shares /= shares.sum(axis=1, keepdims=True)
        rows.append(shares[0])
    maps = layout.to_maps(np.stack(rows))  # blocks, rows, columns
    return maps / maps.sum(axis=(1, 2), keepdims=True)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
    """Return the distances in pixels between the centers of all patches of a size (height, width): [P, P]."""
    centers = np.indices(grid).reshape(2, -1).T * patch_size  # P, 2
    return np.linalg.norm(centers[:, None] - centers, axis=-1)


def mean_distances(weights: np.ndarray, layout: TokenLayout, distances: np.ndarray) -> np.ndarray:
    """Return how far each head looks: weights [blocks, h, N, N] -> [blocks, h], in the unit of `distances` [P, P].

    The mean distance from a patch to all patches, weighted by its attention to them (which is made to sum to 1), mean
    over the patches, as in figure 7 of the ViT paper (arXiv 2010.11929).
    """
    weights = weights[..., layout.patches, layout.patches]  # blocks, h, P, P
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights * distances).sum(axis=-1).mean(axis=-1)
