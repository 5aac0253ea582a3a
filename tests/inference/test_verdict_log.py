"""The verdict log: what `add` promised stays, whatever happens to processes and to the disk."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, wait_for
from defect_detection.inference import verdict_file, verdict_log
from defect_detection.inference.verdict_log import Origin, Rules, VerdictLog
from defect_detection.retention import Retention
from defect_detection.runtime.classifier import Verdict
from defect_detection.runtime.preprocessing import UnreadableImage
from logged import NOBODY, OK, PART, judged


def rows(folder: Path, columns: str = "*", table: str = "verdicts") -> list[tuple]:
    with closing(sqlite3.connect(folder / verdict_file.FILE)) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()


def test_verdict_has_all_that_the_pages_show(tmp_path):
    log = VerdictLog(tmp_path, NOBODY)
    before = time.time()
    (number,) = log.add([judged("line 3/part_7.front.jpeg")], [Origin("predict")])
    columns = "id, source, name, part, verdict, probability, threshold, review, reason, model"
    expected = (number, "predict", "part_7.front.jpeg", "part_7", "ok", 0.1, 0.5, 0, "")
    assert rows(tmp_path, columns) == [(*expected, "Production_Reg/1")]
    ((at, milliseconds, waits),) = rows(tmp_path, "at, milliseconds, waits")
    assert before <= at <= time.time() and (milliseconds, waits) == (1.5, "")
    ((thumbnail, evidence, height, width, aspect),) = rows(
        tmp_path, "thumbnail, evidence, height, width, aspect", "views"
    )
    assert thumbnail.startswith(b"\xff\xd8\xff") and evidence == b"\xff" * 16
    assert (height, width, aspect) == (4, 4, 1.0)
    assert rows(tmp_path, "content", "images") == [(PART,)]
    assert rows(tmp_path, "source, verdict, count", "totals") == [("predict", "ok", 1)]


@pytest.mark.parametrize(
    ("verdict", "share", "waits"),
    [
        (OK, 0.0, ""),
        (OK, 0.999999, "audit"),
        (Verdict("ok", 0.45, True), 0.999999, "band"),
        (Verdict("defect", 0.55, True), 0.0, "band"),
        (Verdict("defect", 0.9, False), 0.999999, ""),
        (Verdict("unknown", 0.9, True, "too dark"), 0.0, "unknown"),
        (Verdict("error", None, True, "is empty"), 0.0, "error"),
    ],
)
def test_what_waits_for_a_person_says_why(tmp_path, verdict, share, waits):
    log = VerdictLog(tmp_path, Rules(audit_share=share))
    log.add([judged(verdict=verdict)], [Origin("predict")])
    assert rows(tmp_path, "waits") == [(waits,)]
    assert rows(tmp_path, "wanted", "images") == [(int(waits != ""),)]


def test_random_sample_is_as_large_as_asked(tmp_path):
    log = VerdictLog(tmp_path, Rules(audit_share=0.3))
    log.add([judged() for _ in range(1000)], [Origin("predict")] * 1000)
    assert log.flush(20) == 0
    sampled = sum(waits == "audit" for (waits,) in rows(tmp_path, "waits"))
    assert 240 < sampled < 360


@pytest.mark.parametrize(
    ("pattern", "name", "part"),
    [
        (r"^[^.]+", "part_7.front.jpeg", "part_7"),
        (r"^[^.]+", ".hidden", ""),
        (r"sn(\d+)", "line3_sn0042_a.png", "0042"),
        (r"sn\d+", "line3_sn0042_a.png", "sn0042"),
        (r"(x)?y", "y", ""),
        (r"^[^.]+", "a\nb\udcff.jpeg", r"a\nb\xff"),
    ],
)
def test_id_of_the_part_is_found_in_the_name(pattern, name, part):
    assert Rules(part_id=pattern).part_of(name) == part


def test_file_that_cannot_be_read_is_logged_too(tmp_path):
    log = VerdictLog(tmp_path, NOBODY)
    error = Verdict("error", None, True, "does not exist")
    (number,) = log.add([judged("x", error, UnreadableImage("does not exist"))], [Origin("watch")])
    assert rows(tmp_path, "id, verdict, reason") == [(number, "error", "does not exist")]


def test_watched_file_is_logged_once_also_by_the_next_watch(tmp_path):
    now = time.time_ns()
    for time_of_change, expected in ((now, 1), (now, 1), (now + 1, 2)):
        log = VerdictLog(tmp_path, NOBODY)  # as after a restart
        log.add([judged()], [Origin("watch", "/in/part\udcff.jpeg", time_of_change)])
        assert log.flush(5) == 0
        assert len(rows(tmp_path)) == expected
    assert rows(tmp_path, "count", "totals") == [(2,)]


def test_file_that_could_not_be_read_first_is_logged_when_it_can(tmp_path):
    log, origin = VerdictLog(tmp_path, NOBODY), Origin("watch", "/in/a.jpeg", time.time_ns())
    error = Verdict("error", None, True, "cannot be read (Permission denied)")
    log.add([judged(verdict=error, content=UnreadableImage("cannot be read"))], [origin])
    log.add([judged()], [origin])
    assert rows(tmp_path, "id, verdict") == [(1, "error"), (2, "ok")]


def test_watched_file_from_before_all_that_is_kept_is_not_logged_anew(tmp_path):
    log, old = VerdictLog(tmp_path, NOBODY), time.time_ns() - 91 * 86_400 * 10**9
    ids = log.add([judged("old"), judged("new")], [Origin("watch", "/old", old), Origin("predict")])
    assert ids == [None, 1] and rows(tmp_path, "name") == [("new",)]


@pytest.mark.parametrize("odd", ["year 2300", "model that is not UTF-8", "verdict that is none"])
def test_odd_value_stops_no_other_verdict(tmp_path, odd):
    log, one, origin = VerdictLog(tmp_path, NOBODY), judged(), Origin("predict")
    if odd == "year 2300":
        origin = Origin("watch", "/in/a.jpeg", 2**63 + 5)
    elif odd == "model that is not UTF-8":
        one = replace(one, model=replace(one.model, name="model\udcff"))
    else:
        one = replace(one, verdict=replace(one.verdict, verdict=None))
    log.add(
        [judged("before"), one, judged("after")], [Origin("predict"), origin, Origin("predict")]
    )
    assert log.flush(5) == 0
    names = [name for (name,) in rows(tmp_path, "name")]
    assert {"before", "after"} <= set(names)
    assert len(names) + log.unlogged == 3 and log.unlogged == (odd == "verdict that is none")
    assert log.add([judged()], [Origin("predict")]) != [None]


def test_file_that_is_deleted_is_made_again(tmp_path):
    log = VerdictLog(tmp_path / "line", NOBODY)
    log.add([judged()], [Origin("predict")])
    shutil.rmtree(tmp_path / "line")
    assert log.add([judged("again")], [Origin("predict")]) == [1]
    assert rows(tmp_path / "line", "name") == [("again",)]


def test_large_images_are_waited_for_while_the_disk_works(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict_log, "MOST_WAITING_BYTES", 1_000_000)
    log = VerdictLog(tmp_path, NOBODY)
    large = [judged(content=PART + b"\0" * 400_000) for _ in range(12)]
    large.append(judged(content=PART + b"\0" * 3_000_000))  # more than may wait at all
    log.add(large, [Origin("predict")] * 13)
    assert (log.flush(10), log.unlogged, len(rows(tmp_path, "id", "images"))) == (0, 0, 13)


def test_of_large_images_that_wait_for_a_broken_disk_the_verdicts_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict_log, "MOST_WAITING_BYTES", 1_000_000)
    monkeypatch.setattr(verdict_log, "AGAIN", 0.05)
    (tmp_path / "line").write_text("a file")
    log = VerdictLog(tmp_path / "line", NOBODY)
    for number in range(6):
        log.add([judged(f"{number}", content=PART + b"\0" * 400_000)], [Origin("predict")])
    assert log.flush(0.1) == 6
    (tmp_path / "line").unlink()
    assert log.flush(10) == 0
    assert [name for (name,) in rows(tmp_path / "line", "name")] == [*"012345"]
    assert sum(not content for (content,) in rows(tmp_path / "line", "content", "images")) == 4


def test_oldest_verdicts_and_images_go_first_and_those_for_a_person_last(tmp_path):
    size = len(PART)
    keep = Retention(verdicts=20, days=1, megabytes=1)
    log = VerdictLog(tmp_path, Rules(audit_share=0.0, keep=keep))
    band = Verdict("ok", 0.45, True)
    large = PART + b"\0" * (100_000 - size)
    for number in range(30):
        verdict = band if number in (15, 16) else OK
        log.add([judged(verdict=verdict, content=large)], [Origin("predict")])
    assert [number for (number,) in rows(tmp_path, "id")] == list(range(11, 31))
    kept = [number for (number,) in rows(tmp_path, "id", "images")]
    assert kept == [16, 17, *range(23, 31)]  # 10 images of 0.1 MB
    assert rows(tmp_path, "bytes", "kept") == [(1_000_000,)]
    with closing(sqlite3.connect(tmp_path / verdict_file.FILE)) as connection:
        connection.execute("UPDATE verdicts SET at = at - 90000 WHERE id < 25")
        connection.commit()
    log.add([judged()], [Origin("predict")])
    assert [number for (number,) in rows(tmp_path, "id")] == [*range(25, 32)]


def test_lock_holds_up_no_verdict_and_loses_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verdict_file, "LOCKED", 0.1)
    monkeypatch.setattr(verdict_log, "AGAIN", 0.05)
    log = VerdictLog(tmp_path, NOBODY)
    log.add([judged()], [Origin("predict")])
    with closing(sqlite3.connect(tmp_path / verdict_file.FILE)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        ids = [log.add([judged()], [Origin("predict")])[0] for _ in range(20)]
        assert ids == [None] * 20
        assert time.monotonic() - started < 2  # it waits only until it knows of the lock
        wait_for(lambda: log.trouble)
        started = time.monotonic()
        log.add([judged()], [Origin("predict")])
        assert time.monotonic() - started < 0.1
    assert log.flush(10) == 0
    assert len(rows(tmp_path)) == 22
    assert (log.trouble, log.unlogged) == ("", 0)
    said = [record.message for record in caplog.records]
    assert sum("cannot be written (database is locked)" in one for one in said) == 1
    assert sum("can be written again; 0 verdicts lost" in one for one in said) == 1


def test_what_cannot_be_kept_in_memory_is_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verdict_log, "MOST_WAITING", 5)
    monkeypatch.setattr(verdict_log, "AGAIN", 0.05)
    (tmp_path / "line").write_text("a file, so that no folder can be made")
    log = VerdictLog(tmp_path / "line", NOBODY)
    for number in range(12):
        assert log.add([judged(f"{number}.jpeg")], [Origin("predict")]) == [None]
    assert log.trouble
    (tmp_path / "line").unlink()
    assert log.flush(10) == 0
    kept = [name for _, name in rows(tmp_path / "line", "id, name")]
    assert len(kept) + log.unlogged == 12 and kept[-1] == "11.jpeg"
    assert log.unlogged >= 1
    assert "Verdicts are lost for the log" in caplog.text


@pytest.mark.parametrize("damage", ["newer", "no database"])
def test_file_of_another_kind_is_left_alone(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(verdict_log, "AGAIN", 0.05)
    file = tmp_path / verdict_file.FILE
    if damage == "newer":
        with closing(verdict_file.connect(file)) as connection:
            connection.execute("PRAGMA user_version = 99")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    else:
        file.write_bytes(b"no database at all" * 100)
    before = file.read_bytes()
    log = VerdictLog(tmp_path, NOBODY)
    assert log.add([judged()], [Origin("predict")]) == [None]
    wait_for(lambda: log.trouble)
    assert ("its schema is 99" if damage == "newer" else "not a database") in log.trouble
    assert file.read_bytes() == before


WRITER = """
import sys
sys.path[:0] = [{src!r}, {tests!r}]
from pathlib import Path
from logged import NOBODY, judged
from defect_detection.inference.verdict_log import Origin, VerdictLog
log = VerdictLog(Path(sys.argv[1]), NOBODY)
number = 0
while True:
    number += 1
    for id in log.add([judged(f"{{sys.argv[2]}}-{{number}}.jpeg")], [Origin("predict")]):
        if id is not None:
            print(id, f"{{sys.argv[2]}}-{{number}}", flush=True)
"""
READER = """
import sys
sys.path.insert(0, {src!r})
from pathlib import Path
from defect_detection.service.verdicts import Verdicts
verdicts = Verdicts(Path(sys.argv[1]), ["06:00"])
last = 0
while True:
    found = verdicts.newest(20)
    assert [one.id for one in found] == sorted((one.id for one in found), reverse=True)
    assert all(verdicts.content(one.id) for one in found[:2])
    last = max(last, found[0].id if found else 0)
    print(last, flush=True)
"""


def start(program: str, folder: Path, name: str, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", program, str(folder), name]
    with output.open("w") as told, output.with_suffix(".err").open("w") as errors:
        return subprocess.Popen(command, stdout=told, stderr=errors)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [int(os.environ.get("COPIES", "200")) // 100])
def test_killed_writers_and_readers_lose_nothing(tmp_path, rounds):
    """Two writers and three readers at a time; all are killed in the middle, again and again."""
    where = {"src": str(ROOT / "src"), "tests": str(ROOT / "tests")}
    promised: dict[int, str] = {}
    chance = np.random.default_rng(0)
    for turn in range(rounds):
        commands = [(WRITER, f"w{turn}{name}") for name in "ab"] + [(READER, "")] * 3
        outputs = [tmp_path / f"{turn}-{number}.out" for number in range(len(commands))]
        processes = [
            start(program.format(**where), tmp_path / "line", name, output)
            for (program, name), output in zip(commands, outputs, strict=True)
        ]
        wait_for(lambda outputs=outputs: all(output.stat().st_size for output in outputs))
        time.sleep(chance.uniform(0, 0.3))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for (program, _), output, process in zip(commands, outputs, processes, strict=True):
            process.wait(20)
            assert not output.with_suffix(".err").read_text()
            told = output.read_text()
            whole = told[: told.rfind("\n") + 1].splitlines()
            if program is WRITER:
                promised |= {int(line.split()[0]): line.split()[1] for line in whole}
    kept = dict(rows(tmp_path / "line", "id, part"))
    assert len(promised) > 20 * rounds
    assert {number: kept.get(number) for number in promised} == promised
    with closing(sqlite3.connect(tmp_path / "line" / verdict_file.FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted = connection.execute("SELECT sum(count) FROM totals").fetchone()[0]
    assert counted == len(kept)
    print(json.dumps({"killed": 5 * rounds, "promised": len(promised), "kept": len(kept)}))
