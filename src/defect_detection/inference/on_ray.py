"""Judges images on a Ray cluster: one LiteRT model on each core, rows into Parquet files.

Each file is written when its images are judged, so that an interrupted run is resumed. The process
that judged them writes it: for a task that only writes, Ray would start a process each time, which
takes as long as to judge a hundred images.
"""

import hashlib
import logging
import math
import os
import platform
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow
import ray
from pyarrow import fs, parquet

from defect_detection import PipelineError, cluster, locks
from defect_detection.atomic import replace_atomically
from defect_detection.inference.judge import CHUNK, Item, NamedModel, judge
from defect_detection.inference.rows import Row
from defect_detection.inference.sources import names_image, reason, unreadable, walk
from defect_detection.names import first_line
from defect_detection.runtime.preprocessing import MOST_BYTES, UnreadableImage

log = logging.getLogger(__name__)

FILE_OF = 256  # images at most, whose rows become a file
RETRIES = 10  # of the workers, where a bucket does not answer: a minute and a half
PREFIX = "verdicts-"  # of the names of the files; no others are touched
LOCK = ".lock"
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
        system: its file system, None for this machine's.
    """

    def __init__(self, uri: str, keys: Mapping[str, str]):
        """Name a folder, or a bucket and a prefix as s3://bucket/prefix.

        Args:
            uri: of the folder.
            keys: variables AWS_… by which buckets are reached; without, each machine has its own.

        Raises:
            PipelineError: no file system has such URIs, or the bucket is not reached.
        """
        self.uri = uri
        self.system: fs.FileSystem | None = None
        self._access: dict[str, str | None] | None = None  # to a bucket
        scheme, separator, rest = uri.partition("://")
        if not separator:
            self.path = os.path.abspath(uri)
            return
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise PipelineError(f"{uri} is no folder and no s3://bucket/prefix")
        self.path = f"{bucket}/{prefix}".rstrip("/")
        with self.reached("cannot be reached"):
            self._access = _access(bucket, keys)
            self.system = fs.S3FileSystem(**self._access)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"system": None}  # would lose its retries

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reach a bucket again, with more patience: a busy one shall not end hours of work."""
        vars(self).update(state)
        if self._access is not None:
            patience = fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES)
            self.system = fs.S3FileSystem(**self._access, retry_strategy=patience)

    @contextmanager
    def reached(self, what: str) -> Iterator[None]:
        """Turn errors of the block into a PipelineError that begins with the URI and `what`."""
        try:
            yield
        except (OSError, ValueError) as error:  # half a pair of keys is a ValueError
            raise PipelineError(f"{self.uri} {what} ({first_line(error)})") from error

    def files(self, below: bool) -> list[fs.FileInfo]:
        """Return the files in the folder, sorted, but for hidden ones; none if it is not there.

        Args:
            below: whether those in folders below it are among them.

        Raises:
            PipelineError: it cannot be listed.
        """
        with self.reached("cannot be listed"):
            selector = fs.FileSelector(self.path, recursive=below, allow_not_found=True)
            found = sorted(self.opened.get_file_info(selector), key=lambda info: info.path)
        return [one for one in found if one.is_file and not self._is_hidden(one.path)]

    def _is_hidden(self, path: str) -> bool:
        return any(part.startswith(".") for part in self._below(path).split("/"))

    @property
    def opened(self) -> fs.FileSystem:
        """Its file system."""
        return self.system or fs.LocalFileSystem()

    def images(self) -> dict[str, str]:
        """Return the paths of the images in the folder by their names in rows.

        What cannot be searched is among them, so that a row says why. Names in rows are UTF-8; of
        other bytes they have the codes.

        Raises:
            PipelineError: it holds none, or cannot be listed.
        """
        if self.system is None:
            if not os.path.isdir(self.uri):
                raise PipelineError(f"{self.uri} is no folder")
            failed: list[str] = []
            found = [*walk(self.uri, lambda path, _: failed.append(path)), *failed]
            named = {
                os.fsencode(path).decode(errors="backslashreplace"): os.path.abspath(path)
                for path in found
            }
        else:
            paths = [one.path for one in self.files(below=True) if names_image(one.path)]
            named = {posixpath.join(self.uri.rstrip("/"), self._below(one)): one for one in paths}
        if not named:
            raise PipelineError(f"{self.uri} holds no images")
        return named

    def _below(self, path: str) -> str:
        return posixpath.relpath(path, self.path)

    def write(self, name: str, rows: pyarrow.Table) -> None:
        """Write a Parquet file, which others see when it is complete.

        Raises:
            PipelineError: it cannot be written.
        """
        file = posixpath.join(self.path, name)
        with self.reached("cannot be written"):
            if self.system is not None:  # others see no part of a file in a bucket
                parquet.write_table(rows, file, filesystem=self.system)
                return
            with replace_atomically(Path(file)) as temporary:
                parquet.write_table(rows, temporary)

    def require_same(self, call: str) -> None:
        """Raise PipelineError unless this is the folder that the caller holds."""
        if self.system is not None:
            return
        with self.reached("cannot be read"):
            try:
                os.stat(self._mark(call))
            except FileNotFoundError:
                raise PipelineError(
                    f"{self.uri} is another folder there than on the machine that calls. Share "
                    f"one between all machines"
                ) from None

    def _mark(self, call: str) -> Path:
        return Path(self.path) / f".{PREFIX}{call}"

    @contextmanager
    def held(self, call: str) -> Iterator[None]:
        """Make a folder of this machine, and keep other calls from writing there in the block.

        A bucket has no locks and needs none: nobody sees a file there before it is complete, and
        which of several rows is valid is the same for all calls.

        Args:
            call: its name. A hidden file with it shows the workers that it is the same folder.

        Raises:
            PipelineError: another call writes there, or the folder cannot be made.
        """
        if self.system is not None:
            yield
            return
        with self.reached("cannot be written"):
            os.makedirs(self.path, exist_ok=True)
        with ExitStack() as stack:
            with self.reached("cannot be written"):
                lock = locks.held(Path(self.path) / LOCK, make=True, share=True)
                free = stack.enter_context(lock)
            if not free:
                raise PipelineError(f"Another call writes into {self.uri}. Wait until it has ended")
            mark = self._mark(call)
            try:
                with self.reached("cannot be written"):
                    mark.touch()
                yield
            finally:
                # Workers that were killed while they wrote leave files that begin with its name.
                with suppress(OSError):
                    for left in mark.parent.glob(f"{mark.name}*"):
                        left.unlink(missing_ok=True)


def _access(bucket: str, keys: Mapping[str, str]) -> dict[str, str | None]:
    """Return how a bucket is reached: the keys go to the workers, but into no log."""
    named = keys.get("AWS_ENDPOINT_URL_S3", keys.get("AWS_ENDPOINT_URL", ""))
    endpoint = urlsplit(named)
    if named and (endpoint.scheme not in ("http", "https") or not endpoint.netloc):
        raise ValueError(f"AWS_ENDPOINT_URL is {named}: begin it with http:// or https://")
    region = keys.get("AWS_REGION", keys.get("AWS_DEFAULT_REGION"))
    found = {
        "access_key": keys.get("AWS_ACCESS_KEY_ID"),
        "secret_key": keys.get("AWS_SECRET_ACCESS_KEY"),
        "session_token": keys.get("AWS_SESSION_TOKEN"),
    }
    if endpoint.netloc:
        return found | {
            "endpoint_override": endpoint.netloc,
            "scheme": endpoint.scheme,
            "region": region or "us-east-1",
        }
    return found | {"region": region or fs.resolve_s3_region(bucket)}


class Judging:
    """What a process of the cluster does: it judges images with a model of its own."""

    def __init__(
        self, model: str, files: dict[str, bytes], places: Sequence[Place], target: Place, call: str
    ):
        """Load a model.

        Args:
            model: its name in the rows.
            files: contents of its files.
            places: of the images.
            target: of the rows.
            call: its name, which stands in the names of the files.
        """
        with tempfile.TemporaryDirectory() as folder:
            for path, content in files.items():
                file = Path(folder) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            self._model = NamedModel.load(model, folder)
        self._systems = {place.uri: place.system for place in places}
        self._target, self._call = target, call

    def __call__(self, images: pyarrow.Table) -> pyarrow.Table:
        """Judge images by the URI of their folder, their path in bytes and their name.

        Returns:
            No rows; if the images' rows cannot be written, one that says why: of an exception,
            only Ray Data's own message would reach the caller.
        """
        rows = []
        columns = [images.column(name).to_pylist() for name in ("folder", "file", "path")]
        every = list(zip(*columns, strict=True))
        for start in range(0, len(every), CHUNK):
            items = [
                Item(name, self._read(*where)) for *where, name in every[start : start + CHUNK]
            ]
            rows += [asdict(one.row) for one in judge(self._model, items)]
        # After a worker died, Ray gives the same images to another, which replaces the file.
        digest = hashlib.sha256("\0".join(name for *_, name in every).encode()).hexdigest()[:32]
        failed = []
        try:
            self._target.require_same(self._call)
            self._target.write(
                f"{PREFIX}{self._call}-{digest}.parquet", pyarrow.Table.from_pylist(rows, SCHEMA)
            )
        except PipelineError as error:
            failed.append(f"{platform.node()}: {error}")
        return pyarrow.table({"failed": pyarrow.array(failed, pyarrow.string())})

    def _read(self, folder: str, path: bytes) -> bytes | Path | UnreadableImage:
        file = os.fsdecode(path)
        if (other := unreadable(file)) is not None:
            return other
        system = self._systems[folder]
        if system is None:
            return Path(file)
        try:
            with system.open_input_stream(file) as stream:
                content: bytes = stream.read(MOST_BYTES + 1)
        except OSError as error:
            return reason(error)
        if len(content) > MOST_BYTES:
            return UnreadableImage(f"is larger than {MOST_BYTES / 1e9:g} GB")
        return content


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by their paths within."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def judge_all(
    named: Sequence[str], model: NamedModel, folder: Path, out: str, keys: Mapping[str, str]
) -> Counter[str]:
    """Judge the images of folders on the connected cluster.

    Args:
        named: folders or URIs of them; all machines of the cluster must reach them.
        model: its name stands in the rows.
        folder: of its files on this machine.
        out: folder or URI of the Parquet files; images that it has a row for, and no error, are
            not judged again.
        keys: variables AWS_… by which buckets are reached.

    Returns:
        How many images have which verdict, with those of former runs.

    Raises:
        PipelineError: a folder holds no images, or cannot be read or written.
    """
    target, places = Place(out, keys), [Place(one, keys) for one in named]
    images: dict[str, dict[str, str | bytes]] = {
        name: {"folder": place.uri, "file": os.fsencode(file), "path": name}
        for place in places
        for name, file in place.images().items()
    }
    call = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%f")  # later ones are larger
    with target.held(call):
        known = _verdicts(target)
        wanted = [one for name, one in images.items() if known.get(name, "error") == "error"]
        if len(wanted) < len(images):
            log.info("%d of %d images have a row", len(images) - len(wanted), len(images))
        if wanted:
            what = wanted, (model.name, contents(folder), places, target, call)
            if ray.util.client.ray.is_connected():  # Ray Data runs within the cluster only
                within = ray.remote(_run).options(num_cpus=0, max_retries=0)
                ray.get(within.remote(*what))
            else:
                _run(*what)
        verdicts = _verdicts(target)
    lacking = [name for name in images if name not in verdicts]
    if lacking:
        raise PipelineError(f"{len(lacking)} images have no row ({lacking[0]}). Run this again")
    return Counter(verdicts[name] for name in images)


def _run(images: list[dict[str, str | bytes]], judging: tuple[Any, ...]) -> None:
    """Judge images.

    Args:
        images: by URI of the folder, path in bytes and name.
        judging: the arguments of `Judging`.

    Raises:
        PipelineError: rows cannot be written.
    """
    parts = math.ceil(len(images) / FILE_OF)
    workers = max(1, min(sum(cluster.cores()), parts))
    ray.data.DataContext.get_current().enable_progress_bars = False
    judged = ray.data.from_items(images, override_num_blocks=parts).map_batches(
        Judging,
        fn_constructor_args=judging,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    for one in judged.iter_rows():
        raise PipelineError(one["failed"])


@dataclass(frozen=True, order=True)
class _Kept:
    """A row; of several of one image the largest is the valid one.

    It stays the largest when files are rewritten, so that calls which do this at the same time
    leave it.
    """

    is_judged: bool
    file: str
    verdict: str


def _verdicts(target: Place) -> dict[str, str]:
    """Return the verdicts of the rows by the images' names.

    Files that were not written completely are deleted, and rows that another one replaces.
    """
    valid: dict[str, _Kept] = {}
    outdated: set[str] = set()
    for info in target.files(below=False):
        if not info.base_name.startswith(PREFIX):
            continue
        for name, verdict in _rows(target, info.path):
            row = _Kept(verdict != "error", info.path, verdict)
            former = valid.setdefault(name, row)
            valid[name] = max(former, row)
            outdated |= {min(former, row).file} if former is not row else set()
    for file in sorted(outdated):
        _rewrite(target, file, {name for name, row in valid.items() if row.file == file})
    return {name: row.verdict for name, row in valid.items()}


def _rows(target: Place, file: str) -> list[tuple[str, str]]:
    """Return names and verdicts of a file; none if it was not written completely."""
    with target.reached("cannot be read"):
        try:
            opened = parquet.ParquetFile(file, filesystem=target.opened)
        except pyarrow.ArrowInvalid:
            log.warning("%s was not written completely, and is deleted", file)
            target.opened.delete_file(file)
            return []
        with opened:
            rows = opened.read(["path", "verdict"])
    return list(zip(*(rows[name].to_pylist() for name in ("path", "verdict")), strict=True))


def _rewrite(target: Place, file: str, names: set[str]) -> None:
    """Leave the rows of some images in a file only."""
    with target.reached("cannot be written"):
        rows = parquet.read_table(file, filesystem=target.opened)
        kept = rows.filter(pyarrow.array([name in names for name in rows["path"].to_pylist()]))
        if len(kept):
            target.write(posixpath.basename(file), kept)
        else:
            target.opened.delete_file(file)
