"""The `ldm` command as it is typed: exit codes, one-line errors, nothing but JSON where JSON is asked for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import yaml
from cached import text_encoder, write_source
from conftest import picture, write_shards
from tiny import ROOT, SIDE, first_stage, process, processor_seconds

from ldm import cli, config
from ldm.cli import doctor
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
    helping, importing = [], []
    for _ in range(3):
        seconds, done = processor_seconds([sys.executable, "-m", "ldm.cli", "--help"])
        helping.append(seconds)
        importing.append(processor_seconds([sys.executable, "-c", "import typer, rich.table, rich.markdown"])[0])
    assert "shards" in done.stdout
    assert min(helping) < 3 * min(importing)  # 0.35 s on an idle core


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


def test_damage_is_exit_code_3(run, tmp_path: Path):
    shards = write_shards(tmp_path, [2])
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:2000])
    code, stdout, stderr = run("shards", "check", shards, "--json", "-", "--workers", 1)
    assert (code, json.loads(stdout)["dropped"]) == (3, {"shard/truncated": 2})
    assert "0 usable" in stderr
    code, stdout, _ = run("shards", "index", shards, "--workers", 1)
    assert (code, stdout.splitlines()[0], "shard/truncated" in stdout) == (3, "0 of 1 shards indexed", True)


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


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A run's directory with scores, as training and evaluation leave it."""
    path = tmp_path / "runs" / "mine"
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "step_00001850.ckpt").write_bytes(b"x" * 2**20)
    cfg = config.compose("experiment=demo", "name=mine", "model.backbone.channels=48")
    config.OmegaConf.update(cfg, "logger.group", "demo")
    config.OmegaConf.save(cfg, path / "config.yaml", resolve=True)
    (path / "metrics.jsonl").write_text('{"step": 1850, "samples_seen": 9, "val/loss": 0.5, "train/loss": null}\n')
    (path / "data_report.json").write_text('{"delivered": 9000, "dropped": {"image/truncated": 3}, "last_dropped": {}}')
    folder = path / "evaluation" / "step1850-guidance2-0123abcd"
    folder.mkdir(parents=True)
    result = {"label": "guidance 2", "protocol": {"id": "0123abcd", "n": 64}, "metrics": {"frechet/pixels4": 0.25}}
    (folder / "results.json").write_text(json.dumps(result))
    return path


def test_ls_runs(run, scored: Path):
    code, stdout, _ = run("ls", "--folder", scored.parent)
    assert code == 0
    row = next(line for line in stdout.splitlines() if "mine" in line)
    assert [word for word in ("finished", "1,850 of 1,850", "val/loss 0.5", "just now") if word not in row] == []
    code, stdout, _ = run("ls", "--folder", scored.parent, "--json")
    assert (code, json.loads(stdout)[0]["step"]) == (0, 1850)
    code, stdout, _ = run("ls", "--folder", scored)
    assert "train one: python train.py experiment=demo" in stdout


def test_ls_experiments_configs_and_groups(run):
    assert "6.5 min on 2 CPU cores" in run("ls", "experiments")[1]
    assert json.loads(run("ls", "configs", "--json")[1])["sampling/spacing"] == ["leading", "linspace", "trailing"]
    assert "sampling/guidance=[cfg," in run("ls", "sampling/guidance")[1]  # brackets are no markup
    code, _, stderr = run("ls", "experimnts")
    assert (code, "did you mean experiments?" in stderr) == (2, True)


def test_show(run, scored: Path):
    code, stdout, _ = run("show", scored)
    assert code == 0
    for said in ("finished, step 1,850 of 1,850", "model.backbone.channels=48 (experiment demo: 32)", "val/loss 0.5",
                 "train/loss not finite", "step_00001850.ckpt 1.0 MB", "frechet/pixels4", "0.250"):  # fmt: skip
        assert said in stdout
    facts = json.loads(run("show", scored, "--json")[1])
    assert facts["changed"]["model.backbone.channels"] == [48, 32]
    assert facts["results"][0]["metrics"] == {"frechet/pixels4": 0.25}
    code, _, stderr = run("show", scored.with_name("mien"))
    assert (code, "beside it there are: mine" in stderr) == (2, True)


def test_cp_makes_an_experiment_that_composes(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copied = tmp_path / "configs"
    shutil.copytree(config.CONFIGS, copied)
    monkeypatch.setattr(config, "CONFIGS", copied)
    code, stdout, _ = run("cp", "demo", "mine")
    assert code == 0
    assert "python train.py experiment=mine" in stdout
    cfg = config.compose("experiment=mine")
    assert (cfg.name, cfg.data.batch_size) == ("mine", 64)
    assert "python train.py experiment=mine\n" in (copied / "experiment" / "mine.yaml").read_text()
    assert run("cp", "demo", "mine")[0] == 2
    assert "did you mean demo" in run("cp", "dmo", "other")[2]
    assert "is to name a file" in run("cp", "demo", "../x")[2]


def test_card(run, scored: Path):
    code, stdout, _ = run("card", scored)
    assert (code, stdout) == (0, f"{scored}/README.md: a model card; fill in what it asks for\n")
    _, front, body = (scored / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-image"
    for said in ("# mine", "- Steps: 1,850 of batch 64", "- Caption dropout: 0.1", "- Samples dropped: 3 image/truncated",
                 "| backbone | `ldm.models.unet.UNet` |", "| metric | guidance 2 |", "| frechet/pixels4 | 0.250 |",
                 "| samples, protocol | 64, `0123abcd` |", "TO FILL IN"):  # fmt: skip
        assert said in body
    assert run("card", scored, "--out", "-")[1] == (scored / "README.md").read_text() + "\n"
    assert json.loads(run("card", scored, "--json")[1])["learning_rate"] == 0.0015


def test_doctor(run, monkeypatch: pytest.MonkeyPatch):
    code, stdout, _ = run("doctor", "--json")
    found = {each["what"]: each for each in json.loads(stdout)}
    assert code == (4 if "broken" in {each["state"] for each in found.values()} else 0)
    assert {"python", "torch", "gpu", "shm", "disk", "slurm", "wandb", "clip_l"} <= found.keys()
    assert found["torch"]["state"] == "good"
    monkeypatch.setattr(doctor, "version", lambda name: "2.6.2" if name == "pytorch-lightning" else "0.0.1")
    code, stdout, _ = run("doctor", "--json")
    found = {each["what"]: each for each in json.loads(stdout)}
    assert code == 4
    assert "malicious release" in found["pytorch-lightning"]["said"]
    assert "0.0.1, but ldm asks for" in found["torch"]["said"]


def test_doctor_misses_what_is_asked_for(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    code, stdout, _ = run("doctor", "--need", "slurm", "--json")
    assert (code, [each["state"] for each in json.loads(stdout) if each["what"] == "slurm"]) == (4, ["broken"])
    assert run("doctor", "--need", "slrum")[0] == 2


def test_evaluate_is_evaluate_py(run, scored: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: seen.append((Path(path).name, run_name, *sys.argv)))
    code, stdout, _ = run("evaluate", scored, "n=8", "sweep.guidance=[0,1]", "--json")
    assert seen == [("evaluate.py", "__main__", "evaluate.py", f"checkpoint={scored}", "n=8", "sweep.guidance=[0,1]")]
    assert (code, json.loads(stdout)[0]["label"]) == (0, "guidance 2")


def test_missing_weights_are_exit_code_4(tmp_path: Path):
    home = str(tmp_path)
    done = process("train.py", "experiment=demo", "model/conditioner=clip_l", "model/first_stage=pixels", "logger=none",
                   "name=never_made", XDG_CACHE_HOME=home, HF_HOME=home, HOME=home,
                   MPLCONFIGDIR=matplotlib.get_cachedir())  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "ldm fetch clip_l" in done.stderr


def test_every_verb_has_help_with_an_example(run):
    for words in (
        ["ls"],
        ["show"],
        ["cp"],
        ["card"],
        ["doctor"],
        ["evaluate"],
        ["sample"],
        ["ema"],
        ["fetch"],
        ["import"],
        ["export"],
    ):
        code, stdout, _ = run(*words, "--help")
        assert (code, f"ldm {words[0]}" in stdout.split("Arguments")[0].split("Usage:")[1].partition("\n")[2]) == (
            0,
            True,
        )


def test_the_shell_completes_runs_and_experiments(monkeypatch: pytest.MonkeyPatch, scored: Path):
    monkeypatch.chdir(scored.parents[1])
    command = [str(Path(sys.executable).with_name("ldm"))]  # as the shell calls it
    for words, found in (("show runs/m", "runs/mine\n"), ("show ", "runs/mine\n"), ("cp demo_v", "demo_vq\n")):
        asked = {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": f"ldm {words}", "COMP_CWORD": "2"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | asked)
        assert done.stdout == found
