"""The fast path from an image to the model: uint8 up to the device, which normalises and erases.

`--transform timm` is the reference: for the same random draws, crop, flip, operations and erased boxes are the same.
"""

import copy
import functools
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from util.images import EncodedImage, to_pil, to_tensor

LEAST = 3  # times its target that a crop of an image decoded at a reduced size measures; with 2, pixels differ more

Source = EncodedImage | Image.Image | np.ndarray  # an array is uint8 [H, W, 3]


class FastTransform:
    """Make of a Source what `reference` makes of a PIL image, but uint8 [3, H, W], not normalised, and not erased.

    With random erasing in `reference`, gives a pair: the image and its boxes, as `draw_boxes` has them. Crops are
    resized by torch (0 or 1 levels from Pillow's), and timm's or torchvision's operations do what follows, on the crop.
    """

    takes_encoded = True

    def __init__(self, reference: transforms.Compose) -> None:
        self.reference = reference
        steps = list(reference.transforms)
        self.erasing = copy.copy(next((t for t in steps if isinstance(t, RandomErasing)), None))
        if self.erasing is not None:
            self.erasing.per_pixel = self.erasing.rand_color = False  # boxes alone: their noise is the device's affair
        steps = [t for t in steps if not isinstance(t, (transforms.ToTensor, transforms.Normalize, RandomErasing))]
        self.crop, self.flip = None, 0.0
        if steps and isinstance(steps[0], RandomResizedCropAndInterpolation):
            self.crop = ResizedCrop(steps.pop(0))
        elif steps and isinstance(steps[0], transforms.RandomCrop) and steps[0].padding_mode == "constant":
            self.crop = PaddedCrop(steps.pop(0))
        if self.crop and steps and isinstance(steps[0], transforms.RandomHorizontalFlip):
            self.flip = steps.pop(0).p
        self.rest = steps
        self.unchanged = None  # the size of arrays that resizing and a central crop would leave alone
        if [type(t) for t in steps] == [transforms.Resize, transforms.CenterCrop]:
            self.unchanged = tuple(steps[1].size) if {*steps[1].size} == {steps[0].size} else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reference})"

    def __call__(self, image: Source) -> Tensor | tuple[Tensor, Tensor]:
        if self.crop is not None:
            image = self.crop(image)
            if self.flip and torch.rand(1) < self.flip:
                image = image.flip(-1)
        if self.rest and not (isinstance(image, np.ndarray) and image.shape[:2] == self.unchanged):
            image = _pil(image)
            for step in self.rest:
                image = step(image)
        image = _pixels(image)
        return image if self.erasing is None else (image, draw_boxes(self.erasing, *image.shape[1:]))


def _pixels(image: Source | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, EncodedImage):
        return image.decode()
    return to_tensor(image) if isinstance(image, Image.Image) else torch.from_numpy(image).permute(2, 0, 1)


def _pil(image: Source | Tensor) -> Image.Image:
    return image if isinstance(image, Image.Image) else to_pil(_pixels(image))


class ResizedCrop:
    """timm's random resized crop, by the same draws, on uint8 tensors.

    A large JPEG is decoded at a quarter or an eighth of its size where the crop stays LEAST times the target.
    """

    def __init__(self, reference: RandomResizedCropAndInterpolation) -> None:
        self.reference = reference
        self.kept: tuple[bytes, Tensor] = b"", torch.empty(0)  # repeated augmentation asks three times in a row

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": (b"", torch.empty(0))}

    def __call__(self, image: Source) -> Tensor:
        encoded = isinstance(image, EncodedImage)
        pixels = None if encoded else _pixels(image)
        like = self.reference
        i, j, h, w = like.get_params(image.header if encoded else pixels, like.scale, like.ratio)
        mode = random.choice(like.interpolation) if isinstance(like.interpolation, tuple) else like.interpolation
        if encoded:
            scale = self.find_scale(h, w) if image.can_reduce else 1
            if scale > 1:
                box = (j / scale, i / scale, (j + w) / scale, (i + h) / scale)
                return _pixels(image.decode_reduced(scale).resize(like.size[::-1], Image.Resampling[mode.name], box))
            pixels = self._decode(image)
        crop = pixels[None, :, i : i + h, j : j + w].contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, like.size, mode=mode.value, antialias=True)[0]

    def _decode(self, image: EncodedImage) -> Tensor:
        if image.data != self.kept[0]:
            self.kept = image.data, image.decode()
        return self.kept[1]

    def find_scale(self, h: int, w: int) -> int:
        """Give by how much the image of a crop of h x w pixels may be reduced: 8, 4 or 1; by 2 would save no time."""
        height, width = (LEAST * side for side in self.reference.size)
        return next((s for s in (8, 4) if h >= s * height and w >= s * width), 1)


class PaddedCrop:
    """torchvision's random crop with a black border, by the same draws, on uint8 tensors."""

    def __init__(self, reference: transforms.RandomCrop) -> None:
        self.size, self.padding = reference.size, reference.padding

    def __call__(self, image: Source) -> Tensor:
        pixels, (h, w), p = _pixels(image), self.size, self.padding
        height, width = (side + 2 * p for side in pixels.shape[1:])
        i = j = 0
        if (height, width) != (h, w):
            i = torch.randint(0, height - h + 1, (1,)).item() - p
            j = torch.randint(0, width - w + 1, (1,)).item() - p
        out = torch.zeros(3, h, w, dtype=torch.uint8)
        part = pixels[:, max(i, 0) : i + h, max(j, 0) : j + w]
        out[:, max(-i, 0) : max(-i, 0) + part.shape[1], max(-j, 0) : max(-j, 0) + part.shape[2]] = part
        return out


class _Noted:
    """Stand for an image in timm's RandomErasing, and note where it is erased."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape, self.boxes = (3, height, width), []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], value: Tensor) -> None:
        self.boxes.append((where[1].start, where[2].start, where[1].stop, where[2].stop))


def draw_boxes(erasing: RandomErasing, height: int, width: int) -> Tensor:
    """Draw what `erasing` would erase of an image: int64 [its largest count, 5].

    A row is top, left, bottom and right in pixels, and the seed of the noise to fill the box with; all 0 for no box.
    """
    noted = _Noted(height, width)
    erasing(noted)
    rows = torch.zeros(erasing.max_count, 5, dtype=torch.int64)
    for k, box in enumerate(noted.boxes):
        rows[k] = torch.tensor([*box, random.getrandbits(31)])
    return rows


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return tuple(
            torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )


def normalise(images: Tensor) -> Tensor:
    """Make [..., 3, H, W], uint8, what timm's ToTensor and Normalize make of it: float32, by ImageNet's statistics."""
    mean, std = _statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def erase(images: Tensor, boxes: Tensor, remode: str) -> None:
    """Erase the boxes [B, count, 5] of normalised images [B, 3, H, W], in place, as timm does.

    `remode` is what with: pixel, normal noise; rand, a colour of it; const, zero, the mean colour. The noise comes
    from each box's own seed.
    """
    generator = torch.Generator(images.device)
    for image, rows in zip(images, boxes.tolist(), strict=True):
        for top, left, bottom, right, seed in rows:
            if bottom > top:
                area = image[:, top:bottom, left:right]
                if remode == "const":
                    area.zero_()
                else:
                    shape = area.shape if remode == "pixel" else (len(area), 1, 1)
                    generator.manual_seed(seed)
                    area.copy_(torch.empty(shape, device=area.device).normal_(generator=generator))


def to_device(samples: Tensor | Sequence[Tensor], device: torch.device, remode: str = "pixel") -> Tensor:
    """Bring a batch, or (batch, boxes to erase), to the device, and normalise and erase there what came as uint8."""
    samples, boxes = samples if isinstance(samples, Sequence) else (samples, None)
    samples = samples.to(device, non_blocking=True)
    if samples.dtype == torch.uint8:
        samples = normalise(samples)
    if boxes is not None:
        erase(samples, boxes, remode)
    return samples


class Part:
    """Read an image's file, and decode it or not: what the loader's images/s are compared with."""

    takes_encoded = True

    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def __call__(self, image: EncodedImage) -> Tensor:
        return torch.tensor(image.decode().shape[2] if self.decode else image.size[0])
