"""`ldm compare`: runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.screen import AsJson, console


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Directories of runs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page too, with pictures and training curves.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what differs between runs: their configuration, and their scores where these compare.

    Scores stand side by side only when they are of the same captions, reference pictures, number, size and feature networks;
    of all others it is said what differs.
    """
    from json import dumps

    from ldm.evaluation import compare

    found = compare.compare(runs)
    if out is not None:
        compare.write(found, out)
    if json:
        typer.echo(dumps(compare.plain(found), indent=2))
        return
    screen = console()
    for table in compare.tables(found):
        screen.print(table)
    for sentence in compare.sentences(found):
        screen.print(f"not compared: {sentence}", highlight=False, markup=False)
    if out is not None:
        screen.print(f"page: {out}", highlight=False, markup=False)
