"""The upload, to a server of this machine that speaks what the hub's client asks for."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from krony.cli.app import main
from small_models import gpt2

TOKEN = "hf_" + "s" * 34


class Hub(ThreadingHTTPServer):
    """Repositories in memory, and every question that was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.files, self.refuse = [], {}, {}


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({"error": "Repository not found"}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        self.server.asked.append((self.path, body.decode(), self.headers.get("authorization")))
        for path, (code, words) in self.server.refuse.items():
            if self.path.endswith(path):
                self.answer({"error": words}, code)
                return
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitUrl": f"{self.server.url}/you/half/commit/1", "commitOid": "1"})
        else:
            self.answer({"url": f"{self.server.url}/you/half", "id": "you/half"})

    def chunks(self):
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub():
    server = Hub()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def push(hub, monkeypatch, capsys, tmp_path):
    """``krony push`` in this process; what the hub's client reads when it is imported is set by hand."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))

    def push(*arguments, token=TOKEN, endpoint=hub.url, offline=False):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(sys, "argv", ["krony", "push", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return SimpleNamespace(code=end.value.code, **capsys.readouterr()._asdict())

    return push


@pytest.fixture
def folder(tmp_path):
    """A slim model's, as the verb writes it."""
    from krony import KronyConfig, compress, export_model
    from krony.compression.model_card import exported_card

    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="magnitude"))
    export_model(model, "slim").save_pretrained(tmp_path / "half")
    (tmp_path / "half/README.md").write_text(exported_card("openai-community/gpt2", "slim", {}, (9, 7)))
    return tmp_path / "half"


def test_a_folder_is_uploaded_with_its_card(hub, folder, tmp_path):
    """By the installed command."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "krony", "push", str(folder), "you/half", "--private"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=known)
    assert done.returncode == 0 and f"{folder} -> {hub.url}/you/half" in done.stdout, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    paths = [path for path, _, _ in hub.asked]
    assert paths[:2] == ["/api/validate-yaml", "/api/repos/create"]
    assert json.loads(hub.asked[1][1])["visibility"] == "private"
    assert json.loads(hub.asked[0][1])["content"] == (folder / "README.md").read_text()


def test_what_is_not_the_models_stays_here(hub, push, folder, tmp_path):
    """A training's logs name the machine, its user and the command."""
    expected = {path.name for path in folder.iterdir()}
    for name in (".env", ".out.lock", "runs/x/events.out", "wandb/run/files/wandb-metadata.json", "inner/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    assert push(folder, "you/half").code == 0
    assert set(hub.files) == expected | {"additional_chat_templates/tool_use.jinja"}
    hub.files.clear(), hub.asked.clear()
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    done = push(folder, "you/half")
    assert done.code == 2 and "out of the model's folder" in done.err and not hub.asked


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/validate-yaml", 400, "README.md: the hub doesn't take this card: "),
        ("/create", 403, "the hub refuses you/half: not yours"),
        ("/create", 401, "the hub refuses you/half: not yours"),
        ("/commit/main", 413, "the hub refuses you/half: not yours"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_token(push, hub, folder, path, code, words):
    hub.refuse[path] = (code, "not yours")
    done = push(folder, "you/half")
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert TOKEN not in done.out + done.err and hub.files == {}


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n", b"---\nlicense: \xff\n---\n", b"---\n- a\n---\n"])
def test_a_card_that_can_not_be_read(push, hub, folder, content):
    (folder / "README.md").write_bytes(content)
    done = push(folder, "you/half")
    assert done.code == 2 and "README.md: its metadata can't be read: " in done.err, done.err
    assert done.err.count("\n") == 1 and not hub.asked


def test_what_is_known_before_the_hub_is_asked(push, hub, folder, tmp_path):
    (tmp_path / "bare").mkdir()
    for arguments, options, words in (
        ((tmp_path / "bare", "you/half"), {}, "README.md is missing: it is the card that the hub shows"),
        ((tmp_path / "none", "you/half"), {}, "none is no folder"),
        ((folder, "you/half"), {"token": ""}, "log in with hf auth login, or set HF_TOKEN"),
        ((folder, "you/half"), {"offline": True}, "HF_HUB_OFFLINE is set, and push needs the hub"),
    ):
        done = push(*arguments, **options)
        assert done.code == 2 and words in done.err and not hub.asked, done
    done = push(folder, "a/b/c")
    assert done.code == 2 and "'a/b/c' can't be the name of a repository" in done.err
    done = push(folder, "you/half", endpoint="http://127.0.0.1:9")
    assert done.code == 2 and "the hub can't be reached (ConnectError" in done.err
