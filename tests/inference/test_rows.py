"""Files of rows, whole and cut off."""

import csv
import json
from pathlib import Path

import pytest

from defect_detection import PipelineError
from defect_detection.inference.rows import COLUMNS, Csv, JsonLines, Output, Row
from defect_detection.runtime.classifier import Verdict

NAMES = ["a.png", 'with "quotes", commas.png', "ünïcode.png", "not\udcffutf8.png", "last.png"]


def row(path: str) -> Row:
    return Row.of(path, Verdict("unknown", 0.12345678, True, "blurred, or so"), "Some_Reg/1")


def paths(file: Path, kind: type) -> list[str]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        if kind is Csv:
            return [one["path"] for one in csv.DictReader(lines)]
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
            held = [name for name in NAMES if rows.holds(name)]
            rows.add(map(row, NAMES))
        assert held == NAMES[: len(held)]
        assert len(held) >= whole[:end].count(b"Some_Reg/1") - 1
        assert file.read_bytes() == whole


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_without_resume_a_file_is_written_anew(tmp_path, kind):
    file = tmp_path / "rows"
    for name in ("a.png", "b.png"):
        with kind(file, resume=False) as rows:
            rows.add([row(name)])
    assert paths(file, kind) == ["b.png"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Csv, "path,verdict\na.png,ok\n"),
        (Csv, "\n".join([",".join(COLUMNS), "a.png,ok", ""])),
        (JsonLines, '{"path": "a.png"}\n'),
        (JsonLines, "[]\n"),
        (JsonLines, "garbage\n"),
    ],
)
def test_file_of_something_else_is_refused_and_left(tmp_path, kind, content):
    file = tmp_path / "rows"
    file.write_text(content)
    with pytest.raises(PipelineError, match="is no verdict with the columns path,verdict"):
        kind(file, resume=True)
    assert file.read_text() == content


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
