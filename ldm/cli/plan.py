"""`ldm plan`: what a run will take, before it is run."""

import shlex
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.screen import console
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.training.plan import Setup

_WORDS = {"forward": "denoiser (or autoencoder), forward", "backward": "backward", "other": "first stage and text",
          "averages": "EMA", "frozen": "frozen networks", "activations": "activations and work space"}  # fmt: skip


def plan(
    overrides: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="As for train.py.")],
    gpu: Annotated[str | None, typer.Option(help="H100, H200, A100 ...: for time and money.")] = None,
    samples: Annotated[float | None, typer.Option(min=1, help="To train on.", show_default="all steps'")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for one hour.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that is reached: an assumption.")] = 0.3,
    probe: Annotated[bool, typer.Option(help="Do two steps on this machine too, and measure their memory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Say what a run will take: parameters, memory, operations, time and money. Nothing is trained, no weights are needed.

    `ldm plan experiment=sd2_512_v trainer.devices=8 --gpu H100 --price 2.5`

    The published runs of Stable Diffusion v2 at 512 px reach 0.28 (A100) to 0.37 (H200) of the peak, which --mfu changes.
    """
    from json import dumps

    from ldm import config
    from ldm.config_errors import mistakes_in_one_line
    from ldm.training import plan

    with mistakes_in_one_line(False):
        cfg = config.compose(*(config.quote_ranges(each) for each in overrides))
    notes: list[str] = []
    devices, setup = _setup(cfg, notes)
    for key, value in config.leaves(cfg):
        if value == "???":
            config.OmegaConf.update(cfg, key, "not given")
    model = config.OmegaConf.create(plan.sized(config.plain(cfg.model), partial(_architecture, notes), notes))

    def build() -> Any:
        return config.build(model)

    if gpu is None and (samples is not None or price is not None):
        raise UserError("--samples and --price are for time and money, which need --gpu, such as --gpu H100")
    total = samples
    if gpu is not None:
        plan.cost(1.0, gpu, devices, 1.0, mfu, price)  # a mistake is refused before the work
        if total is None and not isinstance(cfg.trainer.max_steps, int):
            raise UserError("--samples or trainer.max_steps=... is required for time and money")
        total = total or float(cfg.trainer.max_steps * cfg.data.batch_size)
        if "mixed" not in setup.precision:
            notes.append(f"time and money are those of bf16-mixed, the memory that of {setup.precision}")
    with mistakes_in_one_line(False):
        found = plan.estimate(build, setup, gpu is not None)
    facts: dict[str, Any] = {
        "devices": devices, "micro_batch": setup.samples, "precision": setup.precision, **vars(found),
        "peak": found.peak, "notes": notes,
    }  # fmt: skip
    if gpu is not None and total is not None:
        facts["cost"] = plan.cost(sum(found.operations.values()), gpu, devices, total, mfu, price)
    if probe:
        facts["measured"] = plan.measure(build, setup)
    if json:
        typer.echo(dumps(facts, indent=2))
    else:
        _show(facts)


def _setup(cfg: Any, notes: list[str]) -> tuple[int, "Setup"]:
    """How many devices, and what one does."""
    from ldm.training.plan import Setup

    for key in ("side", "batch_size"):
        if cfg.data.get(key, "???") == "???" or not isinstance(cfg.data[key], int):
            raise UserError(f"data.{key} is required: give data.{key}=... (an experiment=... gives it)")
    trainer = cfg.trainer
    given = str(trainer.devices)
    one = int(given) if given.isdigit() else 1
    if str(one) != given:
        notes.append(f"trainer.devices={given} is planned as 1 a node: give a number")
    nodes = int(trainer.get("num_nodes", 1))
    devices, split = one * nodes, one * nodes * trainer.accumulate_grad_batches
    if cfg.data.batch_size % split:
        raise UserError(f"data.batch_size={cfg.data.batch_size} does not divide by {devices} devices x "
                        f"{trainer.accumulate_grad_batches} micro-batches: give a multiple of {split}")  # fmt: skip
    precision = str(trainer.precision)
    if precision not in ("32", "32-true", "bf16-mixed", "16-mixed"):
        raise UserError(f"trainer.precision={precision} cannot be planned; it knows 32-true, bf16-mixed and 16-mixed")
    strategy: Any = trainer.get("strategy") or {}
    parts = 1
    if "replicas" in strategy:
        replicas = strategy.replicas or nodes
        if devices % replicas:
            raise UserError(
                f"trainer.strategy.replicas={replicas} does not divide {devices} devices: give trainer.devices=..."
            )
        parts = devices // replicas
        notes.append(f"FSDP over {parts} devices; a block's gathered weights, at most one at a time, are not counted")
    targets = [str(cfg.data.get("decode", {}).get("_target_")), str(cfg.data.get("_target_"))]
    cached = any(target.endswith(("DecodeLatents", "ArrayDataModule")) for target in targets)
    averages = [callback for name, callback in cfg.callbacks.items() if name in ("ema", "power_ema") and callback]
    copies = sum(len(callback.get("lengths", [1])) for callback in averages)
    return devices, Setup(cfg.data.side, cfg.data.batch_size // split, cached, copies, precision,
                          trainer.gradient_clip_val, parts)  # fmt: skip


def _architecture(notes: list[str], run: str, command: str) -> dict[str, Any]:
    """An autoencoder's config: its run's, or that of the experiment which its command trains, or of imported models."""
    from pathlib import Path

    from ldm import config

    if (Path(run) / "config.yaml").is_file():
        return config.plain(config.run_config(run).model)["autoencoder"]
    if command.startswith("ldm import"):
        notes.append(f"the first stage in {run} is not here: it is taken to be KL-f8")
        return config.plain(config.option("model/autoencoder", "kl_f8"))
    words = shlex.split(command)
    overrides = list(
        takewhile(lambda word: "=" in word, words[words.index("train.py") + 1 :] if "train.py" in words else [])
    )
    if not overrides:
        raise UserError(f"there is no run in {run}, and {command!r} does not say what its autoencoder is: give "
                        "model.first_stage.run=... of one that is here")  # fmt: skip
    return config.plain(config.compose(*(config.quote_ranges(each) for each in overrides)).model.autoencoder)


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    screen = console()

    def table(title: str, unit: str, rows: dict[str, Any], form: Callable[[Any], tuple[str, ...]]) -> None:
        grid = Table(box=None, padding=(0, 2), min_width=60)
        grid.add_column("", no_wrap=True)
        for column in unit.split("|"):
            grid.add_column(column, justify="right", no_wrap=True)
        for name, value in rows.items():
            grid.add_row(_WORDS.get(name, name), *form(value))
        screen.print(f"[bold]{title}[/]", highlight=False)
        screen.print(grid, highlight=False)
        screen.print()

    table("Parameters", "trained|frozen", facts["parameters"], lambda n: (f"{n['trained']:,}", f"{n['frozen']:,}"))
    memory = {**facts["memory"], "peak": facts["peak"]}
    memory |= {"measured here": facts["measured"]} if "measured" in facts else {}
    title = f"Memory of a device, of {facts['devices']}: {facts['micro_batch']} samples at once, {facts['precision']}"
    table(title, "GB", memory, lambda size: (f"{size / 1e9:,.3f}",))
    operations = {**facts["operations"], "all": sum(facts["operations"].values())}
    table("Operations of a sample's training step", "10^12", operations, lambda n: (f"{n / 1e12:,.4f}",))
    if "cost" in facts:
        cost = facts["cost"]
        screen.print(f"[bold]{cost['samples']:,.0f} samples on {cost['devices']} x {cost['gpu']}[/]", highlight=False)
        screen.print(
            f"  at {cost['mfu']:.0%} of its peak (an assumption): {cost['samples_per_second']:,.1f} samples/s",
            highlight=False,
        )
        screen.print(
            f"  {cost['hours']:,.1f} hours ({cost['hours'] / 24:,.1f} days), {cost['gpu_hours']:,.0f} GPU hours"
            + (f"; in money: {cost['money']:,.0f}, at --price" if "money" in cost else ""),
            highlight=False,
        )
    for note in facts["notes"]:
        screen.print(f"note: {note}", highlight=False, markup=False)
