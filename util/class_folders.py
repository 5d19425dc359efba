"""Folders of images, one a class, in the order of torchvision's ImageFolder, and without importing it."""

import os
from collections.abc import Sequence
from pathlib import Path

from util.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's

# Pillow would open whatever it knows by its content; for some formats it starts other programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def find_classes(root: Path, class_map: dict[str, int] | None = None) -> tuple[list[str], dict[str, int]]:
    """Number the class folders of `root` in the order of their names, or check them against `class_map`."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data-path takes the folder that holds train/ and val/")
    found = sorted(e.name for e in os.scandir(root) if e.is_dir())
    if not found:
        raise InputError(f"{root}: no class folders in it; images belong into {root.name}/CLASS/")
    if class_map is None:
        return found, {name: i for i, name in enumerate(found)}
    for name in class_map:
        if (root / name).is_file():
            raise InputError(f"{root / name}: a file, and a training class has that name; put the class's folder there")
    unknown = [name for name in found if name not in class_map]
    if unknown:
        raise InputError(
            f"{root / unknown[0]}: not among the {len(class_map)} training classes ({some(list(class_map))}); "
            "rename or remove it"
        )
    return list(class_map), dict(class_map)


def some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["…"] if len(names) > 5 else [])])


def empty_class(folder: Path) -> InputError:
    return InputError(
        f"{folder}: no images in this class folder (looked for {', '.join(EXTENSIONS)}); fill or remove it"
    )


def list_images(root: Path, class_map: dict[str, int]) -> list[tuple[str, int]]:
    """List paths below `root` and labels of all images, those in folders of a class's folder too."""
    images = []
    for name in sorted(class_map):
        before = len(images)
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            below = os.path.relpath(folder, root)
            images += [
                (os.path.join(below, f), class_map[name]) for f in sorted(files) if f.lower().endswith(EXTENSIONS)
            ]
        if len(images) == before and (root / name).is_dir():
            raise empty_class(root / name)
    return images
