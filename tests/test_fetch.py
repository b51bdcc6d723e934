import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import process
from typer.testing import CliRunner

from ldm import fetch
from ldm.cli import app
from ldm.errors import UserError
from ldm.fetch import KNOWN, Hub, Package, Url

BODY = bytes(range(256)) * 40
COMMIT = "0123456789abcdef" * 2 + "01234567"
FILES = {"text/config.json": b"{}", "text/model.safetensors": BODY, "words/vocab.json": b'{"a": 0}', "README.md": b"#"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Server:
    """A loopback server: plain files under /files, and a hub's repository owner/name at COMMIT."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                outer.requests.append(self.path)
                name = self.path.partition("?")[0].rpartition(f"/resolve/{COMMIT}/")[2].removeprefix("/files/")
                if self.path.startswith(f"/api/models/owner/name/tree/{COMMIT}"):
                    files = [{"type": "file", "path": name, "size": 1, "oid": ""} for name in sorted(outer.files)]
                    self.send(200, json.dumps(files).encode(), body)
                elif name in outer.files:
                    self.send(200, outer.files[name], body, name)
                else:
                    self.send(404, b"", body)

            def send(self, status: int, data: bytes, body: bool, name: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                large = name.endswith(".safetensors")
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                self.send_header("ETag", f'"{sha256(data) if large else blob}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(outer.sent(name, data))

            def log_message(self, *_: object) -> None:
                pass

        self.files: dict[str, bytes] = dict(FILES)
        self.requests: list[str] = []
        self.cut: str | None = None  # a name whose answer ends early
        self.changed: str | None = None  # or has another byte
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def sent(self, name: str, data: bytes) -> bytes:
        if name and name == self.cut:
            return data[: len(data) // 2]
        return b"\xff" + data[1:] if name and name == self.changed else data


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    server = Server()
    server.files["net.pth"] = BODY
    monkeypatch.setitem(KNOWN, "net", Url(f"{server.url}/files/net.pth", sha256(BODY)[:8]))
    files = ("text/config.json", "text/model.safetensors", "words/vocab.json")
    monkeypatch.setitem(KNOWN, "text", Hub("owner/name", COMMIT, files))
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_what_is_pinned_is_pinned():
    for source in KNOWN.values():
        if isinstance(source, Hub):
            assert len(source.revision) == 40
            names = [Path(file).name for file in source.files]
            assert len(set(names)) == len(names) > 1
            assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
        elif isinstance(source, Url):
            assert source.sha256 in source.url
            assert source.url.startswith("https://")
    assert isinstance(KNOWN["minilm"], Package)


def test_one_file_is_fetched_checked_and_told_in_a_manifest(server: Server, tmp_path: Path):
    out = tmp_path / "deep" / "vgg.pth"
    assert fetch.fetch("net", out) == out
    assert out.read_bytes() == BODY
    manifest = json.loads((tmp_path / "deep" / "vgg.pth.manifest.json").read_text())
    assert manifest == {"weights": "net", "url": f"{server.url}/files/net.pth", "sha256": {"vgg.pth": sha256(BODY)}}
    assert sorted(path.name for path in out.parent.iterdir()) == ["vgg.pth", "vgg.pth.manifest.json"]
    asked = len(server.requests)
    assert fetch.fetch("net", out) == out
    assert len(server.requests) == asked
    with pytest.raises(UserError, match="is there already and is not a fetched text"):
        fetch.fetch("text", out)


def test_without_a_place_it_goes_where_local_looks(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match=r"the weights net \(http.*net\.pth\) are not in .*; .*: ldm fetch net$"):
        fetch.local("net")
    path = fetch.fetch("net")
    assert path == tmp_path / "home/.cache/ldm/weights/net.pth"
    assert fetch.local("net") == path


@pytest.mark.parametrize("fault", ["cut", "changed"])
def test_a_bad_answer_leaves_nothing_and_is_one_line(fault: str, server: Server, tmp_path: Path):
    setattr(server, fault, "net.pth")
    with pytest.raises(
        UserError, match=r"net\.pth (gave .* bytes with sha256|cannot be fetched).*run the same command"
    ):
        fetch.fetch("net", tmp_path / "net.pth")
    assert not (tmp_path / "net.pth").exists()
    assert not (tmp_path / "net.pth.manifest.json").exists()
    setattr(server, fault, None)
    assert fetch.fetch("net", tmp_path / "net.pth").read_bytes() == BODY


def test_a_refusal_is_one_line(server: Server, tmp_path: Path):
    del server.files["net.pth"], server.files["words/vocab.json"]
    with pytest.raises(UserError, match=r"net\.pth cannot be fetched \(HTTP Error 404"):
        fetch.fetch("net", tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"owner/name/words/vocab\.json cannot be fetched") as caught:
        fetch.fetch("text", tmp_path / "text", server.url)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "text").exists()


def test_a_repository_s_files_come_into_one_folder(server: Server, tmp_path: Path):
    out = fetch.fetch("text", endpoint=server.url)
    assert out == fetch.local("text") == tmp_path / "home/.cache/ldm/weights/text"
    names = ["config.json", "manifest.json", "model.safetensors", "vocab.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["repo"], manifest["revision"]) == ("owner/name", COMMIT)
    assert manifest["sha256"] == {name: sha256((out / name).read_bytes()) for name in names if name != "manifest.json"}
    assert (out / "model.safetensors").read_bytes() == BODY


@pytest.mark.parametrize("name", ["text/model.safetensors", "text/config.json"])
def test_a_changed_file_of_a_repository_is_refused(name: str, server: Server, tmp_path: Path):
    server.changed = name
    with pytest.raises(UserError, match=rf"owner/name/{name} was cut or changed on the way"):
        fetch.fetch("text", tmp_path / "text", server.url)
    assert not (tmp_path / "text").exists()
    server.changed = None
    assert (fetch.fetch("text", tmp_path / "text", server.url) / "model.safetensors").read_bytes() == BODY


def test_any_repository_at_a_commit(server: Server, tmp_path: Path):
    server.files |= {"config.json": b"{}", "model.safetensors": BODY, "pytorch_model.bin": b"x"}
    weights = f"owner/name@{COMMIT}"
    with pytest.raises(UserError, match=rf"ldm fetch {weights}$"):
        fetch.local(weights)
    out = fetch.fetch(weights, endpoint=server.url)
    assert fetch.local(weights) == out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_the_hub_s_own_cache_is_found_when_it_is_whole(server: Server, tmp_path: Path):
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    (snapshot / "text").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert fetch.local(f"owner/name@{COMMIT}") == snapshot
    (snapshot / "text" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="ldm fetch text"):
        fetch.local("text")


def test_names_that_mean_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"there are no weights in nowhere: .*clip_l, .*vgg16"):
        fetch.local("nowhere")
    with pytest.raises(UserError, match=r"the weights nowhere cannot be fetched: there are .*vgg16"):
        fetch.fetch("nowhere", tmp_path / "x")
    with pytest.raises(UserError, match="minilm cannot be fetched: they come with pip"):
        fetch.fetch("minilm", tmp_path / "x")
    assert fetch.local(str(tmp_path)) == tmp_path


def test_the_command_fetches_what_a_config_names(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert fetch.named_in(Path("configs/model/conditioner/sd3.yaml")) == ["clip_l", "openclip_bigg", "t5_xxl"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"a: {{weights: net}}\nb: [{{weights: net}}, {{weights: {run}}}, {{weights: null}}]\n"
    )
    done = CliRunner().invoke(app, ["fetch", str(run)])
    assert done.output.splitlines()[-1] == f"net: {tmp_path}/home/.cache/ldm/weights/net.pth"
    one = CliRunner().invoke(app, ["fetch", "net", str(tmp_path / "one.pth")])
    assert one.exit_code == 0, one.output
    assert (tmp_path / "one.pth").read_bytes() == BODY
    (run / "config.yaml").write_text("a: {weights: net}\nb: {weights: text}\n")
    both = CliRunner().invoke(app, ["fetch", str(run), str(tmp_path / "two")])
    assert "needs several weights (net, text)" in str(both.exception)


def test_a_mistake_on_the_command_line_is_one_line():
    result = process("-m", "ldm.cli", "fetch", "vgg61")
    assert result.returncode == 2
    assert result.stderr.startswith("error: the weights vgg61 cannot be fetched: there are clip_l")
    assert result.stderr.count("\n") == 1
