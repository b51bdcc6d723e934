"""Captioned shapes: small pictures of one or two colored shapes, drawn from a grammar whose captions can be read back.

The oracle that reads a picture is in shapes_oracle.py. `python -m ldm.data.shapes data/shapes` writes the demo's shards.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.parallel import in_parallel
from ldm.data.writer import ShardWriter
from ldm.errors import UserError

COLORS = {
    "red": (205, 15, 40),
    "orange": (250, 115, 0),
    "yellow": (250, 250, 60),
    "green": (20, 185, 50),
    "cyan": (0, 220, 230),
    "blue": (10, 50, 225),
    "purple": (160, 0, 190),
    "pink": (255, 150, 205),
}
BACKGROUNDS = {"black": (10, 10, 10), "white": (248, 248, 248), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
RADII = {1: {"small": 0.2, "large": 0.285}, 2: {"small": 0.165, "large": 0.215}}  # by shapes; over the picture's side
CENTERS = (0.32, 0.5, 0.68)  # of the 3 x 3 positions; of two shapes: 0.24 and 0.76

# shown to no training picture: whether a model composes what it has seen apart
UNSEEN_PAIRS = frozenset(
    {
        ("circle", "yellow"),
        ("square", "cyan"),
        ("triangle", "red"),
        ("star", "blue"),
        ("ring", "green"),
        ("cross", "orange"),
    }
)
TWO_SHAPES = 0.1  # their share in training
STATED = 0.9  # how often a caption says what it may leave out

SHARD_SIZE = 2048


@dataclass(frozen=True)
class Shape:
    """One shape. x, y, radius: center and size over the picture's side, x to the right and y down."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One shape with its position, or two with the relation of the first to the second."""

    background: str
    shapes: tuple[Shape, ...]
    position: str | None
    relation: str | None


_REACH = 1.2  # no shape covers a point further from its center, in radii along either axis


def coverage(shape: str, x: float, y: float, radius: float, side: int, samples: int = 4) -> np.ndarray:
    """(side, side) float32 in [0, 1]: how much of each pixel the shape covers, by samples^2 points a pixel."""
    points = (np.arange(side * samples, dtype=np.float32) + 0.5) / (side * samples)
    columns, rows = (
        slice(*np.clip([math.floor((at - _REACH * radius) * side), math.ceil((at + _REACH * radius) * side)], 0, side))
        for at in (x, y)
    )
    u, v = (
        (points.reshape(side, samples)[pixels].ravel() - np.float32(at)) / np.float32(radius)
        for pixels, at in ((columns, x), (rows, y))
    )
    inside = _INSIDE[shape](u[None, :], v[:, None]).reshape(len(v) // samples, samples, len(u) // samples, samples)
    covered = np.zeros((side, side), np.float32)
    covered[rows, columns] = inside.mean(axis=(1, 3), dtype=np.float32)
    return covered


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    outer, inner, tenth = 1.18, 0.53, np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)  # folded onto half a point
    rho = np.hypot(u, v)
    ex, ey = inner * np.cos(tenth) - outer, inner * np.sin(tenth)
    return ex * (rho * np.sin(angle)) - ey * (rho * np.cos(angle) - outer) >= 0


_INSIDE = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: (np.abs(u) <= 0.88) & (np.abs(v) <= 0.88),
    "triangle": lambda u, v: (v <= 0.8) & (np.abs(u) * 1.85 <= (v + 1.05) * 1.04),
    "star": _star,
    "ring": lambda u, v: (u * u + v * v <= 1.16) & (u * u + v * v >= 0.46),
    "cross": lambda u, v: ((np.abs(u) <= 0.34) & (np.abs(v) <= 1)) | ((np.abs(v) <= 0.34) & (np.abs(u) <= 1)),
}


def render(scene: Scene, side: int) -> np.ndarray:
    """(side, side, 3) uint8, antialiased."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for s in scene.shapes:
        alpha = coverage(s.shape, s.x, s.y, s.radius, side)[:, :, None]
        picture = picture + alpha * (np.array(COLORS[s.color], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def is_held_out(shape: str, color: str, size: str, position: str, background: str) -> bool:
    """Whether a combination of a single shape's attributes is kept from training: one in ten, by hash."""
    text = f"{shape} {color} {size} {position} {background}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % 10 == 0


def training_scene(rng: np.random.Generator) -> Scene:
    """No unseen pair, no held-out combination."""
    if rng.random() < TWO_SHAPES:
        return _two(rng)
    return next(scene for scene in _singles(rng, unseen=False) if not _held_out(scene))


def validation_scene(index: int, rng: np.random.Generator) -> Scene:
    """By index mod 6: four held-out combinations of seen pairs, one unseen pair, one of two shapes."""
    if index % 6 == 5:
        return _two(rng)
    if index % 6 == 4:
        return next(_singles(rng, unseen=True))
    return next(scene for scene in _singles(rng, unseen=False) if _held_out(scene))


def _held_out(scene: Scene) -> bool:
    (s,) = scene.shapes
    assert scene.position is not None
    return is_held_out(s.shape, s.color, s.size, scene.position, scene.background)


def _pick(rng: np.random.Generator, names: tuple[str, ...] | dict[str, tuple[int, int, int]]) -> str:
    return tuple(names)[rng.integers(len(names))]


def _pair(rng: np.random.Generator, unseen: bool) -> tuple[str, str]:
    pairs = [pair for pair in itertools.product(SHAPES, COLORS) if (pair in UNSEEN_PAIRS) == unseen]
    return pairs[rng.integers(len(pairs))]


def _singles(rng: np.random.Generator, unseen: bool) -> Iterator[Scene]:
    while True:
        (shape, color), size, position = _pair(rng, unseen), _pick(rng, SIZES), _pick(rng, POSITIONS)
        row, column = divmod(POSITIONS.index(position), 3)
        x, y = (CENTERS[i] + rng.uniform(-0.006, 0.006) for i in (column, row))
        radius = RADII[1][size] + rng.uniform(-0.005, 0.005)
        yield Scene(_pick(rng, BACKGROUNDS), (Shape(shape, color, size, x, y, radius),), position, None)


def _two(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, RELATIONS)
    first, second = _pair(rng, False), _pair(rng, False)
    while second[1] == first[1]:  # two colors, so that the caption says which is which
        second = _pair(rng, False)
    shapes = []
    for (shape, color), along in zip((first, second), (0.24, 0.76), strict=True):
        if relation in ("right of", "below"):
            along = 1 - along
        along, across = along + rng.uniform(-0.006, 0.006), 0.5 + rng.uniform(-0.03, 0.03)
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        size = _pick(rng, SIZES)
        radius = RADII[2][size] + rng.uniform(-0.005, 0.005)
        shapes.append(Shape(shape, color, size, x, y, radius))
    return Scene(_pick(rng, BACKGROUNDS), tuple(shapes), None, relation)


_SINGLE = (
    "{a} {size}{color} {shape}{at}{on}",
    "a picture of {a} {size}{color} {shape}{at}{on}",
    "{color} {shape}{comma_size}{comma_position}{comma_on}",
    "{on_first}{a} {size}{color} {shape}{at}",
    "there is {a} {size}{color} {shape}{at}{ground}",
    "a {size}{shape} in {color}{at}{on}",
)
_TWO = (
    "{a} {size}{color} {shape} {relation} {a2} {size2}{color2} {shape2}{on}",
    "a picture of {a} {size}{color} {shape} {relation} {a2} {size2}{color2} {shape2}{on}",
    "{on_first}{a} {size}{color} {shape} {relation} {a2} {size2}{color2} {shape2}",
    "{size}{color} {shape} {relation} {size2}{color2} {shape2}{comma_on}",
)


# what a caption may leave out: slot -> (how it says it, what it says)
_OPTIONAL = {
    "size": ("{} ", "size"),
    "size2": ("{} ", "size2"),
    "comma_size": (", {}", "size"),
    "comma_position": (", {}", "position"),
    "comma_on": (", on {}", "background"),
    "at": (" at the {}", "position"),
    "on": (" on {}", "background"),
    "on_first": ("on {}, ", "background"),
    "ground": (" on a {} background", "background"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """States shape and color always; size, background and position nine times in ten each."""

    def maybe(text: str) -> str:
        return text if rng.random() < STATED else ""

    first, second = scene.shapes[0], scene.shapes[-1]
    words = {"shape": first.shape, "color": first.color, "relation": scene.relation or ""}
    words |= {"size": maybe(first.size), "background": maybe(scene.background)}
    words["position"] = maybe(scene.position) if scene.position else ""
    words |= {"shape2": second.shape, "color2": second.color, "size2": maybe(second.size) if second != first else ""}
    said = {slot: text.format(words[name]) if words[name] else "" for slot, (text, name) in _OPTIONAL.items()}
    articles = {f"a{n}": _article(words[f"size{n}"] or words[f"color{n}"]) for n in ("", "2")}
    templates = _SINGLE if len(scene.shapes) == 1 else _TWO
    return templates[rng.integers(len(templates))].format(**words | said | articles)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _patterns() -> list[re.Pattern[str]]:
    """Every template as a regular expression that names what it states."""
    words = {"shape": SHAPES, "color": COLORS, "size": SIZES, "position": POSITIONS, "relation": RELATIONS}
    words |= {"background": BACKGROUNDS}
    one = {f"{name}{n}": f"(?P<{name}{n}>{'|'.join(values)})" for name, values in words.items() for n in ("", "2")}
    optional = {slot: f"(?:{text.format(one[name])})?" for slot, (text, name) in _OPTIONAL.items()}
    slots = one | {"a": "an?", "a2": "an?"} | optional
    return [re.compile(template.format(**slots)) for template in (*_SINGLE, *_TWO)]


_PATTERNS = _patterns()


@dataclass(frozen=True)
class Stated:
    """What a caption states; None where it says nothing. shapes: one or two of (shape, color, size or None)."""

    shapes: tuple[tuple[str, str, str | None], ...]
    position: str | None
    relation: str | None
    background: str | None


def parse(text: str) -> Stated:
    """The inverse of `caption`.

    Raises:
        UserError: the text is not one of `caption`'s phrasings, whole.
    """
    match = next(filter(None, (pattern.fullmatch(text) for pattern in _PATTERNS)), None)
    if match is None:
        raise UserError(
            f"{text!r} is no caption of shapes; expected a phrasing of ldm/data/shapes.py, as in 'a small red star on black'"
        )
    said = match.groupdict()
    shapes = tuple((said[f"shape{n}"], said[f"color{n}"], said[f"size{n}"]) for n in ("", "2") if f"shape{n}" in said)
    return Stated(shapes, said.get("position"), said.get("relation"), said.get("background"))


def kind(text: str) -> str:
    """ "two", "unseen" (one shape, of an unseen pair) or "single"."""
    stated = parse(text)
    if len(stated.shapes) == 2:
        return "two"
    return "unseen" if stated.shapes[0][:2] in UNSEEN_PAIRS else "single"


def _sample(seed: int, number: int, index: int) -> tuple[Scene, str]:
    """Scene and caption: a function of seed, split (0 train, 1 val) and index alone."""
    rng = np.random.default_rng([seed, number, index])
    scene = training_scene(rng) if number == 0 else validation_scene(index, rng)
    return scene, caption(scene, rng)


def _fingerprint(side: int) -> str:
    """Of what this program draws and says: data of an older grammar or geometry are not taken for today's."""
    digest = hashlib.blake2b(digest_size=8)
    for number, index in itertools.product((0, 1), range(48)):
        scene, text = _sample(0, number, index)
        digest.update(json.dumps([asdict(scene), text]).encode() + render(scene, side).tobytes())
    return digest.hexdigest()


def _write_shard(folder: Path, side: int, seed: int, shard: tuple[int, range]) -> None:
    number, indices = shard
    with ShardWriter(folder / ("train", "val")[number], SHARD_SIZE, first=indices.start // SHARD_SIZE) as writer:
        for i in indices:
            scene, text = _sample(seed, number, i)
            file = io.BytesIO()
            Image.fromarray(render(scene, side)).save(file, "JPEG", quality=95, subsampling=0)
            writer.write(file.getvalue(), "jpg", text, {"scene": json.dumps(asdict(scene))})


def write(folder: str | Path, train: int = 24_576, val: int = 1_536, side: int = 32, seed: int = 0) -> None:
    """Writes folder/train/*.tar and folder/val/*.tar, unless they are there from the same arguments and program.

    Sample i of a split is a function of (seed, split, i).

    Raises:
        UserError: a count or the side is too small, or the folder holds shards that this function did not write.
    """
    folder = Path(folder)
    if min(train, val, seed) < 0 or side < 8:
        raise UserError(
            f"train {train}, val {val}, seed {seed}, side {side}: give counts and seed >= 0 and a side >= 8"
        )
    manifest = folder / "shapes.json"
    request = {"train": train, "val": val, "side": side, "seed": seed, "content": _fingerprint(side)}
    if manifest.exists() and json.loads(manifest.read_text()) == request:
        print(f"{folder} is complete: {train:,} training and {val:,} validation pictures of {side} px")
        return
    old = [path for split in ("train", "val") for path in (folder / split).glob("[0-9]" * 5 + "[._]*")]
    if old and not manifest.exists():
        raise UserError(
            f"{folder} holds shards but no shapes.json, so other data; give another folder or empty this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"complete": False}))  # first: an interrupted rewrite must not pass for complete
    for path in old:  # a smaller request would leave the last ones
        path.unlink()
    shards = [
        (number, range(start, min(start + SHARD_SIZE, count)))
        for number, count in enumerate((train, val))
        for start in range(0, count, SHARD_SIZE)
    ]
    for _ in in_parallel(partial(_write_shard, folder, side, seed), shards, None, f"{folder}"):
        pass
    manifest.write_text(json.dumps(request))


def write_pictures(folder: str | Path, count: int, side: int = 32, seed: int = 0) -> None:
    """Writes folder/00000.jpg and its caption, 00000.txt, and so on: as a person's own pictures lie, before `ldm shards make`.

    Files that are there and the same are left alone: to `ldm shards make` they are then the same input.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene, text = _sample(seed, 0, i)
        file = io.BytesIO()
        Image.fromarray(render(scene, side)).save(file, "JPEG", quality=95, subsampling=0)
        for path, data in ((folder / f"{i:05d}.jpg", file.getvalue()), (folder / f"{i:05d}.txt", text.encode())):
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the captioned shapes as LAION-style shards.")
    parser.add_argument("folder")
    for name, default in (("train", 24_576), ("val", 1_536), ("side", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pictures", type=int, help="write so many pictures, each beside its .txt, and no shards")
    given = vars(parser.parse_args())
    try:
        if pictures := given.pop("pictures"):
            write_pictures(given["folder"], pictures, given["side"], given["seed"])
        else:
            write(**given)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
