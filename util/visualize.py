"""Pictures of what a model looks at: the patches that stay tokens, or the class token's attention, block by block.

Letters in shape comments: B images, H x W pixels, P patches, N tokens (class token first), C channels, h heads.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from torch import Tensor, nn

from util.errors import InputError

SHEETS = {"mask": "contact_sheet.png", "attention": "attention_sheet.png"}
OURS = r"(?:\d{4,}_\d\d+_(?:input|block\d\d+|attention\d\d+)|contact_sheet|attention_sheet)\.png"
OURS = re.compile(rf"{OURS}|\.{OURS}\.tmp")
BATCH = 16

OWN, DROPPED = -1, -2  # of a patch: a token of its own; in no token
FUSED_COLOURS = (  # Okabe and Ito's, then darker ones: by position in drop_loc, not by number of the block
    *((230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0)),
    *((120, 94, 0), (0, 60, 94), (0, 84, 61), (112, 60, 90), (240, 228, 66), (110, 48, 0)),
)
INFERNO = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # at 0, 1/4, ... 1

LARGEST, LEAST_WIDTH = 6000, 680  # of a sheet, in pixels
SIDES = (112, 96, 80, 64, 56)  # of a tile, at most: the first with which all images fit the sheet
MARGIN, GAP, LINE = 20, 6, 16
PAPER, INK, FAINT, RED = (236, 236, 236), (20, 20, 20), (105, 105, 105), (200, 0, 0)
SMALL, TEXT, TITLE = (ImageFont.load_default(size=size) for size in (11, 13, 19))


class Tile(NamedTuple):
    """A picture of one image: part of its file name, captions above and below, the head tokens' weights [h] or None."""

    name: str
    above: str
    below: str = ""
    strip: np.ndarray | None = None


class Group(NamedTuple):
    """What the sheet shows of one image."""

    source: str
    label: str | None
    predicted: str
    percent: str
    wrong: bool
    tiles: list[tuple[Tile, Path]]


def write_pictures(
    kind: str,
    model: nn.Module,
    samples: Iterable[tuple[Tensor, str | None, str]],
    count: int,
    folder: Path,
    classes: Sequence[str] | None,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> list[Path]:
    """Write each image and, per block, its picture of `kind`, "mask" or "attention"; give the files, the sheet last.

    `samples` gives normalised images [3, H, W] of one size, each with its label, if known, and the name of its source;
    `count` are taken, fewer when they run out. `classes` are the names of the model's outputs. Pictures that an earlier
    call left in the folder are removed. The head tokens' weights are on the sheet alone. The model stays in evaluation
    mode. Raises InputError for a model with nothing to show, no image, and a folder that cannot be written.
    """
    check(kind, model)
    samples = iter(samples)
    first = next(samples, None) if count > 0 else None
    if first is None:
        raise InputError(f"{folder}: there is no image to show, nothing was written")
    samples = chain([first], islice(samples, count - 1))
    with one_line(folder):
        prepare(folder)
    model.eval()
    picture, digits, groups = {"mask": mask_tiles, "attention": attention_tiles}[kind], len(str(count - 1)), []
    while batch := list(islice(samples, BATCH)):
        images = torch.stack([image for image, _, _ in batch])
        pixels = denormalise(images)
        with torch.inference_mode(), autocast():
            logits, tiles = picture(model, images.to(device), pixels)
        best = logits.float().softmax(dim=1).max(dim=1)
        names = list(classes or ()) + [str(i) for i in range(len(classes or ()), logits.shape[1])]
        for i, (_, label, source) in enumerate(batch):
            written = []
            for step, (tile, array) in enumerate([(Tile("input", "input"), pixels[i]), *tiles[i]]):
                path = folder / f"{len(groups):0{max(4, digits)}}_{step:02}_{tile.name}.png"
                with one_line(folder):
                    save(Image.fromarray(array), path)
                written.append((tile, path))
            predicted, percent = names[int(best.indices[i])], f"{100 * best.values[i].item():.0f} %"
            groups.append(Group(source, label, predicted, percent, label in names and label != predicted, written))
    with one_line(folder):
        sheet = folder / SHEETS[kind]
        save(draw_sheet(*(mask_legend if kind == "mask" else attention_legend)(model), groups), sheet)
    return [path for group in groups for _, path in group.tiles] + [sheet]


def check(kind: str, model: nn.Module) -> None:
    name = model_name(model)
    if kind == "mask":
        if not (hasattr(model, "trace_tokens") and model.drop_loc):
            raise InputError(f"{name} does not reorganise tokens: --visualize_mask is for *_shrink_base models")
        return
    blocks = getattr(model, "blocks", ())
    if not blocks or not all(isinstance(getattr(block, "attn", None), Attention) for block in blocks):
        raise InputError(
            f"{name} has no class attention to show: --visualize_attention is for DHVT, DeiT, ViT and EViT"
        )
    if getattr(model, "cls_token", None) is None:
        raise InputError(f"{name} has no class token, whose attention --visualize_attention shows")
    if min(getattr(model, "keep_rates", [1.0])) < 1.0:
        raise InputError(
            f"{name} keeps only some tokens: give --base_keep_rate 1 to see its attention to all patches, "
            "or --visualize_mask to see which it keeps"
        )


def model_name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: pictures cannot be written there ({error.strerror or error})") from None


def prepare(folder: Path) -> None:
    """Create the folder, see that a file can be written, remove our pictures of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{SHEETS['mask']}.tmp"
    try:
        probe.write_bytes(b"?")
    finally:
        probe.unlink(missing_ok=True)
    for path in [path for path in folder.iterdir() if OURS.fullmatch(path.name) and not path.is_dir()]:
        path.unlink()


def save(image: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        image.save(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def denormalise(images: Tensor) -> np.ndarray:
    """Undo to-tensor and normalisation, exactly: [B, 3, H, W] -> uint8 [B, H, W, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels = (images.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def patch_numbers(model: nn.Module, size: tuple[int, int]) -> np.ndarray:
    """Give the number of the patch that each pixel belongs to, [H, W]; the last patches take what is over."""
    sides = zip(
        size, model.patch_embed.dynamic_feat_size(size), model.patch_embed.feat_ratio(as_scalar=False), strict=True
    )
    rows, columns = (np.minimum(np.arange(pixels) // patch, cells - 1) for pixels, cells, patch in sides)
    return rows[:, None] * (columns[-1] + 1) + columns


def follow_patches(places: dict[int, Tensor], patches: int) -> dict[int, Tensor]:
    """Say where each patch is after each block: {block: [B, P]}.

    It is OWN, a token of its own; DROPPED; or b, in the token that block b fused. `places` is EViT.trace_tokens':
    {block: [B, n]} the tokens after the block, by patch number, or P + b for the one that block b fused.
    """
    owners = {}
    for block, tokens in sorted(places.items()):
        B = len(tokens)
        if not owners:
            token = torch.arange(patches, device=tokens.device).repeat(B, 1)  # B, P: the token a patch is in, or -1
        alive = torch.zeros(B, patches + block + 1, dtype=torch.bool, device=tokens.device).scatter(1, tokens, True)
        stays = alive.gather(1, token.clamp(min=0))
        fused = torch.where(alive[:, -1:], patches + block, -1)  # B, 1
        token = torch.where(token < 0, -1, torch.where(stays, token, fused))
        owners[block] = torch.where(token < 0, DROPPED, torch.where(token < patches, OWN, token - patches))
    return owners


def mask_tiles(model: nn.Module, images: Tensor, pixels: np.ndarray) -> tuple[Tensor, list[list]]:
    """Give the logits, and per image the tiles of its blocks, each with its picture, uint8 [H, W, 3]."""
    patch = patch_numbers(model, tuple(images.shape[-2:]))  # H, W
    patches = int(patch.max()) + 1
    logits, places = model.trace_tokens(images)
    owners = follow_patches(places, patches)
    paint = np.full((max(owners) + 3, 3), 255, dtype=np.uint8)  # row 0 is DROPPED's
    for block, colour in fused_colours(model).items():
        paint[block + 2] = colour
    tiles = [[] for _ in images]
    for block, owner in ((block, owner.cpu().numpy()) for block, owner in owners.items()):
        for i, own in enumerate(owner):
            of_pixel = own[patch]  # H, W
            picture = np.where(of_pixel[..., None] == OWN, pixels[i], paint[of_pixel + 2])
            tiles[i].append((Tile(f"block{block:02}", f"block {block}", f"{(own == OWN).sum()}/{patches}"), picture))
    return logits, tiles


def fused_colours(model: nn.Module) -> dict[int, tuple[int, int, int]]:
    return {block: FUSED_COLOURS[i % len(FUSED_COLOURS)] for i, block in enumerate(model.drop_loc)}


def class_weights(attn: Attention, x: Tensor) -> Tensor:
    """Give what the class token gives each token in timm's attention: [B, N, C] -> [B, h, N]."""
    B, N, _ = x.shape
    q, k, _ = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q[:, :, :1]), attn.k_norm(k)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]


def class_attention(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Give the logits, and the class token's weights in every block of the same pass: [B, blocks, h, N].

    They are in the order of the tokens: class token, other prefix tokens, patches, and DHVT's h head tokens.
    """
    found = []

    def record(attn: Attention, inputs: tuple[Tensor, ...]) -> None:
        own = getattr(attn, "class_weights", None)
        found.append(class_weights(attn, inputs[0]) if own is None else own(inputs[0]))

    hooks = [block.attn.register_forward_pre_hook(record) for block in model.blocks]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, torch.stack(found, dim=1)


def attention_tiles(model: nn.Module, images: Tensor, pixels: np.ndarray) -> tuple[Tensor, list[list]]:
    """Give the logits, and per image the tiles of its blocks, each with its picture, uint8 [H, W, 3]."""
    patch = patch_numbers(model, tuple(images.shape[-2:]))  # H, W
    logits, weights = class_attention(model, images)
    weights = weights.float().mean(dim=2).nan_to_num().cpu().numpy()  # B, blocks, N
    grey = pixels.mean(axis=3, keepdims=True)  # colour is the map's
    start = model.num_prefix_tokens
    end = start + int(patch.max()) + 1
    tiles = [[] for _ in images]
    for i, rows in enumerate(weights):
        for block, row in enumerate(rows):
            heads = row[end:] if len(row) > end else None
            share = "" if heads is None else f"{100 * heads.sum():.0f} %"
            picture = np.rint(0.35 * grey[i] + 0.65 * heat(row[start:end])[patch]).astype(np.uint8)
            tiles[i].append((Tile(f"attention{block:02}", f"block {block}", share, heads), picture))
    return logits, tiles


def heat(values: np.ndarray) -> np.ndarray:
    """Colour numbers from 0 to their maximum: [n] -> [n, 3]."""
    values = values / max(values.max(), 1e-12)
    return np.stack([np.interp(values, np.linspace(0, 1, len(INFERNO)), c) for c in np.transpose(INFERNO)], axis=-1)


Line = list[str | Image.Image]  # of a legend: texts, and patches of colour


def mask_legend(model: nn.Module) -> tuple[str, list[Line]]:
    lines = [[f"Keep rate {model.base_keep_rate:g} at block {', '.join(map(str, model.drop_loc))}, counted from 0."]]
    if model.fuse_token:
        swatches = [[swatch(colour), str(block)] for block, colour in fused_colours(model).items()]
        lines.append(["Coloured: patches in the one token that was fused in block", *chain(*swatches)])
    else:
        lines.append([swatch((255, 255, 255)), "dropped patches."])
    lines.append(["Seen as in the input: patches that are a token each; below, how many of all they are."])
    return f"{model_name(model)}: the patches it keeps", lines


def attention_legend(model: nn.Module) -> tuple[str, list[Line]]:
    bar = Image.fromarray(np.tile(heat(np.linspace(0, 1, 90)).astype(np.uint8), (11, 1, 1)))
    lines = [["Attention of the class token to each patch, mean of the heads: 0", bar, "the block's largest."]]
    if hasattr(model.blocks[0].attn, "class_weights"):
        lines.append(
            ["Strip: to each head token, from 0 to the largest; %: the part of all its attention that they get."]
        )
    return f"{model_name(model)}: where its class token looks", lines


def swatch(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (13, 11), FAINT)
    image.paste(colour, (1, 1, 12, 10))
    return image


def draw_sheet(title: str, legend: list[Line], groups: list[Group]) -> Image.Image:
    """Draw a group of tiles an image, in columns, about as wide as high; only the first groups if not all can fit."""
    with Image.open(groups[0].tiles[0][1]) as first:
        size = first.size
    legend = draw_legend([*legend, ["Above: label, arrow, prediction, its probability;", swatch(RED), "where wrong."]])
    top = MARGIN + 30 + legend.height + 2 * GAP
    for side in SIDES:
        tile, (width, height) = measure(size, side, groups[0])
        columns = min(
            range(1, len(groups) + 1), key=lambda n: max(n * width, top + math.ceil(len(groups) / n) * height)
        )
        rows = math.ceil(len(groups) / columns)
        if max(columns * width + MARGIN, top + rows * height) <= LARGEST:
            break
    else:
        columns, rows = max(1, (LARGEST - MARGIN) // width), max(1, (LARGEST - top) // height)
    shown = groups[: columns * rows]
    some = "" if len(shown) == len(groups) else f"first {len(shown)} of "
    title += f", {some}{len(groups)} image{'s' * (len(groups) > 1)}"
    sheet = Image.new("RGB", (max(LEAST_WIDTH + MARGIN, columns * width) + MARGIN, top + rows * height), PAPER)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), fit(title, LEAST_WIDTH, TITLE), INK, TITLE)
    sheet.paste(legend, (MARGIN, MARGIN + 30))
    for i, group in enumerate(shown):
        draw_group(sheet, group, MARGIN + i % columns * width, top + i // columns * height, tile)
    return sheet


def draw_legend(lines: list[Line]) -> Image.Image:
    image = Image.new("RGB", (LEAST_WIDTH, 600), PAPER)
    y = 0
    for line in lines:
        x = 0
        for part in chain.from_iterable(part.split() if isinstance(part, str) else [part] for part in line):
            width = TEXT.getlength(part) if isinstance(part, str) else part.width
            if x + width + 24 * (not isinstance(part, str)) > LEAST_WIDTH:  # a colour stays with what comes next
                x, y = 0, y + LINE
            if isinstance(part, str):
                ImageDraw.Draw(image).text((x, y), part, INK, TEXT)
            else:
                image.paste(part, (int(x), y + 3))
            x += width + 5
        y += LINE + 3
    return image.crop((0, 0, LEAST_WIDTH, y))


def measure(size: tuple[int, int], side: int, group: Group) -> tuple[tuple[int, int], tuple[int, int]]:
    """Give the (width, height) of a tile, shrunk to `side` or enlarged by a whole number, and of a group's place."""
    scale = side / max(size)
    scale = math.floor(scale) if scale >= 1 else scale
    tile = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    last = group.tiles[-1][0]
    height = tile[1] + (3 + bool(last.below)) * LINE + 13 * (last.strip is not None) + 18
    return tile, (len(group.tiles) * (max(tile[0], SIDES[-1]) + GAP) + MARGIN, height)


def draw_group(sheet: Image.Image, group: Group, x: int, y: int, tile: tuple[int, int]) -> None:
    draw, pitch, colour = ImageDraw.Draw(sheet), max(tile[0], SIDES[-1]) + GAP, RED if group.wrong else INK
    width = len(group.tiles) * pitch - GAP
    number = group.tiles[0][1].name.partition("_")[0]
    draw.text((x, y + LINE), fit(f"{number}: {group.source}", width, SMALL), FAINT, SMALL)
    for i, (what, path) in enumerate(group.tiles):
        left, below = x + i * pitch, y + 3 * LINE + tile[1] + 3
        draw.text((left, y + 2 * LINE), fit(what.above, pitch - GAP, SMALL), INK, SMALL)
        with Image.open(path) as picture:
            small = picture.resize(tile, Image.Resampling.BOX)  # enlarged by a whole number, it repeats the pixels
            sheet.paste(small, (left, y + 3 * LINE))
        if what.strip is not None:
            strip = Image.fromarray(heat(what.strip)[None].astype(np.uint8))
            sheet.paste(strip.resize((tile[0], 10), Image.Resampling.NEAREST), (left, below))
            below += 13
        draw.text((left, below), fit(what.below, pitch - GAP, SMALL), INK, SMALL)
    percent = f"  {group.percent}"
    room = width - 26 - TEXT.getlength(percent)
    if group.label is not None:
        label = fit(group.label, max(room / 2, room - TEXT.getlength(plain(group.predicted))), TEXT)
        draw.text((x, y), label, colour, TEXT)
        x, room = x + TEXT.getlength(label) + 6, room - TEXT.getlength(label)
    draw.line((x, y + 8, x + 12, y + 8), colour)  # an arrow, which the font lacks
    draw.polygon([(x + 14, y + 8), (x + 9, y + 5), (x + 9, y + 11)], colour)
    draw.text((x + 20, y), fit(group.predicted, room, TEXT) + percent, colour, TEXT)


def plain(text: str) -> str:
    """Write a text in one line of the letters that the font has, without accents."""
    letters = unicodedata.normalize("NFKD", " ".join(text[:200].split()))
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in letters if not unicodedata.combining(c))


def fit(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a text to a width in pixels, as drawn."""
    text = short = plain(text)
    while short and font.getlength(text) > width:
        short = short[:-1]
        text = short.rstrip() + "…"
    return text
