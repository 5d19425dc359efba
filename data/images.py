"""Image files: their class folders, their pixels, and data sets of them."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import folder
from torchvision.io import ImageReadMode, decode_jpeg

from util.distributed import print0
from util.errors import InputError

EXTENSIONS = folder.IMG_EXTENSIONS

# by default Pillow opens whatever it recognizes, and for some formats it starts other programs
PIL_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

JPEG_END = b"\xff\xd9"


def describe_names(names: Sequence[str]) -> str:
    """Return the first names and how many there are: "ant, bee, cat, dog, eel, …, 100 in all"."""
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])}, …, {len(names)} in all"


def find_classes(root: Path, class_to_idx: dict[str, int] | None = None) -> dict[str, int]:
    """Return the numbers of the classes of `root`/CLASS/ by name.

    A training set's `class_to_idx` is returned unchanged, after a check that it contains all classes found. Raises
    InputError for a missing folder, fewer than two class folders, and an unknown class.
    """
    if not root.is_dir():
        raise InputError(
            f"{root}: no such folder; give the folder above it to --data-path, and its name to --train-split or "
            "--val-split; without a validation folder, hold images out with --val-fraction 0.1"
        )
    try:
        classes, _ = folder.find_classes(root)
    except FileNotFoundError:
        # often a flat val/, as ImageNet's archive and Tiny-ImageNet have it
        raise InputError(f"{root}: no class folders in it; move the images to {root.name}/CLASS/") from None
    # such as .ipynb_checkpoints
    classes = [name for name in classes if not name.startswith(".")]
    if class_to_idx is None:
        if len(classes) < 2:
            raise InputError(f"{root}: fewer than two class folders ({', '.join(classes)}); add {root.name}/CLASS/")
        return {name: i for i, name in enumerate(classes)}
    for name in classes:
        if name not in class_to_idx:
            # no model can predict this class: all its images would count as errors
            known = describe_names(list(class_to_idx))
            raise InputError(f"{root / name}: not a training class ({known}); rename or remove this folder")
    return class_to_idx


def list_images(root: Path, class_to_idx: dict[str, int]) -> tuple[list[str], list[int]]:
    """Return the image files of `root`/CLASS/ and below, in torchvision's order, and their labels.

    Prints how many other files there are. Raises InputError for a class folder without images.
    """
    # other files by extension, or by name if they have none
    ignored = Counter()

    def is_image(path: str) -> bool:
        extension = os.path.splitext(path)[1].lower()
        if extension in EXTENSIONS:
            return True
        # GIFs too: torchvision does not list them
        ignored[extension or os.path.basename(path)] += 1
        return False

    samples = folder.make_dataset(root, class_to_idx, is_valid_file=is_image, allow_empty=True)
    files = [path for path, _ in samples]
    labels = [label for _, label in samples]

    # a validation set may lack a class, but an empty class folder is a mistake
    present = set(labels)
    extensions = ", ".join(EXTENSIONS)
    for name in sorted(class_to_idx):
        if class_to_idx[name] not in present and (root / name).is_dir():
            raise InputError(f"{root / name}: no images in it ({extensions}); add some or remove this folder")

    if ignored:
        counts = ", ".join(f"{count} {name}" for name, count in ignored.most_common(5))
        print0(f"{root}: {ignored.total()} files are ignored ({counts}); images are {extensions}")
    return files, labels


def find_images(source: str | Path) -> list[str]:
    """Return a file, whatever its name ends in, or the images in a folder and its subfolders. Raises InputError."""
    path = Path(source)
    if path.is_file():
        return [str(path)]
    # with the folders that are links, as in training
    files = [Path(root, name) for root, _, names in os.walk(path, followlinks=True) for name in names]
    images = sorted(file for file in files if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not images:
        raise InputError(f"{path}: no such file, or no images in it ({', '.join(EXTENSIONS)})")
    return [str(file) for file in images]


@contextmanager
def _name_errors(name: str) -> Iterator[None]:
    """Raise InputError with the image's name for what goes wrong inside."""
    try:
        # Pillow warns of metadata and transparency, which are not used here
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file, but it was listed at start-up; put it back") from None
    # Pillow raises TypeError for some damaged TIFFs
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        # without the address of the stream that Pillow was reading
        reason = str(error).partition(" <")[0]
        raise InputError(f"{name}: not a readable image ({reason}); replace or remove it") from None


def read_file(path: str) -> bytes:
    """Return an image file's content; raises InputError that names it."""
    with _name_errors(path), open(path, "rb") as file:
        return file.read()


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Return an image as RGB, decoded by Pillow; raises InputError with its `name`."""
    with _name_errors(name):
        image = Image.open(BytesIO(data), formats=PIL_FORMATS)
        # the range of 32-bit pixels is not known, and Pillow would clip them
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("32 bits per pixel, where 8 and 16 can be read")
        # 16-bit grey: Pillow would clip all values above 255
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
        return image.convert("RGB")


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return uint8 pixels [H, W, 3] as a uint8 tensor [3, H, W]; unlike torchvision's ToTensor, it does not scale."""
    return torch.from_numpy(pixels).permute(2, 0, 1)  # 3, H, W


@dataclass
class EncodedImage:
    """An image file's content that is not decoded yet, and its name for error messages."""

    data: bytes
    name: str

    def decode(self) -> Tensor:
        """Return the pixels of `decode_rgb` as uint8 [3, H, W]; raises InputError with the image's name."""
        with _name_errors(self.name):
            header = Image.open(BytesIO(self.data), formats=PIL_FORMATS)
        # torchvision decodes RGB JPEGs to the same pixels in less time, but cut ones without an error
        if header.format == "JPEG" and header.mode == "RGB" and self.data.endswith(JPEG_END):
            try:
                content = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
                return decode_jpeg(content, ImageReadMode.RGB)
            except RuntimeError:
                # Pillow reads it nevertheless, or says what is wrong
                pass
        return to_tensor(np.array(decode_rgb(self.data, self.name)))


# what data sets hand to their transforms; an array is uint8 [H, W, 3]
Source = EncodedImage | np.ndarray


def apply_transform(transform: Callable | None, image: Source) -> Tensor | Image.Image:
    """Return the transformed image.

    A transform with `takes_encoded` gets the Source, others a PIL image, which is returned if there is no transform.
    """
    if getattr(transform, "takes_encoded", False):
        return transform(image)
    if isinstance(image, EncodedImage):
        image = decode_rgb(image.data, image.name)
    else:
        image = Image.fromarray(image)
    return image if transform is None else transform(image)


@dataclass
class ImageFiles(Dataset):
    """Image files with their labels, which are indices of `classes`, or all -1 if `targets` is None."""

    files: Sequence[str]
    targets: Sequence[int] | None
    classes: list[str]
    transform: Callable | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files[index]
        image = EncodedImage(read_file(path), path)
        target = -1 if self.targets is None else self.targets[index]
        return apply_transform(self.transform, image), target


@dataclass
class ImageArray(Dataset):
    """Images in memory, `data` uint8 [N, H, W, 3], with their labels."""

    data: np.ndarray
    targets: Sequence[int]
    classes: list[str]
    transform: Callable | None
    files = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return apply_transform(self.transform, self.data[index]), self.targets[index]
