"""Draw synthetic images of machined castings into data/train and data/test.

They stand in for images of your own, so that the pipeline runs at once; a model trained on them
knows nothing of real parts. The same seed draws the same images.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256  # pixels, height and width
SCALE = 2  # drawn larger by this, then reduced: smooth edges
COUNTS = {
    "train": {"def_front": 640, "ok_front": 560},
    "test": {"def_front": 100, "ok_front": 80},
}
PREFIX = "synthetic_"
IMAGES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".tiff", ".tif", ".webp")


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python data/sample.py --seed 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--if-empty", action="store_true", help="do nothing if there are images already"
    )
    options = parser.parse_args()
    images = [path for path in options.out.rglob("*") if path.suffix.lower() in IMAGES]
    if images and options.if_empty:
        return
    foreign = [path for path in images if not path.name.startswith((PREFIX, "."))]
    if foreign:
        sys.exit(
            f"error: {foreign[0]} is not synthetic. Nothing was drawn: give another folder "
            f"with --out, or move your own images away first"
        )
    try:
        total = draw_all(options.out, options.seed)
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    print(f"{total} synthetic images drawn into {options.out}/train and {options.out}/test")


def draw_all(out: Path, seed: int, counts: dict[str, dict[str, int]] = COUNTS) -> int:
    """Draw `counts` images into `out/<split>/<class>`; return how many."""
    total = 0
    for i, (split, classes) in enumerate(counts.items()):
        for j, (name, count) in enumerate(classes.items()):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([seed, i, j, number])
                kind = rng.choice(list(DEFECTS)) if name == "def_front" else None
                short = name.removesuffix("_front")
                path = folder / f"{PREFIX}{short}_{number:04}.jpeg"
                draw(rng, kind).save(path, quality=90)
                total += 1
    return total


def draw(rng: np.random.Generator, defect: str | None) -> Image.Image:
    """Draw one casting seen from the front.

    Args:
        rng: decides shape, light and noise.
        defect: a key of DEFECTS, or None for a good part.

    Returns:
        A grey image of SIZE x SIZE pixels.
    """
    side = SIZE * SCALE
    part = _Part(rng, side)
    image = Image.new("L", (side, side), int(rng.uniform(175, 215)))
    part.paint(image)
    if defect is not None:
        DEFECTS[defect](rng, part, image)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 1.4) * SCALE))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    return Image.fromarray(_lit(rng, pixels))


class _Part:
    """The geometry of one casting: centre, radii, vanes; all lengths in drawn pixels."""

    def __init__(self, rng: np.random.Generator, side: int):
        self.rng = rng
        self.radius = side * rng.uniform(0.40, 0.47)
        self.centre = side / 2 + rng.uniform(-0.02, 0.02, 2) * side
        self.bore = self.radius * rng.uniform(0.17, 0.20)
        self.hub = self.bore * rng.uniform(1.5, 1.7)
        self.rim = self.radius * rng.uniform(0.86, 0.90)
        self.vanes = int(rng.integers(5, 8))
        self.turn = rng.uniform(0, 2 * math.pi)
        self.body = int(rng.uniform(120, 150))

    def at(self, radius: float, angle: float) -> tuple[float, float]:
        """Return the point at a radius and an angle in radians."""
        return (
            self.centre[0] + radius * math.cos(angle),
            self.centre[1] + radius * math.sin(angle),
        )

    def somewhere(self) -> tuple[float, float]:
        """Return a random point of the face, between hub and rim."""
        radius = self.rng.uniform(self.hub * 1.2, self.rim * 0.95)
        return self.at(radius, self.rng.uniform(0, 2 * math.pi))

    def paint(self, image: Image.Image) -> None:
        """Draw the good part."""
        pen = ImageDraw.Draw(image)
        line = int(2 * SCALE)
        self._disc(pen, self.radius, self.body + 25, 60, line)
        self._disc(pen, self.rim, self.body, self.body - 45, line)
        for vane in range(self.vanes):
            start = self.turn + vane * 2 * math.pi / self.vanes
            points = [
                self.at(self.hub + (self.rim - self.hub) * t, start + 0.9 * t**1.3)
                for t in np.linspace(0, 0.97, 24)
            ]
            pen.line(points, fill=self.body + 35, width=7 * SCALE, joint="curve")
            pen.line(points, fill=self.body + 60, width=3 * SCALE, joint="curve")
        self._disc(pen, self.hub, self.body + 30, self.body - 40, line)
        self._disc(pen, self.bore, 35, 20, line)

    def _disc(
        self, pen: ImageDraw.ImageDraw, radius: float, fill: int, outline: int, width: int
    ) -> None:
        (x, y), r = self.centre, radius
        pen.ellipse((x - r, y - r, x + r, y + r), fill, outline, width)


def _blowholes(rng: np.random.Generator, part: _Part, image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):
        x, y = part.somewhere()
        a, b = rng.uniform(0.04, 0.08, 2) * part.radius
        pen.ellipse((x - a, y - b, x + a, y + b), fill=int(rng.uniform(20, 55)))
        pen.arc((x - a, y - b, x + a, y + b), 20, 160, fill=225, width=SCALE)


def _crack(rng: np.random.Generator, part: _Part, image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    points = [np.array(part.somewhere())]
    inward = np.arctan2(*(part.centre - points[0])[::-1])
    heading = inward + rng.uniform(-0.9, 0.9)
    for _ in range(rng.integers(10, 18)):
        heading += rng.normal(0, 0.5)
        step = part.radius * 0.045
        points.append(points[-1] + step * np.array([math.cos(heading), math.sin(heading)]))
    pen.line([tuple(p) for p in points], fill=int(rng.uniform(15, 45)), width=5 * SCALE)


def _scratches(rng: np.random.Generator, part: _Part, image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    angle = rng.uniform(0, math.pi)
    for _ in range(rng.integers(2, 5)):
        x, y = part.at(rng.uniform(part.hub, 0.65 * part.radius), rng.uniform(0, 2 * math.pi))
        half = part.radius * rng.uniform(0.12, 0.3)
        tilt = angle + rng.normal(0, 0.1)
        dx, dy = half * math.cos(tilt), half * math.sin(tilt)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=250, width=4 * SCALE)


def _burr(rng: np.random.Generator, part: _Part, image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    start, width = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 0.8)
    angles = np.linspace(start, start + width, 16)
    outer = [
        part.at(part.radius * rng.uniform(1.04, 1.13), a) if k % 2 else part.at(part.radius, a)
        for k, a in enumerate(angles)
    ]
    inner = [part.at(part.radius * 0.97, a) for a in angles[::-1]]
    pen.polygon(outer + inner, fill=part.body + 45, outline=50)


def _chip(rng: np.random.Generator, part: _Part, image: Image.Image) -> None:
    background = image.getpixel((0, 0))
    where, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.12, 0.2) * part.radius
    width = rng.uniform(0.15, 0.28)
    angles = np.linspace(where - width, where + width, 9)
    edge = [
        part.at(part.radius - depth * math.sin(math.pi * k / 8) * rng.uniform(0.7, 1.1), a)
        for k, a in enumerate(angles)
    ]
    beyond = [part.at(part.radius * 1.03, a) for a in angles[::-1]]
    pen = ImageDraw.Draw(image)
    pen.polygon(edge + beyond, fill=background)
    pen.line(edge, fill=45, width=2 * SCALE)


DEFECTS = {
    "blowholes": _blowholes,
    "crack": _crack,
    "scratches": _scratches,
    "burr": _burr,
    "chip": _chip,
}


def _lit(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Add uneven light, the grain of the surface and the camera's noise."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    gradient = 1 + rng.uniform(0.05, 0.22) * (x * math.cos(angle) + y * math.sin(angle))
    spot = 25 * np.exp(
        -(((x - rng.uniform(-0.5, 0.5)) ** 2 + (y - rng.uniform(-0.5, 0.5)) ** 2) * 3)
    )
    grain = rng.normal(0, 1, (SIZE // 4, SIZE // 4)).astype(np.float32)
    grain = np.asarray(Image.fromarray(grain).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 2.5, pixels.shape)
    return np.clip(pixels * gradient + spot + 4 * grain + noise, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
