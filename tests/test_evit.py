"""EViT against the published code's numbers (tests/golden), a plain reference, timm's DeiT and its own promises."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import timm.layers
import torch
import torch._dynamo
import torch.nn.functional as F
from golden import formula
from test_models import assert_close, images
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._dynamo.utils import counters

import engine
from util.keep_rate import keep_rate_at

TINY, SMALL, BASE = (f"deit_{size}_patch16_shrink_base" for size in ("tiny", "small", "base"))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "evit_small_keep0.7_fuse.json").read_text())
SIZE = (48, 80)  # 3 x 5 patches
TIMM_DEIT = "deit_tiny_patch16_224"
SHAPE = {"embed_dim": 48, "depth": 6, "img_size": SIZE}
REORGANISING = (1, 3, 4)

fused_or_not = pytest.mark.parametrize("fuse_token", [True, False], ids=["fuse", "drop"])


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, Tensor]:
    return {key: formula.tensor(key, tuple(shape)) for key, shape in GOLDEN["state_dict"].items()}


@pytest.fixture
def golden_model(golden_weights) -> nn.Module:
    """Return the goldens' model with their weights, in double precision and evaluation mode."""
    model = timm.create_model(SMALL, base_keep_rate=0.7, fuse_token=True)
    model.load_state_dict(golden_weights, strict=True)
    return model.double().eval()


def random_model(fuse_token: bool = True, **kwargs) -> nn.Module:
    """Build a small model of random weights, blocks 1, 3 and 4 of 6 reorganising, in double precision, evaluating."""
    kwargs = {"drop_loc": REORGANISING, "num_classes": 5} | SHAPE | kwargs
    model = timm.create_model(TINY, fuse_token=fuse_token, **kwargs)
    model.load_state_dict({k: formula.tensor(f"random.{k}", tuple(v.shape)) for k, v in model.state_dict().items()})
    return model.double().eval()


@pytest.fixture(params=[True, False], ids=["sdpa", "matmul"])
def fused_attention(request) -> Iterator[bool]:
    """Switch timm's fused attention, which a model reads once, when it is built."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(request.param)
    yield request.param
    timm.layers.set_fused_attn(before)


# the published code's numbers


def test_state_dict_has_the_published_names_shapes_and_order():
    with torch.device("meta"):
        model = timm.create_model(SMALL)
    assert [(key, list(v.shape)) for key, v in model.state_dict().items()] == list(GOLDEN["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == GOLDEN["params"]


@torch.no_grad()
def test_logits_and_kept_tokens_are_the_published_ones(fused_attention, golden_model):
    assert golden_model.blocks[3].attn.fused_attn is fused_attention
    x = formula.images(2, 224).double()
    logits, places = golden_model.trace_tokens(x)
    assert_close(logits, GOLDEN["logits"])
    assert list(places) == [3, 6, 9]
    before = [list(range(196))] * 2
    found = []
    for i, now in places.items():
        now = now.tolist()
        assert [tokens[-1] for tokens in now] == [196 + i] * 2  # the fused token is last
        found.append([sorted(old.index(p) for p in kept[:-1]) for old, kept in zip(before, now, strict=True)])
        before = now
    assert found == GOLDEN["kept_indices"]
    assert_close(golden_model.float()(x.float()), GOLDEN["logits"], tolerance=1e-4)


@torch.no_grad()
def test_logits_at_other_keep_rates_and_of_larger_images_are_the_published_ones(golden_model):
    x = formula.images(2, 224).double()
    for rate in (1, 0.8):
        assert_close(golden_model(x, keep_rate=rate)[:, :8], GOLDEN[f"logits_keep_rate_{rate}"])
    larger = formula.images(1, 288, seed=2).double()
    assert_close(golden_model(larger).flatten()[:16], GOLDEN["logits_288"])


def test_loss_and_gradients_are_the_published_ones(golden_model):
    logits = golden_model.train()(formula.images(2, 224, seed=1).double())
    loss = F.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["loss"], rel=1e-9)
    norms = {key: p.grad.norm().item() for key, p in golden_model.named_parameters()}
    assert norms == pytest.approx(GOLDEN["grad_norms"], rel=1e-9, abs=1e-9)


# the variants


@pytest.mark.parametrize(
    "name, C, h, millions", [(TINY, 192, 3, 5.717), (SMALL, 384, 6, 22.051), (BASE, 768, 12, 86.568)]
)
def test_parameters_are_those_of_the_table(name, C, h, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (C, h, 12)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert (model.num_classes, model.drop_loc, model.base_keep_rate, model.fuse_token) == (1000, (3, 6, 9), 0.7, False)


def test_macs_are_the_published_ones(fused_attention):
    counted = engine.count_macs(timm.create_model(SMALL, base_keep_rate=0.7, fuse_token=True), (224, 224))
    assert counted == pytest.approx(GOLDEN["macs"] / 1e9, rel=2e-3)


# the plain reference: one image at a time, whole attention matrices, Python's lists and sets


class Reorganised(NamedTuple):
    tokens: Tensor  # N, C
    kept: list[int]  # among the tokens besides the class token, highest score first


def plain_block(block: nn.Module, x: Tensor, rate: float, fuse_token: bool) -> Reorganised:
    """Apply a block's weights to the tokens [N, C] of one image."""
    N, C = x.shape
    attn = block.attn
    h, (q, k, v) = attn.num_heads, attn.qkv(block.norm1(x)).chunk(3, dim=1)
    weights, heads = [], []
    for c in torch.arange(C).chunk(h):
        weights.append(torch.softmax(attn.q_norm(q[:, c]) @ attn.k_norm(k[:, c]).T / math.sqrt(C / h), dim=1))
        heads.append(weights[-1] @ v[:, c])
    x = x + block.ls1(attn.proj(attn.norm(torch.cat(heads, dim=1))))
    scores = [sum(w[0, j] for w in weights) / h for j in range(1, N)]
    keep = math.ceil(rate * (N - 1))
    kept = list(range(N - 1))
    if keep < N - 1:
        kept = sorted(kept, key=lambda j: scores[j].item(), reverse=True)[:keep]
        tokens = [x[0], *(x[1 + j] for j in kept)]
        if fuse_token:
            tokens.append(sum(scores[j] * x[1 + j] for j in set(range(N - 1)) - set(kept)))
        x = torch.stack(tokens)
    y = F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias)
    return Reorganised(x + block.ls2(F.linear(F.gelu(y), block.mlp.fc2.weight, block.mlp.fc2.bias)), kept)


class Plain(NamedTuple):
    logits: Tensor  # B, classes
    tokens: list[list[Tensor]]  # of each image after each block
    places: list[list[list[int]]]  # the same tokens' patches, beginning with those after the class token


def plain_evit(model: nn.Module, x: Tensor, rates: Sequence[float]) -> Plain:
    """Apply a model's weights to images of its own size, with a keep rate for each block."""
    logits, all_tokens, all_places = [], [], []
    P = model.patch_embed.num_patches
    for image in x:
        y = model.patch_embed.proj(image).flatten(1).T
        y = torch.cat([model.cls_token[0], y]) + model.pos_embed[0]
        places, tokens, history = list(range(P)), [], []
        for i, (block, rate) in enumerate(zip(model.blocks, rates, strict=True)):
            before = len(y)
            y, kept = plain_block(block, y, rate, model.fuse_token)
            dropped = len(kept) < before - 1
            places = [places[j] for j in kept] + ([P + i] if dropped and model.fuse_token else [])
            tokens.append(y)
            history.append(places)
        logits.append(model.head(model.norm(y)[0]))
        all_tokens.append(tokens)
        all_places.append(history)
    return Plain(torch.stack(logits), all_tokens, all_places)


def rates_of(rate: float) -> list[float]:
    """List what `random_model` keeps in each block."""
    return [rate if i in REORGANISING else 1.0 for i in range(6)]


# 0.9286 keeps 14 of 15 and then all of 14; 0.94 rounds up to all
@fused_or_not
@pytest.mark.parametrize("rate", [1e-9, 0.3, 0.7, 0.9286, 0.94])
def test_outputs_and_gradients_are_the_plain_references(rate, fuse_token, fused_attention):
    model, x = random_model(fuse_token, base_keep_rate=rate), images(2, *SIZE)
    plain = plain_evit(model, x, rates_of(rate))
    logits = model.train()(x)
    assert_close(logits, plain.logits)
    results = []
    for each in (logits, plain.logits):
        model.zero_grad()
        (each * torch.linspace(-1, 1, each.numel(), dtype=x.dtype).reshape(each.shape)).sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)
    tokens = torch.stack([history[-1] for history in plain.tokens])
    assert_close(model.forward_features(x), model.norm(tokens))
    for i, places in model.trace_tokens(x)[1].items():
        assert places.tolist() == [history[i] for history in plain.places]


@torch.no_grad()
def test_timms_options_of_a_block_are_the_plain_references(fused_attention):
    model, x = random_model(qk_norm=True, scale_attn_norm=True, init_values=0.1), images(2, *SIZE)
    assert_close(model(x), plain_evit(model, x, rates_of(0.7)).logits)


@torch.no_grad()
def test_attention_is_dropped_in_training_only(fused_attention):
    model, other, x = random_model(), random_model(attn_drop_rate=0.5), images(2, *SIZE)
    assert torch.equal(other(x), model(x))
    assert not torch.allclose(other.train()(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("rate, fuse_token, counts", [(0.3, True, [6, 3, 2]), (0.8, False, [12, 10, 8])])
def test_override_takes_the_place_of_the_base_rate_in_the_blocks_that_reorganise(rate, fuse_token, counts):
    model, other, x = random_model(fuse_token), random_model(fuse_token, base_keep_rate=rate), images(2, *SIZE)
    assert torch.equal(model(x, rate), other(x))
    assert torch.equal(model.forward_features(x, keep_rate=rate), other.forward_features(x))
    assert torch.equal(model.trace_tokens(x, keep_rate=rate)[0], other(x))
    assert [places.shape[1] for places in model.trace_tokens(x, keep_rate=rate)[1].values()] == counts
    assert not torch.allclose(model(x), other(x))


@fused_or_not
def test_keeping_all_equals_timms_deit_and_a_base_rate_of_one_ignores_an_override(fuse_token):
    model, whole = random_model(fuse_token), random_model(fuse_token, base_keep_rate=1)
    deit = timm.create_model(TIMM_DEIT, num_classes=5, **SHAPE).double().eval()
    deit.load_state_dict(model.state_dict(), strict=True)
    x = images(2, *SIZE)
    with torch.no_grad():
        assert_close(model(x, 1), deit(x))
        assert_close(whole(x), deit(x))
        assert torch.equal(whole(x, 0.5), whole(x))
        assert not torch.allclose(model(x), deit(x), atol=1e-3)


# the input size


def resampled(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    patches = pos_embed[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)], dim=1)


@fused_or_not
@pytest.mark.parametrize("size", [(80, 48), (64, 112)])
def test_images_of_another_size_are_taken_as_by_a_model_set_to_it(size, fuse_token):
    model, resized, built = random_model(fuse_token), random_model(fuse_token), random_model(fuse_token, img_size=size)
    resized.set_input_size(img_size=size)
    built.load_state_dict(resized.state_dict(), strict=True)
    fixed = random_model(fuse_token, dynamic_img_size=False)
    fixed.set_input_size(img_size=size)
    x = images(2, *size)
    with torch.no_grad():
        logits = model(x)
        for other in (resized, built, fixed):
            assert_close(other(x), logits)
        assert_close(plain_evit(resized, x, rates_of(0.7)).logits, logits)


@pytest.mark.parametrize("size, grid", [((80, 48), (5, 3)), ((32, 32), (2, 2)), ((96, 160), (6, 10)), (SIZE, (3, 5))])
def test_position_embedding_is_resampled_bicubically_without_antialiasing(size, grid):
    model = random_model()
    before = model.pos_embed.detach().clone()
    model.pos_embed.requires_grad_(False)
    model.set_input_size(size)
    assert_close(model.pos_embed, resampled(before, (3, 5), grid))
    assert torch.equal(model.pos_embed[:, 0], before[:, 0])  # the class token's position
    assert not model.pos_embed.requires_grad
    assert (model.patch_embed.grid_size, model.patch_embed.img_size) == (grid, size)


def test_sides_that_the_patch_does_not_divide_are_padded_on_demand():
    model, x = random_model(dynamic_img_pad=True), images(2, 40, 75)
    with torch.no_grad():
        assert_close(model(x), model(F.pad(x, (0, 5, 0, 8))))
        shapes = [y.shape for y in model.forward_intermediates(x, intermediates_only=True)]
    assert shapes == [(2, 48, 3, 5)] * 6


def test_pretrained_deit_is_resampled_without_antialiasing(tmp_path):
    deit = timm.create_model(TIMM_DEIT, **SHAPE | {"img_size": 80})
    weights = {k: formula.tensor(k, tuple(v.shape)) for k, v in deit.state_dict().items()}
    torch.save(weights, tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth"), "num_classes": -1}
    kwargs = SHAPE | {"img_size": (96, 160), "drop_loc": (1,)}
    found = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).state_dict()
    assert_close(found.pop("pos_embed"), resampled(weights["pos_embed"], (5, 5), (6, 10)), tolerance=1e-6)
    assert all(torch.equal(value, weights[key]) for key, value in found.items() if not key.startswith("head"))


# the tokens of intermediate blocks


def full_grids(model: nn.Module, x: Tensor, rate: float, norm: bool) -> list[Tensor]:
    """Lay the plain reference's tokens after each block out on a grid [B, C, H, W]; zeros where a patch is missing."""
    plain, (H, W) = plain_evit(model, x, rates_of(rate)), model.patch_embed.grid_size
    grids = torch.zeros(len(model.blocks), len(x), model.embed_dim, H, W, dtype=x.dtype)
    for b in range(len(x)):
        for i in range(len(model.blocks)):
            tokens = model.norm(plain.tokens[b][i]) if norm else plain.tokens[b][i]
            for token, place in zip(tokens[1:], plain.places[b][i], strict=True):
                if place < H * W:  # fused tokens have none
                    grids[i, b, :, place // W, place % W] = token
    return list(grids)


@fused_or_not
@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_tokens_stand_at_their_patches_places(norm, fuse_token):
    model, x = random_model(fuse_token), images(2, *SIZE)
    for rate in (0.4, 1.0, 0.7):
        final, maps = model.forward_intermediates(x, norm=norm, keep_rate=rate)
        assert torch.equal(final, model.forward_features(x, keep_rate=rate))
        expected = full_grids(model, x, rate, norm)
        for actual, grid in zip(maps, expected, strict=True):
            assert_close(actual, grid)
    kept = (maps[-1] != 0).any(dim=1).sum(dim=(1, 2))
    assert (kept < 9).all()  # of 15: the others are zero
    weights = tuple(model.blocks.parameters())
    results = [torch.autograd.grad(sum((y**2).sum() for y in grids), weights) for grids in (maps, expected)]
    for found, plain in zip(*results, strict=True):
        assert_close(found, plain)


@torch.no_grad()
def test_intermediate_tokens_come_in_every_format_and_without_the_later_blocks():
    model, x = random_model(), images(2, *SIZE)
    final, maps = model.forward_intermediates(x)
    rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(y, z.flatten(2).transpose(1, 2)) for y, z in zip(rows, maps, strict=True))
    tokens = plain_evit(model, x[:1], rates_of(0.7)).tokens[0]
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    for (y, prefix), z, expected in zip(pairs, maps, tokens, strict=True):
        assert torch.equal(y, z)
        assert_close(prefix[0], expected[:1])
    found = model.forward_intermediates(x, indices=[1, 4], return_prefix_tokens=True, output_dict=True, norm=True)
    assert set(found) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert torch.equal(found["image_features"], final)
    for prefix, i in zip(found["image_intermediates_prefix"], (1, 4), strict=True):
        assert torch.equal(prefix, model.norm(pairs[i][1]))

    (last,) = model.get_intermediate_layers(x, 1, reshape=True)
    assert torch.equal(last, maps[-1])
    model.blocks[4].forward = None  # to call it is an error
    early = model.forward_intermediates(x, indices=[1, 3], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1]) and torch.equal(early[1], maps[3])


# initialisation, regularisation and modes


def test_layers_start_as_published():
    torch.manual_seed(0)
    model = timm.create_model(TINY)
    for key, p in model.named_parameters():
        if key in ("cls_token", "pos_embed") or (p.ndim == 2 and "weight" in key):
            assert p.std().item() == pytest.approx(0.02, rel=0.15), key
            assert abs(p.mean().item()) < 0.005, key
        elif key != "patch_embed.proj.weight" and key != "patch_embed.proj.bias":
            assert (p == (1 if "norm" in key and key.endswith("weight") else 0)).all(), key
    # cut at 2, not at two standard deviations, beyond which lies one value in twenty
    assert model.cls_token.abs().max().item() > 0.04
    assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == [1e-6] * 25


def test_learning_rates_decay_by_depth_and_weights_without_vectors_class_token_and_positions():
    model = random_model()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        layer = {"norm": 6, "head": 7}.get(key.split(".")[0], 0)  # the norm goes with the last block
        layer = 1 + int(key.split(".")[1]) if key.startswith("blocks") else layer
        assert group_of[p]["lr_scale"] == 0.5 ** (7 - layer), key
        spared = p.ndim < 2 or key in ("cls_token", "pos_embed")
        assert group_of[p]["weight_decay"] == (0 if spared else 0.05), key


def test_drop_path_rises_linearly_and_dropout_acts_on_embedding_attention_and_feed_forward():
    model = random_model(pos_drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.1)
    for path in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, path), "drop_prob", 0) for block in model.blocks]
        assert rates == pytest.approx([0.02 * i for i in range(6)])
    rates = {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    layers = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")
    assert rates == {"pos_drop": 0.5} | {f"blocks.{i}.{layer}": 0.5 for i in range(6) for layer in layers}
    x = images(2, 16, 48, channels=1).squeeze(1)
    torch.manual_seed(0)
    assert (model.train().blocks[1].attn(x)[0] == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_gradient_checkpointing_gives_the_same_outputs_and_gradients():
    model, x = random_model(), images(2, *SIZE)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    results = []
    for m in (model, twin):
        logits = m.train()(x, 0.4)
        maps = m.forward_intermediates(x, intermediates_only=True)
        (logits.square().sum() + sum(y.square().sum() for y in maps)).backward()
        results.append([logits, *maps, *(p.grad for p in m.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert_close(checkpointed, plain.detach())


def test_bfloat16_autocast_trains():
    model, x = random_model().float().train(), images(2, *SIZE).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert logits.dtype == torch.bfloat16
    assert_close(logits, model(x).detach().double(), tolerance=0.1)  # bfloat16 may also keep other tokens
    (logits.float().square().sum() + sum(y.float().sum() for y in maps)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_exported_model_equals_the_model():
    model, x = random_model(), images(2, *SIZE)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        for other in (x, x.flip(0, 1)):
            assert_close(exported(other), model(other))


# what is refused


@pytest.mark.parametrize("rate", [0, -0.5, 1.0001, float("nan")])
def test_keep_rates_are_above_0_and_at_most_1(rate):
    with pytest.raises(ValueError, match="base_keep_rate"):
        random_model(base_keep_rate=rate)
    model, x, whole = random_model(), images(1, *SIZE), random_model(base_keep_rate=1)
    for call in (model, model.forward_features, model.forward_intermediates, model.trace_tokens, whole):
        with pytest.raises(ValueError, match="keep_rate"):
            call(x, keep_rate=rate)


@pytest.mark.parametrize("drop_loc", [(), (0,), [5, 1], (0, 1, 2, 3, 4, 5)])
def test_any_blocks_that_exist_may_reorganise_given_in_any_order(drop_loc):
    for unknown in (-1, 6):
        with pytest.raises(ValueError, match="drop_loc"):
            random_model(drop_loc=[*drop_loc, unknown])
    model, x = random_model(drop_loc=drop_loc), images(2, *SIZE)
    assert model.drop_loc == tuple(sorted(drop_loc))
    with torch.no_grad():
        assert_close(model(x), plain_evit(model, x, [0.7 if i in drop_loc else 1.0 for i in range(6)]).logits)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Forget what was compiled, and count from zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_compiled_follows(fuse_token: bool, train: bool, backend: str, dtype: torch.dtype = torch.float64) -> None:
    """Go through a shrinking phase, comparing the compiled model with the eager one, and count what was compiled."""
    eager = random_model(fuse_token, img_size=128, depth=3, drop_loc=(1, 2)).to(dtype).train(train)
    model = copy.deepcopy(eager)
    compiled, x = torch.compile(model, backend=backend), images(1, 128, 128).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    rates = [keep_rate_at(i, 0, 1, 24, 0.7) for i in range(26)]
    assert (rates[0], rates[-1]) == (1.0, 0.7) and len(set(rates)) > 20
    for rate in rates:
        with torch.set_grad_enabled(train):
            actual, expected = compiled(x, rate), eager(x, rate)
        assert_close(actual, expected.detach().double(), tolerance)
        if train:
            actual.square().sum().backward()
            expected.square().sum().backward()
            for p, q in zip(model.parameters(), eager.parameters(), strict=True):
                assert_close(p.grad, q.grad.double(), tolerance)
            model.zero_grad()
            eager.zero_grad()
        # a call is two frames: the graph break, where the tokens are counted, divides it
        assert counters["frames"]["total"] - 2 <= 4
    assert not counters["recompile_limit"]


def test_fixed_keep_rate_compiles_once(dynamo):
    model = random_model(depth=2, drop_loc=(1,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            x = images(2, *SIZE) + seed
            assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_shrinking_keep_rate_compiles_a_few_times(dynamo):
    assert_compiled_follows(fuse_token=True, train=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@fused_or_not
def test_shrinking_keep_rate_compiles_a_few_times_to_machine_code(fuse_token, train, dynamo):
    # single precision: in double, torch 2.11 cannot train even timm's own ViT with this backend on the CPU
    assert_compiled_follows(fuse_token, train, "inductor", torch.float32)
