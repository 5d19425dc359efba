"""Pictures of kept patches and of attention, against plain recomputations from the same weights."""

import copy
import math
import os
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
from torch import Tensor, nn

import datasets
import main
import models
from util import visualize
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
# model, image size, patch size and number of tokens before the patches
VITS = {
    "DHVT, which pads its images": (dhvt, (30, 22), 4, 1),
    "distilled DeiT": (partial(build, "deit_tiny_distilled_patch16_224", img_size=(96, 64)), (96, 64), 16, 2),
    "EViT with all tokens": (partial(evit, base_keep_rate=1.0, depth=3, drop_loc=(1,)), (96, 64), 16, 1),
}


def photographs(n: int, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """Return random pixels, uint8 [n, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def normalize(pixels: np.ndarray) -> Tensor:
    image = (pixels / 255 - CONFIG.mean) / CONFIG.std
    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)  # 3, H, W


def write(mode, model, folder, pixels, labels=NAMES, classes=NAMES, autocast=nullcontext) -> list[Path]:
    """Write pictures of photographs [n, H, W, 3], which have the labels in turn."""
    return visualize.write_pictures(
        mode,
        model,
        ((normalize(array), labels[i % len(labels)], f"{i}.png") for i, array in enumerate(pixels)),
        folder=folder,
        classes=classes,
        autocast=autocast,
        device=torch.device("cpu"),
        config=CONFIG,
    )


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.fixture
def sheet(monkeypatch) -> SimpleNamespace:
    """Return what is drawn from now on: texts with their colors, and pictures."""
    drawn = SimpleNamespace(texts={}, pictures=[])
    set_title = Axes.set_title
    set_xticks = Axes.set_xticks
    suptitle = Figure.suptitle
    imshow = Axes.imshow

    def record_title(axes, words, **kwargs):
        drawn.texts[words] = kwargs.get("color")
        return set_title(axes, words, **kwargs)

    def record_captions(axes, places, words, **kwargs):
        drawn.texts.update(dict.fromkeys(words))
        return set_xticks(axes, places, words, **kwargs)

    def record_suptitle(figure, words, **kwargs):
        drawn.texts[words] = None
        return suptitle(figure, words, **kwargs)

    def record_imshow(axes, pixels, **kwargs):
        drawn.pictures.append(pixels)
        return imshow(axes, pixels, **kwargs)

    monkeypatch.setattr(Axes, "set_title", record_title)
    monkeypatch.setattr(Axes, "set_xticks", record_captions)
    monkeypatch.setattr(Figure, "suptitle", record_suptitle)
    monkeypatch.setattr(Axes, "imshow", record_imshow)
    return drawn


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
def plain_class_attention(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Recompute the class token's attention in each block, mean of the heads, [N].

    The attention's output, recomputed from the same weights, is that of the forward pass.
    """
    calls = []
    hooks = [b.attn.register_forward_hook(lambda *call: calls.append(call)) for b in model.blocks]
    model(image[None])
    for hook in hooks:
        hook.remove()
    rows = []
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
        rows.append(weights[:, 0].mean(dim=0).float())
    return rows


@pytest.mark.parametrize("name", VITS)
def test_attention_pictures_show_the_weights_of_the_forward_pass(name, tmp_path, sheet):
    make, (H, W), patch, before = VITS[name]
    model = make()
    photos = photographs(2, (H, W))
    files = write("attention", model, tmp_path, photos)
    rows = math.ceil(H / patch)
    columns = math.ceil(W / patch)
    for i, photo in enumerate(photos):
        attention = plain_class_attention(model, normalize(photo))
        with torch.inference_mode():
            found = visualize.class_attention(model, normalize(photo)[None])
        torch.testing.assert_close(found, attention, atol=1e-6, rtol=0)
        for block, (path, weights) in enumerate(zip(files[4 * i + 1 : 4 * i + 4], attention, strict=True)):
            on_patches = weights[before : before + rows * columns]
            assert on_patches.max() > 2 * on_patches.mean(), "too even to tell weights apart"
            shares = (on_patches / on_patches.max()).reshape(rows, columns).numpy()
            colors = matplotlib.colormaps["inferno"](shares, bytes=True)[..., :3]
            expected = colors.repeat(patch, axis=0).repeat(patch, axis=1)[:H, :W]
            # within a step of the color map
            np.testing.assert_allclose(read(path).astype(int), expected, atol=6)
            caption = f"block {block}\nmax {on_patches.max():.1%}"
            if name.startswith("DHVT"):
                caption += f", heads {weights[-3:].sum():.0%}"
            assert caption in sheet.texts


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
def test_mask_pictures_show_the_patches_that_the_attention_keeps(fuse, size, tmp_path, sheet):
    model = evit(fuse_token=fuse)
    photos = photographs(3, size)
    files = write("mask", model, tmp_path, photos)
    colors = visualize.fused_colors(model)
    assert len(set(colors.values())) == len(colors) == (3 if fuse else 0)
    rows = size[0] // 16
    columns = size[1] // 16
    seen = set()
    for i, photo in enumerate(photos):
        masks = follow_patches(model, normalize(photo))
        for path, (block, fused_in) in zip(files[4 * i + 1 : 4 * i + 4], masks, strict=True):
            expected = photo.copy()
            patches = expected.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2)  # rows, columns, 16, 16, 3
            for p in range(rows * columns):
                if p not in fused_in:
                    patches[divmod(p, columns)] = 255
                elif fused_in[p] is not None:
                    patches[divmod(p, columns)] = colors[fused_in[p]]
            np.testing.assert_array_equal(read(path), expected, err_msg=path.name)
            kept = list(fused_in.values()).count(None)
            rest = rows * columns - kept
            assert f"block {block}\n{kept}/{rows * columns}, {rest} {'fused' if fuse else 'dropped'}" in sheet.texts
            seen |= set(fused_in.values())
    assert seen == ({None, 1, 3, 4} if fuse else {None})


def test_pictures_come_in_order_and_the_sheet_has_a_row_for_each_of_32(tmp_path, sheet):
    photos = photographs(33, (32, 32))
    files = write("mask", small_evit(), tmp_path, photos)
    names = [f"{i:04}_0{step}.png" for i in range(33) for step in ("0_input", "1_block01")]
    assert [path.name for path in files] == [*names, "contact_sheet.png"]
    assert set(tmp_path.iterdir()) == set(files)
    for i, photo in enumerate(photos):
        np.testing.assert_array_equal(read(files[2 * i]), photo)
    assert read(files[-1]).shape[0] > read(files[-1]).shape[1]
    rows = [text.split()[-1] for text in sheet.texts if text.endswith(".png")]
    assert rows == [f"{i}.png" for i in range(32)]
    # a strip per image, its pictures within borders
    for i, strip in enumerate(sheet.pictures):
        for half, path in zip(np.hsplit(strip, 2), files[2 * i : 2 * i + 2], strict=True):
            np.testing.assert_array_equal(half[:, 1:-1], read(path))
    assert any("32 of 33 images" in text for text in sheet.texts)


def test_pictures_of_an_earlier_call_go_and_other_files_stay(tmp_path):
    other = ["notes.txt", "0001.png", "0001_00_input.jpg", "0001_00_input.png.bak", "holiday_00_input.png"]
    earlier = ["0003_00_input.png", "0009_12_block03.png", "attention_sheet.png"]
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
    # always bee
    model.head.bias.data = torch.tensor([1.0, 9.0, 0.0])
    write("mask", model, tmp_path, photographs(len(labels), (32, 32)), labels, classes)
    assert [color for text, color in sheet.texts.items() if text.endswith(".png")] == colors


def test_pictures_are_made_in_eval_mode_under_the_given_precision(tmp_path):
    model = evit(drop_path_rate=0.5, base_keep_rate=1.0).train()
    calls = set()
    model.head.register_forward_hook(lambda module, args, out: calls.add((out.dtype, module.training)))
    for mode in ("mask", "attention"):
        write(mode, model, tmp_path, photographs(1), autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert calls == {(torch.bfloat16, False)}


def test_a_full_disk_leaves_no_half_picture_and_no_image_is_an_error_that_changes_nothing(tmp_path, monkeypatch):
    earlier = tmp_path / "contact_sheet.png"
    earlier.touch()
    with pytest.raises(InputError, match="no image"):
        write("mask", small_evit(), tmp_path, photographs(0))
    assert earlier.exists()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write("attention", small_dhvt(), tmp_path, photographs(1, (16, 16)))
    assert list(tmp_path.iterdir()) == [earlier]


@pytest.mark.parametrize(
    ("mode", "name", "kwargs", "remedy"),
    [
        ("mask", "deit_tiny_patch16_shrink_base", {"drop_loc": ()}, "shrink_base"),
        ("attention", "resnet10t", {}, "DHVT, DeiT"),
        ("attention", "vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("attention", "deit_tiny_patch16_shrink_base", {}, "--base_keep_rate 1 .*--visualize_mask"),
    ],
)
def test_a_model_with_nothing_to_show_is_refused_before_anything_is_written(mode, name, kwargs, remedy, tmp_path):
    small = {} if name.startswith("resnet") else {"embed_dim": 48, "num_heads": 3, "depth": 10}
    model = timm.create_model(name, **small, **kwargs)
    with pytest.raises(InputError, match=remedy) as caught:
        write(mode, model, tmp_path / "new", photographs(1))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_main_shows_images_from_all_parts_of_the_data_that_the_checkpoint_names(tiny_run, tmp_path, capsys):
    words = ["--visualize_attention", "--n_visualization", "5", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main.main([*words, "--resume", str(tiny_run / "checkpoint.pth")]) == 0
    folder = tmp_path / "visualization"
    line = f"11 pictures of 5 images are in {folder}; open {folder / 'attention_sheet.png'} first"
    assert line in capsys.readouterr().out
    digits = datasets.load_digits(False, (32, 32), None).data
    for k in range(5):
        np.testing.assert_array_equal(read(folder / f"{k:04}_00_input.png"), digits[72 * k])
