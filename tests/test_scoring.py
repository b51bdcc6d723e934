import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import batch
from torch import Tensor
from torchmetrics import Metric

from ldm.errors import UserError
from ldm.evaluation.protocol import protocol_id
from ldm.evaluation.scoring import Reference, Round, evaluate, score

CAPTIONS = [f"caption {i}" for i in range(5)]
REFERENCE = Reference(batch(5)["image"], CAPTIONS)


class Mean(Metric):
    """The mean gray level, and how many pictures equal their reference."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("equal", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor, captions: list[str], reference: Tensor) -> None:
        assert len(images) == len(captions) == len(reference)
        self.total += images.float().mean(dim=(1, 2, 3)).sum()
        self.equal += (images == reference).all(dim=3).all(dim=2).all(dim=1).sum()
        self.n += len(images)

    def compute(self) -> dict[str, float]:
        return {"gray": float(self.total / self.n), "equal": float(self.equal)}


def copies(captions: list[str], index: Tensor) -> Tensor:
    return REFERENCE.images[index].float() / 127.5 - 1


def black(captions: list[str], index: Tensor) -> Tensor:
    return -torch.ones(len(index), 3, 8, 8)


@pytest.mark.parametrize("batch_size", [2, 5, 50])
def test_score_pairs_each_picture_with_its_caption_and_reference(batch_size: int):
    values, images = score(Round("copies", copies, {}), REFERENCE, [Mean()], batch_size)
    assert values == pytest.approx({"gray": REFERENCE.images.float().mean().item(), "equal": 5})
    assert torch.equal(images, REFERENCE.images)


def test_evaluate_writes_scores_under_their_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rounds = [Round("copies", copies, {"how": "copies"}), Round("guidance 4", black, {"sampling": {"scale": 4.0}})]
    scores = evaluate(rounds, REFERENCE, lambda: [Mean()], tmp_path, step=30, batch_size=2, pictures=3)
    assert scores["guidance 4"] == {"gray": 0, "equal": 0}  # fresh metrics for each round
    assert scores["copies"]["equal"] == 5
    for label, name in {"copies": "copies", "guidance 4": "guidance4"}.items():
        (folder,) = tmp_path.glob(f"step30-{name}-*")
        content: dict[str, Any] = json.loads((folder / "results.json").read_text())
        protocol = content["protocol"]
        assert protocol.pop("id") == protocol_id(protocol) == folder.name.rpartition("-")[2]
        assert protocol["n"] == 5
        assert content["checkpoint"] == {"step": 30}
        assert content["metrics"] == scores[label]
        assert Image.open(folder / "grid.png").width == 3 * 136 + 8
    shown = capsys.readouterr().out
    assert "5 captions, step 30" in shown
    assert f"{folder}/results.json" in shown


def test_equal_protocols_have_equal_ids_and_anything_else_another(tmp_path: Path):
    def names(reference: Reference, protocol: dict[str, Any]) -> set[str]:
        evaluate([Round("r", black, protocol)], reference, lambda: [Mean()], tmp_path, 1, 5, 1)
        return {folder.name for folder in tmp_path.iterdir()}

    first = names(REFERENCE, {"seed": 0})
    assert names(REFERENCE, {"seed": 0}) == first
    assert len(names(REFERENCE, {"seed": 1})) == 2
    assert len(names(Reference(REFERENCE.images, CAPTIONS[::-1]), {"seed": 0})) == 3
    assert len(names(Reference(REFERENCE.images.flip(0), CAPTIONS), {"seed": 0})) == 4


def test_a_reference_is_read_from_batches():
    reference = Reference.read(iter([batch(3), batch(2, start=3)]), 5)
    assert torch.equal(reference.images, batch(5)["image"])
    assert len(reference.captions) == 5
    assert len(Reference.read([batch(3)], None).captions) == 3
    with pytest.raises(UserError, match=r"n=4, but the validation shards hold 3 usable samples; ask for fewer"):
        Reference.read([batch(3)], 4)
    with pytest.raises(UserError, match=r"hold 0 usable samples"):
        Reference.read([], None)
    cached = {name: column for name, column in batch(3).items() if name != "image"}
    with pytest.raises(UserError, match=r"without pictures; give data.val_shards=... with pictures"):
        Reference.read([cached], None)
