import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import batch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.errors import UserError
from ldm.evaluation.curve import tradeoff
from ldm.evaluation.features import FeatureNetwork, PooledPixels, area
from ldm.evaluation.measures import frechet
from ldm.evaluation.metrics import FeatureMetrics, FrechetDistance
from ldm.evaluation.protocol import protocol_id
from ldm.evaluation.results import Result, table
from ldm.evaluation.scoring import Reference, Round, evaluate, remember, score

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
def test_score_pairs_each_picture_with_its_caption_and_reference(batch_size: int, tmp_path: Path):
    values, images = score(Round("copies", copies, {}), REFERENCE, [Mean()], batch_size, tmp_path, shown=3)
    assert values == pytest.approx({"gray": REFERENCE.images.float().mean().item(), "equal": 5})
    assert torch.equal(images, REFERENCE.images[:3])


SAMPLED = {"sampling": {"guidance": {"scale": 4.0}, "steps": 3}, "weights": "ema"}


def test_evaluate_writes_scores_under_their_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rounds = [Round("copies", copies, {"made": "copies"}), Round("guidance 4", black, SAMPLED)]
    results = evaluate(rounds, REFERENCE, [Mean()], tmp_path, step=30, batch_size=2, pictures=3)
    scores = {result.label: result.metrics for result in results}
    assert scores["guidance 4"] == {"gray": 0, "equal": 0}  # fresh metrics for each round
    assert scores["copies"]["equal"] == 5
    for label, name in {"copies": "copies", "guidance 4": "guidance4"}.items():
        (folder,) = tmp_path.glob(f"step30-{name}-*")
        content: dict[str, Any] = json.loads((folder / "results.json").read_text())
        protocol = content["protocol"]
        identity = protocol.pop("id")
        assert protocol.pop("features") == {}
        assert identity == protocol_id(protocol) == folder.name.rpartition("-")[2]
        assert protocol["n"] == 5
        assert "torch" in protocol["versions"]
        assert content["checkpoint"] == {"step": 30}
        assert content["metrics"] == scores[label]
        assert Image.open(folder / "grid.png").width == 3 * 136 + 8
        assert (folder / "pictures" / "00000.tar").is_file()
    assert results[1].logged() == {"gray/n5/cfg4/steps3": 0, "equal/n5/cfg4/steps3": 0}
    assert content["under"] == "n5/cfg4/steps3"
    shown = capsys.readouterr()
    assert "5 captions, step 30" in shown.out
    assert f"{folder}/results.json" in shown.out
    assert shown.err == ""  # no bar where there is no terminal


def test_equal_protocols_have_equal_ids_and_anything_else_another(tmp_path: Path):
    def names(reference: Reference, protocol: dict[str, Any]) -> set[str]:
        evaluate([Round("r", black, {"made": "r"} | protocol)], reference, [Mean()], tmp_path, 1, 5, 1)
        return {folder.name for folder in tmp_path.iterdir() if folder.is_dir()}

    first = names(REFERENCE, {"seed": 0})
    assert names(REFERENCE, {"seed": 0}) == first
    assert len(names(REFERENCE, {"seed": 1})) == 2
    assert len(names(Reference(REFERENCE.images, CAPTIONS[::-1]), {"seed": 0})) == 3
    assert len(names(Reference(REFERENCE.images.flip(0), CAPTIONS), {"seed": 0})) == 4


class Looks(FeatureNetwork):
    """Mean colors, scaled by one weight; counts the pictures."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__("looks", 1, area)
        self.weight = nn.Parameter(torch.tensor(weight))
        self.seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return pixels.flatten(1) * self.weight


def fade(captions: list[str], index: Tensor) -> Tensor:
    return copies(captions, index) * 0.5


ROUND = Round("r", fade, {"made": "r"}, weights="w")


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("step1-r-*/results.json")
    return json.loads(path.read_text())


def test_another_metric_measures_the_same_pictures_and_adds_to_the_scores(tmp_path: Path):
    evaluate([ROUND], REFERENCE, [Mean()], tmp_path, 1, 5, 1)

    def fails(captions: list[str], index: Tensor) -> Tensor:
        raise AssertionError("made again")

    again = Round("r", fails, {"made": "r"}, weights="w")
    evaluate([again], REFERENCE, [FeatureMetrics(Looks(), [frechet])], tmp_path, 1, 5, 1)
    first = results_of(tmp_path)
    assert first["metrics"].keys() == {"gray", "equal", "frechet/looks"}
    assert first["protocol"]["features"]["looks"]["side"] == 1
    evaluate([again], REFERENCE, [FeatureMetrics(Looks(2.0), [frechet])], tmp_path, 1, 5, 1)
    assert results_of(tmp_path)["metrics"].keys() == {"frechet/looks"}  # of other weights: the old scores are not its
    with pytest.raises(UserError, match="are those of weights w, the run now has v"):
        evaluate([Round("r", fails, {"made": "r"}, weights="v")], REFERENCE, [Mean()], tmp_path, 1, 5, 1)


def test_scores_do_not_depend_on_the_batch_size_or_a_stop(tmp_path: Path):
    pictures = torch.cat([REFERENCE.images.roll(i, 3) for i in range(9)])
    reference = Reference(pictures.flip(0), [f"caption {i}" for i in range(45)])
    make = lambda captions, index: pictures[index].float() / 127.5 - 1  # noqa: E731
    values = []
    for name, batch_size in (("a", 8), ("b", 3), ("a", 7)):
        if len(values) == 2:
            (stopped,) = (tmp_path / "a").glob("*/pictures/00001.tar")
            stopped.unlink()
        metric = FeatureMetrics(Looks(), [frechet])
        (result,) = evaluate([Round("r", make, {"made": "r"})], reference, [metric], tmp_path / name, 1, batch_size, 1)
        values.append(result.metrics)
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] == pytest.approx(values[2], rel=1e-9)


def test_features_of_the_reference_are_kept_under_its_and_the_network_s_digest(tmp_path: Path):
    def seen(reference: Reference, network: Looks, name: str) -> tuple[int, dict[str, float]]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        metric = FeatureMetrics(network, [frechet])
        (result,) = evaluate([ROUND], reference, [metric], tmp_path / "runs", 1, 5, 1, cache=tmp_path / name)
        return network.seen, result.metrics

    assert seen(REFERENCE, Looks(), "a")[0] == 10
    count, values = seen(REFERENCE, Looks(), "a")
    assert count == 5  # the generated ones alone
    assert values == seen(REFERENCE, Looks(), "b")[1]
    assert seen(Reference(REFERENCE.images.flip(0), CAPTIONS), Looks(), "a")[0] == 10
    assert seen(REFERENCE, Looks(2.0), "a")[0] == 10
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_what_is_remembered_ahead_is_what_evaluation_finds(tmp_path: Path):
    first, second = Looks(), Looks()
    kept = remember(REFERENCE, [FeatureMetrics(first, [frechet])], tmp_path / "cache")
    assert first.seen == 5
    (path,) = (tmp_path / "cache").iterdir()
    assert kept == {"looks": path}
    assert remember(REFERENCE, [FeatureMetrics(first, [frechet])], tmp_path / "cache") == kept
    assert first.seen == 5  # it was there
    evaluate(
        [ROUND], REFERENCE, [FeatureMetrics(second, [frechet])], tmp_path / "runs", 1, 5, 1, cache=tmp_path / "cache"
    )
    assert second.seen == 5  # the generated ones alone
    with pytest.raises(UserError, match="no network with weights"):
        remember(REFERENCE, [FrechetDistance(PooledPixels(2))], tmp_path / "cache")


def result(label: str, scale: float, values: dict[str, float], **changes: Any) -> Result:
    protocol = {"id": label, "n": 5, "features": {}, "sampling": {"guidance": {"scale": scale}}, **changes}
    return Result(label, {"guidance": scale}, protocol, values, Path("x"))


def test_the_table_shows_intervals_and_refuses_what_does_not_compare():
    results = [result("guidance 1", 1.0, {"a": 0.5, "a/ci95": 0.125}), result("guidance 3", 3.0, {"a": 0.25, "b": 2})]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(results, "title"))
    text = captured.get()
    assert "0.500 ±0.125" in text
    assert "ci95" not in text
    with pytest.raises(UserError, match="do not compare: n is 5 and 6"):
        table([results[0], result("other", 2.0, {"a": 1}, n=6)], "title")


def test_the_curve_sets_the_first_distance_against_alignment_or_the_setting():
    both = [
        {"frechet/pixels4": 1.0, "frechet/x": 9.0 - s, "clip_cosine/y": s / 10, "caption_accuracy/all": 0.5}
        for s in (1.0, 3.0)
    ]
    swept = [result("", s, v) for s, v in zip((1.0, 3.0), both, strict=True)]
    found = tradeoff([Result("reconstruction", {}, {}, {"frechet/x": 0.0}, Path("x")), *swept])
    assert found == ({"": [("1.0", 0.1, 8.0), ("3.0", 0.3, 6.0)]}, "clip_cosine/y →", "frechet/x", "guidance")
    alone = tradeoff([result("", s, {"frechet/x": s}) for s in (1.0, 3.0)])
    assert alone == ({"": [("1.0", 1.0, 1.0), ("3.0", 3.0, 3.0)]}, "guidance", "frechet/x", "guidance")
    swept = [
        Result("", {"guidance": g, "steps": s}, {}, {"frechet/x": g * s}, Path("x")) for s in (9, 5) for g in (1, 2, 3)
    ]
    assert tradeoff(swept).lines.keys() == {"steps 9", "steps 5"}
    averages = [Result("", {"ema": e}, {}, {"frechet/x": 1.0}, Path("x")) for e in ("raw", 0.05, "a/file")]
    assert tradeoff(averages).lines == {"": [("raw", 0, 1.0), ("0.05", 1, 1.0), ("a/file", 2, 1.0)]}
    assert tradeoff([result("", 1.0, {"frechet/x": 1})]) is None
    assert tradeoff([result("", s, {"other": s}) for s in (1.0, 3.0)]) is None


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


def test_prompts_come_without_pictures(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red dog\n\n  a blue cat \n")
    reference = Reference.of_prompts(path, None)
    assert (reference.captions, reference.images) == (["a red dog", "a blue cat"], None)
    assert reference.protocol()["reference"] is None
    with pytest.raises(UserError, match=r"n=3, but .* holds 2 prompts"):
        Reference.of_prompts(path, 3)
    with pytest.raises(UserError, match="there is no file of prompts"):
        Reference.of_prompts(tmp_path / "none.txt", None)
    (result,) = evaluate([Round("r", black, {"made": "r"})], reference, [Gray()], tmp_path, 1, 5, 1)
    assert result.metrics == {"gray": 0}
    with pytest.raises(UserError, match="no reference pictures"):
        evaluate([Round("r", black, {"made": "r"})], reference, [FeatureMetrics(Looks(), [frechet])], tmp_path, 1, 5, 1)


class Gray(Mean):
    """Without looking at a reference."""

    def update(self, images: Tensor, captions: list[str], reference: None) -> None:
        assert reference is None
        self.total += images.float().mean(dim=(1, 2, 3)).sum()
        self.n += len(images)

    def compute(self) -> dict[str, float]:
        return {"gray": float(self.total / self.n)}
