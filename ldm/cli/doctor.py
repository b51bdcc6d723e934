"""`ldm doctor`: is this machine fit."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ldm.cli.screen import AsJson, console
from ldm.errors import MissingError, UserError

BANNED = {"pytorch-lightning": ("2.6.2", "2.6.3"), "lightning": ("2.6.2", "2.6.3")}  # malicious: GHSA-w37p-236h-pfx3
SHM, DISK = 2**30, 5 * 2**30  # bytes that data workers, and a few checkpoints, want
_MARKS = {"good": "[green]good[/]", "absent": "[dim]absent[/]", "broken": "[red]broken[/]"}


class Finding(NamedTuple):
    """state: good, absent (needed only by some), broken."""

    what: str
    state: str
    said: str


def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option(help="What has to be here: gpu, slurm, wandb, or weights by name; may be repeated."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Look at this machine: versions, GPU, memory, disk, SLURM, W&B, weights. Exit code 4: something is broken.

    `ldm doctor --need gpu --need clip_l`
    """
    from json import dumps

    found = [*_packages(), *_machine(), *_services(), *_weights()]
    unknown = set(need or []) - {each.what for each in found}
    if unknown:
        raise UserError(f"--need {min(unknown)}: give one of {', '.join(each.what for each in found)}")
    found = [
        each._replace(state="broken") if each.what in (need or []) and each.state == "absent" else each
        for each in found
    ]
    if json:
        typer.echo(dumps([each._asdict() for each in found], indent=2))
    else:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for each in found:
            grid.add_row(each.what, _MARKS[each.state], each.said)
        console().print(grid, highlight=False)
    raise typer.Exit(MissingError.exit_code if any(each.state == "broken" for each in found) else 0)


def _packages() -> Iterator[Finding]:
    """Python, and what pyproject.toml asks for, against its bounds."""
    from packaging.requirements import Requirement

    yield Finding("python", "good", sys.version.split()[0])
    for line in requires("ldm") or []:
        requirement = Requirement(line)
        if requirement.marker is None:  # not an extra
            yield _package(requirement.name, requirement.specifier)
    yield from (found for found in [_package("lightning", None)] if found.state == "broken")  # not ours to ask for


def _package(name: str, bounds: Any) -> Finding:
    try:
        here = version(name)
    except PackageNotFoundError:
        return Finding(name, "broken" if bounds else "absent", "not installed")
    if here in BANNED.get(name, ()):
        return Finding(
            name, "broken", f"{here} is a malicious release: remove it, and change every key on this machine"
        )
    if bounds and not bounds.contains(here, prereleases=True):
        return Finding(name, "broken", f"{here}, but ldm asks for {bounds}")
    return Finding(name, "good", here)


def _machine() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("gpu", "good", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    else:
        yield Finding("gpu", "absent", f"torch {torch.__version__} sees none")
    yield Finding("cores", "good", str(len(os.sched_getaffinity(0))))
    for what, path, wanted in (("shm", "/dev/shm", SHM), ("disk", ".", DISK)):
        free = shutil.disk_usage(path).free if Path(path).exists() else 0
        said = f"{free / 2**30:,.1f} GB free" + ("" if free >= wanted else f", less than {wanted / 2**30:.0f}")
        yield Finding(what, "good" if free >= wanted else "broken", said)


def _services() -> Iterator[Finding]:
    from ldm.training.loggers import has_key

    slurm = shutil.which("sbatch")
    yield Finding("slurm", "good" if slurm else "absent", slurm or "no sbatch: slurm/ is for clusters")
    key = has_key()
    yield Finding("wandb", "good" if key else "absent", "a key is here" if key else "no key: runs are logged offline")


def _weights() -> Iterator[Finding]:
    from ldm import fetch

    for name in fetch.KNOWN:
        try:
            yield Finding(name, "good", str(fetch.local(name)))
        except UserError:
            yield Finding(name, "absent", f"ldm fetch {name}")
