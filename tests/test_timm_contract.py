"""Our models pass timm's own tests: what timm promises of any model in its registry, it promises of these.

The wheel does not carry timm's tests, so pip fetches the source distribution of the pinned version into tests/.timm,
which is not committed.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
from filelock import FileLock

VERSION = "1.0.31"
SHA256 = "baa0b333339c46d3d6d4965d99b69f5053afed71210e8f433d7ea5ee6a18f0ec"
ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(__file__).resolve().parent / ".timm"

# One size of each class; the others differ in numbers only, and are for -m slow
MODELS = ["dhvt_tiny_cifar_patch4", "dhvt_tiny_imagenet_patch16", "deit_tiny_patch16_shrink_base"]

# All that timm has for a model with forward_intermediates whose features are tokens and which FX can follow. Not among
# them: tests for convolutional stages, TorchScript (deprecated in torch) and published weights.
TESTS = [
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
]

# Selects tests by function and parameter: words of a -k expression match the names of folders too
CONFTEST = """
import os

def pytest_collection_modifyitems(items):
    names, tests = os.environ["CONTRACT_MODEL"], os.environ["CONTRACT_TESTS"].split()
    items[:] = [
        item for item in items
        if item.originalname in tests and getattr(item, "callspec", None) and names in item.callspec.params.values()
    ]
"""


def fetch() -> Path:
    """Fetch timm's source distribution with pip unless it is there, and check that it is the expected one."""
    assert timm.__version__ == VERSION, "the tests are those of another version: change both together"
    sdist = CACHE / f"timm-{VERSION}.tar.gz"
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm"]
        command += ["--timeout=10", "--retries=1", f"--dest={CACHE}", f"timm=={VERSION}"]
        pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if pip.returncode:
            pytest.skip(f"pip cannot fetch timm's own tests: {pip.stderr.strip().splitlines()[-1]}")
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == SHA256
    return sdist


def extend_list(text: str, name: str, items: list[str]) -> str:
    """Append items to a list that the text of a module assigns on its top level, right after that list."""
    head, opening, tail = text.partition(f"\n{name} = [\n")
    body, closing, rest = tail.partition("\n]\n")
    assert opening and closing and opening not in rest, f"timm's tests no longer assign {name} once"
    return f"{head}{opening}{body}{closing}{name} += {items!r}\n{rest}"


@pytest.fixture(scope="session")
def timm_tests() -> Path:
    """Return timm's tests/test_models.py with our entries in two of its lists, and nothing else changed.

    The lists say which names are transformers without the spatial features of a convolutional network, and which
    modules have `forward_intermediates`: timm tests what they name the harder for it.
    """
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):
        with tarfile.open(fetch()) as archive:
            text = archive.extractfile(f"timm-{VERSION}/tests/test_models.py").read().decode()
        text = extend_list(text, "NON_STD_FILTERS", ["dhvt*"])
        text = extend_list(text, "FEAT_INTER_FILTERS", ["dhvt", "evit"])
        (CACHE / "conftest.py").write_text(CONFTEST)
        path = CACHE / "test_timm_models.py"
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    "model",
    MODELS
    + [pytest.param(m, marks=pytest.mark.slow) for m in timm.list_models(module=["dhvt", "evit"]) if m not in MODELS],
)
def test_model_passes_timms_own_tests(model, timm_tests, tmp_path):
    """In a process of their own, where timm's tests may set torch's global switches."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"CONTRACT_MODEL": model, "CONTRACT_TESTS": " ".join(TESTS)}
    report = tmp_path / "report.xml"
    # none of this repository's pytest options: an empty configuration
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={CACHE}", "-p", "no:cacheprovider"]
    command += ["-p", "models", f"--junitxml={report}", "--disable-warnings", "--quiet", str(timm_tests)]
    result = subprocess.run(command, env=env, cwd=CACHE, capture_output=True, text=True, timeout=1200)
    cases = list(ET.parse(report).iter("testcase"))
    assert sorted(case.get("name").partition("[")[0] for case in cases) == sorted(TESTS), result.stdout[-2000:]
    assert [case.get("name") for case in cases if len(case)] == [], result.stdout[-2000:]
