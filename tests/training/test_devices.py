"""Which device a model is fitted on."""

import logging

import numpy as np
import pytest

from conftest import draw_part, former_cnn
from defect_detection import PipelineError
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.training import devices
from defect_detection.training.network import tf

TAKES = ImageFormat(32, 32)
LABELS = np.arange(16) % 2


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([np.asarray(draw_part(rng, d == 1, 32)) for d in LABELS])[..., np.newaxis]


def wrong_by(factor: float):
    """Stand in for a GPU that computes the gradient of one layer wrongly."""

    def run(built, images, labels, device):
        computed = devices.forward_and_backward(built, images, labels, devices.CPU)
        if device != devices.CPU:
            with np.errstate(invalid="ignore"):  # a gradient of 0 times infinity
                computed[1] = computed[1] * factor
        return computed

    return run


def test_device_that_computes_as_the_cpu_does_is_taken(images):
    built = former_cnn(TAKES.shape)
    device = devices.checked(built, images, LABELS, "GPU:0", wrong_by(1.0001))
    assert device.name == "GPU:0"


@pytest.mark.parametrize("factor", [1.05, -1.0, 0.0, np.nan, np.inf])
def test_device_that_computes_wrongly_is_not_taken(images, factor):
    built = former_cnn(TAKES.shape)
    device = devices.checked(built, images, LABELS, "GPU:0", wrong_by(factor))
    assert device.name == devices.CPU
    assert "GPU:0 computes wrongly: it differs from the CPU by" in device.why


def test_device_that_cannot_run_the_model_is_not_taken(images):
    def run(built, images, labels, device):
        if device != devices.CPU:
            raise tf.errors.InvalidArgumentError(None, None, "no such operation")
        return devices.forward_and_backward(built, images, labels, device)

    device = devices.checked(former_cnn(TAKES.shape), images, LABELS, "GPU:0", run)
    assert device == devices.Device(
        devices.CPU, "GPU:0 cannot run this model (InvalidArgumentError)"
    )


def test_trying_a_model_leaves_it_as_it_was_and_dropout_out(images):
    built = former_cnn(TAKES.shape)
    before = [weight.copy() for weight in built.get_weights()]
    first, second = (
        devices.forward_and_backward(built, images, LABELS, devices.CPU) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(first) == 1 + len(built.trainable_variables)
    assert all(np.abs(gradient).max() > 0 for gradient in first[1:])
    for one, other in zip(before, built.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [layer.rate for layer in built.layers if "dropout" in layer.name] == [0.1]


def test_wrong_gpu_is_told_and_the_cpu_used(images, monkeypatch, caplog):
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [gpu])
    monkeypatch.setattr(devices, "forward_and_backward", _wrong)
    with devices.chosen("auto", lambda: former_cnn(TAKES.shape), images, LABELS) as device:
        assert "CPU:0" in tf.constant(1.0).device
    assert device.name == devices.CPU
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Fitting on CPU:0: GPU:0 computes wrongly" in caplog.text


_right = devices.forward_and_backward


def _wrong(built, images, labels, device):
    computed = _right(built, images, labels, devices.CPU)
    return computed if device == devices.CPU else [2 * one for one in computed]


@pytest.mark.parametrize(
    ("requested", "why"), [("cpu", "DEVICE is cpu"), ("auto", "there is no GPU")]
)
def test_without_a_gpu_the_cpu_is_used(images, monkeypatch, requested, why):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    with devices.chosen(requested, pytest.fail, images, LABELS) as device:
        assert device == devices.Device(devices.CPU, why)


def test_gpu_that_is_asked_for_and_not_there_is_an_error(images, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    with (
        pytest.raises(PipelineError, match="DEVICE is gpu, and TensorFlow finds none"),
        devices.chosen("gpu", pytest.fail, images, LABELS),
    ):
        pass
