"""Figures of kept patches and of attention, against plain recomputations from the same weights."""

import copy
import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from timm.layers import Attention
from torch import Tensor, nn

import datasets
import main
import models
from util import attention, figures, visualize
from util.config import ModelConfig
from util.errors import InputError

assert models.evit  # registers the models
NAMES = ["ant", "bee", "cat"]
CONFIG = ModelConfig("any", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def build(name: str, **kwargs) -> nn.Module:
    """Return a small model whose attention is far from even."""
    torch.manual_seed(0)
    small = {"embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 3}
    model = timm.create_model(name, **(small | kwargs)).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return model


evit = partial(build, "deit_tiny_patch16_shrink_base", depth=6, drop_loc=(1, 3, 4), img_size=(96, 64))
dhvt = partial(build, "dhvt_tiny_cifar_patch4", img_size=(30, 22))
small_evit = partial(evit, img_size=32, depth=2, drop_loc=(1,))
small_dhvt = partial(dhvt, img_size=16, depth=2)
distilled = partial(build, "deit_tiny_distilled_patch16_224", img_size=(96, 64), patch_size=(16, 8))
# model, image size, patch size and number of tokens before the patches
VITS = {
    "DHVT, which pads its images": (dhvt, (30, 22), (4, 4), 1),
    "distilled DeiT, oblong patches": (distilled, (96, 64), (16, 8), 2),
    "EViT with all tokens": (partial(evit, base_keep_rate=1.0, depth=3, drop_loc=(1,)), (96, 64), (16, 16), 1),
}


def photographs(n: int, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """Return random pixels, uint8 [n, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def grid_of(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of patches that cover an image."""
    return math.ceil(size[0] / patch[0]), math.ceil(size[1] / patch[1])


def normalize(pixels: np.ndarray) -> Tensor:
    image = (pixels / 255 - CONFIG.mean) / CONFIG.std
    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)  # 3, H, W


def write(kind, model, folder, pixels, labels=NAMES, classes=NAMES, autocast=nullcontext, **kwargs) -> list[Path]:
    """Write figures of photographs [n, H, W, 3], which have the labels in turn."""
    return visualize.write_pictures(
        kind,
        model,
        ((normalize(array), labels[i % len(labels)], f"{i}.png") for i, array in enumerate(pixels)),
        folder=folder,
        classes=classes,
        autocast=autocast,
        device=torch.device("cpu"),
        config=CONFIG,
        **kwargs,
    )


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.fixture
def sheet(monkeypatch) -> SimpleNamespace:
    """Return what is drawn from now on: texts with their colors, pictures, and the figures that are saved."""
    drawn = SimpleNamespace(texts={}, pictures=[], figures=[])
    set_title = Axes.set_title
    set_xticks = Axes.set_xticks
    imshow = Axes.imshow
    savefig = Figure.savefig

    def record_title(axes, words, **kwargs):
        drawn.texts[words] = kwargs.get("color")
        return set_title(axes, words, **kwargs)

    def record_captions(axes, places, words=None, **kwargs):
        drawn.texts.update(dict.fromkeys(() if words is None else words))
        return set_xticks(axes, places, words, **kwargs)

    def record_imshow(axes, pixels, **kwargs):
        drawn.pictures.append(pixels)
        return imshow(axes, pixels, **kwargs)

    def record_figure(figure, *args, **kwargs):
        drawn.figures.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_title", record_title)
    monkeypatch.setattr(Axes, "set_xticks", record_captions)
    monkeypatch.setattr(Axes, "imshow", record_imshow)
    monkeypatch.setattr(Figure, "savefig", record_figure)
    return drawn


def numbers_in(text: str) -> list[str]:
    """Return the numbers in a text as they are written."""
    return re.findall(r"\d+(?:\.\d+)?", text)


def check_scale(figure: Figure, count: int) -> None:
    """Check that the line on a figure's scale of colors is at the even share of `count`, as its label says."""
    (scale,) = [axes for axes in figure.axes if axes.lines and not axes.images]
    (line,) = scale.lines
    assert list(line.get_xdata()) == [1 / count] * 2
    assert numbers_in(scale.get_xlabel())[-2:] == ["1", str(count)]


def strips(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def check_captions(axes: Axes, values: np.ndarray, numbers: list[list[str]]) -> None:
    """Check that below the middle of each tile are its numbers, if any, and its largest value; the image is first."""
    width = axes.images[0].get_array().shape[1] / (1 + len(values))
    assert list(axes.get_xticks()) == pytest.approx([(k + 0.5) * width for k in range(1 + len(values))], abs=1)
    expected = [[*words, f"{100 * tile.max():.2f}"] for words, tile in zip(numbers, values, strict=True)]
    assert [numbers_in(label.get_text()) for label in axes.get_xticklabels()] == [[], *expected]


def attend(attn: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Attend by the definition, in float64: tokens [N, C] -> weights [h, N, N], output [N, C]."""
    qkv = copy.deepcopy(attn.qkv).double()(tokens.double())  # N, 3C
    q, k, v = qkv.unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)  # h, N, d
    powers = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).exp()
    weights = powers / powers.sum(dim=2, keepdim=True)
    return weights, attn.proj((weights @ v).transpose(0, 1).flatten(1).float())


def head_tokens(attn: nn.Module, tokens: Tensor) -> Tensor:
    """Return DHVT's head tokens of one image: [N, C] -> [h, C]."""
    rows = []
    for part in tokens.mean(dim=0).chunk(attn.num_heads):
        pieces = attn.ht_proj(part).chunk(attn.num_heads)
        rows.append(torch.cat([F.gelu(attn.ht_norm(piece)) for piece in pieces]))
    return torch.stack(rows) + attn.pos_embed[0]


@torch.no_grad()
def plain_weights(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Recompute each block's attention weights [h, N, N] for an image, in float64.

    The attention's output, recomputed from the same weights, is that of the forward pass.
    """
    calls = []
    hooks = [b.attn.register_forward_hook(lambda *call: calls.append(call)) for b in model.blocks]
    model(image[None])
    for hook in hooks:
        hook.remove()
    found = []
    for attn, args, output in calls:
        assert attn.fused_attn
        tokens = args[0][0]
        N = len(tokens)
        is_dhvt = hasattr(attn, "ht_proj")
        if is_dhvt:
            tokens = torch.cat([tokens, head_tokens(attn, tokens)])
        weights, again = attend(attn, tokens)
        if is_dhvt:
            again[0] += again[N:].mean(dim=0)
        torch.testing.assert_close(again[:N], output[0], atol=1e-4, rtol=1e-4)
        found.append(weights)
    return found


@pytest.mark.parametrize("name", VITS)
def test_weights_are_those_of_the_forward_pass_and_the_model_is_left_as_it_was(name):
    make, size, *_ = VITS[name]
    model = make()
    image = normalize(photographs(1, size)[0])
    expected = plain_weights(model, image)
    with torch.inference_mode():
        logits, weights = attention.record_weights(model, image[None])
        again = model(image[None])
    np.testing.assert_allclose(weights, torch.stack(expected), atol=1e-6)
    torch.testing.assert_close(logits, again, atol=1e-5, rtol=1e-5)
    assert all(block.attn.fused_attn and not block.attn.attn_drop._forward_pre_hooks for block in model.blocks)


def shown(files: list[Path], part: str, name: str = "values") -> np.ndarray:
    """Return the numbers beside the figure whose name contains `part`."""
    (path,) = [path for path in files if part in path.name]
    with np.load(path.with_suffix(".npz")) as numbers:
        return numbers[name]


@pytest.mark.parametrize("name", VITS)
def test_attention_is_shown_per_head_and_as_the_mean_in_colors_of_one_scale(name, tmp_path, sheet):
    make, (H, W), patch, before = VITS[name]
    model = make()
    photos = photographs(2, (H, W))
    files = write("attention", model, tmp_path, photos, npz=True)
    assert [path.name for path in files] == ["attention_0000.png", "attention_0001.png", "attention_overview.png"]
    grid = grid_of((H, W), patch)
    means = []
    for i, photo in enumerate(photos):
        values = shown(files, f"_000{i}")
        weights = plain_weights(model, normalize(photo))
        assert values.shape == (3, 1 + 3, *grid)
        for block in range(3):
            heads = [weights[block][head, 0, before : before + math.prod(grid)].reshape(grid) for head in range(3)]
            mean = sum(heads) / 3
            for tile, expected in zip(values[block], [mean, *heads], strict=True):
                np.testing.assert_allclose(tile, expected, atol=1e-6)
                assert any(text.endswith(f"largest {expected.max():.2%}") for text in sheet.texts)
            means.append(mean)
    overview = shown(files, "overview")
    np.testing.assert_allclose(overview.reshape(6, *grid), torch.stack(means), atol=1e-6)
    assert overview.max() > 2 * overview.mean(), "too even to tell weights apart"

    # the last two strips are the overview's: the image and three blocks, each in a border
    low, high = overview.min(), overview.max()
    for strip, photo, tiles in zip(sheet.pictures[-2:], photos, overview, strict=True):
        image, *drawn = (tile[:, W // 20 : tile.shape[1] - W // 20] for tile in np.hsplit(strip, 4))
        np.testing.assert_array_equal(image, photo)
        for picture, values in zip(drawn, tiles, strict=True):
            colors = matplotlib.colormaps["inferno"](((values - low) / (high - low)) ** 0.5, bytes=True)[..., :3]
            np.testing.assert_array_equal(picture, colors.repeat(patch[0], axis=0).repeat(patch[1], axis=1)[:H, :W])

    for figure in sheet.figures:
        check_scale(figure, math.prod(grid))
    for i, figure in enumerate(sheet.figures[:2]):
        titles = [axes.get_title("left") for axes in strips(figure)]
        assert all(title.endswith(f" {i}.png, block {block}") for block, title in enumerate(titles, start=1))
        assert shown(files, f"_000{i}", "texts").tolist() == titles
        for axes, tiles in zip(strips(figure), shown(files, f"_000{i}"), strict=True):
            check_captions(axes, tiles, [[], ["1"], ["2"], ["3"]])
    titles = [axes.get_title("left") for axes in strips(sheet.figures[2])]
    assert all(f" {i}.png" in title for i, title in enumerate(titles))
    assert shown(files, "overview", "texts").tolist() == titles
    for axes, tiles in zip(strips(sheet.figures[2]), overview, strict=True):
        check_captions(axes, tiles, [["1"], ["2"], ["3"]])


def test_head_tokens_are_shown_in_their_own_heads(tmp_path):
    model = dhvt()
    photo = photographs(1, (30, 22))[0]
    values = shown(write("head_tokens", model, tmp_path, [photo], npz=True, blocks=[3, 1]), "_0000")
    weights = plain_weights(model, normalize(photo))
    assert values.shape == (2, 3, 8, 6)
    for row, block in zip(values, (0, 2), strict=True):
        for i in range(3):
            np.testing.assert_allclose(row[i].ravel(), weights[block][i, 1 + 48 + i, 1:49], atol=1e-6)


@pytest.mark.parametrize("name", VITS)
def test_matrices_are_means_over_heads_and_in_the_overview_over_images(name, tmp_path, sheet):
    make, size, patch, before = VITS[name]
    model = make()
    photos = photographs(2, size)
    files = write("matrix", model, tmp_path, photos, npz=True, blocks=[3, 2])
    weights = [plain_weights(model, normalize(photo)) for photo in photos]
    expected = [torch.stack([image[block].mean(dim=0) for block in (1, 2)]) for image in weights]
    expected.append(sum(expected) / 2)

    N = expected[0].shape[-1]
    patches_end = before + math.prod(grid_of(size, patch))
    edges = [0, before, patches_end, N] if patches_end < N else [0, before, N]
    for part, matrices, figure in zip(("_0000", "_0001", "overview"), expected, sheet.figures, strict=True):
        values = shown(files, part)
        np.testing.assert_allclose(values, matrices, atol=1e-6)
        check_scale(figure, N)
        for axes, block, matrix in zip(strips(figure), ("2", "3"), values, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
            assert numbers_in(axes.get_title()) == [block, f"{100 * matrix.max():.2f}"]
            # pixel k reaches from k - 0.5 to k + 0.5
            for ends in ([line.get_xdata() for line in axes.lines], [line.get_ydata() for line in axes.lines]):
                places = {start for start, stop in ends if start == stop}
                assert places | {-0.5, N - 0.5} == {edge - 0.5 for edge in edges}
            centers = [(start + stop - 1) / 2 for start, stop in itertools.pairwise(edges)]
            assert list(axes.get_xticks()) == list(axes.get_yticks()) == centers
            # all matrices of a line share the labels at the left
            for labels in (axes.get_xticklabels(), strips(figure)[0].get_yticklabels()):
                names = [label.get_text().split(",")[0] for label in labels]
                assert names == ["class", "patches", "head tokens"][: len(centers)]


def plain_rollout(weights: list[Tensor], before: int, patches: int) -> list[float]:
    """Return the share of each patch in the class token after all blocks, number by number."""
    T = before + patches
    share = [[float(i == j) for j in range(T)] for i in range(T)]
    for block in weights:
        A = block.mean(dim=0).tolist()
        mean = [sum(column) / T for column in zip(*share, strict=True)]
        inputs = share + [mean] * (len(A) - T)
        outputs = [
            [sum(a * row[j] for a, row in zip(A[i], inputs, strict=True)) for j in range(T)] for i in range(len(A))
        ]
        merged = outputs[T:]
        after = []
        for i in range(T):
            row = [s + o for s, o in zip(share[i], outputs[i], strict=True)]
            if i == 0 and merged:
                row = [r + sum(m[j] for m in merged) / len(merged) for j, r in enumerate(row)]
            after.append([r / sum(row) for r in row])
        share = after
    of_patches = share[0][before:]
    return [s / sum(of_patches) for s in of_patches]


@pytest.mark.parametrize("name", VITS)
def test_rollout_multiplies_attention_through_the_blocks(name, tmp_path, sheet):
    make, (H, W), patch, before = VITS[name]
    model = make()
    photo = photographs(1, (H, W))[0]
    values = shown(write("rollout", model, tmp_path, [photo], npz=True), "_0000")
    weights = plain_weights(model, normalize(photo))
    P = math.prod(grid_of((H, W), patch))
    expected = plain_rollout(weights, before, P)
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-4)
    assert max(expected) > 1.2 * min(expected)
    for figure in sheet.figures:
        check_scale(figure, P)


@pytest.mark.parametrize("name", VITS)
def test_distances_are_pixels_weighted_by_attention(name, tmp_path, sheet):
    make, (H, W), patch, before = VITS[name]
    model = make()
    photos = photographs(2, (H, W))
    (path,) = write("distance", model, tmp_path, photos, blocks=[1, 3])
    header, *lines = path.with_suffix(".csv").read_text().splitlines()
    assert header == "block,head 1,head 2,head 3"
    centers = [(r * patch[0], c * patch[1]) for r, c in np.ndindex(grid_of((H, W), patch))]
    P = range(len(centers))
    weights = [plain_weights(model, normalize(photo)) for photo in photos]
    for line, block in zip(lines, (1, 3), strict=True):
        number, *heads = line.split(",")
        assert int(number) == block
        for head, found in enumerate(heads):
            total = 0
            for image in weights:
                rows = image[block - 1][head, before : before + len(P), before : before + len(P)].tolist()
                for i in P:
                    lengths = [math.dist(centers[i], centers[j]) for j in P]
                    total += sum(w * d for w, d in zip(rows[i], lengths, strict=True)) / sum(rows[i])
            assert float(found) == pytest.approx(total / len(P) / 2, rel=1e-4)

    (figure,) = sheet.figures
    *heads, mean, even = figure.axes[0].lines
    table = np.array([line.split(",") for line in lines], float)  # blocks, 1 + h
    for number, head in enumerate(heads, start=1):
        assert numbers_in(head.get_label()) == [str(number)]
        np.testing.assert_allclose(head.get_xydata(), table[:, [0, number]], rtol=1e-4)
    assert "mean" in mean.get_label() and "even" in even.get_label()
    np.testing.assert_allclose(mean.get_ydata(), table[:, 1:].mean(axis=1), rtol=1e-4)
    lengths = [math.dist(a, b) for a in centers for b in centers]
    assert list(even.get_ydata()) == pytest.approx([sum(lengths) / len(lengths)] * 2)
    labels = [line.get_label() for line in (*heads, mean, even)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels


def follow_patches(model: nn.Module, image: Tensor) -> Iterator[tuple[int, dict[int, int | None]]]:
    """Yield each block of drop_loc, and {patch that is left: the block that fused it, or None}, from the tokens."""
    places = model.trace_tokens(image[None])[1]
    P = image.shape[1] * image.shape[2] // 16**2
    fused_in = dict.fromkeys(range(P))
    for block, tokens in places.items():
        numbers = tokens[0].tolist()
        after = {}
        for patch, earlier in fused_in.items():
            if (patch if earlier is None else P + earlier) in numbers:
                after[patch] = earlier
            elif P + block in numbers:
                after[patch] = block
        fused_in = after
        yield block, fused_in


# the model's own size is 96 x 64
@pytest.mark.parametrize(("fuse", "size"), [(False, (96, 64)), (True, (64, 160))])
def test_masks_show_the_patches_that_the_attention_keeps(fuse, size, tmp_path, sheet):
    model = evit(fuse_token=fuse)
    photos = photographs(3, size)
    write("mask", model, tmp_path, photos)
    colors = figures.fused_colors(model)
    assert len(set(colors.values())) == len(colors) == (3 if fuse else 0)
    rows = size[0] // 16
    columns = size[1] // 16
    border = size[1] // 20
    seen = set()
    for photo, strip in zip(photos, sheet.pictures[:3], strict=True):
        image, *masks = (tile[:, border : tile.shape[1] - border] for tile in np.hsplit(strip, 4))
        np.testing.assert_array_equal(image, photo)
        for picture, (block, fused_in) in zip(masks, follow_patches(model, normalize(photo)), strict=True):
            expected = photo.copy()
            patches = expected.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2)  # rows, columns, 16, 16, 3
            for p in range(rows * columns):
                if p not in fused_in:
                    patches[divmod(p, columns)] = 255
                elif fused_in[p] is not None:
                    patches[divmod(p, columns)] = colors[fused_in[p]]
            np.testing.assert_array_equal(picture, expected)
            kept = list(fused_in.values()).count(None)
            tokens = kept + len(set(fused_in.values()) - {None})
            counts = f"{kept} of {rows * columns} patches kept,\n{rows * columns - kept}"
            assert f"after block {block + 1}\n{counts} {'fused' if fuse else 'dropped'}: {tokens} tokens" in sheet.texts
            seen |= set(fused_in.values())
    assert seen == ({None, 1, 3, 4} if fuse else {None})
    expected = [([str(block + 1)], color) for block, color in colors.items()] if fuse else [([], (255, 255, 255))]
    for figure in sheet.figures:
        (legend,) = figure.legends
        found = [
            (numbers_in(words.get_text()), tuple(np.rint(np.multiply(patch.get_facecolor()[:3], 255))))
            for words, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
        ]
        assert found == expected


def test_files_sort_and_the_overview_has_a_row_for_each_of_32_images(tmp_path, sheet):
    files = write("mask", small_evit(), tmp_path, photographs(33, (32, 32)))
    names = [path.name for path in files]
    assert names == [*(f"mask_{i:04}.png" for i in range(33)), "mask_overview.png"] == sorted(names)
    assert set(tmp_path.iterdir()) == set(files)
    # tiles are large enough to print
    assert min(read(files[0]).shape[:2]) > 512
    assert len(sheet.pictures) == 33 + 32


def test_figures_come_as_pdf_too(tmp_path):
    files = write("matrix", small_dhvt(), tmp_path, photographs(1, (16, 16)), file_format="pdf")
    assert {path.read_bytes()[:5] for path in files} == {b"%PDF-"}
    assert {path.suffix for path in files} == {".pdf"}


@pytest.mark.parametrize(
    ("kind", "depth", "rows"),
    [("head_tokens", 11, [2, 5, 8, 11]), ("head_tokens", 10, range(1, 11)), ("attention", 11, range(1, 12))],
)
def test_default_blocks_are_the_papers_or_all(kind, depth, rows, tmp_path, sheet):
    write(kind, dhvt(img_size=16, depth=depth), tmp_path, photographs(1, (16, 16)))
    blocks = [text.split(", block ")[1] for text in sheet.texts if ", block " in text]
    assert blocks == [str(block) for block in rows]


def test_pictures_of_an_earlier_call_go_and_other_files_stay(tmp_path):
    other = ["notes.txt", "0001.png", "attention_1.png", "attention_0001.png.bak", "my_attention_0001.png"]
    other += ["mask_0001.png", "attention_notes.png"]
    earlier = ["attention_0009.png", "attention_0000.pdf", "attention_0001.npz", "attention_overview.pdf"]
    for name in [*other, *earlier]:
        (tmp_path / name).write_text("?")
    files = write("attention", small_dhvt(), tmp_path, photographs(1, (16, 16)))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files} | set(other)


@pytest.mark.parametrize(
    ("labels", "classes", "colors"),
    [
        (["ant", "bee", "$x_$^"], NAMES, ["red", "black", "red"]),
        ([None], NAMES, ["black"]),
        (["2", "1"], None, ["red", "black"]),
    ],
)
def test_only_predictions_that_contradict_a_known_label_are_red(labels, classes, colors, tmp_path, sheet):
    model = small_evit()
    nn.init.zeros_(model.head.weight)
    # always bee, as e : 1 + e + 1 / e
    model.head.bias.data = torch.tensor([0.0, 1.0, -1.0])
    write("mask", model, tmp_path, photographs(len(labels), (32, 32)), labels, classes)
    titles = {text: color for text, color in sheet.texts.items() if text.endswith(".png")}
    assert list(titles.values()) == colors
    assert all(f"{'bee' if classes else '1'} (67%)" in text for text in titles)


def test_pictures_are_made_in_eval_mode_under_the_given_precision(tmp_path):
    model = evit(drop_path_rate=0.5, base_keep_rate=1.0).train()
    calls = set()
    model.head.register_forward_hook(lambda module, args, out: calls.add((out.dtype, module.training)))
    for kind in ("mask", "attention"):
        write(kind, model, tmp_path, photographs(1), autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert calls == {(torch.bfloat16, False)}


def test_a_full_disk_leaves_no_half_picture_and_no_image_is_an_error_that_changes_nothing(tmp_path, monkeypatch):
    earlier = tmp_path / "mask_0000.png"
    earlier.touch()
    with pytest.raises(InputError, match="no image"):
        write("mask", small_evit(), tmp_path, photographs(0))
    assert earlier.exists()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write("attention", small_dhvt(), tmp_path, photographs(1, (16, 16)))
    assert list(tmp_path.iterdir()) == [earlier]


SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 10}


@pytest.mark.parametrize(
    ("kind", "name", "kwargs", "remedy"),
    [
        ("mask", "deit_tiny_patch16_shrink_base", SMALL | {"drop_loc": ()}, "--visualize attention"),
        ("matrix", "resnet10t", {}, "DHVT, DeiT"),
        ("rollout", "vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}, "--visualize matrix"),
        ("distance", "deit_tiny_patch16_shrink_base", SMALL, "--base_keep_rate 1 .*--visualize mask"),
        ("head_tokens", "deit_tiny_patch16_224", SMALL | {"img_size": (96, 64)}, "--visualize attention"),
        ("head_tokens", "deit_tiny_patch16_shrink_base", SMALL, "--visualize attention"),
    ],
)
def test_a_model_with_nothing_to_show_is_refused_before_anything_is_written(kind, name, kwargs, remedy, tmp_path):
    model = timm.create_model(name, **kwargs)
    with pytest.raises(InputError, match=remedy) as caught:
        write(kind, model, tmp_path / "new", photographs(1))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_evit_in_which_no_block_drops_tokens_shows_its_attention(tmp_path):
    model = timm.create_model("deit_tiny_patch16_shrink_base", **SMALL, drop_loc=())
    assert write("distance", model, tmp_path / "new", photographs(1))


def test_attention_pooling_is_not_counted_among_the_blocks(tmp_path):
    model = timm.create_model("vit_base_patch16_siglip_224", **SMALL, img_size=(96, 64))
    assert write("distance", model, tmp_path / "new", photographs(1))


@pytest.mark.parametrize(("kind", "block"), [("matrix", 3), ("matrix", 0), ("mask", 1)])
def test_blocks_that_are_not_there_are_refused(kind, block, tmp_path):
    model = small_evit() if kind == "mask" else small_dhvt()
    with pytest.raises(InputError, match=f"--blocks {block}: "):
        write(kind, model, tmp_path / "new", photographs(1, (16, 16)), blocks=[block])
    assert list(tmp_path.iterdir()) == []


def test_head_tokens_are_counted_in_the_weights(tmp_path):
    model = small_dhvt()
    for block in model.blocks:
        block.attn = Attention(48, 3)
    (photo,) = photographs(1, (16, 16))
    values = shown(write("matrix", model, tmp_path, [photo], npz=True), "_0000")
    assert values.shape == (2, 17, 17)
    with pytest.raises(InputError, match="head_tokens"):
        write("head_tokens", model, tmp_path, [photo])


def test_main_shows_images_from_all_parts_of_the_data_that_the_checkpoint_names(tiny_run, tmp_path, capsys, sheet):
    words = ["--visualize", "attention", "--n_visualization", "5", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main.main([*words, "--npz", "--resume", str(tiny_run / "checkpoint.pth")]) == 0
    folder = tmp_path / "visualization"
    line = f"6 pictures of 5 images are in {folder}; open {folder / 'attention_overview.png'} first"
    assert line in capsys.readouterr().out
    digits = datasets.load_digits(False, (32, 32), None).data
    for k in range(5):
        np.testing.assert_array_equal(sheet.pictures[k][:, 1:33], digits[72 * k])
        assert (folder / f"attention_{k:04}.npz").exists()
