"""The `ldm` command: thin verbs over the library.

The library is imported inside the verbs: `ldm --help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

_LOOK = {"no_args_is_help": True, "rich_markup_mode": "markdown"}  # markdown: paragraphs are filled, not kept as here
app = typer.Typer(name="ldm", add_completion=False, pretty_exceptions_enable=False, **_LOOK)
shards = typer.Typer(help="Make, check and index shards of captioned pictures.", **_LOOK)
app.add_typer(shards, name="shards")

Shards = Annotated[
    list[str], typer.Argument(metavar="SHARDS...", help="Local shards, as in 'data/{00000..00012}.tar'.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; they change only the speed.", show_default="one a core")
]


@app.callback()
def _ldm() -> None:
    """Text-to-image latent diffusion: tools beside train.py and evaluate.py."""


@shards.command()
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
    """Write shards from pictures and captions. The same command resumes.

    A folder: pictures with the caption in the .txt or the .json ("caption") beside each. A table: a row for each picture, with
    its path relative to the table, or in Parquet its bytes. JPEG and PNG files are stored as they are, WebP as PNG. What cannot
    be used is counted by reason, here and in OUT/make_report.json.
    """
    from ldm.data import making
    from ldm.data.inputs import open_source

    made = making.make(open_source(source, image_column, caption_column), out, shard_size, workers)
    making.show(made, out, _console())


@shards.command()
def check(
    shards: Shards,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all findings as JSON; -: to stdout.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode the pictures, or read only their headers.")] = True,
    workers: Workers = None,
    duplicates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the keys of repeated pictures, for data.filters.")
    ] = None,
) -> None:
    """Read every sample as training would, and count what it would drop. Exit code 1: there is damage."""
    from json import dumps

    from ldm.data import audit

    found = audit.audit(audit.local_shards(shards), decode, workers)
    summary = audit.summary(found)
    audit.show(summary, _console(stderr=json == "-"))
    if json == "-":
        typer.echo(dumps(summary, indent=2))
    elif json is not None:
        Path(json).write_text(dumps(summary, indent=2))
    if duplicates is not None:
        audit.write_duplicates(found.samples, duplicates)
    raise typer.Exit(not found.clean)


@shards.command()
def index(shards: Shards, workers: Workers = None) -> None:
    """Write NNNNN.index.json (count, bytes, sha256) beside each sound shard. Exit code 1: a damaged one got none."""
    from ldm.data import audit

    paths = audit.local_shards(shards)
    damage = audit.index(paths, workers)
    damaged = {found.shard for found in damage}
    _console().print(f"{len(paths) - len(damaged):,} of {len(paths):,} shards indexed", highlight=False)
    audit.show_damage([found._asdict() for found in damage[: audit.DAMAGE_SHOWN]], _console())
    raise typer.Exit(bool(damage))


@shards.command()
def stats(
    shards: Shards,
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="The picture.")],
    workers: Workers = None,
) -> None:
    """Draw histograms: picture sizes, aspect ratios, caption lengths, scores."""
    from ldm.data import audit
    from ldm.data.histograms import draw

    draw(audit.audit(audit.local_shards(shards), decode=False, workers=workers), out)


@shards.command()
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

    Several GPUs share the shards: torchrun --nproc-per-node 8 -m ldm.cli shards encode ...
    """
    import torch

    from ldm import config
    from ldm.data.sources import ShardCache, expand
    from ldm.training.caching import CacheEncoder

    command = "python train.py experiment=..."
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    encoder = CacheEncoder(
        config.first_stage(first_stage, command).to(device),
        side or config.run_config(first_stage, command).data.side,
        flip,
        config.text_encoder(text).to(device) if text else None,
        batch_size,
        workers,
    )
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    tally = encoder(expand(shards), out, ShardCache("~/.cache/ldm/shards", 2**36), rank, world)
    _told(tally.report(), f"{out}, rank {rank} of {world}")


@shards.command()
def pack(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A folder that `encode` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the arrays.")],
) -> None:
    """Write a latent cache as memory-mapped arrays, for data=latent_arrays on a local disk."""
    from ldm.data.arrays import pack
    from ldm.data.sources import ShardCache

    _told(pack(cache, out, ShardCache("~/.cache/ldm/shards", 2**36)).report(), str(out))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("samples"),
    negative: Annotated[str, typer.Option(help="A prompt to lead away from.")] = "",
    count: Annotated[int, typer.Option(min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Picture i is a function of the seed, i and the rest alone.")] = 0,
    side: Annotated[int | None, typer.Option(help="Pixels.", show_default="the run's")] = None,
    steps: Annotated[int | None, typer.Option(show_default="the run's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale.", show_default="the run's")] = None,
    solver: Annotated[
        str | None, typer.Option(help="One of configs/sampling/solver.", show_default="the run's")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float, typer.Option(help="Share of the steps taken from it.")] = 0.7,
    mask: Annotated[Path | None, typer.Option(help="With --init: white where to paint, black where to keep.")] = None,
) -> None:
    """Draw pictures for a prompt: `ldm sample runs/demo "a small red star on black" --guidance 1.5`.

    Every PNG holds the parameters that made it.
    """
    from ldm import config

    cfg = config.run_config(run)
    if solver:
        cfg.sampling.solver = config.option("sampling/solver", solver)
    import torch

    from ldm.training import drawing

    module, step = config.load_run(run)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = drawing.changed(config.build(cfg.sampling), guidance, steps)
    request = drawing.Request(prompt, side or cfg.data.side, negative, count, 0, seed, init, strength, mask)
    told = {"run": str(run), "step": step, "sampling": repr(sampling)}
    told |= {name: str(value) if isinstance(value, Path) else value for name, value in vars(request).items()}
    for path in drawing.save(drawing.draw(module, sampling, request), out, f"seed{seed}", 0, told):
        typer.echo(path)


@app.command()
def fetch(
    what: Annotated[
        str,
        typer.Argument(metavar="CONFIG_OR_NAME", help="vgg16, clip_l ..., owner/name@commit, a run or a conditioner."),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="File or folder.", show_default="a cache")] = None,
) -> None:
    """Download pretrained weights, check their digests, and write a manifest beside them: all else here works offline."""
    from ldm import config
    from ldm.fetch import fetch, named_in

    files = [Path(what), Path(what, "config.yaml"), config.CONFIGS / "model" / "conditioner" / f"{what}.yaml"]
    names = next((named_in(path) for path in files if path.is_file()), []) or [what]
    if out is not None and len(names) > 1:
        raise UserError(f"{what} needs several weights ({', '.join(names)}): fetch each into a place of its own")
    for name in names:
        typer.echo(f"{name}: {fetch(name, out)}")


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A diffusers folder, or a whole model in one .safetensors or .ckpt file."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run directory to make.")],
    prediction: Annotated[
        str | None, typer.Option(metavar="eps|v", help="What the U-Net predicts.", show_default="as SOURCE says")
    ] = None,
) -> None:
    """Make a run directory of Stable Diffusion v1 or v2, SDXL, or a model in their layout, for evaluate.py and train.py."""
    from ldm.interop import importing, sources

    model = sources.read(source, prediction)
    importing.write_run(model, out, source)
    for note in model.notes:
        typer.echo(note)
    typer.echo(f"{out}: a run that predicts {model.prediction}, of {model.side} px")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A diffusion run's directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, or a .safetensors file.")],
    to: Annotated[str, typer.Option(metavar="diffusers|single-file", help="Layout.")] = "diffusers",
    weights: Annotated[str, typer.Option(metavar="ema|raw", help="Averaged, or as last trained.")] = "ema",
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="Of the weights.")] = "float32",
) -> None:
    """Write a run as what diffusers, ComfyUI and A1111 load, and read it back to compare."""
    from ldm.interop import exporting

    exporting.export(run, out, to, weights, dtype)
    typer.echo(f"{out}: written, read back, and the same")


@app.command()
def ema(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run trained with callbacks=[latent_diffusion,power_ema].")
    ],
    length: Annotated[float, typer.Option(help="Of the average, over the length of training: EDM2's sigma_rel.")],
    at: Annotated[
        int | None, typer.Option(metavar="STEP", help="A step with a snapshot.", show_default="the last")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", show_default="RUN/ema/length_...")] = None,
) -> None:
    """Reconstruct a run's average of any length, for evaluate.py checkpoint=RUN ema=FILE."""
    from ldm.training import power_ema

    path, made = power_ema.save(run, length, at, out)
    typer.echo(f"{path}: step {made.step}, from {made.sources} averages, {made.error:.2%} off the length's own weights")


def _told(report: dict[str, Any], where: str) -> None:
    _console().print(f"{where}: {report['delivered']:,} samples", highlight=False)
    for reason, count in report["dropped"].items():
        _console().print(f"  dropped {count:,}: {reason}, the last {report['last_dropped'][reason]}", highlight=False)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def main() -> None:
    """A mistake of the user's, or the system's refusal (disk full, no such folder), is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
