"""prepare.py on a DomainNet made by hand."""

from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

import prepare

TRAIN = """clipart/ant/clipart_001_000001.jpg 0
clipart/ant/a second one.jpg 0
clipart/The Eiffel Tower/clipart_300_000001.jpg 1
"""
TEST = "clipart/The Eiffel Tower/clipart_300_000002.jpg 1\nclipart/ant/clipart_001_000002.jpg 0\n"


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a folder with an unpacked archive of five images in two classes, and its lists."""
    folder = tmp_path / "downloads"
    for line in (TRAIN + TEST).splitlines():
        file = folder / line[: line.rindex(" ")]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line)
    (folder / "clipart_train.txt").write_text(TRAIN)
    (folder / "clipart_test.txt").write_text(TEST)
    return folder


def call(root: Path, out: Path) -> int:
    return prepare.main(["domainnet", str(root), "--set", "clipart", "--out", str(out)])


def test_lists_become_class_folders_of_links(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("new/clipart")
    assert call(Path("downloads"), out) == 0
    for split, text in (("train", TRAIN), ("val", TEST)):
        samples = ImageFolder(out / split, is_valid_file=lambda _: True).samples
        assert sorted(Path(path).read_text() for path, _ in samples) == sorted(text.splitlines())
        for path, _ in samples:
            line = Path(path).read_text()
            assert Path(path).samefile(root / line[: line.rindex(" ")])
            assert Path(path).parent.name == line.split("/")[1]
    # the paper's numbers, of which these five images fall short
    text = capsys.readouterr().out
    assert "3 training and 2 validation images of 2 classes" in text and "Warning" in text
    assert all(number in text for number in ("33525", "14604", "345"))


def test_the_papers_numbers_pass_without_a_warning(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare.SIZES, "clipart", (3, 2, 2))
    assert call(root, tmp_path / "out") == 0
    assert "Warning" not in capsys.readouterr().out
    cleaned = {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "real": 172947}
    for name, total in (cleaned | {"sketch": 69128}).items():  # as the authors of DomainNet state them
        assert name == "clipart" or sum(prepare.SIZES[name][:2]) == total


BAD = {
    "missing file": (TRAIN + "clipart/ant/none.jpg 0\n", "line 4", "none.jpg is missing", "unpack"),
    "second label": (TRAIN + "clipart/ant/a second one.jpg 1\n", "line 4", "ant"),
    "second class": (TRAIN.replace("jpg 1", "jpg 0"), "line 3", "The Eiffel Tower"),
    "no label": (TRAIN.replace(".jpg 1", ".jpg"), "line 3", "LABEL"),
    "another list": ("ant.jpg 0\n", "line 1", "LABEL"),
}


@pytest.mark.parametrize("row", BAD)
def test_a_wrong_list_is_one_line_and_makes_nothing(root, tmp_path, capsys, row):
    text, *parts = BAD[row]
    (root / "clipart_train.txt").write_text(text)
    assert call(root, tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("prepare.py: error: ") and all(part in error for part in ["clipart_train.txt", *parts])
    assert not (tmp_path / "out").exists()


def test_labels_agree_between_the_lists(root, tmp_path, capsys):
    (root / "clipart_test.txt").write_text(TEST.replace("jpg 1", "jpg 2"))
    assert call(root, tmp_path / "out") == 2
    assert "clipart_test.txt, line 1: The Eiffel Tower" in capsys.readouterr().err


def test_a_missing_list_and_an_existing_folder_are_one_line(root, tmp_path, capsys):
    assert call(root, root) == 2 and "exists already" in capsys.readouterr().err
    (root / "clipart_test.txt").unlink()
    assert call(root, tmp_path / "out") == 2
    assert "clipart_test.txt: no such list" in capsys.readouterr().err
