"""`ldm sample`: pictures for a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.screen import RunPath


def sample(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("samples"),
    negative: Annotated[str, typer.Option(help="A prompt to lead away from.")] = "",
    count: Annotated[int, typer.Option(min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Picture i is a function of the seed, i and the rest alone.")] = 0,
    side: Annotated[int | None, typer.Option(help="Pixels.", show_default="the run's")] = None,
    steps: Annotated[int | None, typer.Option(show_default="the run's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale.", show_default="the run's")] = None,
    solver: Annotated[
        str | None, typer.Option(help="One of configs/sampling/solver.", show_default="the run's")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float, typer.Option(help="Share of the steps taken from it.")] = 0.7,
    mask: Annotated[Path | None, typer.Option(help="With --init: white where to paint, black where to keep.")] = None,
    depth: Annotated[Path | None, typer.Option(help="For models that see depth: a gray picture.")] = None,
) -> None:
    """Draw pictures for a prompt: `ldm sample runs/demo "a small red star on black" --guidance 1.5`.

    Every PNG holds the parameters that made it.
    """
    from ldm import config

    cfg = config.run_config(run)
    sampling, how = config.sampling(cfg, solver, guidance, steps)
    import torch

    from ldm.training import drawing

    loaded, step = config.load_run(run)
    module = drawing.of_stage_two(loaded).to("cuda" if torch.cuda.is_available() else "cpu")
    request = drawing.Request(prompt, side or cfg.data.side, negative, count, 0, seed, init, strength, mask, depth)
    told = drawing.parameters(str(run), step, how, request)
    for path in drawing.save(drawing.draw(module, sampling, request), out, f"seed{seed}", 0, told):
        typer.echo(path)
