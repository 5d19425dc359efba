"""From a configuration, or from a file of weights, to a model."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from util.command import parse_block_numbers
from util.config import (
    DEFAULT_DROP_PATH,
    DataConfig,
    ModelConfig,
    describe_size,
    find_cfg,
    is_evit,
    is_native_size,
    resolve_input_size,
)
from util.distributed import print0
from util.errors import InputError, first_line
from util.weights import (
    classifier_names,
    fit_pos_embed,
    get_weights,
    load,
    load_matching,
    load_weights,
    saved_flags,
)

EVIT_KWARGS = ("base_keep_rate", "fuse_token", "drop_loc")


@dataclass
class TrainedModel:
    """A model in eval mode, with what its file says: classes by index, the data set, the run's flags and its epoch."""

    model: nn.Module
    config: ModelConfig
    classes: list[str] | None
    data: DataConfig | None
    source: str
    flags: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None


def build_model(config: ModelConfig, flag: str = "--model", grad_checkpointing: bool = False) -> nn.Module:
    """Return a model with random or timm's weights. Raises InputError, naming the flag, where timm cannot build it."""
    cfg = find_cfg(config.name, flag)
    kwargs = dict(config.kwargs)
    if config.num_classes is not None:
        kwargs["num_classes"] = config.num_classes
    if cfg.fixed_input_size:
        kwargs["img_size"] = config.input_size
    try:
        try:
            model = timm.create_model(config.name, **kwargs)
        except TypeError:
            # not every model has stochastic depth
            if kwargs.pop("drop_path_rate", None) != DEFAULT_DROP_PATH:
                raise
            model = timm.create_model(config.name, **kwargs)
        if not hasattr(model, "pretrained_cfg"):
            raise ValueError("it has no pretrained_cfg; build it with timm's build_model_with_cfg")
        check_size(model, config.input_size)
        if grad_checkpointing:
            model.set_grad_checkpointing()
    except Exception as error:  # of any kind: models raise what they like on wrong arguments
        if kwargs.get("pretrained"):
            raise InputError(
                f"--pretrained: timm cannot load the weights of {config.name} ({first_line(error)}); "
                "check the network and --model-kwargs, or download weights and give --finetune FILE"
            ) from None
        raise InputError(
            f"{flag} {config.name} at {describe_size(config.input_size)} pixels with {config.kwargs}: "
            f"{first_line(error)}; change --input-size, --model-kwargs, --drop, --drop-path or --grad-checkpointing"
        ) from None
    return model


def check_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Raise ValueError for images of a size (height, width) that a model's patches cannot cover."""
    embed = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None) or size
    if min(grid) < 1:
        raise ValueError("smaller than a patch; give a larger --input-size")
    # with dynamic_img_size, as in EViT, timm notices in the forward pass only
    if getattr(embed, "strict_img_size", True) or getattr(embed, "dynamic_img_pad", True):
        return
    if any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
        raise ValueError(f"height and width must be multiples of the patch size, {describe_size(embed.patch_size)}")


def count_classes(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Return the number of rows of the classifier among a model's weights, None where it is not there."""
    for module in classifier_names(find_cfg(name).to_dict()):
        if f"{module}.weight" in weights:
            return len(weights[f"{module}.weight"])
    return None


def load_trained(
    path: str | Path,
    *,
    use_ema: bool = False,
    default_name: str | None = None,
    remedy: str = "",
    **overrides: Any,
) -> TrainedModel:
    """Return the model of a file with its weights.

    `path` is a checkpoint of main.py or of the published scripts, a bare state dict, a .safetensors file, a folder of
    export.py or in timm's layout, or a URL. `overrides` are fields of ModelConfig, and arguments of EViT, that differ
    from what the file says; a difference is printed. `default_name` is the model of a file that does not name its own.
    Raises InputError.
    """
    saved = load(path)
    weights = get_weights(saved, path, use_ema)
    trained = read_model_fields(saved, path)
    data = read_data_config(saved)

    # What the file says, and what is to be different
    evit = {name: overrides.pop(name) for name in EVIT_KWARGS if name in overrides}
    kwargs = {**trained.get("kwargs", {}), **overrides.pop("kwargs", {}), **evit}
    values = {**trained, **overrides}
    values.setdefault("name", default_name)
    if values["name"] is None:
        raise InputError(f"{path}: does not say which model it is of; add --model NAME")
    if not is_evit(values["name"]):
        # an EViT's weights in a plain ViT
        kwargs = {name: value for name, value in kwargs.items() if name not in EVIT_KWARGS}
    values["kwargs"] = kwargs
    values["input_size"] = resolve_input_size(values["name"], values.get("input_size"))
    classes = get_classes(saved)
    if values.get("num_classes") is None:
        values["num_classes"] = len(classes or ()) or count_classes(values["name"], weights)
    config = ModelConfig(**values)
    if data is not None and "crop_ratio" not in overrides and is_native_size(data.name, config.input_size):
        # its images were neither resized nor cropped
        config = replace(config, crop_ratio=1.0)

    # Build it, and load the weights strictly
    model = build_model(config)
    if fit_pos_embed(model, weights, trained.get("input_size")):
        print0(f"{path}: its position embedding is resampled")
    if trained.get("name") not in (None, config.name):
        remedy = remedy or describe_trained(trained)
    load_weights(model, weights, path, remedy)
    print_differences(trained, config, path)
    # a checkpoint from the middle of an epoch has no accuracy of its own
    epoch = None if saved.get("position") else saved.get("epoch")
    return TrainedModel(model.eval(), config, classes, data, str(path), saved_flags(saved), epoch)


def describe_trained(trained: Mapping[str, Any]) -> str:
    """Return the flags that a file's model was trained with, for an error message."""
    kwargs = dict(trained.get("kwargs", {}))
    # --drop-path sets it
    kwargs.pop("drop_path_rate", None)
    words = [f"--model {trained['name']}"]
    if kwargs:
        words += ["--model-kwargs", *(f"{name}={value}" for name, value in kwargs.items())]
    return f"it was trained with {' '.join(words)}"[:300]


def print_differences(trained: Mapping[str, Any], config: ModelConfig, path: str | Path) -> None:
    """Print where a model is used in another way than it was trained."""
    size = trained.get("input_size", config.input_size)
    if size != config.input_size:
        print0(f"{path}: trained at {describe_size(size)}, evaluating at {describe_size(config.input_size)}")
    for name, value in config.kwargs.items():
        before = trained.get("kwargs", {}).get(name, value)
        if before != value:
            print0(f"{path}: trained with {name} {before}, evaluating with {value}")


def read_model_fields(saved: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the fields of ModelConfig that a file holds, whichever program wrote it.

    Files are untrusted, so types and ranges are checked. Raises InputError.
    """
    config, hub, flags = saved.get("config"), saved.get("hf_config"), saved_flags(saved)
    try:
        if config is not None:
            values = dict(config)
        elif hub is not None:
            cfg = hub["pretrained_cfg"]
            values = {
                "name": hub["architecture"],
                "num_classes": hub.get("num_classes"),
                "input_size": cfg["input_size"][-2:],
                "kwargs": hub.get("model_args") or {},
                "crop_ratio": cfg["crop_pct"],
                "crop_mode": cfg.get("crop_mode", ModelConfig.crop_mode),
                "interpolation": cfg.get("interpolation", ModelConfig.interpolation),
                "mean": cfg["mean"],
                "std": cfg["std"],
            }
        elif "model" in flags:
            values = fields_from_flags(flags)
        else:
            return {}
        if isinstance(saved.get("keep_rate"), float) and "base_keep_rate" in values["kwargs"]:
            # an epoch is evaluated at the rate that was reached
            values["kwargs"] = {**values["kwargs"], "base_keep_rate": saved["keep_rate"]}
        return validate_fields(values)
    except (LookupError, TypeError, ValueError, AttributeError, ArgumentTypeError) as error:
        raise InputError(f"{path}: its model's configuration is damaged ({first_line(error)}); use another") from None


def fields_from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from the flags of a run, this program's or the published one's."""
    size = flags.get("input_size")
    size = [size] if isinstance(size, int) else size
    kwargs = dict(flags.get("model_kwargs") or {})
    if "base_keep_rate" in flags and is_evit(str(flags["model"])):
        kwargs["base_keep_rate"] = flags["base_keep_rate"]
        kwargs["fuse_token"] = flags.get("fuse_token", False)
        drop_loc = flags.get("drop_loc", "(3, 6, 9)")
        kwargs["drop_loc"] = parse_block_numbers(drop_loc) if isinstance(drop_loc, str) else tuple(drop_loc)
    return {
        "name": flags["model"],
        "num_classes": flags.get("nb_classes"),
        "input_size": (size[0], size[-1]) if size else resolve_input_size(flags["model"], None),
        "kwargs": kwargs,
        "crop_ratio": flags.get("eval_crop_ratio") or ModelConfig.crop_ratio,
    }


def validate_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return ModelConfig's fields converted to their types. Raises ValueError or TypeError for impossible values."""
    height, width = map(int, values["input_size"])
    crop_ratio = float(values["crop_ratio"])
    if min(height, width, crop_ratio) <= 0:
        raise ValueError(f"an input size of {height}x{width} or a crop ratio of {crop_ratio}")
    fields = {
        **values,
        "name": str(values["name"]),
        "input_size": (height, width),
        # a file must not make timm load others
        "kwargs": {
            name: value for name, value in values["kwargs"].items() if name not in ("pretrained", "checkpoint_path")
        },
        "crop_ratio": min(1.0, crop_ratio),
    }
    # a TypeError for a field of a later version
    return asdict(ModelConfig(**fields))


def read_data_config(saved: Mapping[str, Any]) -> DataConfig | None:
    """Return the data set that a checkpoint was trained on, None where it does not say."""
    flags = saved_flags(saved)
    values = saved.get("data") or {
        "name": flags.get("data_set"),
        "root": flags.get("data_path"),
        "lmdb": flags.get("use_lmdb", False),
        "inat_category": flags.get("inat_category", "name"),
    }
    if not values["name"]:
        return None
    # some came with later versions, and some may with versions to come
    return DataConfig(**{name: value for name, value in values.items() if hasattr(DataConfig, name)})


def get_classes(saved: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a checkpoint's classes by index, None where it does not hold them."""
    return saved.get("classes") or saved.get("hf_config", {}).get("label_names")


def init_from_checkpoint(model: nn.Module, path: str, use_ema: bool) -> None:
    """Start a model from the weights of a file, as far as they match. Raises InputError where few do."""
    saved = load(path)
    trained = read_model_fields(saved, path)
    remedy = describe_trained(trained) if trained else ""
    load_matching(model, get_weights(saved, path, use_ema), path, trained.get("input_size"), remedy)


def load_teacher(path: str, student: ModelConfig, default_name: str, **overrides: Any) -> TrainedModel:
    """Return the teacher of distillation for the student's images. Raises InputError where it does not fit.

    `default_name` is the teacher's model if the file does not name it; `overrides` are those of `load_trained`. The
    random state is restored, so that the student gets the same initial weights as without a teacher.
    """
    with torch.random.fork_rng(devices=[]):
        trained = load_trained(
            path,
            default_name=default_name,
            remedy="give the --teacher-model that it was saved from",
            input_size=student.input_size,
            **overrides,
        )
    # it is called with the student's images
    if (*trained.config.mean, *trained.config.std) != (*student.mean, *student.std):
        # pixels are x * s1 + m1 = y * s2 + m2
        (m1, s1), (m2, s2) = [torch.tensor([c.mean, c.std])[..., None, None] for c in (student, trained.config)]
        # buffers, which move to the run's device with the model
        trained.model.register_buffer("renormalize_scale", s1 / s2)  # 3, 1, 1
        trained.model.register_buffer("renormalize_shift", (m1 - m2) / s2)  # 3, 1, 1
        trained.model.register_forward_pre_hook(
            lambda model, inputs: inputs[0] * model.renormalize_scale + model.renormalize_shift
        )
    return trained


def check_teacher(teacher: TrainedModel, student: nn.Module, classes: Sequence[str], two_heads: bool) -> None:
    """Raise InputError if the teacher has other classes than the student, or the student lacks needed `two_heads`."""
    # by name, and by number where a file does not hold the names
    check_classes(f"--teacher-path {teacher.source}", teacher.classes, classes)
    if teacher.model.num_classes != student.num_classes:
        raise InputError(
            f"--teacher-path {teacher.source}: it has {teacher.model.num_classes} classes and the student "
            f"{student.num_classes}; give one that was trained on these classes"
        )
    if two_heads and not hasattr(student, "set_distilled_training"):
        name = student.pretrained_cfg["architecture"]
        raise InputError(
            f"--model {name} has no distillation head; deit_tiny_distilled_patch16_224 has, for example, and --kd "
            "needs none"
        )


def check_classes(
    source: str,
    saved: Sequence[str] | None,
    classes: Sequence[str],
    num_classes: int | None = None,
) -> None:
    """Refuse a checkpoint of other classes than the data's, by name and number. Raises InputError.

    `num_classes` is the number of the model's outputs, for a file that does not name its classes.
    """
    remedy = "is --data-path right, or did you mean --finetune?"
    if not saved and num_classes is not None and num_classes < len(classes):
        raise InputError(f"{source}: it has {num_classes} outputs and the data {len(classes)} classes; {remedy}")
    if not saved or list(saved) == list(classes):
        return
    if len(saved) != len(classes):
        raise InputError(f"{source}: it has {len(saved)} classes and the data {len(classes)}; {remedy}")
    i = next(i for i, (a, b) in enumerate(zip(saved, classes, strict=True)) if a != b)
    raise InputError(f"{source}: its class {i} is {saved[i]} and the data's is {classes[i]}; {remedy}")


def resolve_num_classes(nb_classes: int | None, classes: Sequence[str]) -> int:
    """Return --nb-classes, by default the number of the data's classes. Raises InputError for fewer than those."""
    if nb_classes is not None and nb_classes < len(classes):
        raise InputError(f"--nb-classes {nb_classes}: the data has {len(classes)} classes; leave it out")
    return nb_classes or len(classes)
