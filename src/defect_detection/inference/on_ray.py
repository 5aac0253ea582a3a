"""Judges images on a Ray cluster: one LiteRT model on each core, rows into Parquet files.

Each file is written when its images are judged, so that an interrupted run is resumed.
"""

import logging
import math
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow
import ray
from pyarrow import compute, fs, parquet

from defect_detection import PipelineError, cluster
from defect_detection.inference.judge import CHUNK, Item, NamedModel, judge
from defect_detection.inference.rows import Row
from defect_detection.inference.sources import names_image, reason, unreadable
from defect_detection.names import first_line
from defect_detection.runtime.preprocessing import MOST_BYTES, UnreadableImage

log = logging.getLogger(__name__)

FILE_OF = 256  # images, whose rows become a file
SCHEMA = pyarrow.schema(
    [
        ("path", pyarrow.string()),
        ("verdict", pyarrow.string()),
        ("probability", pyarrow.float64()),
        ("review", pyarrow.bool_()),
        ("reason", pyarrow.string()),
        ("model", pyarrow.string()),
    ]
)
assert SCHEMA.names == [field.name for field in fields(Row)]


class Place:
    """A folder of this machine, which the cluster shares, or of a bucket.

    Attributes:
        uri: as it was named.
        path: in its file system.
    """

    def __init__(self, uri: str):
        """Name a folder, or a bucket and a prefix as s3://bucket/prefix.

        Raises:
            PipelineError: no file system has such URIs.
        """
        self.uri = uri
        try:
            self.system, self.path = _opened(uri)
        except (pyarrow.ArrowInvalid, ValueError) as error:
            raise PipelineError(f"{uri} is no folder and no s3://bucket/prefix") from error

    def files(self) -> Iterator[str]:
        """Yield the paths of the files in the folder and below it, but for hidden ones.

        Raises:
            PipelineError: it cannot be listed.
        """
        try:
            found = self.system.get_file_info(fs.FileSelector(self.path, recursive=True))
        except OSError as error:
            raise PipelineError(f"{self.uri} cannot be listed ({first_line(error)})") from error
        for one in sorted(found, key=lambda info: info.path):
            below = posixpath.relpath(one.path, self.path)
            if one.is_file and not any(part.startswith(".") for part in below.split("/")):
                yield one.path

    def named(self, path: str) -> str:
        """Return the path of a file as a row names it, as the folder was named."""
        return posixpath.join(self.uri.rstrip("/"), posixpath.relpath(path, self.path))


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).resolve())
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ValueError(uri)
    # Only the bucket is a URI to Arrow: a prefix may hold spaces and what is to be escaped.
    system, path = fs.FileSystem.from_uri(f"s3://{bucket}")
    return system, f"{path}/{prefix}".rstrip("/")


class Judging:
    """What a process of the cluster does: it judges images with a model of its own."""

    def __init__(self, name: str, files: dict[str, bytes]):
        """Load a model by its name in the rows and the contents of its files."""
        with tempfile.TemporaryDirectory() as folder:
            for path, content in files.items():
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            self._model = NamedModel.load(name, folder)
        self._systems: dict[str, fs.FileSystem] = {}

    def __call__(self, images: pyarrow.Table) -> pyarrow.Table:
        """Judge images by the URI of their folder, their path and their name; return rows."""
        rows = []
        columns = [images.column(name).to_pylist() for name in ("folder", "file", "path")]
        every = list(zip(*columns, strict=True))
        for start in range(0, len(every), CHUNK):
            items = [
                Item(name, self._read(*where)) for *where, name in every[start : start + CHUNK]
            ]
            rows += [asdict(one.row) for one in judge(self._model, items)]
        return pyarrow.Table.from_pylist(rows, SCHEMA)

    def _read(self, folder: str, file: str) -> bytes | UnreadableImage:
        if (other := unreadable(file)) is not None:
            return other
        if folder not in self._systems:
            self._systems[folder] = _opened(folder)[0]
        try:
            with self._systems[folder].open_input_stream(file) as stream:
                content: bytes = stream.read(MOST_BYTES + 1)
        except OSError as error:
            return reason(error)
        if len(content) > MOST_BYTES:
            return UnreadableImage(f"is larger than {MOST_BYTES / 1e9:g} GB")
        return content


def judge_all(named: Sequence[str], model: NamedModel, folder: Path, out: str) -> Counter[str]:
    """Judge the images of folders on the connected cluster.

    Args:
        named: folders or URIs of them; all machines of the cluster must reach them.
        model: its name stands in the rows.
        folder: of its files on this machine.
        out: folder or URI of the Parquet files; images that it has a row for, and no error, are
            not judged again.

    Returns:
        How many images have which verdict, with those of former runs.

    Raises:
        PipelineError: a folder holds no images, or cannot be read or written.
    """
    target = Place(out)
    images = [
        {"folder": place.uri, "file": file, "path": place.named(file)}
        for place in map(Place, named)
        for file in _images(place)
    ]
    known = _kept(target)
    wanted = [one for one in images if known.get(one["path"], "error") == "error"]
    if "error" in known.values():
        _forget_errors(target)
    if len(wanted) < len(images):
        log.info("%d of %d images have a row", len(images) - len(wanted), len(images))
    if wanted:
        contents = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        if ray.util.client.ray.is_connected():  # Ray Data runs within the cluster only
            within = ray.remote(_run).options(num_cpus=0, max_retries=0)
            ray.get(within.remote(wanted, model.name, contents, target))
        else:
            _run(wanted, model.name, contents, target)
    verdicts = _kept(target)
    lacking = [one["path"] for one in images if one["path"] not in verdicts]
    if lacking:
        raise PipelineError(f"{len(lacking)} images have no row ({lacking[0]}). Run this again")
    return Counter(verdicts[one["path"]] for one in images)


def _images(place: Place) -> list[str]:
    found = list(filter(names_image, place.files()))
    if not found:
        raise PipelineError(f"{place.uri} holds no images")
    return found


def _run(
    images: list[dict[str, str]], name: str, contents: dict[str, bytes], target: Place
) -> None:
    parts = math.ceil(len(images) / FILE_OF)
    workers = max(1, min(sum(cluster.cores()), parts))
    ray.data.DataContext.get_current().enable_progress_bars = False
    judged = ray.data.from_items(images, override_num_blocks=parts).map_batches(
        Judging,
        fn_constructor_args=(name, contents),
        batch_size=FILE_OF,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    # Writing takes no core of its own: all have a model.
    judged.write_parquet(
        target.path, filesystem=target.system, ray_remote_args={"num_cpus": 0}, mode="append"
    )


def _kept(target: Place) -> dict[str, str]:
    """Return the verdicts of former runs by the images' paths; torn files are deleted."""
    found: dict[str, str] = {}
    if target.system.get_file_info(target.path).type == fs.FileType.NotFound:
        return found
    for file in [one for one in target.files() if one.endswith(".parquet")]:
        try:
            rows = parquet.read_table(file, columns=["path", "verdict"], filesystem=target.system)
        except (pyarrow.ArrowInvalid, OSError):
            log.warning("%s was not written completely, and is deleted", target.named(file))
            target.system.delete_file(file)
        else:
            found |= zip(*(column.to_pylist() for column in rows.columns), strict=True)
    return found


def _forget_errors(target: Place) -> None:
    """Delete the rows of images that could not be read, since these are judged again."""
    for file in [one for one in target.files() if one.endswith(".parquet")]:
        rows = parquet.read_table(file, filesystem=target.system)
        good = rows.filter(compute.not_equal(rows["verdict"], "error"))
        if len(good) < len(rows):
            folder, name = posixpath.split(file)
            parquet.write_table(good, f"{folder}/.{name}", filesystem=target.system)
            target.system.move(f"{folder}/.{name}", file)
