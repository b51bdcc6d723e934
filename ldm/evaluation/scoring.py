"""Scores of a model under several protocols: generate, measure, write results.json and a grid, show one table and curve."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics import Metric

from ldm.batch import Batch
from ldm.errors import UserError
from ldm.evaluation import protocol as protocols
from ldm.evaluation.curve import tradeoff_curve
from ldm.evaluation.generate import SINGLE, Ranks, generate, rows_of, shards, stamp
from ldm.evaluation.grid import picture_grid
from ldm.evaluation.metrics import FeatureMetrics
from ldm.evaluation.protocol import digest, protocol_id, refuse_incomparable, under

RESIZE = "uint8, short side, antialiased bicubic, center crop"  # data.transforms.DecodeImage's
ALIGNMENT = ("clip_cosine/", "caption_accuracy/all")  # what the curve sets against the first distance
DISTANCES = ("frechet/", "cmmd/", "kid/")


@dataclass(frozen=True)
class Reference:
    """The captions to generate for, and their held-out pictures. images: (N, 3, H, W) uint8; None: there are none."""

    images: Tensor | None
    captions: list[str]

    @classmethod
    def read(cls, batches: Iterable[Batch], n: int | None) -> "Reference":
        """The pictures lie in a file without a name, not in memory.

        Raises UserError when there is nothing to read, less than the n that were asked for, or latents only.
        """
        captions, shape = [], ()
        with tempfile.NamedTemporaryFile() as file:
            for batch in batches:
                if "image" not in batch:
                    raise UserError(
                        "the validation data are a latent cache's, without pictures; give data.val_shards=... with pictures"
                    )
                captions += batch["caption"]
                shape = batch["image"].shape[1:]
                file.write(batch["image"].contiguous().numpy().data)
            file.flush()
            if len(captions) < (n or 1):
                raise UserError(f"n={n}, but the validation shards hold {len(captions)} usable samples; ask for fewer")
            size = len(captions) * shape.numel()
            pixels = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        return cls(pixels.view(-1, *shape), captions)

    @classmethod
    def of_prompts(cls, path: Path, n: int | None) -> "Reference":
        """One caption a line. Raises UserError when the file is missing, or has less than n."""
        if not path.is_file():
            raise UserError(f"there is no file of prompts {path}; give one with a caption a line")
        captions = [line.strip() for line in path.read_text().splitlines() if line.strip()][:n]
        if len(captions) < (n or 1):
            raise UserError(f"n={n}, but {path} holds {len(captions)} prompts; ask for fewer")
        return cls(None, captions)

    def pictures(self, rows: slice) -> Tensor | None:
        return None if self.images is None else self.images[rows]

    def protocol(self) -> dict[str, Any]:
        shared = {"n": len(self.captions), "captions": digest(caption.encode() for caption in self.captions)}
        if self.images is None:
            return {**shared, "reference": None}
        parts = (self.images[rows_of(i, len(self.images))] for i in range(shards(len(self.images))))
        pixels = digest(part.contiguous().numpy().tobytes() for part in parts)
        return {**shared, "reference": pixels, "side": self.images.shape[-1], "resize": RESIZE}


@dataclass(frozen=True)
class Round:
    """One way to make pictures.

    make: (captions, index (B,)) -> (B, 3, H, W) in [-1, 1]; protocol: how, as plain data; weights: a digest of those that
    make them; swept: what the sweep set, by name; captions: the pictures' own, None: the reference's.
    """

    label: str
    make: Callable[[list[str], Tensor], Tensor]
    protocol: dict[str, Any]
    weights: str = ""
    swept: dict[str, Any] = field(default_factory=dict)
    captions: list[str] | None = None


class Result(NamedTuple):
    """What a round gave, and where it is written."""

    label: str
    swept: dict[str, Any]
    protocol: dict[str, Any]
    metrics: dict[str, float]
    folder: Path

    def logged(self) -> dict[str, float]:
        """The scores under names that hold their protocol: frechet/inception/n30000/cfg3/steps50."""
        return {f"{name}/{under(self.protocol)}": value for name, value in self.metrics.items()}


def score(
    round_: Round,
    reference: Reference,
    metrics: Sequence[Metric],
    batch_size: int,
    folder: Path,
    shown: int = 16,
    ranks: Ranks = SINGLE,
) -> tuple[dict[str, float], Tensor]:
    """The metrics' values by name (on the first rank), and this rank's first `shown` pictures (.., 3, H, W) uint8.

    folder: where pictures are kept; see generate.
    """
    head: list[Tensor] = []
    captions = reference.captions if round_.captions is None else round_.captions
    for rows, images in _bar(round_.label, generate(round_.make, captions, batch_size, folder, ranks), len(captions)):
        for metric in metrics:
            metric.update(images, captions[rows], reference.pictures(rows))
        if (have := sum(map(len, head))) < shown:
            head.append(images[: shown - have].clone())
    values = {name: value for metric in metrics for name, value in metric.compute().items()}
    return values, torch.cat(head)


def _bar(label: str, parts: Iterator[tuple[slice, Tensor]], total: int) -> Iterator[tuple[slice, Tensor]]:
    """The same parts, with pictures counted on a bar on stderr; on several ranks the first one's share is taken for all."""
    columns = (
        TextColumn(f"{label:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        for rows, images in parts:
            yield rows, images
            bar.update(task, completed=rows.stop)


def evaluate(
    rounds: Iterable[Round],
    reference: Reference,
    metrics: Sequence[Metric],
    folder: Path,
    step: int,
    batch_size: int,
    pictures: int,
    ranks: Ranks = SINGLE,
    cache: Path | None = None,
) -> list[Result]:
    """Scores each round; writes folder/step<step>-<label>-<id>/ with results.json, grid.png and the pictures, prints one
    table, and draws the curve of a sweep, curve.png beside the last results. Returns what the first rank knows, nothing on
    others.

    metrics: reset before each round; step: of the checkpoint; pictures: how many the grid shows; cache: a folder for
    features of reference pictures, which then are computed once and for all.
    """
    base = reference.protocol()
    seen = [metric for metric in metrics if isinstance(metric, FeatureMetrics)]
    networks = {metric.features.name: metric.features.identity() for metric in seen}
    known = [(metric, _known(metric, base, networks, cache)) for metric in seen]
    results: list[Result] = []
    for round_ in rounds:
        for metric in metrics:
            metric.reset()
        protocol = {**base, **round_.protocol, "versions": protocols.versions()}
        result = folder / f"step{step}-{round_.label.replace(' ', '')}-{protocol_id(protocol)}"
        stamp(result / "pictures", round_.weights)
        values, head = score(round_, reference, metrics, batch_size, result / "pictures", pictures, ranks)
        if ranks.rank == 0:
            _keep(known)
            protocol = {"id": protocol_id(protocol), **protocol, "features": networks}
            values = _write(result, protocol, values, step)
            picture_grid(head, (round_.captions or reference.captions)[: len(head)], 8).save(result / "grid.png")
            results.append(Result(round_.label, round_.swept, protocol, values, result))
    if results:
        _show(results, step)
    return results


def _known(metric: FeatureMetrics, base: dict[str, Any], networks: dict[str, Any], cache: Path | None) -> Path | None:
    """Where the reference's features are kept; given to the metric if they are there."""
    metric.known = None
    if cache is None or base["reference"] is None or not [*metric.features.parameters()]:
        return None  # without weights, it is as quick as the file
    name = metric.features.name
    identity = protocol_id({"reference": base["reference"], "network": networks[name]})
    path = cache.expanduser() / f"{name}-{identity}.safetensors"
    if path.exists():
        metric.known = load_file(path)["features"]
    return path


def _keep(known: Sequence[tuple[FeatureMetrics, Path | None]]) -> None:
    for metric, path in known:
        if path is not None and metric.known is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            save_file({"features": metric.known.contiguous()}, aside)
            aside.rename(path)


def _write(folder: Path, protocol: dict[str, Any], values: dict[str, float], step: int) -> dict[str, float]:
    """results.json. What other metrics said of the same pictures stays in it, unless the same network's weights differ."""
    path = folder / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {"protocol": protocol, "metrics": {}}
    old = before["protocol"].get("features", {})
    if all(old[name] == value for name, value in protocol["features"].items() if name in old):
        values = {**before["metrics"], **values}
        protocol = {**protocol, "features": {**old, **protocol["features"]}}
    content = {"protocol": protocol, "under": under(protocol), "checkpoint": {"step": step}, "metrics": values}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return values


def _show(results: list[Result], step: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = (
        max(console.width, 100) if console.is_terminal else 200
    )  # into a file it would be 80, and cut the names
    console.print(table(results, f"{results[0].protocol['n']} captions, step {step}"))
    made = [result.protocol for result in results if "sampling" in result.protocol]
    if differ := {key for other in made[1:] for key in protocols.differences(made[0], other)}:
        console.print(f"columns differ in {', '.join(sorted(differ))}")
    curve, last = curve_of(results), results[-1].folder
    if curve is not None:
        curve.save(last / "curve.png")
        console.print(f"curve:   {last}/curve.png")
    console.print(f"scores:  {last}/results.json\npicture: {last}/grid.png")


def table(results: Sequence[Result], title: str) -> Table:
    """Metrics down, rounds across, ± half a 95 % interval. Raises UserError for results that do not compare."""
    first = results[0]
    for result in results[1:]:
        refuse_incomparable(first.protocol, result.protocol)
    out = Table(title=title, box=SIMPLE_HEAD)
    out.add_column("metric", no_wrap=True)
    for result in results:
        out.add_column(result.label.replace(" ", "\n"), justify="right")
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        if not name.endswith("/ci95"):
            out.add_row(name, *(_cell(result.metrics, name) for result in results))
    return out


def _cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    spread = f" ±{values[f'{name}/ci95']:.3f}" if f"{name}/ci95" in values else ""
    return f"{values[name]:.3f}{spread}"


def curve_of(results: Sequence[Result]) -> Image.Image | None:
    """The first distance against the first measure of alignment, or against what was swept; None without a sweep."""
    swept = [result for result in results if result.swept]
    names = list(swept[0].metrics) if len(swept) > 1 else []
    distances = [name for start in DISTANCES for name in names if name.startswith(start)]
    distance = min(distances, key=lambda name: "/pixels" in name, default=None)  # what knows of meaning comes first
    if distance is None:
        return None
    alignment = next((name for start in ALIGNMENT for name in names if name.startswith(start)), None)
    axis = max(swept[0].swept, key=lambda name: len({result.swept[name] for result in swept}))
    lines: dict[str, list[tuple[str, float, float]]] = {}
    for result in swept:
        other = ", ".join(f"{name} {value}" for name, value in result.swept.items() if name != axis)
        x = result.swept[axis] if alignment is None else result.metrics[alignment]
        lines.setdefault(other, []).append((str(result.swept[axis]), x, result.metrics[distance]))
    return tradeoff_curve(lines, f"{alignment} →" if alignment else axis, distance, axis)
