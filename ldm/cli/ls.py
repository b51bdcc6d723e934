"""`ldm ls`: what there is: runs, experiments, options."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.screen import AsJson, console
from ldm.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from ldm.runs import Run

_COLORS = {"running": "green", "stopped": "yellow", "finished": "dim"}


def ls(
    what: Annotated[
        str, typer.Argument(metavar="[WHAT]", help="runs, experiments, configs, or a group such as model/backbone.")
    ] = "runs",
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs"),
    json: AsJson = False,
) -> None:
    """List runs with their state and last scores, experiments with their cost, or what a group offers.

    `ldm ls`, `ldm ls experiments`, `ldm ls sampling/solver`
    """
    from json import dumps

    from ldm import config_help, runs
    from ldm.config_errors import groups, nearest

    found: Any
    if what == "runs":
        found = [runs.read(path) for path in runs.find(folder)]
        table = _of_runs(found)
    elif what == "configs":
        found = config_help.choices()
        table = _table({"group": "cyan", "options": ""}, [(name, ", ".join(names)) for name, names in found.items()])
    elif what.rstrip("s") in ("experiment", "protocol") or what in groups():
        found = config_help.headers(what.rstrip("s") if what not in groups() else what)
        cost = {"cost": ""} if any(each.cost for each in found) else {}
        rows = [(each.name, each.what, *([each.cost] if cost else [])) for each in found]
        table = _table({"name": "cyan", "": "", **cost}, rows)
    else:
        raise UserError(
            f"nothing to list is called {what}{nearest(what, ['runs', 'experiments', 'configs', *groups()])}"
        )
    if json:
        typer.echo(
            dumps([each._asdict() for each in found] if isinstance(found, list) else found, indent=2, default=str)
        )
    elif not found:
        console().print(f"no {what} in {folder}; train one: python train.py experiment=demo", highlight=False)
    else:
        console().print(table)


def _of_runs(found: "list[Run]") -> "Table":
    from ldm import runs

    rows = [
        (
            str(run.path),
            run.state,
            f"{run.step:,} of {run.of:,}" if run.of else "imported",
            runs.headline(run.metrics),
            runs.ago(run.age),
        )
        for run in found
    ]
    return _table({"run": "cyan", "state": "", "step": "", "last": "", "when": "dim"}, rows)


def _table(columns: dict[str, str], rows: Sequence[tuple[str, ...]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, style in columns.items():
        table.add_column(name, style=style or None, no_wrap=style != "", justify="right" if name == "step" else "left")
    for row in rows:
        table.add_row(*(Text(cell, _COLORS.get(cell, "")) for cell in row))  # not markup: a cell may hold [brackets]
    return table
