"""Pictures of what a model looks at: the patches that EViT keeps, or the class token's attention, block by block.

Shape comments: H x W pixels, P patches, N tokens (class token first; DHVT's head tokens last), h heads.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from timm.models import VisionTransformer
from timm.utils import AttentionExtract
from torch import Tensor, nn

from util.checkpoint import open_atomic
from util.config import ModelConfig
from util.errors import InputError

SHEETS = {"mask": "contact_sheet.png", "attention": "attention_sheet.png"}


class Tile(NamedTuple):
    """A picture of one image: its part of the file name, uint8 [H, W, 3], and the sheet's text below it."""

    name: str
    pixels: np.ndarray
    caption: str = ""


class Row(NamedTuple):
    """What the sheet shows of one image."""

    text: str
    color: str
    tiles: list[Tile]


def write_pictures(
    mode: str,
    model: nn.Module,
    samples: Iterable[tuple[Tensor, str | None, str]],
    *,
    folder: Path,
    classes: Sequence[str] | None,
    autocast: Callable,
    device: torch.device,
    config: ModelConfig,
) -> list[Path]:
    """Write each image, a picture of it per block, and a sheet of the first 32; return the files, the sheet last.

    `mode` is "mask" or "attention". `samples` yields images [3, H, W] normalised as `config` says, each with its
    label, if known, and the name of its source. `classes` names the model's outputs. Pictures of an earlier call are
    removed. Raises InputError for a model with nothing to show, and where there is no image.
    """
    check_model(mode, model)
    # read all images first, so that a bad file ends this before earlier pictures are removed
    samples = list(samples)
    if not samples:
        raise InputError(f"{folder}: there is no image to show; nothing was written")
    make_tiles = mask_tiles if mode == "mask" else attention_tiles
    model.eval()
    paths = []
    rows = []
    # Pictures of an earlier call go, other files stay
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("[0-9][0-9][0-9][0-9]_[0-9][0-9]_*.png"):
        path.unlink()

    for number, (image, label, source) in enumerate(samples):
        # Undo the normalisation: the pixels of the image, exactly
        pixels = image.cpu().permute(1, 2, 0) * torch.tensor(config.std) + torch.tensor(config.mean)  # H, W, 3
        pixels = (255 * pixels).round().byte().numpy()

        # Predict, and make the pictures
        image = image[None].to(device)  # 1, 3, H, W
        with torch.inference_mode(), autocast():
            logits = model(image)
            tiles = [Tile("input", pixels), *make_tiles(model, image, pixels)]
        for step, tile in enumerate(tiles):
            paths.append(folder / f"{number:04}_{step:02}_{tile.name}.png")
            with open_atomic(paths[-1]) as file:
                Image.fromarray(tile.pixels).save(file, "png")

        # Name the prediction; a head may have more outputs than there are names
        probability, best = logits[0].float().softmax(dim=0).max(dim=0)
        names = dict(enumerate(classes or ()))
        predicted = names.get(int(best), f"{best}")
        text = f"{label or ''} → {predicted} {probability:.0%}   {source}"
        color = "black" if label in (None, predicted) else "red"
        # A longer sheet would be too much to look at
        if number < 32:
            rows.append(Row(text, color, tiles))
    paths.append(folder / SHEETS[mode])
    title = f"{model.pretrained_cfg['architecture']}: {len(rows)} of {len(samples)} images"
    with open_atomic(paths[-1]) as file:
        draw_sheet(mode, model, title, rows).savefig(file, format="png")
    return paths


def check_model(mode: str, model: nn.Module) -> None:
    """Raise InputError if a model has nothing to show in a mode."""
    name = model.pretrained_cfg["architecture"]
    if mode == "mask":
        if not getattr(model, "drop_loc", ()):
            raise InputError(f"{name} does not reorganise tokens: --visualize_mask is for *_shrink_base models")
        return
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise InputError(
            f"{name} has no class token that attends to patches: --visualize_attention is for DHVT, DeiT, ViT and EViT"
        )
    # where tokens were dropped, there is no attention to all patches
    if getattr(model, "base_keep_rate", 1) < 1:
        raise InputError(
            f"{name} keeps only some tokens: add --base_keep_rate 1 to see its attention to all patches, "
            "or use --visualize_mask"
        )


def patch_numbers(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Return the number of the patch that each pixel of an image [H, W, 3] belongs to: [H, W]."""
    H, W, _ = pixels.shape
    grid = model.patch_embed.dynamic_feat_size((H, W))
    height, width = model.patch_embed.feat_ratio(as_scalar=False)
    numbers = np.arange(grid[0] * grid[1]).reshape(grid)  # rows and columns of patches
    # patches reach beyond an image that the model pads
    return numbers.repeat(height, axis=0).repeat(width, axis=1)[:H, :W]  # H, W


def follow_patches(places: dict[int, Tensor], patches: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield for each block of `places` its number and the token, [P], that each patch is part of after it.

    A token is known by its patch's number, or as P + b if block b fused it; a dropped patch has -1. `places` are the
    tokens that are left after each block, {block: [1, n]}, as `EViT.trace_tokens` returns them for one image.
    """
    token = np.arange(patches)
    for block, tokens in places.items():
        left = tokens[0].tolist()
        fused = patches + block
        # a token that is not left went into the fused one, if there is one
        stays = np.isin(token, left) | (token < 0)
        token = np.where(stays, token, fused if fused in left else -1)
        yield block, token


def fused_colors(model: nn.Module) -> dict[int, tuple]:
    """Return the color, (red, green, blue) up to 255, of the token that each block fuses, by the block's number."""
    blocks = model.drop_loc if model.fuse_token else ()
    return {block: matplotlib.colormaps["tab10"](i % 10, bytes=True)[:3] for i, block in enumerate(blocks)}


def mask_tiles(model: nn.Module, image: Tensor, pixels: np.ndarray) -> Iterator[Tile]:
    """Yield for each block of `drop_loc` the patches of an image [1, 3, H, W] that are still tokens."""
    patch = patch_numbers(model, pixels)  # H, W
    patches = patch.max() + 1
    _, places = model.trace_tokens(image)
    for block, token in follow_patches(places, patches):
        picture = pixels.copy()
        # dropped patches are white
        picture[token[patch] < 0] = 255
        # fused ones have the color of the block that fused them
        for number, color in fused_colors(model).items():
            picture[token[patch] == patches + number] = color
        # a patch that is not fused still has its own number
        kept = (token == np.arange(patches)).sum()
        caption = f"block {block}\n{kept}/{patches}, {patches - kept} {'fused' if model.fuse_token else 'dropped'}"
        yield Tile(f"block{block:02}", picture, caption)


def class_attention(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the class token's attention in each block, [N], the mean over its heads, for an image [1, 3, H, W]."""
    # hooks and unfused attention for a copy: fused kernels do not return the weights
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    attention = AttentionExtract(model, method="hook")(image)
    return [weights[0, :, 0].mean(dim=0) for weights in attention.values()]  # weights are 1, h, N, N


def attention_tiles(model: nn.Module, image: Tensor, pixels: np.ndarray) -> Iterator[Tile]:
    """Yield for each block the class token's attention to the patches of an image [1, 3, H, W]."""
    patch = patch_numbers(model, pixels)  # H, W
    # tokens are class token, registers, patches, head tokens
    start = model.num_prefix_tokens
    end = start + patch.max() + 1
    for block, row in enumerate(class_attention(model, image)):
        row = row.float().cpu().numpy()
        weights = row[start:end]  # P
        picture = matplotlib.colormaps["inferno"](weights[patch] / weights.max(), bytes=True)  # H, W, 4
        caption = f"block {block}\nmax {weights.max():.1%}"
        # the head tokens are DHVT's
        if len(row) > end:
            caption += f", heads {row[end:].sum():.0%}"
        yield Tile(f"attention{block:02}", picture[..., :3], caption)


def draw_sheet(mode: str, model: nn.Module, title: str, rows: list[Row]) -> Figure:
    """Draw a row of pictures per image, a column per block, and a legend."""
    H, W, _ = rows[0].tiles[0].pixels.shape
    columns = len(rows[0].tiles)
    # in inches; on grey paper white patches can be seen
    size = max(8, 1.5 * columns), len(rows) * (1.5 * H / W + 0.6) + 1.2
    figure = Figure(size, dpi=160, facecolor="0.93", layout="constrained")
    grid = figure.subplots(len(rows), squeeze=False)

    # what colors and numbers mean
    if mode == "mask":
        note = f"keep rate {model.base_keep_rate:g}; patches kept as tokens / all, and those fused or dropped (white)"
        colors = fused_colors(model).items()
        patches = [Patch(color=np.divide(color, 255), label=f"fused in block {block}") for block, color in colors]
        figure.legend(handles=patches, loc="outside lower left", ncols=columns)
    else:
        note = "class token's attention to patches, as a share of the largest (max), and to DHVT's head tokens (heads)"
        figure.colorbar(
            ScalarMappable(cmap="inferno"), ax=grid[0], location="top", shrink=0.4, anchor=(0, 0), aspect=40
        )
    figure.suptitle(f"{title}\n{note}", x=0.01, ha="left", fontsize="medium")

    # one set of axes per image, since one per picture would take ten times as long
    for axes, row in zip(grid.flat, rows, strict=True):
        # each picture with a border of the paper's grey
        border = (0, 0), (W // 20, W // 20), (0, 0)
        strip = np.hstack([np.pad(tile.pixels, border, constant_values=237) for tile in row.tiles])
        axes.imshow(strip)
        # names may hold a dollar sign
        axes.set_title(row.text, color=row.color, loc="left", fontsize="medium", parse_math=False)
        centers = (np.arange(columns) + 0.5) * strip.shape[1] / columns
        axes.set_xticks(centers, [tile.caption for tile in row.tiles], fontsize=6)
        axes.tick_params(length=0, labelleft=False)
        axes.set(frame_on=False, anchor="W")
    return figure
