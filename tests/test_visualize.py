"""Pictures of kept patches and of attention, against plain recomputations from the same weights."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor

from util import visualize
from util.errors import InputError

NAMES = ["ant", "bee", "cat"]
TRANSFORM = Compose([ToTensor(), Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])
CPU = torch.device("cpu")


def build(name: str, **kwargs) -> nn.Module:
    """Build a small model whose attention is far from even."""
    torch.manual_seed(0)
    small = {"embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 3}
    model = timm.create_model(name, **(small | kwargs)).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return model


evit = partial(build, "deit_tiny_patch16_shrink_base", depth=6, drop_loc=(1, 3, 4), img_size=(96, 64))
dhvt = partial(build, "dhvt_tiny_cifar_patch4", img_size=(30, 22))  # its grid is 8 x 6
VITS = {
    "DHVT": dhvt,
    "DeiT": partial(build, "deit_tiny_patch16_224", img_size=(96, 64)),
    "distilled DeiT": partial(build, "deit_tiny_distilled_patch16_224", img_size=(96, 64)),
    "EViT": partial(evit, base_keep_rate=1.0, depth=3, drop_loc=(1,)),
}


def images(n: int, size: tuple[int, int] = (96, 64)) -> list[np.ndarray]:
    """Make random photographs, uint8 [H, W, 3], without a white pixel."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 250, (*size, 3), dtype=np.uint8) for _ in range(n)]


def samples(pixels: list[np.ndarray], labels: list[str | None] = NAMES) -> Iterator[tuple[Tensor, str | None, str]]:
    for i, array in enumerate(pixels):
        yield TRANSFORM(Image.fromarray(array)), labels[i % len(labels)], f"{i}.png"


def write(kind: str, model: nn.Module, folder: Path, given, count: int = 99, classes=NAMES, autocast=nullcontext):
    return visualize.write_pictures(kind, model, given, count, folder, classes, autocast, CPU)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def plain_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Attend one query at a time: [N, C] -> [h, N, N]."""
    h, d = attn.num_heads, x.shape[1] // attn.num_heads
    qkv = x.double() @ attn.qkv.weight.double().T + (0 if attn.qkv.bias is None else attn.qkv.bias.double())
    weights = torch.zeros(h, len(x), len(x), dtype=torch.float64)
    for head in range(h):
        q = qkv[:, head * d : (head + 1) * d]
        k = qkv[:, (h + head) * d : (h + head + 1) * d]
        for i in range(len(x)):
            weights[head, i] = torch.tensor(softmax([float(q[i] @ k[j]) / math.sqrt(d) for j in range(len(x))]))
    return weights


def plain_head_tokens(attn: nn.Module, x: Tensor) -> Tensor:
    """Give DHVT's head tokens of one image: [N, C] -> [h, C]."""
    tokens = []
    for part in x.mean(dim=0).chunk(attn.num_heads):
        whole = attn.ht_proj(part)
        tokens.append(torch.cat([F.gelu(attn.ht_norm(piece)) for piece in whole.chunk(attn.num_heads)]))
    return torch.stack(tokens) + attn.pos_embed[0]


@torch.no_grad()
def plain_weights(model: nn.Module, x: Tensor) -> Tensor:
    """Recompute the class token's weights in every block, [blocks, h, N], and see that attention's output needs them.

    `x` is one image, [1, 3, H, W].
    """
    seen = []
    hooks = [
        b.attn.register_forward_hook(lambda m, args, out: seen.append((m, args[0][0], out[0]))) for b in model.blocks
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    rows = []
    for attn, tokens, out in seen:
        assert attn.fused_attn
        N, heads = len(tokens), hasattr(attn, "ht_proj")
        tokens = torch.cat([tokens, plain_head_tokens(attn, tokens)]) if heads else tokens
        weights = plain_attention(attn, tokens)
        v = attn.qkv(tokens)[:, -tokens.shape[1] :].double().unflatten(1, (attn.num_heads, -1)).transpose(0, 1)
        again = attn.proj((weights @ v).transpose(0, 1).flatten(1).float())
        again[0] += again[N:].mean(dim=0) if heads else 0
        torch.testing.assert_close(again[:N], out, atol=1e-4, rtol=1e-4)
        rows.append(weights[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", VITS)
def test_the_weights_shown_are_those_of_the_forward_pass(name):
    model = VITS[name]()
    size = (30, 22) if name == "DHVT" else (96, 64)
    x = torch.stack([image for image, _, _ in samples(images(2, size))])
    with torch.inference_mode():
        logits, weights = visualize.class_attention(model, x)
        torch.testing.assert_close(logits, model(x), atol=0, rtol=0)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
    for i in range(2):
        expected = plain_weights(model, x[i : i + 1])
        assert expected.amax() > 4 / expected.shape[2], "too even to tell weights apart"
        torch.testing.assert_close(weights[i].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 3))


@pytest.mark.parametrize("name", ["DHVT", "distilled DeiT"])
def test_attention_pictures_colour_each_patch_by_its_weight(name, tmp_path):
    """On a black input only the map is seen: a colour a patch, with more red and green the more weight it has."""
    model = VITS[name]()
    patch, (H, W), before = (4, (30, 22), 1) if name == "DHVT" else (16, (96, 64), 2)
    rows, columns = math.ceil(H / patch), math.ceil(W / patch)
    black = np.zeros((H, W, 3), dtype=np.uint8)
    files = write("attention", model, tmp_path, samples([black]))
    weights = plain_weights(model, TRANSFORM(Image.fromarray(black))[None]).mean(dim=1)
    assert len(files) == 1 + len(weights) + 1
    for path, row in zip(files[1:-1], weights, strict=True):
        picture, colours = read(path).astype(int), {}
        for y in range(H):
            for x in range(W):
                colours.setdefault((y // patch) * columns + x // patch, set()).add(tuple(picture[y, x]))
        assert len(colours) == rows * columns and all(len(found) == 1 for found in colours.values())
        of_patches = row[before : before + rows * columns]
        light = [next(iter(colours[p]))[:2] for p in of_patches.argsort().tolist()]
        assert light == sorted(light) and len(set(light)) > 5
        brightest = 0.65 * np.array([252, 255, 164])
        assert np.abs(np.array(next(iter(colours[int(of_patches.argmax())]))) - brightest).max() <= 0.5


def test_the_strip_is_what_head_tokens_get_and_the_caption_their_share(tmp_path):
    model, size = dhvt(), (30, 22)
    given = list(samples(images(2, size)))
    x = torch.stack([image for image, _, _ in given])
    with torch.inference_mode():
        _, tiles = visualize.attention_tiles(model, x, visualize.denormalise(x))
    for i in range(2):
        expected = plain_weights(model, x[i : i + 1])[:, :, -3:]
        for (tile, _), of_block in zip(tiles[i], expected, strict=True):
            np.testing.assert_allclose(tile.strip, of_block.mean(dim=0), atol=1e-6)
            assert tile.below == f"{100 * of_block.mean(dim=0).sum():.0f} %"
    path = tmp_path / "0000_00_input.png"
    Image.new("RGB", (30, 30)).save(path)

    def strip(values: list[float]) -> np.ndarray:
        tile = visualize.Tile("attention00", "block 0", "9 %", np.array(values))
        group = visualize.Group("a", None, "b", "1 %", False, [(tile, path)])
        return np.asarray(visualize.draw_sheet("t", [], [group])).astype(int)

    changed = np.argwhere((strip([0.1, 0.2]) != strip([0.2, 0.2])).any(axis=-1))
    assert len(changed) == 45 * 10 and np.ptp(changed, axis=0).tolist() == [9, 44], "half of a strip 90 wide, 10 high"


@torch.no_grad()
def plain_masks(model: nn.Module, x: Tensor) -> dict[int, list[tuple[set[int], int | None]]]:
    """Follow one image's tokens through the blocks as pairs of a set of patches and the block that fused them, or None.

    A token of one patch that nothing was fused into has None.
    """
    x, found = model.embed(x)[0], {}
    held = [({p}, None) for p in range(len(x) - 1)]
    for number, block in enumerate(model.blocks):
        normed = block.norm1(x)
        scores = plain_attention(block.attn, normed)[:, 0, 1:].mean(dim=0).tolist()
        x = x + block.attn(normed[None])[0]
        if number in model.drop_loc:
            order = sorted(range(len(scores)), key=lambda t: -scores[t])
            keep = math.ceil(model.base_keep_rate * len(scores))
            kept, rest = order[:keep], order[keep:]
            tokens = [x[0], *(x[1 + t] for t in kept)]
            after = [held[t] for t in kept]
            if model.fuse_token:
                tokens.append(sum(scores[t] * x[1 + t] for t in rest))
                after.append((set().union(*(held[t][0] for t in rest)), number))
            x, held = torch.stack(tokens), after
            found[number] = held
        x = x + block.mlp(block.norm2(x))
    return found


@pytest.mark.parametrize("fuse", [False, True], ids=["dropped", "fused"])
def test_mask_pictures_show_the_patches_that_the_attention_keeps(fuse, tmp_path):
    model, pixels = evit(fuse_token=fuse), images(3)
    files = write("mask", model, tmp_path, samples(pixels))
    assert [p.name for p in files[:4]] == [
        f"0000_0{s}" for s in ("0_input.png", "1_block01.png", "2_block03.png", "3_block04.png")
    ]
    colours = dict(zip((1, 3, 4), visualize.FUSED_COLOURS, strict=False))
    moved = set()
    for i, array in enumerate(pixels):
        held = plain_masks(model, TRANSFORM(Image.fromarray(array))[None])
        for path, (_, tokens) in zip(files[4 * i + 1 : 4 * i + 4], held.items(), strict=True):
            picture = read(path)
            where = {p: block for patches, block in tokens for p in patches}
            for y in range(96):
                for x in range(64):
                    block = where.get(y // 16 * 4 + x // 16, "dropped")
                    expected = (
                        array[y, x] if block is None else (255, 255, 255) if block == "dropped" else colours[block]
                    )
                    assert tuple(picture[y, x]) == tuple(expected), (path.name, y, x)
            moved |= {block for _, block in tokens}
    assert moved == ({None, 1, 3, 4} if fuse else {None})


def test_patches_go_where_their_fused_token_goes():
    """Five blocks of five patches: a fused token is kept, fused again with others into a later one, and dropped."""
    places = {
        2: torch.tensor([[0, 1, 2, 5 + 2]]),  # 3 and 4 fused
        4: torch.tensor([[5 + 2, 0, 5 + 4]]),  # that token kept; 1 and 2 fused
        6: torch.tensor([[5 + 4, 5 + 6]]),  # 0 and the token of block 2 fused
        9: torch.tensor([[5 + 6]]),  # the token of block 4 dropped, nothing fused
        10: torch.tensor([[5 + 10]]),  # what is left fused; what was dropped stays so
    }
    owners = visualize.follow_patches(places, 5)
    assert {block: owner.tolist() for block, owner in owners.items()} == {
        2: [[-1, -1, -1, 2, 2]],
        4: [[-1, 4, 4, 2, 2]],
        6: [[6, 4, 4, 6, 6]],
        9: [[6, -2, -2, 6, 6]],
        10: [[10, -2, -2, 10, 10]],
    }
    dropped = visualize.follow_patches({0: torch.tensor([[3, 0], [1, 2]]), 5: torch.tensor([[0], [2]])}, 4)
    assert [dropped[b].tolist() for b in (0, 5)] == [
        [[-1, -2, -2, -1], [-2, -1, -1, -2]],
        [[-1, -2, -2, -2], [-2, -2, -1, -2]],
    ]


@pytest.mark.parametrize("fuse", [False, True])
def test_a_keep_rate_of_1_gives_the_input_byte_for_byte(fuse, tmp_path):
    files = write("mask", evit(base_keep_rate=1.0, fuse_token=fuse), tmp_path, samples(images(2)))
    for i in range(2):
        group = [path.read_bytes() for path in files[4 * i : 4 * i + 4]]
        assert len(group) == 4 and group[1:] == group[:1] * 3
        np.testing.assert_array_equal(read(files[4 * i]), images(2)[i])


def test_every_level_of_every_channel_is_restored(tmp_path):
    levels = np.stack([np.arange(256).reshape(16, 16) for _ in range(3)], axis=-1).astype(np.uint8)
    levels[..., 1] = levels[::-1, :, 1]
    files = write("attention", dhvt(img_size=16, depth=1), tmp_path, samples([levels]))
    np.testing.assert_array_equal(read(files[0]), levels)


def test_exactly_the_asked_number_of_images_is_taken_in_order(tmp_path):
    taken, pixels = [], images(30, (16, 16))

    def counted() -> Iterator:
        for i, sample in enumerate(samples(pixels)):
            taken.append(i)
            yield sample

    files = write("attention", dhvt(img_size=16, depth=2), tmp_path, counted(), count=18)  # more than one batch
    assert taken == list(range(18))
    names = [f"{i:04}_0{s}.png" for i in range(18) for s in ("0_input", "1_attention00", "2_attention01")]
    assert [path.name for path in files] == [*names, "attention_sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "attention_sheet.png"])
    assert names == sorted(names)
    for i in range(18):
        np.testing.assert_array_equal(read(files[3 * i]), pixels[i])
    fewer = write(
        "mask", evit(img_size=32, patch_size=8), tmp_path / "new" / "deep", samples(images(2, (32, 32))), count=20000
    )
    assert [path.name for path in fewer[::4]] == ["00000_00_input.png", "00001_00_input.png", "contact_sheet.png"]


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (160, 96)])
@pytest.mark.parametrize("fuse", [False, True])
def test_any_input_size_is_drawn_patch_for_patch(size, fuse):
    """The model's own size is 96 x 64; at each size the patches left as they are are as many as the caption says."""
    model = evit(fuse_token=fuse)
    x = torch.stack([image for image, _, _ in samples(images(2, size))])
    with torch.inference_mode():
        _, tiles = visualize.mask_tiles(model, x, visualize.denormalise(x))
    H, W = size[0] // 16, size[1] // 16
    keep = [math.ceil(0.7 * H * W)]
    keep += [math.ceil(0.7 * keep[0]), math.ceil(0.7 * math.ceil(0.7 * keep[0]))]
    for i, array in enumerate(images(2, size)):
        for (tile, picture), kept in zip(tiles[i], keep, strict=True):
            same = (picture == array).all(axis=-1).reshape(H, 16, W, 16).all(axis=(1, 3))
            flat = picture.reshape(H, 16, W, 16, 3)
            flat = (flat == flat[:, :1, :, :1]).all(axis=(1, 3, 4))
            assert (same ^ flat).all() and tile.below == f"{same.sum()}/{H * W}"
            assert fuse or same.sum() == kept


def test_an_earlier_larger_run_leaves_nothing_and_foreign_files_stay(tmp_path):
    model = dhvt(img_size=16, depth=2)
    write("attention", model, tmp_path, samples(images(4, (16, 16))))
    foreign = [
        "notes.txt",
        "0001.png",
        "0001_00_input.jpg",
        "holiday_00_input.png",
        ".hidden.png.tmp",
        "my_contact_sheet.png",
    ]
    for name in [*foreign, ".0003_00_input.png.tmp", "0009_12_block03.png", "contact_sheet.png"]:
        (tmp_path / name).write_text("?")
    files = write("attention", dhvt(img_size=16, depth=1), tmp_path, samples(images(2, (16, 16))))
    assert len(files) == 5
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in files} | set(foreign)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List what is written on the sheets from now on."""
    texts, fit = [], visualize.fit
    monkeypatch.setattr(visualize, "fit", lambda text, *rest: texts.append(text) or fit(text, *rest))
    return texts


def test_the_sheet_grows_with_the_images_until_only_the_first_fit(tmp_path, monkeypatch):
    assert visualize.LARGEST == 6000
    model, areas = evit(img_size=32, patch_size=16, depth=2, drop_loc=(1,)), []
    for n in (2, 8, 30):
        files = write("mask", model, tmp_path, samples(images(n, (32, 32))))
        height, width = read(files[-1]).shape[:2]
        areas.append(height * width)
        assert max(height, width) <= 6000 and (n == 2 or 0.5 < height / width < 2)
    assert areas == sorted(set(areas))
    monkeypatch.setattr(visualize, "LARGEST", 800)
    texts = recorded(monkeypatch)
    files = write("mask", model, tmp_path, samples(images(30, (32, 32))))
    assert len(files) == 61 and max(read(files[-1]).shape) <= 800
    shown = sum(text.endswith(".png") for text in texts)
    assert 0 < shown < 30 and any(text.endswith(f"first {shown} of 30 images") for text in texts)


def test_long_class_names_are_shortened_by_their_width(tmp_path, monkeypatch):
    model, sizes = evit(img_size=32, patch_size=16, depth=2, drop_loc=(1,)), []
    for names in (NAMES, [name * 100 for name in NAMES], ["a\nb", "\t", "蜂蜜 é"]):
        given = samples(images(3, (32, 32)), labels=names)
        sizes.append(read(write("mask", model, tmp_path, given, classes=names)[-1]).shape)
    assert sizes[0] == sizes[1] == sizes[2]
    for width in (0, 9, 40, 200):
        for text in ("WWWWWWWWWWWWWWWWWWWWW", "iiiiiiiiiiiiiiiiiiiiiiiiiiiii", "a b", "Ä"):
            short = visualize.fit(text, width, visualize.TEXT)
            assert visualize.TEXT.getlength(short) <= max(width, visualize.TEXT.getlength("…"))
            assert short == visualize.plain(text) or short.endswith("…")
    assert visualize.fit("café ant", 999, visualize.TEXT) == "cafe ant"


@pytest.mark.parametrize(
    ("labels", "classes", "wrong"),
    [
        (NAMES, NAMES, True),
        ([None], NAMES, False),
        (["2", "0"], None, True),
        (["a thing of no known class"], NAMES, False),
    ],
)
def test_only_predictions_that_contradict_a_known_label_are_red(labels, classes, wrong, tmp_path):
    model = evit(img_size=32, patch_size=16, depth=2, drop_loc=(1,))
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([1.0, 9.0, 0.0])  # always bee
    red = []
    for label in labels:
        sheet = read(write("mask", model, tmp_path, samples(images(1, (32, 32)), [label]), classes=classes)[-1])
        red.append((sheet[visualize.MARGIN + 120 :] == visualize.RED).all(axis=-1).sum() > 20)
    assert red == [wrong and label not in ("bee", "1") for label in labels]


def test_a_picture_is_made_in_evaluation_mode_under_the_given_precision(tmp_path):
    entered = []

    def autocast() -> torch.autocast:
        entered.append(1)
        return torch.autocast("cpu", torch.bfloat16)

    model, kinds = evit(drop_path_rate=0.5, fuse_token=True).train(), []
    model.head.register_forward_hook(lambda module, args, out: kinds.append((out.dtype, module.training)))
    write("mask", model, tmp_path, samples(images(17)), autocast=autocast)
    write("attention", VITS["DeiT"](), tmp_path, samples(images(2)), autocast=autocast)
    assert len(entered) == 3 and kinds == [(torch.bfloat16, False)] * 2


class Untouched(nn.Module):
    """A model that must not be run."""

    blocks, drop_loc, base_keep_rate = (), (1,), 0.7

    def trace_tokens(self, images: Tensor) -> None:
        raise AssertionError("an image was computed")


def test_a_folder_that_cannot_be_written_is_told_before_any_image_is_computed(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=str(folder)) as caught:
            write("mask", Untouched(), folder, samples(images(1)))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_full_disk_is_one_line_and_leaves_no_half_picture(method, tmp_path, monkeypatch):
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(InputError, match=f"{tmp_path}: .*No space left on device"):
        write("attention", dhvt(), tmp_path, samples(images(1, (30, 22))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 5])
def test_no_image_is_an_error_that_changes_nothing(count, tmp_path):
    old = write("mask", evit(), tmp_path, samples(images(1)))
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match="no image"):
            write("mask", evit(), folder, samples(images(0 if count else 3)), count=count)
    assert sorted(tmp_path.iterdir()) == sorted(old)


@pytest.mark.parametrize(
    ("kind", "name", "kwargs", "told"),
    [
        ("mask", "dhvt_tiny_cifar_patch4", {}, "shrink_base"),
        ("mask", "resnet10t", {}, "shrink_base"),
        ("mask", "deit_tiny_patch16_shrink_base", {"drop_loc": ()}, "shrink_base"),
        ("attention", "resnet10t", {}, "DHVT, DeiT"),
        ("attention", "swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, "DHVT, DeiT"),
        ("attention", "vit_relpos_small_patch16_224", {}, "DHVT, DeiT"),  # adds a bias to its weights
        ("attention", "vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("attention", "deit_tiny_patch16_shrink_base", {}, "--base_keep_rate 1 .*--visualize_mask"),
    ],
)
def test_a_model_with_nothing_to_show_is_told_before_anything_is_written(kind, name, kwargs, told, tmp_path):
    small = {} if name.startswith(("resnet", "swin")) else {"embed_dim": 48, "num_heads": 3, "depth": 10}
    model = timm.create_model(name, **(small | kwargs))
    with pytest.raises(InputError, match=told) as caught:
        write(kind, model, tmp_path / "new", samples(images(1)))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
