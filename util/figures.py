"""Figures of what a model looks at: images with maps of their patches beside them, matrices, and distances.

Blocks, heads and head tokens are counted from 1. Shape comments: H x W pixels, P patches, N tokens, h heads.
"""

import math
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import nn

from util.attention import TokenLayout

TITLES = {
    "mask": "patches that are still tokens (--drop_loc counts blocks from 0)",
    "attention": "attention of the class token to the patches",
    "head_tokens": "attention of each head token, in its own head, to the patches",
    "matrix": "attention of each token (row) to each token (column), mean of the heads; patches row by row",
    "rollout": "attention rollout: share of the class token that comes from each patch",
    "distance": "mean attention distance between patches",
}
COLORS = matplotlib.colormaps["inferno"]


class Row(NamedTuple):
    """An image [H, W, 3] and, as tiles beside it, numbers of its patches, [tiles, rows, columns], with captions."""

    text: str
    color: str
    pixels: np.ndarray
    values: np.ndarray
    captions: list[str]


class Picture(NamedTuple):
    """A figure, the name of its file, and the numbers that it shows."""

    name: str
    figure: Figure
    numbers: dict[str, np.ndarray]


def fused_colors(model: nn.Module) -> dict[int, tuple]:
    """Return the color, (red, green, blue) up to 255, of the token that each block fuses, by the block's number."""
    blocks = model.drop_loc if model.fuse_token else ()
    return {block: matplotlib.colormaps["tab10"](i % 10, bytes=True)[:3] for i, block in enumerate(blocks)}


def paint_mask(
    model: nn.Module,
    pixels: np.ndarray,
    tokens: np.ndarray,
) -> np.ndarray:
    """Return an image [H, W, 3] with dropped patches in white, fused ones in the color of the block that fused them."""
    token = to_pixels(model, tokens, pixels)  # H, W
    picture = pixels.copy()
    picture[token < 0] = 255
    for block, color in fused_colors(model).items():
        picture[token == tokens.size + block] = color
    return picture


def to_pixels(
    model: nn.Module,
    values: np.ndarray,
    pixels: np.ndarray,
) -> np.ndarray:
    """Return for each pixel of an image [H, W, 3] the value of its patch: [rows, columns] -> [H, W]."""
    H, W, _ = pixels.shape
    height, width = model.patch_embed.feat_ratio(as_scalar=False)
    # patches reach beyond an image that the model pads
    return values.repeat(height, axis=0).repeat(width, axis=1)[:H, :W]


def describe(model: nn.Module, kind: str) -> str:
    return f"{model.pretrained_cfg['architecture']}: {TITLES[kind]}"


def add_colorbar(figure: Figure, values: np.ndarray, label: str, count: int, **kwargs) -> PowerNorm:
    """Add the scale of a figure's colors, with numbers and a line at the even share of `count`; return the scale."""
    # square roots, so that small weights can be told apart beside a large one
    norm = PowerNorm(0.5, values.min(), values.max())
    bar = figure.colorbar(
        ScalarMappable(norm, COLORS),
        label=f"{label} (square-root scale), largest {norm.vmax:.2%}; line: even, 1/{count}",
        ticks=MaxNLocator(4),
        format="{x:.2%}",
        **kwargs,
    )
    bar.ax.axvline(1 / count, color="cyan")
    return norm


def draw_rows(
    name: str,
    kind: str,
    model: nn.Module,
    rows: list[Row],
    tile_inches: float,
) -> Picture:
    """Draw rows, each an image and its tiles side by side, with one scale of colors or a legend."""
    H, W, _ = rows[0].pixels.shape
    columns = 1 + len(rows[0].values)
    # sizes in inches; a layout engine would take most of the time
    row_height = tile_inches * H / W
    between = 0.75
    width = max(8, tile_inches * columns)
    height = len(rows) * (row_height + between) + 1.1
    # on a grey background white patches can be seen
    figure = Figure((width, height), facecolor="0.93")
    grid = figure.subplots(len(rows), squeeze=False)
    figure.subplots_adjust(
        left=0.05 / width,
        right=tile_inches * columns / width,
        bottom=(between - 0.3) / height,
        top=1 - 1.35 / height,
        hspace=between / row_height,
    )
    figure.text(
        0.1 / width,
        1 - 0.1 / height,
        describe(model, kind),
        va="top",
        fontsize="large",
    )

    # what colors mean
    place = (0.3 / width, 1 - 0.6 / height, 5 / width, 0.15 / height)
    all_values = np.stack([row.values for row in rows])
    if kind == "mask":
        add_mask_legend(figure, model, place)
    else:
        label = "share" if kind == "rollout" else "attention weight"
        patch_count = rows[0].values[0].size
        norm = add_colorbar(
            figure,
            all_values,
            label,
            patch_count,
            cax=figure.add_axes(place),
            orientation="horizontal",
        )

    # one set of axes per row, since one per tile would take ten times as long
    for axes, row in zip(grid.flat, rows, strict=True):
        tiles = [row.pixels]
        for values in row.values:
            if kind == "mask":
                tiles.append(paint_mask(model, row.pixels, values))
            else:
                tiles.append(COLORS(norm(to_pixels(model, values, row.pixels)), bytes=True)[..., :3])
        draw_tiles(axes, row, tiles, fontsize=4 + 2 * tile_inches)
    texts = np.array([row.text for row in rows])
    return Picture(name, figure, {"values": all_values, "texts": texts})


def add_mask_legend(figure: Figure, model: nn.Module, place: tuple) -> None:
    """Add what the colors of a mask mean, at a place (left, bottom, width, height) in shares of the figure."""
    patches = [Patch(facecolor="white", edgecolor="black", label="dropped")]
    if model.fuse_token:
        patches = []
    for block, color in fused_colors(model).items():
        patches.append(Patch(facecolor=np.divide(color, 255), label=f"fused by block {block + 1}"))
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=place,
        ncols=4,
    )


def draw_tiles(
    axes: Axes,
    row: Row,
    tiles: list[np.ndarray],
    fontsize: float,
) -> None:
    """Draw tiles [H, W, 3] side by side, the image first, with the row's text and captions."""
    # each with a border of the background's grey
    padding = tiles[0].shape[1] // 20
    border = (0, 0), (padding, padding), (0, 0)
    strip = np.hstack([np.pad(tile, border, constant_values=237) for tile in tiles])
    axes.imshow(strip, interpolation="nearest")
    # names may hold a dollar sign
    axes.set_title(
        row.text,
        color=row.color,
        loc="left",
        fontsize="medium",
        parse_math=False,
    )
    centers = (np.arange(len(tiles)) + 0.5) * strip.shape[1] / len(tiles)
    axes.set_xticks(centers, ["image", *row.captions], fontsize=fontsize)
    axes.tick_params(length=0, labelleft=False)
    axes.set(frame_on=False, anchor="W")


def draw_matrices(
    name: str,
    model: nn.Module,
    text: str,
    matrices: np.ndarray,
    blocks: np.ndarray,
    layout: TokenLayout,
) -> Picture:
    """Draw attention matrices [blocks, N, N] on one scale, with class token, patches and head tokens marked."""
    columns = min(4, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    figure = Figure((max(7, 3.5 * columns), 3.3 * lines + 1.8), layout="constrained")
    grid = figure.subplots(
        lines,
        columns,
        squeeze=False,
        sharey=True,
    )
    figure.suptitle(f"{describe(model, 'matrix')}\n{text}", parse_math=False)
    norm = add_colorbar(
        figure,
        matrices,
        "attention weight",
        matrices.shape[-1],
        ax=grid,
        location="bottom",
        shrink=0.5,
        aspect=40,
    )

    # where the groups of tokens are
    edges = np.array([0, layout.prefix, layout.patches.stop, matrices.shape[-1]]) - 0.5
    present = np.diff(edges) > 0
    prefix = "registers" if model.cls_token is None else "class" if layout.prefix == 1 else "class, …"
    names = np.array([prefix, "patches", "head tokens"])[present]
    centers = ((edges[:-1] + edges[1:]) / 2)[present]

    for axes in grid.flat[len(blocks) :]:
        axes.remove()
    for axes, block, matrix in zip(grid.flat[: len(blocks)], blocks, matrices, strict=True):
        axes.imshow(
            matrix,
            cmap=COLORS,
            norm=norm,
            interpolation="nearest",
        )
        axes.set_title(f"block {block}, largest {matrix.max():.2%}", fontsize="medium")
        axes.set_xticks(centers, names, rotation=30)
        axes.set_yticks(centers, names)
        for edge in edges[1:-1]:
            axes.axhline(edge, color="white", linewidth=0.6)
            axes.axvline(edge, color="white", linewidth=0.6)
    return Picture(name, figure, {"values": matrices, "blocks": blocks})


def draw_distances(
    name: str,
    model: nn.Module,
    text: str,
    values: np.ndarray,
    blocks: np.ndarray,
    even: float,
) -> Picture:
    """Draw mean attention distances [blocks, h] in pixels; `even` is the distance under uniform attention."""
    figure = Figure((9, 5), layout="constrained")
    axes = figure.subplots()
    for head, distances in enumerate(values.T, start=1):
        axes.plot(blocks, distances, "o", label=f"head {head}")
    axes.plot(
        blocks,
        values.mean(axis=1),
        color="0.3",
        label="mean of heads",
    )
    axes.axhline(
        even,
        color="0.6",
        linestyle="--",
        label="even attention",
    )
    axes.set(xlabel="block", ylabel="distance in pixels", xticks=blocks)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.suptitle(f"{describe(model, 'distance')}, {text}")
    return Picture(name, figure, {"values": values, "blocks": blocks})
