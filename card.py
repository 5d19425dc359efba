"""The model card beside an exported model: README.md as the Hugging Face Hub reads it."""

import shlex
from pathlib import Path
from typing import Any

from models.build import TrainedModel
from util import options
from util.checkpoint import FLAGS_WITHOUT_EFFECT
from util.command import AUTO_FLAGS, to_words
from util.config import DataConfig
from util.keep_rate import at_lowest_keep_rate
from util.log import count_parameters

# data sets that have a page on the hub
HUB_NAMES = {
    "CIFAR": "uoft-cs/cifar100",
    "CIFAR-10": "uoft-cs/cifar10",
    "FASHION": "zalando-datasets/fashion_mnist",
    "FOOD": "ethz/food101",
    "MNIST": "ylecun/mnist",
    "SVHN": "ufldl-stanford/svhn",
}
# keys of log.txt
ACCURACIES = {"raw": "test_acc1", "EMA": "test_ema_acc1"}

# its first block is YAML, and holds nothing that a checkpoint says
CARD = """\
---
library_name: timm
{license}pipeline_tag: image-classification
tags: [image-classification, timm]
{data_sets}---

# {trained.config.name}

- Model: `{trained.config.name}`, {parameters:,} parameters
- Input: RGB images of (height, width) {trained.config.input_size}; `config.json` says how they are prepared
- Data set: `{data}`, {trained.model.num_classes} classes
- Weights: {weights}, of `{file}`

## Accuracy

Top-1 on the validation images ({validation}), which were also used to choose the best epoch; epochs count from 0.

| weights | this checkpoint | best epoch | last epoch |
|---|---|---|---|
{accuracy}

## Recipe

The flags that differ from the defaults of a training repository for [DHVT](https://arxiv.org/abs/2210.05958) and
[EViT](https://arxiv.org/abs/2202.07800):

```sh
{recipe}
```

## Use

```python
import models  # from that repository, or the file that registers the model; not needed for timm's own models
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
# from a folder: timm.create_model("local-dir:FOLDER", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
classes = model.pretrained_cfg.get("label_names")
```

## License

The code is licensed under Apache 2.0. Whoever trained the weights chooses their license, within what the original
weights and data allow: change `license` above.
"""


def as_code(text: Any) -> str:
    """Return any text in one line that ends neither Markdown's code nor its blocks."""
    return " ".join(str(text).replace("`", "'").split())


def describe_recipe(flags: dict[str, Any]) -> str:
    """Return the command line of a run's flags, as far as they differ from the defaults.

    Of paths only the last name is shown: the rest is about somebody's machine.
    """
    if not flags:
        return "# not known"
    words = ["python", "main.py"]
    parser = options.build_parser()
    actions = {action.dest: action for action in parser._actions}
    for name, default in vars(parser.parse_args([])).items():
        value = flags.get(name, default)
        if name in FLAGS_WITHOUT_EFFECT or str(value) == str(default):
            continue
        # the machine decided
        if name in AUTO_FLAGS and name not in flags.get("given", ()):
            continue
        # paths
        if isinstance(value, str):
            value = Path(value).name or value
        words += to_words(name.replace("_", "-"), value, actions[name])
    return as_code(shlex.join(words))


def describe_accuracy(lines: list[dict], epoch: int | None) -> str:
    """Return rows of a table from the lines of a log.txt: top-1 at `epoch`, the best one and the last one."""
    rows = []
    for weights, key in ACCURACIES.items():
        tested = [line for line in lines if key in line]
        if tested:
            top1 = {line["epoch"]: line[key] for line in at_lowest_keep_rate(tested)}
            epochs = (epoch, max(top1, key=top1.get), max(top1))
            cells = [f"{top1[i]:.2f} % (epoch {i})" if i in top1 else "" for i in epochs]
            rows.append(f"| {weights} | {' | '.join(cells)} |")
    return "\n".join(rows) or "| not known | | | |"


def write_card(trained: TrainedModel, epochs: list[dict], path: Path, use_ema: bool, repository: str) -> None:
    """Write the card of a checkpoint's raw or EMA weights, with the accuracies of `epochs`, the lines of a log.txt.

    `repository` is USER/NAME on the hub.
    """
    data = trained.data or DataConfig("not known")
    flags = trained.flags
    card = CARD.format(
        trained=trained,
        # weights that started from others may not be free
        license="" if flags.get("pretrained") or flags.get("finetune") else "license: apache-2.0\n",
        data_sets=f"datasets: [{HUB_NAMES[data.name]}]\n" if data.name in HUB_NAMES else "",
        parameters=count_parameters(trained.model),
        data=as_code(data.name),
        weights="EMA" if use_ema else "raw",
        file=as_code(Path(trained.source).name),
        validation=data.describe_validation() if trained.data else "not known",
        accuracy=describe_accuracy(epochs, trained.epoch),
        recipe=describe_recipe(flags),
        repository=repository,
    )
    # names of folders may be no text
    path.write_text(card, encoding="utf-8", errors="replace")
