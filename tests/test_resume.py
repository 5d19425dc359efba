"""Checkpoints and resumption: what is saved and kept, which file is resumed, and what a file may hold.

test_survival.py kills runs and shows that they resume to the same end.
"""

import argparse
import copy
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import read_events, read_scalars
from tensorboardX.proto.event_pb2 import SessionLog
from test_training import run_state
from torch import nn

import engine
import main
from util import checkpoint, log, optim, weights
from util.checkpoint import save_checkpoint
from util.errors import InputError, NonFiniteLossError
from util.log import RunLog
from util.stop_signal import SAVE, STOP, StopSignal

TIMES = {"images_per_s", "data_wait", "epoch_seconds"}
GOLDEN = Path(__file__).parent / "golden" / "checkpoint_6d7e635.pth"


def run(*flags: str) -> None:
    assert main.main(list(flags)) == 0


def log_of(folder: Path) -> list[dict]:
    """Return the lines of log.txt without times."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differences(a, b, path="") -> list[str]:
    """Return the places in which two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert list(a) == list(b), path
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} {b}"]


# which run is resumed


def test_changed_flags_take_effect_on_resume_and_are_said(quick_run, quick_flags, tmp_path, capsys):
    changed = ["--lr", "3e-3", "--sched", "constant", "--weight-decay", "0.1", "--unscale-lr", "--amp", "bf16"]
    run(*quick_flags, *changed, "--output_dir", str(tmp_path), "--resume", str(quick_run / "checkpoint.pth"))
    text = capsys.readouterr().out
    for part in ("--lr was 0.0005 and is 0.003", "--sched was 'cosine' and is constant", "--amp was 'off' and is bf16"):
        assert part in text, part
    (line,) = log_of(tmp_path)
    assert (line["epoch"], line["train_lr"]) == (1, 3e-3)
    groups = torch.load(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]


def test_another_optimizer_starts_its_state_anew(quick_run, quick_flags, capsys):
    run(*quick_flags, "--opt", "rmsprop", "--resume", str(quick_run / "checkpoint.pth"))
    assert "--opt was adamw; rmsprop starts without its state" in capsys.readouterr().out


def test_arguments_that_need_other_moments_start_the_state_anew(quick_run, quick_flags, tmp_path):
    """AMSGrad needs one that the checkpoint lacks."""
    words = ["--opt-kwargs", "amsgrad=true", "--output_dir", str(tmp_path)]
    run(*quick_flags, *words, "--resume", str(quick_run / "checkpoint.pth"))
    before, now = (torch.load(folder / "checkpoint.pth")["optimizer"]["state"] for folder in (quick_run, tmp_path))
    # of one epoch each, where a continued state has counted two
    assert "max_exp_avg_sq" in now[0] and now[0]["step"] == before[0]["step"]


def test_the_order_of_an_optimizers_arguments_is_of_no_account(quick_flags, tmp_path):
    words = ["amsgrad=true", "capturable=false"]
    run(*quick_flags, "--epochs", "1", "--opt-kwargs", *words, "--output_dir", str(tmp_path))
    first = torch.load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"]
    words.reverse()
    run(*quick_flags, "--epochs", "2", "--opt-kwargs", *words, "--output_dir", str(tmp_path), "--resume", "auto")
    assert torch.load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 2 * first


def make_updates(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()


# kron is compiled, which takes half a minute; the others need a GPU, or are refused
OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith("kron") else name
    for name in [*timm.optim.list_optimizers(), "lookahead_adamw"]
    if not name.startswith(("bnb", "fused", "adahessian"))
]


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_every_optimizer_continues_as_if_it_had_not_been_stopped(opt, tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    copied = copy.deepcopy(model)
    how = {"opt": opt, "lr": 0.01, "weight_decay": 0.05, "momentum": 0.9}
    optimizer, fresh = (optim.build_optimizer(m, torch.device("cpu"), **how) for m in (model, copied))
    # lookahead counts to six, twice
    make_updates(model, optimizer, 7)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pth")
    saved = weights.load(tmp_path / "c.pth")
    copied.load_state_dict(saved["model"])
    checkpoint.load_optimizer(fresh, saved["optimizer"], "a file")
    # kron's random state too, which few updates use
    assert differences(fresh.state_dict(), optimizer.state_dict()) == []
    for network, its_optimizer in ((model, optimizer), (copied, fresh)):
        torch.manual_seed(1)
        make_updates(network, its_optimizer, 7)
    assert differences(copied.state_dict(), model.state_dict()) == []


def test_moments_take_the_memory_format_that_their_weights_have_now():
    """The fused kernels read both in the order of memory: after --channels-last was changed they would not fit."""
    weights = [torch.randn(4, 3, 3, 3).to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]
    before, after = (torch.optim.AdamW([weight.requires_grad_()], fused=True) for weight in weights)
    weights[0].grad = torch.randn_like(weights[0])
    before.step()
    checkpoint.load_optimizer(after, before.state_dict(), "a file")
    loaded = after.state[weights[1]]["exp_avg"]
    assert torch.equal(loaded, before.state[weights[0]]["exp_avg"])
    assert loaded.stride() == weights[1].stride() != weights[0].stride()


def test_a_finished_run_says_so_and_stays_as_it_is(tiny_run, tiny_flags, capsys):
    before = {p: p.read_bytes() for p in tiny_run.iterdir() if p.is_file()}
    run(*tiny_flags, "--output_dir", str(tiny_run), "--resume", "auto")
    assert "this run is finished (1 epochs of 1)" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in tiny_run.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("launcher", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_run_that_its_launcher_starts_again_goes_on_from_its_own_checkpoint(
    quick_run, quick_flags, tmp_path, monkeypatch, launcher
):
    flags = [*quick_flags, "--epochs", "3", "--resume", str(quick_run / "checkpoint.pth"), "--output_dir"]
    out = str(tmp_path / "out")
    # nothing is saved yet: the file counts, in a second start too
    monkeypatch.setenv(launcher, "1")
    run(*flags, out)
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == [1, 2]
    before = (tmp_path / "out" / "checkpoint.pth").read_bytes()
    run(*flags, out)
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == before
    monkeypatch.delenv(launcher)
    assert main.main([*flags, out]) == 2


def test_auto_skips_what_cannot_be_read_down_to_the_best_checkpoints(tmp_path, capsys):
    folder = str(tmp_path)
    assert checkpoint.resolve_resume("auto", folder) == ""
    best = [tmp_path / "best_checkpoint.pth", tmp_path / "best_ema_checkpoint.pth"]
    # without numbered files too, the last epoch goes before the best one
    for epoch, names in enumerate((["best_ema_checkpoint.pth"], ["best_checkpoint.pth"], [])):
        save_checkpoint(content(epoch), tmp_path, 1, names)
    assert checkpoint.resolve_resume("auto", folder) == str(tmp_path / "checkpoint.pth")
    for epoch in range(3):
        save_checkpoint(content(epoch), tmp_path, 2)
    # the newest epoch's file has two names, which are damaged together
    newest = tmp_path / "checkpoint_0002.pth"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    assert checkpoint.resolve_resume("auto", folder) == str(tmp_path / "checkpoint_0001.pth")
    assert f"skipped {newest}: damaged" in capsys.readouterr().out
    for path in tmp_path.glob("checkpoint*.pth"):
        path.write_bytes(b"PK\x03\x04")
    for path in best:
        assert checkpoint.resolve_resume("auto", folder) == str(path)
        path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match="none of the 5 checkpoints"):
        checkpoint.resolve_resume("auto", folder)


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(quick_flags, tmp_path, capsys):
    flags = [*quick_flags, "--epochs", "1", "--output_dir", str(tmp_path), "--resume", "auto"]
    first = RunLog(tmp_path)
    first.start({}, 0, 0)
    assert main.main(flags) == 2
    assert "another run is writing there now; name another folder" in capsys.readouterr().err
    # what it forked, a loader's worker, may outlive it by seconds
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        os.write(started, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        first.close()
        second = RunLog(tmp_path)
        second.start({}, 0, 0)
        second.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_unreadable_validation_image_costs_the_evaluation_not_the_epoch(tree, quick_flags, tmp_path, capsys):
    root = tree(count=12, side=32)
    bad = root / "val" / "bee" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    out = tmp_path / "out"
    flags = [*quick_flags, "--epochs", "1", "--data-path", str(root), "--output_dir", str(out), "--resume", "auto"]
    for _ in range(2):  # the second time nothing is trained
        assert main.main(flags) == 2
        assert f"{bad}: not a readable image" in capsys.readouterr().err
        saved = torch.load(out / "checkpoint.pth")
        assert saved["epoch"] == -1
        assert saved["position"]["update"] == saved["position"]["conditions"]["updates"]
    bad.write_bytes(whole)
    run(*flags)
    (line,) = log_of(out)
    assert line["epoch"] == 0 and "test_acc1" in line


# what is kept


def test_later_epochs_and_a_log_that_a_crash_cut_short_are_dropped(quick_run, quick_flags, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(quick_run, out)
    shutil.copy(out / "checkpoint.pth", out / "checkpoint_0002.pth")
    with open(out / "log.txt", "ab") as file:
        file.write(b'{"epoch": 1}\n{"epoch": 2}\n5\n\xff\x00\x00\n{"train_lr": 1e-06, "epo')
    run(*quick_flags, "--output_dir", str(out), "--resume", str(out / "checkpoint.pth"))
    lines = log_of(out)
    assert [line["epoch"] for line in lines] == [0, 1] and "train_loss" in lines[1]
    assert not (out / "checkpoint_0002.pth").exists()
    # TensorBoard hides what is repeated: the second epoch's updates begin with the first one's number of updates
    starts = [event.step for event in read_events(out) if event.session_log.status == SessionLog.START]
    assert starts == [0, max(step for step, _ in read_scalars(quick_run, "loss")) + 1]


def test_raw_and_ema_weights_have_a_best_epoch_each(capsys):
    state = run_state()
    found = [
        state.finish_epoch({"test_acc1": raw, "test_ema_acc1": ema})
        for raw, ema in ((20.0, 10.0), (30.0, 5.0), (30.0, 15.0), (25.0, 12.0))
    ]
    raw, ema = "best_checkpoint.pth", "best_ema_checkpoint.pth"
    assert found == [[raw, ema], [raw], [ema], []]
    log.print_best(state)
    text = capsys.readouterr().out
    assert "30.00% (epoch 1)" in text and "15.00% (epoch 2)" in text


def test_a_line_of_the_log_is_of_its_own_epoch(quick_flags, tmp_path, monkeypatch):
    """The mean loss of its updates, and its time, on a clock that each update moves by 1000 seconds."""
    now, step = time.perf_counter, torch.optim.AdamW.step
    updates = 0

    def slow(*args, **kwargs):
        nonlocal updates
        updates += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1000 * updates)
    run(*quick_flags, "--no-repeated-aug", "--no-model-ema", "--lr", "1e-2", "--output_dir", str(tmp_path))
    losses = [loss for _, loss in read_scalars(tmp_path, "loss")]
    assert len(losses) == updates
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    for line, of_epoch in zip(lines, (losses[: updates // 2], losses[updates // 2 :]), strict=True):
        assert line["train_loss"] == pytest.approx(statistics.fmean(of_epoch), rel=1e-6)
        assert line["epoch_seconds"] == pytest.approx(1000 * len(of_epoch), abs=500)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_counted(loss):
    state = run_state()
    assert engine.read_losses([torch.tensor(2.0)], state) == state.losses == [2.0]
    with pytest.raises(NonFiniteLossError):
        engine.read_losses([torch.tensor(1.0), torch.tensor(loss)], state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved_within_an_epoch(tmp_path, value):
    state = run_state("--keep-checkpoints", "1")
    state.folder, state.update = tmp_path, 1
    path = tmp_path / "checkpoint.pth"
    engine.save_on_request(SAVE, state, StopSignal())
    before = path.read_bytes()
    state.model.weight.data[0, 1] = value
    for request in (SAVE, STOP):
        with pytest.raises(NonFiniteLossError):
            engine.save_on_request(request, state, StopSignal())
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def content(epoch: int, update: int = 0) -> dict:
    return {"epoch": epoch, "position": {"update": update} if update else None, "model": {"w": torch.ones(9) * epoch}}


@pytest.mark.parametrize("keep", [1, 2])
def test_as_many_checkpoints_are_kept_as_asked(tmp_path, keep):
    """Of epochs, and the last moment within the epoch that is under way."""
    for epoch in range(3):
        save_checkpoint(content(epoch), tmp_path, keep, ["best_checkpoint.pth"] if epoch == 1 else [])
    for update in (4, 8, 12):
        save_checkpoint(content(2, update), tmp_path, keep)
    names = ["checkpoint_0001.pth", "checkpoint_0002.pth", "checkpoint_0003_000012.pth"]
    expected = {"best_checkpoint.pth": content(1), "checkpoint.pth": content(2, 12)}
    if keep == 2:
        expected |= dict(zip(names, [content(1), content(2), content(2, 12)], strict=True))
    assert differences({p.name: torch.load(p) for p in sorted(tmp_path.iterdir())}, expected) == []


def test_a_save_does_not_write_through_what_a_kill_left(tmp_path):
    best = tmp_path / "best_checkpoint.pth"
    save_checkpoint(content(0), tmp_path, 2, [best.name])
    before = best.read_bytes()
    os.link(best, tmp_path / ".link.tmp")
    (tmp_path / ".new.pth.tmp").write_bytes(b"half a file")
    save_checkpoint(content(1), tmp_path, 2)
    assert best.read_bytes() == before
    assert torch.load(tmp_path / "checkpoint.pth")["epoch"] == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (os, "fsync"), (os, "replace"), (os, "unlink")])
def test_a_save_that_fails_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, owner, name, keep):
    original = getattr(owner, name)
    save = partial(save_checkpoint, folder=tmp_path, keep=keep, best=["best_checkpoint.pth"])
    left = 0

    def fail(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            if owner is torch:
                args[1].write(b"half a file")
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    save(content(0))
    monkeypatch.setattr(owner, name, fail)
    for failing in range(1, 9):
        left = failing
        try:
            save(content(1))
            assert left > 0, failing
        except InputError as error:
            assert "No space left on device" in str(error)
        left = 0
        epochs = {path.name: torch.load(path)["epoch"] for path in tmp_path.glob("*.pth")}
        assert set(epochs.values()) <= {0, 1}
        # a resumed run does not save this epoch as the best one again
        assert epochs["best_checkpoint.pth"] >= epochs["checkpoint.pth"], failing
        save(content(0))
        assert torch.load(tmp_path / "checkpoint.pth")["epoch"] == 0
        assert not list(tmp_path.glob(".*"))


def test_saving_works_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    for epoch in range(3):
        save_checkpoint(content(epoch), tmp_path, 2, ["best_checkpoint.pth"])
    epochs = {p.name: torch.load(p)["epoch"] for p in tmp_path.iterdir()}
    assert epochs == {"best_checkpoint.pth": 2, "checkpoint.pth": 2, "checkpoint_0001.pth": 1, "checkpoint_0002.pth": 2}


# what a file may hold


def test_any_flipped_bit_in_the_tensors_is_noticed(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"model": {"w": torch.arange(4096.0)}}, path)
    whole = path.read_bytes()
    start = whole.index(torch.arange(4096.0).numpy().tobytes()[:64])
    for at in np.random.RandomState(0).randint(start, start + 4 * 4096, size=20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        torch.load(path)  # torch itself is silent
        with pytest.raises(InputError, match="damaged"):
            weights.load(path)
    path.write_bytes(whole)
    assert torch.equal(weights.load(path)["model"]["w"], torch.arange(4096.0))


def test_a_checkpoint_of_the_code_before_evaluates_without_flags_and_resumes(tmp_path, capsys):
    """Written by commit 6d7e635: digits at 16 pixels, epoch 1 of 3 finished."""
    flags = ["--eval", "--resume", str(GOLDEN), "--device", "cpu"]
    for extra, line in (
        ([], "* Acc@1 28.333 Acc@5 81.667 loss 2.038"),
        (["--use-ema"], "* Acc@1 27.500 Acc@5 74.167 loss 2.148"),
    ):
        run(*flags, *extra)
        assert line in capsys.readouterr().out
    flags = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=16 num_heads=2 --data-set DIGITS"
    flags += " --input-size 16 --batch-size 32 --epochs 3 --device cpu --num_workers 0 --no-repeated-aug --aa none"
    run(*flags.split(), "--resume", str(GOLDEN), "--output_dir", str(tmp_path))
    assert [line["epoch"] for line in log_of(tmp_path)] == [2]


def publish(run_folder: Path, path: Path) -> Path:
    """Write a checkpoint as the published scripts do: a namespace with paths and NumPy numbers, wrapped names."""
    ours = torch.load(run_folder / "checkpoint.pth")
    args = argparse.Namespace(**ours["args"])
    args.output_dir = pathlib.Path("/home/someone/out")
    args.lr = np.float64(5e-4)
    args.epochs = np.int64(1)
    saved = {k: ours[k] for k in ("optimizer", "lr_scheduler", "epoch", "scaler")} | {"args": args}
    for key in ("model", "model_ema"):
        saved[key] = {f"module.{k}": v for k, v in ours[key].items()}
    torch.save(saved, path)
    return path


def test_published_checkpoints_evaluate_and_resume(quick_run, quick_flags, tmp_path, capsys):
    path = publish(quick_run, tmp_path / "old.pth")
    expected = log_of(quick_run)[0]
    for extra, kind, key in (([], "raw", "test"), (["--use-ema"], "EMA", "test_ema")):
        run("--eval", "--resume", str(path), "--device", "cpu", *extra)
        text = capsys.readouterr().out
        line = f"* Acc@1 {expected[f'{key}_acc1']:.3f} Acc@2 100.000 loss {expected[f'{key}_loss']:.3f}"
        assert line in text and f"{kind} weights" in text
    saved = []
    for source in (path, quick_run / "checkpoint.pth"):
        out = tmp_path / source.stem
        run(*quick_flags, "--resume", str(source), "--output_dir", str(out))
        saved.append(torch.load(out / "checkpoint.pth"))
    for key in ("model", "optimizer", "model_ema"):
        assert differences(saved[0][key], saved[1][key]) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_other_shapes_of_checkpoint_are_understood(tmp_path, zipped):
    path = tmp_path / "c.pth"
    expected = {"a.weight": torch.ones(2)}
    shapes = [expected, {"state_dict": expected}]
    for prefix in ("_orig_mod.", "module._orig_mod."):
        shapes.append({"model": {prefix + name: tensor for name, tensor in expected.items()}})
    for shape in shapes:
        torch.save(shape, path, _use_new_zipfile_serialization=zipped)
        assert differences(dict(weights.get_weights(weights.load(path), path)), expected) == []


def test_an_ema_that_is_missing_starts_from_the_weights(quick_run, quick_flags, tmp_path, capsys):
    saved = torch.load(quick_run / "checkpoint.pth")
    torch.save(saved | {"model_ema": None}, tmp_path / "c.pth")
    flags = ["--model-ema-decay", "1", "--resume", str(tmp_path / "c.pth"), "--output_dir", str(tmp_path / "out")]
    run(*quick_flags, *flags)
    assert "no EMA in it; the EMA starts from the loaded weights" in capsys.readouterr().out
    ema = torch.load(tmp_path / "out" / "checkpoint.pth")["model_ema"]
    assert torch.equal(ema["head.weight"], saved["model"]["head.weight"])


CONDITIONS = {"updates": 18, "processes": 1, "batch_size": 8, "accum_steps": 1, "seed": 0, "repeated_aug": True}
POSITION = {"update": 8, "losses": [1.0] * 8, "seconds": 1.0, "conditions": CONDITIONS}


@pytest.mark.parametrize("change", [{"update": "x"}, {"losses": None}, {"conditions": {"updates": 0}}])
def test_a_position_that_cannot_be_meant_is_refused(quick_run, quick_flags, tmp_path, capsys, change):
    saved = torch.load(quick_run / "checkpoint.pth")
    torch.save(saved | {"position": POSITION | change}, tmp_path / "c.pth")
    assert main.main([*quick_flags, "--resume", str(tmp_path / "c.pth")]) == 2
    assert "damaged, its position in the epoch" in capsys.readouterr().err


@pytest.mark.parametrize(("updates", "batch_size"), [(18, 8), (36, 4)])
def test_an_epoch_continues_with_other_batches_and_says_so(
    quick_run, quick_flags, tmp_path, capsys, updates, batch_size
):
    """In the second row it did so before: the losses that are saved are of other updates, here more than there were."""
    conditions = CONDITIONS | {"updates": updates, "batch_size": batch_size}
    position = POSITION | {"losses": [1.0] * 9, "conditions": conditions}
    torch.save(torch.load(quick_run / "checkpoint.pth") | {"position": position}, tmp_path / "c.pth")
    out = tmp_path / "out"
    run(*quick_flags, "--batch-size", "16", "--resume", str(tmp_path / "c.pth"), "--output_dir", str(out))
    assert f"continues at update {8 * 9 // updates} of 9, not bit for bit" in capsys.readouterr().out
    assert [line["epoch"] for line in log_of(out)] == [1]


def test_the_optimizer_of_a_published_checkpoint_goes_by_index():
    """Group 0 without decay and group 1 with it, parameters in the published order."""
    model = timm.create_model("dhvt_tiny_cifar_patch4", depth=1, num_classes=10)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = optim.build_optimizer(model, torch.device("cpu"), "adamw", lr=1e-3, weight_decay=0.05)
    plain, decayed = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    expected = [name for name, p in model.named_parameters() if p.ndim >= 2 and name != "cls_token"]
    assert decayed == expected and "blocks.0.attn.pos_embed" in expected and "patch_embed.pre_affine.alpha" in expected
    assert plain == [name for name, _ in model.named_parameters() if name not in expected]
