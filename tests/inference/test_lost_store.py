"""The store is gone or damaged: who judges goes on with what is here, and makes no new store."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from backends import backend, client
from conftest import draw_folders, long
from defect_detection import PipelineError
from defect_detection.inference.production import Production
from defect_detection.registry import store as stores
from defect_detection.registry import versions
from defect_detection.service.health import StoreWatch

LOST = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeroed behind its head": lambda path: path.write_bytes(
        path.read_bytes()[:100] + bytes(99_000)
    ),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "another program's": lambda path: (
        path.unlink(),
        sqlite3.connect(path).execute("create table parts (name)").connection.close(),
    ),
}
NO_DATABASE = {"empty", "zeroed", "folder"}  # like "zeroed behind its head", which make test tries


@pytest.fixture
def asked(store, logged_model, tmp_path):
    """A database of the test's own with a version in production that was asked for once."""
    run_id, uri = logged_model
    name = f"Lost_{tmp_path.name}"
    version = versions.register(uri, run_id, 0.9, "", name, {})
    versions.set_alias(version, versions.PRODUCTION_ALIAS)
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(store.removeprefix("sqlite:///"), database)
    asking: list[Production] = []

    def ask() -> Production:
        asking.append(Production(f"sqlite:///{database}", name, tmp_path / "kept"))
        return asking[-1]

    ask.database, ask.first = database, ask().current()
    assert ask.first.number == 1
    yield ask
    for one in asking:
        one.close()


def listing(folder: Path) -> list[tuple[str, int]]:
    return [(str(path), path.lstat().st_size) for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize("lost", [long(one) if one in NO_DATABASE else one for one in LOST])
def test_lost_store_leaves_the_version_that_was_kept(asked, lost, caplog):
    LOST[lost](asked.database)
    before = listing(asked.database.parent)
    assert asked().current() == asked.first
    assert f"Using {asked.first}, in production on {asked.first.asked_at}" in caplog.text
    assert str(asked.database) in caplog.text
    assert listing(asked.database.parent) == before
    shutil.rmtree(asked.first.folder)
    with pytest.raises(PipelineError, match=str(asked.database)) as raised:
        asked().current()
    assert "\n" not in str(raised.value)
    assert listing(asked.database.parent) == before


def test_asking_a_sound_store_changes_nothing_beside_it(asked):
    before = listing(asked.database.parent)
    assert asked().current().number == 1
    assert listing(asked.database.parent) == before


def test_version_kept_from_a_server_is_found_again_whatever_the_password(asked, tmp_path):
    """A new password is not another store."""
    kept = asked.database.parent.parent / "kept"
    source = asked()._source
    server = Production("http://kim:old@127.0.0.1:9", source.name, kept)
    shutil.copy(source.last_file, server._source.last_file)
    server.close()
    after = Production("http://kim:new@127.0.0.1:9", source.name, kept)
    try:
        assert after.current() == asked.first
    finally:
        after.close()


@pytest.mark.parametrize("script", ["src/evaluation.py", "src/inference.py", "src/promote.py"])
def test_scripts_that_judge_make_no_store(project, script):
    draw_folders(project.data, train=1, test=1)
    before = listing(project.root)
    last = project.fail(script, PYTHONDONTWRITEBYTECODE="1")
    assert f"There is no tracking store at sqlite:///{project.root}/mlflow.db. Train" in last
    made = {path for path, _ in listing(project.root)} - {path for path, _ in before}
    assert made == set()


def test_health_makes_no_store(tmp_path):
    store = StoreWatch(f"sqlite:///{tmp_path}/store/mlflow.db", "Production_Reg")
    store.look()
    health = client(backend(tmp_path, store=store)).get("/health")
    assert health.json["store"] == "unreachable"
    assert not (tmp_path / "store").exists()


def test_new_store_of_a_training_is_said(project):
    """Such as that of a mistyped URI."""
    draw_folders(project.data, train=1, test=1)  # too few to train
    done = project.run("src/train.py")
    uri = f"sqlite:///{project.root}/mlflow.db"
    said = f"There was no tracking store at {uri}: a new, empty one is made"
    assert done.stderr.splitlines()[0] == said
    with stores.connected(uri):
        pass
    assert said not in project.run("src/train.py").stderr
