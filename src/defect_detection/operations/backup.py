"""A backup of everything that cannot be made again, and its way back into an empty folder.

It is taken while everything runs: first what MLflow lacks is copied, then databases as they are at
one moment, then the files that they name, which are never changed.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sqlalchemy

from defect_detection import PipelineError, uris
from defect_detection.atomic import replace_atomically
from defect_detection.dataset.folder import FIELD, INBOX
from defect_detection.dataset.inbox import Inbox
from defect_detection.operations import postgres, stores, tracking_server
from defect_detection.operations.stores import Relocation
from defect_detection.operations.tracking_server import SECRETS, ServerPlan
from defect_detection.pipeline import delivery
from defect_detection.registry import runs, store
from defect_detection.runtime.preprocessing import files_below

log = logging.getLogger(__name__)

MANIFEST, FORMAT = "manifest.json", 1
COMPANIONS = ("-wal", "-shm", "-journal")  # of a SQLite file; a copy needs none
CHUNK = 1 << 20
DAY = 86400  # seconds
BEST_MODEL = "best_model.json"
CONFIGURATION = ("src/config.yaml", "re_train/re_train.yaml", ".env", ".env.local")


@dataclass(frozen=True)
class Locations:
    """Where everything is that is backed up; what is not there is left out.

    Attributes:
        root: of the project.
        store: URI of the tracking store.
        data: the data folder, of which labels and approved images are kept.
        line: of the verdict log and the log of changes.
        jobs: of retrainings.
        cache: of which trainings are kept that MLflow lacks.
        best_model: the file that names the best model.
        server: the team's server, if it is on this machine.
    """

    root: Path
    store: str
    data: Path
    line: Path
    jobs: Path
    cache: Path
    best_model: Path
    server: ServerPlan

    def parts(self) -> dict[str, Path]:
        """Return what is copied file by file, by its name in a backup."""
        named = {f"configuration/{name}": self.root / name for name in CONFIGURATION}
        named |= {f"data/{file.name}": file for file in sorted(self.data.glob("*.csv"))}
        named |= {f"data/{name}": self.data / name for name in (INBOX, FIELD)}
        return named | {
            "line": self.line,
            "jobs": self.jobs,
            delivery.FOLDER: self.cache / delivery.FOLDER,
            BEST_MODEL: self.best_model,
        }


@dataclass
class Backup:
    """A backup that is being made.

    Attributes:
        folder: of it.
        files: SHA-256 of each file, by its path in the folder.
        places: where the artifacts of the sqlite store were.
        left_out: what is not in it, and why.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    places: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, source: Path, name: str) -> None:
        """Copy a file or a folder; what is deleted meanwhile is left out."""
        for file in _files(source):
            below = name if file == source else f"{name}/{file.relative_to(source)}"
            target = self.folder / below
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                if _is_sqlite(file):
                    stores.copy_sqlite(file, target)
                else:
                    shutil.copyfile(file, target)
                shutil.copymode(file, target)
                self.files[below] = _sha256(target)

    def note(self, name: str) -> None:
        """Note a file that was written into the folder."""
        self.files[name] = _sha256(self.folder / name)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def make(here: Locations, to: Path) -> Backup:
    """Make a backup below a folder, in one of its own that is named by the time.

    It has another name as long as it is not whole.

    Raises:
        PipelineError: something cannot be read, or the folder cannot be written.
    """
    now = datetime.now(timezone.utc)
    folder = to / f"{now:%Y%m%dT%H%M%SZ}"
    try:
        to.mkdir(parents=True, exist_ok=True)
        _delete_partial(to)
        # Only its owner can read it: it holds passwords.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=to))
    except OSError as error:
        raise PipelineError(f"{to}: no backup can be made there ({error})") from error
    try:
        backup = Backup(partial)
        parts = here.parts()
        # What MLflow gets in the meantime is in both, and does no harm there. The best model is
        # named when MLflow has it, so the store that is copied later has it too.
        for name in (delivery.FOLDER, BEST_MODEL):
            backup.add(parts.pop(name), name)
        _add_store(backup, here)
        _add_server(backup, here.server)
        for name, source in parts.items():
            inbox = Inbox(here.data) if name == f"data/{INBOX}" and source.is_dir() else None
            with inbox.at_rest() if inbox is not None else nullcontext():
                backup.add(source, name)
        _write_manifest(backup, here, now)
        partial.rename(folder)
    except OSError as error:
        raise PipelineError(
            f"{error.filename or to}: {error.strerror}. No backup was made"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    backup.folder = folder
    return backup


def _delete_partial(to: Path) -> None:
    """Delete what backups left there that were killed a day ago or longer."""
    for one in to.glob(".*.partial"):
        if time.time() - one.stat().st_mtime > DAY:
            log.warning("%s was left by a backup that was killed, and is deleted", one)
            shutil.rmtree(one, ignore_errors=True)


def _add_store(backup: Backup, here: Locations) -> None:
    """Copy a sqlite store, then its artifacts, which were there before it named them."""
    if not here.store.startswith(uris.SQLITE):
        shown = uris.without_password(here.store)
        if here.store.startswith("file:"):
            raise PipelineError(
                f"The store {shown} is a folder, which has no state at one moment. Use "
                f"sqlite:///mlflow.db, or copy the folder while nothing runs"
            )
        if not _runs_here(here.server, here.store):
            backup.left_out.append(f"the store {shown}: run this on its machine too")
        return
    source = Path(here.store.removeprefix(uris.SQLITE))
    if not source.exists():
        backup.left_out.append(f"the store {here.store}, which does not exist")
        return
    if not _is_sqlite(source):
        raise PipelineError(f"{source} is no SQLite database. Restore it from an older backup")
    backup.add(source, "store/mlflow.db")
    with stores.read(f"{uris.SQLITE}{backup.folder / 'store/mlflow.db'}") as engine:
        places = stores.local_places(engine)
    for number, uri in enumerate(places):
        folder = stores.folder_of(uri, here.root)
        below = folder.relative_to(here.root) if folder.is_relative_to(here.root) else ""
        backup.places.append({"uri": uri, "to": str(below) or f"mlruns-{number}"})
        backup.add(folder, f"store/artifacts/{number}")


def _runs_here(server: ServerPlan, store: str) -> bool:
    """Return whether a store is the server of this machine, by one of its names."""
    names = server.own_names | {"127.0.0.1", "[::1]"}
    known = {f"http://{name}:{server.port}" for name in names}
    return uris.place(store) in known and (server.folder / SECRETS).exists()


def _add_server(backup: Backup, server: ServerPlan) -> None:
    """Dump the database of the team's server, then copy its artifacts."""
    if not (server.folder / SECRETS).exists():
        return
    backup.add(server.folder / SECRETS, f"server/{SECRETS}")
    uri = server.database
    if not uri:
        uri = tracking_server.cluster(server, tracking_server.Secrets.kept(server.folder)).uri
    _client("pg_dump", uri, ["-Fc", "-f", str(backup.folder / "server/mlflow.dump")])
    backup.note("server/mlflow.dump")
    if "://" in server.artifacts:
        shown = uris.without_password(server.artifacts)
        backup.left_out.append(f"the artifacts in {shown}: copy them with the bucket's own tools")
    else:
        backup.add(Path(server.artifacts), "server/artifacts")


def _client(name: str, uri: str, arguments: list[str]) -> None:
    """Run one of PostgreSQL's clients on a database.

    Raises:
        PipelineError: it fails.
    """
    with postgres.for_programs(uri) as where:
        done = subprocess.run(
            [postgres.program(name), "--no-password", "-d", where, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise PipelineError(f"{name} failed: {uris.scrubbed(lines[0].strip(), uri)}")


def _write_manifest(backup: Backup, here: Locations, now: datetime) -> None:
    known = {
        "format": FORMAT,
        "made_at": now.isoformat(timespec="seconds"),
        "store": uris.name(here.store),
        "places": backup.places,
        "left_out": backup.left_out,
        "files": dict(sorted(backup.files.items())),
    }
    with replace_atomically(backup.folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a backup, having compared all files with their checksums.

    Raises:
        PipelineError: the folder holds no backup, or a file is missing or damaged.
    """
    try:
        known: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        wanted = dict(known["files"])
        newer = known["format"] > FORMAT
    except FileNotFoundError as error:
        raise PipelineError(f"{folder} holds no backup: {MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PipelineError(
            f"{folder / MANIFEST} is damaged ({error}). Take another backup"
        ) from error
    if newer:
        raise PipelineError(f"{folder} was made by a newer version of this project. Use that")
    for name, digest in wanted.items():
        try:
            right = _sha256(folder / name) == digest
        except OSError:
            right = False
        if not right:
            raise PipelineError(
                f"{folder / name} is missing or damaged. Nothing was restored: take another backup"
            )
    return known


def _restore_configuration(folder: Path, root: Path) -> list[str]:
    changed = []
    for name in CONFIGURATION:
        source, target = folder / "configuration" / name, root / name
        if source.exists():
            if not target.exists() or target.read_bytes() != source.read_bytes():
                changed.append(name)
            with replace_atomically(target, private=name == ".env.local") as temporary:
                shutil.copyfile(source, temporary)
    return changed


def _require_empty(folder: Path, known: dict[str, Any], here: Locations) -> None:
    """Raise PipelineError if something is there that a restoration would replace."""
    there = [path for name, path in here.parts().items() if not name.startswith("configuration")]
    there += [here.server.folder / SECRETS, here.server.folder / "postgres"]
    if "://" not in here.server.artifacts:
        there.append(Path(here.server.artifacts))
    if here.store.startswith(uris.SQLITE):
        there.append(Path(here.store.removeprefix(uris.SQLITE)))
        there += [here.root / place["to"] for place in known["places"]]
    own, kept = here.root / ".env.local", folder / "configuration" / ".env.local"
    if kept.exists() and own.exists() and own.read_bytes() != kept.read_bytes():
        there.append(own)
    for path in there:
        if path.is_file() or path.is_dir() and any(_files(path)):
            raise PipelineError(
                f"{path} is there already. Nothing was restored: restore into a new clone, or "
                f"move it away"
            )


def restore(folder: Path, known: dict[str, Any], here: Locations) -> list[str]:
    """Put a backup, whose files were compared, in its place.

    Whatever can be found out beforehand is; the configuration comes last.

    Returns:
        The files of the configuration that were other ones.

    Raises:
        PipelineError: something is there already, cannot be written, or the store is another one.
    """
    _require_empty(folder, known, here)
    if (folder / "store").is_dir() and not here.store.startswith(uris.SQLITE):
        raise PipelineError(
            f"The backup has a sqlite store, and MLFLOW_TRACKING_URI is "
            f"{uris.without_password(here.store)}. Set it as in the backup"
        )
    if (folder / "server").is_dir():
        _require_database(here.server)
    for name, target in here.parts().items():
        if not name.startswith("configuration"):
            _put(folder / name, target)
    # Of data folders, a new clone has none of these.
    for file in (folder / "data").glob("*.csv"):
        _put(file, here.data / file.name)
    if (folder / "server").is_dir():
        _restore_server(folder / "server", here.server)
    if (folder / "store").is_dir():
        _restore_store(folder / "store", known["places"], here)
    delivery.move(here.cache, known["store"], uris.name(here.store), str(here.best_model))
    return _restore_configuration(folder, here.root)


def _require_database(server: ServerPlan) -> None:
    """Raise PipelineError unless PostgreSQL is installed, and a database that is named is empty."""
    for program in ("pg_restore", *(("initdb", "pg_ctl") if not server.database else ())):
        postgres.program(program)
    if server.database:
        with stores.read(server.database) as engine:
            if sqlalchemy.inspect(engine).get_table_names():
                raise PipelineError(
                    f"{uris.without_password(server.database)} is not empty. Nothing was restored: "
                    f"name an empty database with SERVER_DATABASE"
                )


def _restore_store(source: Path, places: list[dict[str, str]], here: Locations) -> None:
    database = Path(here.store.removeprefix(uris.SQLITE))
    moved = []
    for number, place in enumerate(places):
        target = here.root / place["to"]
        _put(source / "artifacts" / str(number), target)
        moved.append(Relocation(place["uri"], target.as_uri()))
    with replace_atomically(database) as temporary:
        shutil.copyfile(source / "mlflow.db", temporary)
        with stores.read(f"{uris.SQLITE}{temporary}") as engine, engine.begin() as connection:
            stores.move(connection, moved)
        _end_what_was_open(f"{uris.SQLITE}{temporary}")


def _end_what_was_open(uri: str) -> None:
    """End what was under way in a store when the backup was made; nobody goes on with it."""
    with store.connected(uri):
        runs.end_all()


def _restore_server(source: Path, server: ServerPlan) -> None:
    _put(source / SECRETS, server.folder / SECRETS)
    if "://" not in server.artifacts:
        _put(source / "artifacts", Path(server.artifacts))
    with tracking_server.own(server) as (_, database):
        options = ["--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
        _client("pg_restore", database, [*options, str(source / "mlflow.dump")])
        _end_what_was_open(postgres.with_driver(database))


def _put(source: Path, target: Path) -> None:
    """Copy a file or a folder, whole or not at all; one that the backup lacks is left out."""
    if source.is_file():
        with replace_atomically(target, private=not source.stat().st_mode & 0o077) as temporary:
            shutil.copyfile(source, temporary)
    elif source.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.restoring")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        if target.is_dir():  # empty
            shutil.copytree(beside, target, dirs_exist_ok=True)
            shutil.rmtree(beside)
        else:
            beside.rename(target)


def _files(source: Path) -> Iterator[Path]:
    """Yield a file, or the files below a folder but for locks and what is being written."""
    every = [source] if source.is_file() else map(Path, files_below(str(source)))
    for file in every:
        if file.name != "lock" and not file.name.endswith(COMPANIONS):
            yield file


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(store.SQLITE_HEAD)) == store.SQLITE_HEAD


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()
