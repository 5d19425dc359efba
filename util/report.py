"""The report of an evaluation, --eval --report FOLDER: what is right, what is wrong, and how sure the model was."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import distributed
from util.attention import undo_normalization
from util.checkpoint import TrainState, explain_write_errors, open_atomic
from util.config import ModelConfig
from util.distributed import print0
from util.errors import printable


def write_report(
    folder: Path,
    outputs: list[tuple[Tensor, Tensor]],
    loader: DataLoader,
    config: ModelConfig,
) -> None:
    """Write the report of an evaluation to an existing folder, on rank 0; all processes call this together.

    `outputs` are what `engine.evaluate` collected from `loader`, this process's share of the data set.
    """
    shares = distributed.gather_object((list(loader.sampler), outputs))
    if shares is None:
        return
    targets, probabilities = merge_shares(shares)
    predicted = probabilities.argmax(axis=1)

    # Names; a head may have more outputs than the data has classes
    dataset = loader.dataset
    classes = [*dataset.classes, *map(str, range(len(dataset.classes), probabilities.shape[1]))]
    files = dataset.files or [f"image {i}" for i in range(len(targets))]
    labels = np.array(classes)[targets]
    predictions = np.array(classes)[predicted]

    # Numbers
    scalars, columns, confusion = compute_metrics(targets, predicted, probabilities)
    with open_atomic(folder / "report.json") as file:
        file.write(json.dumps(scalars, indent=1).encode())
    write_csv(folder / "classes.csv", ["class", "images", "accuracy", "precision", "f1"], classes, *columns)
    write_csv(folder / "confusion.csv", ["label", *classes], classes, *confusion.T)
    header = ["file", "label", "prediction", *classes]
    write_csv(folder / "predictions.csv", header, files, labels, predictions, *probabilities.astype(np.float32).T)

    # Pictures
    draw_confusion(confusion, list(map(printable, classes))).savefig(folder / "confusion.png", dpi=200)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    worst = order[predicted[order] != targets[order]][:32].tolist()
    if worst:
        images = [dataset[i][0] for i in worst]
        texts = [
            f"{Path(files[i]).name[-40:]}\nlabel {labels[i]}\n{predictions[i]} ({confidence[i]:.2%})" for i in worst
        ]
        draw_images(images, texts, config).savefig(folder / "mistakes.png", dpi=200, bbox_inches="tight")
    else:
        print0("There are no mistakes, and no mistakes.png")
        (folder / "mistakes.png").unlink(missing_ok=True)
    print0(f"The report is in {folder}: {', '.join(f'{name} {round(value, 4)}' for name, value in scalars.items())}")


def draw_images(images: Iterable[Tensor], texts: Iterable[str], config: ModelConfig) -> Figure:
    """Draw up to 32 images [3, H, W], as datasets return them or normalized, each below its text."""
    figure = Figure((17, 11))
    for place, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
        axes = figure.add_subplot(4, 8, place)
        axes.imshow(undo_normalization(image, config))
        # names may hold a dollar sign, and what is not UTF-8
        axes.set_title(printable(text), fontsize=7, parse_math=False)
        axes.set_axis_off()
    return figure


def draw_first_batch(criterion: nn.Module, state: TrainState) -> None:
    """Draw up to 32 images of the batch that `criterion` is called with next, once, to train_images.png.

    Titles are the labels with their weights in mixup and cutmix; label smoothing is undone.
    """

    def draw(_, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        handle.remove()
        images, _, targets = (batch[:32] for batch in inputs)
        if targets.ndim == 1:
            weights = F.one_hot(targets, len(state.classes)).float()  # B, classes
        else:
            smoothing = state.args["smoothing"]
            weights = (targets - smoothing / targets.shape[1]) / (1 - smoothing)  # B, classes
        texts = []
        for row in weights.tolist():
            # a head may have more outputs than the data has classes
            mixed = sorted(zip(row, state.classes, strict=False), reverse=True)[:2]
            texts.append("\n".join(f"{name} {weight:.0%}" for weight, name in mixed if weight > 0.005))
        path = state.folder / "train_images.png"
        with explain_write_errors(state.folder), open_atomic(path) as file:
            draw_images(images, texts, state.config).savefig(file, dpi=200, bbox_inches="tight")

    handle = criterion.register_forward_pre_hook(draw)


def merge_shares(shares: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Return targets [N] and probabilities [N, classes] in the data set's order.

    `shares` has a pair for each process: its images' indices, and batches of targets [B] and logits [B, classes].
    """
    order = np.argsort([i for indices, _ in shares for i in indices])
    batches = [batch for _, outputs in shares for batch in outputs]
    targets, logits = map(torch.cat, zip(*batches, strict=True))
    # in float64 mistakes that are all but certain still differ
    return targets.numpy()[order], logits.double().softmax(dim=1).numpy()[order]


def compute_metrics(
    targets: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray
) -> tuple[dict[str, float], list[np.ndarray], np.ndarray]:
    """Return single numbers, columns by class, and the confusion matrix [labels, predictions], by scikit-learn.

    The columns are images, accuracy (recall), precision and F1, nan where it is not defined. Balanced accuracy is the
    mean over the classes with images, macro-F1 that over the classes with images or predictions.
    """
    # importing scikit-learn takes seconds, and only reports need it
    from sklearn import metrics

    classes = range(probabilities.shape[1])
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        targets, predicted, labels=classes, zero_division=np.nan
    )
    scalars = {
        "images": len(targets),
        "classes": len(classes),
        "classes_without_images": int((images == 0).sum()),
        "accuracy": metrics.accuracy_score(targets, predicted),
        # balanced_accuracy_score, which warns where a class without images was predicted
        "balanced_accuracy": metrics.recall_score(
            targets,
            predicted,
            labels=np.unique(targets),
            average="macro",
        ),
        "macro_f1": metrics.f1_score(targets, predicted, average="macro"),
        "log_loss": metrics.log_loss(targets, probabilities, labels=classes),
        "calibration_error": calibration_error(probabilities.max(axis=1), predicted == targets),
    }
    return scalars, [images, recall, precision, f1], metrics.confusion_matrix(targets, predicted, labels=classes)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error (arXiv 1706.04599) of predictions [N] in 15 equal bins of confidence.

    It is the mean, over the images, of the distance between accuracy and mean confidence in their bin.
    """
    bins = np.digitize(confidence, np.linspace(0, 1, 16), right=True)  # N
    gaps = np.bincount(bins, weights=correct - confidence)
    return np.abs(gaps).sum() / len(confidence)


def write_csv(path: Path, header: Sequence[str], *columns: Iterable) -> None:
    # names of files need not be UTF-8
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix [labels, predictions], in colors for the share of a label's images."""
    count = len(classes)
    # a label may have no images
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    size = 4 + min(count, 40) / 4
    figure = Figure((size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="prediction", ylabel="label")
    image = axes.imshow(
        shares,
        cmap="Blues",
        vmin=0,
        vmax=1,
    )
    figure.colorbar(image, label="share of the label's images")
    # more could not be read
    if count <= 40:
        axes.set_xticks(
            range(count),
            classes,
            rotation=90,
            parse_math=False,
        )
        axes.set_yticks(range(count), classes, parse_math=False)
    if count <= 15:
        for (row, column), number in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column,
                row,
                number,
                color=color,
                ha="center",
                va="center",
            )
    return figure
