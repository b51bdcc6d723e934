import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_ema import Line, fit
from torch import Tensor
from typer.testing import CliRunner

from ldm import cli, config
from ldm.errors import UserError
from ldm.training import power_ema
from ldm.training.power_ema import PowerEMA, chosen, exponent, reconstruct, save, solve


def closed_form(weights: list[Tensor], gamma: float) -> Tensor:
    """sum of theta_i (i^(gamma+1) - (i-1)^(gamma+1)) / n^(gamma+1); weights: the one after each step."""
    t = torch.arange(len(weights) + 1, dtype=torch.float64) ** (gamma + 1)
    return (torch.stack(weights).double() * t.diff()[:, None] / t[-1]).sum(0).float()


@pytest.mark.parametrize(("gamma", "length"), [(16.97, 0.05), (6.94, 0.10)])
def test_exponents_are_the_papers(gamma: float, length: float):
    """EDM2, section 3.1."""
    assert exponent(length) == pytest.approx(gamma, abs=0.01)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_closed_form_after_n_steps(tmp_path: Path, accumulate: int):
    average = PowerEMA(str(tmp_path), [0.05, 0.2], every=100)
    _, weights, _ = fit(average, steps=9, accumulate_grad_batches=accumulate)
    steps = [
        w for i, w in enumerate(weights) if not torch.equal(w, torch.ones(3)) and not torch.equal(w, weights[i - 1])
    ]
    assert average.updates == len(steps) == 9
    for length, found in average.averages.items():
        torch.testing.assert_close(found["weight"], closed_form(steps, exponent(float(length))))
        assert found["weight"].dtype == torch.float32


def test_a_run_in_two_parts_is_the_run_in_one_bit_by_bit(tmp_path: Path):
    def run(folder: Path, parts: list[int]) -> PowerEMA:
        module, checkpoint, done = Line(), None, 0
        for steps in parts:
            average = PowerEMA(str(folder), [0.1], every=2)
            if checkpoint is not None:
                average.on_load_checkpoint(None, module, checkpoint)
            trainer = SimpleNamespace(global_step=done, is_global_zero=True, callbacks=[])
            average.on_train_start(trainer, module)
            for _ in range(steps):
                done += 1
                module.weight.data += torch.tensor([0.1, 0.2, 0.3]) * done
                trainer.global_step = done
                checkpoint = {}
                average.on_save_checkpoint(trainer, module, checkpoint)  # a checkpoint that is written before its turn
                average.on_train_batch_end(trainer, module)
            checkpoint = json_copy(checkpoint)
        average.on_train_end(trainer, module)
        return average

    def json_copy(checkpoint: dict) -> dict:
        torch.save(checkpoint, tmp_path / "checkpoint")
        return torch.load(tmp_path / "checkpoint", weights_only=True)

    whole, halves = run(tmp_path / "whole", [7]), run(tmp_path / "halves", [4, 3])
    assert halves.updates == whole.updates == 7
    assert torch.equal(halves.averages["0.1"]["weight"], whole.averages["0.1"]["weight"])
    names = [sorted(path.name for path in (tmp_path / each / "ema").iterdir()) for each in ("whole", "halves")]
    assert names[0] == names[1] == [f"step_{step:08d}.safetensors" for step in (2, 4, 6, 7)]


def walk(folder: Path, dtype: str, lengths: list[float], steps: int = 2000, every: int = 100) -> dict[float, Tensor]:
    """Trains 1000 weights by a noisy descent, with snapshots; returns references of other lengths."""
    module = Line()
    module.weight = torch.nn.Parameter(torch.ones(1000))
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1000, generator=generator)
    kept = PowerEMA(str(folder), [0.05, 0.1], every, dtype)
    references = PowerEMA(str(folder / "references"), lengths, every=10**9)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, callbacks=[])
    for each in (kept, references):
        each.on_train_start(trainer, module)
    for step in range(1, steps + 1):
        noise = torch.randn(1000, generator=generator)
        module.weight.data += 0.01 * (target * (1 + step / steps) - module.weight.data) + 0.05 * noise
        trainer.global_step = step
        for each in (kept, references):
            each.on_train_batch_end(trainer, module)
    return {float(length): average["weight"] for length, average in references.averages.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reconstruction_of_a_length_kept_as_reference(tmp_path: Path, dtype: str):
    """The bar: within 1 % relative."""
    for length, reference in walk(tmp_path, dtype, [0.05, 0.07, 0.13, 0.2]).items():
        made = reconstruct(tmp_path, length)
        assert (made.step, made.sources) == (2000, 40)
        assert made.weights.keys() == {"weight"}
        error = (made.weights["weight"] - reference).norm() / reference.norm()
        assert error < 0.003, (length, error)  # 0.0012 with fp16 and 20 snapshots of two lengths
        assert made.error < 0.02


def test_solutions():
    """A length that is stored is itself, and one between two is a mix that is nearer than either."""
    t, gamma = np.array([500.0, 500.0, 1000.0, 1000.0]), np.array([exponent(x) for x in (0.05, 0.1)] * 2)
    x, error = solve(t, gamma, 1000.0, exponent(0.1))
    assert x == pytest.approx([0, 0, 0, 1], abs=1e-9)
    assert error < 1e-6
    _, both = solve(t, gamma, 1000.0, exponent(0.07))
    alone = [solve(t[i : i + 1], gamma[i : i + 1], 1000.0, exponent(0.07))[1] for i in (2, 3)]
    assert 0 < both < min(alone) / 2


def test_inner_products_are_the_integrals():
    """Of p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) up to t, by sums."""
    tau = (np.arange(200_000) + 0.5) / 200_000 * 3.0
    density = lambda t, gamma: np.where(tau < t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)  # noqa: E731
    for a, b in (((1.0, 5.0), (3.0, 2.0)), ((3.0, 2.0), (1.0, 5.0)), ((2.0, 6.0), (2.0, 9.0))):
        expected = (density(*a) * density(*b)).sum() * 3.0 / 200_000
        assert power_ema.product(*map(np.float64, (*a, *b))) == pytest.approx(expected, rel=1e-3)


def test_snapshots_are_small_and_say_what_they_are(tmp_path: Path):
    walk(tmp_path, "float16", [0.1], steps=20, every=8)
    paths = sorted((tmp_path / "ema").iterdir())
    assert [path.name for path in paths] == ["step_00000008.safetensors", "step_00000016.safetensors"]
    assert paths[0].stat().st_size < 2 * 2 * 1000 + 1000
    with safe_open(paths[0], "pt") as file:
        assert json.loads(file.metadata()["lengths"]) == ["0.05", "0.1"]
        assert file.metadata()["updates"] == "8"
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_at_a_step_and_what_evaluation_picks(tmp_path: Path):
    walk(tmp_path, "float32", [0.1], steps=300)
    early = reconstruct(tmp_path, 0.07, at=200)
    assert (early.step, early.sources) == (200, 4)
    weights, step = chosen(tmp_path, 0.07, step=299)  # a checkpoint between two snapshots
    assert step == 200
    assert torch.equal(weights["weight"], early.weights["weight"])
    path, _ = save(tmp_path, 0.07, 200, None)
    assert path == tmp_path / "ema" / "length_0.07_step_00000200.safetensors"
    weights, step = chosen(tmp_path, str(path), step=300)
    assert step == 200
    assert torch.equal(weights["weight"], early.weights["weight"])
    assert reconstruct(tmp_path, 0.07).step == 300  # and the file beside the snapshots is none of them


def test_what_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no snapshot of its averages; there are: none: train with 'callbacks="):
        reconstruct(tmp_path, 0.05)
    walk(tmp_path, "float32", [0.1], steps=250)
    with pytest.raises(UserError, match=r"no snapshot of its averages at step 150; there are: 100, 200"):
        reconstruct(tmp_path, 0.05, at=150)
    with pytest.raises(UserError, match=r"ema=rwa is neither null, raw, a length such as 0.05, nor a file"):
        chosen(tmp_path, "rwa", 250)


@pytest.mark.parametrize("length", [0, -1, 0.3, float("nan")])
def test_a_length_out_of_range_is_refused(tmp_path: Path, length: float):
    with pytest.raises(UserError, match=r"an average's length is .*; give one in \(0, 0.28\]"):
        PowerEMA(str(tmp_path), [length], 10)


@pytest.mark.parametrize("wrong", [{"lengths": []}, {"every": 0}, {"dtype": "int8"}])
def test_other_mistakes_are_refused(tmp_path: Path, wrong: dict):
    with pytest.raises(UserError, match="give at least one length, every >= 1, and a dtype of"):
        PowerEMA(str(tmp_path), **({"lengths": [0.1], "every": 5} | wrong))


def test_an_average_cannot_begin_in_the_middle(tmp_path: Path):
    average = PowerEMA(str(tmp_path), [0.1], 10)
    with pytest.raises(UserError, match=r"averages of lengths: none; callbacks.power_ema.lengths are 0.1"):
        average.on_load_checkpoint(None, Line(), {"ema": {}})


@pytest.mark.parametrize("which", [None, "raw", 0.07, "file"])
def test_evaluation_s_key_reaches_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: float | str | None
):
    """config.load_run(run, ema=...), and what `ldm ema` wrote."""
    references = walk(tmp_path, "float32", [0.07], steps=200)
    module = Line()
    module.weight = torch.nn.Parameter(torch.zeros(1000))
    module.on_load_checkpoint = lambda _: None
    raw = {"weight": torch.full((1000,), 2.0), "frozen": torch.ones(2)}
    average = {"weights": {"weight": torch.full((1000,), 3.0)}, "updates": 250}
    checkpoint = {"state_dict": raw, "ema": average, "global_step": 250}
    monkeypatch.setattr(config, "run_config", lambda _: SimpleNamespace(model=None))
    monkeypatch.setattr(config, "build", lambda _: module)
    monkeypatch.setattr(config, "_weights", lambda *_: checkpoint)
    if which == "file":
        told = CliRunner().invoke(cli.app, ["ema", str(tmp_path), "--length", "0.07", "--at", "200"])
        assert told.exit_code == 0, told.output
        assert "step 200, from 4 averages" in told.output
        which = str(tmp_path / "ema" / "length_0.07_step_00000200.safetensors")
    _, step = config.load_run(tmp_path, which)
    expected = {None: torch.full((1000,), 3.0), "raw": raw["weight"]}.get(which, references[0.07])
    assert step == (250 if which in (None, "raw") else 200)
    assert (module.weight - expected).norm() / expected.norm() < 0.05  # of two snapshots
