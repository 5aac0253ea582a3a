"""Pictures as the camera might also have taken them: turned, moved, nearer, in other light.

Some good parts get a blemish and count as defects. Of good parts there are few photographs, and
whatever else they have in common (a light, a shadow) would do to tell them from the defects; with
a blemish on the very same photograph it does not. Blemishes that are drawn are known to teach what
is found in real parts (Li et al., CutPaste, CVPR 2021).

Everything is TensorFlow on a whole batch. The strengths go a third to a half further than the
report's robustness table (`robustness.DISTURBANCES`).
"""

import math

import numpy as np

from defect_detection.model import tf

UNTOUCHED = 0.3  # share of the pictures that are only mirrored
ZOOM = 0.15  # logarithm of the largest factor
SQUASH = 0.05  # of one axis against the other, and of shear: the camera need not look straight down
SHIFT = 0.06  # of the sides
LIGHT, GRADIENT = 0.4, 0.15  # of the whole picture, and from one side to the other
GAMMA = 0.4  # logarithm of the largest
SHADOWS = 0.3  # largest, of a smooth field of light that is drawn on a grid of 6 x 6
SHARPEN = 0.5  # largest share of what a filter of 3x3 takes away that is added instead
BLURS = 4  # times a binomial filter of 3x3 at the most: a Gaussian of 1.4 pixels
NOISE = 12.0  # largest standard deviation, in grey levels; small ones are the most frequent
RECOMPRESSED, QUALITY = 0.5, 20  # share of the pictures, and the lowest JPEG quality
# What is beyond the edge of a turned picture: each a third of the pictures, so that none is a sign.
FILLS = ("NEAREST", "REFLECT", "CONSTANT")
VISIBLE = 30  # grey levels that a nick must change on average

# Noise is drawn once and picked from: drawing it anew takes longer than all the rest.
_NOISES = 64
_BINOMIAL = np.outer([1, 2, 1], [1, 2, 1]).reshape(3, 3, 1, 1) / 16


class Augmentation:
    """Draws variants of pictures of one size."""

    def __init__(self, image_size: tuple[int, int]):
        self.height, self.width = image_size
        self.side = float(min(image_size))
        noise = np.random.default_rng(0).standard_normal((_NOISES, *image_size, 1))
        self._noise = tf.constant(noise, tf.float32)
        self._x = tf.reshape(tf.linspace(-1.0, 1.0, self.width), (1, 1, -1, 1))
        self._y = tf.reshape(tf.linspace(-1.0, 1.0, self.height), (1, -1, 1, 1))

    def __call__(self, images: tf.Tensor, blemished: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Vary a batch.

        Args:
            images: float32 (n, height, width, 1) in [0, 255].
            blemished: bool (n,), which get a blemish first.
            seed: int64 (2,); the same seed gives the same variants.

        Returns:
            The variants, of the same shape and range.
        """
        count = tf.shape(images)[0]
        images = tf.cond(
            tf.reduce_any(blemished),
            lambda: tf.where(
                _each(blemished), self._blemish(images, _Draws(count, seed + [1, 0])), images
            ),
            lambda: images,
        )
        draw = _Draws(count, seed)
        untouched = draw(0, 1) < UNTOUCHED
        moved = self._move(images, self._transforms(draw, untouched), draw)
        taken = self._recompress(self._light(moved / 255, draw) * 255, draw)
        return tf.where(_each(untouched), moved, taken)

    def _blemish(self, images: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        """Put a nick, or else a spot or streak, on each picture.

        A nick shows what lies beside it, as where an edge is broken. Where that makes no visible
        difference, and on every second picture, there is a spot, mostly darker than what it is on.
        """
        radius, towards = tf.sqrt(draw(0, 1)) * 0.46 * self.side, draw(0, 2 * math.pi)
        across = self._x * self.width / 2 - _each(radius * tf.cos(towards))
        down = self._y * self.height / 2 - _each(radius * tf.sin(towards))
        size = tf.exp(draw(math.log(0.01), math.log(0.03))) * self.side
        longer = _each(tf.exp(draw(0, 1)))
        turn = _each(draw(0, 2 * math.pi))
        along = (across * tf.cos(turn) + down * tf.sin(turn)) / (_each(size) * longer)
        beside = (down * tf.cos(turn) - across * tf.sin(turn)) / _each(size) * tf.sqrt(longer)
        edge = (1 - tf.sqrt(along**2 + beside**2)) * _each(size) / 1.5 + 0.5  # 1.5 pixels wide
        mask = tf.clip_by_value(edge, 0, 1)
        weight = tf.reduce_sum(mask, (1, 2), keepdims=True) + 1e-3

        there = tf.reduce_sum(images * mask, (1, 2), keepdims=True) / weight
        contrast = _each(draw(0.2, 0.6)) * 255
        grey = there + contrast * _each(tf.where(draw(0, 1) < 0.85, -1.0, 1.0))
        grey = tf.where(grey < 10, there + contrast, grey)  # black on black is no blemish
        grey = tf.where(grey > 245, there - contrast, grey)

        far, direction = size * draw(1.5, 4), draw(0, 2 * math.pi)
        one, zero = tf.ones_like(far), tf.zeros_like(far)
        right, lower = far * tf.cos(direction), far * tf.sin(direction)
        shift = tf.stack([one, zero, right, zero, one, lower, zero, zero], axis=1)
        neighbour = self._transform(images, shift, "REFLECT", 0.0)
        change = tf.reduce_sum(mask * tf.abs(neighbour - images), (1, 2), keepdims=True) / weight
        nick = (change > VISIBLE) & (_each(draw(0, 1)) < 0.5)
        return images + mask * (tf.where(nick, neighbour, tf.clip_by_value(grey, 0, 255)) - images)

    def _transforms(self, draw: "_Draws", untouched: tf.Tensor) -> tf.Tensor:
        """Return (n, 8) projective transforms, from a place in the variant to one in the picture.

        They are a rotation by any angle times a mirroring, zoom, squash and shear, about the
        middle, then a shift.
        """
        angle = tf.where(untouched, 0.0, draw(0, 2 * math.pi))
        keep = tf.where(untouched, 0.0, 1.0)
        zoom = tf.exp(keep * draw(-ZOOM, ZOOM))
        squash = tf.exp(keep * draw(-SQUASH, SQUASH))
        shear = keep * draw(-SQUASH, SQUASH)
        mirror = tf.where(draw(0, 1) < 0.5, 1.0, -1.0)
        cosine, sine = tf.cos(angle), tf.sin(angle)
        # Rotation @ [[squash * mirror, shear], [0, 1 / squash]]
        a, b = zoom * cosine * squash * mirror, zoom * (cosine * shear - sine / squash)
        c, d = zoom * sine * squash * mirror, zoom * (sine * shear + cosine / squash)
        x, y = (self.width - 1) / 2, (self.height - 1) / 2
        right = x - a * x - b * y + keep * draw(-SHIFT, SHIFT) * self.width
        down = y - c * x - d * y + keep * draw(-SHIFT, SHIFT) * self.height
        zero = tf.zeros_like(a)
        return tf.stack([a, b, right, c, d, down, zero, zero], axis=1)

    def _move(self, images: tf.Tensor, transforms: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        count, grey = tf.shape(images)[0], draw(0, 255)[0]
        parts = []
        for number, fill in enumerate(FILLS):
            part = slice(count * number // len(FILLS), count * (number + 1) // len(FILLS))
            parts.append(self._transform(images[part], transforms[part], fill, grey))
        return tf.concat(parts, axis=0)

    def _transform(
        self, images: tf.Tensor, transforms: tf.Tensor, fill: str, grey: tf.Tensor | float
    ) -> tf.Tensor:
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=transforms,
            output_shape=(self.height, self.width),
            interpolation="BILINEAR",
            fill_mode=fill,
            fill_value=grey,
        )

    def _light(self, images: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        """Change tone curve, light across the part, focus and noise; all in [0, 1]."""
        images = tf.pow(tf.clip_by_value(images, 1e-4, 1), _each(tf.exp(draw(-GAMMA, GAMMA))))
        angle, gradient = _each(draw(0, 2 * math.pi)), _each(draw(0, GRADIENT))
        light = _each(draw(1 - LIGHT, 1 + LIGHT)) + gradient * tf.cos(angle) * self._x
        images *= light + gradient * tf.sin(angle) * self._y
        shadows = tf.image.resize(draw.grids(6), (self.height, self.width), "bicubic")
        images *= 1 + _each(draw(0, SHADOWS)) * shadows
        images = self._focus(tf.clip_by_value(images, 0, 1), draw(-1, 1))
        noise = tf.gather(self._noise, tf.cast(draw(0, _NOISES), tf.int32))
        images += noise * _each(draw(0, 1) ** 2 * NOISE / 255)
        return tf.clip_by_value(images, 0, 1)

    def _focus(self, images: tf.Tensor, focus: tf.Tensor) -> tf.Tensor:
        """Blur pictures whose `focus`, in [-1, 1], is above 0, the more the higher; sharpen others.

        As far as `focus` goes, the filter is applied up to `BLURS` times, the last time in part.
        """
        for number in range(BLURS):
            around = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
            smooth = tf.nn.conv2d(around, tf.constant(_BINOMIAL, tf.float32), 1, "VALID")
            change = _each(tf.clip_by_value(focus * BLURS - number, 0, 1)) * (smooth - images)
            if number == 0:
                change -= _each(tf.maximum(-focus, 0) * SHARPEN) * (smooth - images)
            images += change
        return images

    def _recompress(self, images: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        """Write some of the pictures as JPEG and read them again."""
        quality = tf.cast(draw(QUALITY, 100), tf.int32)
        chosen = draw(0, 1) < RECOMPRESSED

        def one(picture: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
            image, quality, chosen = picture
            return tf.cond(
                chosen,
                lambda: tf.cast(
                    tf.image.adjust_jpeg_quality(tf.cast(tf.round(image), tf.uint8), quality),
                    tf.float32,
                ),
                lambda: image,
            )

        return tf.reshape(
            tf.map_fn(one, (images, quality, chosen), fn_output_signature=tf.float32),
            tf.shape(images),
        )


class _Draws:
    """Uniform random numbers, one for each picture of a batch, new ones at each call."""

    def __init__(self, count: tf.Tensor, seed: tf.Tensor):
        self.count, self.seed, self.calls = count, seed, 0

    def __call__(self, low: float, high: float) -> tf.Tensor:
        return self._uniform((self.count,), low, high)

    def grids(self, side: int) -> tf.Tensor:
        """Return (n, side, side, 1) numbers in [-1, 1)."""
        return self._uniform((self.count, side, side, 1), -1, 1)

    def _uniform(self, shape: tuple, low: float, high: float) -> tf.Tensor:
        self.calls += 1
        seed = self.seed + [0, self.calls << 32]  # the batch is counted below
        return tf.random.stateless_uniform(shape, seed, float(low), float(high))


def _each(values: tf.Tensor) -> tf.Tensor:
    """Turn (n,) into (n, 1, 1, 1), to go with pictures."""
    return tf.reshape(values, (-1, 1, 1, 1))
