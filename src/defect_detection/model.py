"""The CNN, built from its hyper-parameters, and its export to LiteRT."""

import os
import tempfile

# TensorFlow's C++ logs tell of missing GPUs and double registrations; errors raise in Python too.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers, ops  # noqa: E402

from defect_detection import PipelineError, native_output  # noqa: E402
from defect_detection.settings import HyperParameters  # noqa: E402

# Side of the square whose mean and deviation the contrast is measured by, in pixels.
NEIGHBOURHOOD = 8


def build(image_size: tuple[int, int], hyper: HyperParameters) -> keras.Model:
    """Build the CNN, not compiled.

    It takes grey pictures as floats in [0, 255], shape (n, height, width, 1), and gives the
    probability of a defect, shape (n, 1). The first convolution has stride 2; each further
    number of filters is a 3x3 convolution and a 2x2 pooling. At the end stand each filter's
    largest value, since a defect is a small place, and its mean.

    Raises:
        PipelineError: the pictures are too small for so many layers, or their sides are no
            multiples of 8.
    """
    halvings = len(hyper.filters)
    smallest = 2 ** (halvings + 1)
    if min(image_size) < smallest or any(side % NEIGHBOURHOOD for side in image_size):
        raise PipelineError(
            f"image_size is {list(image_size)}: for the {halvings} layers of the set "
            f"{hyper.name!r} both must be multiples of {NEIGHBOURHOOD}, at least {smallest}"
        )
    inputs = keras.Input((*image_size, 1), name="images")
    x = _normalise_contrast(layers.Rescaling(1 / 255)(inputs))
    first, *rest = hyper.filters
    x = _convolve(x, first, size=5, strides=2)
    for filters in rest:
        x = layers.MaxPooling2D()(_convolve(x, filters, size=3, strides=1))
    x = layers.Concatenate()([layers.GlobalMaxPooling2D()(x), layers.GlobalAveragePooling2D()(x)])
    x = layers.Dropout(hyper.dropout)(x)
    outputs = layers.Dense(1, activation="sigmoid", name="defect_probability")(x)
    return keras.Model(inputs, outputs, name="defect_cnn")


def _normalise_contrast(x: keras.KerasTensor) -> keras.KerasTensor:
    """Subtract the local mean and divide by the local deviation: uneven light goes away.

    Both are taken on a coarse grid and interpolated, which costs a tenth of a moving window.
    """

    def local_mean(y: keras.KerasTensor) -> keras.KerasTensor:
        coarse = layers.AveragePooling2D(NEIGHBOURHOOD)(y)
        return layers.UpSampling2D(NEIGHBOURHOOD, interpolation="bilinear")(coarse)

    difference = layers.Subtract()([x, local_mean(x)])
    variance = local_mean(ops.square(difference))
    return difference * ops.rsqrt(variance + 3e-4)  # a deviation of 4 grey levels counts as noise


def _convolve(x: keras.KerasTensor, filters: int, size: int, strides: int) -> keras.KerasTensor:
    x = layers.Conv2D(
        filters,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)
    # 0.9, since Keras's 0.99 needs more steps than a few hundred pictures give.
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def to_litert(model: keras.Model) -> bytes:
    """Convert to a LiteRT model of any batch size, input `images`, output the probability.

    This is the route of `keras.Model.export(format="litert")`, written out since Keras for
    Python 3.10 does not have that format; only LiteRT's own operators, so that the runtime
    needs no TensorFlow.
    """

    def probability(images: tf.Tensor) -> tf.Tensor:
        return model(images, training=False)

    with tempfile.TemporaryDirectory() as folder, native_output.held_back():
        archive = keras.export.ExportArchive()
        archive.track(model)
        signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")
        archive.add_endpoint("serve", probability, input_signature=[signature])
        archive.write_out(folder, verbose=False)
        return tf.lite.TFLiteConverter.from_saved_model(folder).convert()
