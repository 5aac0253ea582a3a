"""Backups, taken while everything runs, and what is restored from them."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import mlflow
import pytest

import busy
from conftest import ROOT, Project, wait_for
from defect_detection import PipelineError
from defect_detection.dataset.inbox import Inbox, Seen
from defect_detection.inference.judge import Item, NamedModel, judge
from defect_detection.inference.verdict_log import Origin, Rules, VerdictLog
from defect_detection.operations import backup, tracking_server
from defect_detection.registry import saved_model, store, versions
from plant import kept_training

COPIES = int(os.environ.get("COPIES", "3"))  # backups while everything writes


def back_up(project: Project, to: Path, **env: str) -> Path:
    said = project.succeed("src/backup.py", "--to", to, **env)
    return Path(said.partition(":")[0])


@pytest.fixture
def lived_in(trained: Project) -> Project:
    """A project with a choice of a person, verdicts, labels and a job."""
    trained.succeed("src/promote.py", "--version", "2", "--why", "a trial")
    inbox = Inbox(trained.data)
    image = next((trained.data / "train" / "ok_front").iterdir()).read_bytes()
    seen = Seen(1, "defect", 0.9, "Production_Reg/1", "review", "part")
    label = inbox.add("ok_front", "Ada", seen, image, blind=False)
    inbox.approve(label.id, "Grace")
    incoming = trained.root / "incoming"
    shutil.copytree(trained.data / "test" / "def_front", incoming)
    log = VerdictLog(trained.root / ".line", Rules())
    judged_all(trained, log)
    (trained.root / ".env.local").write_text("API_TOKEN=a secret of this plant\n")
    return trained


def judged_all(project: Project, log: VerdictLog) -> None:
    """Write a verdict on each test image into a log."""
    with store.connected(f"sqlite:///{project.root}/mlflow.db"):
        with saved_model.fetched("models:/Production_Reg/1") as files:
            model = NamedModel.load("Production_Reg/1", str(files))
            items = [Item(p.name, p.read_bytes()) for p in project.data.glob("test/*/*.jpeg")]
            found = judge(model, items)
            log.add(found, [Origin("predict")] * len(found))
    assert log.flush(10) == 0


def what_people_see(project: Project) -> list[object]:
    """Return history, versions, verdicts and labels."""
    image = next((project.data / "test" / "def_front").iterdir())
    judged = project.succeed("src/inference.py", image.relative_to(project.root)).strip()
    with closing(sqlite3.connect(project.root / ".line" / "verdicts.sqlite")) as log:
        rows = log.execute("SELECT * FROM verdicts ORDER BY id").fetchall()
    labels = Inbox(project.data).labels()
    files = [Inbox(project.data).file(one) is not None for one in labels]
    return [project.succeed("src/promote.py", "--list"), judged, rows, labels, files]


def test_a_restored_project_is_the_same(lived_in: Project, tmp_path: Path):
    before = what_people_see(lived_in)
    made = back_up(lived_in, tmp_path / "backups")
    assert made.stat().st_mode & 0o077 == 0
    # Nothing of where it came from is needed.
    test_images = tmp_path / "test"
    (lived_in.data / "test").rename(test_images)
    lived_in.root.rename(tmp_path / "lost")
    new = Project(tmp_path / "new")
    new.data.mkdir()
    said = new.succeed("src/backup.py", "--restore", made)
    assert "Restored" in said
    test_images.rename(new.data / "test")
    assert what_people_see(new) == before
    assert (new.root / ".env.local").read_text() == "API_TOKEN=a secret of this plant\n"
    assert (new.root / ".env.local").stat().st_mode & 0o077 == 0
    (tmp_path / "lost" / "data" / "train").rename(new.data / "train")
    new.succeed("src/evaluation.py")  # best_model.json, and the Keras model in the new place


def test_a_backup_to_nowhere_is_refused(project: Project):
    """As 'make backup' without TO asks for."""
    done = project.run("src/backup.py", "--to", "")
    assert done.returncode == 2 and "no folder is named" in done.stderr


@pytest.fixture
def here(tmp_path: Path) -> backup.Locations:
    """A project that has nothing yet."""
    plan = tracking_server.chosen({"SERVER_PATH": str(tmp_path / "server")})
    names = ("data", "line", "jobs", "cache", "best_model.json")
    return backup.Locations(
        tmp_path, "sqlite:///nowhere", *(tmp_path / name for name in names), plan
    )


def test_the_best_model_is_one_that_the_store_has(
    here: backup.Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A training that ends while the store is copied is in none of both."""
    here.best_model.write_text("former")
    ends = lambda *_: here.best_model.write_text("of a run that the store lacks")  # noqa: E731
    monkeypatch.setattr(backup, "_add_store", ends)
    made = backup.make(here, tmp_path / "backups")
    assert (made.folder / "best_model.json").read_text() == "former"


@pytest.mark.parametrize(
    ("store", "left_out"),
    [
        ("http://127.0.0.1:5000", False),
        (f"http://{socket.gethostname()}:5000", False),
        ("http://the-server:5000", True),
        ("http://::1", True),
        ("http://[::1]:5000/", False),
    ],
)
def test_a_server_of_another_machine_is_said_to_be_left_out(
    here: backup.Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store, left_out
):
    """Also where somebody has once tried a server here."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "secrets.json").write_text("{}")
    monkeypatch.setattr(backup, "_add_server", lambda *_: None)
    made = backup.make(replace(here, store=store), tmp_path / "backups")
    assert [one for one in made.left_out if "run this on its machine too" in one] == (
        [f"the store {store}: run this on its machine too"] if left_out else []
    )


def test_a_backup_that_is_killed_hinders_none_of_the_same_second(
    here: backup.Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = datetime.now(timezone.utc)
    monkeypatch.setattr(backup, "datetime", mock.Mock(**{"now.return_value": now}))
    with monkeypatch.context() as killed:
        killed.setattr(backup.shutil, "rmtree", lambda *_, **__: None)
        killed.setattr(backup, "_write_manifest", mock.Mock(side_effect=OSError(5, "killed")))
        with pytest.raises(PipelineError, match="killed. No backup was made"):
            backup.make(here, tmp_path / "backups")
    (left,) = (tmp_path / "backups").iterdir()
    assert backup.make(here, tmp_path / "backups").folder.is_dir()
    assert left.exists()  # until it is a day old


def test_nothing_is_restored_over_something_or_from_a_damaged_backup(
    trained: Project, tmp_path: Path
):
    made = back_up(trained, tmp_path / "backups")
    before = (trained.root / "mlflow.db").read_bytes()
    said = trained.fail("src/backup.py", "--restore", made)
    assert "is there already. Nothing was restored" in said
    assert (trained.root / "mlflow.db").read_bytes() == before

    for damage in (flip_a_bit, lose_a_file, tear_the_manifest, lose_the_manifest):
        damaged = Path(shutil.copytree(made, tmp_path / damage.__name__))
        damage(damaged)
        with pytest.raises(PipelineError, match=r"damaged|holds no backup"):
            backup.read(damaged)
    new = Project(tmp_path / "new")
    said = new.fail("src/backup.py", "--restore", damaged)
    assert "holds no backup" in said
    elsewhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    new.configure(lambda config: config["line"].update(audit_share=0.5))
    config = (new.root / "src" / "config.yaml").read_bytes()
    said = new.fail("src/backup.py", "--restore", made, **elsewhere)
    assert "Set it as in the backup" in said
    for name in ("mlflow.db", "mlruns", "best_model.json"):
        assert not (new.root / name).exists()
    # What somebody has written for the new place stays too.
    (made / "configuration" / ".env.local").write_text("API_TOKEN=former\n")
    for name in (".env.local", "mlruns/1"):
        (new.root / name).parent.mkdir(exist_ok=True)
        (new.root / name).write_text("API_TOKEN=new\n")
        said = new.fail("src/backup.py", "--restore", made)
        assert f"{name.partition('/')[0]} is there already. Nothing was restored" in said
        assert (new.root / name).read_text() == "API_TOKEN=new\n"
        (new.root / name).unlink()
    assert not (new.root / "mlflow.db").exists()
    assert (new.root / "src" / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("content", [b"", b"no database", None])
def test_a_store_that_is_damaged_is_named(project: Project, tmp_path: Path, content: bytes | None):
    file = project.root / "mlflow.db"
    if content is None:
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE other (id)")
    else:
        file.write_bytes(content)
    said = project.fail("src/backup.py", "--to", tmp_path / "backups")
    assert "mlflow.db" in said and ("is no SQLite database" in said or "holds no store" in said)
    assert not list((tmp_path / "backups").iterdir())


def test_what_was_under_way_is_delivered_or_ended_after_a_restoration(
    trained: Project, tmp_path: Path
):
    """A training that MLflow lacks, an open run, a version whose evaluation did not end."""
    cache = tmp_path / "cache"
    trained.configure(lambda config: config["paths"].update(cache=str(cache)))
    with store.connected(f"sqlite:///{trained.root}/mlflow.db"):
        experiment = store.open_experiment("train/casting")
        mlflow.MlflowClient().create_run(experiment, run_name="open")
        first = versions.with_accuracy("Production_Reg")[0]
        tags = {"released": "false", "not_released": versions.UNFINISHED}
        versions.register(first.source, "", 0.9, "half", first.name, tags)
        kept_training(cache, "train/casting", "kept", str(trained.root / "best_model.json"))
    made = back_up(trained, tmp_path / "backups")
    shutil.rmtree(cache)
    new = Project(tmp_path / "new")
    new.succeed("src/backup.py", "--restore", made)
    with store.connected(f"sqlite:///{new.root}/mlflow.db"):
        assert statuses() == {"FINISHED", "KILLED"}
        assert [one.number for one in versions.with_accuracy("Production_Reg")] == [1, 2]
    said = new.succeed("src/train.py", "--sync", "--data", trained.data)
    assert said.startswith("Delivered from a former training: kept; best kept, written to")
    best = json.loads((new.root / "best_model.json").read_text())
    with store.connected(f"sqlite:///{new.root}/mlflow.db"):
        assert mlflow.get_run(best["run_id"]).data.metrics == {"loss": 0.5}


def statuses() -> set[str]:
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return {run.info.status for run in found}


def flip_a_bit(made: Path) -> None:
    content = bytearray((made / "store" / "mlflow.db").read_bytes())
    content[len(content) // 2] ^= 1
    (made / "store" / "mlflow.db").write_bytes(content)


def lose_a_file(made: Path) -> None:
    next((made / "store" / "artifacts").rglob("*.keras")).unlink()


def tear_the_manifest(made: Path) -> None:
    text = (made / "manifest.json").read_text()
    (made / "manifest.json").write_text(text[: len(text) // 2])


def lose_the_manifest(made: Path) -> None:
    (made / "manifest.json").unlink()


@pytest.mark.long
def test_backups_while_everything_writes_are_whole(lived_in: Project, tmp_path: Path):
    """Versions, verdicts and labels come in all the time; each backup is of one moment."""
    writers = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "busy.py", kind, lived_in.root],
            env=lived_in.environment(),
        )
        for kind in busy.KINDS
    ]
    counts = []
    try:
        begun = written(lived_in)
        wait_for(lambda: all(now > one for now, one in zip(written(lived_in), begun, strict=True)))
        for number in range(COPIES):
            made = back_up(lived_in, tmp_path / "backups")
            assert all(one.poll() is None for one in writers)
            new = Project(tmp_path / "new" / str(number))
            new.succeed("src/backup.py", "--restore", made)
            require_whole(new)
            counts.append(written(new))
            shutil.rmtree(new.root)
            shutil.rmtree(made)
    finally:
        for one in writers:
            one.kill()
            one.wait()
    print(f"{COPIES} backups, of {counts[0]} to {counts[-1]} versions, verdicts and labels")
    assert counts == sorted(counts) and counts[0] < counts[-1]  # they did write meanwhile


def written(project: Project) -> tuple[int, ...]:
    """Return how many versions, verdicts and labels there are."""
    with closing(sqlite3.connect(project.root / "mlflow.db", timeout=60)) as database:
        (registered,) = database.execute("SELECT count(*) FROM model_versions").fetchone()
    with closing(sqlite3.connect(project.root / ".line" / "verdicts.sqlite")) as log:
        (judged,) = log.execute("SELECT count(*) FROM verdicts").fetchone()
    return registered, judged, len(Inbox(project.data).labels())


def require_whole(project: Project) -> None:
    """Fail unless all that the databases and the table of labels name is there."""
    with store.connected(f"sqlite:///{project.root}/mlflow.db"):
        assert not statuses() & {"RUNNING"}
        for version in versions.with_accuracy("Production_Reg"):
            if run := version.tags.get("busy"):
                assert len(mlflow.artifacts.load_text(f"runs:/{run}/{busy.NOTE}")) >= 20_000
        saved_model.load_classifier(versions.in_production("Production_Reg").uri)
    with closing(sqlite3.connect(project.root / ".line" / "verdicts.sqlite")) as log:
        assert log.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    inbox = Inbox(project.data)
    for label in inbox.labels():
        assert (inbox.file(label) is None) == (label.state == "rejected"), label
