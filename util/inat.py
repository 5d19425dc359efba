"""The lists of iNaturalist 2018 and 2019: which image files a split has, and of which class each is."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import InputError

YEARS = {"INAT": 2018, "INAT19": 2019}


class Split(NamedTuple):
    """The files of a split below its root, their classes by number, and the classes' names in that numbering."""

    files: list[str]
    targets: list[int]
    classes: list[str]


def find_list(root: Path, name: str, train: bool) -> Path:
    """Give the file that lists a split of the data set `name`."""
    return root / f"{'train' if train else 'val'}{YEARS[name]}.json"


def read_split(root: Path, name: str, train: bool, rank: str, class_to_idx: Mapping[str, int] | None = None) -> Split:
    """Read one split; a class is what categories.json has under `rank` for a category.

    Classes are numbered by `class_to_idx`, else by first appearance in the training list's annotations. Only the first
    image is looked for, to tell the published layout (a/c/d for a file_name a/b/c/d) from the archives' (a/b/c/d).
    Raises InputError, naming the file, for lists that are missing, damaged, incomplete or at odds with each other.
    """
    path, training = find_list(root, name, train), find_list(root, name, True)
    categories = root / "categories.json"
    find_class = partial(_find_class, categories, _read(categories, list), rank)
    lists = _read(path, dict)
    if class_to_idx is None:
        numbering = lists if train else _read(training, dict)
        ids = enumerate(_column(training, numbering, "annotations", "category_id"))
        names = dict.fromkeys(find_class(c, f"{training}: annotation {i}") for i, c in ids)
        class_to_idx = {c: k for k, c in enumerate(names)}

    files, targets = [], []
    for i, file_name in enumerate(_column(path, lists, "images", "file_name")):
        parts = file_name.split("/") if isinstance(file_name, str) else []
        if len(parts) != 4 or not {"", ".", ".."}.isdisjoint(parts) or "\\" in file_name or not _is_id(parts[2]):
            raise InputError(
                f"{path}: image {i} has file_name {file_name!r}, not of the form folder/group/ID/image.jpg"
            )
        found = find_class(int(parts[2]), f"{path}: image {i}")
        if found not in class_to_idx:
            raise InputError(
                f"{path}: {file_name} is of class {found!r}, not among the {len(class_to_idx)} training classes; "
                "take both lists from one release"
            )
        files.append(file_name)
        targets.append(class_to_idx[found])
    return Split(_place(root, path, files), targets, list(class_to_idx))


def _read(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: {reason}; --data-path takes the folder with iNaturalist's lists") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not JSON ({error}); download it again") from None
    if not isinstance(content, kind):
        shape = {list: "a list", dict: "an object"}[kind]
        raise InputError(f"{path}: not {shape} but {type(content).__name__}; download it again")
    return content


def _column(path: Path, content: dict, table: str, key: str) -> list:
    rows = content.get(table)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: no {table!r} in it; download it again")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or key not in row:
            raise InputError(f"{path}: no {key!r} in {table!r}, entry {i}; download it again")
    return [row[key] for row in rows]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _find_class(path: Path, categories: list, rank: str, category: object, where: str) -> str:
    """Give what `categories`, the content of `path`, have under `rank` for a category id that came from `where`."""
    if type(category) is not int or not 0 <= category < len(categories):
        raise InputError(f"{where} is of category {category!r}, and {path.name} has {len(categories)}, from 0")
    entry = categories[category]
    if not isinstance(entry, dict):
        raise InputError(f"{path}: category {category} is {type(entry).__name__}, not an object; download it again")
    if not isinstance(entry.get(rank), str):
        offered = ", ".join(key for key, value in entry.items() if isinstance(value, str))
        raise InputError(f"{path}: category {category} has no {rank!r}; --inat-category can be one of: {offered}")
    return entry[rank]


def _place(root: Path, path: Path, names: list[str]) -> list[str]:
    """Turn each file_name into where its file lies below `root`."""

    def drop_group(name: str) -> str:
        a, _, c, d = name.split("/")
        return f"{a}/{c}/{d}"

    if (root / names[0]).is_file():
        return names
    if not (root / drop_group(names[0])).is_file():
        raise InputError(
            f"{root / names[0]}: no such image, nor {drop_group(names[0])}, though {path.name} lists it; "
            "unpack the images into --data-path"
        )
    return [drop_group(name) for name in names]
