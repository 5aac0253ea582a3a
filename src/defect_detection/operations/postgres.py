"""A PostgreSQL of the project's own: a cluster in a folder, reached through a Unix socket only."""

import glob
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

from defect_detection import PipelineError, uris
from defect_detection.names import first_line

log = logging.getLogger(__name__)

NAME = "mlflow"  # of the database and of its owner
# Debian and Ubuntu, Red Hat, Homebrew on Apple silicon, PostgreSQL's own installer.
PLACES = (
    *("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"),
    *("/opt/homebrew/opt/postgresql*/bin", "/Library/PostgreSQL/*/bin"),
)
ACCOUNT = "postgres"  # the user as whom packages run PostgreSQL, which refuses to be root
WAIT = 120  # seconds for a start, which may have to recover from a crash, and for a stop


def with_driver(uri: str) -> str:
    """Return the URI of a database by which SQLAlchemy takes the driver that is installed.

    Raises:
        PipelineError: it is that of a PostgreSQL, and no driver is installed.
    """
    if uri.startswith("postgresql://") and find_spec("psycopg") is None:
        raise PipelineError("PostgreSQL needs its driver: pip install -r requirements-server.txt")
    return uri.replace("postgresql://", "postgresql+psycopg://", 1)


@contextmanager
def for_programs(uri: str) -> Iterator[str]:
    """Yield the URI of a database for PostgreSQL's own programs, with all that it says of TLS.

    The password is in a file for the block, since every user of the machine can read a command
    line.
    """
    bare, user, password = uris.split(uri)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "password"
        file.touch(mode=0o600)
        escaped = password.replace("\\", "\\\\").replace(":", "\\:")
        file.write_text(f"*:*:*:*:{escaped}\n")
        url = sqlalchemy.engine.make_url(uris.joined(bare, user, ""))
        url = url.set(drivername="postgresql").update_query_dict({"passfile": str(file)})
        yield url.render_as_string(hide_password=False)


def program(name: str, version: str = "") -> str:
    """Return the path of one of PostgreSQL's programs.

    Args:
        name: of the program.
        version: the major version that it must have, "" for the newest.

    Raises:
        PipelineError: it is not installed.
    """
    on_path = shutil.which(name)
    found = [os.path.join(one, name) for place in PLACES for one in glob.glob(place)]
    found = [*([on_path] if on_path else []), *filter(os.path.exists, found)]
    by_version = {path: _major(path) for path in dict.fromkeys(found)}
    fitting = [path for path, major in by_version.items() if version in ("", major)]
    if not fitting:
        which = f"PostgreSQL {version}".rstrip()
        raise PipelineError(
            f"{which} is not installed ({name} was not found). Install it ('apt-get install "
            f"postgresql', 'brew install postgresql')"
        )
    return max(fitting, key=lambda path: int(by_version[path] or 0))


def _major(path: str) -> str:
    """Return the major version of a program of PostgreSQL, "" if it does not say."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return next((word.split(".")[0] for word in said.split() if word[0].isdigit()), "")


@dataclass(frozen=True)
class Cluster:
    """A cluster with one database.

    Attributes:
        folder: of its files.
        password: of the database's owner.
    """

    folder: Path
    password: str

    @contextmanager
    def running(self) -> Iterator[str]:
        """Start it for the block, and make it if it is not there; yield the URI of its database.

        A cluster that runs already, since a former server was killed, is used and stopped.

        Raises:
            PipelineError: PostgreSQL is not installed, or does not start.
        """
        if not (self.folder / "PG_VERSION").exists():
            self._make()
        if not self.runs():
            # A path of a socket has at most 103 bytes; PostgreSQL touches it, so that nobody
            # tidies it away.
            socket = Path(tempfile.mkdtemp(prefix="defect-detection-"))
            _give_away(socket)
            self.start(socket)
        try:
            self._create_database()
            yield self.uri
        finally:
            if self.runs():
                socket = self.socket
                self._run("pg_ctl", "stop", "-D", str(self.folder), "-m", "fast", "-t", str(WAIT))
                with suppress(OSError):  # who started it by hand may have chosen a folder with more
                    socket.rmdir()

    def start(self, socket: Path) -> None:
        """Start it; it listens on no address, but in a folder.

        Raises:
            PipelineError: it does not start.
        """
        options = f"-c listen_addresses='' -c unix_socket_directories='{socket}'"
        file = self.folder.parent / "postgres.log"
        file.touch(mode=0o600)
        _give_away(file)
        command = ["pg_ctl", "start", "-D", str(self.folder), "-l", str(file), "-t", str(WAIT)]
        self._run(*command, "-s", "-w", "-o", options)

    def runs(self) -> bool:
        """Return whether it runs."""
        # Its file says so too after its process was killed.
        return self._run("pg_ctl", "status", "-D", str(self.folder), check=False) == 0

    @property
    def socket(self) -> Path:
        """The folder of its socket, also after it was killed.

        Raises:
            PipelineError: it was stopped.
        """
        try:
            return Path((self.folder / "postmaster.pid").read_text().splitlines()[4])
        except (OSError, IndexError) as error:
            raise PipelineError(
                f"The database in {self.folder} does not run. Start it with 'make server'"
            ) from error

    @property
    def uri(self) -> str:
        """The URI of the database.

        Raises:
            PipelineError: the cluster does not run.
        """
        place = f"postgresql:///{NAME}?host={quote(str(self.socket))}"
        return uris.joined(place, NAME, self.password)

    def _make(self) -> None:
        """Make the cluster; one that is not whole is made again at the next call."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder.parent) as beside:
            made, secret = Path(beside) / "postgres", Path(beside) / "password"
            secret.write_text(self.password + "\n")
            _give_away(Path(beside), secret)
            self._run(
                *("initdb", "-D", str(made), "-U", NAME, f"--pwfile={secret}"),
                *("-A", "scram-sha-256", "-E", "UTF8", "--locale=C"),
            )
            made.rename(self.folder)

    def _create_database(self) -> None:
        every = self.uri.replace(f"/{NAME}?", "/postgres?")
        engine = sqlalchemy.create_engine(with_driver(every), isolation_level="AUTOCOMMIT")
        known = sqlalchemy.text(f"SELECT 1 FROM pg_database WHERE datname = '{NAME}'")
        try:
            with engine.connect() as connection:
                if connection.execute(known).first() is None:
                    connection.execute(sqlalchemy.text(f"CREATE DATABASE {NAME}"))
        except sqlalchemy.exc.SQLAlchemyError as error:
            why = first_line(error)
            raise PipelineError(f"The database in {self.folder} cannot be used ({why})") from error
        finally:
            engine.dispose()

    def _command(self, name: str) -> str:
        kept = self.folder / "PG_VERSION"
        return program(name, kept.read_text().strip() if kept.exists() else "")

    def _run(self, name: str, *arguments: str, check: bool = True) -> int:
        """Run a program as the cluster's owner.

        Raises:
            PipelineError: it fails, and `check` is set.
        """
        owner = ACCOUNT if os.geteuid() == 0 else None
        # To files, since a server that it starts would keep a pipe open.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                [self._command(name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                user=owner,
                group=owner,
                cwd="/",
                check=False,
            )
            if done.returncode and check:
                said.seek(0)
                lines = [line for line in said.read().splitlines() if line.strip()]
                why = next((line for line in lines if "error" in line.lower()), (lines or [""])[-1])
                raise PipelineError(
                    f"PostgreSQL: {name} of {self.folder} failed ({why.strip()}). More is in "
                    f"{self.folder.parent / 'postgres.log'}; SERVER_DATABASE names another database"
                )
        return done.returncode


def _give_away(*paths: Path) -> None:
    """Give files to the user as whom PostgreSQL runs, if this process is root."""
    if os.geteuid() != 0:
        return
    try:
        account = pwd.getpwnam(ACCOUNT)
    except KeyError as error:
        raise PipelineError(
            f"PostgreSQL refuses to run as root, and there is no user {ACCOUNT}. Start this as "
            f"another user, or name a database with SERVER_DATABASE"
        ) from error
    for path in paths:
        os.chown(path, account.pw_uid, account.pw_gid)
