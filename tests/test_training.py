"""The CNN and its fit."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from conftest import draw_part
from defect_detection import PipelineError, model, training
from defect_detection.classifier import Classifier
from defect_detection.settings import HyperParameters, Schedule

SIZE = (32, 32)
HYPER = HyperParameters("small", [8, 12], 0.1, 0.01, 8)
SCHEDULE = Schedule(learning_rate=0.01, batch_size=8, epochs=6, patience=6, seed=3)


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
    best = max(range(6), key=lambda epoch: (accuracies[epoch], -losses[epoch]))
    assert result.best_epoch == best + 1
    assert result.best["val_accuracy"] == accuracies[best]
    loss, accuracy = result.model.evaluate(images[40:].astype("f"), labels[40:], verbose=0)
    assert accuracy == pytest.approx(result.best["val_accuracy"], abs=1e-6)
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
        fitted, images, labels, *rows, SCHEDULE, on_epoch=spoil_after_the_fourth, verbose=0
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


def test_of_equal_accuracies_the_lowest_loss_is_the_best_epoch():
    callback = training._BestEpoch(patience=2, on_epoch=lambda *_: None)
    callback.set_model(_Steps())
    stopped_at = None
    epochs = [(0.5, 0.9), (0.9, 0.5), (0.9, 0.3), (0.9, 0.4), (0.8, 0.1), (1.0, 0.1)]
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


def test_class_weights_make_both_classes_count_the_same():
    labels = np.array([1] * 30 + [0] * 10)
    weights = training.class_weights(labels)
    assert weights[1] * 30 == pytest.approx(weights[0] * 10)


def test_class_weights_reach_the_fit(pictures, monkeypatch):
    monkeypatch.setattr(training, "class_weights", lambda labels: {0: 1.0, 1: 0.0})
    images, labels = pictures
    found = fit(pictures, epochs=8).model.predict(images[labels == 1].astype("f"), verbose=0)
    assert (found < 0.5).all()  # with no weight, defects are not learned


def test_fit_that_diverges_is_refused_with_the_learning_rate(pictures):
    images, labels = pictures
    with pytest.raises(PipelineError, match=r"diverged.*learning_rate, which is 0.01"):
        training.fit(_broken_model(), images, labels, np.arange(40), np.arange(40, 60), SCHEDULE)


def _broken_model() -> keras.Model:
    inputs = keras.Input((*SIZE, 1))
    flat = keras.layers.Flatten()(inputs)
    outputs = keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(np.nan))(flat)
    return keras.Model(inputs, outputs)


def test_litert_gives_what_keras_gives_for_any_batch(pictures):
    images, _ = pictures
    fitted = fit(pictures, epochs=2).model
    served = Classifier(model.to_litert(fitted), SIZE, threshold=0.5)
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


@pytest.mark.parametrize("size", [(16, 16), (60, 60), (64, 36)])
def test_image_size_that_does_not_fit_the_layers_is_refused(size):
    hyper = HyperParameters("deep", [8, 8, 8, 8, 8], 0.1, 0.01, 8)
    with pytest.raises(PipelineError, match="multiples of 8, at least 64"):
        model.build(size, hyper)
