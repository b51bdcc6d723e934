"""What there is to choose from, read from the comments of the yaml files: `python train.py --help`, `ldm ls`."""

import re
from pathlib import Path
from typing import NamedTuple

from ldm.config_errors import CONFIGS, groups


class Header(NamedTuple):
    """What the comment at the top of a file says."""

    name: str
    what: str
    command: str
    cost: str
    expect: str


def header(path: Path) -> Header:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    text = "\n".join(line for line in lines if line != "@package _global_")
    command = re.search(r"python (?:train|evaluate)\.py (?:[^\n]*\\\n)*[^\n]*", text)
    rest = text.replace(command[0], "") if command else text
    parts = [" ".join(part.split()).strip(" :") for part in re.split(r"\b(Cost:|Expect:)", rest)]
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    written = re.sub(r"\\\n\s*", "", command[0]).rstrip(".") if command else ""
    return Header(path.stem, parts[0], written, said.get("Cost", "").rstrip("."), said.get("Expect", ""))


def headers(group: str) -> list[Header]:
    """Of every option of a group, as `experiment`."""
    return [header(path) for path in sorted((CONFIGS / group).glob("*.yaml"))]


def choices() -> dict[str, list[str]]:
    """The options of every group but the experiments and protocols."""
    found = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in groups()}
    return {group: names for group, names in found.items() if names and group not in ("experiment", "protocol")}


def page(config_name: str) -> None:
    """Shows the command, its experiments or protocols with what they cost, and the groups with their options."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    training = config_name == "train"
    group = "experiment" if training else "protocol"
    first = (CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    console.print(f"{first.removeprefix('# ')}\n")
    found = headers(group)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    names, costs = max(len(each.name) for each in found), 28 if training else 0
    table.add_column(f"{group}=", style="cyan", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(20, console.width - names - costs - 6))
    table.add_column("cost" if training else "", no_wrap=True, overflow="ellipsis", max_width=costs)
    for each in found:
        table.add_row(each.name, each.what, each.cost)
    console.print(table)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("\ngroup=", style="cyan", no_wrap=True)
    table.add_column("\none of")
    for name, options in choices().items():
        if training or name.startswith(("metrics", "sampling")):
            table.add_row(name, ", ".join(options))
    console.print(table)
    example = f"python {config_name}.py {'experiment=demo' if training else 'checkpoint=runs/demo'}"
    console.print(f"\nOne value:   {example} sampling.guidance.scale=4")
    console.print(f"All of them: {example} --cfg job --resolve")
