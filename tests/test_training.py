"""The CNN and its fit."""

import math
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from conftest import draw_part
from defect_detection import PipelineError, metrics, model, settings, training
from defect_detection.augmentation import SOME
from defect_detection.classifier import Classifier
from defect_detection.settings import HyperParameters, Schedule

CONFIG = settings.read_yaml(settings.CONFIG_FILE, settings.Config)
SIZE = (32, 32)
HYPER = HyperParameters("small", [8, 12, 16], 0.1, 0.02, 0.0001, 8)
SCHEDULE = Schedule(
    learning_rate=0.02,
    weight_decay=0.0001,
    batch_size=8,
    epochs=6,
    epoch_pictures=120,
    patience=6,
    seed=3,
)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3 == 0
    drawn = [np.asarray(draw_part(rng, defect, side=32)) for defect in labels]
    return np.stack(drawn)[..., np.newaxis], labels.astype(np.uint8)


def fit(pictures, epochs: int = 6, **options) -> training.TrainingResult:
    training.make_deterministic(3)
    images, labels = pictures
    return training.fit(
        model.build(SIZE, HYPER),
        images,
        labels,
        np.arange(60),
        np.arange(40),
        np.arange(40, 60),
        replace(SCHEDULE, epochs=epochs),
        verbose=0,
        **options,
    )


def test_same_seed_gives_the_same_history_and_weights(pictures):
    first, second = fit(pictures), fit(pictures)
    assert first.history == second.history
    for one, other in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_best_epoch_is_what_remains(pictures):
    images, labels = pictures
    result = fit(pictures)
    accuracies, losses = result.history["val_accuracy"], result.history["val_loss"]
    best = int(np.argmin(losses))
    assert result.best_epoch == best + 1
    assert result.best["val_accuracy"] == accuracies[best]
    _, accuracy = result.model.evaluate(images[40:].astype("f"), labels[40:], verbose=0)
    assert accuracy == pytest.approx(result.best["val_accuracy"], abs=1e-6)
    model.rescale(result.model, result.temperature)
    loss, _ = result.model.evaluate(images[40:].astype("f"), labels[40:], verbose=0)
    assert loss == pytest.approx(losses[best], abs=1e-4)


def test_later_epochs_do_not_spoil_the_best_one(pictures):
    images, labels = pictures
    fitted = model.build(SIZE, HYPER)

    def spoil_after_the_fourth(epoch: int, metrics: dict[str, float]) -> None:
        if epoch >= 4:
            fitted.set_weights([np.zeros_like(weight) for weight in fitted.get_weights()])

    training.make_deterministic(3)
    rows = np.arange(40), np.arange(40, 60)
    result = training.fit(
        fitted,
        images,
        labels,
        np.arange(60),
        *rows,
        SCHEDULE,
        on_epoch=spoil_after_the_fourth,
        verbose=0,
    )
    assert result.best_epoch <= 4
    _, accuracy = fitted.evaluate(images[40:].astype("f"), labels[40:], verbose=0)
    assert accuracy == pytest.approx(result.best["val_accuracy"], abs=1e-6)
    assert any(weight.any() for weight in fitted.get_weights())


class _Steps(keras.Model):
    """Stands in for a model: its only weight counts the epochs that have been seen."""

    def __init__(self):
        super().__init__()
        self.stop_training = False
        self.counter = self.add_weight(name="epoch", initializer="zeros")


def test_the_lowest_validation_loss_is_the_best_epoch_whatever_the_accuracy():
    callback = training._BestEpoch(patience=2, on_epoch=lambda *_: None)
    callback.set_model(_Steps())
    stopped_at = None
    epochs = [(0.5, 0.9), (1.0, 0.5), (0.9, 0.3), (1.0, math.nan), (1.0, 0.4), (1.0, 0.1)]
    for epoch, (accuracy, loss) in enumerate(epochs):
        callback.model.counter.assign(epoch + 1)
        callback.on_epoch_end(epoch, {"val_accuracy": accuracy, "val_loss": loss})
        if callback.model.stop_training:
            stopped_at = epoch + 1
            break
    assert callback.epoch == 3
    assert callback.weights == [3.0]
    assert stopped_at == 5


def test_each_epoch_is_reported_with_its_metrics(pictures):
    seen = []
    fit(pictures, epochs=2, on_epoch=lambda epoch, values: seen.append((epoch, sorted(values))))
    names = ["accuracy", "loss", "val_accuracy", "val_loss"]
    assert seen == [(1, names), (2, names)]


def test_each_class_and_each_photograph_is_drawn_as_often():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    photographs = np.array([5, 5, 5, 8, 5, 9, 9])  # photograph 5 has pictures of both labels
    chances = training.sampling_weights(labels, photographs)
    expected = [1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    np.testing.assert_allclose(chances, expected, rtol=1e-12)
    fewer = training.sampling_weights(labels, photographs, defects=0.2)
    assert fewer[:4].sum() == pytest.approx(0.2) and fewer.sum() == pytest.approx(1)


def test_pictures_are_drawn_by_their_chances():
    images = np.zeros((60, *SIZE, 1), np.uint8)
    images[13], images[17], images[40] = 20, 90, 220
    labels = np.arange(60) % 2
    chances = np.zeros(40)
    chances[[3, 7, 30]] = 0.5, 0.25, 0.25
    batches = training._draws(
        training._shared(images), labels, np.arange(10, 50), chances, SCHEDULE
    )
    seen, targets = zip(*batches.take(200), strict=True)
    # Light hardly ever changes a grey level as far as the next.
    drawn = np.digitize(np.concatenate(seen)[:, 16, 16, 0], (5, 43, 146))
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0, 0.5, 0.25, 0.25], atol=0.05)
    learned = np.concatenate(targets)
    assert learned[(drawn == 1) | (drawn == 2)].mean() > 0.98  # rows 13 and 17 are defects
    assert learned[drawn == 3].mean() == pytest.approx(1 / SOME, abs=0.07)


def test_memory_map_is_learned_from_without_a_copy(tmp_path):
    count, side = 16000, 128
    with (tmp_path / "pixels").open("wb") as file:
        file.truncate(count * side * side)
    images = np.memmap(tmp_path / "pixels", np.uint8, "c", shape=(count, side, side, 1))
    images[1234] = 7  # in the map only: a copy made of the file would not have it
    shared = training._shared(images)
    assert shared.dtype == "uint8" and shared[1234].numpy().max() == 7
    labels = np.arange(count) % 2
    before = _anonymous_megabytes()
    batches = training._draws(shared, labels, np.arange(count), np.full(count, 1 / count), SCHEDULE)
    for _ in batches.take(20):
        pass
    assert _anonymous_megabytes() - before < count * side * side / 2**20 / 2


def _anonymous_megabytes() -> float:
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells a process's anonymous memory")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def test_probabilities_are_calibrated_by_the_pictures_held_back(pictures):
    images, labels = pictures
    result = fit(pictures)
    held_back = slice(40, 60)
    found = result.model.predict(images[held_back].astype("f"), verbose=0)[:, 0]
    weights = training.sampling_weights(labels[held_back], np.arange(20))
    limits = metrics.TEMPERATURES
    if limits[0] * 1.01 < result.temperature < limits[1] * 0.99:
        again = metrics.temperature(labels[held_back], found, weights)
        assert again == pytest.approx(1, abs=0.01)  # nothing is left to gain
    assert limits[0] <= result.temperature <= limits[1]


def test_fit_that_diverges_is_refused_with_the_learning_rate(pictures):
    images, labels = pictures
    rows = np.arange(40), np.arange(40, 60)
    with pytest.raises(PipelineError, match=r"diverged.*learning_rate, which is 0.02"):
        training.fit(_broken_model(), images, labels, np.arange(60), *rows, SCHEDULE)


def _broken_model() -> keras.Model:
    inputs = keras.Input((*SIZE, 1))
    flat = keras.layers.Flatten()(inputs)
    outputs = keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(np.nan))(flat)
    return keras.Model(inputs, outputs)


def test_litert_gives_what_keras_gives_for_any_batch(pictures):
    images, _ = pictures
    fitted = fit(pictures, epochs=2).model
    served = Classifier(model.to_litert(fitted), SIZE)
    expected = fitted.predict(images.astype("f"), verbose=0)[:, 0]
    np.testing.assert_allclose(served.probabilities(images), expected, atol=1e-5)
    for count in (1, 7, 60):
        np.testing.assert_allclose(
            served.probabilities(images[:count]), expected[:count], atol=1e-5
        )
    assert served.probabilities(images[:0]).shape == (0,)


def test_saved_model_loads_without_custom_code(pictures, tmp_path):
    images, _ = pictures
    built = model.build(SIZE, HYPER)
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    batch = images[:4].astype("f")
    np.testing.assert_allclose(
        loaded.predict(batch, verbose=0), built.predict(batch, verbose=0), atol=1e-6
    )


@pytest.mark.parametrize("size", [(60, 64), (64, 36)])
def test_image_size_that_does_not_fit_the_layers_is_refused(size):
    with pytest.raises(PipelineError, match="both must be multiples of 32"):
        model.build(size, HYPER)


def test_map_is_the_evidence_that_the_probability_is_made_of(pictures):
    images, _ = pictures
    fitted = fit(pictures, epochs=2).model
    probabilities, maps = Classifier(model.to_litert(fitted), SIZE).examine(images)
    assert maps.shape == (60, 8, 8) and maps.min() >= 0
    kernel, bias = fitted.get_layer(model.PROBABILITY).get_weights()
    evidence = ((maps + 1e-3) ** model.POWER).mean((1, 2)) ** (1 / model.POWER)
    log_odds = evidence * kernel[0, 0] + bias[0]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-log_odds)), atol=1e-5)


@pytest.mark.parametrize("filters", [s.filters for s in CONFIG.model_parameters.sets])
def test_configured_models_are_small(filters):
    assert model.build((128, 128), replace(HYPER, filters=filters)).count_params() < 100_000
