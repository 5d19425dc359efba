"""Run timm's own model tests, from the source distribution of the pinned version, on this repository's models.

The wheel does not carry them, so pip fetches the source distribution into tests/.timm, which is not committed.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import timm
from filelock import FileLock

VERSION = "1.0.31"
SHA256 = "baa0b333339c46d3d6d4965d99b69f5053afed71210e8f433d7ea5ee6a18f0ec"
REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = Path(__file__).resolve().parent / ".timm"
SDIST = CACHE / f"timm-{VERSION}.tar.gz"

FETCH_TIMEOUT = 120  # seconds
RUN_TIMEOUT = 500


class CannotFetchError(Exception):
    """pip is not there, or reaches no package index."""


@dataclass
class Outcome:
    """How one of timm's tests ended: "passed", "skipped" or "failed", and why."""

    test: str
    status: str
    reason: str = ""


def fetch() -> Path:
    """Fetch timm's source distribution with pip unless it is there already, and check that it is the expected one."""
    if timm.__version__ != VERSION:
        raise RuntimeError(f"timm is {timm.__version__}, its tests here are those of {VERSION}: change both together")
    if not SDIST.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm"]
        command += ["--timeout=10", "--retries=1", f"--dest={CACHE}", f"timm=={VERSION}"]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise CannotFetchError(f"pip took more than {FETCH_TIMEOUT} seconds") from None
        if pip.returncode:
            raise CannotFetchError(pip.stderr.strip().rpartition("\n")[2])
    digest = hashlib.sha256(SDIST.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{SDIST} has SHA-256 {digest}, not {SHA256}")
    return SDIST


def extend_list(text: str, name: str, items: list[str]) -> str:
    """Append items to a list that the text of a module assigns on its top level, right after that list."""
    head, opening, tail = text.partition(f"\n{name} = [\n")
    body, closing, rest = tail.partition("\n]\n")
    if not opening or not closing or opening in rest:
        raise RuntimeError(f"timm's tests no longer assign {name} once: read them again")
    return f"{head}{opening}{body}{closing}{name} += {items!r}\n{rest}"


def write_tests(non_std_filters: list[str], feat_inter_filters: list[str]) -> Path:
    """Write timm's tests/test_models.py with our entries in two of its lists, and nothing else changed.

    The lists say which names are transformers without the spatial API of a convolutional network, and which modules
    have `forward_intermediates`: timm tests what they name the harder for it.
    """
    with tarfile.open(fetch()) as archive:
        text = archive.extractfile(f"timm-{VERSION}/tests/test_models.py").read().decode()
    text = extend_list(text, "NON_STD_FILTERS", non_std_filters)
    text = extend_list(text, "FEAT_INTER_FILTERS", feat_inter_filters)
    path = CACHE / "test_timm_models.py"
    path.write_text(text)
    return path


def run(keyword: str, non_std_filters: list[str], feat_inter_filters: list[str], report: Path) -> dict[str, list]:
    """Run timm's tests of the models that a `-k` expression selects; return each model's outcomes.

    They run in a process of their own, where importing `models` comes before timm's lists are read, and where timm's
    tests may set torch's global switches. Under pytest-xdist they get one thread, else as many as there are cores.
    """
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):
        path = write_tests(non_std_filters, feat_inter_filters)
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # none of this repository's pytest options: an empty configuration
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={CACHE}", "-p", "no:cacheprovider"]
    command += ["-p", "models", "-k", keyword, f"--junitxml={report}", "--disable-warnings", "--quiet", str(path)]
    pytest = subprocess.run(command, env=env, cwd=CACHE, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    if pytest.returncode not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"timm's tests did not run:\n{pytest.stdout[-3000:]}{pytest.stderr[-3000:]}")
    return read_report(report)


def read_report(report: Path) -> dict[str, list]:
    """Read a JUnit report of tests named `test_x[1-model]` or `test_x[model]`: model -> outcomes."""
    outcomes: dict[str, list] = {}
    for case in ET.parse(report).iter("testcase"):
        test, _, parameters = case.get("name").rstrip("]").partition("[")
        outcome = Outcome(test, "passed")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = Outcome(test, "skipped" if child.tag == "skipped" else "failed", child.get("message", ""))
        outcomes.setdefault(parameters.rpartition("-")[2], []).append(outcome)
    return outcomes
