"""`ldm card`: a run described for others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.screen import AsJson, RunPath
from ldm.errors import UserError


def card(
    run: RunPath,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="-: to stdout.", show_default="RUN/README.md")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write a model card from a run's configuration, data report and scores: `ldm card runs/demo`.

    What cannot be known from the run (whose data, which license, what it is not for) is left for you to fill in.
    """
    from json import dumps

    found = facts(run)
    if json:
        typer.echo(dumps({**found, "scores": [each._asdict() for each in found["scores"]]}, indent=2, default=str))
    elif out == Path("-"):
        typer.echo(markdown(found))
    else:
        path = out or run / "README.md"
        if path.exists() and out is None:
            raise UserError(f"{path} is there already, perhaps filled in: give --out FILE, or delete it")
        path.write_text(markdown(found))
        typer.echo(f"{path}: a model card; fill in what it asks for")


def facts(run: Path) -> dict[str, Any]:
    """What a run's directory says of it."""
    from json import loads

    from ldm import runs
    from ldm.data.remote import shown
    from ldm.evaluation.results import newest

    config, found = runs.config_of(run), runs.read(run)
    report = run / "data_report.json"
    model, shards = config["model"], config["data"].get("shards") or config["data"].get("folder")
    return {
        "name": found.name,
        "model": found.model,
        "step": found.step,
        "seed": config.get("seed"),
        "parts": {name: node["_target_"] for name, node in model.items() if isinstance(node, dict) and "_target_" in node},
        "caption_dropout": model.get("caption_dropout"),
        "learning_rate": (model.get("optimizer") or {}).get("lr"),
        "batch_size": config["data"].get("batch_size"),
        "side": config["data"].get("side"),
        "precision": (config.get("trainer") or {}).get("precision"),
        "shards": shown(shards) if isinstance(shards, str) else f"{len(shards or [])} sources",
        "filters": list((config["data"].get("decode") or {}).get("filters") or {}),
        "samples": loads(report.read_text()) if report.exists() else None,
        "last": found.metrics,
        "scores": newest(run / "evaluation"),
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """With the front matter that the Hugging Face hub reads."""
    import yaml

    text_to_image = found["model"] == "LatentDiffusion"
    front = {
        "library_name": "ldm",
        "license": "other",
        "tags": ["latent-diffusion", *(["text-to-image"] * text_to_image)],
    }
    if text_to_image:
        front["pipeline_tag"] = "text-to-image"
    trained = {
        "Steps": f"{found['step']:,} of batch {found['batch_size']}", "Learning rate": found["learning_rate"],
        "Precision": found["precision"], "Seed": found["seed"], "Picture size": f"{found['side']} px",
        "Caption dropout": found["caption_dropout"],
    }  # fmt: skip
    samples = found["samples"] or {}
    data = {"Shards": f"`{found['shards']}`", "Filters": ", ".join(found["filters"]) or "none",
            "Samples delivered": f"{samples['delivered']:,}" if samples else None,
            "Samples dropped": ", ".join(f"{n:,} {why}" for why, n in samples.get("dropped", {}).items()) or None}  # fmt: skip
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {found['name']}", "",
            f"A {found['model']} model trained with `ldm`.", "",
            "## What it is for", "", "TO FILL IN: intended use, license, limits, and what it must not be used for.", "",
            "## Training data", "", *_list(data), "- TO FILL IN: origin and rights of the pictures and captions.", "",
            "## Training", "", *_list(trained), "",
            *_table(["part", "class"], [[name, f"`{target}`"] for name, target in found["parts"].items()]), "",
            "## Scores", "", *_scores(found), "",
            *(["## Use", "", "```sh", f'ldm sample runs/{found["name"]} "a prompt"', "```", ""] if text_to_image else []),
        ]
    )  # fmt: skip


def _list(values: dict[str, Any]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items() if value is not None]


def _scores(found: dict[str, Any]) -> list[str]:
    from ldm.evaluation.results import cell, names

    results = found["scores"]
    if not results:
        last = found["last"].items()
        return _table(["last logged", "value"], [[name, f"{value:.4g}"] for name, value in last if value is not None])
    rows = [[name, *(cell(each.metrics, name) for each in results)] for name in names(results)]
    rows.append(["samples, protocol", *(f"{each.protocol.get('n')}, `{each.protocol['id']}`" for each in results)])
    return _table(["metric", *(each.label for each in results)], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
