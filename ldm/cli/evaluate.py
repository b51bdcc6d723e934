"""`ldm evaluate`: evaluate.py under a shorter name."""

import runpy
import sys
from typing import Annotated

import typer

from ldm.cli.screen import AsJson, RunPath


def evaluate(
    run: RunPath,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="As for evaluate.py.")] = None,
    json: AsJson = False,
) -> None:
    """Score a run: `ldm evaluate runs/demo n=384 'sweep.guidance=[0,1,1.5]'`. The same as evaluate.py checkpoint=RUN ...

    --json prints all results of its newest checkpoint, in place of the table.
    """
    from contextlib import nullcontext, redirect_stdout
    from json import dumps

    from ldm import config
    from ldm.evaluation.results import newest

    sys.argv = ["evaluate.py", f"checkpoint={run}", *(overrides or [])]
    with redirect_stdout(sys.stderr) if json else nullcontext():
        runpy.run_path(str(config.CONFIGS.parent / "evaluate.py"), run_name="__main__")
    if json:
        typer.echo(dumps([each._asdict() for each in newest(run / "evaluation")], indent=2, default=str))
