"""CIFAR and iNaturalist, on small files of the real formats."""

import hashlib
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.transforms.functional import center_crop

import datasets
import main
from data import inaturalist
from util.config import TORCHVISION_SETS, AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError

# CIFAR

NAMES = {"CIFAR": [f"fine {i}" for i in range(100)], "CIFAR-10": [f"thing {i}" for i in range(10)]}
TEN = TORCHVISION_SETS["CIFAR-10"].cls
URL = TEN.url

Split = tuple[np.ndarray, list[int]]  # images, uint8 [N, 32, 32, 3], and labels


@pytest.fixture
def write_cifar(monkeypatch) -> Callable[[str, Path], tuple[Split, Split]]:
    """Return a function that writes a small CIFAR, has torchvision take its checksums, and returns train and test."""

    def write(name: str, root: Path) -> tuple[Split, Split]:
        rng = np.random.default_rng(0)
        cifar = TORCHVISION_SETS[name].cls
        folder = root / cifar.base_folder
        folder.mkdir(parents=True)

        def write_file(file: str, content: dict) -> list[str]:
            data = pickle.dumps(content, protocol=2)
            (folder / file).write_bytes(data)
            return [file, hashlib.md5(data).hexdigest()]

        def write_split(files: list[str], attribute: str) -> Split:
            pixels = rng.integers(0, 256, (len(files), 8, 3, 32, 32), dtype=np.uint8)
            labels = rng.integers(0, len(NAMES[name]), (len(files), 8)).tolist()
            key = "fine_labels" if name == "CIFAR" else "labels"
            contents = [{"data": pixels[i].reshape(8, -1), key: labels[i]} for i in range(len(files))]
            monkeypatch.setattr(cifar, attribute, list(map(write_file, files, contents)))
            return pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3), sum(labels, [])

        train = write_split([file for file, _ in cifar.train_list], "train_list")
        test = write_split([file for file, _ in cifar.test_list], "test_list")
        _, md5 = write_file(cifar.meta["filename"], {cifar.meta["key"]: NAMES[name]})
        monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5})
        return train, test

    return write


@pytest.mark.parametrize("name", NAMES)
def test_cifar_is_one_array_of_the_files_pixels_and_labels(write_cifar, tmp_path, name):
    written = write_cifar(name, tmp_path)
    for train, (pixels, labels) in zip((True, False), written, strict=True):
        found = datasets.load_named(name, tmp_path, train, None)
        np.testing.assert_array_equal(found.data, pixels)
        assert found.targets == labels and found.classes == NAMES[name] and len(found) == len(labels)
        image, target = found[5]
        assert (np.asarray(image) == pixels[5]).all() and target == labels[5]


@pytest.mark.parametrize(("side", "crop"), [(32, "RandomCrop"), (48, "RandomResizedCropAndInterpolation")])
def test_cifar_is_cropped_and_resized_except_at_32_pixels(write_cifar, tmp_path, side, crop):
    _, (pixels, _) = write_cifar("CIFAR", tmp_path)
    config = ModelConfig("", input_size=(side, side))
    data = DataConfig("CIFAR", str(tmp_path))
    train = datasets.build_train_set(data, config, AugmentConfig())
    assert type(train.transform.reference.transforms[0]).__name__ == crop
    assert train[0][0].shape == (3, side, side) and train.classes == NAMES["CIFAR"]
    expected = Image.fromarray(pixels[2])
    if side != 32:
        expected = center_crop(expected.resize([int(side / 0.875)] * 2, Image.Resampling.BICUBIC), side)
    found = datasets.build_val_set(data, config)[2][0]
    assert (found.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


@pytest.fixture
def far(monkeypatch, write_cifar, tmp_path) -> Iterator[Path]:
    """Return a small CIFAR-10 as an archive that torchvision would download from this machine."""
    folder = tmp_path / "far"
    write_cifar("CIFAR-10", folder)
    archive = folder / "far.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / TEN.base_folder, TEN.base_folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(TEN, "url", f"http://127.0.0.1:{server.server_port}/far.tar.gz")
        monkeypatch.setattr(TEN, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield archive
        server.shutdown()


def load_ten(root: Path, train: bool = True) -> int:
    """Return how many images CIFAR-10 has."""
    return len(datasets.load_named("CIFAR-10", root, train, None))


def test_cifar_is_downloaded_on_first_use_and_an_archive_in_place_is_taken(far, tmp_path):
    root = tmp_path / "here" / "cifar"
    assert load_ten(root) == 40
    far.unlink()
    assert load_ten(root, train=False) == 8  # without another download
    for path in (root / TEN.base_folder).iterdir():
        path.unlink()
    assert load_ten(root, train=False) == 8  # from the archive that was kept


def test_the_others_wait_until_rank_0_has_downloaded(monkeypatch, far, tmp_path):
    root = tmp_path / "here"
    waited = []

    def finish_rank_0(_: object) -> None:
        waited.append(root.exists())
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: False)
            load_ten(root)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    # it returns when rank 0 is done
    monkeypatch.setattr(dist, "barrier", finish_rank_0)
    assert load_ten(root) == 40 and waited == [False]


@pytest.mark.parametrize("damaged", ["data_batch_2", "batches.meta", "far.tar.gz", "nothing"])
def test_a_damaged_or_unreachable_cifar_says_what_to_put_where(far, tmp_path, damaged):
    root = far.parent if damaged in ("data_batch_2", "batches.meta") else tmp_path / "here"
    for path in far.parent.rglob(damaged):
        path.write_bytes(path.read_bytes()[:-1])
    if damaged != "far.tar.gz":
        far.unlink()
    with pytest.raises(InputError) as caught:
        load_ten(root)
    line = str(caught.value)
    assert line.startswith(f"{root / 'cifar-10-python.tar.gz'}: ") and f"put {URL} there" in line
    assert "\n" not in line and "download=True" not in line


# iNaturalist

CATEGORIES = [
    {"kingdom": "Animalia", "supercategory": "Birds", "name": "Parus major"},
    {"kingdom": "Animalia", "supercategory": "Insects", "name": "Pieris"},
    {"kingdom": "Plantae", "supercategory": "Plants", "name": "Rosa"},
    {"kingdom": "Animalia", "supercategory": "Birds", "name": "Strix aluco"},
]
# categories in the order of the annotations, and in that of the images
ANNOTATED = {"train": [2, 0, 3, 0, 1, 2], "val": [1, 3, 0, 2]}
SHOWN = {"train": [3, 2, 2, 1, 0, 0], "val": [0, 1, 2, 3]}
# names by first appearance in the annotations of training, and the targets of SHOWN
EXPECTED = {
    "name": (["Rosa", "Parus major", "Strix aluco", "Pieris"], [2, 0, 0, 3, 1, 1], [1, 3, 0, 2]),
    "kingdom": (["Plantae", "Animalia"], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1]),
}


def write_inat(root: Path, year: int = 2018, official: bool = True) -> Path:
    """Write lists and plain images, whose red is 20 times their number, in the official layout or DeiT's."""
    root.mkdir()
    (root / "categories.json").write_text(json.dumps(CATEGORIES))
    for split, shown in SHOWN.items():
        images = []
        for i, category in enumerate(shown):
            group = CATEGORIES[category]["supercategory"]
            file = f"train_val{year}/{group}/{category}/{split}{i}.png"
            images.append({"id": 100 + i, "file_name": file})
            path = root / (file if official else file.replace(f"{group}/", ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (20 * i, 0, 0)).save(path)
        annotations = [{"image_id": 100, "category_id": category} for category in ANNOTATED[split]]
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.mark.parametrize(
    ("name", "year", "category", "official"),
    [("INAT", 2018, "name", True), ("INAT", 2018, "kingdom", False), ("INAT19", 2019, "name", False)],
)
def test_inaturalist_is_numbered_by_first_appearance_in_training(tmp_path, name, year, category, official):
    root = write_inat(tmp_path / "data", year, official)
    data = DataConfig(name, str(root), inat_category=category)
    classes, *targets = EXPECTED[category]
    for train, expected in zip((True, False), targets, strict=True):
        found = datasets.build_dataset(data, train, ModelConfig(""), None)
        assert found.classes == classes and found.targets == expected
        shown = [(image.getpixel((5, 5))[0], target) for image, target in found]
        assert shown == [(20 * i, target) for i, target in enumerate(expected)]


def test_inaturalist_trains_and_evaluates_without_the_training_list_too(tiny_flags, tmp_path, capfd):
    root = write_inat(tmp_path / "data")
    saved = tmp_path / "out" / "checkpoint.pth"
    flags = [*tiny_flags, "--data-set", "INAT", "--data-path", str(root), "--batch-size", "2"]
    assert main.main([*flags, "--output_dir", str(saved.parent)]) == 0
    assert torch.load(saved)["classes"] == EXPECTED["name"][0]
    loss = json.loads((saved.parent / "log.txt").read_text())["test_loss"]
    # the checkpoint then numbers the classes
    (root / "train2018.json").unlink()
    assert main.main([*flags, "--eval", "--resume", str(saved)]) == 0
    assert f"loss {loss:.3f}" in capfd.readouterr().out
    assert main.main([*flags, "--inat-category", "kingdom", "--eval", "--resume", str(saved)]) == 2
    assert "val2018.json: damaged, incomplete or at odds" in capfd.readouterr().err


def write_changed_inat(root: Path, part: str, index: int, **values: object) -> Path:
    """Write iNaturalist with a changed entry in train2018.json."""
    path = write_inat(root) / "train2018.json"
    content = json.loads(path.read_text())
    content[part][index].update(values)
    path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("part", "index", "values"),
    [
        ("images", 4, {"file_name": "a/b/0"}),
        ("images", 4, {"file_name": "a/b/x/c.png"}),
        ("images", 4, {"file_name": "/a/0/c.png"}),
        ("images", 4, {"file_name": "a/../0/c.png"}),
        ("images", 4, {"file_name": "a/b/0/..\\c"}),
        ("images", 4, {"file_name": "a/b/-1/c"}),
        ("images", 4, {"file_name": f"a/b/{'1' * 5000}/c.png"}),
        ("annotations", 3, {"category_id": 4}),
        ("annotations", 3, {"category_id": None}),
    ],
)
def test_a_list_at_odds_with_the_others_is_named(tmp_path, part, index, values):
    root = write_changed_inat(tmp_path / "data", part, index, **values)
    with pytest.raises(InputError, match=r"train2018\.json: .*one release"):
        inaturalist.read_split(root, "INAT", True, "name")
