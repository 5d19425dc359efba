"""Trained weights go out and in: safetensors, ONNX, torch.hub, predictions."""

import argparse
import csv
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import datasets
import export
import hubconf
import main
import predict
from data.transforms import build_transform
from models.build import load_trained
from util.config import DataConfig

ROOT = Path(main.__file__).parent
EVIT = (
    "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=4 embed_dim=32 num_heads=2 depth=3 --drop_loc 1 "
    "--input-size 28 --base_keep_rate 0.5 --fuse_token --shrink_start_epoch 0 --data-set DIGITS --device cpu "
    "--num_workers 0 --no-repeated-aug --epochs 1 --warmup-epochs 0 --batch-size 256"
)
DIGITS = [str(digit) for digit in range(10)]
# what a file does not say that holds nothing but weights
TINY_MODEL = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --input-size 32".split()


@pytest.fixture(scope="module")
def files(tiny_run, tmp_path_factory) -> dict[str, Path]:
    """Return checkpoints of a DHVT and of an EViT."""
    folder = tmp_path_factory.mktemp("evit")
    assert main.main([*EVIT.split(), "--output_dir", str(folder)]) == 0
    return {"dhvt": tiny_run / "checkpoint.pth", "evit": folder / "best_checkpoint.pth"}


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> Path:
    """Return the exported folder of the tiny run, with model.onnx; leave it as it is."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert run_export(tiny_run / "checkpoint.pth", out, "--onnx") == 0
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of the 360 test digits, in subfolders, by their index and class."""
    folder = tmp_path_factory.mktemp("images")
    digits = datasets.load_digits(False, (32, 32), None)
    for i, (pixels, target) in enumerate(zip(digits.data, digits.targets, strict=True)):
        (folder / str(i % 7)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 7) / f"{i:03d}_{target}.png")
    return folder


def run_export(checkpoint: Path, out: Path, *words: str) -> int:
    return export.main(["--checkpoint", str(checkpoint), "--out", str(out), *words])


# export.py


@torch.no_grad()
@pytest.mark.parametrize(("kind", "weights"), [("dhvt", "model_ema"), ("evit", "model")])
def test_timm_loads_the_exported_folder_to_identical_logits(kind, weights, files, tmp_path, capsys):
    use_ema = weights == "model_ema"
    out = tmp_path / "out"
    assert run_export(files[kind], out, *["--use-ema"] * use_ema) == 0
    assert re.search(r"model.safetensors  [\d,]+ bytes\n", capsys.readouterr().out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    saved = torch.load(files[kind])[weights]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    trained = load_trained(files[kind], use_ema=use_ema)
    batch = torch.randn(3, 3, *trained.config.input_size)
    assert torch.equal(model(batch), trained.model(batch))
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == trained.classes == DIGITS and config["num_classes"] == 10
    # nothing else is left, and all may read it that may read other new files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
    if kind == "evit":
        assert (model.base_keep_rate, model.drop_loc, model.fuse_token) == (0.5, (1,), True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dhvt", pytest.param("evit", marks=pytest.mark.slow)])
def test_onnx_runtime_computes_the_same_at_any_batch(kind, files, exported, tmp_path):
    path = exported / "model.onnx"
    if kind == "evit":
        assert run_export(files[kind], tmp_path / "out", "--onnx") == 0
        path = tmp_path / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    trained = load_trained(files[kind])
    for count in (1, 2, 5):
        batch = torch.randn(count, 3, *trained.config.input_size)
        (logits,) = session.run(None, {"images": batch.numpy()})
        expected = trained.model(batch)
        assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * expected.abs().max()
    graph = onnx.load(path)
    properties = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert properties["classes"] == DIGITS
    assert properties["input_size"] == list(trained.config.input_size)
    # DHVT's are folded
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)


def test_a_graph_that_computes_something_else_is_not_left(tiny_run, exported, tmp_path, monkeypatch, capsys):
    """The exporter returns the graph of the raw weights, and not that of the EMA."""
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}),
        save=partial(shutil.copy, exported / "model.onnx"),
    )
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--onnx", "--use-ema") == 2
    assert "ONNX Runtime's logits differ by " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [np.full((3, 10), np.nan)])
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--onnx") == 2
    assert "ONNX Runtime's logits differ by nan" in capsys.readouterr().err


def test_a_missing_package_is_named_and_nothing_is_written(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--onnx") == 2
    assert "needs onnxruntime: pip install -r requirements-extra" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_replaced_only_when_asked(tiny_run, tmp_path, monkeypatch, capsys):
    checkpoint = tiny_run / "checkpoint.pth"
    out = tmp_path / "out"
    # an empty folder is not in the way of --overwrite
    out.mkdir()
    statuses = [
        run_export(checkpoint, out, "--overwrite"),
        run_export(checkpoint, out),
        run_export(checkpoint, out, "--overwrite"),
    ]
    assert statuses == [0, 2, 0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    monkeypatch.setattr(json, "dump", Mock(side_effect=OSError(28, "No space left on device")))
    assert run_export(checkpoint, out, "--overwrite") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]

    # what is no exported model stays in any case
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    assert run_export(checkpoint, photos, "--overwrite") == 2 and (photos / "cat.jpg").exists()


# what a file says of its model


def test_published_checkpoints_are_predicted_and_exported(tiny_run, images, tmp_path, capsys):
    """Theirs hold a Namespace whose input_size is one number."""
    flags = {"model": "dhvt_tiny_cifar_patch4", "input_size": 32, "nb_classes": 10, "data_set": "CIFAR"}
    weights = torch.load(tiny_run / "checkpoint.pth")["model"]
    published = tmp_path / "published.pth"
    content = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": content, "epoch": 3, "args": argparse.Namespace(**flags, drop_path=0.1)}, published)
    kwargs = TINY_MODEL[2:6]
    found = predict_json(capsys, str(images / "0"), "--checkpoint", str(published), *kwargs)
    assert found == predict_json(capsys, str(images / "0"), "--checkpoint", str(tiny_run / "checkpoint.pth"))
    assert run_export(published, tmp_path / "out", *kwargs) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_published_checkpoint_is_evaluated_as_its_flags_say(files, tmp_path):
    flags = {"model": "deit_tiny_patch16_shrink_base", "input_size": 28, "nb_classes": 10, "eval_crop_ratio": 0.9}
    flags |= {"base_keep_rate": 0.5, "fuse_token": True, "drop_loc": "(1,)"}
    flags |= {"data_set": "IMNET", "data_path": "/data", "use_lmdb": True}
    weights = torch.load(files["evit"])["model"]
    torch.save({"model": weights, "args": argparse.Namespace(**flags)}, tmp_path / "p.pth")
    trained = load_trained(tmp_path / "p.pth", kwargs=dict(patch_size=4, embed_dim=32, num_heads=2, depth=3))
    kwargs = trained.config.kwargs
    assert (kwargs["base_keep_rate"], kwargs["fuse_token"], kwargs["drop_loc"]) == (0.5, True, (1,))
    assert trained.config.crop_ratio == 0.9
    assert trained.data == DataConfig("IMNET", root="/data", lmdb=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "hf-hub:someone/something"},
        {"kwargs": {"depth": {}}},
        {"input_size": [0, 32]},
        {"crop_ratio": -1},
    ],
)
def test_a_checkpoint_is_believed_no_further_than_types_and_ranges(change, tiny_run, tmp_path, capsys):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["config"] |= change
    torch.save(saved, tmp_path / "c.pth")
    assert run_export(tmp_path / "c.pth", tmp_path / "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_crops_are_no_larger_than_the_image(tiny_run, tmp_path):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["config"]["crop_ratio"], saved["data"]["name"] = 1.5, "FOLDER"
    torch.save(saved, tmp_path / "c.pth")
    assert load_trained(tmp_path / "c.pth").config.crop_ratio == 1.0


def test_a_checkpoint_cannot_have_timm_fetch_or_load_other_files(tiny_run, tmp_path):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["config"]["kwargs"] |= {"pretrained": True, "checkpoint_path": "/nowhere"}
    torch.save(saved, tmp_path / "c.pth")
    assert set(load_trained(tmp_path / "c.pth").model.state_dict()) == set(saved["model"])


# torch.hub


def test_torch_hub_builds_what_timm_does_and_has_every_model():
    name = "dhvt_tiny_cifar_patch4"
    model = torch.hub.load(str(ROOT), name, source="local", num_classes=7)
    expected = timm.create_model(name, num_classes=7).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        torch.hub.load(str(ROOT), name, source="local", pretrained=True)
    names = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert names == set(timm.list_models(module=["baselines", "dhvt", "evit"]))


# predict.py


def predict_json(capsys, *words: str) -> list[dict]:
    capsys.readouterr()
    assert predict.main([*words, "--json", "--num_workers", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_files_of_a_model_have_the_accuracy_of_its_evaluation(tiny_run, exported, images, capsys):
    accuracy = json.loads((tiny_run / "log.txt").read_text())["test_acc1"]
    outputs = []
    sources = {tiny_run / "checkpoint.pth": [], exported: [], exported / "model.safetensors": TINY_MODEL}
    for source, flags in sources.items():
        # folders of export.py and safetensors do not say on which data to evaluate
        data = [] if source.suffix == ".pth" else ["--data-set", "DIGITS"]
        words = ["--eval", "--resume", str(source), "--device", "cpu", "--num_workers", "0", *flags, *data]
        assert main.main(words) == 0
        outputs.append(re.search(r"\* Acc@1.*", capsys.readouterr().out)[0])
        rows = predict_json(capsys, str(images), "--checkpoint", str(source), *flags)
        hits = [row["predictions"][0]["class"] == Path(row["path"]).stem[-1] for row in rows]
        assert len(hits) == 360 and 100 * sum(hits) / 360 == pytest.approx(accuracy)
        for row in rows:
            probabilities = [prediction["probability"] for prediction in row["predictions"]]
            assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
    assert outputs[0].startswith(f"* Acc@1 {accuracy:.3f} ") and outputs == outputs[:1] * 3


def test_ema_weights_and_bf16_are_predicted_with_when_asked(tiny_run, images, tmp_path, capsys):
    checkpoint = tmp_path / "c.pth"
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["model_ema"] = {name: 1.1 * value for name, value in saved["model"].items()}
    torch.save(saved, checkpoint)
    files = sorted((images / "0").iterdir())[:4]
    transform = build_transform(False, load_trained(checkpoint).config)
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    found = {}
    for flags in ("--amp off", "--amp off --use-ema", "--amp bf16"):
        words = ["--checkpoint", str(checkpoint), "--topk", "10", *flags.split()]
        rows = predict_json(capsys, *map(str, files), *words)
        by_class = [sorted(row["predictions"], key=lambda p: p["index"]) for row in rows]
        found[flags] = torch.tensor([[p["probability"] for p in predictions] for predictions in by_class])
    for flags, use_ema in (("--amp off", False), ("--amp off --use-ema", True)):
        with torch.no_grad():
            expected = load_trained(checkpoint, use_ema=use_ema).model(pixels).softmax(dim=1)
        torch.testing.assert_close(found[flags], expected, rtol=1e-4, atol=1e-6)
    assert 1e-5 < (found["--amp bf16"] - found["--amp off"]).abs().max() < 0.1


def test_outputs_without_a_name_are_named_by_their_number(tiny_run, images, tmp_path, capsys):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["classes"] = ["zero", "one"]
    torch.save(saved, tmp_path / "c.pth")
    image = next((images / "0").iterdir())
    (row,) = predict_json(capsys, str(image), "--checkpoint", str(tmp_path / "c.pth"), "--topk", "20")
    assert {p["index"]: p["class"] for p in row["predictions"]} == {**dict(enumerate(DIGITS)), 0: "zero", 1: "one"}


def test_an_unreadable_file_is_reported_and_the_rest_goes_on(tiny_run, images, tmp_path, capsys):
    one, two, three = sorted((images / "0").iterdir())[:3]
    shutil.copy(one, tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    shutil.copy(two, tmp_path / "c.PNG")
    (tmp_path / "folder.png").mkdir()
    words = [str(tmp_path), str(three), "--checkpoint", str(tiny_run / "checkpoint.pth"), "--batch-size", "1"]
    assert predict.main([*words, "--topk", "20"]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / "a.png"), str(tmp_path / "c.PNG"), str(three)]
    assert all(line.count("%") == 10 for line in lines)
    assert f"predict.py: {tmp_path / 'b.png'}: not a readable image" in printed.err
    assert printed.err.endswith("predict.py: error: 1 of 4 files could not be read; they are named above\n")
    assert predict.main([*words, "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [list(row)[1] for row in rows] == ["predictions", "error", "predictions", "predictions"]


def test_the_table_has_what_the_json_has_and_a_line_for_an_unreadable_file(tiny_run, images, tmp_path, capsys):
    files = sorted((images / "0").iterdir())[:3]
    files[0] = tmp_path / "b,ä.png"
    files[0].write_bytes(b"no image")
    words = [*map(str, files), "--checkpoint", str(tiny_run / "checkpoint.pth"), "--csv", str(tmp_path / "t.csv")]
    for topk, columns in ((3, 3), (20, 10)):
        capsys.readouterr()
        assert predict.main([*words, "--json", "--topk", str(topk)]) == 2
        rows = json.loads(capsys.readouterr().out)
        with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert len(table) == 3
        for line, row in zip(table, rows, strict=True):
            assert (
                len(line) == 2 + 3 * columns and line["path"] == row["path"] and line["error"] == row.get("error", "")
            )
            for k in range(columns):
                cells = [line[f"{name}_{k + 1}"] for name in ("class", "index", "probability")]
                expected = {"class": "", "index": "", "probability": ""} if "error" in row else row["predictions"][k]
                assert cells == [str(value) for value in expected.values()]
    # the lines are printed all the same, but not before a table that cannot be written is noticed
    for name, lines, reason in (("t.csv", 2, "named above"), ("nowhere/t.csv", 0, "nowhere/t.csv: No such file")):
        assert predict.main([*words, "--csv", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == lines and reason in printed.err.splitlines()[-1]


BAD = {
    "no such image": (["nowhere.png"], "nowhere.png: no such file"),
    "no images": (["empty"], "no images in it (.jpg"),
    "no exported folder": (["a.png", "--checkpoint", "empty"], "empty: not a file"),
    "weights alone": (["a.png", "--checkpoint", "bare.pth"], "does not say which model it is of; add --model NAME"),
    "other classes": (["a.png", "--nb-classes", "7"], "--nb-classes"),
}


@pytest.mark.parametrize("row", BAD)
def test_what_cannot_be_predicted_is_one_line(row, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.png").touch()
    torch.save(torch.load(tiny_run / "checkpoint.pth")["model"], "bare.pth")
    words, reason = BAD[row]
    assert predict.main(["--checkpoint", str(tiny_run / "checkpoint.pth"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict.py: error: ") and reason in line
