"""An image with the evidence of a defect drawn over it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defect_detection.runtime.preprocessing import ImageFormat

GLOW = np.array([255, 72, 0])  # the colour of evidence
FONT_SIZE, MARGIN, SCALE_HEIGHT = 13, 6, 6  # pixels of the caption
MOST_OPAQUE = 0.85  # what lies below stays visible
MOST_EVIDENCE = 88.0  # LiteRT's softplus returns infinity soon after


def draw(
    image: np.ndarray, evidence: np.ndarray, takes: ImageFormat, full: float | None
) -> Image.Image:
    """Draw evidence over an image: the more evidence, the stronger the colour.

    Args:
        image: uint8 (height, width, 1 or 3).
        evidence: 0 or more, (h, w) of any size, for the whole of what the model took.
        takes: how the model took the image.
        full: evidence that is drawn in full colour; None for the strongest of this image.
    """
    aspect = takes.width / takes.height if takes.fit == "letterbox" else None
    levels = spread(relative(evidence, full), (image.shape[0], image.shape[1]), aspect)
    opacity = MOST_OPAQUE * levels[..., np.newaxis]
    return Image.fromarray((image * (1 - opacity) + GLOW * opacity).astype(np.uint8))


def relative(evidence: np.ndarray, full: float | None) -> np.ndarray:
    """Return evidence as a share of what is drawn in full colour, float32, 0 or more."""
    evidence = np.minimum(evidence, MOST_EVIDENCE)
    full = float(evidence.max()) if full is None else full
    return (evidence / max(full, 1e-9)).astype(np.float32)


def spread(levels: np.ndarray, size: tuple[int, int], aspect: float | None) -> np.ndarray:
    """Return a map at the size of its image, smoothly, in [0, 1].

    Args:
        levels: float32 (h, w), 0 or more, for the whole of what the model took.
        size: height and width of the image.
        aspect: width by height of what the model took, with borders; None if it had none.
    """
    height, width = tall, wide = size
    if aspect is not None:  # with the borders
        tall = max(height, round(width / aspect))
        wide = max(width, round(height * aspect))
    whole = Image.fromarray(levels).resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (tall - height) // 2
    return np.clip(np.asarray(whole.crop((left, top, left + width, top + height))), 0, 1)


def overlay(levels: np.ndarray, size: tuple[int, int], aspect: float | None) -> Image.Image:
    """Return evidence alone, as an image (RGBA) to be laid over another; arguments as `spread`."""
    opacity = spread(levels, size, aspect)[..., np.newaxis]
    glow = np.broadcast_to(GLOW, (*opacity.shape[:2], 3))
    return Image.fromarray(np.concatenate([glow, 255 * opacity], -1).astype(np.uint8))


def captioned(drawn: Image.Image, caption: str) -> Image.Image:
    """Return an image with lines of text below it, and the scale of the evidence."""
    font = ImageFont.load_default(FONT_SIZE)
    pen = ImageDraw.Draw(drawn)
    left, top, right, bottom = pen.multiline_textbbox((0, 0), caption, font)
    height = int(bottom + 3 * MARGIN + SCALE_HEIGHT)
    width = max(drawn.width, int(right) + 2 * MARGIN)
    whole = Image.new("RGB", (width, drawn.height + height), "white")
    whole.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(whole)
    pen.multiline_text((MARGIN, drawn.height + MARGIN / 2), caption, "black", font)
    scale = np.linspace(0, MOST_OPAQUE, width - 2 * MARGIN)[np.newaxis, :, np.newaxis]
    strip = np.repeat(255 * (1 - scale) + GLOW * scale, SCALE_HEIGHT, axis=0)
    whole.paste(
        Image.fromarray(strip.astype(np.uint8)), (MARGIN, whole.height - MARGIN - SCALE_HEIGHT)
    )
    return whole
