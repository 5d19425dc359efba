"""The picture of a speed table: what throughput a model gives for its MACs, and for its accuracy."""

import io
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# ImageNet-1k top-1 at 224 px as each model's authors published it
PUBLISHED = {
    "dhvt_tiny_imagenet_patch16": 77.6,
    "dhvt_small_imagenet_patch16": 82.3,
    "deit_small_patch16_shrink_base base_keep_rate=0.7 fuse_token=True": 79.5,
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "deit_base_patch16_224": 81.8,
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "twins_pcpvt_small": 81.2,
    "twins_svt_small": 81.7,
    "tnt_s_legacy_patch16_224": 81.5,
    "visformer_small": 82.2,
    "cait_xxs24_224": 77.6,
    "convit_tiny": 73.1,
    "convit_small": 81.3,
    "efficientnet_b0": 77.1,
    "convnext_tiny": 82.1,
}


Row = dict[str, Any]


def draw(rows: list[Row], where: str) -> bytes:
    """Give a PNG, a line of panels a mode: images/s of each model at its best batch size against GMACs and published
    top-1, and where several were measured, images/s by batch size, and milliseconds an image by its side."""
    rows = [row for row in rows if "images_per_s" in row]
    modes = list(dict.fromkeys(row["mode"] for row in rows)) or ["inference"]
    panels = [_by_macs, _by_accuracy]
    panels += [_by_batch] if len({row["batch_size"] for row in rows}) > 1 else []
    panels += [_by_size] if len({(row["name"], row["input_size"]) for row in rows}) > len(_models(rows)) else []
    figure = Figure(figsize=(6 * len(panels), 5 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(modes), len(panels), squeeze=False)
    for line, mode in zip(grid, modes, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            panel(axes, [row for row in rows if row["mode"] == mode])
            axes.set_title(mode)
            axes.grid(alpha=0.3)
    figure.suptitle(where, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _models(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _scatter(axes: Axes, rows: list[Row], x_of: Callable[[Row], float | None], label: str) -> None:
    for model, those in _models(rows).items():
        largest = [row for row in those if row["input_size"] == those[-1]["input_size"]]
        row = max(largest, key=lambda row: row["images_per_s"])
        if x_of(row) is not None:
            at = (x_of(row), row["images_per_s"])
            axes.scatter(*at, color="tab:red" if model.startswith("dhvt") or "shrink_base" in model else "tab:blue")
            axes.annotate(row["name"], at, fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel=label, ylabel="images/s, best batch size", ylim=(0, None))


def _by_macs(axes: Axes, rows: list[Row]) -> None:
    _scatter(axes, rows, lambda row: row["gmacs"], "GMACs an image")


def _by_accuracy(axes: Axes, rows: list[Row]) -> None:
    _scatter(axes, rows, lambda row: PUBLISHED.get(row["model"]), "published ImageNet-1k top-1, %")


def _by_batch(axes: Axes, rows: list[Row]) -> None:
    for those in _models(rows).values():
        largest = [row for row in those if row["input_size"] == those[-1]["input_size"]]
        axes.plot(
            [r["batch_size"] for r in largest], [r["images_per_s"] for r in largest], "o-", label=those[0]["name"]
        )
    axes.set(xlabel="batch size", ylabel="images/s", ylim=(0, None))
    axes.legend(fontsize=7)


def _by_size(axes: Axes, rows: list[Row]) -> None:
    for those in _models(rows).values():
        largest = [row for row in those if row["batch_size"] == those[-1]["batch_size"]]
        sides = [int(row["input_size"].partition("x")[0]) for row in largest]
        axes.plot(sides, [1000 / row["images_per_s"] for row in largest], "o-", label=those[0]["name"])
    axes.set(xlabel="side of the image, pixels", ylabel="milliseconds an image", ylim=(0, None))
    axes.legend(fontsize=7)
