"""Rules that the repository keeps as a whole. Flags have theirs in test_flags.py, and the README in test_readme.py."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}
SCRIPTS = ("main", "predict", "export", "compare", "prepare", "speed_test", "folder2lmdb", "run_with_submitit")
# which of our modules each part may import
ALLOWED = {
    "util": {"util"},
    "models": {"models", "util"},
    "data": {"data", "util"},
    "losses.py": set(),
    "hubconf.py": {"models"},
    "engine.py": {"util"},
    "datasets.py": {"data", "util"},
}


def sources() -> dict[str, Path]:
    """Return the product's Python files, by their path in the repository."""
    paths = [path for folder in (".", "util", "models", "data") for path in sorted((ROOT / folder).glob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path for path in paths}


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_requirements_are_pinned_and_are_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-extra.txt").read_text()
    required = set()
    for line in lines.splitlines():
        name, pinned, version = line.partition("==")
        if not line.startswith("#"):
            assert pinned and version, line
            required.add(MODULES.get(name, name))
    ours = {Path(name).parts[0].removesuffix(".py") for name in sources()}
    used = set().union(*(imported(path) for path in sources().values()))
    assert used - required - ours - set(sys.stdlib_module_names) == {
        "safetensors",
        "huggingface_hub",
        "yaml",
    }  # which timm requires
    # scipy is for torchvision, einops for models of timm, the others are for torch's exporter
    assert required - used <= {"scipy", "einops", "onnx", "onnxscript"}


def test_pins_are_in_the_ranges_of_pyproject():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, dependencies)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == ranges.keys()
    assert all(version in ranges[name] for name, version in pins.items())


def test_imports_run_one_way():
    ours = {Path(name).parts[0].removesuffix(".py") for name in sources()}
    for name, path in sources().items():
        top = Path(name).parts[0]
        if top in ALLOWED:
            assert imported(path) & ours <= ALLOWED[top], name


def test_one_file_knows_processes_and_devices():
    pattern = re.compile(r"\bdist\.\w+\(|torch\.distributed|torch\.cuda\.|\.cuda\(")
    for name, path in sources().items():
        if name != "util/distributed.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not pattern.search(line), f"{name}:{number}: {line}"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_only_scripts_and_their_flags_know_the_namespace():
    # command.py reads the flags that it adds itself
    allowed = {*(f"{script}.py" for script in SCRIPTS), "util/options.py", "util/data_options.py", "util/command.py"}
    for name, path in sources().items():
        if name not in allowed:
            for node in functions(path):
                assert "Namespace" not in ast.unparse(node.args), f"{name}: {node.name}"


def test_files_and_functions_stay_short():
    for folder, most in (("util", 18), ("data", 6)):
        assert len(list((ROOT / folder).glob("*.py"))) <= most, folder
    for name, path in sources().items():
        assert path.read_text().count("\n") <= 400, name
        for node in functions(path):
            assert node.end_lineno - node.lineno + 1 <= 70, f"{name}: {node.name}"


@pytest.mark.slow
def test_importing_everything_warns_of_nothing_deprecated():
    code = f"import {', '.join(SCRIPTS)}, models, hubconf"
    command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning:timm", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_names_the_machine_it_was_written_on():
    command = ["git", "grep", "-nIE", r"\.\./shared|/work/|/root/", "--", ".", ":!tests/test_repository.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # 1: nothing was found; an archive of the files is no repository
    assert done.stdout == "" and (done.returncode == 1 or not (ROOT / ".git").exists())
