"""A data folder: which images it has, on which side of the split, under which label."""

import logging
import math
import os
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path, PurePosixPath

import numpy as np

from defect_detection import PipelineError
from defect_detection.atomic import read_mapping
from defect_detection.names import is_utf8
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES, NEGATIVE, POSITIVE
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage
from defect_detection.settings import Color, Config, InferenceExamples, from_root

log = logging.getLogger(__name__)

LOOKED_AT = 256  # images, to choose the format
# An image has colour if more than this share of its pixels has channels that are further apart
# than this many grey levels; the images of a folder have it if more than this share has.
COLOURFUL, COLOURED_PIXELS, COLOURED_SHARE = 24, 0.001, 0.02
SAME_SHAPE = 1.25  # ratio of two aspects up to which borders are not worth a word

SIDES = ("train", "test")
SPLIT_FILE = "split.csv"  # says which image is on which side, whatever folder it lies in
GROUPS_FILE = "groups.csv"  # says which photograph each image comes from
# Folders of labels that people at the line gave: those that wait, and those that were approved.
INBOX, FIELD = "inbox", "field"


@dataclass(frozen=True)
class DataFolder:
    """A folder that is laid out as data/README.md describes.

    Attributes:
        path: absolute; holds `train` and `test`, each with a folder for each class, or only the
            class folders.
        cache: folder of decoded images and of the photographs that were found.
        classes: names of the folders of each class, whatever their case.
        configured: options that name the configuration, for calls in messages.
        most_pixels: that an image may have, for models that are trained on this folder.
    """

    path: Path
    cache: Path
    classes: Mapping[str, Sequence[str]] = field(default_factory=lambda: {n: [n] for n in CLASSES})
    configured: tuple[str, ...] = ()
    most_pixels: int = MOST_PIXELS

    @classmethod
    def choose(
        cls,
        options: Namespace,
        env: Mapping[str, str],
        config: Config,
        default: str = "",
    ) -> "DataFolder":
        """Choose the folder: the option `--data`, the variable DATA_PATH, the configuration.

        The option counts from the working directory, as a shell completes it; the others count
        from the project's root.

        Args:
            options: `--data` and `--config` as they were given.
            env: the environment.
            config: names the folder, the cache and the class folders, and the most pixels.
            default: another default folder than that of `config`.

        Raises:
            PipelineError: the folder does not exist, or its name is not UTF-8.
        """
        path = (
            Path(options.data)
            if options.data
            else from_root(env.get("DATA_PATH", default or config.paths.data_path))
        )
        if not path.is_dir():
            raise PipelineError(
                f"{path} is not a folder. Name one with --data or DATA_PATH, or run 'make sample'"
            )
        if not is_utf8(str(path.resolve())):
            raise PipelineError(f"{path}: its name is not UTF-8, which MLflow needs. Rename it")
        classes = {POSITIVE: config.classes.defect, NEGATIVE: config.classes.ok}
        configured = ("--config", options.config) if options.config else ()
        cache, most_pixels = from_root(config.paths.cache), config.model_parameters.most_pixels
        return cls(path.resolve(), cache, classes, configured, most_pixels)

    def command(self, script: str, *more: str) -> str:
        """Return how to call a script with this folder."""
        return shlex.join(["python", script, "--data", str(self), *self.configured, *more])

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
    def flat(self) -> bool:
        """Whether the class folders lie here and not in `train` and `test`."""
        return not any((self.path / side).is_dir() for side in SIDES)

    @property
    def sides(self) -> list[str]:
        """The folders that hold class folders: those of `SIDES` that are here, else this one."""
        return [""] if self.flat else [side for side in SIDES if (self.path / side).is_dir()]

    def class_of(self, name: str) -> str:
        """Return the class of an image, a name of `CLASSES`, by its path from this folder."""
        parts = PurePosixPath(name).parts
        if parts[0] == FIELD:
            return parts[1]
        found = self._class_named(parts[0 if self.flat else 1])
        assert found is not None, f"{name} lies in no class folder"
        return found

    def _class_named(self, folder: str) -> str | None:
        """Return the class of a folder by its name, None if it is no class folder."""
        for name, names in self.classes.items():
            if folder.lower() in (one.lower() for one in names):
                return name
        return None

    def class_folders(self, side: str) -> dict[str, list[Path]]:
        """Return the folders of each class in the folder of a side, "" for this one.

        Raises:
            PipelineError: good parts have none. Defects may have none: a model can learn from good
                parts alone.
        """
        root = self.path / side
        below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {name: [p for p in below if self._class_named(p.name) == name] for name in CLASSES}
        known_others = (INBOX, FIELD) if not side else ()
        others = [
            p.name
            for p in below
            if self._class_named(p.name) is None and p.name not in known_others
        ]
        for name, folders in found.items():
            if not folders and name == NEGATIVE:
                known = ", ".join(self.classes[name])
                raise PipelineError(
                    f"{root} holds no folder of {name}: none is named {known}. There are: "
                    f"{', '.join(p.name for p in below) or 'none'}. Add its name to classes in "
                    f"src/config.yaml, see data/README.md, or run 'make sample'"
                )
        if others:
            _warn(f"{root}: {', '.join(others)} are no class folders and are ignored")
        loose = sum(preprocessing.is_image(p.name) for p in root.iterdir() if p.is_file())
        if loose:
            _warn(f"{root}: {loose} images lie in no class folder and are ignored")
        return found

    def images(self, side: str) -> list[Path]:
        """Return the images of a side, sorted by class, then path.

        They lie in the class folders of `<side>`, unless `split.csv` says otherwise.

        Raises:
            PipelineError: a class folder is missing or empty, `split.csv` lacks an image, or there
                are neither sides nor `split.csv`.
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
                    f"'{self.command('src/audit.py', '--resplit', '0.2')}' again, or delete the "
                    f"file"
                )
            if named[name] == side:
                found.append(path)
        return self.by_class(found)

    def by_class(self, paths: list[Path]) -> list[Path]:
        """Return images sorted by class, otherwise in their order."""
        return sorted(paths, key=lambda path: CLASSES.index(self.class_of(self.relative(path))))

    def images_in(self, side: str) -> list[Path]:
        """Return the images in the folder of a side, "" for this one, sorted by class, then path.

        Raises:
            PipelineError: a class folder is missing or empty.
        """
        if side:
            self._name_other_folders()
        if not (self.path / side).is_dir():
            raise PipelineError(
                f"{self.path / side} does not exist. See data/README.md, or run 'make sample'"
            )
        return [
            path
            for name, folders in self.class_folders(side).items()
            for path in _images(folders, optional=name == POSITIVE)
        ]

    def _name_other_folders(self) -> None:
        """Say which folders lie beside `train` and `test`."""
        known = (*SIDES, INBOX, FIELD)
        beside = (p.name for p in self.path.iterdir() if p.is_dir() and p.name not in known)
        others = sorted(name for name in beside if not name.startswith((".", "_")))
        if others:
            _warn(f"{self.path}: {', '.join(others)} are neither train nor test and are ignored")

    def describe(self, counts: Mapping[str, int]) -> str:
        """Return counts of the classes in words, with the names of their folders."""
        said = []
        for name in CLASSES:
            folders = {p.name for side in self.sides for p in self.class_folders(side)[name]}
            other = "" if folders == {name} else f" (in {', '.join(sorted(folders))})"
            said.append(f"{counts[name]} {name}{other}")
        return ", ".join(said)

    def image_format(self, image_size: tuple[int, int], color: Color) -> ImageFormat:
        """Choose the pixels that a model for the training images takes.

        Args:
            image_size: height and width in pixels.
            color: "auto" for colour if the images have it, or "grey".

        Raises:
            PipelineError: there are no training images.
        """
        paths = self.images_in("") if self.flat else self.images("train")
        if not paths:
            raise PipelineError(f"{self.split_file} names no training image. Delete it")
        some = [paths[i] for i in np.linspace(0, len(paths) - 1, LOOKED_AT).astype(int)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looked = pool.map(partial(_look_at, most_pixels=self.most_pixels), dict.fromkeys(some))
            looks = [one for one in looked if one is not None]
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
        bits = max((one.bits for one in looks if one.bits is not None), default=16)
        channels = 3 if color == "auto" and coloured else 1
        return ImageFormat(height, width, channels, bits=bits, most_pixels=self.most_pixels)

    def examples(
        self, configured: InferenceExamples, say: Callable[[str], None]
    ) -> tuple[Path, Path]:
        """Return a defective and a good image to try a model on.

        Args:
            configured: the wanted images; the first of the class in `test` replaces a missing one.
            say: is called with a sentence for each missing one.

        Raises:
            PipelineError: a class folder is missing or empty.
        """
        images = self.images_in("") if self.flat else self.images("test")

        def example(name: str, class_name: str) -> Path:
            wanted = self.path / name
            if wanted.is_file():
                return wanted
            of_class = (p for p in images if self.class_of(self.relative(p)) == class_name)
            instead = next(of_class, images[0])
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
    bits: int | None  # of a grey level, in files with two bytes for it


def _look_at(path: Path, most_pixels: int) -> _Look | None:
    """Look at a small copy of an image; None if it cannot be decoded."""
    try:
        content = preprocessing.read_file(path)
        bits = preprocessing.bits_of(content, most_pixels)
        pixels = preprocessing.decode_within(content, 128, 3, bits, most_pixels).astype(int)
    except UnreadableImage:
        return None
    colour = pixels.max(-1) - pixels.min(-1) > COLOURFUL
    return _Look(pixels.shape[1] / pixels.shape[0], bool(colour.mean() > COLOURED_PIXELS), bits)


def _images(folders: list[Path], optional: bool) -> list[Path]:
    """Return the images in folders and all below them, and name what else is there.

    Raises:
        PipelineError: there are none, and they are not `optional`.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    for folder in folders:
        for path in map(Path, preprocessing.files_below(str(folder))):
            if preprocessing.is_image(path.name):
                found.append(path)
            else:
                others[path.suffix.lower() or path.name] += 1
    where = ", ".join(map(str, folders))
    if others:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        _warn(f"{where}: not read: {counted}")
    if not found and not optional:
        raise PipelineError(
            f"{where} holds no images. Put {', '.join(preprocessing.SUFFIXES)} files there, or "
            f"run 'make sample'"
        )
    return found


@cache
def _warn(message: str) -> None:
    """Log a warning once, however often a folder is looked through."""
    log.warning(message)
