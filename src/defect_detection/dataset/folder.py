"""A data folder: which images it has, on which side of the split, under which label."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defect_detection import PipelineError
from defect_detection.atomic import read_mapping
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage
from defect_detection.settings import Color, InferenceExamples, from_root

log = logging.getLogger(__name__)

LOOKED_AT = 256  # images, to choose the format
# An image has colour if more than this share of its pixels has channels that are further apart
# than this many grey levels; the images of a folder have it if more than this share has.
COLOURFUL, COLOURED_PIXELS, COLOURED_SHARE = 24, 0.001, 0.02
SAME_SHAPE = 1.25  # ratio of two aspects up to which borders are not worth a word

SIDES = ("train", "test")
SPLIT_FILE = "split.csv"  # says which image is on which side, whatever folder it lies in
GROUPS_FILE = "groups.csv"  # says which photograph each image comes from


@dataclass(frozen=True)
class DataFolder:
    """A folder that is laid out as data/README.md describes.

    Attributes:
        path: absolute; holds `train` and `test`, each with a folder for each class.
        cache: folder of decoded images and of the photographs that were found.
    """

    path: Path
    cache: Path

    @classmethod
    def choose(
        cls, option: str | None, env: Mapping[str, str], configured: str, cache: Path
    ) -> "DataFolder":
        """Choose the folder: the option `--data`, the variable DATA_PATH, the configuration.

        The option counts from the working directory, as a shell completes it; the others count
        from the project's root.

        Raises:
            PipelineError: the folder does not exist.
        """
        path = Path(option) if option else from_root(env.get("DATA_PATH", configured))
        if not path.is_dir():
            raise PipelineError(
                f"{path} is not a folder. Name one with --data or DATA_PATH, or run 'make sample'"
            )
        return cls(path.resolve(), cache)

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    @property
    def split_file(self) -> Path:
        """The file that overrides which side an image is on; it need not exist."""
        return self.path / SPLIT_FILE

    @property
    def groups_file(self) -> Path:
        """The file that overrides which photograph an image comes from; it need not exist."""
        return self.path / GROUPS_FILE

    @property
    def sides(self) -> list[str]:
        """The sides that are folders here, of `SIDES`."""
        return [side for side in SIDES if (self.path / side).is_dir()]

    def images(self, side: str) -> list[Path]:
        """Return the images of a side, sorted by class, then path.

        They lie in `<side>/{def_front,ok_front}`, unless `split.csv` says otherwise.

        Raises:
            PipelineError: a class folder is missing or empty, or `split.csv` lacks an image.
        """
        if not self.split_file.exists():
            return self.images_in(side)
        named = read_mapping(self.split_file, "path", "split")
        found = []
        for path in (path for folder in self.sides for path in self.images_in(folder)):
            name = self.relative(path)
            if named.get(name) not in SIDES:
                raise PipelineError(
                    f"{self.split_file} does not say whether {name} is train or test. Run "
                    f"'python src/audit.py --resplit 0.2' again, or delete the file"
                )
            if named[name] == side:
                found.append(path)
        return sorted(found, key=lambda path: CLASSES.index(path.parent.name))

    def images_in(self, side: str) -> list[Path]:
        """Return the images that lie in the folder of a side, sorted by class, then name.

        Raises:
            PipelineError: a class folder is missing or empty.
        """
        return [path for name in CLASSES for path in _images(self.path / side / name)]

    def image_format(self, image_size: tuple[int, int], color: Color) -> ImageFormat:
        """Choose the pixels that a model for the training images takes.

        Args:
            image_size: height and width in pixels.
            color: "auto" for colour if the images have it, or "grey".

        Raises:
            PipelineError: there are no training images.
        """
        paths = self.images("train")
        some = [paths[i] for i in np.linspace(0, len(paths) - 1, LOOKED_AT).astype(int)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = [one for one in pool.map(_look_at, dict.fromkeys(some)) if one is not None]
        coloured = sum(one.coloured for one in looks) > COLOURED_SHARE * len(looks)
        height, width = image_size
        usual = np.median([one.aspect for one in looks]) if looks else width / height
        if abs(math.log(usual * height / width)) > math.log(SAME_SHAPE):
            tall = round(math.sqrt(height * width / usual) / 32) * 32
            wide = round(math.sqrt(height * width * usual) / 32) * 32
            log.info(
                "The images are %.2f times as wide as high and get borders to fill %d x %d. "
                "image_size: [%d, %d] in src/config.yaml would lose less detail",
                *(usual, width, height, max(tall, 32), max(wide, 32)),
            )
        return ImageFormat(height, width, 3 if color == "auto" and coloured else 1)

    def examples(
        self, configured: InferenceExamples, say: Callable[[str], None]
    ) -> tuple[Path, Path]:
        """Return a defective and a good image to try a model on.

        Args:
            configured: the wanted images; the first of the class in `test` replaces a missing one.
            say: is called with a sentence for each missing one.

        Raises:
            PipelineError: the class folder in `test` is missing or empty.
        """

        def example(name: str, class_name: str) -> Path:
            wanted = self.path / name
            if wanted.is_file():
                return wanted
            instead = _images(self.path / "test" / class_name)[0]
            say(f"{wanted} does not exist, running {instead} instead")
            return instead

        return (
            example(configured.defective_image, "def_front"),
            example(configured.ok_image, "ok_front"),
        )

    def relative(self, path: Path) -> str:
        """Return a path as it is named in `split.csv` and everywhere else: from this folder."""
        return path.relative_to(self.path).as_posix()


@dataclass(frozen=True)
class _Look:
    """What the choice of a format needs to know of an image."""

    aspect: float  # width by height
    coloured: bool


def _look_at(path: Path) -> _Look | None:
    """Look at a small copy of an image; None if it cannot be decoded."""
    try:
        pixels = preprocessing.decode_within(path, 128, channels=3).astype(int)
    except UnreadableImage:
        return None
    colour = pixels.max(-1) - pixels.min(-1) > COLOURFUL
    return _Look(pixels.shape[1] / pixels.shape[0], bool(colour.mean() > COLOURED_PIXELS))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PipelineError(f"{folder} does not exist. See data/README.md, or run 'make sample'")
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = sorted(path for path in entries if preprocessing.is_image(path.name) and path.is_file())
    if not found:
        raise PipelineError(
            f"{folder} holds no images. Put .jpeg, .jpg or .png files there, or run 'make sample'"
        )
    ignored = len(entries) - len(found)
    if ignored:
        log.warning("%s: %d entries that are not .jpeg, .jpg or .png are ignored", folder, ignored)
    return found
