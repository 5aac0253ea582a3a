"""The CNN, built from its hyper-parameters, and its export to LiteRT."""

import os
import tempfile

import numpy as np

# TensorFlow's C++ logs tell of missing GPUs and double registrations; errors raise in Python too.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers, ops  # noqa: E402

from defect_detection import PipelineError, native_output  # noqa: E402
from defect_detection.classifier import MAP, PROBABILITY  # noqa: E402
from defect_detection.settings import HyperParameters  # noqa: E402

# Sides of the squares, in pixels, that the mean and the deviation of a place are taken over: what
# is wider than the first (a shadow) is removed, what is weak beside the second (grain) stays weak.
MEAN_OVER, DEVIATION_OVER = 8, 32

# Of the mean that makes one figure of all evidence: 1 would let a shade over the whole part count
# as much as a hole, infinity would learn from a single place of each picture.
POWER = 4


def build(image_size: tuple[int, int], hyper: HyperParameters) -> keras.Model:
    """Build the CNN, not compiled.

    It takes grey pictures as floats in [0, 255], shape (n, height, width, 1), and gives the
    probability of a defect, shape (n, 1). Its layer `defect_map` gives the evidence of a defect
    at each place, shape (n, height / 4, width / 4, 1), 0 or more; the probability is a sigmoid of
    its power mean. There is no evidence against a defect: a good part is one without any, also
    one that looks like none in training. Few layers, so that a place is judged by its
    neighbourhood (25 pixels wide with four, 17 with three) and not by the part that it is on.
    The first two convolutions have stride 2, the others 1. What else was tried stands in
    docs/model-notes.md.

    Raises:
        PipelineError: the pictures' sides are no multiples of 32.
    """
    if any(side % DEVIATION_OVER for side in image_size):
        raise PipelineError(
            f"image_size is {list(image_size)}: both must be multiples of {DEVIATION_OVER}"
        )
    inputs = keras.Input((*image_size, 1), name="images")
    x = _normalise_contrast(layers.Rescaling(1 / 255)(inputs))
    for number, filters in enumerate(hyper.filters):
        x = _convolve(x, filters, number)
    x = layers.SpatialDropout2D(hyper.dropout)(x)
    bias = keras.initializers.Constant(-1.0)  # little evidence to begin with
    x = layers.Conv2D(1, 1, activation="softplus", bias_initializer=bias, name=MAP)(x)
    # Softplus is never 0, but in float32 it can be, where a root has no gradient.
    powers = layers.GlobalAveragePooling2D()(ops.power(x + 1e-3, POWER))
    evidence = ops.power(powers, 1 / POWER)
    outputs = layers.Dense(
        1,
        activation="sigmoid",
        kernel_initializer=keras.initializers.Constant(2.0),
        bias_initializer=keras.initializers.Constant(-3.0),
        name=PROBABILITY,
    )(evidence)
    return keras.Model(inputs, outputs, name="defect_cnn")


def _normalise_contrast(x: keras.KerasTensor) -> keras.KerasTensor:
    """Subtract the local mean and divide by the local deviation: uneven light goes away.

    Both are taken on a coarse grid and interpolated, which costs a tenth of a moving window.
    """

    def local_mean(y: keras.KerasTensor, side: int) -> keras.KerasTensor:
        coarse = layers.AveragePooling2D(side)(y)
        return layers.UpSampling2D(side, interpolation="bilinear")(coarse)

    difference = layers.Subtract()([x, local_mean(x, MEAN_OVER)])
    variance = local_mean(ops.square(difference), DEVIATION_OVER)
    return difference * ops.rsqrt(variance + 1e-3)  # a deviation of 8 grey levels counts as noise


def _convolve(x: keras.KerasTensor, filters: int, number: int) -> keras.KerasTensor:
    first = number == 0
    x = layers.Conv2D(
        filters,
        5 if first else 3,
        2 if number < 2 else 1,
        padding="same",
        use_bias=first,
        kernel_initializer="he_normal",
    )(x)
    if not first:  # there it would take two thirds of the time, and what comes in is normalised
        # 0.9, since Keras's 0.99 needs more steps than a few hundred pictures give.
        x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.ReLU()(x)


def to_litert(model: keras.Model, quantize: str = "none") -> bytes:
    """Convert to a LiteRT model of any batch size: input `images`, outputs probability and map.

    This is the route of `keras.Model.export(format="litert")`, written out since Keras for
    Python 3.10 does not have that format; only LiteRT's own operators, so that the runtime
    needs no TensorFlow.

    Args:
        model: as `build` makes it.
        quantize: "none"; or what the weights are kept as, "float16" or "int8". With int8 the
            convolutions also compute in it, with the range that each picture's values have: with
            ranges that are fixed beforehand LiteRT 2.3 ends with a segmentation fault.
    """
    if quantize != "int8":  # which would make the products of matrices in `_Enlarge` coarse
        weights = model.get_weights()
        model = keras.models.clone_model(model, clone_function=_quicker)
        model.set_weights(weights)
    both = keras.Model(model.inputs, [model.output, model.get_layer(MAP).output])

    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(zip((PROBABILITY, MAP), both(images, training=False), strict=True))

    with tempfile.TemporaryDirectory() as folder, native_output.held_back():
        archive = keras.export.ExportArchive()
        archive.track(both)
        signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")
        archive.add_endpoint("serve", serve, input_signature=[signature])
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantize != "none":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
        return converter.convert()


def _quicker(layer: keras.Layer) -> keras.Layer:
    """Copy a layer, one that enlarges as one that LiteRT is quicker with."""
    if isinstance(layer, layers.UpSampling2D):
        return _Enlarge(layer.size[0], name=layer.name)
    return layer.__class__.from_config(layer.get_config())


class _Enlarge(layers.Layer):
    """Enlarges as UpSampling2D does with bilinear interpolation, by products of matrices.

    LiteRT resizes pixel by pixel: the whole model takes an eighth less time with this.
    """

    def __init__(self, factor: int, name: str):
        super().__init__(name=name)
        self.factor = factor

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Enlarge (n, height, width, 1) in height and width."""
        _, height, width, _ = x.shape
        columns = tf.linalg.matmul(tf.transpose(x[..., 0], (0, 2, 1)), self._weights_for(height))
        rows = tf.linalg.matmul(tf.transpose(columns, (0, 2, 1)), self._weights_for(width))
        return rows[..., tf.newaxis]

    def _weights_for(self, side: int) -> tf.Tensor:
        """Return what each of `side` pixels gives to each of the pixels between them."""
        places = (np.arange(side * self.factor) + 0.5) / self.factor - 0.5
        distances = np.abs(np.clip(places, 0, side - 1) - np.arange(side)[:, np.newaxis])
        return tf.constant(np.maximum(1 - distances, 0), tf.float32)


def rescale(model: keras.Model, scale: float) -> None:
    """Multiply the log-odds that the model gives by `scale`."""
    last = model.get_layer(PROBABILITY)
    last.set_weights([weight * scale for weight in last.get_weights()])
