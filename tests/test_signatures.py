"""Signatures read from source, against what Python itself says of the imported objects."""

import importlib
import inspect
import re

import pytest
from tiny import ROOT

from ldm import signatures

TARGETS = sorted({found for path in (ROOT / "configs").rglob("*.yaml")
                  for found in re.findall(r"_target_: ([\w.]+)", path.read_text())})  # fmt: skip


def imported(target: str) -> object:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # a method
        return getattr(imported(module), name)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_source_says_is_what_python_says(target: str):
    found = signatures.signature(target)
    if found is None:
        assert target.startswith("torch.nn.") or target.rpartition(".")[0].rpartition(".")[2][0].isupper()
        return
    parameters = {n: p for n, p in inspect.signature(imported(target)).parameters.items() if n != "self"}
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    forwards = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    assert named.keys() == found.takes.keys() or (forwards and named.keys() < found.takes.keys() | {"options"})
    required = {n for n, p in named.items() if p.default is p.empty}
    assert required == found.needs or (forwards and required <= found.needs)
    assert found.rest <= forwards


@pytest.mark.parametrize(
    ("target", "argument", "good", "bad"),
    [
        ("ldm.models.unet.UNet", "channels", [3], ["3", 3.0, True, None]),
        ("ldm.models.unet.UNet", "heads", [3, None], ["3", [3]]),
        ("ldm.models.unet.UNet", "multipliers", [[1, 2], []], [3, [1, "2"], {"a": 1}]),
        ("ldm.data.sources.ShardCache", "folder", ["a"], [3, None]),
        ("ldm.data.decode.DecodeSample", "captions", [{"txt": 1.0}], [{"txt": "1"}, "txt"]),
        ("torch.optim.AdamW", "lr", [1e-3, 1], ["1e-3", None]),
        ("torch.optim.AdamW", "betas", [[0.9, 0.99]], [0.9, ["a"]]),
        ("pytorch_lightning.Trainer", "precision", ["bf16-mixed", 16, None], ["bf16-mix"]),
        ("pytorch_lightning.Trainer", "gradient_clip_val", [1, 0.5, None], ["x"]),
        ("pytorch_lightning.Trainer", "devices", ["auto", 2, [0, 1]], [{"a": 1}]),
    ],
)
def test_kinds_of_values(target: str, argument: str, good: list[object], bad: list[object]):
    found = signatures.signature(target)
    assert found is not None
    kind = found.takes[argument]
    assert [value for value in good if signatures.wants(kind, value) is not None] == []
    assert [value for value in bad if signatures.wants(kind, value) is None] == []


def test_options_that_are_handed_on():
    found = signatures.signature("ldm.diffusion.loss.Uncertainty")
    assert found is not None
    assert found.takes.keys() == {"features", "schedule", "weighting", "draw", "offset_noise", "input_perturbation"}
    assert (found.needs, found.rest) == ({"schedule", "weighting"}, False)
    logger = signatures.signature("ldm.training.loggers.wandb_logger")
    assert logger is not None
    assert {"run_dir", "project", "tags"} - logger.takes.keys() <= {"tags"}  # W&B's own arguments are open
    assert logger.rest


def test_a_name_that_is_not_there():
    with pytest.raises(signatures.UnknownName) as caught:
        signatures.signature("ldm.models.unet.Unet")
    assert caught.value.args[0] == "Unet"
    assert "UNet" in caught.value.args[1]
    with pytest.raises(signatures.UnknownName):
        signatures.signature("torch.optim.Adamw")
    assert signatures.signature("nowhere.at.all") is None
