"""The fast path from an image file to the model: timm's transforms, with uint8 pixels up to the device.

--transform timm is the reference. For the same random numbers the crop, flip and operations are the same here.
"""

import random
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision import transforms

from data.images import Source, to_tensor
from util.config import AugmentConfig, ModelConfig
from util.errors import InputError
from util.precision import Precision

# steps that `DeviceTransform` does for the whole batch
ON_DEVICE = (transforms.ToTensor, transforms.Normalize, RandomErasing)

# steps that work on uint8 tensors; the random numbers that they draw are the same for tensors and Pillow images
ON_TENSOR = (
    RandomResizedCropAndInterpolation,
    transforms.RandomCrop,
    transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip,
)


def build_transform(
    train: bool,
    config: ModelConfig,
    augment: AugmentConfig | None = None,
    *,
    native_size: bool = False,
    flip: bool = True,
) -> transforms.Compose:
    """Return DeiT's transform of a PIL image to a normalized [3, H, W] tensor of `config.input_size`.

    `native_size` is for images that have that size already (CIFAR, digits), which evaluation neither resizes nor crops.
    `flip` is whether images may be mirrored, used if `augment.hflip` is None. Raises InputError for an unknown
    augmentation policy.
    """
    # evaluation: resize to size / crop_ratio, center crop
    if not train:
        evaluation = create_transform(
            timm_size(config),
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            crop_pct=config.crop_ratio,
            crop_mode=config.crop_mode,
        )
        if native_size:
            evaluation.transforms = [t for t in evaluation.transforms if isinstance(t, ON_DEVICE)]
        return evaluation

    # training: random resized crop, flips, operations of the policy or of 3-Augment, random erasing
    augment = augment or AugmentConfig()
    policy = None if augment.aa.lower() in ("", "none") else augment.aa
    default_hflip = 0.5 if flip else 0.0
    try:
        transform = create_transform(
            timm_size(config),
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=default_hflip if augment.hflip is None else augment.hflip,
            vflip=augment.vflip,
            # None leaves the step out
            color_jitter=augment.color_jitter or None,
            auto_augment="3a" if augment.three_augment else policy,
            interpolation=augment.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=0.0 if augment.three_augment else augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"--aa {policy}: not a policy of timm ({error!r}), for example rand-m9-mstd0.5-inc1") from None

    # another crop takes the place of the random resized crop, wherever timm puts that
    crop = build_crop(config, augment, native_size)
    if crop:
        steps = transform.transforms
        at = [isinstance(step, RandomResizedCropAndInterpolation) for step in steps].index(True)
        steps[at : at + 1] = crop
    return transform


def timm_size(config: ModelConfig) -> int | tuple[int, int]:
    """Return the input size in timm's form: an int if square, as timm resizes differently to an int and to a pair."""
    height, width = config.input_size
    return height if height == width else config.input_size


def build_crop(config: ModelConfig, augment: AugmentConfig, native_size: bool) -> list[nn.Module]:
    """Return the steps that crop training images instead of the random resized crop, [] to keep that."""
    size = config.input_size
    # to the short side, in proportion
    resize = create_transform(timm_size(config), interpolation="bicubic", crop_pct=1.0).transforms[0]
    if augment.three_augment and augment.src:
        # the simple random crop of DeiT III (arXiv:2204.07118)
        return [resize, transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    if augment.crop == "squash":
        return [transforms.Resize(size, transforms.InterpolationMode.BICUBIC)]
    # scale and ratio ask for the random resized crop
    default = "pad" if native_size and not (augment.scale or augment.ratio) else "rrc"
    if (augment.crop or default) == "rrc":
        return []
    crop = transforms.RandomCrop(size, padding=4)
    return [crop] if native_size else [resize, crop]


class FastTransform:
    """Do what the timm transform `reference` does, except what `DeviceTransform` does: Source -> uint8 [3, H, W].

    Crops are resized by torch (pixels differ from Pillow's by a level or two of 255 at most); the operations after the
    crop are timm's own.
    """

    takes_encoded = True

    def __init__(self, reference: transforms.Compose) -> None:
        self.reference = reference
        # what can be done before the first step that needs a PIL image is done on tensors
        steps = [step for step in reference.transforms if not isinstance(step, ON_DEVICE)]
        self.tensor_steps = list(takewhile(lambda step: isinstance(step, ON_TENSOR), steps))
        self.pil_steps = steps[len(self.tensor_steps) :]
        # the image that was decoded last: repeated augmentation asks for each image three times in a row
        self.last_data = None  # an empty file has b"", which is no image
        self.last_pixels = torch.empty(0)

    def __call__(self, image: Source) -> Tensor:
        pixels = self._decode(image)
        for step in self.tensor_steps:
            if isinstance(step, RandomResizedCropAndInterpolation):
                pixels = resized_crop(pixels, step)
            elif isinstance(step, transforms.RandomCrop):
                pixels = padded_crop(pixels, step)
            else:
                pixels = step(pixels)
        if not self.pil_steps:
            return pixels

        # timm's operations are for PIL images; the crop is all that is left to convert
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # H, W, 3
        for step in self.pil_steps:
            image = step(image)
        return to_tensor(np.array(image))

    def _decode(self, image: Source) -> Tensor:
        """Return the pixels, uint8 [3, H, W]."""
        if isinstance(image, np.ndarray):
            return to_tensor(image)
        if image.data != self.last_data:
            self.last_pixels = image.decode()
            self.last_data = image.data
        return self.last_pixels


def resized_crop(pixels: Tensor, step: RandomResizedCropAndInterpolation) -> Tensor:
    """Do timm's random resized crop on uint8 [3, H, W] -> [3, *step.size]."""
    i, j, h, w = step.get_params(pixels, step.scale, step.ratio)
    # in an image of few pixels timm may draw an empty box
    i, h = min(i, pixels.shape[1] - 1), max(h, 1)
    j, w = min(j, pixels.shape[2] - 1), max(w, 1)
    mode = step.interpolation
    if isinstance(mode, tuple):
        mode = random.choice(mode)
    # torch resizes channels-last images fastest
    crop = pixels[None, :, i : i + h, j : j + w].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, step.size, mode=mode.value, antialias=True)[0]


def padded_crop(pixels: Tensor, step: transforms.RandomCrop) -> Tensor:
    """Do torchvision's random crop with a black border on uint8 [3, H, W] -> [3, *step.size]."""
    # with channels last in memory, so that Pillow can copy the pixels as they are
    padding = [0, 0] + [step.padding] * 4
    padded = F.pad(pixels.permute(1, 2, 0), padding).permute(2, 0, 1)  # 3, H + 2 * padding, W + 2 * padding
    i, j, h, w = step.get_params(padded, step.size)
    return padded[:, i : i + h, j : j + w]


class DeviceTransform:
    """Move a batch [B, 3, H, W] to the run's device, and do there what `FastTransform` left out.

    uint8 batches are normalized and, with `augment`, pass timm's random erasing, which draws boxes from Python's random
    stream and noise from the device's. Float batches (--transform timm) come normalized and erased.
    """

    def __init__(self, config: ModelConfig, precision: Precision, augment: AugmentConfig | None = None) -> None:
        self.precision = precision
        self.mean = torch.tensor(config.mean, device=precision.device).view(3, 1, 1)
        self.std = torch.tensor(config.std, device=precision.device).view(3, 1, 1)
        self.random_erasing = None
        # 3-Augment comes without random erasing
        if augment is not None and augment.reprob and not augment.three_augment:
            self.random_erasing = RandomErasing(
                augment.reprob,
                mode=augment.remode,
                max_count=augment.recount,
                device=precision.device,
            )

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.precision.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
            if self.random_erasing is not None:
                images = self.random_erasing(images)
        return self.precision.to_memory_format(images)
