"""Drawn photographs of made-up parts, and the images that augmentation makes of one photograph.

A design is a kind of part; each photograph of it differs by texture, light, pose and flaws, as two
castings from one mould do.
"""

import io
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageDraw

SIDE = 240
SCALE = 2  # drawn larger by this, then reduced: smooth edges

Pen = ImageDraw.ImageDraw
Point = tuple[float, float]


def photograph(rng: np.random.Generator, design: str, size: tuple[int, int] = (SIDE, SIDE)):
    """Draw one photograph of a part; grey uint8 of `size`, height and width."""
    height, width = size
    canvas = Image.new("L", (width * SCALE, height * SCALE), int(rng.uniform(150, 220)))
    DESIGNS[design](ImageDraw.Draw(canvas), rng, canvas.size)
    flaws(ImageDraw.Draw(canvas), rng, canvas.size)
    pixels = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(5, 35)
    pixels += slope * (x * math.cos(angle) + y * math.sin(angle))
    pixels += rng.uniform(3, 8) * texture(rng, size)
    pixels += rng.normal(0, 1.5, size)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the grain of a surface, with a deviation of 1."""
    grain = sum(
        cv2.GaussianBlur(rng.normal(0, 1, size), (0, 0), sigma) * sigma for sigma in (1, 2, 4, 9)
    )
    return grain / grain.std()


def variant(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Augment: rotate by any angle, flip, zoom, shift, change brightness, compress as JPEG."""
    height, width = picture.shape
    if rng.random() < 0.5:
        picture = np.ascontiguousarray(picture[:, ::-1])
    turn = cv2.getRotationMatrix2D(
        (width / 2, height / 2), rng.uniform(0, 360), rng.uniform(0.85, 1.2)
    )
    turn[:, 2] += rng.uniform(-0.07, 0.07, 2) * (width, height)
    border = rng.choice([cv2.BORDER_REFLECT, cv2.BORDER_REPLICATE, cv2.BORDER_CONSTANT])
    turned = cv2.warpAffine(
        picture, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=int(border)
    )
    lit = 255 * (turned / 255) ** rng.uniform(0.8, 1.25) * rng.uniform(0.8, 1.15)
    lit = np.clip(lit + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
    return np.asarray(Image.open(io.BytesIO(encoded(lit, int(rng.integers(60, 96))))))


def encoded(picture: np.ndarray, quality: int = 95) -> bytes:
    """Compress as JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def flaws(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """Draw the small marks by which two parts of one design differ."""
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.uniform(0.25, 0.75, 2) * size
        r = rng.uniform(0.008, 0.02) * min(size)
        tone = int(rng.choice([30, 60, 235]))
        if rng.random() < 0.5:
            pen.ellipse((x - r, y - r, x + r, y + r * rng.uniform(0.6, 1.4)), fill=tone)
        else:
            dx, dy = rng.uniform(-6, 6, 2) * r
            pen.line((x, y, x + dx, y + dy), fill=tone, width=max(1, int(r / 2)))


def _ring(centre: Point, radius: float, corners: int, turn: float) -> list[Point]:
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _pose(rng: np.random.Generator, size: Point) -> tuple[Point, float, float]:
    """Return centre, scale and angle of a part that lies nearly where the last one lay."""
    jitter = rng.uniform(-0.02, 0.02, 2)
    centre = ((0.5 + jitter[0]) * size[0], (0.5 + jitter[1]) * size[1])
    return centre, min(size) * rng.uniform(0.96, 1.04), rng.uniform(0, 2 * math.pi)


def _turned(centre: Point, side: float, turn: float, x: float, y: float) -> Point:
    """Return where a point of the part lies, given in sides from its centre."""
    cosine, sine = math.cos(turn), math.sin(turn)
    return (centre[0] + side * (x * cosine - y * sine), centre[1] + side * (x * sine + y * cosine))


def _dot(pen: Pen, centre: Point, radius: float, tone: int, outline: int | None = None) -> None:
    (x, y), r = centre, radius
    pen.ellipse((x - r, y - r, x + r, y + r), fill=tone, outline=outline, width=4)


def gear(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """A toothed wheel, alike after a twelfth of a turn."""
    centre, side, turn = _pose(rng, size)
    for angle in 2 * math.pi * np.arange(12) / 12:
        tooth = (
            centre[0] + side * 0.41 * math.cos(turn + angle),
            centre[1] + side * 0.41 * math.sin(turn + angle),
        )
        _dot(pen, tooth, side * 0.05, 120)
    _dot(pen, centre, side * 0.39, 120, 70)
    _dot(pen, centre, side * 0.22, 145, 90)
    _dot(pen, centre, side * 0.09, 30)


def plate(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """A rectangular plate with five holes."""
    centre, side, turn = _pose(rng, size)

    def at(x: float, y: float) -> Point:
        return _turned(centre, side, turn, x, y)

    pen.polygon([at(-0.4, -0.24), at(0.4, -0.24), at(0.4, 0.24), at(-0.4, 0.24)], fill=130)
    for x, y, r in ((-0.3, -0.15, 3), (0.3, -0.15, 3), (-0.3, 0.15, 3), (0.3, 0.15, 3), (0, 0, 8)):
        _dot(pen, at(x, y), side * r / 100, 40, 90)


def bracket(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """An L with a rib: no symmetry at all."""
    centre, side, turn = _pose(rng, size)
    corners = (
        (-0.36, -0.36),
        (-0.12, -0.36),
        (-0.12, 0.1),
        (0.36, 0.1),
        (0.36, 0.34),
        (-0.36, 0.34),
    )
    outline = [_turned(centre, side, turn, x, y) for x, y in corners]
    pen.polygon(outline, fill=110)
    pen.line([outline[0], outline[4]], fill=160, width=int(side * 0.04))
    pen.line(outline + outline[:1], fill=70, width=4)


def nuts(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """Several parts in one image."""
    for x in (0.25, 0.75):
        for y in (0.25, 0.75):
            centre = tuple(np.array(size) * (x, y) + rng.uniform(-0.05, 0.05, 2) * size)
            pen.polygon(_ring(centre, 0.17 * min(size), 6, rng.uniform(0, 1)), fill=100)
            _dot(pen, centre, 0.08 * min(size), 35, 150)


def sheet(pen: Pen, rng: np.random.Generator, size: Point) -> None:
    """A surface that fills the image, with nothing on it but its grain and its flaws."""


DESIGNS: dict[str, Callable[[Pen, np.random.Generator, Point], None]] = {
    "gear": gear,
    "plate": plate,
    "bracket": bracket,
    "nuts": nuts,
    "sheet": sheet,
}
