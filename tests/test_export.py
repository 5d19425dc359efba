"""Trained weights go out and in: safetensors, ONNX, torch.hub, predictions."""

import builtins
import json
import os
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

import datasets
import export
import hubconf
import main
import predict
import trained
from util import checkpoint

ROOT = Path(main.__file__).parent
EVIT = "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=4 embed_dim=32 num_heads=2 depth=3 --drop_loc 1"
EVIT += " --input-size 28 --base_keep_rate 0.5 --fuse_token --shrink_start_epoch 0"


@pytest.fixture(scope="module")
def evit_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evit")
    flags = [*EVIT.split(), *"--data-set DIGITS --device cpu --num_workers 0 --no-repeated-aug --epochs 1".split()]
    assert main.main([*flags, "--warmup-epochs", "0", "--batch-size", "256", "--output_dir", str(folder)]) == 0
    return folder


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def build(file: Path, *flags: str) -> trained.Trained:
    return trained.load(export.build_parser().parse_args(["--checkpoint", str(file), "--out", "x", *flags]))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["model", "model_ema"])
@pytest.mark.parametrize("kind", ["dhvt", "evit"])
def test_timm_loads_the_exported_folder_to_identical_logits(kind, weights, tiny_run, evit_run, tmp_path, capsys):
    file = (tiny_run if kind == "dhvt" else evit_run) / "checkpoint.pth"
    flags = ["--use-ema"] if weights == "model_ema" else []
    assert export.main(["--checkpoint", str(file), "--out", str(tmp_path / "out"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.safetensors" in lines[1] and " bytes  sha256 " in lines[1]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    saved = torch.load(file)
    assert all(torch.equal(v, saved[weights][k]) for k, v in model.state_dict().items())
    images = torch.randn(3, 3, *build(file).size)
    expected = build(file, *flags).model(images)
    assert torch.equal(model(images), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == [str(i) for i in range(10)] and config["num_classes"] == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o666 & ~umask()}
    if kind == "evit":
        assert (model.base_keep_rate, model.drop_loc) == (0.5, (1,))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dhvt", "evit"])
def test_onnx_runtime_computes_the_same_at_any_batch(kind, tiny_run, evit_run, tmp_path):
    file = (tiny_run if kind == "dhvt" else evit_run) / "checkpoint.pth"
    assert export.main(["--checkpoint", str(file), "--out", str(tmp_path / "out"), "--onnx"]) == 0
    path = tmp_path / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path))
    model = build(file).model
    for count in (1, 2, 5):
        images = torch.randn(count, 3, *build(file).size)
        (logits,) = session.run(None, {"images": images.numpy()})
        expected = model(images)
        assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * expected.abs().max()
    graph = onnx.load(path)
    assert json.loads({p.key: p.value for p in graph.metadata_props}["classes"]) == [str(i) for i in range(10)]
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)  # DHVT's are folded


def test_a_graph_that_computes_something_else_is_not_left(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    words = ["--checkpoint", str(tiny_run / "checkpoint.pth"), "--out", str(tmp_path / "out"), "--onnx"]
    assert export.main(words) == 2
    assert "ONNX Runtime's logits differ by" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_missing_for_onnx_is_said_before_anything_is_written(tiny_run, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    words = ["--checkpoint", str(tiny_run / "checkpoint.pth"), "--out", str(tmp_path / "out")]
    assert export.main([*words, "--onnx"]) == 2
    line = capsys.readouterr().err
    assert "needs onnxruntime, which is not installed: pip install -r requirements-extra.txt" in line
    assert not list(tmp_path.iterdir()) and export.main(words) == 0


def test_a_folder_in_the_way_is_replaced_only_when_asked(tiny_run, tmp_path, monkeypatch, capsys):
    words = ["--checkpoint", str(tiny_run / "checkpoint.pth"), "--out", str(tmp_path / "out")]
    assert export.main(words) == 0 and export.main(words) == 2 and export.main([*words, "--overwrite"]) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_for_hf", full)
    assert export.main([*words, "--overwrite"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before and len(
        list(tmp_path.iterdir())
    ) == 1
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    words[-1] = str(tmp_path / "photos")
    assert export.main([*words, "--overwrite"]) == 2 and (tmp_path / "photos" / "cat.jpg").exists()


def test_weights_of_another_program_need_the_model_named(tiny_run, tmp_path, capsys):
    torch.save(torch.load(tiny_run / "checkpoint.pth")["model"], tmp_path / "bare.pth")
    words = ["--checkpoint", str(tmp_path / "bare.pth"), "--out", str(tmp_path / "out")]
    assert export.main(words) == 2
    assert "does not say of what model it is; add --model NAME" in capsys.readouterr().err
    named = ["--model", "dhvt_tiny_cifar_patch4", "--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2"]
    assert export.main([*words, *named]) == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 10


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5}, {"model": "hf-hub:someone/something"}, {"model": "local-dir:/etc"}, {"model_kwargs": [1]},
        {"model_kwargs": {"depth": {}}}, {"input_size": [10**9]}, {"input_size": ["32"]}, {"eval_crop_ratio": -1},
        {"nb_classes": "many"}, {"data_set": None}, {"drop_loc": [3]},
    ],
)  # fmt: skip
def test_flags_in_a_checkpoint_are_believed_no_further_than_their_kind(change, tiny_run, tmp_path, capsys):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["args"] |= change
    torch.save(saved, tmp_path / "c.pth")
    assert export.main(["--checkpoint", str(tmp_path / "c.pth"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_cannot_have_timm_fetch_or_load_other_files(tiny_run, tmp_path):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["args"]["model_kwargs"] |= {"pretrained": True, "checkpoint_path": "/nowhere"}
    torch.save(saved, tmp_path / "c.pth")
    assert set(build(tmp_path / "c.pth").model.state_dict()) == set(saved["model"])


# torch.hub


@pytest.mark.parametrize("name", ["dhvt_tiny_cifar_patch4", "deit_tiny_patch16_shrink_base"])
def test_torch_hub_builds_what_timm_does(name):
    model = torch.hub.load(str(ROOT), name, source="local", num_classes=7)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in timm.create_model(name, num_classes=7).state_dict().items()
    }
    with pytest.raises(ValueError, match="no weights were ever published"):
        torch.hub.load(str(ROOT), name, source="local", pretrained=True)


def test_every_model_has_its_entry_point_and_nothing_else_does():
    points = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert set(points) == {*timm.list_models(module="dhvt"), *timm.list_models(module="evit")}


# predictions


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("digits")
    test = datasets.Digits(False, (32, 32))
    for i, image in enumerate(test.images):
        (folder / str(i % 7)).mkdir(exist_ok=True)
        image.save(folder / str(i % 7) / f"{i:03d}.png")
    return folder, test.targets


@pytest.mark.parametrize("exported", [False, True])
def test_predictions_have_the_accuracy_of_the_evaluation(exported, tiny_run, digits, tmp_path, capsys):
    folder, targets = digits
    source = tiny_run / "checkpoint.pth"
    if exported:
        assert export.main(["--checkpoint", str(source), "--out", str(tmp_path / "out")]) == 0
        source = tmp_path / "out"
    capsys.readouterr()
    assert predict.main([str(folder), "--checkpoint", str(source), "--json", "--num_workers", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 360 and all(len(row["predictions"]) == 5 for row in rows)
    hits = [row["predictions"][0]["class"] == str(targets[int(Path(row["path"]).stem)]) for row in rows]
    line = json.loads((tiny_run / "log.txt").read_text())
    assert 100 * sum(hits) / 360 == pytest.approx(line["test_acc1"])
    assert all(row["predictions"][0]["probability"] >= row["predictions"][1]["probability"] for row in rows)


def test_an_unreadable_file_is_reported_and_the_rest_goes_on(tiny_run, digits, tmp_path, capsys):
    folder, _ = digits
    images = sorted((folder / "0").iterdir())[:3]
    shutil.copy(images[0], tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    shutil.copy(images[1], tmp_path / "c.png")
    words = [str(tmp_path), str(images[2]), "--checkpoint", str(tiny_run / "checkpoint.pth"), "--batch-size", "1"]
    assert predict.main([*words, "--topk", "20"]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / "a.png"), str(tmp_path / "c.png"), str(images[2])]
    assert all(line.count("%") == 10 for line in lines)
    assert f"predict.py: {tmp_path / 'b.png'}: not a readable image" in printed.err
    assert predict.main([*words, "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [sorted(row) for row in rows] == [["path", "predictions"], ["error", "path"], *[["path", "predictions"]] * 2]
    assert printed.err.endswith("predict.py: error: 1 of 4 files could not be read, and are named above\n")


BAD = {
    "no such image": (["nowhere.png"], "nowhere.png: no such file or folder"),
    "no images": (["empty"], "empty: no images in it"),
    "no checkpoint": (["a.png", "--checkpoint", "nothing.pth"], "nothing.pth: no such checkpoint"),
    "no exported folder": (["a.png", "--checkpoint", "empty"], "empty: not a folder that export.py wrote"),
    "run's folder": (["a.png", "--checkpoint", "RUN"], "a run's folder; name the file, such as "),
    "EMA of a folder": (["a.png", "--checkpoint", "empty", "--use-ema"], "leave out --use-ema"),
    "top none": (["a.png", "--topk", "0"], "--topk 0 must be at least 1"),
    "workers": (["a.png", "--num_workers", "-1"], "--num_workers -1 must be 0 or more"),
    "device": (["a.png", "--device", "gpu"], "--device gpu"),
    "other classes": (["a.png", "--nb-classes", "7"], "shapes differ, first head.weight (10, 32) in the file"),
}


@pytest.mark.parametrize("row", BAD)
def test_what_cannot_be_predicted_is_one_line(row, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.png").touch()
    words, said = BAD[row]
    words = [word.replace("RUN", str(tiny_run)) for word in words]
    assert predict.main(["--checkpoint", str(tiny_run / "checkpoint.pth"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict.py: error: ") and said in line


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "nothing"}, {"architecture": ["a"]}, {"pretrained_cfg": 5}, {"model_args": {"depth": 0}},
        {"pretrained_cfg": {"input_size": [3, -1, 2], "crop_pct": 1}},
    ],
)  # fmt: skip
def test_an_exported_folder_that_was_changed_is_one_line(change, tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export.main(["--checkpoint", str(tiny_run / "checkpoint.pth"), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text()) | change
    (out / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.png").touch()
    capsys.readouterr()
    assert predict.main([str(tmp_path / "a.png"), "--checkpoint", str(out)]) == 2
    assert "out: not a folder that export.py wrote (" in capsys.readouterr().err


def test_the_checkpoint_of_a_run_says_all_that_is_needed(evit_run):
    found = build(evit_run / "best_checkpoint.pth")
    assert (found.name, found.size, found.crop_ratio) == ("deit_tiny_patch16_shrink_base", (28, 28), 1.0)
    assert found.classes == [str(i) for i in range(10)]
    assert checkpoint.load(evit_run / "best_checkpoint.pth")["classes"] == found.classes
