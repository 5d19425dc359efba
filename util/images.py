"""Image files: which of them can be read, and their pixels, no more than needed of them decoded."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from util.class_folders import FORMATS
from util.errors import InputError

END = b"\xff\xd9"  # of a JPEG that is whole


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise InputError, naming the image, for what goes wrong inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # palette images with transparency become plain RGB
            yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such image, though it is listed; put it back") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].partition(" <")[0]  # without the name of the stream it was read from
        raise InputError(f"{name}: not a readable image ({reason}); mend or remove it") from None


def read_file(path: str) -> bytes:
    with reading(path), open(path, "rb") as file:
        return file.read()


def load_rgb(data: bytes, name: str) -> Image.Image:
    """Decode an image as the reference does: by Pillow, whole."""
    with reading(name):
        return Image.open(BytesIO(data), formats=FORMATS).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Give the pixels of an RGB image, uint8 [3, H, W], stored by rows, [H, 3, W]: such are collated fastest."""
    rows = np.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), np.uint8)
    return torch.from_numpy(rows.reshape(image.height, 3, image.width)).permute(1, 0, 2)


def _by_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # 3, H, W, stored [H, W, 3]: such are resized fastest


class _Quick(Image.Image):
    """A Pillow image that takes tables of ints as they are; Pillow rounds their 768 entries, one by one, each time."""

    def point(self, lut: Sequence[int], mode: str | None = None) -> Image.Image:
        return self._new(self.im.point(lut, mode)) if isinstance(lut, list) else super().point(lut, mode)

    def _new(self, im) -> Image.Image:
        new = super()._new(im)
        new.__class__ = _Quick
        return new


def to_pil(pixels: Tensor) -> Image.Image:
    """Make a Pillow image of uint8 [3, H, W], fastest where it is stored [H, W, 3]."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.__class__ = _Quick
    return image


class EncodedImage:
    """An image file's content, of which the header is read, and the pixels when they are asked for.

    They are those of `load_rgb`: torchvision decodes plain three-component JPEGs to the same ones, and Pillow what
    remains, with whatever is suspicious, so that it refuses what it refuses there. Raises InputError, naming the image.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name
        with reading(name):
            self.header = Image.open(BytesIO(data), formats=FORMATS)

    @property
    def size(self) -> tuple[int, int]:
        """Give width and height."""
        return self.header.size

    def decode(self) -> Tensor:
        """Give the pixels, uint8 [3, H, W]."""
        if self.header.format == "JPEG" and self.header.mode == "RGB" and self.data.endswith(END):
            try:
                return decode_jpeg(torch.frombuffer(bytearray(self.data), dtype=torch.uint8), ImageReadMode.RGB)
            except RuntimeError:
                pass  # Pillow says why, or that it can
        with reading(self.name):
            return _by_pixels(self.header.convert("RGB"))

    def decode_reduced(self, scale: int) -> Image.Image:
        """Give a JPEG at 1/`scale` (1, 2, 4 or 8) of its width and height, rounded up.

        A JPEG's blocks can be decoded so, in less time. This uses the header up.
        """
        width, height = self.size
        with reading(self.name):
            self.header.draft("RGB", (width // scale, height // scale))
            return self.header.convert("RGB")

    @property
    def can_reduce(self) -> bool:
        return self.header.format == "JPEG" and self.header.mode in ("RGB", "L")
