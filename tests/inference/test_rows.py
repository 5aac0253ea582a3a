"""Files of rows, whole and cut off."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, wait_for
from defect_detection import PipelineError
from defect_detection.atomic import restored
from defect_detection.inference.rows import COLUMNS, Csv, JsonLines, Output, Row
from defect_detection.runtime.classifier import Verdict

NAMES = [
    *("a.png", 'with "quotes", commas.png', "ünïcode.png", "not\udcffutf8.png"),
    *("two\nlines.png", "=1+1.png", "'=quoted.png", "-", "last.png"),
]
FORMULAS = ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "'a", "''=a", "-", "a=1", ""]


def row(path: str) -> Row:
    return Row.of(path, Verdict("unknown", 0.12345678, True, "blurred, or so"), "Some_Reg/1")


def error(path: str) -> Row:
    return Row.of(path, Verdict("error", None, True, "is empty"), "Some_Reg/1")


def paths(file: Path, kind: type) -> list[str]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        if kind is Csv:
            return [restored(one["path"]) for one in csv.DictReader(lines)]
        return [json.loads(line)["path"] for line in lines]


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_rows_are_there_as_soon_as_they_are_added(tmp_path, kind):
    file = tmp_path / "new" / "rows"
    with kind(file, resume=False) as rows:
        for count, name in enumerate(NAMES, start=1):
            rows.add([row(name)])
            assert paths(file, kind) == NAMES[:count]


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_file_that_was_cut_off_anywhere_is_gone_on_with(tmp_path, kind):
    file = tmp_path / "rows"
    with kind(file, resume=False) as rows:
        rows.add(map(row, NAMES))
    whole = file.read_bytes()
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        with kind(file, resume=True) as rows:
            held = [name for name in NAMES if rows.kept(name)]
            rows.add(map(row, NAMES))
        assert held == NAMES[: len(held)]
        assert len(held) >= whole[:end].count(b"Some_Reg/1") - 1
        assert file.read_bytes() == whole


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_without_resume_no_row_is_lost(tmp_path, kind):
    file = tmp_path / "rows"
    file.touch()
    with kind(file, resume=False) as rows:
        rows.add([row("a.png"), row("b.png")])
    before = file.read_bytes()
    with pytest.raises(PipelineError, match="holds 2 rows: continue with --resume, or delete it"):
        kind(file, resume=False)
    assert file.read_bytes() == before


def test_header_alone_is_no_row(tmp_path):
    Csv(tmp_path / "rows", resume=False).__exit__(None, None, None)
    with Csv(tmp_path / "rows", resume=False) as rows:
        rows.add([row("a.png")])
    assert paths(tmp_path / "rows", Csv) == ["a.png"]


HEADER = ",".join(COLUMNS).encode()
OTHER_FILES = {
    "other columns": (Csv, b"path,verdict\na.png,ok\n"),
    "few values": (Csv, HEADER + b"\na.png,ok\n"),
    "no verdict": (Csv, HEADER + b"\na.png,good,0.1,no,,m\n"),
    "no header": (Csv, b"a.png,ok,0.1,no,,m\n"),
    "one line": (Csv, b"a password without an end of line"),
    "stray quote": (Csv, HEADER + b'\r\n"a.png,ok,0.1,no,,m\r\nb.png,ok,0.1,no,,m\r\n'),
    "image": (Csv, b"\xff\xd8\xff\xe0\x00\x10JFIF\n\x00\n\xff"),
    "long image": (Csv, b"\xff\xd8\xff\xe0\x00" * 100_000),
    "other keys": (JsonLines, b'{"path": "a.png"}\n'),
    "no object": (JsonLines, b"[]\n"),
    "nested": (JsonLines, b"[" * 50_000 + b"\n"),
    "no JSON": (JsonLines, b"garbage\n"),
    "one line of JSON": (JsonLines, b"garbage"),
    "long image for JSON": (JsonLines, b"\xff\xd8\xff\xe0\x00" * 100_000),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_file_of_something_else_is_refused_and_left(tmp_path, name, resume):
    (kind, content), file = OTHER_FILES[name], tmp_path / "rows"
    file.write_bytes(content)
    with pytest.raises(
        PipelineError, match="is no verdict with the columns path,verdict"
    ) as raised:
        kind(file, resume)
    assert "\n" not in str(raised.value)
    assert file.read_bytes() == content


def test_second_process_is_refused_until_the_first_has_ended(tmp_path):
    file = tmp_path / "rows"
    with Csv(file, resume=False) as rows:
        rows.add([row("a.png")])
        before = file.read_bytes()
        for resume in (False, True):
            with pytest.raises(PipelineError, match="another run writes rows there"):
                Csv(file, resume)
        assert file.read_bytes() == before
        rows.add([row("b.png")])
    with Csv(file, resume=True) as rows:
        rows.add([row("c.png")])
    assert paths(file, Csv) == ["a.png", "b.png", "c.png"]


def test_file_without_locks_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with Csv(tmp_path / "rows", resume=False) as rows:
        rows.add([row("a.png")])
    assert paths(tmp_path / "rows", Csv) == ["a.png"]
    assert "there are no locks here (Operation not supported)" in caplog.text


CHANGES = {
    "was moved or deleted": lambda file: file.rename(file.with_name("moved")),
    "was replaced by another file": lambda file: (
        file.rename(file.with_name("moved")),
        file.write_bytes(b""),
    ),
    "was changed, from [0-9]+ to 0 bytes": lambda file: os.truncate(file, 0),
    "was changed, from": lambda file: file.write_bytes(file.read_bytes() + b"noted by hand\n"),
}


@pytest.mark.parametrize("kind", [Csv, JsonLines])
@pytest.mark.parametrize("change", CHANGES)
def test_file_that_something_else_has_changed_is_left_as_it_is(tmp_path, kind, change):
    file, moved = tmp_path / "rows", tmp_path / "moved"
    with kind(file, resume=False) as rows:
        rows.add([row("a.png")])
        CHANGES[change](file)
        before = [one.read_bytes() for one in (file, moved) if one.exists()]
        with pytest.raises(PipelineError, match=f"{change}.*start again with --resume"):
            rows.add([row("b.png")])
    assert [one.read_bytes() for one in (file, moved) if one.exists()] == before


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_error_row_is_replaced_by_a_newer_one(tmp_path, kind):
    file = tmp_path / "rows"
    file.touch(0o640)
    file.chmod(0o640)
    with kind(file, resume=False) as rows:
        rows.add([error("a.png"), row("b.png"), error("c.png"), error("d.png")])
    inode = file.stat().st_ino
    with kind(file, resume=True) as rows:
        assert [rows.kept(name) for name in ("a.png", "b.png", "c.png")] == [None, "unknown", None]
        rows.add([row("a.png"), error("d.png"), row("e.png")])
        rows.settle()
        rows.add([row("f.png")])
        assert file.stat().st_ino != inode
        with pytest.raises(PipelineError, match="another run writes rows there"):
            kind(file, resume=True)
    assert paths(file, kind) == ["b.png", "c.png", "a.png", "d.png", "e.png", "f.png"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["rows"]


def test_file_that_a_link_leads_to_is_rewritten_there(tmp_path):
    file, link = tmp_path / "there" / "rows", tmp_path / "link"
    file.parent.mkdir()
    link.symlink_to(file)
    with Csv(link, resume=False) as rows:
        rows.add([error("a.png")])
        rows.add([row("a.png")])
        rows.settle()
        rows.add([row("b.png")])
    assert link.is_symlink() and paths(file, Csv) == ["a.png", "b.png"]


def test_error_rows_stay_if_the_file_cannot_be_rewritten(tmp_path, monkeypatch, caplog):
    file = tmp_path / "rows"

    def full(path):
        raise PipelineError(f"{path}: cannot be written (No space left on device)")

    with Csv(file, resume=False) as rows:
        rows.add([error("a.png")])
        rows.add([row("a.png")])
        monkeypatch.setattr("defect_detection.inference.rows.replace_atomically", full)
        rows.settle()
        rows.add([row("b.png")])
        monkeypatch.undo()
    assert "error rows that have a newer row stay there" in caplog.text
    assert paths(file, Csv) == ["a.png", "a.png", "b.png"]
    with Csv(file, resume=True) as rows:
        assert rows.kept("a.png") == "unknown"
        rows.settle()
    assert paths(file, Csv) == ["a.png", "b.png"]


REWRITE = """
import sys
from pathlib import Path
from defect_detection.inference import rows
rows.REST = 0
with rows.Csv(Path(sys.argv[1]), resume=True) as file:
    print("started", flush=True)
    while True:
        file.add([rows.Row("part.png", "error", None, True, "", "m")])
        file.settle()
"""


@pytest.mark.slow
def test_kill_while_the_file_is_rewritten_loses_no_row(tmp_path):
    file = tmp_path / "rows"
    names = [f"{number:05}.png" for number in range(3000)]
    with Csv(file, resume=False) as rows:
        rows.add([error("broken.png"), error("part.png"), *map(row, names)])
    command = [sys.executable, "-c", REWRITE, file]
    rng, environment = random.Random(0), os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for _ in range(12):
        before = file.stat().st_mtime_ns
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            wait_for(lambda: file.stat().st_mtime_ns != before)  # noqa: B023
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        with Csv(file, resume=True) as rows:
            assert [name for name in names if not rows.kept(name)] == []
        found = paths(file, Csv)
        assert found.count("broken.png") == 1 and set(found) == {*names, "broken.png", "part.png"}
    with Csv(file, resume=True) as rows:
        rows.add([row("part.png")])
        rows.settle()
    assert sorted(paths(file, Csv)) == [*names, "broken.png", "part.png"]


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_image_with_a_row_from_before_gets_another_when_it_is_another_image(tmp_path, kind):
    file = tmp_path / "rows"
    with kind(file, resume=False) as rows:
        rows.add([row("a.png")])
    with kind(file, resume=True) as rows:
        output = Output([rows])
        assert (output.take("a.png"), output.take("a.png")) == (True, False)
        output.put([row("a.png")])
    assert paths(file, kind) == ["a.png", "a.png"]


def test_file_that_lacks_a_row_gets_it_and_the_other_none_twice(tmp_path):
    verdicts = {"a.png": "ok", "b.png": "ok"}
    with Csv(tmp_path / "csv", resume=False) as one, JsonLines(tmp_path / "json", False) as two:
        one.add([Row(path, verdict, 0.1, False, "", "m") for path, verdict in verdicts.items()])
        two.add([Row("b.png", "defect", 0.9, False, "", "m")])
    with Csv(tmp_path / "csv", resume=True) as one, JsonLines(tmp_path / "json", True) as two:
        output = Output([one, two])
        assert [output.kept(path) for path in verdicts] == [None, "defect"]
        output.put([Row("a.png", "ok", 0.1, False, "", "m")])
        assert paths(tmp_path / "csv", Csv) == ["a.png", "b.png"]
        assert paths(tmp_path / "json", JsonLines) == ["b.png", "a.png"]
        output.put([Row("a.png", "defect", 0.9, False, "", "m")])  # another image of that name
    assert paths(tmp_path / "csv", Csv) == ["a.png", "b.png", "a.png"]
    assert paths(tmp_path / "json", JsonLines) == ["b.png", "a.png", "a.png"]


def test_formulas_in_names_are_defused_in_csv_and_exact_in_json(tmp_path):
    for kind in (Csv, JsonLines):
        with kind(tmp_path / kind.__name__, resume=False) as rows:
            rows.add(map(row, FORMULAS))
    with (tmp_path / "Csv").open(newline="") as lines:
        written = [one["path"] for one in csv.DictReader(lines)]
    assert not [name for name in written if name.startswith(tuple("=+@\t\r")) or name == "-1"]
    assert written[-3:] == FORMULAS[-3:]  # exactly - is standard input
    assert paths(tmp_path / "JsonLines", JsonLines) == FORMULAS
    with Csv(tmp_path / "Csv", resume=True) as rows:
        assert all(rows.kept(name) == "unknown" for name in FORMULAS)


def test_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(PipelineError, match="cannot be written"):
        Csv(tmp_path, resume=False)


def test_yes_and_no_in_csv_and_truth_in_json(tmp_path):
    error = Row.of("b.png", Verdict("error", None, True, "is empty"), "m")
    for kind in (Csv, JsonLines):
        with kind(tmp_path / kind.__name__, resume=False) as rows:
            rows.add([row("a.png"), error])
    assert (tmp_path / "Csv").read_text().splitlines()[1:] == [
        'a.png,unknown,0.123457,yes,"blurred, or so",Some_Reg/1',
        "b.png,error,,yes,is empty,m",
    ]
    second = json.loads((tmp_path / "JsonLines").read_text().splitlines()[1])
    assert (second["probability"], second["review"]) == (None, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_full_disk_is_one_line(kind):
    with pytest.raises(PipelineError, match="/dev/full: cannot be written .No space left"):
        with kind(Path("/dev/full"), resume=False) as rows:
            rows.add([row("a.png")])


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_disk_that_gets_full_leaves_whole_rows(tmp_path, kind):
    program = (
        "import resource, sys; from pathlib import Path;"
        "from defect_detection.inference.rows import Csv, JsonLines, Row;"
        "rows = {'Csv': Csv, 'JsonLines': JsonLines}[sys.argv[1]](Path(sys.argv[2]), False);"
        "row = Row('a.png', 'ok', 0.1, False, '', 'm');"
        "rows.add([row] * 9);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "rows.add([row] * 40)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, kind.__name__, tmp_path / "rows"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert "cannot be written (File too large)" in done.stderr
    assert (tmp_path / "rows").read_bytes().endswith(b"\n")
    assert set(paths(tmp_path / "rows", kind)) == {"a.png"}


def test_rows_have_the_colour_of_their_verdict_on_a_terminal(capsys):
    rows = [
        Row("a", "defect", 0.9, False, "", "m"),
        Row("b", "ok", 0.1, False, "", "m"),
        Row("c", "ok", 0.2, True, "", "m"),
        Row("d", "unknown", 0.5, True, "blurred", "m"),
    ]
    Output([], coloured=True).put(rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines] == ["\033[31m", "\033[32m", "\033[33m", "\033[35m"]
    assert all(line.endswith("\033[0m") for line in lines)
    Output([]).put(rows)
    assert "\033" not in capsys.readouterr().out


def test_names_cannot_give_orders_to_a_terminal(capsys):
    names = ["\x1b]0;x\x07.png", "a\nb.png", "\x7f\x9b31m.png", "\u202egnp.png", "\udc9b1m.png"]
    for coloured in (False, True):
        Output([], coloured).put([error(name) for name in names])
        lines = capsys.readouterr().out.split("\n")[:-1]
        plain = [line.removeprefix("\033[35m").removesuffix("\033[0m") for line in lines]
        assert [line.split("  ")[0] for line in plain] == [
            *(r"\x1b]0;x\x07.png", r"a\nb.png", r"\x7f\x9b31m.png"),
            *(r"\u202egnp.png", r"\x9b1m.png"),
        ]
