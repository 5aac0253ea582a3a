"""Fits a model; the best epoch is what remains."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.utils.class_weight import compute_class_weight

from defect_detection import PipelineError
from defect_detection.model import keras, tf
from defect_detection.settings import Schedule

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """A fitted model with the weights of its best epoch.

    Attributes:
        model: the model, compiled.
        best_epoch: counted from 1; highest validation accuracy, at a tie lowest validation loss.
        history: per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`.
        seconds: wall time of the fit.
    """

    model: keras.Model
    best_epoch: int
    history: dict[str, list[float]]
    seconds: float

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch, by their names in `history`."""
        return {name: values[self.best_epoch - 1] for name, values in self.history.items()}


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow, and let the same seed give the same bits."""
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def fit(
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray,
    training: np.ndarray,
    validation: np.ndarray,
    schedule: Schedule,
    on_epoch: Report = lambda epoch, metrics: None,
    verbose: int = 2,
) -> TrainingResult:
    """Fit a model with Adam and binary cross-entropy, stopping early.

    Args:
        model: takes (n, height, width, 1) floats in [0, 255]; its weights are changed.
        images: uint8 (n, height, width, 1).
        labels: uint8 (n,), 1 = defect.
        training: indices to learn from.
        validation: indices to choose the best epoch by.
        schedule: learning rate, batch size, epochs; its seed decides the order of the pictures.
        on_epoch: is called after each epoch with its number, from 1, and its metrics.
        verbose: Keras's: 0 silent, 1 bar, 2 one line an epoch.

    Raises:
        PipelineError: the loss was never a number.
    """
    steps = schedule.epochs * math.ceil(len(training) / schedule.batch_size)
    falling = keras.optimizers.schedules.CosineDecay(schedule.learning_rate, steps)
    model.compile(keras.optimizers.Adam(falling), "binary_crossentropy", metrics=["accuracy"])
    best = _BestEpoch(schedule.patience, on_epoch)
    started = time.perf_counter()
    fitted = model.fit(
        _batches(images[training], labels[training], schedule.batch_size, schedule.seed),
        validation_data=_batches(images[validation], labels[validation], schedule.batch_size),
        epochs=schedule.epochs,
        class_weight=class_weights(labels[training]),
        callbacks=[best],
        verbose=verbose,
        shuffle=False,  # _batches does
    )
    if best.epoch is None:
        raise PipelineError(
            f"The fit diverged: its validation loss is not a number. Lower the learning_rate, "
            f"which is {schedule.learning_rate}"
        )
    model.set_weights(best.weights)
    history = {name: [float(v) for v in values] for name, values in fitted.history.items()}
    return TrainingResult(model, best.epoch, history, time.perf_counter() - started)


def class_weights(labels: np.ndarray) -> dict[int, float]:
    """Weigh classes so that each counts the same: n / (2 * n of the class)."""
    weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    return {0: float(weights[0]), 1: float(weights[1])}


def _batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int | None = None
) -> tf.data.Dataset:
    """Make batches of floats; in a new order each epoch if there is a seed."""
    pixels, targets = tf.constant(images), tf.constant(labels, tf.float32)
    indices = tf.data.Dataset.range(len(labels))
    if seed is not None:
        indices = indices.shuffle(len(labels), seed=seed)
    return (
        indices.batch(batch_size)
        .map(lambda i: (tf.cast(tf.gather(pixels, i), tf.float32), tf.gather(targets, i)))
        .prefetch(tf.data.AUTOTUNE)
    )


class _BestEpoch(keras.callbacks.Callback):
    """Keeps the weights of the best epoch and ends the fit when none follows.

    Keras's EarlyStopping takes the first of several epochs with the same accuracy; the one with
    the lowest loss among them is the better.
    """

    def __init__(self, patience: int, on_epoch: Report):
        super().__init__()
        self.patience = patience
        self.on_epoch = on_epoch
        self.epoch: int | None = None
        self.score = (-math.inf, -math.inf)
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        score = (logs["val_accuracy"], -logs["val_loss"])
        if math.isfinite(logs["val_loss"]) and score > self.score:
            self.epoch, self.score, self.weights = epoch + 1, score, self.model.get_weights()
        if epoch + 1 - (self.epoch or 0) >= self.patience:
            self.model.stop_training = True
        self.on_epoch(epoch + 1, {name: float(value) for name, value in logs.items()})
