"""evaluate.py as a user runs it: protocols, sweeps, ranks, resumption, W&B. And every protocol that ships."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from test_config import composed, demo  # noqa: F401
from test_end_to_end import Runs, runs  # noqa: F401
from tiny import ROOT, here

from ldm import config
from ldm.evaluation.generate import _read

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
    }


@pytest.fixture(scope="module")
def straight(runs: Runs) -> list[str]:  # noqa: F811
    return [f"checkpoint={runs.folder}/straight", "sampling.steps=3", "n=40", "metrics=shapes", "pictures=4"]


def pictures(run: Path, start: str) -> torch.Tensor:
    (folder,) = (run / "evaluation").glob(f"{start}-*/pictures")
    return torch.cat([_read(path) for path in sorted(folder.glob("*.tar"))])


def test_two_ranks_and_a_stopped_run_give_the_same_pictures_and_scores(runs: Runs, straight: list[str]):  # noqa: F811
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

    shutil.rmtree(evaluation)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "evaluate.py", *straight, "batch_size=3"]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | world | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    shown = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "caption_accuracy/all" in shown[0]
    assert shown[1] == ""

    assert images.shape[0] == 40
    for other, scores in ((again, resumed), (pictures(run, "step6-guidance1.5"), results(run))):
        assert (other != images).double().mean() <= 1e-4
        for name, result in first.items():
            assert scores[name]["metrics"] == pytest.approx(result["metrics"], rel=1e-4, abs=1e-6)
            assert scores[name]["protocol"] == result["protocol"]


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


def test_scores_reach_the_run_s_own_wandb_run(runs: Runs, straight: list[str], monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    run = runs.folder / "scored"
    shutil.copytree(runs.folder / "straight", run, ignore=shutil.ignore_patterns("evaluation"))
    saved = config.run_config(run)
    saved.logger = {
        "_target_": "ldm.training.loggers.wandb_logger",
        "run_dir": "elsewhere",
        "project": "p",
        "name": "n",
    }
    config.OmegaConf.save(saved, run / "config.yaml")
    logged: dict[str, object] = {}

    class Fake:
        def log_metrics(self, values: dict[str, float], step: int) -> None:
            logged.update(values)

        def log_table(self, key: str, columns: list[str], data: list[list]) -> None:
            logged[key] = (columns, data)

        def log_image(self, key: str, images: list[str]) -> None:
            logged[key] = images

    def make(run_dir: str, project: str, name: str) -> Fake:
        assert run_dir == str(run)
        return Fake()

    monkeypatch.setattr("ldm.training.loggers.wandb_logger", make)
    words = [f"checkpoint={run}", *straight[1:], "n=20", "sweep.guidance=[1,3]"]
    assert here("evaluate.py", *words) == 0
    assert 0 <= logged["caption_accuracy/all/n20/cfg3/steps3"] <= 1
    assert "frechet/pixels4/n20/reconstruction" in logged
    columns, rows = logged["evaluation/table"]
    assert columns[:2] == ["round", "protocol"]
    assert [row[0] for row in rows] == ["reconstruction", "guidance 1", "guidance 3"]
    assert Path(logged["evaluation/curve"][0]).is_file()
    logged.clear()
    assert here("evaluate.py", *words, "log=false") == 0
    assert logged == {}


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
