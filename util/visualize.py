"""Pictures of what a model looks at: the patches that EViT keeps, and the attention of vision transformers.

Blocks, heads and head tokens are counted from 1 in pictures and file names.

Shape comments: H x W pixels, P patches, N tokens (class token first; DHVT's head tokens last), h heads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from util import attention
from util.attention import View
from util.checkpoint import open_atomic
from util.config import ModelConfig
from util.errors import InputError
from util.figures import Picture, Row, draw_distances, draw_matrices, draw_rows

# of the paper's figures 7 to 9
PAPER_BLOCKS = np.array([2, 5, 8, 11])
NO_HEAD_TOKENS = "--visualize head_tokens is for DHVT: this model has none; use --visualize attention"


def write_pictures(
    kind: str,
    model: nn.Module,
    samples: Iterable[tuple[Tensor, str | None, str]],
    *,
    folder: Path,
    classes: Sequence[str] | None,
    autocast: Callable,
    device: torch.device,
    config: ModelConfig,
    blocks: Sequence[int] | None = None,
    file_format: str = "png",
    npz: bool = False,
) -> list[Path]:
    """Write pictures of a kind, a key of `figures.TITLES`; return their files, the overview last.

    `samples` yields images [3, H, W] normalised as `config` says, each with its label, if known, and the name of its
    source. `classes` names the model's outputs. `blocks` are counted from 1. With `npz` each figure's numbers are
    written beside it. Pictures of the same kind from an earlier call are removed. Raises InputError for a model with
    nothing to show, for blocks that it does not have, and if there are no images.
    """
    check_model(kind, model)
    blocks = resolve_blocks(kind, model, blocks)
    # read all images first, so that a bad file ends this before earlier pictures are removed
    samples = list(samples)
    if not samples:
        raise InputError(f"{folder}: there is no image to show; nothing was written")
    views = attention.view_images(kind, model.eval(), samples, classes, autocast, device, config)
    draw = {"matrix": matrix_pictures, "distance": distance_pictures}.get(kind, tile_pictures)
    pictures = draw(kind, model, views, blocks)
    # raises InputError for a model without head tokens
    first = next(pictures)

    # Pictures of an earlier call go, other files stay
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(rf"{kind}_(\d{{4}}|overview)\.(png|pdf|npz)", path.name):
            path.unlink()

    paths = []
    for picture in chain([first], pictures):
        if npz:
            with open_atomic(folder / f"{picture.name}.npz") as file:
                np.savez_compressed(file, **picture.numbers)
        if kind == "distance":
            with open_atomic(folder / f"{picture.name}.csv") as file:
                write_csv(file, **picture.numbers)
        paths.append(folder / f"{picture.name}.{file_format}")
        with open_atomic(paths[-1]) as file:
            picture.figure.savefig(file, format=file_format, dpi=200)
    return paths


def check_model(kind: str, model: nn.Module) -> None:
    """Raise InputError if a model has nothing to show of a kind."""
    name = model.pretrained_cfg["architecture"]
    if kind == "mask":
        if not getattr(model, "drop_loc", ()):
            raise InputError(
                f"{name} does not reorganise tokens: --visualize mask is for *_shrink_base models; "
                "use --visualize attention"
            )
        return
    blocks = getattr(model, "blocks", nn.Sequential())
    layers = [module for module in blocks.modules() if hasattr(module, "fused_attn")]
    if not isinstance(model, VisionTransformer) or len(layers) != len(blocks):
        raise InputError(f"{name} has no attention to show: --visualize is for DHVT, DeiT, EViT and timm's ViT")
    if kind in ("attention", "rollout") and model.cls_token is None:
        raise InputError(f"{name} has no class token: use --visualize matrix or --visualize distance")
    # an EViT, whatever its keep rate
    if kind == "head_tokens" and hasattr(model, "base_keep_rate"):
        raise InputError(NO_HEAD_TOKENS)
    # where tokens were dropped, there is no attention to all patches
    if min(getattr(model, "keep_rates", [1])) < 1:
        raise InputError(
            f"{name} keeps only some tokens: add --base_keep_rate 1 to see its attention to all patches, "
            "or use --visualize mask"
        )


def resolve_blocks(kind: str, model: nn.Module, blocks: Sequence[int] | None) -> np.ndarray:
    """Return the blocks to show, counted from 1. Raises InputError for blocks that there are not."""
    possible = np.add(model.drop_loc if kind == "mask" else range(len(model.blocks)), 1)
    if blocks is None:
        in_paper = PAPER_BLOCKS if np.isin(PAPER_BLOCKS, possible).all() else possible
        # a rollout ends with the last block
        defaults = {"head_tokens": in_paper, "matrix": in_paper, "rollout": possible[-1:]}
        return defaults.get(kind, possible)
    for block in blocks:
        if block not in possible:
            raise InputError(
                f"--blocks {block}: {kind} has pictures of blocks {', '.join(map(str, possible))}; choose from them"
            )
    return np.unique(blocks)


# kinds that show a number for each patch


def tile_pictures(
    kind: str,
    model: nn.Module,
    views: Iterable[View],
    blocks: np.ndarray,
) -> Iterator[Picture]:
    """Yield a picture of each image, and an overview of the first ones."""
    overview = []
    for number, view in enumerate(views):
        rows = mask_rows(model, view, blocks) if kind == "mask" else map_rows(kind, view, blocks)
        yield draw_rows(
            f"{kind}_{number:04}",
            kind,
            model,
            rows,
            tile_inches=2.6 if len(rows) == 1 else 1.6,
        )
        # a longer one would be too much to look at
        if len(overview) < 32:
            overview += map_rows("mean", view, blocks) if kind == "attention" else rows
    yield draw_rows(f"{kind}_overview", kind, model, overview, tile_inches=1.4)


def map_rows(
    kind: str,
    view: View,
    blocks: np.ndarray,
) -> list[Row]:
    """Return maps of attention: a row per block, or one row of all blocks for the kinds rollout and mean.

    The latter is the class token's attention, mean of the heads. Raises InputError for a model without head tokens.
    """
    if kind == "head_tokens":
        if view.layout.count_head_tokens(view.record) == 0:
            raise InputError(NO_HEAD_TOKENS)
        maps = view.layout.to_maps(attention.head_token_rows(view.record[blocks - 1], view.layout))
        tile_names = [f"head token {i + 1}" for i in range(maps.shape[1])]
    elif kind == "rollout":
        maps = attention.rollout(view.record, view.layout)[None, blocks - 1]
    else:
        maps = view.layout.to_maps(view.record[blocks - 1, :, 0])  # blocks, h, rows, columns
        means = maps.mean(axis=1, keepdims=True)
        tile_names = ["mean of heads", *(f"head {i + 1}" for i in range(maps.shape[1]))]
        maps = means.swapaxes(0, 1) if kind == "mean" else np.concatenate([means, maps], axis=1)

    # a row is a block and a tile a head, or there is one row with a tile per block
    texts = [f", block {block}" for block in blocks]
    if kind in ("rollout", "mean"):
        tile_names = [f"block {block}" for block in blocks]
        texts = [", mean of heads"]
    rows = []
    for text, values in zip(texts, maps, strict=True):
        captions = [f"{name}\nlargest {tile.max():.2%}" for name, tile in zip(tile_names, values, strict=True)]
        rows.append(Row(view.text + text, view.color, view.pixels, values, captions))
    return rows


# masks


def mask_rows(
    model: nn.Module,
    view: View,
    blocks: np.ndarray,
) -> list[Row]:
    """Return one row with a map [rows, columns] for each block of `drop_loc`: the token that each patch is now part of.

    A token is identified by its patch's index, or by P + b if block b (from 0) fused it; dropped patches have -1.
    """
    P = np.prod(view.layout.grid)
    token = np.arange(P)
    maps = []
    captions = []
    for block, left in view.record.items():
        left = left[0].tolist()
        # a token that is not left went into the fused one, if there is one
        stays = np.isin(token, left) | (token < 0)
        token = np.where(stays, token, P + block if P + block in left else -1)
        if block + 1 in blocks:
            # a patch that is not fused still has its own number
            kept = (token == np.arange(P)).sum()
            captions.append(
                f"after block {block + 1}\n{kept} of {P} patches kept,\n"
                f"{P - kept} {'fused' if model.fuse_token else 'dropped'}: {len(left)} tokens"
            )
            maps.append(token.reshape(view.layout.grid))
    return [Row(view.text, view.color, view.pixels, np.stack(maps), captions)]


# attention matrices and distances


def matrix_pictures(
    kind: str,
    model: nn.Module,
    views: Iterable[View],
    blocks: np.ndarray,
) -> Iterator[Picture]:
    """Yield a picture of each image's attention matrices, and one of their mean."""
    total = 0
    for count, view in enumerate(views, start=1):
        matrices = view.record[blocks - 1].mean(axis=1)  # blocks, N, N
        total = total + matrices
        yield draw_matrices(f"matrix_{count - 1:04}", model, view.text, matrices, blocks, view.layout)
    yield draw_matrices("matrix_overview", model, f"mean of {count} images", total / count, blocks, view.layout)


def distance_pictures(
    kind: str,
    model: nn.Module,
    views: Iterable[View],
    blocks: np.ndarray,
) -> Iterator[Picture]:
    """Yield one picture: the mean attention distance of each head, over all images."""
    found = []
    for view in views:
        distances = attention.patch_distances(view.layout.grid, model.patch_embed.feat_ratio(as_scalar=False))
        found.append(attention.mean_distances(view.record[blocks - 1], view.layout, distances))
    mean = np.mean(found, axis=0)  # blocks, h

    yield draw_distances("distance_overview", model, f"mean of {len(found)} images", mean, blocks, distances.mean())


def write_csv(file: BinaryIO, values: np.ndarray, blocks: np.ndarray) -> None:
    """Write distances [blocks, h]: a line per block, a column per head."""
    header = ",".join(["block", *(f"head {i + 1}" for i in range(values.shape[1]))])
    np.savetxt(
        file,
        np.column_stack([blocks, values]),
        fmt="%.6g",
        delimiter=",",
        header=header,
        comments="",
    )
