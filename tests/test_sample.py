"""The synthetic images."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from data import sample
from PIL import Image

from conftest import ROOT
from defect_detection.runtime import preprocessing

FEW = {"train": {"def_front": 3, "ok_front": 2}, "test": {"def_front": 2, "ok_front": 2}}


def digests(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jpeg"))
    }


def test_same_seed_draws_the_same_pictures_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sample.draw_all(tmp_path / name, seed, FEW) == 9
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == 9


def test_file_names_say_synthetic_and_class(tmp_path):
    sample.draw_all(tmp_path, 0, FEW)
    for path in tmp_path.rglob("*.jpeg"):
        short = path.parent.name.removesuffix("_front")
        assert path.name.startswith(f"synthetic_{short}_")


@pytest.mark.parametrize("defect", sample.DEFECTS)
def test_each_defect_changes_the_part(defect):
    good = np.asarray(sample.draw(np.random.default_rng(4), None)).astype(int)
    bad = np.asarray(sample.draw(np.random.default_rng(4), defect)).astype(int)
    assert good.shape == bad.shape == (sample.SIZE, sample.SIZE)
    assert np.abs(good - bad).max() > 30


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "data" / "sample.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_pictures_of_ones_own_are_never_mixed_with_drawn_ones(tmp_path):
    own = tmp_path / "test" / "ok_front" / "my part.png"
    own.parent.mkdir(parents=True)
    Image.new("L", (9, 9)).save(own)
    done = run("--out", tmp_path)
    assert done.returncode == 1
    assert "my part.png is not synthetic" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]


@pytest.mark.parametrize("own", ["good/a.png", "NG/b.JPG", "ok/c.jfif", "train/ok_front/c.tiff"])
def test_nothing_is_drawn_beside_images_of_ones_own_in_any_layout(tmp_path, own):
    (tmp_path / own).parent.mkdir(parents=True)
    (tmp_path / own).write_bytes(b"an image")
    assert run("--out", tmp_path).returncode == 1
    assert run("--out", tmp_path, "--if-empty").returncode == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / own]


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("--out", tmp_path / "file")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_images_of_ones_own_are_those_that_the_pipeline_reads():
    assert set(sample.IMAGES) == set(preprocessing.SUFFIXES)
