"""Checkpoints and resumption: a killed run goes on as if nothing had happened; an interrupted save harms nothing."""

import argparse
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import builders
import main
from util import checkpoint
from util.errors import InputError

ROOT = Path(main.__file__).parent
TIMES = {"images_per_s", "data_wait", "epoch_seconds"}


def run(*flags: str) -> None:
    assert main.main(list(flags)) == 0


@pytest.fixture(scope="module")
def quick_flags(tree) -> list[str]:
    """Flags of a run whose epochs take a fraction of a second: 48 photographs' crops in two classes, at 32 pixels."""
    flags = (
        "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --device cpu --num_workers 0"
    )
    root = tree(count=24, side=32)
    return [
        *flags.split(),
        "--data-set",
        "FOLDER",
        "--data-path",
        str(root),
        "--batch-size",
        "8",
        "--warmup-epochs",
        "0",
    ]


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differences(a, b, path="") -> list[str]:
    """List the places in which two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert list(a) == list(b), path
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} {b}"]


def test_a_killed_run_resumes_to_the_very_weights_ema_best_rates_and_log(quick_flags, tmp_path):
    """Drop path, mixup, cutmix, RandAugment, erasing and repeated augmentation all draw; the kill comes in epoch 2."""
    flags = [*quick_flags, "--epochs", "4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*flags, "--output_dir", str(whole))
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--output_dir", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.time() + 120
        while not (broken / "checkpoint_0001.pth").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(*flags, "--output_dir", str(broken), "--resume", "auto")
    one, two = (torch.load(folder / "checkpoint.pth") for folder in (whole, broken))
    one["args"] = two["args"] = None
    assert differences(one, two) == []
    one, two = (torch.load(folder / "best_checkpoint.pth") for folder in (whole, broken))
    assert one["epoch"] == two["epoch"] and differences(one["model"], two["model"]) == []
    assert log_of(whole) == log_of(broken) and len(log_of(whole)) == 4


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_step_it_came_in(quick_flags, tmp_path, name):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "main.py"), *quick_flags, "--epochs", "500", "--output_dir", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # what a shell starts in the background inherits that SIGINT is ignored, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.time() + 120
        while not (out / "checkpoint_0002.pth").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
        for _ in range(3):  # launchers and terminals send them more than once
            process.send_signal(signal.Signals[name])
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75
    assert re.fullmatch(
        rf"main.py: stopped by {name} (in epoch \d+ after update \d+ of 18|in the evaluation of epoch \d+|after epoch "
        r"\d+); it is saved, and the same command with --resume auto goes on there\n",
        error,
    )
    saved = checkpoint.load(out / "checkpoint.pth")
    assert saved["epoch"] >= 2 and (saved["position"] is None) == ("after epoch" in error)


def test_changed_flags_take_effect_on_resume_and_are_said(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    run(*quick_flags, "--epochs", "2", "--output_dir", str(out))
    capsys.readouterr()
    changed = ["--epochs", "3", "--lr", "3e-3", "--sched", "constant", "--weight-decay", "0.1", "--unscale-lr"]
    run(*quick_flags, *changed, "--output_dir", str(out), "--resume", str(out / "checkpoint.pth"))
    text = capsys.readouterr().out
    for said in (
        "--epochs was 2 and is 3",
        "--lr was 0.0005 and is 0.003",
        "--sched was cosine and is constant",
        "--weight_decay was 0.05 and is 0.1",
    ):
        assert said in text, said
    assert [line["epoch"] for line in log_of(out)] == [0, 1, 2]
    assert log_of(out)[2]["train_lr"] == 3e-3
    groups = torch.load(out / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1]


def test_a_finished_run_says_so_and_stays_as_it_is(tiny_run, tiny_flags, capsys):
    before = {p: p.read_bytes() for p in tiny_run.iterdir() if p.is_file()}
    run(*tiny_flags, "--output_dir", str(tiny_run), "--resume", "auto")
    assert "this run is finished (1 epochs of 1)" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in tiny_run.iterdir() if p.is_file()} == before


def test_auto_starts_afresh_in_an_empty_folder_and_passes_over_a_damaged_file(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    run(*quick_flags, "--epochs", "2", "--output_dir", str(out), "--resume", "auto")
    assert "starting afresh" in capsys.readouterr().out
    newest = out / "checkpoint_0001.pth"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)  # the very file that checkpoint.pth is another name of
    run(*quick_flags, "--epochs", "2", "--output_dir", str(out), "--resume", "auto")
    text = capsys.readouterr().out
    assert f"passed over {newest}: damaged" in text and "checkpoint_0000.pth" in text
    assert [line["epoch"] for line in log_of(out)] == [0, 1]
    assert torch.load(newest)["epoch"] == 1


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "main.py"), *quick_flags, "--epochs", "500", "--output_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.time() + 120
        while not (out / "checkpoint_0000.pth").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
        assert main.main([*quick_flags, "--output_dir", str(out), "--resume", "auto"]) == 2
        assert "another run is writing there now; name another folder" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    again = checkpoint.load(out / "checkpoint.pth")["epoch"] + 2  # the lock went with the process
    run(*quick_flags, "--epochs", str(again), "--output_dir", str(out), "--resume", "auto")
    assert [line["epoch"] for line in log_of(out)] == list(range(again))


def test_an_unreadable_validation_image_costs_the_evaluation_not_the_epoch(tree, quick_flags, tmp_path, capsys):
    root, out = tree(count=12, side=32), tmp_path / "out"
    bad = root / "val" / "bee" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    flags = [*quick_flags, "--data-path", str(root), "--output_dir", str(out), "--epochs", "2", "--resume", "auto"]
    assert main.main(flags) == 2
    assert "3.png: not a readable image" in capsys.readouterr().err
    saved = checkpoint.load(out / "checkpoint.pth")
    assert (saved["epoch"], saved["position"]["update"]) == (-1, saved["position"]["conditions"]["updates"])
    assert main.main(flags) == 2  # nothing is trained again
    assert "3.png: not a readable image" in capsys.readouterr().err
    bad.write_bytes(whole)
    run(*flags)
    assert [line["epoch"] for line in log_of(out)] == [0, 1] and all("test_acc1" in line for line in log_of(out))


def test_auto_takes_the_best_checkpoint_when_no_other_can_be_read(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    run(*quick_flags, "--epochs", "2", "--output_dir", str(out))
    best = torch.load(out / "best_checkpoint.pth")
    (out / "best_checkpoint.pth").unlink()
    torch.save(best, out / "best_checkpoint.pth")
    for path in out.glob("checkpoint*.pth"):
        path.write_bytes(b"PK\x03\x04")
    run(*quick_flags, "--epochs", "3", "--output_dir", str(out), "--resume", "auto")
    assert f"--resume auto: {out / 'best_checkpoint.pth'}" in capsys.readouterr().out
    assert torch.load(out / "checkpoint.pth")["epoch"] == 2


def test_the_closing_lines_name_each_bests_own_epoch(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    run(*quick_flags, "--epochs", "4", "--lr", "1e-2", "--model-ema-decay", "0.8", "--output_dir", str(out))
    lines = log_of(out)
    text = capsys.readouterr().out
    for key, words in (("test_acc1", "Best accuracy"), ("test_ema_acc1", "Best EMA accuracy")):
        best = max(range(4), key=lambda e: lines[e][key])
        assert f"{words} {lines[best][key]:.2f}% (epoch {best})" in text


def test_all_damaged_is_an_error_and_loses_nothing(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pth").write_bytes(b"PK\x03\x04 and no more")
    assert main.main([*quick_flags, "--output_dir", str(out), "--resume", "auto"]) == 2
    assert "none of the 1 checkpoints" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["checkpoint.pth"]


def test_a_line_cut_short_by_a_crash_leaves_the_log(quick_flags, tmp_path):
    out = tmp_path / "out"
    run(*quick_flags, "--epochs", "1", "--output_dir", str(out))
    with open(out / "log.txt", "a") as f:
        f.write('{"train_lr": 1e-06, "epo')
    run(*quick_flags, "--epochs", "2", "--output_dir", str(out), "--resume", "auto")
    assert [line["epoch"] for line in log_of(out)] == [0, 1]


def test_resuming_from_an_earlier_epoch_drops_the_later_ones_from_log_and_folder(quick_flags, tmp_path):
    out = tmp_path / "out"
    flags = [*quick_flags, "--epochs", "3", "--keep-checkpoints", "3", "--output_dir", str(out)]
    run(*flags)
    assert sorted(p.name for p in out.glob("*.pth")) == [
        "best_checkpoint.pth",
        "checkpoint.pth",
        *(f"checkpoint_000{i}.pth" for i in range(3)),
    ]
    run(*flags[:-2], "--output_dir", str(out), "--epochs", "2", "--resume", str(out / "checkpoint_0000.pth"))
    assert not (out / "checkpoint_0002.pth").exists() and [line["epoch"] for line in log_of(out)] == [0, 1]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_checkpoints_are_kept_as_asked(tmp_path, keep):
    for epoch in range(5):
        checkpoint.save({"epoch": epoch, "model": {}}, tmp_path, keep, best=epoch == 1)
    numbered = [f"checkpoint_{e:04d}.pth" for e in range(5 - keep, 5)] if keep > 1 else []
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best_checkpoint.pth", "checkpoint.pth", *numbered]
    assert torch.load(tmp_path / "checkpoint.pth")["epoch"] == 4
    assert torch.load(tmp_path / "best_checkpoint.pth")["epoch"] == 1
    assert [torch.load(tmp_path / n)["epoch"] for n in numbered] == list(range(5 - keep, 5)) * (keep > 1)


@pytest.mark.parametrize("moment", ["write", "link", "rename"])
def test_an_interrupted_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, moment):
    checkpoint.save({"epoch": 0, "model": {"w": torch.ones(9)}}, tmp_path, 2, best=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        if moment == "write":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    target = {"write": (torch, "save"), "link": (checkpoint, "_publish"), "rename": (os, "replace")}[moment]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError):
        checkpoint.save({"epoch": 1, "model": {"w": torch.zeros(9)}}, tmp_path, 2, best=True)
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert after == before
    checkpoint.save({"epoch": 1, "model": {"w": torch.zeros(9)}}, tmp_path, 2, best=True)
    assert checkpoint.load(tmp_path / "checkpoint.pth")["epoch"] == 1 and not list(tmp_path.glob(".*"))


def test_saving_works_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    for epoch in range(3):
        checkpoint.save({"epoch": epoch, "model": {}}, tmp_path, 2, best=True)
    names = {p.name: torch.load(p)["epoch"] for p in tmp_path.iterdir()}
    assert names == {"best_checkpoint.pth": 2, "checkpoint.pth": 2, "checkpoint_0001.pth": 1, "checkpoint_0002.pth": 2}


def test_any_flipped_bit_in_the_tensors_is_noticed(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"model": {"w": torch.arange(4096.0)}}, path)
    whole = path.read_bytes()
    start = whole.index(torch.arange(4096.0).numpy().tobytes()[:64])
    for at in np.random.RandomState(0).randint(start, start + 4 * 4096, size=20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        torch.load(path)  # torch itself is silent
        with pytest.raises(InputError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert torch.equal(checkpoint.load(path)["model"]["w"], torch.arange(4096.0))


def published(tiny_run: Path, path: Path, **extra) -> Path:
    """Write a checkpoint as the published scripts do: a namespace with paths and NumPy numbers, wrapped names."""
    ours = torch.load(tiny_run / "checkpoint.pth")
    args = argparse.Namespace(**ours["args"])
    args.output_dir, args.lr, args.epochs = pathlib.Path("/home/someone/out"), np.float64(5e-4), np.int64(1)
    content = {k: ours[k] for k in ("optimizer", "lr_scheduler", "epoch", "scaler")} | {"args": args} | extra
    content["model"] = {f"module.{k}": v for k, v in ours["model"].items()}
    content["model_ema"] = {f"module.{k}": v for k, v in ours["model_ema"].items()}
    torch.save(content, path)
    return path


def test_published_checkpoints_evaluate_and_resume(tiny_run, tiny_flags, tmp_path, capsys):
    path = published(tiny_run, tmp_path / "old.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    expected = log_of(tiny_run)[0]
    run(*tiny_flags, "--eval", "--resume", str(path))
    assert f"* Acc@1 {expected['test_acc1']:.3f} Acc@5 {expected['test_acc5']:.3f} " in capsys.readouterr().out
    run(*tiny_flags, "--eval", "--resume", str(path), "--use-ema")
    text = capsys.readouterr().out
    assert f"* Acc@1 {expected['test_ema_acc1']:.3f} " in text and "EMA weights" in text
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    run(*tiny_flags, "--epochs", "2", "--resume", str(path), "--output_dir", str(theirs))
    run(*tiny_flags, "--epochs", "2", "--resume", str(tiny_run / "checkpoint.pth"), "--output_dir", str(ours))
    one, two = (torch.load(folder / "checkpoint.pth") for folder in (theirs, ours))
    assert differences(one["model"], two["model"]) == [] and differences(one["optimizer"], two["optimizer"]) == []
    assert differences(one["model_ema"], two["model_ema"]) == []


def test_nothing_beyond_the_allowed_types_is_unpickled(tmp_path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "hostile.pth"
    torch.save({"model": {"w": torch.ones(1)}, "args": Hostile()}, path)
    with pytest.raises(InputError, match=r"refused, it holds \w+\.system"):
        checkpoint.load(path)
    assert not marker.exists()


def test_other_shapes_of_checkpoint_are_understood(tmp_path):
    weights = {"a.weight": torch.ones(2)}
    for name, content in {
        "bare": weights,
        "state_dict": {"state_dict": weights},
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}},
        "both": {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
    }.items():
        torch.save(content, tmp_path / name)
        found = checkpoint.strip_prefixes(checkpoint.load(tmp_path / name)["model"])
        assert list(found) == ["a.weight"], name
    torch.save(weights, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.load(tmp_path / "legacy")["model"]["a.weight"], torch.ones(2))


def test_a_checkpoint_without_ema_starts_the_average_from_its_weights(tiny_run, tiny_flags, tmp_path, capsys):
    content = torch.load(tiny_run / "checkpoint.pth") | {"model_ema": None}
    torch.save(content, tmp_path / "c.pth")
    run(
        *tiny_flags,
        "--epochs",
        "2",
        "--resume",
        str(tmp_path / "c.pth"),
        "--model-ema-decay",
        "1",
        "--output_dir",
        str(tmp_path / "o"),
    )
    assert "no EMA in it; the average starts from the loaded weights" in capsys.readouterr().out
    average = torch.load(tmp_path / "o" / "checkpoint.pth")["model_ema"]
    assert torch.equal(average["head.weight"], content["model"]["head.weight"])


def test_an_ema_that_does_not_fit_is_an_error(tiny_run, tiny_flags, tmp_path, capsys):
    content = torch.load(tiny_run / "checkpoint.pth")
    content["model_ema"].pop("head.weight")
    torch.save(content, tmp_path / "c.pth")
    assert main.main([*tiny_flags, "--epochs", "2", "--resume", str(tmp_path / "c.pth")]) == 2
    assert "EMA weights do not fit the model: 1 tensors are missing, first head.weight" in capsys.readouterr().err


def test_the_optimizer_of_a_published_checkpoint_goes_by_index():
    """Group 0 without decay and group 1 with it, parameters in the published order."""
    model = timm.create_model("dhvt_tiny_cifar_patch4", depth=1, num_classes=10)
    names = {id(p): n for n, p in model.named_parameters()}
    args = argparse.Namespace(
        batch_size=64, accum_steps=1, lr=1e-3, unscale_lr=True, opt="adamw", weight_decay=0.05, momentum=0.9,
        opt_eps=1e-8, opt_betas=None, sched="cosine", epochs=3, decay_epochs=30, decay_rate=0.1, min_lr=0.0,
        warmup_lr=0.0, warmup_epochs=0, lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, seed=0, layer_decay=None,
    )  # fmt: skip
    optimizer, _, _ = builders.build_optimization(args, model, torch.device("cpu"))
    plain, decayed = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    expected = [n for n, p in model.named_parameters() if p.ndim >= 2 and n != "cls_token"]
    assert decayed == expected and "blocks.0.attn.pos_embed" in expected and "patch_embed.pre_affine.alpha" in expected
    assert plain == [n for n, _ in model.named_parameters() if n not in expected]
