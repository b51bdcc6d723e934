"""`ldm fetch`: pretrained weights by name."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.errors import UserError


def fetch(
    what: Annotated[
        str,
        typer.Argument(metavar="CONFIG_OR_NAME", help="vgg16, clip_l ..., owner/name@commit, a run or a conditioner."),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="File or folder.", show_default="a cache")] = None,
) -> None:
    """Download pretrained weights, check their digests, and write a manifest beside them: all else here works offline.

    `ldm fetch clip_l`, `ldm fetch vgg16 weights/vgg16.pth`, `ldm fetch sdxl`
    """
    from ldm import config
    from ldm.fetch import fetch, named_in

    files = [Path(what), Path(what, "config.yaml"), config.CONFIGS / "model" / "conditioner" / f"{what}.yaml"]
    names = next((named_in(path) for path in files if path.is_file()), []) or [what]
    if out is not None and len(names) > 1:
        raise UserError(f"{what} needs several weights ({', '.join(names)}): fetch each into a place of its own")
    for name in names:
        typer.echo(f"{name}: {fetch(name, out)}")
