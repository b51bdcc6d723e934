"""Two loggers: metrics.jsonl, which every run has, and Weights & Biases, offline when there is no key."""

import json
import math
import netrc
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from ldm.files import aside, cut_after
from ldm.training.checkpointing import Checkpoint, best_of, newest
from ldm.training.session import say


class JsonlLogger(Logger):
    """run_dir/metrics.jsonl: one object per logged step: `step`, `samples_seen`, then the metrics by name;
    null stands for what is not finite.

    Args:
        run_dir: the run's directory.
        batch_size: the global batch: samples seen are step * batch_size.
    """

    def __init__(self, run_dir: Path, batch_size: int) -> None:
        super().__init__()
        self.path, self.batch_size = Path(run_dir) / "metrics.jsonl", batch_size

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        done = (step or 0) + 1  # Lightning logs under the index of the step just finished
        # JSON has neither NaN nor infinity: null, or a strict reader refuses the whole file
        values = {k: v if math.isfinite(v) else None for k, v in sorted(metrics.items()) if k != "epoch"}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": done, "samples_seen": done * self.batch_size, **values}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml has them

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Go on from the checkpoint at `step`."""
        cut_after(self.path, step)


class Wandb(WandbLogger):
    """Weights & Biases over samples seen. A server that does not let the run begin in time leaves it offline.

    Args:
        batch_size: the global batch: samples seen are step * batch_size.
        options: see WandbLogger.
    """

    def __init__(self, batch_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.batch_size = batch_size
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            import wandb

            try:
                _ = super().experiment
            except Exception as error:  # W&B's have no class in common
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"W&B does not answer ({why}), so the run is logged offline")
                wandb.teardown()  # it still holds the run's id
                self._wandb_init["mode"] = "offline"
                _ = super().experiment
            run: Any = self._experiment
            run.define_metric("samples_seen")
            run.define_metric("*", step_metric="samples_seen", step_sync=True)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        seen = {} if step is None else {"samples_seen": (step + 1) * self.batch_size}  # without: W&B repeats the last
        super().log_metrics({**metrics, **seen}, step)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """The newest as an artifact that refers to the file, which stays where it is; its digest is the manifest's."""
        import wandb

        path = newest(checkpoint_callback.run_dir)
        assert path is not None
        manifest = json.loads(path.with_suffix(".json").read_text())
        metadata = {"step": manifest["step"], "samples_seen": manifest["samples_seen"], **manifest["files"][path.name]}
        artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", "model", metadata=metadata)
        artifact.add_reference(path.resolve().as_uri(), checksum=False)
        best = best_of(checkpoint_callback.run_dir)
        aliases = ["best"] if best and best["step"] == manifest["step"] else []
        self.experiment.log_artifact(artifact, aliases=["latest", f"step_{manifest['step']}", *aliases])


def wandb_logger(run_dir: str, batch_size: int, timeout: float = 30.0, **options: Any) -> Wandb:
    """A Wandb whose run id lives in the run directory, so that the same command continues the same W&B run.

    Args:
        run_dir: the run's directory.
        batch_size: the global batch.
        timeout: seconds that the server has to begin a run, and to take what is left at its end.
        options: of wandb.init: project, name, group, job_type, tags ...
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # the banner says where the run is
    # that of whoever started this process may still hold the id of this run's last life
    os.environ.pop("WANDB_SERVICE", None)
    folder = Path(run_dir)
    id_file = folder / "wandb_id"
    if rank_zero_only.rank == 0 and not id_file.exists():
        with aside(id_file) as partial:
            partial.write_text(secrets.token_hex(4))
    identity = id_file.read_text().strip() if id_file.exists() else None  # other ranks log nothing
    offline = os.environ.get("WANDB_MODE") == "offline" or not (has_key() and _reachable())
    settings = wandb.Settings(init_timeout=timeout, finish_timeout=timeout, login_timeout=timeout)
    return Wandb(batch_size, id=identity, offline=offline, save_dir=folder, settings=settings, **options)


def _reachable() -> bool:
    """Whether the server answers within seconds: waiting for one that does not would hold up training for minutes."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        with socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=3):
            return True
    except OSError:
        return False


def has_key() -> bool:
    """Whether W&B would find a key of this user's."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
