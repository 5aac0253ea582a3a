"""What is told of jobs whose files are damaged."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import backend
from defect_detection.service.app import create_app
from defect_detection.service.jobs import Jobs

BROKEN, SOUND = "20260102-000000-000000-abcd", "20260101-000000-000000-abcd"
FILES = {
    "job.json": {"created_at": "2026-01-02T00:00:00.000+00:00", "parameters": {"epochs": 3}},
    "process.json": {"pid": 4_000_000, "started": 0.5},
    "progress.json": {"epoch": 1, "epochs": 3, "run_id": "run-1"},
    "result.next": {"registry": "Production_Reg", "version": 3, "acc": 0.9},
    "result.json": {"registry": "Production_Reg", "version": 3, "acc": 0.9},
    "ended.json": {"state": "cancelled", "message": "Cancelled on request"},
}
DAMAGE = {
    "empty": b"",
    "half": b'{"epoch": 1, "ep',
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "other keys": b'{"x": 1}',
    "other types": b'{"pid": "1", "epoch": [], "registry": 1, "state": "won", "created_at": "now"}',
    "no number": b'{"registry": "Production_Reg", "version": 3, "acc": NaN}',
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"created_at": "\xff"}',
}


def write(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(json.dumps(FILES[name]))


def app(folder: Path) -> Flask:
    jobs = Jobs(folder, [sys.executable, "-c", "pass"], folder, 60, os.environ)
    return create_app(replace(backend(folder.parent / "api"), jobs=jobs))


@pytest.mark.parametrize("damage", [*DAMAGE, "a folder", "a pipe"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_said_and_the_list_has_all_jobs(tmp_path, name, damage):
    write(tmp_path / SOUND, ["job.json", "ended.json"])
    names = ["job.json", "process.json", "progress.json", "ended.json"]
    write(tmp_path / BROKEN, [*names, name] if name.startswith("result") else names)
    file = tmp_path / BROKEN / name
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage == "a pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(DAMAGE[damage])
    listed = app(tmp_path).test_client().get("/retrain")
    assert listed.status_code == 200
    broken, sound = json.loads(listed.text, parse_constant=pytest.fail)
    assert (broken["id"], sound["id"]) == (BROKEN, SOUND)
    assert (sound["state"], sound["message"]) == ("cancelled", "Cancelled on request")
    assert f"Damaged or missing in its folder: {name}" in broken["message"]
    assert broken["state"] == ("failed" if name == "ended.json" else "cancelled")
    assert broken["created_at"] == "2026-01-02T00:00:00.000+00:00"


def test_job_without_job_file_and_without_anything_is_listed_as_failed(tmp_path):
    (tmp_path / BROKEN).mkdir()
    client = app(tmp_path).test_client()
    (job,) = client.get("/retrain").json
    assert (job["state"], job["created_at"]) == ("failed", "2026-01-02T00:00:00.000+00:00")
    assert job["message"] == "Damaged or missing in its folder: job.json"
    assert client.get(job["log"]).text == ""


def test_unreadable_result_is_no_success_and_says_where_to_look(tmp_path):
    write(tmp_path / BROKEN, ["job.json"])
    (tmp_path / BROKEN / "result.json").write_text("{")
    (job,) = app(tmp_path).test_client().get("/retrain").json
    assert job["state"] == "failed"
    assert "It had registered a version; 'python src/promote.py --list' shows" in job["message"]


@pytest.mark.parametrize("name", ["none", "2026", f"x{BROKEN}", f"{BROKEN} "])
def test_folders_and_files_with_other_names_are_no_jobs(tmp_path, name):
    write(tmp_path / name, ["job.json"])
    (tmp_path / SOUND).write_text("a file")
    client = app(tmp_path).test_client()
    assert client.get("/retrain").json == []
    for job_id in (name, SOUND):
        assert client.get(f"/retrain/{job_id}").status_code == 404


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(FILES)), content=st.binary(max_size=200), data=st.data())
def test_no_content_of_a_file_makes_the_list_fail(tmp_path_factory, name, content, data):
    folder = tmp_path_factory.mktemp("jobs")
    write(folder / BROKEN, sorted(data.draw(st.sets(st.sampled_from(sorted(FILES))))))
    (folder / BROKEN / name).write_bytes(content)
    (job,) = app(folder).test_client().get("/retrain").json
    assert job["state"] in ("succeeded", "failed", "cancelled")
    assert name in job["message"]
