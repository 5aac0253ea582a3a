"""Features of images and their variants, computed once."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import draw_part, drawn_dataset, former_cnn, long, resident, small_cnn
from defect_detection import PipelineError
from defect_detection.dataset.split import Dataset
from defect_detection.runtime import preprocessing
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import Sampling
from defect_detection.training import features, network

SHARES = (features.GOOD, features.DEFECTIVE)
TAKES = ImageFormat(32, 32)
PHOTOGRAPHS = np.array([0] * 20 + [1] * 2 + [2] * 8 + [3] * 10)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    rng = np.random.default_rng(0)
    labels = (PHOTOGRAPHS < 2).astype(np.uint8)
    drawn = [np.asarray(draw_part(rng, defect == 1, side=32)) for defect in labels]
    return drawn_dataset(np.stack(drawn), labels, PHOTOGRAPHS)


@pytest.fixture(scope="module")
def model():
    return small_cnn(TAKES.shape)


@pytest.fixture(scope="module", autouse=True)
def _converted_once(model):
    """Convert the frozen layers once; it takes seconds, and they are those of every model here."""
    content = network.frozen_to_litert(network.frozen(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "frozen_to_litert", lambda _: content)
        yield


def test_each_photograph_of_a_class_has_as_many_variants(pictures, model, tmp_path):
    found = features.compute(model, pictures, Sampling(200, 0, tmp_path))
    assert len(found) == 40 + 200
    assert sorted(found.images[~found.varied]) == list(range(40))
    own = pictures.labels[found.images] == found.labels
    for photograph, of_class in ((0, 80), (1, 80), (2, 80), (3, 80)):
        count = (found.varied & own & (found.photographs == photograph)).sum()
        assert count == of_class / 2
    blemished = found.varied & ~own
    assert blemished.sum() == 40 and (found.labels[blemished] == 1).all()
    assert set(found.photographs[blemished]) == {2, 3}


def test_pictures_as_they_are_are_a_sample_with_many_photographs(pictures, model, monkeypatch):
    monkeypatch.setattr(features, "MOST_PLAIN", 6)
    planned = features._plan(pictures, Sampling(100, 0, Path()), SHARES)
    plain = PHOTOGRAPHS[planned.images[~planned.varied]]
    assert np.bincount(plain).tolist() == [4, 2, 3, 3]
    assert len(set(planned.images[~planned.varied])) == 12


def test_features_are_what_the_pretrained_layers_give(pictures, model, tmp_path):
    found = features.compute(model, pictures, Sampling(20, 0, tmp_path))
    plain = np.flatnonzero(~found.varied)
    expected = network.frozen(model)(pictures.images[found.images[plain]].astype("f")).numpy()
    np.testing.assert_allclose(found.take(plain), expected, atol=0.05, rtol=1e-3)


def test_of_a_model_without_pretrained_layers_the_variants_are_kept(pictures, tmp_path):
    found = features.compute(former_cnn(TAKES.shape), pictures, Sampling(20, 0, tmp_path))
    plain = np.flatnonzero(~found.varied)
    np.testing.assert_array_equal(found.take(plain), pictures.images[found.images[plain]])
    varied = found.take(np.flatnonzero(found.varied))
    assert varied.shape[1:] == TAKES.shape and varied.min() >= 0 and varied.max() <= 255


def test_computed_once_and_found_again(pictures, model, tmp_path, monkeypatch):
    sampling = Sampling(20, 0, tmp_path)
    first = features.compute(model, pictures, sampling)
    with monkeypatch.context() as patch:
        patch.setattr(features, "_batches", lambda *_: pytest.fail("computed again"))
        again = features.compute(small_cnn(TAKES.shape), pictures, sampling)
    assert again.path == first.path
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


CHANGES = ["pictures", "photographs", "weights", "layers", "preprocessing", "seed", "variants"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_they_depend_on_names_them(pictures, model, tmp_path, monkeypatch, change):
    monkeypatch.setattr(features, "_complete", lambda *_: None)  # the name is all that counts
    sampling = Sampling(20, 0, tmp_path)
    first = features.compute(model, pictures, sampling).path
    assert features.compute(model, pictures, sampling).path == first
    data = pictures
    if change == "pictures":
        data = replace(pictures, digest="others")
    elif change == "photographs":
        data = replace(pictures, photographs=np.arange(40))
    elif change == "weights":
        model = small_cnn(TAKES.shape)
        kernel, bias = model.get_layer("pretrained").get_layer("stem").get_weights()
        model.get_layer("pretrained").get_layer("stem").set_weights([kernel * 1.01, bias])
    elif change == "layers":  # other features of the same weights and shape
        with monkeypatch.context() as patch:
            patch.setattr(network.layers, "MaxPooling2D", network.layers.AveragePooling2D)
            model = small_cnn(TAKES.shape)
    elif change == "preprocessing":
        monkeypatch.setattr(preprocessing, "PREPROCESSING", "another")
    else:
        sampling = replace(sampling, **{change: 30})
    assert features.compute(model, data, sampling).path != first


@pytest.mark.parametrize("damaged", [long(False), True])
def test_an_interrupted_computation_is_gone_on_with(
    pictures, model, tmp_path, monkeypatch, damaged
):
    sampling = Sampling(200, 0, tmp_path / "whole")
    whole = features.compute(model, pictures, sampling)
    sampling = replace(sampling, cache=tmp_path / "cut")
    batches, begun_at = features._batches, []

    def cut(layers, data, planned, seed, begun):
        begun_at.append(begun)
        for number, batch in enumerate(batches(layers, data, planned, seed, begun)):
            if number == 3 and len(begun_at) == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features, "_batches", cut)
    with pytest.raises(KeyboardInterrupt):
        features.compute(model, pictures, sampling)
    (part,) = (tmp_path / "cut").iterdir()
    with part.open("ab") as file:
        file.write(b"half a row")
    long_ago = time.time() - 2 * features.PART_KEPT  # such as on the Friday before
    os.utime(part, (long_ago, long_ago))
    if damaged:  # what was not yet on the disk when the power failed
        content = part.read_bytes()
        row = len(content) // (3 * features.BATCH)
        part.write_bytes(content[: 40 * row] + bytes(row) + content[41 * row :])
    found = features.compute(model, pictures, sampling)
    assert begun_at == [0, (2 if damaged else 3) * features.BATCH]
    every = np.arange(len(whole))
    # Not bit by bit: how TensorFlow divides a sum among threads may depend on how busy they are.
    np.testing.assert_allclose(found.take(every), whole.take(every), rtol=2e-3, atol=2e-3)


DAMAGES = {
    "lost its end": lambda content: content[:-100],
    "got more": lambda content: content + content[:100],
    "is empty": lambda content: b"",
    "is of another version": lambda content: content[: 60 * 2 * 4 * 4 * 8],
    "has a zeroed block": lambda content: content[:512] + bytes(512) + content[1024:],
    "is zeroed": lambda content: bytes(len(content)),
    "has another bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@pytest.fixture
def quick(monkeypatch):
    """Let features be random numbers."""

    def batches(layers, data, planned, seed, begun):
        for start in range(begun, len(planned.images), features.BATCH):
            count = len(planned.images[start : start + features.BATCH])
            yield np.random.default_rng([seed, start]).random((count, *layers.output_shape[1:]))

    monkeypatch.setattr(features, "_batches", batches)


def changed(file: Path, damage: Callable[[bytes], bytes]) -> None:
    """Replace a file, as those do that may not touch one which others have mapped."""
    content = damage(file.read_bytes())
    file.unlink()
    file.write_bytes(content)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_computed_again_with_a_line(pictures, model, tmp_path, damage, caplog):
    sampling = Sampling(20, 0, tmp_path)
    first = features.compute(model, pictures, sampling)
    whole = first.take(np.arange(len(first)))
    changed(first.path, damage)
    again = features.compute(model, pictures, sampling)
    np.testing.assert_array_equal(again.take(np.arange(len(again))), whole)
    assert caplog.text.count(f"{first.path} is damaged: the features are computed again") == 1
    caplog.clear()
    features.compute(model, pictures, sampling)
    assert not caplog.text


@pytest.mark.usefixtures("quick")
def test_file_under_the_name_of_another_is_noticed(pictures, model, tmp_path, caplog):
    first, other = (features.compute(model, pictures, Sampling(20, n, tmp_path)) for n in (0, 1))
    whole = first.take(np.arange(len(first)))
    changed(first.path, lambda _: other.path.read_bytes())
    again = features.compute(model, pictures, Sampling(20, 0, tmp_path))
    np.testing.assert_array_equal(again.take(np.arange(len(again))), whole)
    assert "is damaged" in caplog.text


@pytest.mark.usefixtures("quick")
def test_values_stay_those_that_were_checked(pictures, model, tmp_path):
    """Another process may delete the file meanwhile, or put another in its place."""
    found = features.compute(model, pictures, Sampling(20, 0, tmp_path))
    whole = found.take(np.arange(len(found)))
    changed(found.path, lambda content: bytes(len(content)))
    np.testing.assert_array_equal(found.take(np.arange(len(found))), whole)


@pytest.mark.usefixtures("quick")
def test_folder_in_place_of_the_file_is_one_line_before_the_work(
    pictures, model, tmp_path, monkeypatch
):
    sampling = Sampling(20, 0, tmp_path)
    found = features.compute(model, pictures, sampling)
    found.path.unlink()
    found.path.mkdir()
    monkeypatch.setattr(features, "_batches", lambda *_: pytest.fail("computed"))
    with pytest.raises(PipelineError, match=r"cannot be written \(Is a directory\)"):
        features.compute(model, pictures, sampling)


def test_memory_of_what_was_read_is_given_back(pictures, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (40, 512, 512), np.uint8)
    data = drawn_dataset(images, pictures.labels, pictures.photographs)
    found = features.compute(former_cnn((512, 512, 1)), data, Sampling(10, 0, tmp_path))
    before = resident()
    for start in range(0, len(found), 10):
        assert found.take(np.arange(start, start + 10)).any()
    assert resident() - before < 10
    assert found.path.stat().st_size > 25e6


def test_disk_without_room_is_one_line_before_the_work(pictures, model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_batches", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e5))
    with pytest.raises(PipelineError, match=r"take 0\.\d GB, and 0\.0 GB are free. Make room, or"):
        features.compute(model, pictures, Sampling(2000, 0, tmp_path))


def test_variants_of_a_photograph_do_not_keep_a_place(pictures):
    """The fill beyond the edge goes by the place in a batch, and must not tell the photograph."""
    photographs = np.arange(40) % 32  # as many as two batches hold
    labels = np.repeat([0, 1], [32, 8]).astype(np.uint8)
    data = replace(pictures, labels=labels, photographs=photographs)
    planned = features._plan(data, Sampling(640, 0, Path()), SHARES)
    places = np.flatnonzero(planned.varied)[photographs[planned.images[planned.varied]] == 3]
    assert len(set(places % features.BATCH)) > 4


def test_progress_is_told(pictures, model, tmp_path):
    shares = []
    features.compute(model, pictures, Sampling(100, 0, tmp_path), shares.append)
    assert shares == sorted(shares) and shares[-1] == 1
    assert len(shares) == math.ceil(140 / features.BATCH)
    features.compute(model, pictures, Sampling(100, 0, tmp_path), shares.append)
    assert shares[-1] == 1 and len(shares) == math.ceil(140 / features.BATCH)  # nothing to do


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("room", "left"), [(0, 2), (2.5, 3), (1e9, 5)])
def test_old_files_are_deleted(pictures, model, tmp_path, monkeypatch, room, left):
    """The newest are kept, and more of them while they are small."""
    monkeypatch.setattr(features, "FILES_KEPT", 2)
    found = []
    for seed in range(5):
        found.append(features.compute(model, pictures, Sampling(10, seed, tmp_path)).path)
        os.utime(found[-1], (seed, seed))
        monkeypatch.setattr(features, "BYTES_KEPT", room * found[-1].stat().st_size)
    assert sorted(tmp_path.iterdir()) == sorted(found[-left:])


def test_what_was_interrupted_is_kept_for_a_day(pictures, model, tmp_path):
    for name, hours in (("new", 1), ("old", 25)):
        (tmp_path / f"features-{name}.part").touch()
        then = time.time() - hours * 3600
        os.utime(tmp_path / f"features-{name}.part", (then, then))
    features.compute(model, pictures, Sampling(10, 0, tmp_path))
    assert [path.name for path in tmp_path.glob("*.part")] == ["features-new.part"]


def test_cache_that_cannot_be_written_is_one_line(pictures, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"cannot be written \(Not a directory\)"):
        features.compute(model, pictures, Sampling(10, 0, tmp_path / "file" / "x"))


def test_features_of_some_of_the_pictures(pictures, model, tmp_path):
    found = features.compute(model, pictures, Sampling(100, 0, tmp_path))
    some = found.among(np.arange(20, 30))
    assert set(some.images) == set(range(20, 30))
    assert set(some.photographs) == {1, 2}
    row = np.flatnonzero(some.images == 25)[:1]
    np.testing.assert_array_equal(
        some.take(row), found.take(np.flatnonzero(found.images == 25)[:1])
    )
