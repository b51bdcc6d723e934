"""`ldm cp`: an experiment of your own out of one that ships."""

import re
from typing import Annotated

import typer

from ldm.cli.screen import Experiment
from ldm.errors import UserError


def cp(
    experiment: Experiment,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the new experiment, and of its run.")],
) -> None:
    """Copy an experiment to configs/experiment/NAME.yaml, to edit: `ldm cp demo mine`.

    Hydra finds it there by its name: python train.py experiment=mine
    """
    from ldm import config

    config.option("experiment", experiment)  # refused in one line where it is not there
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise UserError(f"{name!r} is to name a file: use letters, digits, _ and -")
    source, out = (config.CONFIGS / "experiment" / f"{each}.yaml" for each in (experiment, name))
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or edit that one")
    text = re.sub(rf"\bexperiment={experiment}(?![\w-])", f"experiment={name}", source.read_text())
    out.write_text(re.sub(r"^name: .*$", f"name: {name}", text, flags=re.MULTILINE))
    typer.echo(f"{out}: edit it, then: python train.py experiment={name}")
