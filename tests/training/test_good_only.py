"""Models of good parts alone."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from conftest import draw_part, drawn_dataset
from defect_detection.dataset.split import Dataset
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.model_files import ServedModel
from defect_detection.settings import FitParameters, HyperParameters, Sampling
from defect_detection.training import features, fitting, good_only, network

HYPER = HyperParameters("good", 8, 1, "good", 0.02, 0.01, 16, 6)
PARAMETERS = FitParameters(0.02, 0.01, 16, 6, 0.25, 3)
OVERKILL = 0.1


@pytest.fixture(scope="module", autouse=True)
def small_memory():
    """Keep fewer places, so that a fit takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "KEPT", 64)
        patch.setattr(network, "COMPONENTS", 16)
        patch.setattr(good_only, "PLACES", 4000)
        yield


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Forty good parts and eight with a defect, each of a photograph of its own."""
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(40), np.ones(8)].astype(np.uint8)
    drawn = [np.asarray(draw_part(rng, defect == 1, side=64)) for defect in labels]
    return drawn_dataset(np.stack(drawn), labels, np.arange(48))


def fit(pictures: Dataset, cache) -> tuple[fitting.TrainingResult, features.Features]:
    keras.utils.set_random_seed(3)
    model = network.build(pictures.format.shape, HYPER)
    computed = features.compute(model, pictures, Sampling(300, 3, cache))
    return good_only.fit(model, computed, PARAMETERS, OVERKILL, lambda *_: None), computed


@pytest.fixture(scope="module")
def fitted(pictures, tmp_path_factory):
    return fit(pictures, tmp_path_factory.mktemp("features"))


def test_no_real_defect_is_learned_from(fitted, pictures):
    _, computed = fitted
    defects = np.flatnonzero(pictures.labels == 1)
    assert not np.isin(computed.images[computed.varied], defects).any()
    kept = good_only._of_good_parts(computed)
    assert not np.isin(kept.images, defects).any()
    assert kept.varied[kept.blemished].any() and not kept.varied[kept.blemished].all()


def test_threshold_rejects_as_many_held_out_good_parts_as_were_asked_for(fitted):
    result, _ = fitted
    good = result.held_out.probabilities[result.held_out.labels == 0]
    assert len(good) == 40 and result.good_only
    assert OVERKILL - 0.05 <= (good >= 0.5).mean() <= OVERKILL


@pytest.mark.parametrize(("count", "most", "rejected"), [(12, 0.1, 1), (20, 0.1, 2), (9, 0, 0)])
def test_limit_rejects_no_more_than_was_asked_for(count, most, rejected):
    surprise = np.random.default_rng(0).permutation(count).astype(float)
    limit = good_only._limit(surprise, np.ones(count), most)
    assert (surprise >= limit).sum() == rejected
    assert np.abs(surprise - limit).min() >= 0.5  # rounding decides about none


def test_limit_counts_photographs_and_not_images():
    surprise, photographs = np.array([1.0, 2, 3, 9, 9, 9]), np.array([0, 1, 2, 3, 3, 3])
    weights = 1 / np.bincount(photographs)[photographs]
    assert 3 < good_only._limit(surprise, weights, 0.25) < 9


def test_defects_are_found_without_having_seen_one(fitted, pictures):
    result, _ = fitted
    rng = np.random.default_rng(5)
    new = np.stack([np.asarray(draw_part(rng, number < 20, side=64)) for number in range(40)])
    found = result.model.predict(new[..., np.newaxis].astype("f"), verbose=0)[:, 0]
    assert (found[:20] > 0.5).mean() > 0.8
    assert (found[20:] > 0.5).mean() < 0.4


def test_what_defects_there_are_are_judged_by_the_model(fitted, pictures):
    result, _ = fitted
    judged = result.held_out
    defects = judged.labels == 1
    assert sorted(judged.photographs[defects]) == list(range(40, 48))
    images = pictures.images[judged.photographs[defects]].astype("f")
    expected = result.model.predict(images, verbose=0)[:, 0]
    np.testing.assert_allclose(judged.probabilities[defects], expected, atol=5e-3)


def test_litert_gives_what_keras_gives_and_a_map_of_the_surprise(fitted, pictures):
    result, _ = fitted
    served = ServedModel(network.to_litert(result.model), pictures.format)
    probabilities, maps = Classifier(served).examine(pictures.images)
    expected = result.model.predict(pictures.images.astype("f"), verbose=0)[:, 0]
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert maps.min() >= 0 and np.isfinite(maps).all()
    defects = pictures.labels == 1
    assert np.median(maps[defects].max((1, 2))) > np.median(maps[~defects].max((1, 2)))


def test_distances_are_those_of_the_network(fitted):
    result, computed = fitted
    model = result.model
    whitening, shift = model.get_layer(network.WHITENED).get_weights()
    kernel, _ = model.get_layer(network.MEMORY).get_weights()
    memory = network.Memory(whitening[0, 0], shift, -kernel[0, 0].T / 2)
    rows = np.arange(4)
    of_network = keras.Model(
        model.get_layer(network.FEATURES).output, model.get_layer(network.DISTANCE).output
    )
    expected = of_network.predict(computed.take(rows).astype("f"), verbose=0)[..., 0]
    standardised = good_only._standardised(model, computed, rows)
    np.testing.assert_allclose(memory.distances(standardised), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.long
def test_parts_without_any_defect_will_do(pictures, tmp_path):
    rows = np.flatnonzero(pictures.labels == 0)
    alone = replace(
        drawn_dataset(
            pictures.images[rows, ..., 0], pictures.labels[rows], pictures.photographs[rows]
        ),
        digest="good parts alone",
    )
    assert alone.few_defects
    result, _ = fit(alone, tmp_path)
    assert set(result.held_out.labels) == {0}
    assert 0.8 <= result.best["val_accuracy"] <= 0.95
