"""evaluate.py as a user runs it: protocols, sweeps, ranks, resumption, W&B. And every protocol that ships."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from omegaconf import DictConfig
from PIL import Image
from test_cli import run as ldm  # noqa: F401
from test_config import composed, demo  # noqa: F401
from test_end_to_end import Runs, runs  # noqa: F401
from test_loggers import records
from tiny import ROOT, free_port, here

from ldm import config
from ldm.batch import to_uint8
from ldm.evaluation.features import PooledStages
from ldm.evaluation.generate import _read, kept
from ldm.training import power_ema

PROTOCOLS = sorted((config.CONFIGS / "protocol").glob("*.yaml"))


@pytest.fixture(scope="module")
def prepare():
    import runpy

    return runpy.run_path(str(ROOT / "evaluate.py"))["prepare"]


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_protocol_composes_with_a_run_and_replaces_its_choices(path: Path, demo: DictConfig, prepare):  # noqa: F811
    config.open_run(demo)
    arguments = [f"checkpoint={demo.run_dir}", f"protocol={path.stem}"]
    arguments += ["prompts=p.txt"] if path.stem == "drawbench" else []
    prepare(arguments)
    cfg = composed("evaluate", *arguments)
    config.check(cfg)
    if path.stem not in ("shapes", "clipart"):
        assert not {"frechet_pixels", "caption_accuracy"} & cfg.metrics.keys()
    sampling = config.build(cfg.sampling)
    assert sampling.steps == (50 if path.stem[:5] in ("coco3", "sd_ca", "drawb") else 20)
    assert cfg.data.side == cfg.data.decode.side == (512 if "coco" in path.stem or "sd" in path.stem else 32)
    header = path.read_text().splitlines()
    assert header[0] == "# @package _global_"
    assert any(f"protocol={path.stem}" in line for line in header)
    prepare([f"checkpoint={demo.run_dir}", "metrics=pixels", f"protocol={path.stem}"])  # the command line comes first


def test_published_settings_are_what_the_papers_say(demo: DictConfig, prepare):  # noqa: F811
    def of(name: str) -> DictConfig:
        config.open_run(demo)
        arguments = [f"checkpoint={demo.run_dir}", f"protocol={name}"]
        prepare(arguments)
        return composed("evaluate", *arguments)

    mlperf, card = of("coco30k_mlperf"), of("sd_card_10k")
    assert (mlperf.n, mlperf.sampling.guidance.scale) == (30000, 8.0)
    assert mlperf.metrics.inception.features.resize._target_ == "ldm.evaluation.features.bilinear"
    assert mlperf.metrics.openclip_h.features.weights == "openclip_h"
    assert (card.n, list(card.sweep.guidance)) == (10000, [1.5, 2, 3, 4, 5, 6, 7, 8])
    assert card.sampling.solver._target_ == "ldm.diffusion.solvers.plms"


def results(run: Path) -> dict[str, dict]:
    return {
        folder.name.rpartition("-")[0]: json.loads((folder / "results.json").read_text())
        for folder in sorted((run / "evaluation").iterdir())
        if folder.is_dir()
    }


@pytest.fixture(scope="module")
def straight(runs: Runs) -> list[str]:  # noqa: F811
    return [f"checkpoint={runs.folder}/straight", "sampling.steps=3", "n=40", "metrics=shapes", "pictures=4"]


def pictures(run: Path, start: str) -> torch.Tensor:
    (folder,) = (run / "evaluation").glob(f"{start}-*/pictures")
    return torch.cat([_read(path) for path in sorted(folder.glob("*.tar"))])


def two_ranks_by_hand(words: list[str]) -> list[str]:
    """What each printed."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "evaluate.py", *words],
            cwd=ROOT, env=os.environ | world | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return shown


def two_ranks_by_the_batch_script(words: list[str], folder: Path) -> list[str]:
    """The same, with stand-ins for SLURM's own programs. The number of the job is one that gives it a free port."""
    srun = """
        [[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task=1 ]] && shift 2
        export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2
        for rank in 0 1; do
            SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" > "$SHOWN/$rank" &
            pids+=($!)
        done
        for each in "${pids[@]}"; do wait "$each" || exit; done
    """
    programs = {
        "srun": srun,
        "scontrol": '[[ $2 == hostnames ]] && echo n1 || echo "   NodeAddr=127.0.0.1 NodeHostName=n1"\n',
    }  # fmt: skip
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port() - 15000), "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
           "SLURM_LOCALID": "0", "SHOWN": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
           "PATH": f"{folder}:{os.environ['PATH']}"}  # fmt: skip
    subprocess.run(["bash", "slurm/evaluate.sbatch", *words], cwd=ROOT, env=os.environ | job, timeout=600, check=True)
    return [(folder / rank).read_text() for rank in "01"]


def test_two_ranks_and_a_stopped_run_give_the_same_pictures_and_scores(
    runs: Runs,  # noqa: F811
    straight: list[str],
    tmp_path: Path,
):
    run = runs.folder / "straight"
    evaluation = run / "evaluation"
    shutil.rmtree(evaluation, ignore_errors=True)
    assert here("evaluate.py", *straight, "batch_size=8") == 0
    first, images = results(run), pictures(run, "step6-guidance1.5")

    (folder,) = evaluation.glob("step6-guidance1.5-*")
    (folder / "pictures" / "00001.tar").unlink()
    (folder / "results.json").unlink()
    assert here("evaluate.py", *straight, "batch_size=5") == 0  # resumed
    resumed, again = results(run), pictures(run, "step6-guidance1.5")

    found = [(again, resumed)]
    for start in (two_ranks_by_hand, partial(two_ranks_by_the_batch_script, folder=tmp_path)):
        shutil.rmtree(evaluation)
        shown = start([*straight, "batch_size=3"])
        assert "caption_accuracy/all" in shown[0]
        assert shown[1] == ""
        found.append((pictures(run, "step6-guidance1.5"), results(run)))

    assert images.shape[0] == 40
    for other, scores in found:
        assert (other != images).double().mean() <= 1e-4
        for name, result in first.items():
            assert scores[name]["metrics"] == pytest.approx(result["metrics"], rel=1e-4, abs=1e-6)
            assert scores[name]["protocol"] == result["protocol"]


def test_bfloat16_is_another_protocol_and_gives_nearly_the_same_pictures(
    runs: Runs,  # noqa: F811
    straight: list[str],
    capsys: pytest.CaptureFixture[str],
):
    run = runs.folder / "straight"
    words = [*straight, "n=16", "metrics=[shapes,reconstruction]"]
    both = {}
    for precision in ("32-true", "bf16-mixed"):
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        assert here("evaluate.py", *words, f"precision={precision}") == 0
        both[precision] = results(run)
        made = {name: pictures(run, name).float() for name in both[precision]}
        both[precision] = {name: (result, made[name]) for name, result in both[precision].items()}
    assert both["32-true"].keys() == both["bf16-mixed"].keys() == {"step6-reconstruction", "step6-guidance1.5"}
    for name, (result, images) in both["32-true"].items():
        other, others = both["bf16-mixed"][name]
        assert (result["protocol"].get("dtype", "float32"), other["protocol"]["dtype"]) == ("float32", "bf16-mixed")
        assert result["protocol"]["id"] != other["protocol"]["id"]
        assert other["under"] == f"{result['under']}/bf16-mixed"
        assert 0 < (images - others).abs().mean() < 1  # of 255

    capsys.readouterr()
    assert here("evaluate.py", *words, "precision=16-mixed") == 2
    assert capsys.readouterr().err == "error: precision=16-mixed is unknown here; give 32-true or bf16-mixed\n"


def test_ranks_that_know_no_place_to_meet_are_refused_in_one_line(
    runs: Runs,  # noqa: F811
    straight: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("STEP_ID", "0"), ("STEP_NUM_TASKS", "2"), ("PROCID", "1"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    capsys.readouterr()
    assert here("evaluate.py", *straight) == 2
    assert re.fullmatch("error: rank 1 of 2 cannot find the others without MASTER_ADDR .*\n", capsys.readouterr().err)


def test_a_sweep_with_pretrained_features_has_a_floor_a_table_and_a_curve(
    runs: Runs,  # noqa: F811
    straight: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    run = runs.folder / "straight"
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    words = [*straight, "metrics=[offline,shapes]", "metrics.efficientnet.features.side=32", "sweep.guidance=[1,3]",
             "sweep.steps=[2,3]", f"reference_cache={tmp_path}", "batch_size=20"]  # fmt: skip
    with pytest.warns(UserWarning, match="40 pictures are fewer than the 320 features of efficientnet"):
        assert here("evaluate.py", *words) == 0
    found = results(run)
    labels = [f"step6-guidance{g}steps{s}" for g in (1, 3) for s in (2, 3)]
    assert sorted(found) == sorted(["step6-real", "step6-reconstruction", *labels])
    for result in found.values():
        assert {"frechet/efficientnet", "frechet/efficientnet/ci95", "kid/efficientnet", "precision/efficientnet",
                "caption_accuracy/all/ci95"} <= result["metrics"].keys()  # fmt: skip
        assert result["protocol"]["features"]["efficientnet"]["side"] == 32
    assert found["step6-real"]["metrics"]["caption_accuracy/all"] > 0.9  # real pictures against their own captions
    assert found[labels[0]]["protocol"]["sampling"]["steps"] == 2
    assert len(list(tmp_path.iterdir())) == 1
    (curve,) = (run / "evaluation").glob("*/curve.png")
    assert curve.parent.name.startswith("step6-guidance3steps3")
    shown = capsys.readouterr().out
    assert "columns differ in sampling.guidance.scale, sampling.steps" in shown
    assert "±" in shown


def test_a_sweep_over_averages_scores_the_weights_of_each(runs: Runs, straight: list[str]):  # noqa: F811
    run = runs.folder / "averages"
    more = [
        "callbacks=[latent_diffusion,power_ema]",
        "callbacks.power_ema.every=2",
        "callbacks.power_ema.dtype=float32",
    ]
    assert here("train.py", *runs.demo("averages"), *more) == 0
    file, _ = power_ema.save(run, 0.07, None, None)
    words = [f"checkpoint={run}", *straight[1:], "n=16"]
    assert here("evaluate.py", *words, f"sweep.ema=[null,raw,0.1,'{file}']") == 0
    folders = {folder.name.rpartition("-")[0]: folder for folder in (run / "evaluation").iterdir() if folder.is_dir()}
    settings = {"default": None, "raw": "raw", "0.1": 0.1, file.stem: str(file)}
    assert folders.keys() == {"step6-reconstruction", *(f"step6-guidance1.5ema{name}" for name in settings)}
    drawn = {}
    for name, ema in settings.items():
        folder = folders[f"step6-guidance1.5ema{name}"]
        module, step = config.load_run(run, ema)
        saved = json.loads((folder / "results.json").read_text())
        assert saved["protocol"]["weights"] == ("ema" if ema is None else f"average {ema}, step {step}")
        found = kept(folder / "pictures", range(16))
        sampling = config.run_config(run).sampling
        sampling.steps = 3
        images = module.sample(config.build(sampling), [each.caption for each in found], torch.arange(16), 32, 0, "")
        assert torch.equal(to_uint8(images), _read(folder / "pictures" / "00000.tar"))
        drawn[name] = images
    assert len({images.sum().item() for images in drawn.values()}) == 4

    before = set((run / "evaluation").iterdir())
    assert here("evaluate.py", *words, "ema=0.1") == 0  # alone: the same protocol but for the name of the folder
    (folder,) = {folder for folder in (run / "evaluation").iterdir() if folder.is_dir()} - before
    assert torch.equal(_read(folder / "pictures" / "00000.tar"), to_uint8(drawn["0.1"]))
    assert folder.name.rpartition("-")[2] == folders["step6-guidance1.5ema0.1"].name.rpartition("-")[2]


def test_scores_reach_the_run_s_own_wandb_run(runs: Runs, straight: list[str]):  # noqa: F811
    """Read back from the offline run's own file, which `wandb sync` would upload."""
    run = runs.folder / "scored"
    shutil.copytree(runs.folder / "straight", run, ignore=shutil.ignore_patterns("evaluation", "wandb*"))
    saved = config.run_config(run)
    saved.logger = {
        "_target_": "ldm.training.loggers.wandb_logger", "run_dir": "elsewhere", "batch_size": 8, "project": "p", "name": "n",
    }  # fmt: skip
    config.OmegaConf.save(saved, run / "config.yaml")
    words = [f"checkpoint={run}", *straight[1:], "n=20", "sweep.guidance=[1,3]"]
    assert here("evaluate.py", *words, "log=false") == 0
    assert not (run / "wandb").exists()

    assert here("evaluate.py", *words) == 0
    wandb.finish()
    text = json.dumps(records(run))
    for name, result in results(run).items():
        under = {"step6-reconstruction": "reconstruction"}.get(name, f"cfg{name[-1]}/steps3")
        for score, value in result["metrics"].items():
            assert f"{score}/n20/{under}" in text
            assert value == 0 or str(value)[:12] in text
    (folder,) = run.glob("wandb/offline-run-*/files/media")
    (table,) = folder.glob("table/evaluation/table_*.json")
    table = json.loads(table.read_text())
    assert table["columns"][:2] == ["round", "protocol"]
    assert [row[0] for row in table["data"]] == ["reconstruction", "guidance 1", "guidance 3"]
    column = table["columns"].index("frechet/pixels4")
    assert table["data"][2][column] == pytest.approx(results(run)["step6-guidance3"]["metrics"]["frechet/pixels4"])
    for name in ("curve", "grid"):
        (logged,) = folder.glob(f"images/evaluation/{name}_*.png")
        (ours,) = run.glob(f"evaluation/step6-guidance3-*/{name}.png")
        assert Image.open(logged).tobytes() == Image.open(ours).tobytes()


def test_prompts_without_pictures(runs: Runs, straight: list[str], tmp_path: Path):  # noqa: F811
    path = tmp_path / "prompts.txt"
    path.write_text("a small red circle at the center on black\n" * 3)
    run = runs.folder / "straight"
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    words = [
        f"checkpoint={run}",
        "sampling.steps=2",
        f"prompts={path}",
        "metrics=shapes",
        "metrics.frechet_pixels=null",
    ]
    assert here("evaluate.py", *words) == 0
    (found,) = results(run).values()
    assert found["protocol"]["n"] == 3
    assert found["protocol"]["reference"] is None
    assert "caption_accuracy/all" in found["metrics"]
    assert "<h2>Scores" in (run / "evaluation" / "report.html").read_text()


def test_evaluation_finds_what_was_kept(ldm, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    cache, seen = tmp_path / "cache", []
    encode = PooledStages.encode
    monkeypatch.setattr(PooledStages, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))
    words = ["--metrics", "offline", "--side", 32, "--cache", cache]
    shards = f"{runs.folder}/val/00000.tar"
    code, shown, _ = ldm("stats", shards, *words, "--n", 20, "--json")
    assert code == 0
    facts = json.loads(shown)
    (path,) = cache.iterdir()
    assert facts == {"n": 20, "side": 32, "files": {"efficientnet": str(path)}}
    assert sum(seen) == 20
    assert f"efficientnet: 20 pictures of 32 px, {path}" in ldm("stats", shards, *words, "--n", 20)[1]
    assert sum(seen) == 20  # they were there

    seen.clear()
    with pytest.warns(UserWarning, match="fewer than the 320 features"):
        assert here("evaluate.py", f"checkpoint={runs.folder}/autoencoder", "metrics=offline", "n=20", "floor=false",
                    f"reference_cache={cache}") == 0  # fmt: skip
    assert sum(seen) == 20  # the reconstructions alone
    assert list(cache.iterdir()) == [path]

    assert ldm("stats", shards, *words, "--n", 21)[0] == 0
    assert len(list(cache.iterdir())) == 2  # other pictures


def test_a_protocol_gives_metrics_side_and_n(ldm, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr(PooledStages, "encode", lambda self, pixels: torch.ones(len(pixels), 4))
    shards = f"{runs.folder}/val/00000.tar"
    code, _, told = ldm("stats", shards, "--protocol", "clipart", "--side", 32, "--cache", tmp_path)
    assert code == 2
    assert "n=256, but the validation shards hold 48 usable samples" in told
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without any weights
    code, _, told = ldm("stats", shards, "--protocol", "coco30k_512")
    assert code == 4
    assert "ldm fetch inception" in told
    code, shown, _ = ldm("stats", shards, "--protocol", "clipart", "--side", 32, "--n", 9, "--cache", tmp_path)
    assert code == 0
    assert "efficientnet: 9 pictures of 32 px" in shown


def test_mistakes_of_stats_are_one_line(ldm, runs: Runs):  # noqa: F811
    shards = f"{runs.folder}/val/00000.tar"
    for words, message in (
        ([], "Give --metrics NAME or --protocol NAME"),
        (["--metrics", "offlin"], "did you mean offline?"),
        (["--protocol", "coco"], "there is no protocol=coco"),
        (["--metrics", "offline"], "give --side"),
        (["--metrics", "pixels", "--side", 32], "no network with weights"),
    ):
        code, _, told = ldm("stats", shards, *words)
        assert (code, told.count("\n")) == (2, 1)
        assert message in told
