"""Which device a model is fitted on: a GPU only if it computes what the CPU computes.

tensorflow-metal sometimes trains worse than the CPU without any error, so the model is tried on
both before it is fitted.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from defect_detection import PipelineError
from defect_detection.training.network import keras, tf

log = logging.getLogger(__name__)

CPU = "CPU:0"
TRIED = 16  # images
TOLERANCE = 0.01  # of a gradient's length; with TF32 on NVIDIA GPUs it is below 0.003

Pass = Callable[[keras.Model, np.ndarray, np.ndarray, str], list[np.ndarray]]


@dataclass(frozen=True)
class Device:
    """A device by TensorFlow's name, and why it was chosen."""

    name: str
    why: str

    def tags(self) -> dict[str, str]:
        """Return the tags of a run."""
        return {"device": self.name, "device_why": self.why}


@contextmanager
def chosen(
    requested: str,
    make_model: Callable[[], keras.Model],
    images: np.ndarray,
    labels: np.ndarray,
) -> Iterator[Device]:
    """Choose a device for a fit; models that are made in the block are made there.

    Args:
        requested: "cpu"; "auto", a GPU if there is one that computes rightly; or "gpu", the same,
            but there must be a GPU.
        make_model: makes a model to try.
        images: uint8 (n, height, width, channels); a few are tried.
        labels: (n,), 1 = defect.

    Raises:
        PipelineError: "gpu" was asked for and there is none.
    """
    found = tf.config.list_logical_devices("GPU") if requested != "cpu" else []
    if found:
        rows = np.linspace(0, len(labels) - 1, TRIED).astype(int)  # of both classes
        name = found[0].name.removeprefix("/device:")
        device = checked(make_model(), images[rows], labels[rows], name, forward_and_backward)
        level = logging.INFO if device.name == name else logging.WARNING
        log.log(level, "Fitting on %s: %s", device.name, device.why)
    elif requested == "gpu":
        raise PipelineError("DEVICE is gpu, and TensorFlow finds none. Set DEVICE to auto or cpu")
    else:
        device = Device(CPU, "DEVICE is cpu" if requested == "cpu" else "there is no GPU")
    with tf.device(device.name):
        yield device


def checked(
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    run: Pass,
) -> Device:
    """Return the device `name` if it computes what the CPU computes, else the CPU.

    It compares the probabilities and gradients of one forward and backward pass, each by the
    length of their difference. `run` makes that pass.
    """
    try:
        expected, computed = (run(model, images, labels, each) for each in (CPU, name))
    except tf.errors.OpError as error:
        return Device(CPU, f"{name} cannot run this model ({type(error).__name__})")
    difference = _largest_difference(expected, computed)
    if difference <= TOLERANCE:  # false for NaN
        return Device(name, f"it differs from the CPU by {difference:.2g} at most")
    return Device(CPU, f"{name} computes wrongly: it differs from the CPU by {difference:.2g}")


def forward_and_backward(
    model: keras.Model, images: np.ndarray, labels: np.ndarray, device: str
) -> list[np.ndarray]:
    """Return the probabilities and the gradients of all weights without changing the model."""
    weights = model.get_weights()
    dropouts = [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    rates = [layer.rate for layer in dropouts]
    try:
        for layer in dropouts:
            layer.rate = 0.0  # devices draw different numbers
        with tf.device(device), tf.GradientTape() as tape:
            probabilities = model(tf.cast(images, tf.float32), training=True)
            targets = tf.cast(tf.reshape(labels, (-1, 1)), tf.float32)
            loss = keras.losses.BinaryCrossentropy()(targets, probabilities)
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        return [probabilities.numpy(), *(gradient.numpy() for gradient in gradients)]
    finally:
        for layer, rate in zip(dropouts, rates, strict=True):
            layer.rate = rate
        model.set_weights(weights)


def _largest_difference(expected: list[np.ndarray], computed: list[np.ndarray]) -> float:
    """Return the largest difference as a share of the expected length.

    Weights whose gradient all but vanishes are compared by a thousandth of the longest.
    """
    lengths = [float(np.linalg.norm(one)) for one in expected]
    floor = max(lengths) * 1e-3
    return max(
        float(np.linalg.norm(one - other)) / max(length, floor)
        if np.isfinite(other).all()
        else float("inf")
        for one, other, length in zip(expected, computed, lengths, strict=True)
    )
