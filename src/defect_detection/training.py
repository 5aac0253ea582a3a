"""Fits a model; the best epoch is what remains."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from defect_detection import PipelineError, metrics
from defect_detection.augmentation import GOOD, Augmentation
from defect_detection.model import keras, rescale, tf
from defect_detection.settings import Schedule

BATCH = 64  # of the pictures to validate on

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """A fitted model with the weights of its best epoch.

    Attributes:
        model: the model, compiled.
        best_epoch: counted from 1; lowest validation loss.
        history: per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`.
        temperature: what the log-odds were divided by, so that they fit the held-back pictures.
        seconds: wall time of the fit.
    """

    model: keras.Model
    best_epoch: int
    history: dict[str, list[float]]
    temperature: float
    seconds: float

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch, by their names in `history`."""
        return {name: values[self.best_epoch - 1] for name, values in self.history.items()}


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow: on a CPU the same seed then gives the same bits.

    `enable_op_determinism` would add nothing there, and lets tf.data copy all pictures.
    """
    keras.utils.set_random_seed(seed)


def fit(
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray,
    photographs: np.ndarray,
    training: np.ndarray,
    validation: np.ndarray,
    schedule: Schedule,
    on_epoch: Report = lambda epoch, metrics: None,
    verbose: int = 2,
) -> TrainingResult:
    """Fit a model with AdamW and binary cross-entropy, stopping early, then calibrate it.

    An epoch draws as many pictures as there are to learn from, or as the schedule asks for at the
    least, with replacement: each photograph of a class as often as the others, however many
    pictures there are of it; each time a new variant (`augmentation`). Of what is learned, half
    are defects.

    Args:
        model: takes (n, height, width, 1) floats in [0, 255]; its weights are changed.
        images: uint8 (n, height, width, 1); a memory map is read as it is needed.
        labels: uint8 (n,), 1 = defect.
        photographs: (n,) number of the photograph that each picture was made from.
        training: indices to learn from.
        validation: indices to choose the best epoch and the temperature by.
        schedule: learning rate, batch size, epochs; its seed decides what is drawn.
        on_epoch: is called after each epoch with its number, from 1, and its metrics.
        verbose: Keras's: 0 silent, 1 bar, 2 one line an epoch.

    Raises:
        PipelineError: the loss was never a number.
    """
    pixels = _shared(images)
    drawn = max(len(training), schedule.epoch_pictures)
    steps = math.ceil(drawn / schedule.batch_size)
    chances = sampling_weights(labels[training], photographs[training], 1 - GOOD)
    batches = _draws(pixels, labels, training, chances, schedule)
    held_back = _in_turn(pixels, labels, validation)
    total = schedule.epochs * steps
    rate = keras.optimizers.schedules.CosineDecay(
        schedule.learning_rate / 10,
        total - total // 20,
        warmup_target=schedule.learning_rate,
        warmup_steps=total // 20,
    )
    model.compile(
        # Unclipped, some fits found nothing (docs/model-notes.md).
        keras.optimizers.AdamW(rate, weight_decay=schedule.weight_decay, global_clipnorm=1.0),
        "binary_crossentropy",
        metrics=["accuracy"],
    )
    best = _BestEpoch(schedule.patience, on_epoch)
    started = time.perf_counter()
    fitted = model.fit(
        batches,
        steps_per_epoch=steps,
        validation_data=held_back,
        epochs=schedule.epochs,
        callbacks=[best],
        verbose=verbose,
        shuffle=False,  # what is drawn is in no order
    )
    if best.epoch is None:
        raise PipelineError(
            f"The fit diverged: its validation loss is not a number. Lower the learning_rate, "
            f"which is {schedule.learning_rate}"
        )
    model.set_weights(best.weights)
    found = np.concatenate([model.predict_on_batch(batch)[:, 0] for batch, _ in held_back])
    weights = sampling_weights(labels[validation], photographs[validation])
    temperature = metrics.temperature(labels[validation], found, weights)
    rescale(model, 1 / temperature)
    history = {name: [float(v) for v in values] for name, values in fitted.history.items()}
    return TrainingResult(model, best.epoch, history, temperature, time.perf_counter() - started)


def sampling_weights(
    labels: np.ndarray, photographs: np.ndarray, defects: float = 0.5
) -> np.ndarray:
    """Return chances (n,) that sum to 1, the same for each photograph of a class.

    `defects` is the share of the defects together.
    """
    _, of, pictures = np.unique(
        np.stack([labels, photographs]), axis=1, return_inverse=True, return_counts=True
    )
    each = 1 / pictures[of.reshape(-1)]
    for label, share in ((0, 1 - defects), (1, defects)):
        each[labels == label] *= share / each[labels == label].sum()
    return each


def _shared(images: np.ndarray) -> tf.Tensor:
    """Make a tensor of pictures; of a memory map without a copy, so that memory stays flat."""
    if isinstance(images, np.memmap):
        return tf.experimental.dlpack.from_dlpack(np.asarray(images).__dlpack__())
    return tf.constant(images)


def _draws(
    pixels: tf.Tensor,
    labels: np.ndarray,
    rows: np.ndarray,
    chances: np.ndarray,
    schedule: Schedule,
) -> tf.data.Dataset:
    """Draw batches of variants without end; the same seed draws the same."""
    augment = Augmentation(pixels.shape[1:3])
    targets, indices = tf.constant(labels, tf.float32), tf.constant(rows)
    upper = tf.constant(np.cumsum(chances)[:-1])

    def draw(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = tf.stack([tf.constant(schedule.seed, tf.int64), number])
        chance = tf.random.stateless_uniform((schedule.batch_size,), seed, dtype=tf.float64)
        drawn = tf.gather(indices, tf.searchsorted(upper, chance, side="right"))
        return augment(_floats(pixels, drawn), tf.gather(targets, drawn), seed)

    return _options(tf.data.Dataset.counter().map(draw).prefetch(2))


def _in_turn(pixels: tf.Tensor, labels: np.ndarray, rows: np.ndarray) -> tf.data.Dataset:
    """Make batches of pictures as they are, in their order."""
    targets = tf.constant(labels, tf.float32)
    batches = tf.data.Dataset.from_tensor_slices(rows).batch(BATCH)
    return _options(batches.map(lambda i: (_floats(pixels, i), tf.gather(targets, i))).prefetch(2))


def _floats(pixels: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.gather(pixels, rows), tf.float32)


def _options(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Take tf.data's default optimisations away: they copy all pictures into the graph."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return batches.with_options(options)


class _BestEpoch(keras.callbacks.Callback):
    """Keeps the weights of the epoch with the lowest validation loss; ends the fit if none follows.

    Not with the highest accuracy: the few photographs held back are soon all judged rightly, long
    before the model is sure of it (docs/model-notes.md).
    """

    def __init__(self, patience: int, on_epoch: Report):
        super().__init__()
        self.patience = patience
        self.on_epoch = on_epoch
        self.epoch: int | None = None
        self.loss = math.inf
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if logs["val_loss"] < self.loss:
            self.epoch, self.loss = epoch + 1, logs["val_loss"]
            self.weights = self.model.get_weights()
        if epoch + 1 - (self.epoch or 0) >= self.patience:
            self.model.stop_training = True
        self.on_epoch(epoch + 1, {name: float(value) for name, value in logs.items()})
