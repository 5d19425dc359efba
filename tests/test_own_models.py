"""--import: models of a file beside this repository; --pretrained: timm's weights, on images as timm has them."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from test_distributed import torchrun
from timm.data import create_transform, resolve_data_config
from timm.models import _builder

import engine
import export
import main
import predict
import speed_test
from util import options
from util.config import ModelConfig
from util.errors import InputError

FLAGS = "--device cpu --num_workers 0 --epochs 1 --warmup-epochs 0 --batch-size 4 --data-set FOLDER --data-path"
NET = "test_resnet"


@pytest.fixture(scope="module")
def data(tree) -> Path:
    return tree(count=4, side=200)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Return the current folder, with my_models.py as the documentation has it."""
    page = (Path(main.__file__).parent / "docs" / "configuration.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_of_a_file_is_trained_evaluated_classified_exported_and_timed(place, data, capfd):
    own = "--import my_models.py"
    assert main.main(f"{own} --model my_net --output_dir out --input-size 32 {FLAGS} {data}".split()) == 0
    assert json.loads(Path("out/args.json").read_text())["import"] == "my_models.py"
    checkpoint = "out/best_checkpoint.pth"
    assert main.main(f"{own} --eval --resume {checkpoint} --device cpu --num_workers 0".split()) == 0
    assert main.main(f"{own} --model my_net --finetune {checkpoint} --freeze head {FLAGS} {data}".split()) == 0
    assert export.main(f"{own} --checkpoint {checkpoint} --out exported".split()) == 0
    capfd.readouterr()
    for source in (checkpoint, "exported"):
        words = f"{data}/val {own} --checkpoint {source} --num_workers 0 --json --device cpu"
        assert predict.main(words.split()) == 0
    one, two = re.findall(r"^\[\n.*?^\]$", capfd.readouterr().out, re.M | re.S)
    assert one == two and len(json.loads(one)) == 8
    words = f"my_net {own} --seconds 0.01 --batch-size 1 --device cpu --mode inference --input-size 32"
    assert speed_test.main(words.split()) == 0
    assert "failed" not in capfd.readouterr().out


def test_a_checkpoint_of_an_unknown_model_says_how_to_register_it(tmp_path, capfd):
    saved = {"model": {"x": torch.zeros(1)}, "config": {**vars(ModelConfig("nowhere_registered"))}}
    torch.save(saved, tmp_path / "x.pth")
    for run in (
        lambda path: predict.main([str(path), "--checkpoint", str(path)]),
        lambda path: export.main(["--out", str(tmp_path / "out"), "--checkpoint", str(path)]),
        lambda path: main.main(["--eval", "--resume", str(path), "--device", "cpu"]),
    ):
        (tmp_path / "x.png").touch()
        assert run(tmp_path / "x.pth") == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "nowhere_registered" in error and "--import FILE" in error


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit('bye')", "import no_such_module"])
def test_an_error_in_the_file_is_one_line(code, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(f"'''A file.'''\n\n{code}\n")
    with pytest.raises(InputError, match=f"^--import {path}: .*"):
        options.parse(["--import", str(path)])


class Evaluation:
    """Stands in for engine.evaluate, and keeps what it is called with."""

    def __call__(self, model, loader, precision, **kwargs) -> dict[str, float]:
        self.model = model
        self.loader = loader
        return {"loss": 1.0, "acc1": 50.0, "acc5": 50.0, "topk": 5, "count": 8}


@pytest.fixture
def hub(monkeypatch) -> timm.models.ResNet:
    """Return a model whose weights a stand-in of the hub has."""
    published = timm.create_model(NET).eval()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: published.state_dict())
    return published


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("", {}),
        ("--mean 0.1 0.2 0.3", {"mean": (0.1, 0.2, 0.3)}),
        ("--std 0.1 0.2 0.3 --eval-crop-ratio 0.8", {"std": (0.1, 0.2, 0.3), "crop_pct": 0.8}),
        ("--input-size 64", {"input_size": (3, 64, 64)}),
        ("--crop squash", {"crop_pct": 1.0, "crop_mode": "squash"}),
    ],
)
def test_timms_weights_are_evaluated_as_timm_does(flags, changes, hub, data, monkeypatch):
    seen = Evaluation()
    monkeypatch.setattr(engine, "evaluate", seen)
    words = f"--eval --pretrained --model {NET} --transform timm {flags} {FLAGS} {data}"
    assert main.main(words.split()) == 0
    # timm's own resolution of how images are prepared
    cfg = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(NET).to_dict()) | changes
    assert cfg["interpolation"] == "bilinear" and ("mean" in changes or cfg["mean"] == (0.5, 0.5, 0.5))
    path = seen.loader.dataset.files[1]
    expected = create_transform(**cfg)(Image.open(path).convert("RGB"))
    image, _ = seen.loader.dataset[1]
    assert torch.equal(image, expected)
    with torch.no_grad():
        torch.testing.assert_close(seen.model(image[None]), hub(expected[None]), rtol=1e-3, atol=1e-4)


def test_training_starts_from_timms_weights_and_the_checkpoint_knows_how_to_evaluate(hub, data, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train_one_epoch", lambda *_, **__: {"train_loss": 1.0, "train_lr": 1.0})
    out = f"--output_dir {tmp_path}/out --input-size 64"
    assert main.main(f"--pretrained --model {NET} {out} {FLAGS} {data}".split()) == 0
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    for name, tensor in hub.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(saved["model"][name], tensor), name
    assert saved["model"]["fc.weight"].shape[0] == 2
    # an evaluation does not ask the hub
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", None)
    seen = Evaluation()
    monkeypatch.setattr(engine, "evaluate", seen)
    words = f"--eval --resume {tmp_path}/out/checkpoint.pth --transform timm --device cpu --num_workers 0"
    assert main.main(words.split()) == 0
    cfg = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(NET).to_dict()) | {"input_size": (3, 64, 64)}
    expected = create_transform(**cfg)(Image.open(seen.loader.dataset.files[0]).convert("RGB"))
    assert torch.equal(seen.loader.dataset[0][0], expected)
    # and an exported folder says it
    assert export.main(["--checkpoint", f"{tmp_path}/out/checkpoint.pth", "--out", f"{tmp_path}/exported"]) == 0
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (exported["interpolation"], exported["crop_pct"]) == ("bilinear", 0.95)


def test_a_failed_download_is_one_line(data, monkeypatch, capfd):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", refuse)
    assert main.main(f"--eval --pretrained --model {NET} {FLAGS} {data}".split()) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--pretrained" in error and NET in error and "no network" in error


# a stand-in of the hub that writes down which process asks
HUB = """
import os, time
import engine, timm
from timm.models import _builder

# its speed need not be steady
engine.STEADY = 100.0

def load(*_, **__):
    for word in ("begins", "ends"):
        with open("loads.txt", "a") as file:
            file.write(f"{os.environ['RANK']} {word}\\n")
        time.sleep(0.2)
    return timm.create_model("test_resnet").state_dict()

_builder.load_state_dict_from_hf = load
"""


def test_rank_0_downloads_before_the_others_and_measures_speed_alone(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hub.py").write_text(HUB)
    words = f"--import hub.py --pretrained --model {NET} --test_speed --speed-batch-size 2 --input-size 32"
    status, _, error = torchrun(2, *f"{words} {FLAGS} {data}".split())
    assert status == 0, error
    # for its speed, and for the run
    assert Path("loads.txt").read_text().split("\n")[:-1] == ["0 begins", "0 ends"] * 2 + ["1 begins", "1 ends"]
