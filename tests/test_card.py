"""The card of an exported model, and the way to the Hugging Face Hub, for which a server on loopback stands in."""

import base64
import json
import re
import shlex
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub.utils import close_session, get_session

import export
from util import options
from util.checkpoint import FLAGS_WITHOUT_EFFECT

HEAD = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)
BASIC = {
    "library_name": "timm",
    "license": "apache-2.0",
    "pipeline_tag": "image-classification",
    "tags": ["image-classification", "timm"],
}


def run_export(checkpoint: Path, out: Path, *words: str) -> int:
    return export.main(["--checkpoint", str(checkpoint), "--out", str(out), *words])


def read_card(folder: Path) -> tuple[dict, str]:
    """Return the front matter and the text of a card."""
    head, text = HEAD.fullmatch((folder / "README.md").read_text()).groups()
    return yaml.safe_load(head), text


def edit(checkpoint: Path, folder: Path, **changes) -> Path:
    """Write a checkpoint with other entries, where a dictionary is added to the one that is there; return its path."""
    saved = torch.load(checkpoint)
    for name, value in changes.items():
        saved[name] = saved[name] | value if isinstance(value, dict) else value
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


# The card


def test_the_card_says_what_the_run_was_and_how_to_load_it(tiny_run, tmp_path):
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out") == 0
    head, text = read_card(tmp_path / "out")
    assert head == BASIC
    (line,) = map(json.loads, (tiny_run / "log.txt").read_text().splitlines())
    assert f"{line['n_parameters']:,} parameters" in text and "2210.05958" in text and "`DIGITS`, 10 classes" in text
    assert "- Weights: raw, of `checkpoint.pth`\n" in text
    cell = f"{line['test_acc1']:.2f} % (epoch 0)"
    assert f"| raw | {cell} | {cell} | {cell} |\n" in text and "the data set's own split" in text

    # the recipe, given as a command, is the run's
    (recipe,) = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    assert str(tiny_run.parent) not in text
    words = shlex.split(recipe)
    assert words[:2] == ["python", "main.py"]
    args = vars(options.parse(words[2:]))
    # --amp was not given: a machine chooses its own
    for name, value in (torch.load(tiny_run / "checkpoint.pth")["args"] | {"amp": "auto"}).items():
        if name not in FLAGS_WITHOUT_EFFECT:
            assert args[name] == value, name

    # the lines of Python, from the folder
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "import models" in code and 'create_model("hf-hub:USER/NAME", pretrained=True)' in code
    place: dict = {}
    exec(code.replace("hf-hub:USER/NAME", f"local-dir:{tmp_path / 'out'}"), place)
    assert place["model"].num_classes == 10 and "Resize" in str(place["transform"])


@pytest.mark.parametrize(
    ("rates", "ema"),
    [
        ((), ["60.00 % (epoch 1)", "70.00 % (epoch 3)", "70.00 % (epoch 3)"]),
        # at a higher rate these are another model's
        ((1.0, 1.0, 0.7, 0.7), ["", "70.00 % (epoch 3)", "70.00 % (epoch 3)"]),
    ],
)
def test_accuracies_are_the_logs(rates, ema, tiny_run, tmp_path):
    """An epoch need not be evaluated, nor have finished; of two that are equal the first is the best."""
    checkpoint = edit(tiny_run / "checkpoint.pth", tmp_path / "run", epoch=1, data={"folds": 5, "fold": 2})
    numbers = [(80.0, 10.0), (90.0, 60.0), (85.0, 65.0), (85.0, 70.0)]
    lines = [{"epoch": i, "test_acc1": acc1, "test_ema_acc1": acc1_ema} for i, (acc1, acc1_ema) in enumerate(numbers)]
    for line, rate in zip(lines, rates, strict=False):
        line["keep_rate"] = rate
    lines += [{"epoch": 4, "train_loss": 1.0}, {"epoch": 5, "diverged": True}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 6, "test_'
    checkpoint.with_name("log.txt").write_text(text)
    assert run_export(checkpoint, tmp_path / "out", "--use-ema") == 0
    text = read_card(tmp_path / "out")[1]
    raw = ["", "85.00 % (epoch 2)"] if rates else 2 * ["90.00 % (epoch 1)"]
    rows = [f"| raw | {' | '.join(raw)} | 85.00 % (epoch 3) |", f"| EMA | {' | '.join(ema)} |"]
    assert [line for line in text.splitlines() if line.startswith(("| raw", "| EMA"))] == rows
    assert "- Weights: EMA, of `checkpoint.pth`\n" in text and "fold 2 of 5 of the training split" in text


def test_the_accuracy_of_another_model_than_the_runs_is_not_known(tiny_run, tmp_path):
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--input-size", "16") == 0
    text = read_card(tmp_path / "out")[1]
    assert "(16, 16)" in text and "| not known |" in text and "| raw |" not in text


def test_what_is_not_known_is_left_out(tiny_run, tmp_path):
    """Of weights alone, of a model of timm's; of an exported folder; of a checkpoint within an epoch."""
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    flags = "--model resnet10t --nb-classes 3 --input-size 32".split()
    assert run_export(tmp_path / "bare.pth", tmp_path / "out", *flags) == 0
    head, text = read_card(tmp_path / "out")
    assert head == BASIC and "`not known`, 3 classes" in text
    assert "\n# not known\n" in text and "| not known |" in text

    assert run_export(tmp_path / "out", tmp_path / "again") == 0
    assert read_card(tmp_path / "again") == (head, text.replace("`bare.pth`", "`out`"))

    within = edit(tiny_run / "checkpoint.pth", tmp_path / "within", epoch=0, position=["update"])
    within.with_name("log.txt").write_text((tiny_run / "log.txt").read_text())
    assert run_export(within, tmp_path / "part") == 0
    assert "| raw |  | " in read_card(tmp_path / "part")[1]


@pytest.mark.parametrize("flag", [{"pretrained": True}, {"finetune": "imagenet.pth"}])
def test_weights_that_started_from_others_have_no_license_and_flags_that_were_given_are_shown(flag, tiny_run, tmp_path):
    args = flag | {"amp": "off", "given": ["amp", "model"]}
    assert run_export(edit(tiny_run / "checkpoint.pth", tmp_path / "run", args=args), tmp_path / "out") == 0
    head, text = read_card(tmp_path / "out")
    assert "license" not in head and BASIC.items() > head.items()
    assert " --amp=off" in text and f"--{next(iter(flag))}" in text


@pytest.mark.parametrize(
    ("name", "data_sets"),
    [
        ("CIFAR", ["uoft-cs/cifar100"]),
        ("CIFAR-10", ["uoft-cs/cifar10"]),
        ("FOLDER", None),
        ("a: [b\n---\n# c `d` {e}", None),
    ],
)
def test_no_name_breaks_the_card(name, data_sets, tiny_run, tmp_path):
    evil = "x: [\n---\n```\n# y | {z}"
    flags = {"data_path": f"/home/somebody/{evil}", "opt": evil, "model_kwargs": {evil: evil}, "teacher_path": "\udcff"}
    checkpoint = edit(tiny_run / "checkpoint.pth", tmp_path / "run", data={"name": name}, args=flags, epoch=evil)
    assert run_export(checkpoint, tmp_path / "out") == 0
    head, text = read_card(tmp_path / "out")
    assert head == BASIC | ({"datasets": data_sets} if data_sets else {})
    prose = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    headings = [line for line in prose.splitlines() if line.startswith("#")]
    assert headings == ["# dhvt_tiny_cifar_patch4", "## Accuracy", "## Recipe", "## Use", "## License"]
    assert text.count("```") == 4 and "somebody" not in text


# The hub


class Handler(BaseHTTPRequestHandler):
    """The routes that an upload calls, for the token `secret`; all files come in the commit's body."""

    timeout = 20

    def do_GET(self):
        self.answer(401 if self.headers["Authorization"] != "Bearer secret" else 404, {"error": "no such thing"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        path = self.path.partition("?")[0]
        hub.paths.append(path)
        status = hub.failures.get(path)
        if status is not None:
            return self.answer(status, {"error": "out of order"})
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, {})
            return self.answer(status, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            head, _ = HEAD.fullmatch(json.loads(body)["content"]).groups()
            return self.answer(200 if yaml.safe_load(head)["license"] else 400, {"errors": [], "warnings": []})
        owner, name, action = re.fullmatch(r"/api/models/([^/]+)/([^/]+)/(preupload|commit)/main", path).groups()
        repository = hub.repositories[f"{owner}/{name}"]
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer(200, {"files": answers})
        for item in map(json.loads, body.splitlines()):
            if item["key"] == "file":
                assert item["value"]["encoding"] == "base64"
                repository[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        return self.answer(200, {"commitUrl": f"{hub.url}/{owner}/{name}/commit/0", "commitOid": "0" * 40})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """Return a server in the hub's place: `repositories` by name, `paths` of requests, `failures` by path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories = {}
    server.paths = []
    server.failures = {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    use_hub(monkeypatch, server.url)
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def use_hub(monkeypatch, url: str) -> None:
    """Send the library to another server, which HF_ENDPOINT does before Python starts, without a proxy."""
    close_session()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_the_files_arrive_byte_for_byte_and_only_with_the_flag(hub, tiny_run, tmp_path, capsys):
    checkpoint = tiny_run / "checkpoint.pth"
    out = tmp_path / "out"
    assert run_export(checkpoint, out) == 0
    assert hub.paths == []
    # the second time the repository is there already
    for _ in range(2):
        assert run_export(checkpoint, out, "--overwrite", "--push", "some-one/a_model.v2") == 0
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert set(files) == {"README.md", "config.json", "model.safetensors"}
        assert hub.repositories == {"some-one/a_model.v2": files}
        assert f"{hub.url}/some-one/a_model.v2" in capsys.readouterr().out
    assert b'"hf-hub:some-one/a_model.v2"' in files["README.md"]

    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.repositories["some-one/a_model.v2"].items():
        (arrived / name).write_bytes(content)
    weights = timm.create_model(f"local-dir:{arrived}", pretrained=True).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in torch.load(checkpoint)["model"].items())


def refused_login(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")


def refused_commit(hub, monkeypatch) -> None:
    hub.failures["/api/models/a/b/commit/main"] = 403


def broken_server(hub, monkeypatch) -> None:
    hub.failures["/api/repos/create"] = 500


def no_network(hub, monkeypatch) -> None:
    """A port that was just free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use_hub(monkeypatch, f"http://127.0.0.1:{port}")


def offline(hub, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("fault", [refused_login, refused_commit, broken_server, no_network, offline])
def test_a_failed_upload_is_one_line_and_the_folder_stays(fault, hub, tiny_run, tmp_path, monkeypatch, capsys):
    fault(hub, monkeypatch)
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--push", "a/b") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export.py: error: --push a/b: ") and "hf upload a/b" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert not any(hub.repositories.values())


def test_a_silent_server_is_not_waited_for_without_end(tiny_run, tmp_path, monkeypatch):
    """It takes the connection and never answers; the limit of a minute, which is looked at, is half a second here."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        session = get_session()
        limits = []
        post = session.post

        def post_sooner(*args, **kwargs):
            limits.append(session.timeout.read)
            return post(*args, **kwargs, timeout=0.5)

        monkeypatch.setattr(session, "post", post_sooner)
        assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--push", "a/b") == 2
    close_session()
    assert limits == [60]


@pytest.mark.parametrize("name", ["noslash", "a/b/c"])
def test_a_name_without_its_user_is_one_line_before_anything_is_written(name, hub, tiny_run, tmp_path, capsys):
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--push", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"export.py: error: --push {name}: ") and "USER/NAME" in line
    assert list(tmp_path.iterdir()) == [] and hub.paths == []


@pytest.mark.parametrize("name", ["a/", "/b", "a/b c", "a/b--c", "../b", "a/" + 99 * "b"])
def test_a_name_that_the_hub_does_not_allow_is_one_line_and_the_folder_stays(name, hub, tiny_run, tmp_path, capsys):
    assert run_export(tiny_run / "checkpoint.pth", tmp_path / "out", "--push", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"export.py: error: --push {name}: ")
    assert (tmp_path / "out" / "README.md").exists() and hub.paths == []
