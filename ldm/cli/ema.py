"""`ldm ema`: averages of any length after training."""

from pathlib import Path
from typing import Annotated

import typer


def ema(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run trained with callbacks=[latent_diffusion,power_ema].")
    ],
    length: Annotated[float, typer.Option(help="Of the average, over the length of training: EDM2's sigma_rel.")],
    at: Annotated[
        int | None, typer.Option(metavar="STEP", help="A step with a snapshot.", show_default="the last")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", show_default="RUN/ema/length_...")] = None,
) -> None:
    """Reconstruct a run's average of any length, for evaluate.py ... ema=FILE: `ldm ema runs/averaged --length 0.07`."""
    from ldm.training import power_ema

    path, made = power_ema.save(run, length, at, out)
    typer.echo(f"{path}: step {made.step}, from {made.sources} averages, {made.error:.2%} off the length's own weights")
