"""A tracking server for a team: MLflow on PostgreSQL, which asks for a user and a password."""

import itertools
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from defect_detection import PipelineError, StoreError, locks, settings, uris
from defect_detection.atomic import replace_atomically
from defect_detection.operations import postgres
from defect_detection.operations.postgres import Cluster
from defect_detection.registry import store

log = logging.getLogger(__name__)

ADMIN = "admin"
START_WITHIN = 180  # seconds, in which MLflow may have to migrate its tables
STOP_WITHIN = 15
LOOK_EVERY = 2  # seconds between two looks at MLflow and the database
SECRETS, LOCK, CHILD = "secrets.json", "lock", "mlflow.pid"
ARTIFACTS = "artifacts"  # below its folder, unless another place is named
AUTH = """\
[mlflow]
# What a user may do with what others made; a user may do everything with what is his own.
default_permission = EDIT
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# A password is compared once a minute, since that takes a tenth of a second.
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Secrets:
    """What nobody else may know.

    Attributes:
        admin_password: of the user `ADMIN`.
        session_key: signs the sessions of browsers.
        database_password: of the owner of the project's own database.
    """

    admin_password: str
    session_key: str
    database_password: str

    @classmethod
    def kept(cls, folder: Path) -> "Secrets":
        """Read them; at the first call make them.

        Raises:
            PipelineError: they cannot be read, or are not as they were written.
        """
        file = folder / SECRETS
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            made = cls(*(secrets.token_urlsafe(24) for _ in range(3)))
            with replace_atomically(file, private=True) as temporary:
                temporary.write_text(json.dumps(asdict(made), indent=1) + "\n")
            return made
        except (OSError, ValueError, TypeError) as error:
            raise PipelineError(
                f"{file} cannot be read ({error}). Restore it from a backup"
            ) from error


@dataclass(frozen=True)
class ServerPlan:
    """How a server is run.

    Attributes:
        folder: of what it keeps.
        host: the address that it listens on.
        port: likewise.
        names: the names by which it is called, beside this machine's and private addresses.
        database: URI of a PostgreSQL database, "" for one of the project's own.
        artifacts: URI or folder of the artifacts.
    """

    folder: Path
    host: str
    port: int
    names: tuple[str, ...]
    database: str
    artifacts: str

    @property
    def own_names(self) -> set[str]:
        """The names by which it is called."""
        return {"localhost", socket.gethostname(), socket.getfqdn(), self.host, *self.names}

    @property
    def address(self) -> str:
        """The URI by which this machine reaches it."""
        here = self.host if self.host not in ("0.0.0.0", "::", "") else "127.0.0.1"
        return f"http://{f'[{here}]' if ':' in here else here}:{self.port}"


def chosen(env: Mapping[str, str]) -> ServerPlan:
    """Return how the server is run, by its variables.

    Raises:
        PipelineError: one has a value that it cannot have.
    """
    folder = settings.from_root(env.get("SERVER_PATH", ".server"))
    port, database = env.get("SERVER_PORT", "5000"), env.get("SERVER_DATABASE", "")
    artifacts = env.get("SERVER_ARTIFACTS", str(folder / ARTIFACTS))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise PipelineError(f"SERVER_PORT is {port}, expected a number from 1 to 65535")
    if database and not database.startswith("postgresql"):
        raise PipelineError(
            f"SERVER_DATABASE is {uris.without_password(database)}, expected such as "
            f"postgresql://mlflow:secret@192.168.0.11/mlflow"
        )
    return ServerPlan(
        folder=folder,
        host=env.get("SERVER_HOST", "0.0.0.0"),
        port=int(port),
        names=tuple(env.get("SERVER_NAMES", "").replace(",", " ").split()),
        database=database,
        artifacts=artifacts if "://" in artifacts else str(settings.from_root(artifacts)),
    )


@contextmanager
def own(plan: ServerPlan) -> Iterator[tuple[Secrets, str]]:
    """Hold the folder of a server for the block; yield its secrets and the URI of its database.

    Raises:
        PipelineError: another server runs there, its database does not start, or one that was
            given does not answer.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    # PostgreSQL, which another user runs if this one is root, must come through.
    plan.folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    artifacts = plan.folder / ARTIFACTS
    if plan.artifacts == str(artifacts):
        artifacts.mkdir(exist_ok=True)
        artifacts.chmod(0o700)
    with locks.held(plan.folder / LOCK, make=True) as free:
        if not free:
            raise PipelineError(f"A server runs in {plan.folder} already. Stop it first")
        known = Secrets.kept(plan.folder)
        if plan.database:
            from defect_detection.operations import stores  # with all of MLflow

            with stores.read(plan.database) as engine, engine.connect():
                pass  # MLflow would try for minutes, and say less
            yield known, plan.database
            return
        with cluster(plan, known).running() as uri:
            yield known, uri


def run(plan: ServerPlan, env: Mapping[str, str], on_ready: Callable[[Secrets], None]) -> None:
    """Run a server until a signal comes.

    Args:
        plan: how.
        env: the environment of MLflow, such as the credentials of an artifact store.
        on_ready: is called when it answers.

    Raises:
        PipelineError: it does not start, or ends by itself.
    """
    with own(plan) as (known, database), (plan.folder / CHILD).open("a+") as held:
        _end_former(held)
        _require_port(plan)
        _write_auth(plan.folder, database)
        child = subprocess.Popen(
            _command(plan),
            env={**env, **_variables(plan, known, database)},
            cwd=plan.folder,
            start_new_session=True,
            pass_fds=[held.fileno()],
        )
        held.truncate(0)
        held.write(str(child.pid))
        held.flush()
        try:
            _wait(plan, child)
            on_ready(known)
            socket = None if plan.database else cluster(plan, known).socket
            while child.poll() is None:
                time.sleep(LOOK_EVERY)
                if socket is not None:
                    _keep_running(cluster(plan, known), socket)
            raise PipelineError(f"MLflow ended with exit code {child.returncode}; see above")
        finally:
            _stop(child)


def cluster(plan: ServerPlan, known: Secrets) -> Cluster:
    """Return the project's own database, which a server may run."""
    return Cluster(plan.folder / "postgres", known.database_password)


def _keep_running(own_one: Cluster, socket: Path) -> None:
    """Start the project's own database again if it was killed or stopped; MLflow then goes on."""
    if not own_one.runs():
        log.warning("The database had ended by itself and is started again")
        own_one.start(socket)


def _end_former(held: TextIO) -> None:
    """Lock the file that MLflow holds; end the MLflow of a server that was killed, which has it."""
    deadline = time.monotonic() + STOP_WITHIN
    while not locks.take(held.fileno()):
        held.seek(0)
        group = held.read().strip()
        if not group.isdecimal() or time.monotonic() > deadline:
            raise PipelineError(
                f"An MLflow of a former server still runs (process {group}). End it first"
            )
        log.warning("The MLflow of a server that was killed still runs and is ended")
        with suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)
        time.sleep(0.5)


def _require_port(plan: ServerPlan) -> None:
    """Raise PipelineError if the port is taken; MLflow would say so in fifty lines."""
    family = socket.AF_INET6 if ":" in plan.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise PipelineError(
                f"Port {plan.port} of {plan.host} cannot be used ({error.strerror}). Stop what "
                f"listens there, or set SERVER_PORT"
            ) from error


def _write_auth(folder: Path, database: str) -> None:
    with replace_atomically(folder / "auth.ini", private=True) as temporary:
        # configparser takes % for a reference.
        temporary.write_text(
            AUTH + f"database_uri = {postgres.with_driver(database).replace('%', '%%')}\n"
        )


def _hosts(plan: ServerPlan) -> list[str]:
    """Return what the header Host may be, as patterns of `fnmatch`.

    Names are this machine's and those that were given. A page of the internet whose name is made to
    lead here (DNS rebinding) sends its own name, and never an address.
    """
    digit = "[0-9*]"  # without a * MLflow would not take it for a pattern
    numbers = [digit * digits for digits in (1, 2, 3)]
    addresses = [".".join(four) for four in itertools.product(numbers, repeat=4)] + ["[[]*]"]
    names = [name.lower() for name in sorted(plan.own_names)]  # as clients send them
    return [f"{host}{port}" for host in (*names, *addresses) for port in ("", ":*")]


def _command(plan: ServerPlan) -> list[str]:
    """Return the call of MLflow; everything secret is in its variables, which nobody else sees."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
        *("--host", plan.host, "--port", str(plan.port), "--serve-artifacts"),
        *("--uvicorn-opts", "--no-access-log --log-level warning"),
    ]


def _variables(plan: ServerPlan, known: Secrets, database: str) -> dict[str, str]:
    return {
        "MLFLOW_BACKEND_STORE_URI": postgres.with_driver(database),
        "MLFLOW_ARTIFACTS_DESTINATION": plan.artifacts,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_hosts(plan)),
        "MLFLOW_AUTH_CONFIG_PATH": str(plan.folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": known.admin_password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known.session_key,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of language models: six processes
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }


def _wait(plan: ServerPlan, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_WITHIN
    while True:
        with suppress(StoreError):
            store.require_server(plan.address, 5)
            return
        if child.poll() is not None:
            raise PipelineError(f"MLflow ended with exit code {child.returncode}; see above")
        if time.monotonic() > deadline:
            raise PipelineError(f"MLflow did not answer within {START_WITHIN} s; see above")
        time.sleep(0.2)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End MLflow and its workers."""
    for number, seconds in ((signal.SIGTERM, STOP_WITHIN), (signal.SIGKILL, STOP_WITHIN)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
        except (ProcessLookupError, PermissionError):  # macOS says the second of those that ended
            return
        except subprocess.TimeoutExpired:
            continue
        _wait_for_group(child.pid)


def _wait_for_group(group: int) -> None:
    """Wait until no worker is left; one that hangs is killed."""
    deadline = time.monotonic() + STOP_WITHIN
    while True:
        try:
            os.killpg(group, 0 if time.monotonic() < deadline else signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.1)


def described(plan: ServerPlan) -> str:
    """Return where a server keeps what, in words."""
    own_one = str(plan.folder / "postgres")
    where = uris.without_password(plan.database) if plan.database else own_one
    return f"PostgreSQL {where}, artifacts {uris.without_password(plan.artifacts)}"
