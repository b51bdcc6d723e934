"""The captioned shapes: a function of seed and index, captions that can be read back, hold-outs that are never shown."""

import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ldm.data import shapes
from ldm.data.decode import DecodeSample
from ldm.data.shapes import Scene
from ldm.data.sources import ShardCache
from ldm.data.stream import OrderedSamples
from ldm.errors import UserError


def scenes(count: int, split: str = "train") -> list[tuple[Scene, str]]:
    out = []
    for i in range(count):
        rng = np.random.default_rng([3, i])
        scene = shapes.training_scene(rng) if split == "train" else shapes.validation_scene(i, rng)
        out.append((scene, shapes.caption(scene, rng)))
    return out


def combination(scene: Scene) -> tuple[str, str, str, str, str]:
    (s,) = scene.shapes
    return s.shape, s.color, s.size, scene.position, scene.background


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_state_what_is_drawn(split: str):
    stated_counts = np.zeros(3)
    pairs = scenes(2000, split)
    for scene, text in pairs:
        stated = shapes.parse(text)
        assert [s[:2] for s in stated.shapes] == [(s.shape, s.color) for s in scene.shapes]
        assert all(said in (None, s.size) for (_, _, said), s in zip(stated.shapes, scene.shapes, strict=True))
        assert stated.relation == scene.relation
        assert stated.position in (None, scene.position)
        assert stated.background in (None, scene.background)
        assert len(text.split()) <= 22
        stated_counts += [stated.shapes[0][2] is not None, stated.background is not None, stated.position is not None]
    share = stated_counts / len(pairs)
    assert 0.87 < share[0] < 0.93
    assert 0.87 < share[1] < 0.93
    assert 0.75 < share[2] < 0.87  # two shapes have no position


def test_there_are_enough_of_everything():
    seen = [scene for scene, _ in scenes(3000)]
    singles = [scene for scene in seen if len(scene.shapes) == 1]
    assert {s.shape for scene in seen for s in scene.shapes} == set(shapes.SHAPES)
    assert {s.color for scene in seen for s in scene.shapes} == set(shapes.COLORS)
    assert {scene.position for scene in singles} == set(shapes.POSITIONS)
    assert {scene.relation for scene in seen} == {*shapes.RELATIONS, None}
    assert 0.07 < 1 - len(singles) / len(seen) < 0.13
    assert {shapes.parse(text).background for _, text in scenes(200)} == {*shapes.BACKGROUNDS, None}


def test_hold_outs_are_never_trained_on():
    for scene, text in scenes(4000):
        assert not {(s.shape, s.color) for s in scene.shapes} & shapes.UNSEEN_PAIRS
        if len(scene.shapes) == 1:
            assert not shapes.is_held_out(*combination(scene))
            assert shapes.kind(text) == "single"
        else:
            assert shapes.kind(text) == "two"


def test_validation_is_four_held_out_one_unseen_one_of_two():
    held = scenes(600, "val")
    assert [shapes.kind(text) for _, text in held[:12]] == (["single"] * 4 + ["unseen", "two"]) * 2
    assert all(shapes.is_held_out(*combination(scene)) for i, (scene, _) in enumerate(held) if i % 6 < 4)
    assert {shape for shape, _ in shapes.UNSEEN_PAIRS} == set(shapes.SHAPES)


def test_shapes_stay_inside_and_apart():
    for scene, _ in islice(scenes(3000), 3000):
        for s in scene.shapes:
            reach = s.radius * 1.04  # the widest: a triangle's base, a ring, a star's side points
            assert reach <= s.x <= 1 - reach
        if len(scene.shapes) == 2:
            a, b = scene.shapes
            along = abs(a.x - b.x) if scene.relation in ("left of", "right of") else abs(a.y - b.y)
            assert along - a.radius - b.radius > 1.5 / 32


def test_written_twice_the_same_and_skipped_when_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        shapes.write(tmp_path / name, train=30, val=12, side=32)
    for file in (tmp_path / "a").rglob("*.tar"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    capsys.readouterr()
    shapes.write(tmp_path / "a", train=30, val=12, side=32)
    assert "is complete" in capsys.readouterr().out
    (batch,) = OrderedSamples([str(tmp_path / "a/val/00000.tar")], DecodeSample(32), ShardCache("unused", 1)).batches(
        12
    )
    assert batch["image"].shape == (12, 3, 32, 32)


def test_another_seed_gives_other_pictures(tmp_path: Path):
    shapes.write(tmp_path / "a", train=4, val=2)
    shapes.write(tmp_path / "b", train=4, val=2, seed=1)
    assert (tmp_path / "a/train/00000.tar").read_bytes() != (tmp_path / "b/train/00000.tar").read_bytes()


def test_an_interrupted_or_smaller_rewrite_leaves_nothing_of_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shapes.write(tmp_path, train=2050, val=2)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "training_scene", lambda rng: 1 / 0)
        patch.setattr(shapes, "_fingerprint", lambda side: "another")
        with pytest.raises(ZeroDivisionError):
            shapes.write(tmp_path, train=2050, val=2, seed=1)
    assert "seed" not in (tmp_path / "shapes.json").read_text()
    shapes.write(tmp_path, train=2, val=2)
    assert sorted(path.name for path in (tmp_path / "train").glob("*.tar")) == ["00000.tar"]


def test_data_of_another_geometry_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shapes.write(tmp_path, train=4, val=2)
    before = (tmp_path / "train/00000.tar").read_bytes()
    smaller = {n: {size: radius - 0.01 for size, radius in of.items()} for n, of in shapes.RADII.items()}
    monkeypatch.setattr(shapes, "RADII", smaller)
    capsys.readouterr()
    shapes.write(tmp_path, train=4, val=2)
    assert "is complete" not in capsys.readouterr().out
    assert (tmp_path / "train/00000.tar").read_bytes() != before


def test_foreign_shards_and_bad_numbers_are_refused(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds shards but no shapes"):
        shapes.write(tmp_path, train=2, val=2)
    assert (tmp_path / "train/00000.tar").read_bytes() == b"precious"
    for numbers in ({"train": -1}, {"side": 4}, {"seed": -1}):
        with pytest.raises(UserError, match="give counts and seed >= 0 and a side >= 8"):
            shapes.write(tmp_path / "new", **numbers)


@pytest.mark.parametrize(
    "text",
    ["", "a dog on a sofa", "a red star chasing a dog", "a red star left of", "a red and blue star", "red star!"],
)
def test_other_text_is_refused(text: str):
    with pytest.raises(UserError, match="is no caption of shapes"):
        shapes.parse(text)


def test_an_orange_shape():
    rng = np.random.default_rng(0)
    scene = Scene("black", (shapes.Shape("star", "orange", "small", 0.5, 0.5, 0.15),), "center", None)
    texts = {shapes.caption(scene, rng) for _ in range(300)}
    assert any("an orange star" in text for text in texts)
    assert not any("a orange" in text for text in texts)


def test_pictures_in_a_folder_are_the_shards_own(tmp_path: Path):
    shapes.write_pictures(tmp_path / "mine", 3)
    shapes.write(tmp_path / "shards", train=3, val=2)
    with tarfile.open(tmp_path / "shards/train/00000.tar") as tar:
        members = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith((".jpg", ".txt"))]
    names = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert names == ["00000.jpg", "00000.txt", "00001.jpg", "00001.txt", "00002.jpg", "00002.txt"]
    assert [(tmp_path / "mine" / name).read_bytes() for name in names] == members
    (tmp_path / "mine/00001.txt").write_text("mine")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "mine").iterdir()}
    shapes.write_pictures(tmp_path / "mine", 3)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "mine").iterdir()}
    assert [name for name in names if times[name] != after[name]] == ["00001.txt"]
