"""`ldm import` and `ldm export`: published weights in, a run out."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.screen import RunPath


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A diffusers folder, or a whole model in one .safetensors or .ckpt file."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run directory to make.")],
    prediction: Annotated[
        str | None, typer.Option(metavar="eps|v", help="What the U-Net predicts.", show_default="as SOURCE says")
    ] = None,
) -> None:
    """Make a run directory of Stable Diffusion v1 or v2, SDXL, or a model in their layout, for evaluate.py and train.py.

    `ldm import v1-5-pruned.safetensors runs/sd15`
    """
    from ldm.interop import importing, sources

    model = sources.read(source, prediction)
    importing.write_run(model, out, source)
    for note in model.notes:
        typer.echo(note)
    typer.echo(f"{out}: a run that predicts {model.prediction}, of {model.side} px")


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, or a .safetensors file.")],
    to: Annotated[str, typer.Option(metavar="diffusers|single-file", help="Layout.")] = "diffusers",
    weights: Annotated[str, typer.Option(metavar="ema|raw", help="Averaged, or as last trained.")] = "ema",
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="Of the weights.")] = "float32",
) -> None:
    """Write a run as what diffusers, ComfyUI and A1111 load, and read it back to compare.

    `ldm export runs/mine mine_diffusers`, `ldm export runs/mine mine.safetensors --to single-file`
    """
    from ldm.interop import exporting

    exporting.export(run, out, to, weights, dtype)
    typer.echo(f"{out}: written, read back, and the same")
