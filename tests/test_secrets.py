"""Keys and tokens of the environment are in no file that a run writes, and are refused everywhere else."""

import json
import zipfile
from pathlib import Path

import pytest
from tiny import process

SECRETS = {
    "WANDB_API_KEY": "5ec2e7aa" * 5,
    "HF_TOKEN": "hf_" + "S3cretTokenOfTheHub" * 2,
    "AWS_SECRET_ACCESS_KEY": "aws/S3cretS3cretS3cretS3cretS3cretS3cret",
}
TINY = ["experiment=demo_autoencoder", "trainer=cpu", "callbacks.progress=null", "trainer.enable_progress_bar=false",
        "model/lr_schedule=warmup", "model.lr_schedule.warmup=2", "callbacks.pictures.count=2", "trainer.log_every_n_steps=1",
        "data.batch_size=8", "data.val_samples=8", "data.val_batch_size=8", "model.autoencoder.channels=8",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "logger.timeout=5"]  # fmt: skip


def holders(folder: Path) -> list[str]:
    """Files under a folder that hold a secret's bytes, also inside archives."""
    found = []
    for path in [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]:
        contents = [path.read_bytes(), path.name.encode()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        found += [str(path) for value in SECRETS.values() if any(value.encode() in content for content in contents)]
    return found


@pytest.fixture(scope="module")
def run(tiny_shards: str, tiny_val: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, scored run with its card, and W&B's offline files; all of it saw the secrets."""
    run = tmp_path_factory.mktemp("secrets") / "run"
    data = [f"data.shards={tiny_shards}", f"data.val_shards={tiny_val}"]
    for command in (
        ["train.py", *TINY, *data, f"run_dir={run}"],
        ["evaluate.py", f"checkpoint={run}", "n=8", "pictures=4", "metrics=pixels", "log=false",
         f"reference_cache={run}/reference"],
        ["-m", "ldm.cli", "card", str(run)],
    ):  # fmt: skip
        done = process(*command, **SECRETS)
        assert done.returncode == 0, done.stderr
        assert not any(value in done.stdout + done.stderr for value in SECRETS.values())
    return run


def test_no_file_of_a_run_holds_a_secret(run: Path):
    written = {path.name for path in run.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "step_00000002.ckpt", "README.md", "results.json", "wandb"} <= written
    assert list(run.rglob("*.wandb"))
    assert holders(run) == []


def test_the_search_finds_one_that_is_there(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"tags": [SECRETS["WANDB_API_KEY"]]}))
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", SECRETS["HF_TOKEN"])
    assert len(holders(tmp_path)) == 2


@pytest.mark.parametrize(
    "override",
    [
        "logger.api_key={}",
        "+logger.api_key={}",
        "logger.tags=[{}]",
        "name={}",
        "+wandb_api_key={}",
        "data.shards=s3://a:{}@b",
    ],
)
def test_a_key_on_the_command_line_is_refused_before_anything_is_written(override: str, tmp_path: Path):
    key = SECRETS["WANDB_API_KEY"]
    done = process("train.py", *TINY, f"run_dir={tmp_path}/run", override.format(key), **SECRETS)
    assert done.returncode == 2
    assert "put it in WANDB_API_KEY in the environment" in done.stderr
    assert (done.stderr.count("\n"), key in done.stdout + done.stderr, (tmp_path / "run").exists()) == (1, False, False)
