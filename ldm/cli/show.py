"""`ldm show`: one run."""

import typer

from ldm.cli.screen import AsJson, RunPath, console


def show(run: RunPath, json: AsJson = False) -> None:
    """Say how a run differs from its experiment, what it last measured, its checkpoints and scores: `ldm show runs/demo`."""
    from json import dumps

    from rich.table import Table

    from ldm import config, runs
    from ldm.evaluation.results import grouped, newest, table

    found = runs.read(run)
    experiment, changed = config.changes(run)
    checkpoints = runs.checkpoints(run)
    results = newest(run / "evaluation")
    if json:
        facts = {**found._asdict(), "experiment": experiment, "changed": changed, "checkpoints": checkpoints}
        typer.echo(dumps({**facts, "results": [each._asdict() for each in results]}, indent=2, default=str))
        return
    screen, grid = console(), Table.grid(padding=(0, 2))
    step = f"step {found.step:,} of {found.of:,}" if found.of else "imported"
    grid.add_row("[dim]state", f"{found.state}, {step}, {runs.ago(found.age)}")
    for key, (here, there) in changed.items():
        grid.add_row("[dim]changed", f"{key}={here} [dim](experiment {experiment}: {there})[/]")
    for key, value in found.metrics.items():
        grid.add_row("[dim]last", f"{key} {'not finite' if value is None else f'{value:.4g}'}")
    for path in checkpoints:
        grid.add_row("[dim]checkpoint", f"{path} [dim]{path.stat().st_size / 2**20:,.1f} MB[/]")
    screen.print(f"[bold]{run}[/]: {found.model}", highlight=False)
    screen.print(grid, highlight=False)
    for group in grouped(results):
        screen.print(table(group, f"scores, protocol {group[0].protocol.get('n', '?')} samples"))
    if not results:
        screen.print(f"no scores yet: python evaluate.py checkpoint={run}", highlight=False)
