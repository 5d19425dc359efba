"""--log-wandb, offline, and --save-images: what they write, and that training stays as it is without them."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from matplotlib.axes import Axes
from PIL import Image
from test_reorganisation import read_scalars
from test_resume import differences
from timm.data import Mixup
from wandb.proto.wandb_internal_pb2 import Record

import engine
import main
from util import distributed
from util.config import ModelConfig
from util.log import RunLog


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> None:
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def read_records(path: Path) -> list[Record]:
    """Read the file of an offline run, in LevelDB's format: after 7 bytes blocks of 32 KiB with parts of records."""
    data = path.read_bytes()
    records = []
    record = b""
    at = 7
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record += data[at + 7 : at + 7 + length]
        # a whole record, or its last part
        if data[at + 6] in (1, 4):
            records.append(Record.FromString(record))
            record = b""
        at += 7 + length
    return records


def read_history(records: list[Record]) -> list[dict]:
    """Return what was logged, without wandb's own keys."""
    lines = []
    for record in records:
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if items:
            lines.append({name: value for name, value in items.items() if not name.startswith("_")})
    return lines


def test_a_stopped_run_goes_on_as_the_same_run_of_wandb(quick_flags, tmp_path, monkeypatch):
    flags = [*quick_flags, "--log-wandb", "digits", "--output_dir", str(tmp_path / "out"), "--resume", "auto"]
    train = engine.train_one_epoch

    def stop_in_the_second(model, criterion, loader, precision, state, **kwargs):
        if state.epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(model, criterion, loader, precision, state, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_one_epoch", stop_in_the_second)
        assert main.main(flags) == 75
    stopped = torch.load(tmp_path / "out" / "checkpoint.pth")
    assert (stopped["epoch"], stopped["position"]["update"]) == (0, 1)
    (first,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*-{stopped['wandb_id']}")
    # wandb names folders by the second
    time.sleep(1.1)
    assert main.main(flags) == 0
    (second,) = {*(tmp_path / "out" / "wandb").glob("offline-run-*")} - {first}
    assert second.name.endswith(f"-{stopped['wandb_id']}")

    # its service writes after finish() has returned, and ends when it has written all
    wandb.teardown()
    # what both wrote is what is in the files of the run
    records = [read_records(next(folder.glob("*.wandb"))) for folder in (first, second)]
    runs = [record.run for part in records for record in part if record.HasField("run")]
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    for run in runs:
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        assert (run.project, run.run_id) == ("digits", stopped["wandb_id"])
        assert {name: value for name, value in config.items() if not name.startswith("_")} == args
    history = [line for part in records for line in read_history(part)]
    epochs = [line for line in history if "epoch" in line]
    assert epochs == [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    for name in ("loss", "lr"):
        logged = [(line["update"], line[name]) for line in history if "update" in line]
        assert len(logged) == 36
        assert np.allclose(logged, read_scalars(tmp_path / "out", name), rtol=1e-6)


def test_training_is_bit_for_bit_the_same_without_them(quick_flags, tmp_path):
    # the second batch of the first update is mixed after the first one is drawn
    flags = [*quick_flags, "--epochs", "1", "--accum-steps", "2", "--output_dir"]
    assert main.main([*flags, str(tmp_path / "one")]) == 0
    assert main.main([*flags, str(tmp_path / "two"), "--log-wandb", "p", "--save-images"]) == 0
    saved = [torch.load(tmp_path / name / "checkpoint.pth") for name in ("one", "two")]
    assert len(saved[0]["args"].pop("given")) + 2 == len(saved[1]["args"].pop("given"))
    found = differences(*saved)
    assert {line.split(":")[0] for line in found} == {
        "/args/log_wandb",
        "/args/save_images",
        "/args/output_dir",
        "/wandb_id",
    }


def test_without_the_flag_or_elsewhere_than_on_rank_0_wandb_is_not_imported(tiny_flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "one")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "is_primary", lambda: False)
        assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "two"), "--log-wandb", "p"]) == 0
    capfd.readouterr()
    assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "three"), "--log-wandb", "p"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "pip install -r requirements-extra.txt" in error


def test_what_wandb_refuses_is_one_line_before_training(tiny_flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(engine, "train_one_epoch", None)
    assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "out"), "--log-wandb", "a/b"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--log-wandb a/b: " in error and "WANDB_MODE=offline" in error


def test_a_run_outlives_the_process_of_wandb(tiny_flags, tmp_path, monkeypatch, capsys):
    def lose(*args, **kwargs):
        raise ConnectionResetError("Connection lost")

    for name in ("log", "finish"):
        monkeypatch.setattr(wandb.Run, name, lose)
    assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "out"), "--log-wandb", "p"]) == 0
    assert capsys.readouterr().out.count("--log-wandb: Connection lost") == 1
    assert torch.load(tmp_path / "out" / "checkpoint.pth")["epoch"] == 0
    # it may be lost after the last number, too
    with RunLog(tmp_path / "out") as run_log:
        run_log.start({}, 0, 0)
        run_log.start_wandb("p", None)


@pytest.mark.parametrize("mixup", ["0.8", "0"])
def test_the_sheet_shows_the_batch_as_the_model_sees_it(mixup, tree, tiny_flags, tmp_path, monkeypatch):
    """Pixels after all augmentation, and labels with the weights that mixup drew."""
    drawn, titles, seen, labels, weights = [], [], [], [], []

    def record(name, found):
        plain = getattr(Axes, name)

        def call(axes, value, *args, **kwargs):
            found.append(value)
            return plain(axes, value, *args, **kwargs)

        monkeypatch.setattr(Axes, name, call)

    # curves.png has titles too
    record("imshow", drawn)
    record("set_title", titles)
    beta, mix, backward = np.random.beta, Mixup.__call__, engine.backward

    def draw_weight(*args):
        weights.append(beta(*args))
        return weights[-1]

    def watch(self, images, targets):
        labels.append(targets.tolist())
        return mix(self, images, targets)

    def see(model, criterion, images, *args):
        seen.append(images.clone())
        return backward(model, criterion, images, *args)

    monkeypatch.setattr(np.random, "beta", draw_weight)
    monkeypatch.setattr(Mixup, "__call__", watch)
    monkeypatch.setattr(engine, "backward", see)
    words = ["--data-set", "FOLDER", "--data-path", str(tree(["a$x", "b", "c$"], count=16)), "--batch-size", "40"]
    words += ["--mixup", mixup, "--cutmix", "0", "--reprob", "1", "--aa", "rand-m9", "--mean", "0.3", "0.4", "0.5"]
    assert main.main([*tiny_flags, *words, "--save-images", "--output_dir", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "train_images.png") as image:
        assert image.format == "PNG"

    assert len(drawn) == 32
    std, mean = torch.tensor(ModelConfig.std), torch.tensor([0.3, 0.4, 0.5])
    pixels = 255 * (seen[0].permute(0, 2, 3, 1) * std + mean)  # B, H, W, 3
    assert np.array_equal(np.stack(drawn), pixels.round().clamp(0, 255).byte()[:32].numpy())
    texts = [text for text in titles if text.split()[-1].endswith("%")]
    assert len(texts) == 32
    if mixup == "0":
        assert set(texts) == {"a$x 100%", "b 100%", "c$ 100%"}
        return
    names = [["a$x", "b", "c$"][label] for label in labels[0]]
    for text, one, other in zip(texts, names, reversed(names), strict=False):
        expected = {one: 1.0} if one == other else {one: weights[0], other: 1 - weights[0]}
        shown = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1][:-1]) / 100 for line in text.split("\n")}
        assert shown == pytest.approx(expected, abs=0.0051)
