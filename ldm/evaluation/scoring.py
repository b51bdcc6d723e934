"""Scores of a model under several protocols: generate, measure, write results.json and a grid, show one table and curve."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics import Metric

from ldm.batch import Batch
from ldm.errors import UserError
from ldm.evaluation import protocol as protocols
from ldm.evaluation import report
from ldm.evaluation.curve import tradeoff, tradeoff_curve
from ldm.evaluation.generate import SINGLE, Ranks, generate, rows_of, shards, stamp
from ldm.evaluation.grid import picture_grid
from ldm.evaluation.metrics import FeatureMetrics
from ldm.evaluation.protocol import digest, protocol_id, under
from ldm.evaluation.results import Result, table
from ldm.files import aside

_ROWS = 256  # pictures of the reference that a network is given at once
RESIZE = "uint8, short side, antialiased bicubic, center crop"  # data.transforms.DecodeImage's


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
        captions, shape = list[str](), torch.Size()
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
            samples = {
                name: each.tolist() for metric in metrics for name, each in getattr(metric, "samples", {}).items()
            }
            results.append(_written(Result(round_.label, round_.swept, protocol, values, result), samples, step))
            picture_grid(head, (round_.captions or reference.captions)[: len(head)], 8).save(result / "grid.png")
    if results:
        _show(results, step, report.write(folder, step))
    return results


def remember(reference: Reference, metrics: Sequence[FeatureMetrics], cache: Path) -> dict[str, Path]:
    """Keeps the features of reference pictures where evaluate looks for them. Returns the files by network.

    Raises UserError when none of the networks has weights: without, they are as quick as a file.
    """
    base = reference.protocol()
    assert reference.images is not None
    kept = {}
    for metric in metrics:
        path = _known(metric, base, {metric.features.name: metric.features.identity()}, cache)
        if path is not None:
            if metric.known is None:
                metric.known = torch.cat([metric.features(part) for part in reference.images.split(_ROWS)])
                _keep([(metric, path)])
            kept[metric.features.name] = path
    if not kept:
        raise UserError(
            "these metrics look through no network with weights, so there is nothing to keep: choose others"
        )
    return kept


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
            with aside(path) as partial:
                save_file({"features": metric.known.contiguous()}, partial)


def _written(result: Result, samples: dict[str, list[float]], step: int) -> Result:
    """results.json and samples.json. What other metrics said of the same pictures stays in them, unless the same network's
    weights differ."""
    path = result.folder / "results.json"
    if path.exists():
        before = Result.read(result.folder)
        result = result._replace(swept=result.swept or before.swept)  # one setting again leaves the sweep as it was
        old, new = before.protocol.get("features", {}), result.protocol["features"]
        if all(old[name] == value for name, value in new.items() if name in old):
            samples = {**before.samples(), **samples}
            protocol = {**result.protocol, "features": {**old, **new}}
            result = result._replace(metrics={**before.metrics, **result.metrics}, protocol=protocol)
    content = {"label": result.label, "swept": result.swept, "protocol": result.protocol, "under": under(result.protocol),
               "checkpoint": {"step": step}, "metrics": result.metrics}  # fmt: skip
    (result.folder / "samples.json").write_text(json.dumps(samples) + "\n")
    path.write_text(json.dumps(content, indent=1) + "\n")
    return result


def _show(results: list[Result], step: int, page: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = (
        max(console.width, 100) if console.is_terminal else 200
    )  # into a file it would be 80, and cut the names
    console.print(table(results, f"{results[0].protocol['n']} captions, step {step}"))
    made = [result.protocol for result in results if "sampling" in result.protocol]
    if differ := {key for other in made[1:] for key in protocols.differences(made[0], other)}:
        console.print(f"columns differ in {', '.join(sorted(differ))}")
    curve, last = tradeoff(results), results[-1].folder
    if curve is not None:
        tradeoff_curve(*curve).save(last / "curve.png")
        console.print(f"curve:   {last}/curve.png")
    console.print(f"scores:  {last}/results.json\npicture: {last}/grid.png\nreport:  {page}")
