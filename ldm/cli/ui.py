"""`ldm ui`: a page for trying a run."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.errors import MissingError

if TYPE_CHECKING:
    from ldm.diffusion.sampling import Sampling
    from ldm.training.latent_diffusion import LatentDiffusionModule
    from ldm.training.ui import Trial

OWN = "the run's"  # solver


def ui(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 lets everybody in who can reach this machine.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(show_default="7860, or the next that is free")] = None,
) -> None:
    """Try a run in the browser: `ldm ui runs/demo`. Nothing leaves this machine.

    Prompts, seed, solver, guidance, checkpoints and averages side by side, a picture to start from, a mask. Every picture can be
    downloaded, with the parameters inside that made it.
    """
    from tempfile import TemporaryDirectory

    from ldm import config

    config.run_config(run)
    if find_spec("gradio") is None:
        raise MissingError("ldm ui needs Gradio: pip install -e '.[ui]'")
    with TemporaryDirectory() as folder:  # Gradio reads these when it is imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")  # it calls itself
        from ldm.training.ui import page, serve

        blocks = page(trial(run), Path(folder))
        typer.echo(f"{run} is at {serve(blocks, host, port)} (Ctrl-C ends it)")
        blocks.block_thread()


def trial(run: Path) -> "Trial":
    """What the page needs to know of a run. Raises UserError: it has no checkpoint, or none that can be drawn with."""
    from functools import lru_cache

    import torch

    from ldm import config
    from ldm.training import checkpointing, drawing
    from ldm.training.ui import Trial

    cfg = config.run_config(run)

    def sampling(solver: str, guidance: float, steps: int) -> "tuple[Sampling, dict[str, Any]]":
        return config.sampling(cfg, None if solver == OWN else solver, guidance, steps)

    @lru_cache(maxsize=2)
    def load(average: str, step: int | None) -> "LatentDiffusionModule":
        module = drawing.of_stage_two(config.load_run(run, _which(average), step)[0])
        return module.to("cuda" if torch.cuda.is_available() else "cpu")

    checkpoints = [checkpointing.step_of(path) for path in checkpointing.by_step(run)]
    load("average", max(checkpoints, default=None))  # what is wrong with it is told now, not at the first picture
    lengths = ((cfg.get("callbacks") or {}).get("power_ema") or {}).get("lengths", [])
    return Trial(
        run=str(run),
        side=cfg.data.side,
        solvers=[OWN, *config.options("sampling/solver")],
        averages=["average", "raw", *map(str, lengths)],
        checkpoints=checkpoints,
        steps=cfg.sampling.steps,
        guidance=cfg.sampling.guidance.scale,
        sampling=sampling,
        load=load,
    )


def _which(average: str) -> float | str | None:
    """An average's name -> as config.load_run takes it."""
    if average == "average":
        return None
    try:
        return float(average)
    except ValueError:
        return average
