"""`ldm shards`: make, check and index shards of captioned pictures; cache latents and text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.screen import LOOK, console

DAMAGE = 3  # an exit code
app = typer.Typer(help="Make, check and index shards of captioned pictures.", **LOOK)
Shards = Annotated[
    list[str], typer.Argument(metavar="SHARDS...", help="Local shards, as in 'data/{00000..00012}.tar'.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; they change only the speed.", show_default="one a core")
]


@app.command()
def make(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder, or a .csv, .tsv, .jsonl or .parquet table.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    shard_size: Annotated[int, typer.Option(min=1, max=9999, help="Items of a shard.")] = 1000,
    workers: Workers = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table.", show_default="by its name")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of a table.", show_default="by its name")] = None,
) -> None:
    """Write shards from pictures and captions. The same command resumes: `ldm shards make pictures/ data/mine`.

    A folder: pictures with the caption in the .txt or the .json ("caption") beside each. A table: a row for each picture, with
    its path relative to the table, or in Parquet its bytes. JPEG and PNG files are stored as they are, WebP as PNG. What cannot
    be used is counted by reason, here and in OUT/make_report.json.
    """
    from ldm.data import making
    from ldm.data.inputs import open_source

    made = making.make(open_source(source, image_column, caption_column), out, shard_size, workers)
    making.show(made, out, console())


@app.command()
def check(
    shards: Shards,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all findings as JSON; -: to stdout.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode the pictures, or read only their headers.")] = True,
    workers: Workers = None,
    duplicates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the keys of repeated pictures, for data.filters.")
    ] = None,
) -> None:
    """Read every sample as training would, and count what it would drop. Exit code 3: there is damage."""
    from json import dumps

    from ldm.data import audit

    found = audit.audit(audit.local_shards(shards), decode, workers)
    summary = audit.summary(found)
    audit.show(summary, console(stderr=json == "-"))
    if json == "-":
        typer.echo(dumps(summary, indent=2))
    elif json is not None:
        Path(json).write_text(dumps(summary, indent=2))
    if duplicates is not None:
        audit.write_duplicates(found.samples, duplicates)
    raise typer.Exit(0 if found.clean else DAMAGE)


@app.command()
def index(shards: Shards, workers: Workers = None) -> None:
    """Write NNNNN.index.json (count, bytes, sha256) beside each sound shard. Exit code 3: a damaged one got none."""
    from ldm.data import audit

    paths = audit.local_shards(shards)
    damage = audit.index(paths, workers)
    damaged = {found.shard for found in damage}
    console().print(f"{len(paths) - len(damaged):,} of {len(paths):,} shards indexed", highlight=False)
    audit.show_damage([found._asdict() for found in damage[: audit.DAMAGE_SHOWN]], console())
    raise typer.Exit(DAMAGE if damage else 0)


@app.command()
def stats(
    shards: Shards,
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="The picture.")],
    workers: Workers = None,
) -> None:
    """Draw histograms: picture sizes, aspect ratios, caption lengths, scores."""
    from ldm.data import audit
    from ldm.data.histograms import draw

    draw(audit.audit(audit.local_shards(shards), decode=False, workers=workers), out)


@app.command()
def encode(
    shards: Shards,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cache.")],
    first_stage: Annotated[str, typer.Option(metavar="RUN", help="Directory of an autoencoder's run.")],
    side: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the run's")] = None,
    flip: Annotated[bool, typer.Option(help="Encode the mirrored pictures too, for random_flip.")] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Cache text too: a diffusion run's directory, or a name in configs/model/conditioner."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples encoded together.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures.")] = 0,
) -> None:
    """Write the first stage's posterior moments of every picture, as shards for data=latents. The same command resumes.

    Several GPUs share the shards: torchrun --nproc-per-node 8 -m ldm.cli shards encode ..., or the tasks of srun.
    """
    from ldm import config
    from ldm.data.sources import ShardCache, expand
    from ldm.evaluation.generate import Ranks
    from ldm.training.caching import CacheEncoder

    command = "python train.py experiment=..."
    ranks = Ranks.of_environment()
    device = ranks.device()
    encoder = CacheEncoder(
        config.first_stage(first_stage, command).to(device),
        side or config.run_config(first_stage, command).data.side,
        flip,
        config.text_encoder(text).to(device) if text else None,
        batch_size,
        workers,
    )
    tally = encoder(expand(shards), out, ShardCache(), ranks.rank, ranks.world)
    _told(tally.report(), f"{out}, rank {ranks.rank} of {ranks.world}")


@app.command()
def pack(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A folder that `encode` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the arrays.")],
) -> None:
    """Write a latent cache as memory-mapped arrays, for data=latent_arrays on a local disk."""
    from ldm.data.arrays import pack
    from ldm.data.sources import ShardCache

    _told(pack(cache, out, ShardCache()).report(), str(out))


def _told(report: dict[str, Any], where: str) -> None:
    console().print(f"{where}: {report['delivered']:,} samples", highlight=False)
    for reason, count in report["dropped"].items():
        console().print(f"  dropped {count:,}: {reason}, the last {report['last_dropped'][reason]}", highlight=False)
