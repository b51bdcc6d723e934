"""How the verbs look and write."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

# markdown: paragraphs are filled, not kept as here
LOOK: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "markdown"}


def console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _runs(incomplete: str) -> Iterator[str]:
    """For the shell: directories of runs."""
    from ldm.runs import find

    folder = Path(incomplete).parent if "/" in incomplete else Path("runs")
    yield from (str(path) for path in find(folder) if str(path).startswith(incomplete or "runs"))


def _experiments(incomplete: str) -> list[str]:
    from ldm.config_help import headers

    return [each.name for each in headers("experiment") if each.name.startswith(incomplete)]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", autocompletion=_runs)]
Experiment = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="One of configs/experiment.", autocompletion=_experiments)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
