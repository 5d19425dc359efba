"""The baselines: published parameter counts, outputs against plain references, and whole runs of tiny ones."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import formula
from torch import Tensor, nn

import engine
import main
from models.build import load_trained
from util import log
from util.config import ModelConfig

# by model and number of classes, in millions
PUBLISHED = {
    ("resnet18_cifar", 10): 11.17,
    ("resnet18_cifar", 100): 11.22,
    ("resnet56_cifar", 10): 0.85,
    ("resnet56_cifar", 100): 0.86,
    ("wide_resnet28_10_cifar", 10): 36.5,
    ("wide_resnet28_10_cifar", 100): 36.5,
    ("cct_7_3x1_32", 10): 3.76,
}
TINY = {
    "resnet18_cifar": {"layers": (1, 2, 1, 1), "channels": (4, 6, 8, 8)},
    "resnet56_cifar": {"layers": (1, 2, 2), "channels": (16, 32, 64)},
    "wide_resnet28_10_cifar": {"layers": (2, 1, 1), "channels": (16, 24, 32)},
    "cct_7_3x1_32": {"depth": 3, "embed_dim": 24},
}
# side of the last feature map, or of the grid of tokens, of 32 px
LAST_SIDE = {"resnet18_cifar": 4, "resnet56_cifar": 8, "wide_resnet28_10_cifar": 8, "cct_7_3x1_32": 16}
all_baselines = pytest.mark.parametrize("name", TINY)


def count(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name, classes", PUBLISHED)
def test_parameters_are_the_published_ones(name, classes):
    published = PUBLISHED[name, classes]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    digits = len(str(published).partition(".")[2])
    assert round(count(model), digits) == published


@all_baselines
def test_the_table_of_the_page_is_what_is_measured(name):
    page = (Path(main.__file__).parent / "docs" / "baselines.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` .*$", page, re.M)
    model = timm.create_model(name)
    assert f"| {count(model):.2f} M | {engine.count_macs(model, (32, 32)):.3f} |" in row


# plain references


class Weights(dict):
    """A state dict, and layers without modules that take theirs from it by name."""

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def ln(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].flatten(1).T + self.get(f"{name}.bias", 0)


def plain_resnet(w: Weights, x: Tensor, layers: tuple[int, ...]) -> Tensor:
    x = w.bn("bn1", w.conv("conv1", x)).relu()
    for i, blocks in enumerate(layers):
        for j in range(blocks):
            block = f"layer{i + 1}.{j}"
            stride = 2 if i > 0 and j == 0 else 1
            y = w.bn(f"{block}.bn1", w.conv(f"{block}.conv1", x, stride)).relu()
            y = w.bn(f"{block}.bn2", w.conv(f"{block}.conv2", y))
            if f"{block}.downsample.0.weight" in w:
                x = w.bn(f"{block}.downsample.1", w.conv(f"{block}.downsample.0", x, stride))
            elif stride == 2:
                # option A, where each stage has twice the channels of the one before
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], dim=1)
            x = (y + x).relu()
    return w.linear("fc", x.mean((2, 3)))


def plain_wide_resnet(w: Weights, x: Tensor, layers: tuple[int, ...]) -> Tensor:
    x = w.conv("stem.conv", x)
    for i, blocks in enumerate(layers):
        for j in range(blocks):
            block = f"stages.{i}.blocks.{j}"
            stride = 2 if i > 0 and j == 0 else 1
            y = w.bn(f"{block}.norm1", x).relu()
            if j == 0 and f"{block}.downsample.conv.weight" in w:
                x = w.conv(f"{block}.downsample.conv", y, stride)
            y = w.bn(f"{block}.norm2", w.conv(f"{block}.conv1", y, stride)).relu()
            x = x + w.conv(f"{block}.conv2", y)
    return w.linear("head.fc", w.bn("norm", x).relu().mean((2, 3)))


def plain_cct(w: Weights, x: Tensor, depth: int, heads: int) -> Tensor:
    x = w.conv("patch_embed.proj.0", x).relu()
    # the largest of 3 x 3 pixels around every second one; none is below 0
    x = F.pad(x, (1, 1, 1, 1))
    H, W = x.shape[2] - 2, x.shape[3] - 2
    x = torch.stack([x[:, :, i : i + H : 2, j : j + W : 2] for i in range(3) for j in range(3)]).amax(0)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]  # B, N, C
    B, N, C = x.shape
    for i in range(depth):
        block = f"blocks.{i}"
        y = w.linear(f"{block}.attn.qkv", w.ln(f"{block}.norm1", x)).view(B, N, 3, heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)  # B, h, N, d
        y = (q @ k.transpose(2, 3) / math.sqrt(C / heads)).softmax(-1) @ v
        x = x + w.linear(f"{block}.attn.proj", y.transpose(1, 2).flatten(2))
        x = w.ln(f"{block}.norm2", x)
        x = x + w.linear(f"{block}.mlp.fc2", F.gelu(w.linear(f"{block}.mlp.fc1", x)))
    # sequence pooling, image by image
    pooled = []
    for tokens in w.ln("norm", x):
        scores = [math.exp(w.linear("attn_pool.score", token).item()) for token in tokens]
        pooled.append(sum(score / sum(scores) * token for score, token in zip(scores, tokens, strict=True)))
    return w.linear("head", torch.stack(pooled))


@torch.no_grad()
@all_baselines
def test_logits_are_the_plain_references(name):
    size = (13, 18)
    tiny = TINY[name]
    kwargs = {"img_size": size} if name.startswith("cct") else {}
    model = timm.create_model(name, num_classes=7, **tiny, **kwargs).double().eval()
    weights = {key: formula.tensor(f"{name}.{key}", tuple(v.shape)) for key, v in model.state_dict().items()}
    model.load_state_dict(weights)
    w = Weights(model.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if name.startswith("cct"):
        expected = plain_cct(w, x, tiny["depth"], heads=4)
    elif name.startswith("wide"):
        expected = plain_wide_resnet(w, x, tiny["layers"])
    else:
        expected = plain_resnet(w, x, tiny["layers"])
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


# timm's contract, and whole runs


@torch.no_grad()
@all_baselines
def test_features_and_classifiers_are_as_timm_describes_them(name):
    kwargs = TINY[name]
    model = timm.create_model(name, **kwargs).eval()
    x = torch.zeros(1, 3, 32, 32)
    # as long as the list of levels says, and as wide
    maps = timm.create_model(name, features_only=True, **kwargs).eval()
    features = maps(x)
    assert features[-1].shape[-1] == LAST_SIDE[name]
    assert [f.shape[1] for f in features] == maps.feature_info.channels()
    assert [32 // f.shape[-1] for f in features] == maps.feature_info.reduction()
    # the head
    classifier = model.get_submodule(model.pretrained_cfg["classifier"])
    assert model.get_classifier() is classifier and len(classifier.weight) == 100
    assert model.pretrained_cfg["first_conv"] + ".weight" in model.state_dict()
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), hidden) and hidden.flatten(1).shape == (1, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)


def test_options_of_the_builders_and_start_of_the_weights():
    model = timm.create_model("cct_7_3x1_32", drop_path_rate=0.06)
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == pytest.approx(
        [0.01 * i for i in range(7)]
    )
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.05)
    with pytest.raises(ValueError, match="patch size"):
        timm.create_model("cct_7_3x1_32", patch_size=4)
    for name in ("resnet18_cifar", "wide_resnet28_10_cifar"):
        model = timm.create_model(name, **TINY[name])
        stem = model.get_submodule(model.pretrained_cfg["first_conv"]).weight
        # He et al.: a variance of 2 / (9 x number of output channels)
        assert stem.std().item() == pytest.approx(math.sqrt(2 / 9 / len(stem)), rel=0.15)


@all_baselines
def test_a_tiny_one_trains_and_is_evaluated(name, tree, tmp_path, capsys):
    kwargs = [f"{key}={str(value).replace(' ', '')}" for key, value in TINY[name].items()]
    flags = "--data-set FOLDER --batch-size 8 --epochs 1 --warmup-epochs 0 --device cpu --num_workers 0 --drop-path 0.2"
    words = ["--model", name, *flags.split(), "--data-path", str(tree(side=32)), "--input-size", "24", "20"]
    words += ["--grad-checkpointing", "--output_dir", str(tmp_path), "--model-kwargs", *kwargs]
    assert main.main(words) == 0
    assert "docs/baselines.md" not in capsys.readouterr().out
    (line,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    file = tmp_path / "checkpoint.pth"
    assert main.main(["--eval", "--resume", str(file), "--device", "cpu", "--num_workers", "0"]) == 0
    assert f"Acc@1 {line['test_acc1']:.3f}" in capsys.readouterr().out
    # at another size; CCT's position embedding is resampled
    trained = load_trained(file, input_size=(32, 40))
    assert trained.model(torch.zeros(1, 3, 32, 40)).shape == (1, 2)


@all_baselines
def test_the_last_intermediate_is_the_last_feature_map(name):
    model = timm.create_model(name, **TINY[name])
    (last,) = model.forward_intermediates(torch.zeros(2, 3, 32, 32), 1, intermediates_only=True)
    assert last.shape[2:] == (LAST_SIDE[name], LAST_SIDE[name])


# the size of the images


@pytest.mark.parametrize(
    "name, size, left",
    [
        ("resnet34", (32, 32), "8x8"),
        ("resnetv2_18", (48, 32), "12x8"),
        ("convnext_atto", (32, 32), "8x8"),
        ("efficientnet_b0", (32, 32), "8x8"),
        ("resnet34", (64, 64), None),
        ("resnet18_cifar", (32, 32), None),
        ("wide_resnet28_10_cifar", (32, 32), None),
        ("vgg11", (32, 32), None),
        ("deit_tiny_patch16_224", (32, 32), None),
        ("swin_tiny_patch4_window7_224", (32, 32), None),
    ],
)
def test_a_cnn_for_large_images_is_named(name, size, left, capsys):
    with torch.device("meta"):
        model = timm.create_model(name)
    log.warn_about_downsampling(model, ModelConfig(name=name, input_size=size))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (left is not None)
    assert all(name in line and left in line for line in lines)


def test_a_run_says_so_at_its_start(tree, capsys):
    flags = "--model test_resnet --input-size 32 --batch-size 8 --epochs 1 --device cpu --num_workers 0"
    assert main.main([*flags.split(), "--data-set", "FOLDER", "--data-path", str(tree(side=32))]) == 0
    assert "docs/baselines.md" in capsys.readouterr().out
