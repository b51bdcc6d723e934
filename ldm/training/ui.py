"""The page of `ldm ui`: one run, tried in the browser. Gradio shows it; drawing.py draws, as it does for `ldm sample`."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import gcd
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from ldm.batch import to_uint8
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.solvers import Callback
from ldm.errors import UserError
from ldm.training.drawing import Request, draw, parameters, save
from ldm.training.latent_diffusion import LatentDiffusionModule

FONT = ("system-ui", "sans-serif")
THEME = gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=("ui-monospace", "monospace"))
CSS = """
.gradio-container {max-width: 1440px !important}
#page {display: grid; grid-template: "ask shown" auto "settings shown" 1fr / minmax(0, 2fr) minmax(0, 3fr)}
@media (max-width: 900px) {#page {grid-template: "ask" "shown" "settings" / minmax(0, 1fr)}}
#ask {grid-area: ask} #shown {grid-area: shown} #settings {grid-area: settings}
#shown .grid-wrap {max-height: none; padding-top: 2.4rem}
.small img {image-rendering: pixelated}
.label-wrap {text-align: left}
#ask button {padding-inline: 0.5rem; white-space: nowrap}
"""
SMALL = 128  # pixels; smaller pictures are shown enlarged, pixel by pixel
Shown = tuple[dict[str, Any], dict[str, Any], str]  # what becomes of the two galleries, and what is going on


@dataclass(frozen=True)
class Trial:
    """What the page needs to know of a run.

    Args:
        run: its directory; it is told in the pictures.
        side: of the pictures, in pixels.
        solvers: names to choose from, the run's own first.
        averages: names to choose from, the classical one first.
        checkpoints: their steps, the newest last.
        steps, guidance: the run's own.
        sampling: (solver's name, guidance, steps) -> how to sample, and the same in words. Raises UserError for numbers
            that it cannot have.
        load: (average's name, step) -> the module under these weights. Raises UserError for ones that are not there.
    """

    run: str
    side: int
    solvers: Sequence[str]
    averages: Sequence[str]
    checkpoints: Sequence[int]
    steps: int
    guidance: float
    sampling: Callable[[str, float, int], tuple[Sampling, dict[str, Any]]]
    load: Callable[[str, int], LatentDiffusionModule]

    def nearest(self, step: int) -> int:
        """The checkpoint at this place of the slider, or the one before it."""
        return max(each for each in self.checkpoints if each <= step)


class Asked(NamedTuple):
    """The controls' values, in their order on the page."""

    prompt: str
    negative: str
    seed: int
    count: int  # type: ignore[assignment]  # in place of tuple's
    solver: str
    steps: int
    guidance: float
    average: str
    step: int
    compare: bool
    other_average: str
    other_step: int
    editor: dict[str, Any] | None
    strength: float
    watch: bool


class Stopped(Exception):
    """Nobody waits for the pictures any more."""


def watched(make: Callable[[Callback], Tensor]) -> Iterator[tuple[bool, Tensor]]:
    """(False, x0_hat) for each step of `make(callback)` as it comes, then (True, what it returned). Closed, it stops `make`."""
    queue, stop = SimpleQueue[Tensor | None](), Event()

    def note(_: int, x0_hat: Tensor) -> None:
        if stop.is_set():
            raise Stopped
        queue.put(x0_hat)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(make, note)
        done.add_done_callback(lambda _: queue.put(None))
        try:
            while (x0_hat := queue.get()) is not None:
                yield False, x0_hat
        finally:
            stop.set()
    yield True, done.result()


def shown(trial: Trial, folder: Path, asked: Asked) -> Iterator[Shown]:
    """Both sides' pictures after each step, in the end the PNGs in `folder`. Both sides start from the same noise.

    Raises:
        UserError: see Trial and drawing.draw.
    """
    sampling, how = trial.sampling(asked.solver, asked.guidance, asked.steps)
    init, mask = given(asked.editor, folder)
    request = Request(asked.prompt, trial.side, asked.negative, asked.count, 0, asked.seed, init, asked.strength, mask)
    sides = [(asked.average, asked.step), (asked.other_average, asked.other_step)][: 1 + asked.compare]
    galleries = [gr.update(value=[], label="Pictures"), gr.update(value=[], label="Compared")]
    begun = time.perf_counter()
    for gallery, (average, place) in zip(galleries, sides, strict=False):
        step = trial.nearest(place)
        gallery["label"] = f"{average}, step {step:,}"
        yield galleries[0], galleries[1], f"loading {gallery['label']}"
        module = trial.load(average, step)
        for number, (done, x) in enumerate(watched(partial(draw, module, sampling, request)), 1):
            if done:
                told = parameters(trial.run, step, how, request) | {"average": average}
                name = f"step{step}_seed{asked.seed}_{time.time_ns()}"
                gallery["value"] = [str(path) for path in save(x, folder, name, 0, told)]
            elif asked.watch:
                gallery["value"] = list(to_uint8(module.first_stage.decode(x)).permute(0, 2, 3, 1).cpu().numpy())
                yield galleries[0], galleries[1], f"{gallery['label']}: denoising, step {number}"
    took = time.perf_counter() - begun
    yield galleries[0], galleries[1], f"{asked.count} × {trial.side} px in {took:.1f} s, seed {asked.seed}"


def given(editor: dict[str, Any] | None, folder: Path) -> tuple[Path | None, Path | None]:
    """The picture to start from, and the mask of what was brushed over."""
    if not editor or not editor["background"]:
        return None, None
    brushed = [np.asarray(Image.open(layer).convert("RGBA"))[..., 3] > 0 for layer in editor["layers"]]
    if not any(layer.any() for layer in brushed):
        return Path(editor["background"]), None
    mask = folder / f"mask_{time.time_ns()}.png"
    Image.fromarray(np.logical_or.reduce(brushed)).save(mask)
    return Path(editor["background"]), mask


def page(trial: Trial, folder: Path) -> gr.Blocks:
    """The page; pictures are kept in `folder`."""

    def run(*values: Any) -> Iterator[Shown]:
        try:
            yield from shown(trial, folder, Asked(*values))
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    small = trial.side < SMALL
    with gr.Blocks(title=f"{trial.run} · ldm ui", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"### {trial.run}")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, autofocus=True)
                negative = gr.Textbox(label="Negative prompt", placeholder="what guidance leads away from")
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", scale=3, min_width=120)
                    again = gr.Button("New seed", scale=2, min_width=90)
                    stop = gr.Button("Stop", scale=1, min_width=70)
            with gr.Column(elem_id="shown"):
                status = gr.Markdown("Type a prompt and press **Generate**.", elem_id="status")
                with gr.Row():
                    one, two = (
                        gr.Gallery(label=name, columns=2, object_fit="contain", format="png" if small else "webp",
                                   height="auto", buttons=["download", "fullscreen"], elem_id=name.lower(),
                                   elem_classes=["small"] if small else [], visible=name == "Pictures", min_width=300)
                        for name in ("Pictures", "Compared")
                    )  # fmt: skip
            with gr.Column(elem_id="settings"):
                settings = _settings(trial)
        controls = [prompt, negative, *settings]
        seed, compare = (controls[Asked._fields.index(name)] for name in ("seed", "compare"))
        compare.change(lambda on: gr.update(visible=on), compare, two, show_progress="hidden")
        begun = gr.on([button.click, prompt.submit], run, controls, [one, two, status], show_progress="minimal")
        stop.click(None, cancels=[begun])
        again.click(lambda: random.randrange(2**31), None, seed, show_progress="hidden")
    return blocks


def _settings(trial: Trial) -> list[Any]:
    """The controls from the seed on, in the order of Asked."""
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=140)
        count = gr.Slider(1, 16, 4, step=1, label="Pictures", min_width=140)
    with gr.Row():
        solver = gr.Dropdown(list(trial.solvers), label="Solver", min_width=140)
        steps = gr.Slider(1, 100, trial.steps, step=1, label="Steps", min_width=140)
    guidance = gr.Slider(0, 20, trial.guidance, step=0.1, label="Guidance")
    average, step = _weights(trial, "Weights")
    with gr.Accordion("Compare two checkpoints on the same noise", open=False):
        compare = gr.Checkbox(label="Compare with")
        other_average, other_step = _weights(trial, "Other weights")
    with gr.Accordion("Start from a picture; brush over what is to be painted anew", open=False):
        brush = gr.Brush(colors=["#ff4d6d"], color_mode="fixed")
        editor = gr.ImageEditor(type="filepath", format="png", sources=("upload", "clipboard"), brush=brush, layers=False,
                                transforms=(), show_label=False, buttons=[], elem_id="editor")  # fmt: skip
        strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="Strength", info="share of the steps taken from it")
    watch = gr.Checkbox(True, label="Show the denoising step by step")
    return [seed, count, solver, steps, guidance, average, step, compare, other_average, other_step, editor, strength,
            watch]  # fmt: skip


def _weights(trial: Trial, label: str) -> tuple[gr.Dropdown, gr.Slider]:
    """Which average, of which checkpoint: the slider's marks lie on the checkpoints where those are evenly spaced."""
    first, last = trial.checkpoints[0], trial.checkpoints[-1]
    apart = gcd(*(b - a for a, b in pairwise(trial.checkpoints))) or 1
    with gr.Row():
        names = list(trial.averages)
        average = gr.Dropdown(names, label=label, allow_custom_value=len(names) > 2, min_width=140)
        step = gr.Slider(first, last, last, step=apart, label="Checkpoint", interactive=first < last, min_width=140)
    return average, step


def serve(blocks: gr.Blocks, host: str, port: int | None) -> str:
    """Starts the server and returns its address.

    Args:
        port: None: 7860, or the next that is free.

    Raises:
        UserError: the port is taken.
    """
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], run_history=False, theme=THEME, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: give another --host or --port ({error})") from None
    return address
