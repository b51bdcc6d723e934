import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from PIL import Image

from ldm.training.checkpointing import Checkpoint, newest
from ldm.training.loggers import JsonlLogger, wandb_logger


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_line_is_step_samples_and_sorted_metrics(tmp_path: Path):
    log = JsonlLogger(tmp_path, batch_size=32)
    log.log_metrics({"val/b": 0.5, "epoch": 3, "train/a": 1}, step=9)
    log.log_metrics({"train/a": 2}, step=None)
    assert lines(tmp_path)[0] == '{"step": 10, "samples_seen": 320, "train/a": 1, "val/b": 0.5}'
    assert json.loads(lines(tmp_path)[1]) == {"step": 1, "samples_seen": 32, "train/a": 2}


def test_what_is_not_finite_is_null(tmp_path: Path):
    JsonlLogger(tmp_path, 1).log_metrics({"a": float("nan"), "b": float("-inf"), "c": 1.0}, 0)
    assert lines(tmp_path) == ['{"step": 1, "samples_seen": 1, "a": null, "b": null, "c": 1.0}']


def test_resume_drops_what_will_be_logged_again(tmp_path: Path):
    log = JsonlLogger(tmp_path, batch_size=1)
    for step in range(5):
        log.log_metrics({"loss": step / 2}, step)
    before = lines(tmp_path)
    log.path.write_text("\n".join(before) + '\n{"step": 3, "lo')  # the kill cut the last line
    log.resume(3)
    assert lines(tmp_path) == before[:3]
    log.log_metrics({"loss": 1.5}, 3)
    assert lines(tmp_path) == before[:4]
    log.resume(0)
    assert lines(tmp_path) == []


def test_resume_without_a_log_does_nothing(tmp_path: Path):
    JsonlLogger(tmp_path, 1).resume(5)
    assert list(tmp_path.iterdir()) == []


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"run_dir": str(folder), "batch_size": 8, "project": "ldm", "name": "tiny"} | more


def records(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the newest offline run."""
    run = max(folder.glob("wandb/offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    got = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in got.stdout.splitlines()]


def test_an_offline_wandb_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")  # the logger sets it too; this has it put back
    ids = []
    for step in (1, 2):
        logger = wandb_logger(**options(tmp_path))
        logger.log_hyperparams({"lr": 0.5})
        logger.log_metrics({"train/loss": 0.25}, step)
        assert logger.experiment.settings._offline
        assert logger.experiment.config["lr"] == 0.5
        ids.append(logger.experiment.id)
        logger.experiment.finish()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
    assert files
    assert all(file.stat().st_size for file in files)


def test_an_offline_run_s_own_file_has_config_history_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read back by W&B's own reader: what `wandb sync` will upload."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = {"group": "demo", "job_type": "train", "tags": ["a", "b"]}
    logger = wandb_logger(**options(tmp_path, **more))
    logger.log_hyperparams({"model": {"backbone": {"channels": 32}}})
    logger.log_metrics({"train/loss": 0.5}, 9)
    logger.log_image("val/samples", [Image.new("RGB", (4, 4), (255, 0, 0))], step=9)
    logger.experiment.finish()
    found = records(tmp_path)
    text = json.dumps(found)
    for each in ("channels", "demo", "val/samples", "media/images", '"a"', '"b"'):
        assert each in text
    history = [row for row in found if row.get("type") == "history"]
    assert any("samples_seen" in json.dumps(row) and "80" in json.dumps(row) for row in history)
    picture = next(tmp_path.glob("wandb/offline-run-*/files/media/images/val/samples_*.png"))
    assert Image.open(picture).getpixel((0, 0)) == (255, 0, 0)


def test_the_service_of_another_process_is_not_joined(tmp_path: Path):
    """A job inherits the environment of who submitted it; that service holds the run's id after the job's first life."""
    code = "import os, sys\nfrom ldm.training.loggers import wandb_logger\n"
    code += "run = wandb_logger(sys.argv[1], 8, project='ldm').experiment\n"
    code += "print(os.environ['WANDB_SERVICE'], flush=True)\n"
    code += "if sys.stdin.read(): run.finish()\nos._exit(0)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    start = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = start(env=os.environ | {"WANDB_MODE": "offline"})
    service = first.stdout.readline().strip()
    second = start(env=os.environ | {"WANDB_MODE": "offline", "WANDB_SERVICE": service})
    assert second.stdout.readline().strip() not in ("", service)
    for process in (second, first):
        process.communicate("end", timeout=60)
        assert process.returncode == 0
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


@pytest.fixture
def blackhole() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_r10_a_server_that_never_answers_costs_seconds_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], blackhole: str
):
    for name, value in {"WANDB_BASE_URL": blackhole, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_SILENT": "true",
                        "HOME": str(tmp_path), "NETRC": os.devnull}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it has read the environment
    begin = time.monotonic()
    logger = wandb_logger(**options(tmp_path, timeout=2.0))
    logger.log_metrics({"train/loss": 0.5}, 0)
    assert "W&B does not answer" in capsys.readouterr().out
    logger.experiment.finish()
    assert time.monotonic() - begin < 60
    assert "train/loss" in json.dumps(records(tmp_path))
    wandb.teardown()


@pytest.mark.parametrize(("key", "listening"), [(None, True), ("0" * 40, True), ("0" * 40, False)])
def test_offline_unless_there_are_a_key_and_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, listening: bool
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # Lightning writes to it; this has it put back
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", os.devnull)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if not listening:
            server.close()
        logger = wandb_logger(**options(tmp_path))  # nothing is sent before a log
    assert logger._offline is not (key is not None and listening)


def test_a_checkpoint_is_an_artifact_that_refers_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = wandb_logger(**options(tmp_path))
    state = {"global_step": 7, "state_dict": {}}
    trainer = SimpleNamespace(
        global_step=7, is_global_zero=True, loggers=[logger], datamodule=SimpleNamespace(samples_seen=56),
        _checkpoint_connector=SimpleNamespace(dump_checkpoint=lambda weights_only: state),
    )  # fmt: skip
    callback = Checkpoint(str(tmp_path), every=1, best="val/loss")
    callback.save(trainer, best=0.5)
    path = newest(tmp_path)
    identity = logger.experiment.id
    logger.experiment.finish()
    (written,) = [json.dumps(row) for row in records(tmp_path) if row["type"] == "artifact"]
    digest = json.loads(path.with_suffix(".json").read_text())["files"][path.name]["sha256"]
    for each in (f"checkpoint-{identity}", path.resolve().as_uri(), digest, "step_7", "best"):
        assert each in written
