"""Fine-tuning: what is loaded, resampled, refused and frozen, and in which mode the model trains."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import create_optimizer_v2
from torch import nn

import export
import main
from models.build import init_from_checkpoint, load_trained
from util import optim
from util.checkpoint import load_optimizer
from util.config import ModelConfig
from util.errors import InputError

DHVT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def dhvt(**kwargs) -> nn.Module:
    return timm.create_model("dhvt_tiny_cifar_patch4", **DHVT | kwargs)


def deit(name: str = "deit_tiny_patch16_224", img_size=224, **kwargs) -> nn.Module:
    """Return a small DeiT with large position embeddings, so that resampling shows."""
    model = timm.create_model(name, img_size=img_size, **VIT | kwargs)
    nn.init.normal_(model.pos_embed)
    return model


def same(a: dict, b: dict, *others: str) -> bool:
    """Return whether two state dicts are equal bit for bit, except names that end with one of `others`."""
    assert list(a) == list(b)
    return all(torch.equal(a[k], b[k]) for k in a if not k.endswith(others))


@pytest.fixture
def flags(tiny_flags, photographs) -> list[str]:
    """Return flags of a short epoch of the tiny DHVT on three classes of photographs' crops.

    --model-ema-decay 1 keeps the first weights as the EMA.
    """
    more = "--data-set FOLDER --batch-size 4 --lr 0.01 --unscale-lr --model-ema-decay 1"
    return [*tiny_flags, *more.split(), "--data-path", str(photographs)]


@pytest.fixture(scope="module")
def photographs(tree) -> Path:
    return tree(train=("ant", "bee", "cow"), count=4, side=32)


def load(model: nn.Module, content: dict, path: Path, use_ema: bool = False) -> None:
    """Save a checkpoint's content, and start a model from it."""
    torch.save(content, path)
    init_from_checkpoint(model, str(path), use_ema)


def train(flags: list[str], folder: Path, *more: str) -> dict:
    """Train for an epoch and return the checkpoint."""
    assert main.main([*flags, "--output_dir", str(folder), *more]) == 0
    return torch.load(folder / "checkpoint.pth")


def test_digits_go_on_as_photographs_of_other_classes_and_size(flags, tiny_run, tmp_path):
    source = tiny_run / "checkpoint.pth"
    found = train(flags, tmp_path / "out", "--finetune", str(source), "--input-size", "32", "48")
    before = torch.load(source)["model"]
    assert same(found["model_ema"], before, "head.weight", "head.bias", "num_batches_tracked")
    assert found["model"]["head.weight"].shape == (3, 32) and found["classes"] == ["ant", "bee", "cow"]
    assert not any(torch.equal(found["model"][k], before[k]) for k in before if k.endswith(STATISTICS))


def test_without_train_mode_norms_keep_their_statistics_and_all_weights_train(flags, tiny_run, tmp_path):
    source = tiny_run / "checkpoint.pth"
    found = train(flags, tmp_path / "out", "--finetune", str(source), "--no-train-mode")["model"]
    before = torch.load(source)["model"]
    for k in before:
        assert torch.equal(found[k], before[k]) == k.endswith(STATISTICS), k


def reference(pos_embed: torch.Tensor, prefix: int, size: tuple[int, int], **kwargs) -> torch.Tensor:
    """Resample [1, prefix + side ** 2, C] to [1, prefix + H * W, C] with torch alone."""
    tokens, grid = pos_embed[:, :prefix], pos_embed[:, prefix:]
    side = int(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", **kwargs).flatten(2).transpose(1, 2)
    return torch.cat([tokens, grid], dim=1)


@pytest.mark.parametrize(("size", "grid"), [(48, (3, 3)), ((32, 80), (2, 5)), (240, (15, 15))])
def test_a_published_deit_starts_at_another_size_with_resampled_positions(tmp_path, capsys, size, grid):
    weights = deit(num_classes=1000).state_dict()
    model = deit(img_size=size, num_classes=3)
    published = argparse.Namespace(model="deit_tiny_patch16_224", output_dir=Path("/home/someone"), lr=np.float64(5e-4))
    published.input_size = 224
    load(model, {"model": weights, "model_ema": {}, "epoch": 299, "args": published}, tmp_path / "deit.pth")
    assert torch.equal(model.pos_embed, reference(weights["pos_embed"], 1, grid, align_corners=False))
    assert same(model.state_dict(), weights, "head.weight", "head.bias", "pos_embed")
    assert "2 re-initialised (first head.weight), 1 resampled (first pos_embed)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(32, 32), (32, 80), (32, 128)])
def test_positions_of_the_same_size_stay_bit_for_bit(size, tmp_path, capsys):
    """Sixteen patches are two rows of eight where the checkpoint's flags say so."""
    source, model = deit(img_size=size).state_dict(), deit(img_size=size)
    args = {"model": "deit_tiny_patch16_224", "input_size": list(size)}
    load(model, {"model": source, "args": args}, tmp_path / "x.pth")
    assert same(model.state_dict(), source) and "0 resampled" in capsys.readouterr().out


def test_sixteen_patches_are_a_square_where_nothing_else_is_known(tmp_path):
    source, model = deit(img_size=64).state_dict(), deit(img_size=(32, 128))
    load(model, {"model": source}, tmp_path / "x.pth")
    assert torch.equal(model.pos_embed, reference(source["pos_embed"], 1, (2, 8)))


def test_an_evaluation_at_another_size_resamples_from_the_files_grid(tmp_path):
    """Sixteen patches are two rows of eight in the file, and a square in the model."""
    config = ModelConfig("deit_tiny_patch16_224", num_classes=1000, input_size=(32, 128), kwargs=VIT)
    source = deit(img_size=(32, 128)).state_dict()
    torch.save({"model": source, "config": asdict(config)}, tmp_path / "x.pth")
    model = load_trained(tmp_path / "x.pth", input_size=(64, 64)).model
    expected = resample_abs_pos_embed(source["pos_embed"], new_size=(4, 4), old_size=(2, 8), antialias=False)
    torch.testing.assert_close(model.pos_embed.data, expected)


def test_the_distillation_token_comes_and_goes(tmp_path, capsys):
    plain, distilled = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
    source, model = deit(plain).state_dict(), deit(distilled, 48)
    own = model.state_dict()["pos_embed"].clone()
    load(model, {"model": source}, tmp_path / "x.pth")
    expected = reference(source["pos_embed"], 1, (3, 3))
    assert torch.equal(model.pos_embed, torch.cat([expected[:, :1], own[:, 1:2], expected[:, 1:]], 1))
    assert "3 missing (first dist_token)" in capsys.readouterr().out
    source, model = deit(distilled).state_dict(), deit(plain, 48)
    load(model, {"model": source}, tmp_path / "x.pth")
    expected = reference(source["pos_embed"], 2, (3, 3))
    assert torch.equal(model.pos_embed, torch.cat([expected[:, :1], expected[:, 2:]], 1))
    assert "3 unexpected (first dist_token)" in capsys.readouterr().out


def test_only_heads_of_another_shape_start_anew(tmp_path, capsys):
    source = deit("deit_tiny_distilled_patch16_224", 32, num_classes=7).state_dict()
    source["head_dist.weight"], source["head_dist.bias"] = torch.ones(5, 24), torch.ones(5)
    model = deit("deit_tiny_distilled_patch16_224", 32, num_classes=7)
    before = model.head_dist.weight.clone()
    load(model, {"model": source}, tmp_path / "x.pth")
    assert torch.equal(model.head.weight, source["head.weight"]) and torch.equal(model.head_dist.weight, before)
    assert "2 re-initialised (first head_dist.weight)" in capsys.readouterr().out
    # the head of another model has another name
    source, model = timm.create_model("resnet18", num_classes=7), timm.create_model("resnet18", num_classes=3)
    load(model, {"model": source.state_dict()}, tmp_path / "x.pth")
    assert same(model.state_dict(), source.state_dict(), "fc.weight", "fc.bias")


def test_raw_weights_unless_the_ema_is_asked_for(tiny_run, tmp_path):
    path = str(tiny_run / "checkpoint.pth")
    saved = torch.load(path)
    assert not same(saved["model"], saved["model_ema"])
    model = dhvt(depth=1, num_classes=10)
    for use_ema, key in ((False, "model"), (True, "model_ema")):
        init_from_checkpoint(model, path, use_ema)
        assert same(model.state_dict(), saved[key])
    with pytest.raises(InputError, match="--use-ema"):
        load(model, saved["model"], tmp_path / "bare.pth", use_ema=True)


def test_safetensors_and_exported_folders_are_fine_tuned_too(tiny_run, tmp_path):
    checkpoint = tiny_run / "checkpoint.pth"
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "x")]) == 0
    for source in (tmp_path / "x", tmp_path / "x" / "model.safetensors"):
        model = dhvt(depth=1, num_classes=3)
        init_from_checkpoint(model, str(source), False)
        assert same(model.state_dict(), torch.load(checkpoint)["model"], "head.weight", "head.bias")


def test_the_line_counts_what_did_not_fit_and_names_the_first(tmp_path, capsys):
    source, model = dhvt(num_classes=10).state_dict(), dhvt(num_classes=10)
    total = len(source)
    before = model.norm.weight.clone()
    del source["blocks.1.mlp.bn1.running_var"], source["blocks.1.mlp.bn1.running_mean"]
    source |= {"norm.weight": torch.zeros(9), "mask": torch.ones(1), "note": "of no shape"}
    load(model, {"model": source}, tmp_path / "x.pth")
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and f"{total - 3} matched (first cls_token)" in text
    assert "2 missing (first blocks.1.mlp.bn1.running_mean)" in text
    assert "1 unexpected (first mask)" in text and "1 of another shape (first norm.weight)" in text
    assert torch.equal(model.norm.weight, before)


def test_another_architecture_is_refused_from_either_side_and_changes_nothing(tmp_path):
    """A ViT's attention has names and shapes of DHVT's: most of its tensors would load."""
    models = {"ViT": deit(img_size=32, embed_dim=32), "DHVT": dhvt(), "ResNet": timm.create_model("resnet18")}
    for a, source in models.items():
        for b, model in models.items():
            before = {k: v.clone() for k, v in model.state_dict().items()}
            if a != b:
                with pytest.raises(InputError, match="x.pth: .* --model"):
                    load(model, {"model": source.state_dict()}, tmp_path / "x.pth")
                assert same(model.state_dict(), before)


def trained(model: nn.Module) -> set[str]:
    """Return the names of trained modules, and of trained parameters that belong to the model itself."""
    return {
        ".".join(n.split(".")[:2][: 1 + n.startswith("blocks")]) for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("build", "what", "kept"),
    [
        (dhvt, "head", {"head"}),
        (dhvt, "2", {"blocks.0", "blocks.1", "norm", "head"}),
        (lambda: deit("deit_tiny_distilled_patch16_224", 32), "1", {"blocks.1", "norm", "head", "head_dist"}),
        (lambda: timm.create_model("resnet18"), "head", {"fc"}),
    ],
)
def test_what_is_trained_beside_frozen_parts(build, what, kept):
    model = build()
    optim.freeze(model, what)
    assert trained(model) == kept


def test_frozen_parts_stay_bit_for_bit_and_the_run_goes_on(flags, tmp_path):
    """The second time --resume auto finds the run, and --finetune is not read again."""
    source = tmp_path / "c.pth"
    torch.save(dhvt(num_classes=10).state_dict(), source)
    more = ["--model-kwargs", *(f"{k}={v}" for k, v in DHVT.items()), "--freeze", "1", "--layer-decay", "0.5"]
    more += ["--finetune", str(source), "--resume", "auto"]
    before = train([*flags, *more], tmp_path / "out")["model_ema"]
    source.unlink()
    resumed = train([*flags, *more], tmp_path / "out", "--epochs", "2")
    assert resumed["epoch"] == 1
    parameters = dict(dhvt().named_parameters())
    tuned = [name for name in parameters if name.startswith(("blocks.1.", "norm.", "head."))]
    for name, tensor in resumed["model"].items():
        if name in parameters or not name.startswith("blocks.1."):
            assert torch.equal(tensor, before[name]) == (name not in tuned), name
    assert len(resumed["optimizer"]["state"]) == len(tuned)
    line = json.loads((tmp_path / "out" / "log.txt").read_text().splitlines()[0])
    assert line["train_lr"] == 0.01  # the head's


def test_rates_fall_by_the_factor_from_layer_to_layer():
    model = dhvt(depth=3)
    kwargs = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.5}
    optimizer = optim.build_optimizer(model, torch.device("cpu"), **kwargs)
    optim.build_scheduler(optimizer, "cosine", num_epochs=3, warmup_epochs=0).step(0)
    names = {id(p): n for n, p in model.named_parameters()}
    depth = {"cls_token": 4, "patch_embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 1, "head": 0}
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            (layer,) = (d for start, d in depth.items() if names[id(p)].startswith(start))
            assert group["lr"] == pytest.approx(1e-3 * 0.5**layer), names[id(p)]
            seen.add(id(p))
    assert seen == set(names)
    other = create_optimizer_v2(model, "adamw", 1e-3, 0.05, layer_decay=0.75)
    load_optimizer(other, optimizer.state_dict(), "x.pth")  # today's factor counts
    assert min(group["lr_scale"] for group in other.param_groups) == pytest.approx(0.75**4)
