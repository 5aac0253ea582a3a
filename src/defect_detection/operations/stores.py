"""MLflow's tables and artifacts: copied whole, from one place to another.

MLflow keeps URIs of artifacts in its tables; they are changed to the new place.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import mlflow.store.artifact.artifact_repository_registry as repositories
import sqlalchemy
from mlflow.store.db import utils
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import Connection, Engine, MetaData, Table

from defect_detection import PipelineError, uris
from defect_detection.operations.postgres import with_driver
from defect_detection.registry import store

ROWS = 1000  # that are copied at a time
# The columns in which MLflow keeps where artifacts are.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
KEPT = ("alembic_version", "alembic_version_auth")  # tables that a new store has already
# Tables that hold what users have logged; a new store has none of it.
FILLED = ("runs", "registered_models", "logged_models")


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite database as it is at one moment, while others write to it.

    Raises:
        PipelineError: it cannot be read, or is damaged.
    """
    try:
        uri = f"file:{quote(str(source))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=store.LOCKED_SECONDS)) as read:
            with closing(sqlite3.connect(target)) as written:
                # All pages at once: a writer between two steps would make it begin anew.
                read.backup(written)
                (found,) = written.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
    except sqlite3.Error as error:
        raise PipelineError(f"{source}: cannot be copied ({error})") from error


@contextmanager
def opened(uri: str) -> Iterator[Engine]:
    """Open the tables of a store for the block; they are made, or brought to this MLflow's form."""
    with read(uri) as engine:
        if not utils._all_tables_exist(engine):
            utils._initialize_tables(engine)
        utils._upgrade_db(engine)
        yield engine


@contextmanager
def read(uri: str) -> Iterator[Engine]:
    """Open the tables of a store as they are for the block.

    Raises:
        PipelineError: the database does not answer, or refuses something.
    """
    engine = utils.create_sqlalchemy_engine(with_driver(uri))
    try:
        yield engine
    except sqlalchemy.exc.SQLAlchemyError as error:
        shown = uris.without_password(uri)
        raise PipelineError(f"{shown} cannot be used ({store.first_line(error, uri)})") from error
    finally:
        engine.dispose()


def is_filled(engine: Engine) -> bool:
    """Return whether somebody has logged something to a store."""
    tables = _schema(engine).tables
    with engine.connect() as connection:
        return any(
            connection.execute(sqlalchemy.select(tables[name]).limit(1)).first() for name in FILLED
        )


@dataclass(frozen=True)
class Relocation:
    """Where artifacts are and where they are copied to.

    Attributes:
        before: URI or path of the folder, as MLflow's tables have it.
        after: URI of the new folder.
    """

    before: str
    after: str

    def moved(self, uri: str) -> str | None:
        """Return the new URI of what lies there, None if it does not."""
        for before in {self.before, _as_path(self.before)}:
            if uri == before or uri.startswith(before.rstrip("/") + "/"):
                return self.after.rstrip("/") + uri[len(before.rstrip("/")) :]
        return None


def local_places(engine: Engine) -> list[str]:
    """Return the local folders in which a store's artifacts are, none of them within another.

    Raises:
        PipelineError: the database holds no store of MLflow.
    """
    tables = _schema(engine).tables
    if not {name for name, _ in LOCATIONS} <= set(tables):
        raise PipelineError(f"{engine.url.database} holds no store of MLflow. Nothing was copied")
    found: set[str] = set()
    with engine.connect() as connection:
        for name, column in LOCATIONS[:3]:
            for uri in _column(tables[name].c[column], connection):
                if is_local(uri) and not any(_within(uri, one) for one in found):
                    found = {one for one in found if not _within(one, uri)} | {uri}
    return sorted(found)


def is_local(uri: str) -> bool:
    """Return whether artifacts are in a folder of this machine."""
    return uri.startswith("file:") or "://" not in uri and not uri.startswith("mlflow-artifacts:")


def folder_of(uri: str, root: Path) -> Path:
    """Return the folder of a local URI; a relative one counts from `root`."""
    return root / local_file_uri_to_path(uri)


def _within(uri: str, folder: str) -> bool:
    return Relocation(folder, "").moved(uri) is not None


def _as_path(uri: str) -> str:
    return local_file_uri_to_path(uri) if uri.startswith("file:") else uri


def move(connection: Connection, places: Sequence[Relocation]) -> None:
    """Change the URIs of artifacts in a store's tables."""
    tables = _schema(connection).tables
    for name, column in LOCATIONS:
        cell = tables[name].c[column]
        for uri in _column(cell, connection):
            after = next(filter(None, (place.moved(uri) for place in places)), None)
            if after is not None:
                change = tables[name].update().where(cell == uri).values({column: after})
                connection.execute(change)


def _column(cell: sqlalchemy.Column[str], connection: Connection) -> list[str]:
    """Return the values of a column, each once."""
    query = sqlalchemy.select(cell).where(cell.is_not(None)).distinct()
    return list(connection.execute(query).scalars())


def copy_tables(source: Engine, target: Engine, places: Sequence[Relocation]) -> dict[str, int]:
    """Copy all rows of a store into one that has none, in one transaction.

    Args:
        source: read only.
        target: what MLflow puts into a new store is replaced.
        places: where artifacts are from now on.

    Returns:
        The number of rows of each table.

    Raises:
        PipelineError: the tables of the two are not the same.
    """
    schema, known = _schema(target), _schema(source).tables
    lacking = set(known) - set(schema.tables) - set(KEPT)
    if lacking:
        raise PipelineError(f"The new store has no table {sorted(lacking)[0]}. Use one MLflow")
    # Those that are referred to come first.
    every = [one for one in schema.sorted_tables if one.name in known and one.name not in KEPT]
    counts = {}
    with source.connect() as read, target.begin() as written:
        for table in reversed(every):
            written.execute(table.delete())
        for table in every:
            counts[table.name] = _copy(table, read, written)
            _go_on_counting(table, written)
        move(written, places)
        for table in every:
            query = sqlalchemy.select(sqlalchemy.func.count()).select_from(table)
            if written.execute(query).scalar() != counts[table.name]:
                raise PipelineError(f"Not all rows of {table.name} could be copied")
    return counts


def _copy(table: Table, read: Connection, written: Connection) -> int:
    count = 0
    # The target's types, so that SQLite's 0 and 1 become booleans.
    for rows in read.execution_options(yield_per=ROWS).execute(table.select()).partitions(ROWS):
        written.execute(table.insert(), [dict(row._mapping) for row in rows])
        count += len(rows)
    return count


def _go_on_counting(table: Table, written: Connection) -> None:
    """Let PostgreSQL's counters go on after the numbers that were copied."""
    if written.dialect.name != "postgresql":
        return
    for column in table.columns:
        default = getattr(column.server_default, "arg", "")
        if "nextval" in str(default):
            written.execute(
                sqlalchemy.text(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), "
                    f"COALESCE(MAX({column.name}), 1), MAX({column.name}) IS NOT NULL) "
                    f"FROM {table.name}"
                )
            )


def _schema(bind: Engine | Connection) -> MetaData:
    metadata = MetaData()
    metadata.reflect(bind)
    return metadata


def upload(folder: Path, destination: str, below: str) -> tuple[int, int]:
    """Copy a folder of artifacts to where a server keeps them.

    Args:
        folder: of artifacts; one that is not there has none.
        destination: URI or folder of the server's artifacts.
        below: folder in it.

    Returns:
        How many files, and bytes.

    Raises:
        PipelineError: the destination does not take them.
    """
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if files:
        try:
            repositories.get_artifact_repository(destination).log_artifacts(str(folder), below)
        except Exception as error:  # each kind of destination has a library with errors of its own
            shown = uris.without_password(destination)
            raise PipelineError(
                f"{shown} takes no artifacts ({store.first_line(error, destination)})"
            ) from error
    return len(files), sum(path.stat().st_size for path in files)
