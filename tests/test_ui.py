"""`ldm ui` as a user has it: the command in a process of its own, the page in a real browser."""

import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import DESKTOP, PHONE, Tab, needs_browser, tab
from PIL import Image
from test_cli import run  # noqa: F401
from test_end_to_end import Runs, runs  # noqa: F401
from tiny import ROOT, here

from ldm import config
from ldm.cli import ui as cli
from ldm.training.drawing import Request, draw
from ldm.training.ui import Stopped, Trial, given, watched


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Path:  # noqa: F811
    """A run with checkpoints of steps 4 and 6, and averages of two lengths."""
    averages = ["callbacks=[latent_diffusion,power_ema]", "callbacks.power_ema.every=2"]
    assert here("train.py", *runs.demo("ui"), *averages) == 0
    return runs.folder / "ui"


@pytest.fixture(scope="module")
def address(trained: Path) -> Iterator[str]:
    """Of the page, served by the command."""
    command = [sys.executable, "-m", "ldm.cli", "ui", str(trained)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def choose(shown: Tab, label: str, value: object, nth: int = 0) -> None:
    box = shown.page.get_by_label(label, exact=True).nth(nth)
    box.fill(str(value))
    box.press("Tab")


FINAL = "i => i.naturalWidth && i.src.includes('seed')"  # not a step's


def generate(shown: Tab) -> str:
    """Presses the button and waits for other pictures than there were; what the page says."""
    page = shown.page
    first = page.locator("#pictures .grid-container img").first
    before = first.get_attribute("src") if first.count() else ""
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(
        """before => { const images = [...document.querySelectorAll('#pictures .grid-container img')];
        return / in [0-9.]+ s, seed/.test(document.querySelector('#status').innerText) && images.length &&
               images[0].src !== before && images.every(FINAL); }""".replace("FINAL", FINAL),
        arg=before, timeout=60_000,
    )  # fmt: skip
    return page.inner_text("#status")


def downloaded(shown: Tab, gallery: str) -> list[tuple[Image.Image, dict]]:
    """The files behind a gallery's pictures, and the parameters inside."""
    pictures = shown.page.locator(f"#{gallery} .grid-container img")
    shown.page.wait_for_function(f"[...document.querySelectorAll('#{gallery} .grid-container img')].every({FINAL})")
    files = [shown.page.request.get(each.get_attribute("src")).body() for each in pictures.all()]
    images = [Image.open(io.BytesIO(data)) for data in files]
    return [(image, json.loads(image.text["ldm"])) for image in images]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_type_generate_see_the_picture(address: str, trained: Path, width: int):
    with tab(width) as shown:
        shown.page.goto(address)
        choose(shown, "Prompt", "a large red circle on black")
        choose(shown, "Seed", 7)
        assert generate(shown).startswith("4 × 32 px in ")
        pictures = downloaded(shown, "pictures")
        assert [told["index"] for _, told in pictures] == [0, 1, 2, 3]
        first, told = pictures[0]
        assert (told["prompt"], told["seed"], told["step"], told["run"]) == (
            "a large red circle on black", 7, 6, str(trained)
        )  # fmt: skip
        cfg = config.run_config(trained)
        request = Request("a large red circle on black", cfg.data.side, seed=7)
        expected = draw(config.load_run(trained)[0], config.build(cfg.sampling), request)[0].permute(1, 2, 0).numpy()
        assert abs(np.asarray(first).astype(int) - expected).max() <= 1  # the same path as `ldm sample`
        assert np.asarray(first).std() > 1
        assert shown.page.locator("#pictures").bounding_box()["width"] > 0.5 * min(width, 640)
        assert shown.overflow() == 0
        assert shown.elsewhere() == []
        assert [each for each in shown.problems if "ERR_ABORTED" not in each] == []  # frames that a later one replaced


@pytest.mark.slow
@needs_browser
def test_two_sides_start_from_the_same_noise(address: str, trained: Path):
    with tab() as shown:
        shown.page.goto(address)
        choose(shown, "Prompt", "a small blue square on white")
        shown.page.get_by_text("Compare two checkpoints").click()
        shown.page.get_by_label("Compare with").check()
        generate(shown)
        same = zip(downloaded(shown, "pictures"), downloaded(shown, "compared"), strict=True)
        assert all((np.asarray(a) == np.asarray(b)).all() for (a, _), (b, _) in same)
        shown.page.get_by_role("button", name="New seed").click()
        choose(shown, "Weights", "raw")
        choose(shown, "Other weights", "0.1")
        choose(shown, "number input for Checkpoint", 4, nth=1)
        shown.page.get_by_label("Solver").click()
        shown.page.get_by_role("option", name="heun", exact=True).click()
        generate(shown)
        one, other = downloaded(shown, "pictures")[0], downloaded(shown, "compared")[0]
        assert [(told["average"], told["step"]) for _, told in (one, other)] == [("raw", 6), ("0.1", 4)]
        assert one[1]["sampling"]["solver"]["_target_"] == "ldm.diffusion.solvers.heun"
        assert one[1]["seed"] == other[1]["seed"] == int(shown.page.get_by_label("Seed", exact=True).input_value()) > 0
        request = Request("a small blue square on white", 32, seed=one[1]["seed"])
        for (image, _), (ema, step) in zip((one, other), (("raw", 6), (0.1, 4)), strict=True):
            sampling, _ = cli.trial(trained).sampling("heun", 1.5, 2)
            expected = draw(config.load_run(trained, ema, step)[0], sampling, request)[0].permute(1, 2, 0).numpy()
            assert abs(np.asarray(image).astype(int) - expected).max() <= 1


@pytest.mark.slow
@needs_browser
def test_a_picture_is_uploaded_and_brushed_over(address: str, tmp_path: Path):
    Image.new("RGB", (200, 120), (10, 200, 90)).save(tmp_path / "init.png")
    with tab() as shown:
        page = shown.page
        page.goto(address)
        choose(shown, "Prompt", "a small blue square on white")
        page.get_by_text("Start from a picture").click()
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        told = {"init": None, "mask": None}
        for pause in (2000, 4000, 8000, 16000):  # gradio's editor drops a file or a stroke in silence until it is ready
            page.wait_for_timeout(pause)
            if not told["init"]:
                page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "init.png")
                canvas.scroll_into_view_if_needed()
                page.wait_for_timeout(pause)  # it is laid out anew around the picture, at its own pace
            box = canvas.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 20, y + 10, steps=5)
            page.mouse.up()
            page.wait_for_timeout(pause)  # it hands the picture over when it has come to rest
            generate(shown)
            told = downloaded(shown, "pictures")[0][1]
            if told["init"] and told["mask"]:
                break
        assert told["init"]
        assert told["mask"]
        assert told["strength"] == 0.7


@pytest.mark.slow
@needs_browser
def test_stop(address: str):
    with tab() as shown:
        page = shown.page
        page.goto(address)
        choose(shown, "number input for Steps", 100)
        choose(shown, "number input for Pictures", 16)
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function("document.querySelector('#status').innerText.includes('denoising')")
        page.get_by_role("button", name="Stop").click()
        status, last = page.inner_text("#status"), ""
        while status != last:  # the browser may have steps to show yet
            page.wait_for_timeout(2000)
            status, last = page.inner_text("#status"), status
        assert int(re.search(r"denoising, step (\d+)", status)[1]) < 100
        choose(shown, "number input for Steps", 2)
        choose(shown, "number input for Pictures", 1)
        assert generate(shown).startswith("1 × 32 px in ")


@pytest.mark.slow
@needs_browser
def test_a_mistake_is_one_line_on_the_page(address: str):
    with tab() as shown:
        shown.page.goto(address)
        choose(shown, "Weights", "0.7")
        shown.page.get_by_role("button", name="Generate").click()
        toast = shown.page.locator(".toast-body")
        toast.wait_for()
        assert "an average's length is 0.7; give one in (0, 0.28]" in toast.inner_text()


@pytest.mark.slow  # the fixtures train three tiny runs
def test_it_listens_on_this_machine_alone(address: str):
    port = int(re.search(r":(\d+)/", address)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # refused if it listened on every address


@pytest.mark.slow
def test_the_command_refuses(run, trained: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    code, _, stderr = run("ui", tmp_path / "none")
    assert (code, "there is no run in" in stderr) == (2, True)
    code, _, stderr = run("ui", runs.folder / "autoencoder")
    assert (code, "a run of AutoencoderModule, which draws nothing" in stderr) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, stderr = run("ui", trained, "--port", taken.getsockname()[1])
    assert (code, "give another --host or --port" in stderr) == (2, True)
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    code, _, stderr = run("ui", trained)
    assert (code, stderr) == (4, "error: ldm ui needs Gradio: pip install -e '.[ui]'\n")


def test_steps_are_seen_as_they_come_and_closing_stops_the_work():
    steps, ended = [], []

    def make(callback):
        try:
            for i in range(1000):
                steps.append(i)
                callback(i, torch.tensor(i))
                time.sleep(0.001)
        except Stopped:
            ended.append("stopped")
            raise
        return torch.tensor(-1)

    frames = watched(make)
    assert [next(frames)[1].item() for _ in range(3)] == [0, 1, 2]
    frames.close()
    assert ended == ["stopped"]
    assert len(steps) < 900
    short = [(done, x.item()) for done, x in watched(lambda note: note(0, torch.tensor(5)) or torch.tensor(9))]
    assert short == [(False, 5), (True, 9)]
    with pytest.raises(ZeroDivisionError):
        list(watched(lambda note: 1 / 0))


def test_what_was_brushed_over_is_the_mask(tmp_path: Path):
    layers = np.zeros((2, 6, 8, 4), np.uint8)
    layers[0, 1, 2], layers[1, 3, 4] = (255, 0, 0, 255), (255, 0, 0, 128)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path, layer in zip(paths, [*layers, layers[0] * 0], strict=True):
        Image.fromarray(layer).save(path)
    init, mask = given({"background": "b.png", "layers": paths[:2]}, tmp_path)
    assert init == Path("b.png")
    assert np.argwhere(np.asarray(Image.open(mask))).tolist() == [[1, 2], [3, 4]]
    assert given({"background": "b.png", "layers": paths[2:]}, tmp_path) == (Path("b.png"), None)
    assert given({"background": None, "layers": []}, tmp_path) == given(None, tmp_path) == (None, None)


def test_the_slider_stands_on_checkpoints():
    near = lambda step: Trial.nearest(SimpleNamespace(checkpoints=[1000, 1850, 4000]), step)  # noqa: E731
    assert [near(step) for step in (1000, 1849, 1850, 3999, 4000)] == [1000, 1000, 1850, 1850, 4000]
