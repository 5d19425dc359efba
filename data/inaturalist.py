"""The lists of iNaturalist 2018 and 2019 (https://github.com/visipedia/inat_comp): images and classes of a split."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from util.config import INATURALIST
from util.errors import InputError


def list_file(root: Path, name: str, train: bool) -> Path:
    """Return the file that lists a split of the data set `name`."""
    split = "train" if train else "val"
    return root / f"{split}{INATURALIST[name]}.json"


@contextmanager
def _name_errors(path: Path) -> Iterator[None]:
    """Turn an error from a list's content into an InputError that names the list."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data-path takes the folder with iNaturalist's lists") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        remedy = "download all lists again, from one release"
        raise InputError(f"{path}: damaged, incomplete or at odds with the other lists ({reason}); {remedy}") from None


def _read(path: Path) -> Any:
    with _name_errors(path):
        return json.loads(path.read_bytes())


def _read_classes(path: Path, category: str) -> dict[int, str]:
    """Return {category id: class}, named by the field `category` of categories.json."""
    categories = _read(path)
    with _name_errors(path):
        # a list, indexed by category id
        if category not in categories[0]:
            raise InputError(f"--inat-category {category}: {path} has {', '.join(categories[0])}")
        return {i: str(entry[category]) for i, entry in enumerate(categories)}


def read_split(
    root: Path,
    name: str,
    train: bool,
    category: str,
    class_to_idx: dict[str, int] | None = None,
) -> tuple[list[str], list[int], list[str]]:
    """Return the image files of a split, below `root`, their class numbers and the class names.

    Classes are numbered by `class_to_idx`, by default in the order of the training list's annotations. Raises
    InputError, which names the file, for lists that are missing, damaged, incomplete or at odds with each other.
    """
    path = list_file(root, name, train)
    content = _read(path)
    names = _read_classes(root / "categories.json", category)

    # number the classes by first appearance
    if class_to_idx is None:
        train_path = list_file(root, name, train=True)
        # It has some 100 MB: it is not read twice.
        train_content = content if train else _read(train_path)
        with _name_errors(train_path):
            class_to_idx = {}
            for annotation in train_content["annotations"]:
                class_to_idx.setdefault(names[annotation["category_id"]], len(class_to_idx))

    # label the images
    files = []
    files_without_group = []
    targets = []
    # the paths of both layouts; the first image then shows which layout this is
    with _name_errors(path):
        for image in content["images"]:
            # for example train_val2018/Aves/3210/0a1b.jpg, and nothing outside the data set's folder
            parts = image["file_name"].replace("\\", "/").split("/")
            if {"", ".", ".."}.intersection(parts):
                raise ValueError(f"{image['file_name']!r} is not FOLDER/GROUP/ID/IMAGE")
            folder, _, number, file = parts
            files.append(image["file_name"])
            files_without_group.append(f"{folder}/{number}/{file}")
            targets.append(class_to_idx[names[int(number)]])

        # The official archives have group folders, DeiT's layout has none.
        for candidates in (files, files_without_group):
            if (root / candidates[0]).is_file():
                return candidates, targets, list(class_to_idx)
    raise InputError(f"{root / files[0]}: no such image; unpack the images of {path.name} in {root}")
