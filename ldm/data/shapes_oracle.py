"""Reads pictures of captioned shapes back from their pixels alone: the exact measure of text alignment."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import ndimage
from torch import Tensor

from ldm.data.shapes import BACKGROUNDS, CENTERS, COLORS, POSITIONS, RADII, SHAPES, coverage, parse
from ldm.errors import UserError

_FOREGROUND = 36.0  # RGB distance from the background; the closest pair, pink on white, is 107 apart
_MIN_AREA = 0.009  # of the picture: specks are no shapes


@dataclass(frozen=True)
class Seen:
    """One shape as it was read. x, y, radius: over the picture's side; size: as of one of so many shapes."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def position(self) -> str:
        row, column = (int(np.argmin([abs(c - value) for c in CENTERS])) for value in (self.y, self.x))
        return POSITIONS[3 * row + column]


def attributes(image: np.ndarray | Tensor) -> tuple[str, list[Seen]]:
    """The background's name and the shapes, largest first, none to two of them.

    image: (H, W, 3) uint8 array or (3, H, W) uint8 tensor, square. Never fails on one.

    Raises:
        UserError: the picture is not square.
    """
    pixels = (image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image).astype(np.float32)
    if pixels.shape[0] != pixels.shape[1]:
        raise UserError(
            f"a picture of {pixels.shape[1]} x {pixels.shape[0]} px; shapes are read from squares: crop it first"
        )
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=2)
    labels, count = ndimage.label(distance > _FOREGROUND, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    order = [i for i in np.argsort(areas)[::-1][:2] if areas[i] >= _MIN_AREA * labels.size]
    return _nearest(ground, BACKGROUNDS), [
        _read(pixels, ground, distance, labels == i + 1, RADII[len(order)]) for i in order
    ]


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(color - palette[name]).sum()))


def _read(
    pixels: np.ndarray, ground: np.ndarray, distance: np.ndarray, mask: np.ndarray, radii: dict[str, float]
) -> Seen:
    """Analysis by synthesis: every shape is drawn with the region's area and centroid; the closest drawing wins."""
    core = pixels[mask & (distance >= np.median(distance[mask]))]
    color = min(COLORS, key=lambda name: _misfit(core, ground, name))
    axis = np.array(COLORS[color], np.float32) - ground
    alpha = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    alpha *= ndimage.binary_dilation(mask, iterations=2)
    side, area = len(alpha), max(float(alpha.sum()), 1e-6)  # 0: nothing but a color that no shape has
    y, x = ((np.arange(side) + 0.5) @ alpha.sum(axis=i) / area / side for i in (1, 0))
    drawn = []
    for shape in SHAPES:
        unit_area, offset = _unit(shape)
        radius = (area / unit_area) ** 0.5 / side
        center = y - offset * radius
        error = float(np.square(coverage(shape, x, center, radius, side, samples=3) - alpha).sum())
        drawn.append((error, Seen(shape, color, "", float(x), float(center), radius)))
    best = min(drawn, key=lambda each: each[0])[1]
    return replace(best, size=min(radii, key=lambda name: abs(radii[name] - best.radius)))


def _misfit(core: np.ndarray, ground: np.ndarray, name: str) -> float:
    """Squared distance of (N, 3) pixels from mixtures of a color and at most half of the background: blur dims thin lines."""
    axis = np.array(COLORS[name], np.float32) - ground
    mixed = np.clip((core - ground) @ axis / max(float(axis @ axis), 1.0), 0.5, 1)[:, None] * axis
    return float(np.square(core - ground - mixed).sum())


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its center."""
    drawn = coverage(shape, 0.5, 0.5, 0.25, 512)
    area = float(drawn.sum())
    centroid = float((np.arange(512) + 0.5) @ drawn.sum(axis=1)) / area / 512
    return area / (0.25 * 512) ** 2, (centroid - 0.5) / 0.25


def score(image: np.ndarray | Tensor, caption: str) -> dict[str, bool]:
    """For each attribute that the caption states, whether the picture shows it; `all`: every one of them.

    Of two shapes, each attribute counts when both have it, taking the shapes in the order that fits the caption best.

    Raises:
        UserError: the caption is not one of shapes.
    """
    stated = parse(caption)
    background, seen = attributes(image)
    orders = [seen, seen[::-1]] if len(seen) == 2 else [seen]
    results = []
    for order in orders:
        right = {"shape": len(order) == len(stated.shapes)}
        right["color"] = right["size"] = right["shape"]  # a missing or an added shape makes all of them wrong
        for (shape, color, size), found in zip(stated.shapes, order, strict=False):
            right["shape"] &= found.shape == shape
            right["color"] &= found.color == color
            right["size"] &= size in (None, found.size)
        if all(size is None for _, _, size in stated.shapes):
            del right["size"]
        if stated.relation:
            right["relation"] = len(order) == 2 and _relation(order[0], order[1]) == stated.relation
        if stated.position:
            right["position"] = len(order) == 1 and order[0].position == stated.position
        if stated.background:
            right["background"] = background == stated.background
        results.append(right | {"all": all(right.values())})
    return max(results, key=lambda right: sum(right.values()))


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
