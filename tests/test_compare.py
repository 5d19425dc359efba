"""compare.py on runs that are written by hand, with means and deviations from Python's statistics."""

import csv
import json
import statistics
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from matplotlib.axes import Axes
from PIL import Image

import compare
import engine
from util import options

# accuracies by epoch, and of the EMA, of three seeds
SEEDS = {
    0: ([20.0, 60.0, 55.0], [10.0, 30.0, 40.0]),
    1: ([10.0, 70.0, 60.0], [10.0, 20.0, 15.0]),
    2: ([30.0, 50.0, 65.0], [5.0] * 3),
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the files of a run and returns its folder."""

    def run(name: str, kwargs: dict, accuracies: list[float], ema: list[float], **flags) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        args = vars(options.build_parser().parse_args(["--model", "dhvt_tiny_cifar_patch4", "--epochs", "3"]))
        # a run of an earlier version has fewer flags
        for flag in ("given", "compile"):
            del args[flag]
        described = {"device": name, "n_parameters": 2_000_000, "versions": {"git": name}, "output_dir": name}
        record = args | {"model_kwargs": {"embed_dim": 32, "num_heads": 2} | kwargs} | flags | described
        (folder / "args.json").write_text(json.dumps(record))
        lines = [
            {"epoch": i, "test_acc1": a, "test_ema_acc1": e, "images_per_s": 10.0 + a, "epoch_seconds": 30}
            for i, (a, e) in enumerate(zip(accuracies, ema, strict=True))
        ]
        # cut short by a crash
        (folder / "log.txt").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"epoch": 9, "te')
        return folder

    return run


def table(text: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the cells of a Markdown table by line and title, and the lines without cells."""
    titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    full = [dict(zip(titles, row, strict=True)) for row in rows if len(row) > 1]
    return {row["run"]: row for row in full}, [row[0] for row in rows if len(row) == 1]


def mean_and_std(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def test_seeds_are_one_line_with_mean_and_deviation_and_other_flags_are_lines(write, tmp_path, capsys, monkeypatch):
    drawn, bands = {}, []
    plot, fill = Axes.plot, Axes.fill_between

    def record_plot(axes, x, y, **kwargs):
        drawn[kwargs["label"]] = (list(x), list(y))
        return plot(axes, x, y, **kwargs)

    def record_fill(axes, x, low, high, **kwargs):
        bands.append((list(low), list(high)))
        return fill(axes, x, low, high, **kwargs)

    # the MACs of a model need no weights
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(Axes, "plot", record_plot)
    monkeypatch.setattr(Axes, "fill_between", record_fill)
    for seed, (accuracies, ema) in SEEDS.items():
        # in the order in which the flags were given
        kwargs = (
            {"depth": 2, "embed_dim": 32, "num_heads": 2}
            if seed == 1
            else {"embed_dim": 32, "num_heads": 2, "depth": 2}
        )
        write(
            f"deep/seed{seed}",
            {},
            accuracies,
            ema,
            seed=seed,
            fold=seed,
            split_seed=seed,
            pretrained=True,
            model_kwargs=kwargs,
            data_path=f"/scratch/{seed}",
        )
    other = write("other", {"depth": 1, "embed_dim": 16}, [40.0], [41.0], lr=0.01, pretrained=True)
    out = tmp_path / "out" / "here"
    assert compare.main([str(tmp_path / "deep"), str(tmp_path / "deep/seed1"), str(other), "--out", str(out)]) == 0

    lines, errors = table(capsys.readouterr().out)
    assert list(lines) == ["lr=0.0005 embed_dim=32 depth=2", "lr=0.01 embed_dim=16 depth=1"] and errors == []
    deep, shallow = lines.values()
    assert (deep["n"], deep["epochs"], shallow["n"], shallow["epochs"]) == ("3", "3/3", "1", "1/3")
    assert deep["best top-1"] == mean_and_std([60.0, 70.0, 65.0], 2)
    assert deep["last top-1"] == mean_and_std([55.0, 60.0, 65.0], 2)
    assert deep["best EMA"] == mean_and_std([40.0, 20.0, 5.0], 2)
    assert deep["images/s"] == mean_and_std([65.0, 70.0, 60.0], 1)
    assert deep["minutes"] == "1.5"
    model = timm.create_model("dhvt_tiny_cifar_patch4", depth=2, embed_dim=32, num_heads=2)
    assert (deep["parameters (M)"], deep["GMACs"]) == ("2.000", f"{engine.count_macs(model, (32, 32)):.3f}")
    assert (shallow["best top-1"], shallow["best EMA"]) == ("40.00", "41.00")

    first, second = drawn.values()
    assert first == ([0, 1, 2], [20.0, 60.0, 60.0]) and second == ([0], [40.0])
    assert bands == [([10.0, 50.0, 55.0], [30.0, 70.0, 65.0]), ([40.0], [40.0])]
    with open(out / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], float(row["best top-1"])) for row in rows] == [("0", 60), ("1", 70), ("2", 65), ("0", 40)]
    assert Image.open(out / "compare.png").format == "PNG"


def test_runs_on_other_numbers_of_classes_are_no_seeds_of_each_other(write, tmp_path, capsys):
    for name, parameters in (("two", 2_000_000), ("ten", 2_000_264)):
        path = write(name, {}, [50.0], [1.0]) / "args.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_parameters": parameters}))
    # sizes are no numbers to draw by
    words = [str(tmp_path), "--x", "input_size", "--out", str(tmp_path / "out")]
    assert compare.main(words) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["1", "1"]


def test_an_unfinished_seed_and_a_missing_epoch_spoil_no_mean(write, tmp_path, capsys):
    done = [write(f"seed{seed}", {}, [10.0, 20.0, 30.0 + seed], [1.0] * 3, seed=seed) for seed in (0, 2)]
    begun = write("seed1", {}, [90.0], [1.0], seed=1)
    log = done[1] / "log.txt"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], *lines[2:]]))
    assert compare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in capsys.readouterr().out.splitlines()[2:]]
    mean = mean_and_std([30.0, 32.0], 2)
    assert rows == [["2", "3/3", mean, mean], ["1", "1/3", "90.00", "90.00"]] and begun.exists()


def test_runs_of_one_model_are_named_by_it_and_models_are_told_apart(write, capsys):
    small = write("small", {"depth": 1}, [1.0], [1.0])
    assert compare.main([str(small)]) == 0
    assert list(table(capsys.readouterr().out)[0]) == ["dhvt_tiny_cifar_patch4"]
    deit = write("deit", {"depth": 1, "patch_size": 16}, [1.0], [1.0], model="deit_tiny_patch16_224", seed=3)
    gone = write("gone", {"depth": 1}, [1.0], [1.0], model="no_such_model")
    assert compare.main([str(small), str(deit), str(gone)]) == 0
    lines, _ = table(capsys.readouterr().out)
    assert list(lines) == ["dhvt_tiny_cifar_patch4", "deit_tiny_patch16_224 patch_size=16", "no_such_model"]
    assert lines["no_such_model"]["GMACs"] == "-"


def test_a_run_without_results_is_a_line_that_says_so(write, tmp_path, capsys):
    good = write("good", {"depth": 1}, [50.0], [1.0])
    begun = write("begun", {"depth": 1}, [], [], seed=1)
    damaged = write("damaged", {"depth": 1}, [50.0], [1.0], seed=2)
    (damaged / "args.json").write_text('{"model": "dhv')
    diverged = write("diverged", {"depth": 1}, [50.0], [1.0], seed=3)
    (diverged / "log.txt").write_text('{"epoch": 0, "test_acc1": 50.0}\n{"epoch": 1, "diverged": true}\n')
    bad = [begun, damaged, diverged]
    assert compare.main([str(good), *map(str, bad), "--out", str(tmp_path / "out")]) == 0
    lines, errors = table(capsys.readouterr().out)
    assert [row["n"] for row in lines.values()] == ["1"]
    assert len(errors) == 3 and all(error.startswith(f"{path}: ") for error, path in zip(errors, bad, strict=True))
    assert "diverged in epoch 1" in errors[2]
    # nothing to draw is no error either
    assert compare.main([str(begun), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_where_no_run_is_one_line_says_so(write, tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    assert compare.main([str(write("good", {}, [50.0], [1.0])), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and "--output_dir" in error and error.count("\n") == 1


def test_runs_that_differ_in_many_flags_are_called_by_their_folders(write, capsys):
    few = write("few", {"depth": 1}, [50.0], [1.0])
    many = {f"argument{i}": "a value" for i in range(8)}
    write("many", many, [50.0], [1.0])
    assert compare.main([str(few.parent)]) == 0
    assert set(table(capsys.readouterr().out)[0]) == {"depth=1", str(few.parent / "many")}


def test_evits_best_is_at_its_lowest_keep_rate(write, capsys):
    folder = write("evit", {}, [80.0, 60.0], [70.0, 65.0])
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()[:-1]]
    rates = [line | {"keep_rate": rate} for line, rate in zip(lines, (1.0, 0.7), strict=True)]
    (folder / "log.txt").write_text("".join(f"{json.dumps(line)}\n" for line in rates))
    assert compare.main([str(folder)]) == 0
    (row,) = table(capsys.readouterr().out)[0].values()
    assert (row["best top-1"], row["best EMA"]) == ("60.00", "65.00")


def test_accuracy_by_a_flag_is_that_on_the_test_set_where_all_runs_have_a_report(write, tmp_path, monkeypatch):
    drawn = []
    pictures = []
    errorbar = Axes.errorbar

    def record(axes, x, y, yerr, label, **kwargs):
        drawn.append((label, x, y, yerr))
        pictures.append(axes)
        return errorbar(axes, x, y, yerr, label=label, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", record)
    # two seeds with a fraction of the images and one with all of them
    runs = [write(f"small{seed}", {"depth": 1}, [50.0], [1.0], seed=seed, train_fraction=0.5) for seed in (0, 1)]
    runs.append(write("all", {"depth": 1}, [60.0], [1.0], train_fraction=1.0, lr=0.01))
    runs.append(write("deit", {"depth": 1}, [70.0], [1.0], model="deit_tiny_patch16_224", train_fraction=0.5))
    words = [*map(str, runs), "--x", "train-fraction", "--out", str(tmp_path / "out")]
    assert compare.main(words) == 0
    ours = ("dhvt_tiny_cifar_patch4", (0.5, 1.0), (50.0, 60.0), (0.0, 0.0))
    assert drawn == [ours, ("deit_tiny_patch16_224", (0.5,), (70.0,), (0.0,))]
    # ticks at the flag's values alone
    assert [tick.get_text() for tick in pictures[-1].get_xticklabels(which="both")] == ["0.5", "1"]

    drawn.clear()
    for folder, accuracy in zip(runs, (0.25, 0.75, 0.5, 0.125), strict=True):
        (folder / "test").mkdir()
        (folder / "test/report.json").write_text(json.dumps({"accuracy": accuracy}))
    assert compare.main(words) == 0
    (_, _, means, deviations), (_, _, (deit,), _) = drawn
    assert means == (50.0, 50.0) and deit == 12.5
    assert deviations == (pytest.approx(statistics.stdev([25.0, 75.0])), 0.0)

    # names among numbers
    drawn.clear()
    names = [*map(str, runs), "--x", "layer-decay", "--out", str(tmp_path / "out")]
    record_decay = json.loads((runs[0] / "args.json").read_text()) | {"layer_decay": 0.75}
    (runs[0] / "args.json").write_text(json.dumps(record_decay))
    assert compare.main(names) == 0
    assert drawn[0][1] == ("0.75", "None", "None")

    assert compare.main([*words[:-4], "--x", "depht", "--out", str(tmp_path)]) == 2
