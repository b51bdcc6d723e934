"""`ldm stats`: what evaluation needs to know of reference pictures, ahead of time."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.screen import AsJson


def stats(
    shards: Annotated[
        list[str], typer.Argument(metavar="SHARDS...", help="Of reference pictures, as in 'coco/{00000..00029}.tar'.")
    ],
    metrics: Annotated[
        list[str] | None, typer.Option(help="One of configs/metrics; may be repeated.", show_default="the protocol's")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="One of configs/protocol, for its metrics, side and n.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the protocol's")] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="So many, from the first.", show_default="the protocol's, or all")
    ] = None,
    cache: Annotated[Path | None, typer.Option(metavar="FOLDER", show_default="evaluate.py's")] = None,
    json: AsJson = False,
) -> None:
    """Look at reference pictures once and keep what each network saw, by their digest and its own.

    evaluate.py finds it there: ldm stats 'coco/{00000..00029}.tar' --protocol coco30k_512
    """
    from json import dumps

    from ldm import config
    from ldm.errors import UserError

    for group, names in (("metrics", metrics or []), ("protocol", [protocol] if protocol else [])):
        for name in names:
            config.option(group, name)
    if not (metrics or protocol):
        raise UserError("which networks shall look at the pictures? Give --metrics NAME or --protocol NAME")
    chosen = [f"metrics=[{','.join(metrics)}]"] if metrics else []
    cfg = config.compose("name=stats", *([f"+protocol={protocol}"] if protocol else []), *chosen)
    if side is not None:
        cfg.data.side = cfg.data.decode.side = side
    if cfg.data.get("side") is None:
        raise UserError("the pictures' side is missing: give --side, as in data.side=... of the runs to score")
    n = n or cfg.get("n")
    cfg.data.shards = cfg.data.val_shards = shards
    cfg.data.batch_size = cfg.data.steps = 1  # of training, which there is none of
    cfg.data.val_samples = n
    import torch

    from ldm.evaluation.metrics import FeatureMetrics
    from ldm.evaluation.scoring import Reference, remember

    built = [metric for metric in config.build_each(cfg.metrics) if isinstance(metric, FeatureMetrics)]
    for metric in built:
        metric.features.to("cuda" if torch.cuda.is_available() else "cpu")
    reference = Reference.read(config.build(cfg.data).val.batches(64), n)
    folder = cache or Path(config.option(".", "evaluate").reference_cache)
    kept = remember(reference, built, folder)
    if json:
        files = {name: str(path) for name, path in kept.items()}
        typer.echo(dumps({"n": len(reference.captions), "side": cfg.data.side, "files": files}, indent=2))
        return
    for name, path in kept.items():
        typer.echo(f"{name}: {len(reference.captions):,} pictures of {cfg.data.side} px, {path}")
