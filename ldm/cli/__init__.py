"""The `ldm` command: thin verbs over the library, one file each.

A verb imports the library inside itself: `ldm --help` answers at once. Exit codes: 0 fine, 2 a mistake of the user's, 3 damaged
data, 4 something missing on this machine, 75 run me again.
"""

import sys

import typer

from ldm.cli import card, compare, cp, doctor, ema, evaluate, fetch, interop, ls, plan, sample, shards, show, stats, ui
from ldm.cli.screen import LOOK
from ldm.errors import UserError

app = typer.Typer(name="ldm", pretty_exceptions_enable=False, **LOOK)


@app.callback()
def _ldm() -> None:
    """Text-to-image latent diffusion: tools beside train.py and evaluate.py."""


app.command()(ls.ls)
app.command()(show.show)
app.command()(cp.cp)
app.add_typer(shards.app, name="shards")
app.command()(sample.sample)
app.command()(fetch.fetch)
app.command("import")(interop.import_)
app.command()(interop.export)
app.command()(ema.ema)
app.command()(plan.plan)
app.command()(compare.compare)
app.command()(stats.stats)
app.command()(ui.ui)
app.command()(evaluate.evaluate)
app.command()(card.card)
app.command()(doctor.doctor)


def main() -> None:
    """A mistake of the user's, or the system's refusal (disk full, no such folder), is one line and its exit code."""
    try:
        app()
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"error: {message}", err=True)
        sys.exit(UserError.exit_code)
    except Exception:
        from ldm.config_errors import mistakes_in_one_line

        with mistakes_in_one_line(show_traceback=False):
            raise
