"""World size, strategy and accumulation change nothing that is learned; real processes, in sharded_training.py."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import picture, write_tar
from sharded_training import ABORTED, BATCH, CASES, HALF, SLOW, STEPS
from tiny import ROOT, captions, latent_diffusion
from torch import nn

from ldm.errors import UserError
from ldm.models.dit import DiT
from ldm.training.base import frozen_state
from ldm.training.strategies import FullySharded, blocks, clip_norm, ddp, gradient_norm, shard

ALL = CASES | SLOW
SAME = {"rtol": 0, "atol": 1e-5}


def run(folder: Path, cases: Iterable[str]) -> Path:
    """Trains these cases one after the other, in one process that forks ranks. Returns where they are."""
    texts = captions(50)
    for number in range(5):
        mine = range(10 * number, 10 * number + 10)
        members = [
            (f"{i:03d}.{end}", data) for i in mine for end, data in (("jpg", picture(i)), ("txt", texts[i].encode()))
        ]
        write_tar(folder / f"{number}.tar", members)
    command = ["tests/sharded_training.py", f"{folder}/{{0..3}}.tar", f"{folder}/4.tar", folder / "out", *cases]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:] + why(done.stderr)
    if ABORTED in done.stderr:
        warnings.warn(why(done.stderr), stacklevel=2)
    return folder / "out"


def why(stderr: str) -> str:
    """Which rank died of what, and where: a rank's own last words stand before what the others say of it."""
    return "\n".join(
        re.findall(rf"(?m)^.*(?:{ABORTED}|SIG[A-Z]+\(|terminate called|what\(\)|Fatal|frame #\d+).*$", stderr)[:80]
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("ranks"), CASES)


@pytest.fixture(scope="module")
def slow_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("slow"), SLOW)


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    return [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(ALL[name].world)]


def losses(folder: Path, name: str) -> torch.Tensor:
    """(steps,), the mean over ranks and micro-batches."""
    ranks = torch.tensor([rank["losses"] for rank in told(folder, name)])
    accumulate = ALL[name].accumulate
    return ranks.view(len(ranks), -1, accumulate).mean(dim=(0, 2)) * accumulate  # Lightning divides by it


def keys(folder: Path, name: str) -> list[list[str]]:
    """The keys of each step, over all ranks."""
    steps: dict[int, list[str]] = {}
    for path in (folder / name / "keys").iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(row["step"], []).extend(row["keys"])
    return [sorted(steps[step]) for step in sorted(steps)]


def saved(folder: Path, name: str, when: str = "end") -> dict[str, Any]:
    return torch.load(folder / name / f"{when}.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["2x4", "2x4 accumulated", "4x2", "fsdp"])
def test_ranks_accumulation_and_strategies_learn_the_same(out: Path, name: str):
    assert_same_run(out, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1x8 accumulated", "4x2 accumulated", "fsdp accumulated", "hsdp"])
def test_more_of_them(slow_out: Path, name: str):
    assert_same_run(slow_out, name)


def assert_same_run(out: Path, name: str) -> None:
    """As on one rank: keys, losses, and where they are equally long, weights and averages. Validation has other numbers of
    batches on each rank, and draws on rank 0 alone."""
    case, expected = ALL[name], losses(out, "1x8")
    assert len(expected) == STEPS
    assert expected[-5:].mean() < expected[:5].mean()
    torch.testing.assert_close(losses(out, name), expected[: case.steps], **SAME)
    norms = told(out, "1x8")[0]["norms"][:4]
    assert [rank["norms"][:4] for rank in told(out, name)] == [pytest.approx(norms, abs=1e-5)] * case.world
    assert max(norms) == pytest.approx(0.5, abs=1e-4)  # it is clipped
    assert keys(out, name) == keys(out, "1x8")[: case.steps]
    assert {len(step) for step in keys(out, name)} == {BATCH}
    one, many = saved(out, "1x8"), saved(out, name)
    shapes = [{k: (type(v), v.shape, v.dtype) for k, v in found["state_dict"].items()} for found in (one, many)]
    assert shapes[0] == shapes[1]
    optimizers = [found["optimizer_states"][0]["state"] for found in (one, many)]
    shapes = [{i: {k: v.shape for k, v in of.items()} for i, of in optimizer.items()} for optimizer in optimizers]
    assert shapes[0] == shapes[1]
    assert many["ema"]["updates"] == many["power_ema"]["updates"] == case.steps
    assert (out / name / "ema" / f"step_{case.steps:08d}.safetensors").is_file()
    assert told(out, name)[0]["validation"]
    if case.steps == STEPS:
        for key in ("state_dict", "ema", "power_ema"):
            torch.testing.assert_close(many[key], one[key], **SAME)


def test_validation_is_the_same_where_weights_are_gathered_for_it(out: Path):
    ddp, fsdp = told(out, "2x4"), told(out, "fsdp")
    for theirs, ours in zip(fsdp, ddp, strict=True):
        assert theirs["validation"] == pytest.approx(ours["validation"], rel=1e-4)
        assert theirs["val/loss"] == pytest.approx(ours["val/loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["ddp to fsdp", "fsdp to one"])
def test_a_checkpoint_of_one_strategy_loads_in_another(out: Path, name: str):
    assert_goes_on(out, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp to ddp", "hsdp to fsdp"])
def test_more_checkpoints(slow_out: Path, name: str):
    assert_goes_on(slow_out, name)


def assert_goes_on(out: Path, name: str) -> None:
    """Weights, optimizer and averages, as the run that never stopped."""
    torch.testing.assert_close(losses(out, name), losses(out, "1x8")[HALF:], **SAME)
    one, other = saved(out, "1x8"), saved(out, name)
    for key in ("state_dict", "ema", "power_ema"):
        torch.testing.assert_close(other[key], one[key], **SAME)
    assert keys(out, name) == keys(out, "1x8")[HALF:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan ddp", "gan fsdp"])
def test_an_autoencoder_against_an_adversary_that_starts_late(slow_out: Path, name: str):
    """A static graph bears it; so do weights that are used apart (the last layer's gradient, detached copies)."""
    torch.testing.assert_close(losses(slow_out, name), losses(slow_out, "gan"), **SAME)
    one, many = saved(slow_out, "gan")["state_dict"], saved(slow_out, name)["state_dict"]
    torch.testing.assert_close(many, one, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fsdp_under_bf16_is_ddp_under_it(slow_out: Path):
    """Blocks are gathered in bfloat16, to which autocast would round their weights; what is kept stays float32."""
    ddp, fsdp = losses(slow_out, "ddp bf16"), losses(slow_out, "fsdp bf16")
    torch.testing.assert_close(fsdp, ddp, rtol=0, atol=1e-3)
    plain = losses(slow_out, "1x8")[: len(ddp)]
    assert not torch.equal(ddp, plain)
    torch.testing.assert_close(ddp, plain, rtol=0, atol=0.02)
    weights = saved(slow_out, "fsdp bf16")["state_dict"].values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.float32}


def test_ddp_leaves_frozen_networks_out():
    module = latent_diffusion()
    module.configure_model()
    assert set(module._ddp_params_and_buffers_to_ignore) == set(frozen_state(module)) != set()
    assert all(name.startswith("first_stage.") for name in module._ddp_params_and_buffers_to_ignore)


def test_blocks_are_a_network_s_outermost_lists():
    network = DiT(2, 2, width=16, depth=3, heads=2, patch=1)
    assert list(blocks(nn.Sequential(network))) == list(network.blocks)


def test_clipping_is_torch_s():
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)] for _ in range(2))
    for i in range(2):  # the third has no gradient
        ours[i].grad = torch.arange(1.0, len(ours[i]) + 1) * (i + 1)
        theirs[i].grad = ours[i].grad.clone()
    clip_norm(ours, gradient_norm(ours), 0.5)
    nn.utils.clip_grad_norm_(theirs, 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in ours[:2]]), torch.tensor(0.5))
    assert ours[2].grad is None


def test_what_cannot_be_done_is_refused():
    module = pl.LightningModule()
    module.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="scale is a scalar that is trained, which FSDP cannot cut: use trainer=ddp"):
        shard(module, SimpleNamespace())
    strategy = FullySharded(replicas=3, timeout=60)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(UserError, match=re.escape("trainer.strategy.replicas=3 does not divide the 4 ranks")):
        strategy.setup_environment()


def test_ddp_waits_as_long_as_it_is_told():
    strategy = ddp(90)
    assert strategy._timeout.total_seconds() == 90
    assert strategy._ddp_kwargs == {"static_graph": True}
    assert ddp(90, accumulate=2)._ddp_kwargs == {"static_graph": False}  # its first backward pass fails under no_sync
