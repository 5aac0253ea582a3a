"""The file of the verdict log: its schema, and how it is opened by several processes at once."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

FILE = "verdicts.sqlite"
VERSION = 1  # of the schema
LOCKED = 1.0  # seconds that a write waits for another process

SCHEMA = """
CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,               -- seconds since 1970
    source TEXT NOT NULL,           -- predict, camera or watch
    name TEXT NOT NULL,             -- of the image's file
    path TEXT,                      -- of a watched file
    part TEXT NOT NULL,             -- its id, "" if the name has none
    verdict TEXT NOT NULL,          -- defect, ok, unknown, error
    probability REAL,
    threshold REAL NOT NULL,
    review INTEGER NOT NULL,        -- whether a person should look
    reason TEXT NOT NULL,
    model TEXT NOT NULL,            -- registered model and version
    milliseconds REAL NOT NULL,     -- to decode and judge
    sha256 TEXT NOT NULL,           -- of the image's file
    written INTEGER,                -- a watched file's time of change in nanoseconds
    waits TEXT NOT NULL,            -- why a person looks: band, unknown, error, audit or ""
    settled INTEGER NOT NULL        -- whether one has
);
CREATE UNIQUE INDEX once ON verdicts (path, written, sha256) WHERE path IS NOT NULL;
CREATE INDEX waiting ON verdicts (id) WHERE waits != '' AND NOT settled;
CREATE INDEX by_reason ON verdicts (waits) WHERE waits != '' AND NOT settled;
CREATE INDEX by_time ON verdicts (at);
CREATE TABLE views (                -- small enough to be kept for every verdict
    id INTEGER PRIMARY KEY,
    thumbnail BLOB,
    evidence BLOB, height INTEGER, width INTEGER,  -- bytes, of the size of the map
    aspect REAL                     -- width by height of what the model took with borders
);
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    wanted INTEGER NOT NULL,        -- whether it is kept for a person
    content BLOB NOT NULL
);
CREATE INDEX by_wanted ON images (wanted, id);
CREATE TABLE totals (               -- since the file was made
    source TEXT, verdict TEXT, count INTEGER NOT NULL, PRIMARY KEY (source, verdict)
) WITHOUT ROWID;
CREATE TABLE kept (bytes INTEGER NOT NULL);
INSERT INTO kept VALUES (0);
CREATE TRIGGER image_added AFTER INSERT ON images
    BEGIN UPDATE kept SET bytes = bytes + length(NEW.content); END;
CREATE TRIGGER image_deleted AFTER DELETE ON images
    BEGIN UPDATE kept SET bytes = bytes - length(OLD.content); END;
"""


class OtherSchema(Exception):
    """The file was written by a newer version of this project."""


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write all that the block writes, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def connect(file: Path, seconds: float | None = None) -> sqlite3.Connection:
    """Open the file for writing; make it if it is not there.

    Args:
        file: of the log.
        seconds: that a write waits for another process; None for `LOCKED`.

    Raises:
        sqlite3.Error, OSError: it cannot be opened or made.
        OtherSchema: a newer version of this project wrote it.
    """
    seconds = LOCKED if seconds is None else seconds
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        file, timeout=seconds, isolation_level=None, check_same_thread=False
    )
    try:
        _use_wal(connection, seconds)
        connection.execute("PRAGMA synchronous = NORMAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise OtherSchema(f"its schema is {version}, this project knows {VERSION}")
        if version < VERSION:
            _make(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def identity(file: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, None if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _use_wal(connection: sqlite3.Connection, seconds: float) -> None:
    """Let readers and a writer work at a time; SQLite itself does not wait for that change."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _make(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        # Another process may have made it meanwhile.
        if connection.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            return
        statement = ""
        for line in SCHEMA.splitlines():
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                connection.execute(statement)
                statement = ""
        connection.execute(f"PRAGMA user_version = {VERSION}")
