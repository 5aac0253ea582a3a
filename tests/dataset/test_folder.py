"""Folders as people have them: other names, folders below, one pair of folders, other files."""

import logging
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, draw_folders
from defect_detection import PipelineError, settings
from defect_detection.atomic import write_mapping
from defect_detection.dataset import decoded, photographs, split
from defect_detection.dataset.folder import SIDES, DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import CONFIG_FILE, Config

TAKES = ImageFormat(32, 32)


@pytest.fixture
def configured(tmp_path: Path, data: Path) -> DataFolder:
    """`data` with the class folders of src/config.yaml."""
    config = settings.read_yaml(CONFIG_FILE, Config)
    return replace(
        DataFolder.choose(Namespace(data=str(data), config=None), {}, config),
        cache=tmp_path / "cache",
    )


def rename(data: Path, side: str, **names: str) -> None:
    for old, new in names.items():
        (data / side / old).rename(data / side / new)


def test_usual_names_are_recognised_and_said(configured, data):
    rename(data, "train", def_front="NG", ok_front="Good")
    rename(data, "test", def_front="defective", ok_front="ok")
    loaded = split.load(configured, TAKES)
    assert loaded.training.counts == {"def_front": 10, "ok_front": 10}
    assert loaded.testing.counts == {"def_front": 4, "ok_front": 4}
    assert loaded.training.labels[0] == 1 and loaded.training.paths[0].startswith("train/NG/")
    said = configured.describe(loaded.training.counts)
    assert said == "10 def_front (in NG, defective), 10 ok_front (in Good, ok)"


def test_several_folders_of_a_class_count_together(configured, data):
    (data / "train" / "bad").mkdir()
    (data / "train" / "def_front" / "part_000.jpeg").rename(data / "train" / "bad" / "a.jpeg")
    assert split.load(configured, TAKES).training.counts["def_front"] == 10


def test_folders_below_a_class_folder_belong_to_it(folder, data):
    below = data / "train" / "ok_front" / "line 3" / "monday"
    below.mkdir(parents=True)
    (data / "train" / "ok_front" / "part_000.jpeg").rename(below / "a.jpeg")
    loaded = split.load(folder, TAKES).training
    assert loaded.counts == {"def_front": 10, "ok_front": 10}
    row = loaded.paths.index("train/ok_front/line 3/monday/a.jpeg")
    assert loaded.labels[row] == 0


def test_a_folder_that_is_no_class_is_named_and_ignored(configured, data, caplog):
    shutil.copytree(data / "train" / "def_front", data / "train" / "scratches")
    with caplog.at_level(logging.WARNING):
        assert split.load(configured, TAKES).training.counts["def_front"] == 10
    assert "train: scratches are no class folders and are ignored" in caplog.text


def test_other_files_are_counted_by_kind(folder, data, caplog):
    for name in ("a.heic", "b.HEIC", "c.gif", "d.mp4"):
        (data / "train" / "ok_front" / name).write_bytes(b"something")
    with caplog.at_level(logging.WARNING):
        assert len(split.load(folder, TAKES).training) == 20
    assert "train/ok_front: not read: 1 .gif, 2 .heic, 1 .mp4" in caplog.text


@pytest.mark.parametrize("kind", ["bmp", "tiff", "tif", "webp", "PNG", "jfif", "JPE"])
def test_files_of_industrial_cameras_are_read(folder, data, kind):
    source = data / "train" / "ok_front" / "part_000.jpeg"
    with Image.open(source) as image:
        image.save(source.with_suffix(f".{kind}"))
    source.unlink()
    loaded = split.load(folder, TAKES).training
    assert loaded.counts["ok_front"] == 10
    assert f"train/ok_front/part_000.{kind}" in loaded.paths


@pytest.fixture
def flat(tmp_path: Path) -> DataFolder:
    drawn = draw_folders(tmp_path / "drawn", train=20, test=1)
    return DataFolder(Path(shutil.move(drawn / "train", tmp_path / "flat")), tmp_path / "cache")


def test_one_pair_of_folders_is_divided_by_photograph_and_said(flat, caplog):
    with caplog.at_level(logging.INFO):
        first = split.load(flat, TAKES)
    assert len(first.training) + len(first.testing) == 40
    assert first.testing.counts == {"def_front": 4, "ok_front": 4}
    assert not first.leaked.any()
    assert "has no train and test: 20% of its photographs are test images, as" in caplog.text
    assert flat.split_file.exists()
    again = split.load(flat, TAKES)
    assert again.testing.paths == first.testing.paths


def test_examples_of_one_pair_of_folders_are_of_both_classes(flat):
    configured = settings.read_yaml(CONFIG_FILE, Config).inference_examples
    defect, good = flat.examples(configured, lambda said: None)
    assert (defect.parent.name, good.parent.name) == ("def_front", "ok_front")


def save(folder: Path, count: int, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 3, pixels.shape)
        Image.fromarray((pixels + noise).astype(np.uint8)).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("colour", "color", "channels"),
    [((90, 90, 90), "auto", 1), ((150, 60, 60), "auto", 3), ((150, 60, 60), "grey", 1)],
)
def test_colour_is_kept_where_the_images_have_it(tmp_path, colour, color, channels):
    for name in ("def_front", "ok_front"):
        save(tmp_path / "train" / name, 4, np.tile(np.array(colour), (40, 40, 1)))
    takes = DataFolder(tmp_path, tmp_path / "cache").image_format((64, 64), color)
    assert takes == ImageFormat(64, 64, channels)


def test_a_small_coloured_mark_is_colour(tmp_path):
    marked = np.full((200, 200, 3), 90)
    marked[20:30, 20:30] = (160, 40, 40)
    save(tmp_path / "train" / "def_front", 4, marked)
    save(tmp_path / "train" / "ok_front", 4, np.full((200, 200, 3), 90))
    assert DataFolder(tmp_path, tmp_path).image_format((64, 64), "auto").channels == 3


def test_images_that_get_borders_are_said_with_a_better_size(tmp_path, caplog):
    for name in ("def_front", "ok_front"):
        save(tmp_path / "train" / name, 3, np.full((100, 300), 90))
    with caplog.at_level(logging.INFO):
        DataFolder(tmp_path, tmp_path).image_format((256, 256), "auto")
    assert "2.98 times as wide as high and get borders to fill 256 x 256" in caplog.text
    assert "image_size: [160, 448] in src/config.yaml" in caplog.text


def test_a_name_of_both_classes_is_refused(tmp_path):
    text = CONFIG_FILE.read_text().replace("[ok_front, ok,", "[ok_front, Defect,")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(PipelineError, match="classes: 'defect' is a name of both classes"):
        settings.read_yaml(tmp_path / "config.yaml", Config)


def test_links_to_folders_are_followed_and_never_endlessly(folder, data, tmp_path):
    elsewhere = tmp_path / "share"
    shutil.move(data / "train" / "ok_front", elsewhere)
    (data / "train" / "ok_front").mkdir()
    (data / "train" / "ok_front" / "monday").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(data / "train" / "ok_front")
    loaded = split.load(folder, TAKES).training
    assert loaded.counts == {"def_front": 10, "ok_front": 10}
    assert "train/ok_front/monday/part_000.jpeg" in loaded.paths


def test_images_and_folders_beside_are_named(folder, data, caplog):
    shutil.copy(data / "train" / "ok_front" / "part_000.jpeg", data / "train" / "loose.jpeg")
    (data / "val").mkdir()
    with caplog.at_level(logging.WARNING):
        split.load(folder, TAKES)
    assert "train: 1 images lie in no class folder and are ignored" in caplog.text
    assert "val are neither train nor test and are ignored" in caplog.text


def test_flat_folder_of_good_parts_alone_is_divided(flat, caplog):
    shutil.rmtree(flat.path / "def_front")
    loaded = split.load(flat, TAKES)
    assert loaded.training.counts == {"def_front": 0, "ok_front": 16}
    assert loaded.testing.counts == {"def_front": 0, "ok_front": 4}


def test_the_only_defect_is_tested_with(flat):
    for path in sorted((flat.path / "def_front").iterdir())[1:]:
        path.unlink()
    loaded = split.load(flat, TAKES)
    assert loaded.training.counts == {"def_front": 0, "ok_front": 16}
    assert loaded.testing.counts == {"def_front": 1, "ok_front": 4}


def test_split_without_training_images_is_refused(folder):
    paths = [folder.relative(path) for side in SIDES for path in folder.images_in(side)]
    write_mapping(folder.split_file, "path", "split", dict.fromkeys(paths, "test"))
    with pytest.raises(PipelineError, match=r"split\.csv names no training image"):
        folder.image_format((32, 32), "auto")


def test_calls_in_messages_name_folder_and_configuration(tmp_path):
    (tmp_path / "my parts").mkdir()
    config = settings.read_yaml(CONFIG_FILE, Config)
    options = Namespace(data=str(tmp_path / "my parts"), config="tiles.yaml")
    chosen = DataFolder.choose(options, {}, config)
    expected = f"python src/audit.py --data '{tmp_path}/my parts' --config tiles.yaml"
    assert chosen.command("src/audit.py") == expected


def test_other_names_of_classes_give_another_digest(configured, data):
    """Settings decide the labels, and figures of other labels must not be compared."""
    (data / "train" / "ok_front").rename(data / "train" / "fair")
    rated = [
        replace(
            configured, classes={"def_front": ["def_front", *bad], "ok_front": ["ok_front", *ok]}
        )
        for bad, ok in (([], ["fair"]), (["fair"], []))
    ]
    paths = sorted((data / "train" / "fair").iterdir())
    first, second = (decoded.decode(one, paths, "train", TAKES) for one in rated)
    assert first.labels.max() == 0 and second.labels.min() == 1
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("highest", "bits"), [(240, 8), (1000, 10), (4000, 12), (9000, 14), (40000, 16)]
)
def test_the_folder_decides_how_many_bits_count(tmp_path, highest, bits):
    """A dark image among them is dark afterwards too."""
    for name, level in (("def_front", highest), ("ok_front", highest // 16)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((40, 40), level, np.uint16)).save(folder / "a.png")
    takes = DataFolder(tmp_path, tmp_path / "cache").image_format((32, 32), "auto")
    assert takes.bits == bits
    light, dark = (
        preprocessing.decode(tmp_path / "train" / name / "a.png", takes).mean()
        for name in ("def_front", "ok_front")
    )
    assert light == highest * 256 // 2**bits and dark == pytest.approx(light / 16, abs=1)


def test_named_pipe_among_the_images_is_skipped_and_keeps_nobody_waiting(tmp_path):
    """In a process of its own: threads that wait for a pipe could not be ended."""
    data = draw_folders(tmp_path / "more", train=20, test=1)
    (data / "train" / "ok_front" / "part_003.jpeg").unlink()
    os.mkfifo(data / "train" / "ok_front" / "part_003.jpeg")
    program = f"""
from pathlib import Path
from defect_detection.dataset import split
from defect_detection.dataset.folder import DataFolder
folder = DataFolder(Path({str(data)!r}), Path({str(tmp_path / "cache")!r}))
print(len(split.load(folder, folder.image_format((32, 32), "auto")).training))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "39\n"
    assert "train/ok_front/part_003.jpeg is a named pipe" in done.stderr


def test_images_of_more_pixels_than_configured_are_skipped_until_they_are_allowed(configured, data):
    Image.new("L", (250, 200), 90).save(data / "train" / "ok_front" / "large.png")
    few = replace(configured, most_pixels=10_000)
    takes = few.image_format((32, 32), "auto")
    assert takes.most_pixels == 10_000
    paths = few.images("train")
    found = decoded.decode(few, paths, "train", takes)
    ((name, why),) = found.skipped
    assert name == "train/ok_front/large.png"
    assert why.startswith("has 1 megapixels, at most 0.01 are decoded (max_megapixels in src/")
    # What the cache knows of the lower limit does not count for the higher one.
    assert len(decoded.decode(few, paths, "train", replace(takes, most_pixels=50_000))) == 21
    assert configured.image_format((32, 32), "auto").most_pixels == 100_000_000


def test_images_are_compared_with_as_many_pixels_as_are_decoded(folder, monkeypatch):
    given = []
    monkeypatch.setattr(photographs, "find", lambda *found: given.append(found) or {})
    with pytest.raises(KeyError):
        split.load(folder, replace(TAKES, most_pixels=200_000_000))
    assert [most for _, _, most in given] == [200_000_000]


def test_a_model_with_a_lower_limit_is_judged_on_the_same_images(folder):
    """The version in production may have been trained when less was allowed."""
    loaded = split.load(folder, replace(TAKES, most_pixels=200_000_000)).testing
    assert loaded.images_as(TAKES) is loaded.images
    again = loaded.images_as(ImageFormat(48, 48, most_pixels=100))
    assert len(again) == len(loaded)


def test_data_folder_whose_name_is_not_utf8_is_refused_in_a_line(data):
    shutil.move(data, os.fsencode(data) + b"\xff")
    config = settings.read_yaml(CONFIG_FILE, Config)
    options = Namespace(data=os.fsdecode(os.fsencode(data) + b"\xff"), config=None)
    with pytest.raises(PipelineError, match="its name is not UTF-8, which MLflow needs. Rename it"):
        DataFolder.choose(options, {}, config)
