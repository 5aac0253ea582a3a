"""The CNN and its fits."""

import math
from dataclasses import replace

import keras
import numpy as np
import pytest
from scipy.special import logit

from conftest import draw_part, drawn_dataset, former_cnn, long, small_cnn
from defect_detection import PipelineError, settings
from defect_detection.dataset.split import Dataset
from defect_detection.runtime.classifier import MAP, PROBABILITY, Classifier
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import FitParameters, HyperParameters, Sampling
from defect_detection.training import calibration, features, fitting, network
from defect_detection.training.features import Features

CONFIG = settings.read_yaml(settings.CONFIG_FILE, settings.Config)
TAKES = ImageFormat(32, 32)
HYPER = HyperParameters("small", 8, 1, "map", 0.02, 0.01, 16, 5)
PARAMETERS = FitParameters(
    learning_rate=0.02,
    weight_decay=0.01,
    batch_size=16,
    epochs=5,
    validation_share=0.25,
    seed=3,
)
# What is fitted: a map, a map and the image as a whole, all of a former model.
KINDS = ("map", "wide", "former")
EACH = ["map", *(long(kind) for kind in KINDS[1:])]


def build(kind: str) -> keras.Model:
    keras.utils.set_random_seed(3)
    if kind == "former":
        return former_cnn(TAKES.shape)
    return network.build(TAKES.shape, replace(HYPER, head=kind))


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 3 == 0).astype(np.uint8)
    drawn = [np.asarray(draw_part(rng, defect == 1, side=32)) for defect in labels]
    return drawn_dataset(np.stack(drawn), labels, np.arange(60) // 2)


@pytest.fixture(scope="module")
def computed(pictures, tmp_path_factory) -> dict[str, Features]:
    cache = tmp_path_factory.mktemp("features")
    sampling = Sampling(160, 3, cache)
    return {kind: features.compute(build(kind), pictures, sampling) for kind in KINDS}


def fit(computed, kind: str = "map", epochs: int = 5, **options) -> fitting.TrainingResult:
    parameters = replace(PARAMETERS, epochs=epochs)
    return fitting.fit(build(kind), computed[kind], parameters, **options)


@pytest.mark.parametrize("kind", EACH)
def test_same_seed_gives_the_same_history_and_weights(computed, kind):
    first, second = fit(computed, kind, 2), fit(computed, kind, 2)
    assert first.history == second.history
    for one, other in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("kind", "epochs"), [("map", 20), long("wide", 20)])
def test_defects_are_told_from_good_parts(computed, pictures, kind, epochs):
    result = fit(computed, kind, epochs)
    assert result.fits == 4
    assert result.best["val_accuracy"] > 0.8
    found = result.model.predict(pictures.images.astype("f"), verbose=0)[:, 0]
    assert ((found > 0.5) == (pictures.labels == 1)).mean() > 0.85


def test_all_of_a_former_model_is_fitted(computed):
    before, result = build("former"), fit(computed, "former", 20)
    assert result.history["loss"][-1] < result.history["loss"][0]
    trainable = zip(before.trainable_weights, result.model.trainable_weights, strict=True)
    assert all(np.abs(one.numpy() - other.numpy()).max() > 1e-4 for one, other in trainable)


@pytest.mark.parametrize("kind", EACH)
def test_each_picture_is_judged_by_a_fit_that_saw_nothing_of_its_photograph(
    computed, kind, monkeypatch
):
    """Of a part whose labels are wrong, the others learn nothing, nor does its own fit unlearn."""
    told = computed[kind]
    wrong = np.isin(told.photographs, [0, 1, 2])
    lied = replace(told, labels=np.where(wrong, 1 - told.labels, told.labels))
    parameters = replace(PARAMETERS, epochs=1, validation_share=0.5)
    parts = [np.flatnonzero(np.isin(told.photographs[~told.varied], range(0, 15)))]
    parts.append(np.flatnonzero(~np.isin(told.photographs[~told.varied], range(0, 15))))
    monkeypatch.setattr(fitting.holdout, "validation_folds", lambda *_: parts)
    # The penalty is chosen, and both sources are weighed, by all held-out images together.
    monkeypatch.setattr(fitting.overall, "STRENGTHS", (0.01,))
    judge, seen = fitting._Fits.judge, []

    def judged(fits):
        found = judge(fits)
        whole = fits.overall.held_out if fits.overall else np.zeros(len(found))
        seen.append(np.stack([logit(found), whole]))
        return found

    monkeypatch.setattr(fitting._Fits, "judge", judged)
    for one in (told, lied):
        fitting.fit(build(kind), one, parameters)
    first = parts[0]  # its fit saw the photographs from 15 on only
    np.testing.assert_allclose(seen[1][:, first], seen[0][:, first], rtol=1e-3, atol=1e-3)


def divided(told: Features, count: int = 2) -> fitting.Folds:
    """Divide the plain images into folds by the number of their photograph."""
    plain = np.flatnonzero(~told.varied)
    of = told.photographs[plain] % count
    return fitting.Folds(plain, [np.flatnonzero(of == number) for number in range(count)])


def begun(kind: str, told: Features, folds: fitting.Folds, parameters=PARAMETERS) -> fitting._Fits:
    """Return the fits of a new model."""
    built = build(kind)
    fitting._standardise(built, told)
    return fitting._Fits(built, told, parameters, folds, new=True)


def test_weights_are_the_mean_of_the_fits(computed):
    fits = begun("map", computed["map"], divided(computed["map"]))
    fits.run(1)
    each = [fits._learner.get_layer(MAP).get_weights()[0][..., k] for k in range(2)]
    assert np.abs(each[0] - each[1]).max() > 1e-4
    fits.merge(fits.states())
    kernel = fits._model.get_layer(MAP).get_weights()[0][..., 0]
    np.testing.assert_allclose(kernel, np.mean(each, 0), atol=1e-6)


@pytest.mark.parametrize("kind", ["map", "wide"])
def test_mean_of_the_fits_is_as_sure_as_they_are(computed, kind):
    """Threshold and review band are chosen for the fits' log-odds, and used with the mean's."""
    told = computed[kind]
    parameters = replace(PARAMETERS, learning_rate=0.05)  # the fits go far apart
    fits = begun(kind, told, divided(told, 3), parameters)
    for epoch in range(3):
        fits.run(epoch)
    plain = fits.folds.plain
    each = []
    for state in fits.states():
        fits._restore(state)
        each.append(fits._predict(plain))
    each = logit(np.clip(np.concatenate(each, axis=1).astype(float), 1e-6, 1 - 1e-6))
    for number, part in enumerate(fits.folds.held_out):
        each[part, number] = np.nan
    fits.merge(fits.states())
    found = fitting.predict(network.fitted(fits._model), told, plain)[:, 0].astype(float)
    found, agreed = logit(np.clip(found, 1e-6, 1 - 1e-6)), np.nanmean(each, 1)
    slope, shift = np.polyfit(found, agreed, 1)
    assert slope == pytest.approx(1, abs=0.1) and shift == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("kind", EACH[:2])
def test_what_is_pretrained_stays(computed, kind):
    before = [weight.copy() for weight in build(kind).get_layer("pretrained").get_weights()]
    fitted = fit(computed, kind, 2).model
    for one, other in zip(before, fitted.get_layer("pretrained").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_map_begins_with_what_a_regression_on_the_maxima_finds(computed):
    """Where it began with no weights, it found nothing on some parts (docs/model-notes.md)."""
    fits = begun("map", computed["map"], divided(computed["map"]))
    kernel, _ = fits._learner.get_layer(MAP).get_weights()
    channels = kernel.shape[2]
    of_maxima = fits.overall.kernels[channels : 2 * channels]
    for number in range(2):
        begins, found = kernel[0, 0, :, number], of_maxima[:, number]
        assert (np.sign(begins) == np.sign(found)).all()
    values = computed["map"].take(np.flatnonzero(computed["map"].varied)).astype(np.float32)
    standardised = fits._learner.get_layer(network.STANDARDISED)(values).numpy()
    np.testing.assert_allclose((standardised @ kernel[0, 0]).std((0, 1, 2)), 1, atol=0.15)


def test_a_wide_model_weighs_map_and_image_as_a_whole_by_held_out_images(computed):
    result = fit(computed, "wide", 4)
    told = result.calibration
    assert told.scale >= 0 and told.overall >= 0 and told.scale + told.overall > 0.1
    kernel, _ = result.model.get_layer(PROBABILITY).get_weights()
    assert kernel[1, 0] == pytest.approx(told.overall)
    weights, _ = result.model.get_layer(network.OVERALL).get_weights()
    assert np.abs(weights).max() > 0


def test_a_wide_model_learns_from_gentle_variants_and_images_as_they_are(computed):
    told = computed["wide"]
    chosen = fitting._chosen(told, wide=True)
    assert not told.blemished[chosen].any()
    assert (told.gentle | ~told.varied)[chosen].all()
    assert set(chosen) >= set(np.flatnonzero(~told.varied))
    np.testing.assert_array_equal(fitting._chosen(told, False), np.flatnonzero(told.varied))


@pytest.mark.parametrize("kind", EACH[:2])
def test_features_are_standardised_once(computed, kind):
    fitted = fit(computed, kind, 1).model
    layer = fitted.get_layer(network.STANDARDISED)
    values = computed[kind].take(np.flatnonzero(computed[kind].varied)).astype(np.float32)
    mean, variance = layer.get_weights()
    values = (values - mean) / np.sqrt(variance + layer.epsilon)
    assert np.abs(values.mean((0, 1, 2))).max() < 0.1
    assert np.median(values.std((0, 1, 2))) == pytest.approx(1, abs=0.05)
    before = [weight.copy() for weight in layer.get_weights()]
    other = replace(computed[kind], rows=computed[kind].rows[::-1])
    fitting.fit(fitted, other, replace(PARAMETERS, epochs=1))
    for one, again in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, again)


def test_best_epoch_is_what_remains(computed):
    found = fit(computed, epochs=6)
    best = int(np.argmin(found.history["val_loss"]))
    assert found.best_epoch == best + 1
    assert found.best["loss"] == found.history["loss"][best]
    # Those of the validation are of the calibrated model, which is what is kept.
    labels, probabilities = found.held_out.labels, found.held_out.probabilities
    assert found.best["val_accuracy"] == ((probabilities >= 0.5) == labels).mean()
    assert found.best["val_loss"] < found.history["val_loss"][best]
    assert len(found.history["loss"]) == 6


def test_later_epochs_do_not_spoil_the_best_one(computed, monkeypatch):
    judge, epochs = fitting._Fits.judge, []

    def judged(fits):
        epochs.append(fits.states()[0])
        found = judge(fits)
        return found if len(epochs) == 2 else np.clip(1 - found, 0.01, 0.99)

    monkeypatch.setattr(fitting._Fits, "judge", judged)
    result = fit(computed, epochs=4)
    assert result.best_epoch == 2
    kernel = result.model.get_layer(MAP).get_weights()[0]
    learned = next(one for one in epochs[1] if one.shape[:-1] == kernel.shape[:-1])
    np.testing.assert_allclose(kernel, learned.mean(-1, keepdims=True), atol=1e-7)


def test_each_epoch_is_reported_with_its_metrics(computed):
    seen = []
    fit(computed, epochs=2, on_epoch=lambda epoch, values: seen.append((epoch, sorted(values))))
    names = ["accuracy", "loss", "val_accuracy", "val_loss"]
    assert seen == [(1, names), (2, names)]


def test_each_class_and_each_photograph_weighs_as_much():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    photographs = np.array([5, 5, 5, 8, 5, 9, 9])  # photograph 5 has images of both labels
    chances = fitting.photograph_weights(labels, photographs)
    expected = [1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    np.testing.assert_allclose(chances, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["map", "wide"])
def test_both_classes_weigh_the_same_and_what_is_held_out_nothing(computed, kind):
    told = computed[kind]
    fits = begun(kind, told, divided(told))
    for number in range(2):
        weights, labels = fits._weights[:, number], told.labels[fits._fits_to]
        assert (weights[told.photographs[fits._fits_to] % 2 == number] == 0).all()
        assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum(), rel=1e-5)


def test_every_fit_of_a_former_model_learns_from_its_share_in_an_epoch(computed):
    told = computed["former"]
    fits = fitting._Fits(build("former"), told, PARAMETERS, divided(told), new=False)
    seen = [np.concatenate([batch[1] for batch in fits._epoch(1, n)]) for n in range(2)]
    assert sum(map(len, seen)) == pytest.approx(told.varied.sum(), abs=3)


def test_probabilities_are_calibrated_by_the_pictures_held_out(computed, monkeypatch):
    asked, calibrate = [], calibration.calibrate

    def known(*arguments):
        asked.append(arguments)
        return calibrate(*arguments) if len(asked) == 1 else calibration.Calibration(1, 0)

    monkeypatch.setattr(calibration, "calibrate", known)
    raw = fit(computed)
    monkeypatch.undo()
    done = fit(computed)
    found = raw.held_out
    labels, probabilities, weights = asked[1]  # the first is of the mean and the fits
    assert (labels == found.labels).all() and (probabilities == found.probabilities).all()
    assert (weights == fitting.photograph_weights(labels, found.photographs)).all()
    assert done.calibration == calibrate(*asked[1])
    uncalibrated = (logit(done.held_out.probabilities) - done.calibration.shift) / (
        done.calibration.scale
    )
    np.testing.assert_allclose(uncalibrated, logit(found.probabilities), atol=2e-3)
    # The model's own last layer was changed by the same.
    kernel, bias = raw.model.get_layer(PROBABILITY).get_weights()
    scaled, moved = done.model.get_layer(PROBABILITY).get_weights()
    np.testing.assert_allclose(scaled, done.calibration.scale * kernel, rtol=1e-5)
    expected = done.calibration.scale * bias + done.calibration.shift
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", EACH)
def test_fine_tuned_model_keeps_its_calibration(computed, kind):
    """It may have seen what is held back, and would be called surer each time."""
    fitted = fit(computed, kind, 1).model
    again = fitting.fit(fitted, computed[kind], replace(PARAMETERS, learning_rate=1e-9, epochs=1))
    assert again.calibration == calibration.Calibration(1, 0)


def test_too_few_variants_are_named(computed):
    told = computed["map"]
    good = np.flatnonzero((told.labels == 0) & told.varied)
    lacking = told.among(np.setdiff1d(told.images, told.images[good[0]]))
    only = replace(lacking, photographs=np.where(lacking.labels == 0, 99, lacking.photographs))
    plain = np.flatnonzero(~only.varied)
    of_plain = only.photographs[plain] == 99
    folds = fitting.Folds(plain, [np.flatnonzero(of_plain), np.flatnonzero(~of_plain)])
    with pytest.raises(PipelineError, match=r"variants are too few: .* one class only. Raise var"):
        fitting._Fits(build("map"), only, PARAMETERS, folds, new=False)


def test_fit_that_diverges_is_refused_with_the_learning_rate(computed):
    broken = former_cnn(TAKES.shape)
    head = broken.get_layer(PROBABILITY)
    head.set_weights([np.full_like(weight, math.nan) for weight in head.get_weights()])
    with pytest.raises(PipelineError, match=r"diverged.*learning_rate, which is 0.02"):
        fitting.fit(broken, computed["former"], PARAMETERS)


@pytest.mark.parametrize("kind", EACH)
def test_litert_gives_what_keras_gives_for_any_batch(pictures, computed, kind):
    images = pictures.images
    fitted = fit(computed, kind, epochs=2).model
    served = Classifier(ServedModel(network.to_litert(fitted), TAKES))
    expected = fitted.predict(images.astype("f"), verbose=0)[:, 0]
    np.testing.assert_allclose(served.probabilities(images), expected, atol=1e-5)
    for count in (1, 7, 60):
        np.testing.assert_allclose(
            served.probabilities(images[:count]), expected[:count], atol=1e-5
        )
    assert served.probabilities(images[:0]).shape == (0,)


def test_saved_model_loads_without_custom_code(pictures, tmp_path):
    built = build("wide")
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    batch = pictures.images[:4].astype("f")
    np.testing.assert_allclose(
        loaded.predict(batch, verbose=0), built.predict(batch, verbose=0), atol=1e-6
    )
    # What is frozen is known of a model that was loaded.
    assert len(loaded.trainable_weights) == len(built.trainable_weights)


@pytest.mark.parametrize(
    ("size", "places"), [((16, 16), (16, 16)), ((60, 90), (16, 24)), ((300, 300), (19, 19))]
)
def test_any_image_size_will_do(size, places):
    built = small_cnn((*size, 1))
    picture = np.random.default_rng(0).integers(0, 256, (1, *size, 1), np.uint8)
    probabilities, maps = Classifier(
        ServedModel(network.to_litert(built), ImageFormat(*size))
    ).examine(picture)
    assert maps.shape == (1, *places)
    expected = built.predict(picture.astype("f"), verbose=0)[:, 0]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_two_views_do_not_tell_a_picture_from_one_turned_by_180_degrees():
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 1)).astype("f")
    turned = picture[:, ::-1, ::-1]
    for views, same in ((2, True), (1, False)):
        built = network.build((64, 64, 1), replace(HYPER, views=views))
        before, after = (network.frozen(built)(one).numpy() for one in (picture, turned))
        assert np.allclose(before, after[:, ::-1, ::-1], atol=1e-4) is same


def test_finest_grain_is_smoothed_away():
    layers = network.frozen(small_cnn((256, 256, 1)))
    grain = 20 * (np.indices((256, 256)).sum(0) % 2 * 2 - 1)  # a draughtboard
    pictures = np.stack([np.full((256, 256), 128), 128 + grain])[..., np.newaxis]
    plain, grained = layers.predict(pictures.astype(np.float32), verbose=0)[:, 2:-2, 2:-2]
    np.testing.assert_allclose(grained, plain, atol=1e-3)


def test_map_is_the_evidence_that_the_probability_is_made_of(pictures, computed):
    fitted = fit(computed, epochs=2).model
    probabilities, maps = Classifier(ServedModel(network.to_litert(fitted), TAKES)).examine(
        pictures.images
    )
    assert maps.shape == (60, 16, 16) and maps.min() >= 0
    kernel, bias = fitted.get_layer(PROBABILITY).get_weights()
    evidence = ((maps + 1e-3) ** network.POWER).mean((1, 2)) ** (1 / network.POWER)
    log_odds = evidence * kernel[0] + bias[0]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-log_odds)), atol=1e-5)


@pytest.mark.parametrize("hyper", CONFIG.model_parameters.sets, ids=lambda hyper: hyper.name)
def test_configured_models_fit_few_weights(hyper):
    built = network.build((128, 128, 1), hyper)
    assert built.count_params() < 800_000
    assert sum(math.prod(weight.shape) for weight in built.trainable_weights) < 1000


@pytest.mark.parametrize("hyper", CONFIG.model_parameters.sets, ids=lambda hyper: hyper.name)
def test_evidence_lies_where_the_spot_is(hyper):
    """Padding moves what a layer sees; of each layer used it is 2 of 256 pixels at most."""
    layers = network.frozen(network.build((256, 256, 1), replace(hyper, views=1)))
    rng = np.random.default_rng(0)
    places = rng.uniform(60, 195, (40, 2))
    y, x = np.mgrid[:256, :256]
    spots = [120 + 100 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 3**2)) for a, b in places]
    blank = layers.predict(np.full((1, 256, 256, 1), 120, np.float32), verbose=0)
    found = layers.predict(np.float32(spots)[..., np.newaxis], verbose=0) - blank
    widths = [40, 80] if hyper.blocks == network.COARSE + 1 else [40, 80, found.shape[-1] - 120]
    for part in np.split(found, np.cumsum(widths)[:-1], axis=-1):
        seen = np.square(part).sum(-1)
        centres = np.arange(16) * 16 + 7.5
        across = (seen.sum(1) @ centres) / seen.sum((1, 2)) - places[:, 0]
        down = (seen.sum(2) @ centres) / seen.sum((1, 2)) - places[:, 1]
        assert np.abs([across.mean(), down.mean()]).max() < 2


def test_colour_is_seen_and_grey_is_its_special_case():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (1, 64, 64, 1)).astype("f")
    colour, plain = (network.frozen(network.build((64, 64, c), HYPER)) for c in (3, 1))
    same = colour(np.repeat(grey, 3, -1)).numpy()
    np.testing.assert_allclose(same, plain(grey).numpy(), atol=1e-3)
    tinted = np.concatenate([grey, grey, 0.5 * grey], -1)
    assert np.abs(colour(tinted).numpy() - same).max() > 0.1


def test_a_model_without_the_layers_is_refused_before_the_fit():
    inputs = keras.Input((32, 32, 1))
    flat = keras.layers.Flatten()(inputs)
    other = keras.Model(inputs, keras.layers.Dense(2)(flat))
    expected = r"output \(2,\), and no layer defect_map and defect_probability"
    with pytest.raises(PipelineError, match=expected):
        network.require_contract(other)
    network.require_contract(build("map"))
    features = keras.layers.Conv2D(4, 1, name=network.FEATURES)(inputs)
    found = keras.layers.Conv2D(1, 1, name=network.MAP)(features)
    pooled = keras.layers.GlobalMaxPooling2D()(found)
    judged = keras.layers.Dense(1, name=network.PROBABILITY)(pooled)
    with pytest.raises(PipelineError, match="and no layer standardised"):
        network.require_contract(keras.Model(inputs, judged))
