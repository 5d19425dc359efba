"""Rules that the repository keeps as a whole."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from util import options
from util.errors import InputError

ROOT = Path(__file__).parent.parent
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pytest-xdist": "xdist"}


def sources(tests: bool = True) -> list[Path]:
    """List the Python files that git would take."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    paths = [ROOT / n for n in names] or list(ROOT.glob("*.py")) + list(ROOT.glob("[mtu]*/*.py"))
    return [p for p in paths if p.exists() and (tests or "tests" not in p.relative_to(ROOT).parts)]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_every_requirement_is_pinned_and_imported_somewhere():
    used = {"onnxscript"}.union(*(imported(p) for p in sources()))  # which torch's exporter imports
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-extra.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines:
        name, pinned, version = line.partition("==")
        assert pinned and version, line
        assert MODULES.get(name, name) in used, f"{name} is required and imported nowhere"
    names = {MODULES.get(line.split("==")[0], line.split("==")[0]) for line in lines}
    own = {p.stem for p in ROOT.glob("*.py")} | {"models", "util"}
    ours = set().union(*(imported(p) for p in sources(tests=False)))
    assert ours - names - own - set(sys.stdlib_module_names) == set(), "imported and not required"


def test_only_one_file_speaks_to_the_processes_and_the_device():
    """The visible exception would be engine.py's benchmark, which needs none."""
    pattern = re.compile(r"\bdist\.\w+\(|torch\.distributed|torch\.cuda\.|\.cuda\(")
    for path in sources(tests=False):
        if path.name != "distributed.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not pattern.search(line), f"{path.name}:{number}: {line}"


def test_imports_run_one_way():
    allowed = {
        "util": {"util"},
        "models": {"models"},
        "engine.py": {"util"},
        "builders.py": {"util", "models"},
        "datasets.py": {"util"},
        "folder2lmdb.py": {"util"},
        "main.py": {"util", "builders", "engine", "datasets", "training"},
        "training.py": {"util", "builders", "engine", "datasets", "losses"},
        "losses.py": set(),
        "trained.py": {"util", "builders", "datasets"},
        "export.py": {"util", "trained"},
        "predict.py": {"util", "builders", "datasets", "trained"},
        "hubconf.py": {"models"},
        "run_with_submitit.py": {"util", "main", "run_with_submitit"},
        "speed_test.py": {"util", "builders", "datasets", "engine"},
    }
    own = {p.stem for p in ROOT.glob("*.py")} | {"models", "util"}
    for path in sources(tests=False):
        top = path.relative_to(ROOT).parts[0]
        assert imported(path) & own <= allowed[top], path


def test_importing_everything_warns_of_nothing_deprecated():
    code = "import main, models, training, engine, datasets, folder2lmdb, speed_test, export, predict, hubconf"
    command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning:timm", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def flags() -> list[str]:
    return sorted(
        {s for a in options.build_parser()._actions for s in a.option_strings if s.startswith("--") and s != "--help"}
    )


@pytest.mark.parametrize("flag", flags())
def test_flags_are_taken_with_dashes_and_with_underscores(flag):
    action = next(a for a in options.build_parser()._actions if flag in a.option_strings)
    value = {int: "2", float: "0.5", None: "x"}[action.type] if action.nargs != 0 else None
    value = action.choices[-1] if action.choices else "a=1" if flag == "--model-kwargs" else value
    results = []
    for spelling in (flag, "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")):
        results.append(options.build_parser().parse_args([spelling] if value is None else [spelling, value]))
        if value is not None and flag != "--model-kwargs":
            results.append(options.build_parser().parse_args([f"{spelling}={value}"]))
    assert all(vars(r) == vars(results[0]) for r in results)
    defaults = options.build_parser().parse_args([])
    assert vars(results[0]) != vars(defaults) or getattr(defaults, action.dest) == getattr(results[0], action.dest)


def test_flags_without_effect_are_said():
    given = ["--data-set", "DIGITS", "--dist-eval", "--resplit", "--world_size", "4", "--color-jitter", "0.1"]
    said = options.without_effect(options.parse(given))
    assert [line.split()[0] for line in said] == ["--resplit", "--dist-eval", "--world_size", "--color-jitter"]
    assert options.without_effect(options.parse(["--data-set", "DIGITS"])) == []


def test_the_readme_begins_with_the_two_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", text, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("pip install -r requirements.txt && bash run_code.sh")
    assert "-r tests/requirements.txt && python -m pytest" in commands[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_paths_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_nothing_names_the_machine_it_was_written_on():
    done = subprocess.run(
        ["git", "grep", "-nIE", r"\.\./shared|/work/|/root/", "--", ".", ":!tests/test_repository.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""


def test_a_future_warning_would_fail_a_test():
    with pytest.raises(FutureWarning):
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    with pytest.raises(InputError):
        options.parse(["--no-such-flag"])


def test_the_annotated_tree_of_the_readme_is_the_folder():
    text = (ROOT / "README.md").read_text()
    tree = text.partition("## Files\n\n```\n")[2].partition("\n```")[0]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    plain = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci", ".github"}
    assert named == top - plain
    topics = next(line for line in tree.splitlines() if line.startswith("util/")).partition(": ")[2].split(", ")
    assert sorted(topics) == sorted(p.stem for p in (ROOT / "util").glob("[!_]*.py"))
