"""The CNN, built from its hyper-parameters, and its export to LiteRT."""

import tempfile
from dataclasses import dataclass

import numpy as np

from defect_detection import PipelineError
from defect_detection.runtime import native_output

native_output.silence_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers, ops  # noqa: E402

from defect_detection.runtime.classifier import MAP, PROBABILITY  # noqa: E402
from defect_detection.settings import HyperParameters  # noqa: E402
from defect_detection.training import pretrained  # noqa: E402
from defect_detection.training.calibration import Calibration  # noqa: E402

FEATURES = "features"  # name of the last frozen layer
STANDARDISED = "standardised"
OVERALL = "overall"  # log-odds from the image as a whole
# Layers of the head "good": places in whitened coordinates, those that are kept, both measures.
WHITENED, MEMORY, NICKS, UNLIKE = "whitened", "memory", "nicks", "unlike"
DISTANCE = "distance"
COMPONENTS, KEPT = 128, 1024  # of the whitened places, and how many places are kept

# Images with a shorter side of fewer pixels are enlarged in the model.
SHORTER_SIDE = 256
FINE, COARSE = 4, 7  # blocks whose outputs are features: the last of stride 8, one of stride 16

# Exponent of the mean over the map. With 1, a shade over the whole part would count as much as a
# hole; with infinity, the fit would learn from a single place of each image.
POWER = 4

_LOG_ODDS = {
    "activation": "sigmoid",
    "kernel_initializer": keras.initializers.Constant(2.0),
    "bias_initializer": keras.initializers.Constant(-3.0),
}


def build(shape: tuple[int, int, int], hyper: HyperParameters) -> keras.Model:
    """Build the CNN with pretrained weights, not compiled.

    It takes images as floats in [0, 255], shape (n, *shape), and returns the probability of a
    defect, shape (n, 1). The first `hyper.blocks` blocks of EfficientNet-Lite0 are frozen; they
    end in the layer `features`, one place for 16 x 16 pixels of the enlarged image. With two views
    the features are the mean of those of the image and of its copy rotated by 180 degrees.

    The layer `defect_map` returns the evidence of a defect at each place, 0 or more, from a linear
    combination of the features there. With the head "map", the probability is a sigmoid of its
    power mean: there is no evidence against a defect, and a part without evidence is good, even if
    it looks unlike those in training. With the head "wide", the log-odds also have a linear
    combination of the features' mean, maximum and deviation over the image. With the head "good"
    they are the larger of two measures: the power mean, and the largest distance of a place from
    the places of good parts that are kept.

    Args:
        shape: height, width and channels of an image: 1 for grey, 3 for colour.
        hyper: the layers.

    Raises:
        PipelineError: the package with the pretrained weights is not installed.
    """
    inputs = keras.Input(shape, name="images")
    enlarged = _smooth(_enlarge(inputs))
    pretrained_blocks = _pretrained(enlarged.shape[1:], hyper.blocks)
    features = pretrained_blocks(_centre(enlarged))
    if hyper.views == 2:
        turned = _turn(pretrained_blocks(_centre(_turn(enlarged))))
        features = layers.Average(name=FEATURES)([features, turned])
    else:
        features = layers.Identity(name=FEATURES)(features)
    model = keras.Model(inputs, _judge(features, hyper.head), name="defect_cnn")
    _load_weights(model)
    return model


def has_features(model: keras.Model) -> bool:
    """Return whether a model has frozen pretrained layers; former versions have none."""
    return any(layer.name == FEATURES for layer in model.layers)


def frozen(model: keras.Model) -> keras.Model:
    """Return the frozen layers as a model: images in, features out."""
    return keras.Model(model.input, model.get_layer(FEATURES).output)


def fitted(model: keras.Model) -> keras.Model:
    """Return the fitted layers as a model, features in; the whole model if none is frozen."""
    if not has_features(model):
        return model
    return keras.Model(model.get_layer(FEATURES).output, model.output)


def require_contract(model: keras.Model) -> None:
    """Raise PipelineError if a model lacks what fitting and serving need."""
    names = {layer.name for layer in model.layers}
    needed = [MAP, PROBABILITY]
    if has_features(model):
        needed.append(STANDARDISED)
    if is_good_only(model):
        needed += [WHITENED, NICKS, UNLIKE, DISTANCE]
    lacking = [name for name in needed if name not in names]
    if lacking or len(model.input_shape) != 4 or model.output_shape != (None, 1):
        raise PipelineError(
            f"The model cannot be fitted: it has the input {model.input_shape[1:]} and the output "
            f"{model.output_shape[1:]}"
            + (f", and no layer {' and '.join(lacking)}" if lacking else "")
            + "; expected an image, one probability, and the layers of network.py"
        )


def is_wide(model: keras.Model) -> bool:
    """Return whether a model also weighs the image as a whole."""
    return any(layer.name == OVERALL for layer in model.layers)


def is_good_only(model: keras.Model) -> bool:
    """Return whether a model was made for good parts alone."""
    return any(layer.name == MEMORY for layer in model.layers)


def with_map(model: keras.Model) -> keras.Model:
    """Return a new model with the same frozen layers and the head "map"."""
    return keras.Model(model.input, _judge(model.get_layer(FEATURES).output, "map"))


def maps(model: keras.Model, count: int) -> keras.Model:
    """Return `count` copies of the map of a model side by side, features in, (n, count) out."""
    inputs = keras.Input(model.get_layer(FEATURES).output.shape[1:])
    outputs = layers.EinsumDense("nk,k->nk", count, bias_axes="k", name=PROBABILITY, **_LOG_ODDS)
    made = keras.Model(inputs, outputs(_power_mean(_map(_standardised(inputs), count))))
    for name in (STANDARDISED, MAP):
        weights = model.get_layer(name).get_weights()
        repeat = 1 if name == STANDARDISED else count
        made.get_layer(name).set_weights([np.repeat(one, repeat, axis=-1) for one in weights])
    if not is_wide(model):
        kernel, bias = (one.reshape(-1) for one in model.get_layer(PROBABILITY).get_weights())
        made.get_layer(PROBABILITY).set_weights([np.repeat(kernel, count), np.repeat(bias, count)])
    return made


def standardisation(model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the deviation of each channel that a head standardises features by."""
    layer = model.get_layer(STANDARDISED)
    mean, variance = layer.get_weights()
    return mean, np.sqrt(variance + layer.epsilon)


def pool(features: np.ndarray) -> np.ndarray:
    """Return mean, maximum and deviation of features over an image, float32 (n, 3 * channels).

    Args:
        features: (n, height, width, channels).
    """
    return np.asarray(_pool(ops.cast(features, "float32")))


def _turn(x: keras.KerasTensor) -> keras.KerasTensor:
    """Rotate by 180 degrees; one axis at a time, since Keras 3.12 flips no two at once."""
    return ops.flip(ops.flip(x, 1), 2)


def _enlarge(x: keras.KerasTensor) -> keras.KerasTensor:
    _, height, width, _ = x.shape
    factor = SHORTER_SIDE / min(height, width)
    if factor <= 1:
        return x
    return layers.Resizing(round(height * factor), round(width * factor), "bilinear")(x)


def _smooth(x: keras.KerasTensor) -> keras.KerasTensor:
    """Append a binomial filter of 3 x 3; without it a little noise looks like a defect."""
    smoothed = layers.DepthwiseConv2D(3, use_bias=False, trainable=False, name="smoothed")
    channels = x.shape[-1]
    x = smoothed(ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], "reflect"))
    kernel = np.outer([1, 2, 1], [1, 2, 1]).reshape(3, 3, 1, 1) / 16
    smoothed.set_weights([np.repeat(kernel, channels, axis=2)])
    return x


def _pretrained(shape: tuple[int, int, int], count: int) -> keras.Model:
    """Build the stem and the first blocks of EfficientNet-Lite0, frozen.

    Batch normalisation is folded into the convolutions, which is the same function and faster.

    Returns:
        A model that returns features, (n, places, places, channels).
    """
    inputs = keras.Input(shape)
    x = layers.Rescaling(1 / 128, -127 / 128)(inputs)
    x = layers.Conv2D(pretrained.STEM, 3, 2, padding="same", name="stem")(x)
    x = layers.ReLU(6)(x)
    outputs = []
    for number in range(count):
        x = _block(x, number)
        outputs.append(x)
    # The strongest of four places, since a nick is smaller than the coarser grid.
    parts = [layers.MaxPooling2D(2, padding="same")(outputs[FINE])]
    parts += [outputs[number] for number in sorted({COARSE, count - 1})]
    made = keras.Model(inputs, layers.Concatenate()(parts), name="pretrained")
    _load_weights(made)
    made.trainable = False
    return made


def _centre(x: keras.KerasTensor) -> keras.KerasTensor:
    """Move an image right and down by a pixel, so that a place of the map shows what lies there.

    Convolutions of stride 2 pad right and bottom more. A spot is found 2.4 and 1.8 pixels from
    where it is by the last blocks of stride 16, and 0.3 pixels to the other side by that of
    stride 8; after the move by 2 pixels at most (`test_evidence_lies_where_the_spot_is`).
    """
    moved = ops.pad(x, [[0, 0], [1, 0], [1, 0], [0, 0]], "reflect")
    return moved[:, :-1, :-1]


def _load_weights(model: keras.Model) -> None:
    """Set the pretrained weights of the layers by their names."""
    saved = pretrained.weights()
    for layer in model.layers:
        if layer.name in saved:
            kernel, bias = saved[layer.name]
            if layer.input.shape[-1] == 1 and layer.name == "stem":
                kernel = kernel.sum(2, keepdims=True)  # grey replaces red, green and blue
            layer.set_weights([kernel, bias])


def _block(x: keras.KerasTensor, number: int) -> keras.KerasTensor:
    """Append one inverted residual block: expand, convolve each channel, project."""
    side, stride, expansion, filters = pretrained.BLOCKS[number]
    before, name = x, f"block{number}"
    if expansion > 1:
        x = layers.Conv2D(expansion * x.shape[-1], 1, name=f"{name}_expand")(x)
        x = layers.ReLU(6)(x)
    x = layers.DepthwiseConv2D(side, stride, padding="same", name=f"{name}_depthwise")(x)
    x = layers.ReLU(6)(x)
    x = layers.Conv2D(filters, 1, name=f"{name}_project")(x)
    if stride == 1 and before.shape[-1] == filters:
        x = layers.Add(name=f"{name}_add")([before, x])
    return x


def _standardised(x: keras.KerasTensor) -> keras.KerasTensor:
    # Not by batch statistics: the fit must see what serving sees.
    return layers.BatchNormalization(center=False, scale=False, trainable=False, name=STANDARDISED)(
        x
    )


def _map(x: keras.KerasTensor, count: int) -> keras.KerasTensor:
    """Append `count` maps of the evidence of a defect, 0 or more."""
    return layers.Conv2D(
        count,
        1,
        activation="softplus",
        kernel_initializer="zeros",
        bias_initializer=keras.initializers.Constant(-1.0),  # little evidence at the start
        name=MAP,
    )(x)


def _power_mean(x: keras.KerasTensor) -> keras.KerasTensor:
    """Return the power mean of each map."""
    # In float32 softplus can be 0, where a root has no gradient.
    powers = layers.GlobalAveragePooling2D()(ops.power(x + 1e-3, POWER))
    return ops.power(powers, 1 / POWER)


def _pool(x: keras.KerasTensor) -> keras.KerasTensor:
    """Return mean, maximum and deviation over the image."""
    mean = ops.mean(x, (1, 2))
    variance = ops.mean(ops.square(x - ops.expand_dims(mean, (1, 2))), (1, 2))
    return ops.concatenate([mean, ops.max(x, (1, 2)), ops.sqrt(variance + 1e-6)], -1)


def _judge(features: keras.KerasTensor, head: str) -> keras.KerasTensor:
    """Append a head, one of `settings.Head`."""
    standardised = _standardised(features)
    found = _map(standardised, 1)
    evidence = _power_mean(found)
    if head == "wide":
        overall = layers.Dense(1, kernel_initializer="zeros", name=OVERALL)(_pool(features))
        evidence = layers.Concatenate()([evidence, overall])
    elif head == "good":
        distance = _distance(standardised)
        nicks = layers.Dense(1, trainable=False, name=NICKS)(evidence)
        unlike = layers.Dense(1, trainable=False, name=UNLIKE)(ops.max(distance, (1, 2)))
        evidence = layers.Maximum()([nicks, unlike])
    return layers.Dense(1, name=PROBABILITY, **_LOG_ODDS)(evidence)


def _distance(x: keras.KerasTensor) -> keras.KerasTensor:
    """Append the distance of each place from the nearest place of good parts that is kept."""
    whitened = _fixed(COMPONENTS, WHITENED)(x)
    # |a - b|^2 = |a|^2 + (|b|^2 - 2 a b)
    nearest = ops.min(_fixed(KEPT, MEMORY)(whitened), -1, keepdims=True)
    squares = ops.sum(ops.square(whitened), -1, keepdims=True)
    return layers.Identity(name=DISTANCE)(ops.sqrt(ops.maximum(nearest + squares, 0.0)))


def _fixed(count: int, name: str) -> keras.Layer:
    return layers.Conv2D(count, 1, kernel_initializer="zeros", trainable=False, name=name)


def to_litert(model: keras.Model, quantize: str = "none") -> bytes:
    """Convert to a LiteRT model of any batch size: input `images`, outputs probability and map.

    Written out since Keras for Python 3.10 does not export LiteRT; only LiteRT's own operators,
    so that the runtime needs no TensorFlow.

    Args:
        model: as `build` makes it.
        quantize: "none"; or what the weights are kept as, "float16" or "int8". With int8 the
            convolutions also compute in it, with the range that each image's values have: with
            ranges that are fixed beforehand LiteRT 2.3 ends with a segmentation fault.
    """
    outputs = {PROBABILITY: model.output, MAP: _evidence(model)}
    return _convert(keras.Model(model.inputs, outputs), quantize)


def frozen_to_litert(model: keras.Model) -> bytes:
    """Convert the frozen layers: input `images`, output `features`."""
    return _convert(keras.Model(model.inputs, {FEATURES: model.get_layer(FEATURES).output}), "none")


def _convert(model: keras.Model, quantize: str) -> bytes:
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")

    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return model(images, training=False)

    function = tf.function(serve, input_signature=[signature], autograph=False)
    # Keras' ExportArchive would trace each layer once more, in twice the time.
    module = tf.Module()
    module.variables_of_model = [one.value for one in model.variables]
    with tempfile.TemporaryDirectory() as folder, native_output.suppressed():
        tf.saved_model.save(module, folder, signatures=function)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantize != "none":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
        return converter.convert()


def _evidence(model: keras.Model) -> keras.KerasTensor:
    """Return the map that is shown: of the head "good", the larger of its two measures."""
    found = model.get_layer(MAP).output
    if not is_good_only(model):
        return found
    scales = [model.get_layer(name).get_weights() for name in (NICKS, UNLIKE)]
    maps = [found, model.get_layer(DISTANCE).output]
    return ops.maximum(
        *(
            ops.relu(float(kernel[0, 0]) * one + float(bias[0]))
            for (kernel, bias), one in zip(scales, maps, strict=True)
        )
    )


def calibrate(model: keras.Model, calibration: Calibration) -> None:
    """Scale and shift the log-odds of a model."""
    last = model.get_layer(PROBABILITY)
    kernel, bias = last.get_weights()
    scale, shift = calibration.scale, calibration.shift
    last.set_weights([scale * kernel, scale * bias + shift])


def add_overall(
    model: keras.Model, kernel: np.ndarray, bias: float, calibration: Calibration
) -> None:
    """Add to the log-odds of a wide model what is seen in the image as a whole.

    Args:
        model: its log-odds are those of the map so far.
        kernel: (3 * channels,) of the pooled features.
        bias: added to them.
        calibration: how much each counts, and the shift.
    """
    model.get_layer(OVERALL).set_weights([kernel[:, np.newaxis], np.array([bias])])
    calibrate(model, calibration)
    last = model.get_layer(PROBABILITY)
    (of_map, _), last_bias = last.get_weights()
    last.set_weights([np.stack([of_map, [calibration.overall]]), last_bias])


@dataclass(frozen=True)
class Memory:
    """What places of good parts look like.

    Attributes:
        whitening: (channels, COMPONENTS), of standardised features.
        shift: (COMPONENTS,), added to them.
        places: (KEPT, COMPONENTS), those that are kept.
    """

    whitening: np.ndarray
    shift: np.ndarray
    places: np.ndarray

    def distances(self, standardised: np.ndarray) -> np.ndarray:
        """Return the distance of each place from the nearest that is kept.

        Args:
            standardised: features (n, height, width, channels).

        Returns:
            float32 (n, height, width).
        """
        squares = (self.places**2).sum(1)
        found = []
        for one in standardised:
            places = one @ self.whitening + self.shift
            nearest = (squares - 2 * places @ self.places.T).min(-1)
            found.append(np.sqrt(np.maximum(nearest + (places**2).sum(-1), 0)))
        return np.stack(found)


def limit(model: keras.Model) -> float:
    """Return the measure of the head "good" at which the probability is 0.5."""
    _, bias = model.get_layer(PROBABILITY).get_weights()
    return -float(bias[0])


def put_good(
    model: keras.Model,
    nicks: keras.Model,
    memory: Memory,
    measures: tuple[tuple[float, float], tuple[float, float]],
    limit: float,
) -> None:
    """Set the weights of the head "good".

    Args:
        model: has the head.
        nicks: a model with the head "map", which finds drawn blemishes.
        memory: of good places.
        measures: scale and shift of the log-odds of `nicks`, and of the largest distance.
        limit: the measure at which the probability is 0.5.
    """
    for name in (STANDARDISED, MAP):
        model.get_layer(name).set_weights(nicks.get_layer(name).get_weights())
    model.get_layer(WHITENED).set_weights([memory.whitening[np.newaxis, np.newaxis], memory.shift])
    kernel = -2 * memory.places.T[np.newaxis, np.newaxis]
    model.get_layer(MEMORY).set_weights([kernel, (memory.places**2).sum(1)])
    (of_nicks, nicks_shift), (of_distance, distance_shift) = measures
    kernel, bias = nicks.get_layer(PROBABILITY).get_weights()
    model.get_layer(NICKS).set_weights([of_nicks * kernel, of_nicks * bias + nicks_shift])
    model.get_layer(UNLIKE).set_weights([np.array([[of_distance]]), np.array([distance_shift])])
    model.get_layer(PROBABILITY).set_weights([np.array([[1.0]]), np.array([-limit])])
