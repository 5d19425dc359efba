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

# One model of each class
MODELS = ["dhvt_tiny_cifar_patch4", "deit_tiny_patch16_shrink_base"]
OTHERS = [name for name in timm.list_models(module=["dhvt", "evit"]) if name not in MODELS]

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
CNNS = timm.list_models("*_cifar", module="baselines")
CNN_TESTS = [name.removesuffix("_non_std") for name in TESTS] + ["test_model_forward_features"]

# Selects tests by function and parameter: words of a -k expression match the names of folders too
CONFTEST = """
import os

def pytest_collection_modifyitems(items):
    models, tests = (os.environ[name].split() for name in ("CONTRACT_MODELS", "CONTRACT_TESTS"))
    chosen = [item for item in items if item.originalname in tests and hasattr(item, "callspec")]
    items[:] = [item for item in chosen if set(models).intersection(item.callspec.params.values())]
"""


def fetch() -> Path:
    """Fetch timm's source distribution with pip unless it is there, and check that it is the expected one."""
    assert timm.__version__ == VERSION, "the tests are those of another version: change both together"
    sdist = CACHE / f"timm-{VERSION}.tar.gz"
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm"]
        command += [f"--dest={CACHE}", f"timm=={VERSION}"]
        pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert pip.returncode == 0, f"pip cannot fetch timm's own tests: {pip.stderr}"
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == SHA256
    return sdist


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
        for name, ours in {
            "NON_STD_FILTERS": ["dhvt*", "cct*"],
            "FEAT_INTER_FILTERS": ["baselines", "dhvt", "evit"],
        }.items():
            head, opening, tail = text.partition(f"\n{name} = [\n")
            assert opening, f"timm's tests no longer assign {name}"
            text = f"{head}\n{name} = {ours!r} + [\n{tail}"
        (CACHE / "conftest.py").write_text(CONFTEST)
        path = CACHE / "test_timm_models.py"
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    "names, tests",
    [
        pytest.param(MODELS, TESTS, id="one each"),
        pytest.param(OTHERS, TESTS, id="others", marks=pytest.mark.slow),
        pytest.param(["cct_7_3x1_32"], TESTS, id="CCT", marks=pytest.mark.slow),
        pytest.param(CNNS, CNN_TESTS, id="CNNs", marks=pytest.mark.slow),
    ],
)
def test_models_pass_timms_own_tests(names, tests, timm_tests, tmp_path):
    """In a process of their own, where timm's tests may set torch's global switches."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"CONTRACT_MODELS": " ".join(names), "CONTRACT_TESTS": " ".join(tests)}
    report = tmp_path / "report.xml"
    # none of this repository's pytest options: an empty configuration
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={CACHE}", "-p", "no:cacheprovider"]
    command += ["-p", "models", f"--junitxml={report}", "--disable-warnings", "--quiet", str(timm_tests)]
    result = subprocess.run(command, env=env, cwd=CACHE, capture_output=True, text=True, timeout=1200)
    cases = list(ET.parse(report).iter("testcase"))
    ran = sorted(case.get("name").partition("[")[0] for case in cases)
    assert ran == sorted(tests * len(names)), result.stdout[-2000:]
    assert [case.get("name") for case in cases if len(case)] == [], result.stdout[-2000:]
