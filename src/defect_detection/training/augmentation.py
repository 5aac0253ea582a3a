"""Images as the camera might also have taken them: rotated, shifted, closer, in other light.

Some good parts get a blemish and then count as defects. There are few photographs of good parts,
and a model could recognise them by what else they have in common, such as a shadow. A blemish on
the same photograph prevents that. Drawn blemishes teach a model to find real defects (Li et al.,
CutPaste, CVPR 2021).

Everything is computed by TensorFlow for a whole batch. Variants go a third to a half further than
the disturbances of the report (`robustness.DISTURBANCES`).
"""

import math

import numpy as np

from defect_detection.training.network import tf

# A gentle variant is moved and lit this much less: dark areas and wrong shapes may be defects. It
# is rotated by TILT, a strong one by any angle.
GENTLE, TILT = 0.25, 0.1
ZOOM = 0.15  # logarithm of the largest factor
SQUASH = 0.05  # of one axis, and shear, as if the camera did not look straight down
SHIFT = 0.06  # of the sides
LIGHT, GRADIENT = 0.4, 0.15  # of the whole image, and from one side to the other
GAMMA = 0.4  # logarithm of the largest
SHADOWS = 0.3  # largest, of a smooth field of light that is drawn on a grid of 6 x 6
SHARPEN = 0.5  # largest share of an unsharp mask of 3x3 that is added
BLURS = 4  # largest number of binomial filters of 3x3; 4 are a Gaussian of 1.4 pixels
NOISE = 12.0  # largest standard deviation, in grey levels; small ones are more frequent
RECOMPRESSED, QUALITY = 0.5, 20  # share of the images, and the lowest JPEG quality
# What fills the corners of a rotated image: each for a third, so that no fill tells a class.
FILLS = ("NEAREST", "REFLECT", "CONSTANT")
VISIBLE = 30  # grey levels by which a nick must change its pixels on average

# Noise is drawn once and reused, since drawing it takes longer than everything else.
_NOISES = 64
_BINOMIAL = np.outer([1, 2, 1], [1, 2, 1]).reshape(3, 3, 1, 1) / 16


class Augmentation:
    """Draws variants of images of one size."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.side = float(min(height, width))
        noise = np.random.default_rng(0).standard_normal((_NOISES, height, width, 1))
        self._noise = tf.constant(noise, tf.float32)
        self._x = tf.reshape(tf.linspace(-1.0, 1.0, self.width), (1, 1, -1, 1))
        self._y = tf.reshape(tf.linspace(-1.0, 1.0, self.height), (1, -1, 1, 1))

    def __call__(
        self, images: tf.Tensor, blemished: tf.Tensor, gentle: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        """Vary a batch.

        Args:
            images: float32 (n, height, width, channels) in [0, 255].
            blemished: bool (n,), which images get a blemish.
            gentle: bool (n,), which images are moved and lit as shots of one camera differ.
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
        strength = tf.where(gentle, GENTLE, 1.0)
        turn = tf.where(gentle, draw(-TILT, TILT), draw(0, 2 * math.pi))
        moved = self._move(images, self._transforms(draw, turn, strength), draw)
        return self._recompress(self._light(moved / 255, draw, strength) * 255, draw)

    def _blemish(self, images: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        """Draw a nick, a spot or a streak on each image.

        A nick shows what lies beside it, like a broken edge. Where that makes no visible
        difference, and on every second image, a spot or streak is drawn, mostly a dark one.
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

    def _transforms(self, draw: "_Draws", angle: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
        """Return (n, 8) projective transforms, from a place in the variant to one in the image.

        Each is a rotation, mirroring, zoom, squash and shear about the centre, then a shift.
        """
        zoom = tf.exp(strength * draw(-ZOOM, ZOOM))
        squash = tf.exp(strength * draw(-SQUASH, SQUASH))
        shear = strength * draw(-SQUASH, SQUASH)
        mirror = tf.where(draw(0, 1) < 0.5, 1.0, -1.0)
        cosine, sine = tf.cos(angle), tf.sin(angle)
        # Rotation @ [[squash * mirror, shear], [0, 1 / squash]]
        a, b = zoom * cosine * squash * mirror, zoom * (cosine * shear - sine / squash)
        c, d = zoom * sine * squash * mirror, zoom * (sine * shear + cosine / squash)
        x, y = (self.width - 1) / 2, (self.height - 1) / 2
        right = x - a * x - b * y + strength * draw(-SHIFT, SHIFT) * self.width
        down = y - c * x - d * y + strength * draw(-SHIFT, SHIFT) * self.height
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

    def _light(self, images: tf.Tensor, draw: "_Draws", strength: tf.Tensor) -> tf.Tensor:
        """Vary the tone curve, the light across the part, focus and noise of images in [0, 1]."""
        gamma = tf.exp(strength * draw(-GAMMA, GAMMA))
        images = tf.pow(tf.clip_by_value(images, 1e-4, 1), _each(gamma))
        angle, gradient = _each(draw(0, 2 * math.pi)), _each(strength * draw(0, GRADIENT))
        light = _each(1 + strength * draw(-LIGHT, LIGHT)) + gradient * tf.cos(angle) * self._x
        images *= light + gradient * tf.sin(angle) * self._y
        shadows = tf.image.resize(draw.grids(6), (self.height, self.width), "bicubic")
        images *= 1 + _each(strength * draw(0, SHADOWS)) * shadows
        images = self._focus(tf.clip_by_value(images, 0, 1), draw(-1, 1))
        noise = tf.gather(self._noise, tf.cast(draw(0, _NOISES), tf.int32))
        images += noise * _each(draw(0, 1) ** 2 * NOISE / 255)
        return tf.clip_by_value(images, 0, 1)

    def _focus(self, images: tf.Tensor, focus: tf.Tensor) -> tf.Tensor:
        """Blur images whose `focus`, in [-1, 1], is positive, and sharpen the others.

        The filter is applied `focus * BLURS` times, the last time in part.
        """
        kernel = tf.constant(np.repeat(_BINOMIAL, images.shape[-1], axis=2), tf.float32)
        for number in range(BLURS):
            around = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
            smooth = tf.nn.depthwise_conv2d(around, kernel, [1, 1, 1, 1], "VALID")
            change = _each(tf.clip_by_value(focus * BLURS - number, 0, 1)) * (smooth - images)
            if number == 0:
                change -= _each(tf.maximum(-focus, 0) * SHARPEN) * (smooth - images)
            images += change
        return images

    def _recompress(self, images: tf.Tensor, draw: "_Draws") -> tf.Tensor:
        """Compress some of the images as JPEG."""
        quality = tf.cast(draw(QUALITY, 100), tf.int32)
        chosen = draw(0, 1) < RECOMPRESSED

        def one(given: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
            image, quality, chosen = given
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
    """Draws uniform random numbers for a batch, one for each image, new ones at each call."""

    def __init__(self, count: tf.Tensor, seed: tf.Tensor):
        self.count, self.seed, self.calls = count, seed, 0

    def __call__(self, low: float, high: float) -> tf.Tensor:
        return self._uniform((self.count,), low, high)

    def grids(self, side: int) -> tf.Tensor:
        """Return (n, side, side, 1) numbers in [-1, 1)."""
        return self._uniform((self.count, side, side, 1), -1, 1)

    def _uniform(self, shape: tuple, low: float, high: float) -> tf.Tensor:
        self.calls += 1
        seed = self.seed + [0, self.calls << 32]  # the lower half counts the batches
        return tf.random.stateless_uniform(shape, seed, float(low), float(high))


def _each(values: tf.Tensor) -> tf.Tensor:
    """Reshape (n,) to (n, 1, 1, 1), to broadcast over images."""
    return tf.reshape(values, (-1, 1, 1, 1))
