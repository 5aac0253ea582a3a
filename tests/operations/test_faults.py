"""What fails behind trainings and evaluations, one thing at a time: nothing is lost or left half.

FAULTS=50 python -m pytest tests/operations/test_faults.py -s prints how often each was tried.
"""

import contextlib
import errno
import http.client
import os
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import draw_folders, long, wait_for
from defect_detection import PipelineError, StoreError
from defect_detection.registry import promotion, store, versions
from plant import FAULTS, SETS, Plant, in_a_process, seconds_of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw_folders(folder / "data", train=3, test=8)
    return folder


@pytest.fixture
def plant(tmp_path: Path, _store: str, model_folder: Path, pictures: Path) -> Plant:
    folder = tmp_path / "plant"
    folder.mkdir()
    return Plant(folder, _store, model_folder, pictures)


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_killed_at_any_moment(plant: Plant, step: str):
    plant.train()
    plant.told.unlink()
    work, chance, ended = getattr(plant, step), random.Random(7), []
    longest = seconds_of(work)
    plant.require_whole()
    for _ in range(FAULTS):
        process = in_a_process(work, chance.uniform(0, 1.1 * longest))
        assert process.exitcode in (0, -9)
        plant.start_again()
        plant.require_whole()
        ended.append(process.exitcode)
    print(f"\n{step} killed {ended.count(-9)} times of {FAULTS}, nothing lost, nothing half")
    work()  # and it works as if nothing had been
    plant.require_whole()


class Between:
    """A proxy before a tracking server that can answer in its place."""

    def __init__(self, server: str):
        self.fault, self.seen = "", 0
        self.lost: set[tuple[str, str, bytes]] = set()
        host = server.removeprefix("http://")
        between = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # which waits 40 ms between headers and body

            def handle_any(self) -> None:
                between.seen += 1
                length = int(self.headers.get("Content-Length") or 0)
                getattr(between, f"_{between.fault or 'passed'}")(self, host, length)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def _passed(handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        Between._answer(handler, *Between._asked(handler, host, handler.rfile.read(length)))

    @staticmethod
    def _asked(handler: BaseHTTPRequestHandler, host: str, body: bytes) -> tuple[int, bytes, str]:
        """Return what the server answers."""
        with closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            connection.request(handler.command, handler.path, body, dict(handler.headers))
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Content-Type")

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind or "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _error(self, handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        handler.rfile.read(length)
        self._answer(handler, 500, b"<h1>Internal Server Error</h1>", "text/html")

    def _html(self, handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        handler.rfile.read(length)
        self._answer(handler, 200, b"<html>Sign in to this network</html>", "text/html")

    def _cut(self, handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        """Break a longer upload off in its middle."""
        if length < 10_000:
            self._passed(handler, host, length)
            return
        handler.rfile.read(length // 2)
        handler.close_connection = True
        handler.connection.shutdown(2)

    def _lost(self, handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        """Lose the first answer to a call, which the server has obeyed."""
        body = handler.rfile.read(length)
        call = (handler.command, handler.path, body)
        answer = self._asked(handler, host, body)
        if call not in self.lost:
            self.lost.add(call)
            answer = (502, b"<h1>Bad Gateway</h1>", "text/html")
        self._answer(handler, *answer)

    def _closed(self, handler: BaseHTTPRequestHandler, host: str, length: int) -> None:
        handler.close_connection = True
        handler.connection.shutdown(2)


@pytest.fixture
def between(tracking_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    made = Between(tracking_server)
    yield made
    made.close()


@pytest.mark.parametrize(
    "fault",
    ["error", *(long(one) for one in ("html", "closed", "cut"))],
)
def test_server_fails_in_the_middle(plant: Plant, between: Between, tracking_server: str, fault):
    """A training goes on and is delivered later; an evaluation ends in one line and is repeated."""
    plant.uri = between.uri
    plant.train()
    between.seen = 0
    plant.evaluate()
    calls, chance, kept, failed = between.seen, random.Random(7), 0, 0
    for number in range(FAULTS):
        after(between, chance.randrange(3, 30), fault)
        try:
            plant.train()
        except StoreError as error:  # when all is fitted
            kept += 1
            assert "It is kept: 'train.py --sync' delivers it" in str(error)
        assert len(plant.told.read_text().splitlines()) == (number + 2) * SETS
        between.fault = ""
        plant.start_again()
        plant.require_whole()
        after(between, chance.randrange(3, calls), fault)
        try:
            plant.evaluate()
        except StoreError as error:
            failed += 1
            assert "\n" not in str(error), error
        between.fault = ""
        plant.start_again()
        plant.require_whole()
    print(f"\n{fault}: {FAULTS} trainings fitted all, {kept} to be delivered later; {failed} ")
    print(f"of {FAULTS} evaluations ended in one line and were repeated. Nothing lost or half")


@pytest.mark.long
def test_answers_are_lost_and_calls_repeated(
    plant: Plant, between: Between, monkeypatch: pytest.MonkeyPatch
):
    """MLflow's client makes each run and each version twice."""
    for name in ("FACTOR", "JITTER"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_BACKOFF_{name}", "0")
    plant.uri = between.uri
    between.fault = "lost"
    with pytest.raises(StoreError, match="It is kept"):  # MLflow names a run's model once only
        plant.train()
    assert len(plant.told.read_text().splitlines()) == SETS
    between.fault = ""
    plant.start_again()
    plant.require_whole()
    between.fault = "lost"
    plant.evaluate()
    between.fault = ""
    plant.require_whole()
    with store.connected(plant.uri):
        (version,) = versions.with_accuracy(plant.name)
        assert version.released and version.number == 2


def after(between: Between, calls: int, fault: str) -> None:
    """Let a fault begin after some calls."""
    between.seen = 0

    def begin() -> None:
        with contextlib.suppress(AssertionError):
            wait_for(lambda: between.seen >= calls, 20)
            between.fault = fault

    threading.Thread(target=begin, daemon=True).start()


@pytest.mark.long
@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_store_is_locked_for_a_while(plant: Plant, tmp_path: Path, step: str):
    """A training goes on without it; an evaluation waits."""
    seconds = 60 if FAULTS >= 50 else 8  # MLflow itself waits 5 s
    plant.uri = own_store(plant.uri, tmp_path)
    plant.train()
    locked, free = threading.Event(), threading.Event()

    def hold() -> None:
        path = plant.uri.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as other:
            other.execute("BEGIN EXCLUSIVE")
            locked.set()
            free.wait(seconds)
            other.execute("ROLLBACK")

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(60)
    started = time.monotonic()
    with contextlib.suppress(StoreError):  # a training that cannot be delivered yet says so
        getattr(plant, step)()
    took = time.monotonic() - started
    free.set()
    holder.join()
    if step == "evaluate":
        assert took > seconds
        with store.connected(plant.uri):
            assert versions.in_production(plant.name) is not None
    else:
        assert len(plant.told.read_text().splitlines()) == 2 * SETS
    plant.start_again()
    plant.require_whole()
    print(f"\nstore locked for {seconds} s: {step} took {took:.0f} s, nothing lost")


def own_store(uri: str, folder: Path) -> str:
    """Copy a store for a test of its own; artifacts of its runs lie beside it."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as source:
        with closing(sqlite3.connect(folder / "mlflow.db")) as target:
            source.backup(target)
    return f"sqlite:///{folder}/mlflow.db"


def test_store_is_cut_short(plant: Plant, tmp_path: Path):
    """It is said in one line; what is restored from a copy works."""
    plant.uri = own_store(plant.uri, tmp_path)
    plant.train()
    file = Path(plant.uri.removeprefix("sqlite:///"))
    whole = file.read_bytes()
    for share in [number / 10 for number in range(10)]:
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(StoreError) as raised:
            plant.evaluate()
        assert "\n" not in str(raised.value)
        file.write_bytes(whole)
    plant.evaluate()
    plant.require_whole()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk up to some bytes; return the file that does."""
    filler = disk / "filler"
    filler.write_bytes(b"\0" * max(0, shutil.disk_usage(disk).free - left))
    return filler


@pytest.mark.parametrize("left", [0, *(long(one) for one in (200_000, 2_000_000))])
def test_disk_of_the_store_is_full(plant: Plant, small_disk: Path, left: int):
    plant.uri = own_store(plant.uri, small_disk)
    filler = fill(small_disk, left)
    with contextlib.suppress(StoreError):
        plant.train()
    assert len(plant.told.read_text().splitlines()) == SETS
    filler.unlink()
    plant.start_again()
    plant.require_whole()
    filler = fill(small_disk, left // 10)
    with pytest.raises((StoreError, PipelineError, OSError)):
        plant.evaluate()
    filler.unlink()
    plant.start_again()
    plant.require_whole()
    plant.evaluate()
    plant.require_whole()


@pytest.mark.parametrize("left", [0, 30_000, 60_000])
def test_disk_of_the_cache_is_full(plant: Plant, small_disk: Path, left: int):
    """A training that cannot keep what it fits ends in one line; what was before stays."""
    plant.train()
    before = plant.best.read_bytes()
    plant.cache = small_disk
    filler = fill(small_disk, left)
    with pytest.raises((PipelineError, OSError)) as raised:
        plant.train()
    assert isinstance(raised.value, PipelineError) or raised.value.errno == errno.ENOSPC
    filler.unlink()
    assert plant.best.read_bytes() == before
    plant.start_again()
    plant.require_whole()


def test_clock_is_set_back(plant: Plant, monkeypatch: pytest.MonkeyPatch):
    """Changes of the alias keep their order, by which a rollback finds the former version."""
    plant.train()
    plant.evaluate()
    plant.evaluate()
    now = time.time
    with store.connected(plant.uri):
        promotion.choose(plant.name, 2, "chosen", "Ada")
        monkeypatch.setattr(time, "time", lambda: now() - 86400)
        plant.evaluate()
        promotion.choose(plant.name, 3, "chosen a day before", "Ada")
        promotion.choose(plant.name, 1, "worse", "Ada")
        assert [one.change.after for one in promotion.history(plant.name)] == [1, 3, 2, 1]
        assert not promotion.moved_outside(plant.name)
    plant.train()
    plant.require_whole()
