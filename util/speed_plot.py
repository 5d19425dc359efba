"""The picture of a speed table: what throughput a model gives for its MACs, and for its accuracy."""

import io
from typing import Any

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


def draw(rows: list[dict[str, Any]], where: str) -> bytes:
    """Give a PNG: images/s of each model at its best batch size against GMACs and published top-1, a row a mode."""
    measured = [row for row in rows if "images_per_s" in row]
    modes = list(dict.fromkeys(row["mode"] for row in measured)) or ["inference"]
    figure = Figure(figsize=(12, 5 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(modes), 2, squeeze=False)
    for (left, right), mode in zip(grid, modes, strict=True):
        best: dict[str, dict[str, Any]] = {}
        for row in (row for row in measured if row["mode"] == mode):
            if row["model"] not in best or row["images_per_s"] > best[row["model"]]["images_per_s"]:
                best[row["model"]] = row
        for axes, x_of, label in (
            (left, lambda row: row["gmacs"], "GMACs an image"),
            (right, lambda row: PUBLISHED.get(row["model"]), "published ImageNet-1k top-1, %"),
        ):
            for model, row in best.items():
                if x_of(row) is not None:
                    ours = model.startswith("dhvt") or "shrink_base" in model
                    axes.scatter(x_of(row), row["images_per_s"], color="tab:red" if ours else "tab:blue")
                    name = model.partition(" ")[0]
                    axes.annotate(
                        name, (x_of(row), row["images_per_s"]), fontsize=7, xytext=(4, 3), textcoords="offset points"
                    )
            axes.set(xlabel=label, ylabel="images/s", yscale="log", title=mode)
            axes.grid(alpha=0.3)
    figure.suptitle(f"each model at its best batch size; {where}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
