"""The `ldm` command as it is typed: exit codes, one-line errors, nothing but JSON where JSON is asked for."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cached import text_encoder, write_source
from conftest import picture, write_shards
from tiny import ROOT, SIDE, first_stage

from ldm import cli, config
from ldm.errors import UserError


def ldm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), *capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *words: ldm(capsys, monkeypatch, *words)


def test_help_answers_at_once():
    code = "import sys, ldm.cli; sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'hydra', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ldm.cli", "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert b"shards" in done.stdout
    assert min(times) < 2  # 0.35 s on an idle core


def test_make_check_index_stats(run, tmp_path: Path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "5.jpg").write_bytes(picture(5))
    out = tmp_path / "out"
    code, stdout, stderr = run("shards", "make", tmp_path, out, "--shard-size", 3, "--workers", 1)
    assert (code, stderr) == (0, "")
    assert "5 of 6 items written to 2 shards, 1 dropped" in stdout
    shards = stdout.split("data.shards=")[1].strip()
    assert shards == f"{out}/{{00000..00001}}.tar"
    code, stdout, _ = run("shards", "index", shards, "--workers", 1)
    assert (code, stdout) == (0, "2 of 2 shards indexed\n")
    code, stdout, _ = run(
        "shards", "check", shards, "--workers", 1, "--duplicates", out / "list", "--json", out / "a.json"
    )
    assert (code, "all 5 usable" in stdout, (out / "list").read_text()) == (0, True, "")
    assert json.loads((out / "a.json").read_text())["usable"] == 5
    code, stdout, stderr = run("shards", "stats", shards, out / "a.png", "--workers", 1)
    assert (code, stdout, stderr) == (0, "", "")
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_damage_is_exit_code_1(run, tmp_path: Path):
    shards = write_shards(tmp_path, [2])
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:2000])
    code, stdout, stderr = run("shards", "check", shards, "--json", "-", "--workers", 1)
    assert (code, json.loads(stdout)["dropped"]) == (1, {"shard/truncated": 2})
    assert "0 usable" in stderr
    code, stdout, _ = run("shards", "index", shards, "--workers", 1)
    assert (code, stdout.splitlines()[0], "shard/truncated" in stdout) == (1, "0 of 1 shards indexed", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "no/{0..3}.tar"), "shard 'no/0.tar' is not a file (4 of 4 are missing); check the path"),
        (("check", "a/{0..3.tar"), "unbalanced braces"),
        (("index", "pipe:cat x"), "is a shell command"),
        (("stats", "s3://a/b.tar", "a.png"), "not a local path"),
        (("make", "nothing", "out"), "there is no nothing; give a folder of pictures or a table"),
        (("make", ".", "a/file.txt"), "a/file.txt: File exists"),
    ],
)
def test_a_mistake_is_one_line(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.txt").touch()
    (tmp_path / "a" / "1.jpg").write_bytes(picture(0))
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("shards", *words)
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert stderr.startswith("error: ")
    assert message in stderr


def test_encode_and_pack(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "source").mkdir()
    source = write_source(tmp_path / "source", 2, s3={"jpg": b""})
    monkeypatch.setattr("ldm.config.first_stage", lambda run, command: first_stage())
    monkeypatch.setattr("ldm.config.text_encoder", lambda source: text_encoder())
    options = ("--first-stage", "runs/ae", "--side", SIDE, "--text", "clip", "--flip")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, stdout, stderr = run("shards", "encode", *options, source, tmp_path / "cache")
        assert (code, stderr) == (0, "")
        assert f"rank {rank} of 2: {'98'[rank == '0']} samples" in stdout
    code, stdout, _ = run("shards", "pack", tmp_path / "cache", tmp_path / "arrays")
    assert (code, "17 samples" in stdout) == (0, True)
    assert (tmp_path / "arrays" / "moments.npy").is_file()
    code, _, stderr = run("shards", "encode", *options[:4], source, tmp_path / "cache")
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "holds a cache with moments=(2, 4, 4, 4), this one has (1, 4, 4, 4)" in stderr


def test_a_text_encoder_without_weights_of_its_own_is_refused():
    with pytest.raises(UserError, match=r"transformer_text is trained together with a denoiser: give the directory"):
        config.text_encoder("transformer_text")
    with pytest.raises(UserError, match=r"'transformer_txt' is no run's .* did you mean transformer_text"):
        config.text_encoder("transformer_txt")
