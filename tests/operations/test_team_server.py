"""The team's server: a sqlite store taken over whole, then the pipeline with PostgreSQL."""

import json
import os
import random
import re
import signal
import stat
import subprocess
import threading
import urllib.error
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

import preloaded
from conftest import Project, draw_folders, wait_for
from defect_detection import StoreError
from defect_detection.operations.postgres import Cluster, with_driver
from defect_detection.registry import store, versions
from plant import FAULTS, SETS, Plant, figures, seconds_of
from team import TeamServer, postgres_of, require_postgres


class Team:
    """A project that was trained with a sqlite store, and the server that took it over."""

    def __init__(self, folder: Path, trained: Project):
        self.project = Project(folder / "project")
        self.project.become(trained)
        self.sqlite = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.project.root}/mlflow.db"}
        self.image = next((self.project.data / "test" / "def_front").iterdir())
        self.listed = self.project.succeed("src/promote.py", "--list")
        self.verdict = self.project.succeed("src/inference.py", self.image)
        self.server = TeamServer(self.project)
        self.migrated = self.run("src/server.py", "--migrate", **self.server.variables)
        self.server.start()

    def run(self, *call: object, **env: str) -> str:
        return self.project.succeed(*call, **env)


@pytest.fixture(scope="module")
def team(tmp_path_factory, _trained: Project):
    require_postgres()
    made = Team(tmp_path_factory.mktemp("team"), _trained)
    yield made
    made.server.delete()


def test_what_was_in_the_sqlite_store_is_in_the_server(team: Team):
    assert re.search(r"[1-9]\d* runs, 2 versions .* files of", team.migrated)
    env = team.server.credentials
    assert team.run("src/promote.py", "--list", **env) == team.listed
    assert team.run("src/inference.py", team.image, **env) == team.verdict


@pytest.mark.long
def test_a_run_is_found_with_all_that_it_logged(team: Team):
    def found(uri: str) -> dict[str, tuple]:
        with store.connected(uri):
            runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
            client = mlflow.MlflowClient()
            return {
                run.info.run_id: (
                    run.data.params,
                    run.data.tags,
                    run.info.status,
                    run.info.start_time,
                    {
                        name: [(one.step, one.value) for one in every]
                        for name in run.data.metrics
                        for every in [client.get_metric_history(run.info.run_id, name)]
                    },
                    sorted(one.path for one in client.list_artifacts(run.info.run_id)),
                )
                for run in runs
            }

    before = found(team.sqlite["MLFLOW_TRACKING_URI"])
    after = found(team.server.uri_with_password)
    assert len(before) >= 4
    assert {run: after[run] for run in before} == before


def test_the_same_seed_gives_the_same_figures(team: Team):
    # Nothing is read from where it was, such as the version to compare with.
    (team.project.root / "mlruns").rename(team.project.root / "elsewhere")
    try:
        for script in ("src/train.py", "src/evaluation.py"):
            team.run(script, **colleague(team))
    finally:
        (team.project.root / "elsewhere").rename(team.project.root / "mlruns")
    with store.connected(team.server.uri_with_password):
        for experiment in ("train/casting", "eval/casting"):
            found = mlflow.search_runs(experiment_names=[experiment], output_format="list")
            newest, oldest = figures(found[0]), figures(found[-1])
            assert len(newest) > 10
            # The first evaluation had no version in production to compare with.
            assert newest.items() >= oldest.items()


def colleague(team: Team) -> dict[str, str]:
    """Return the variables of a user who may edit what others made, and delete nothing of it."""
    name, admin = "colleague", team.server.credentials
    password = admin["MLFLOW_TRACKING_PASSWORD"]
    with suppress(urllib.error.HTTPError):  # there is one already
        said = {"username": name, "password": password}
        team.server.call("/api/2.0/mlflow/users/create", "admin", password, said)
    return admin | {"MLFLOW_TRACKING_USERNAME": name}


def test_what_a_user_may_not_delete_is_never_released(team: Team):
    env = colleague(team)
    password = env["MLFLOW_TRACKING_PASSWORD"]
    with store.connected(team.server.uri_with_password):
        first = versions.with_accuracy("Production_Reg")[0]
        half = versions.register(
            first.source,
            first.tags["evaluation_run"],
            0.5,
            "",
            "Production_Reg",
            {versions.RELEASED: "false", versions.NOT_RELEASED: versions.UNFINISHED},
        )
    with store.connected(team.server.uri.replace("://", f"://colleague:{password}@")):
        assert versions.half_registered() == [half]
        assert versions.withdraw(half) == "is never released"
        assert versions.half_registered() == []
    with store.connected(team.server.uri_with_password):
        assert versions.withdraw(half) == "is deleted"


def test_nobody_comes_in_without_the_password(team: Team):
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    refused = [("", ""), ("admin", "wrong"), ("admin", "password1234")]
    for user, password in refused:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            team.server.call(path, user, password)
    said = team.project.fail("src/promote.py", "--list", MLFLOW_TRACKING_URI=team.server.uri)
    assert "MLFLOW_TRACKING_PASSWORD in .env.local" in said
    password = team.server.credentials["MLFLOW_TRACKING_PASSWORD"]
    assert json.loads(team.server.call(path, "admin", password))["experiment"]["name"] == "Default"


def test_the_secrets_are_for_their_owner_only(team: Team):
    folder = team.server.folder / "server"
    for name in ("secrets.json", "auth.ini"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "artifacts").stat().st_mode) == 0o700
    kept = json.loads((folder / "secrets.json").read_text())
    assert min(map(len, kept.values())) >= 24 and len(set(kept.values())) == 3
    assert not set(kept.values()) & set(team.server.log.read_text().split())
    # No user of the machine sees them.
    every = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not any(secret in every for secret in kept.values())


def test_a_filled_server_takes_no_store_over(team: Team):
    # The same folder while it runs, and its database when it does not.
    said = team.project.fail("src/server.py", "--migrate", **team.server.variables)
    assert "runs in" in said and "already" in said


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])  # the second stops it in order
def test_the_database_ends_and_comes_back(team: Team, how: signal.Signals):
    file = team.server.folder / "server" / "postgres" / "postmaster.pid"
    env = team.server.credentials

    def process() -> str:
        return file.read_text().split()[0] if file.exists() else ""

    ended, said = process(), team.server.log.read_text().count("is started again")
    os.kill(int(ended), how)
    wait_for(lambda: team.server.log.read_text().count("is started again") > said)
    wait_for(lambda: process() not in ("", ended))
    assert team.run("src/promote.py", "--list", **env)
    assert team.run("src/inference.py", team.image, **env) == team.verdict


@pytest.fixture
def plants(team: Team, tmp_path: Path, model_folder: Path) -> list[Plant]:
    """Two machines that work with the server."""
    draw_folders(tmp_path / "data", train=3, test=8)
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made.append(Plant(tmp_path / name, team.server.uri_with_password, model_folder, tmp_path))
        made[-1].name = tmp_path.name
        made[-1].train()
    return made


@pytest.mark.long
def test_the_database_is_killed_in_the_middle(team: Team, plants: list[Plant]):
    plant, chance, kept, failed = plants[0], random.Random(7), 0, 0
    folder = team.server.folder / "server" / "postgres"
    trains, evaluates = seconds_of(plant.train), seconds_of(plant.evaluate)
    sets = len(plant.told.read_text().splitlines())
    for number in range(FAULTS):
        killer = threading.Timer(chance.uniform(0, trains), kill_database, [folder])
        killer.start()
        try:
            plant.train()
        except StoreError:
            kept += 1
        assert len(plant.told.read_text().splitlines()) == sets + (number + 1) * SETS
        killer.join()
        wait_until_whole(plant)
        killer = threading.Timer(chance.uniform(0, evaluates), kill_database, [folder])
        killer.start()
        try:
            plant.evaluate()
        except StoreError as error:
            failed += 1
            assert "\n" not in str(error), error
        killer.join()
        wait_until_whole(plant)
    print(f"\ndatabase killed {2 * FAULTS} times: {kept} trainings to be delivered later, {failed}")
    print(f"of {FAULTS} evaluations ended in one line. Nothing lost or half")


def kill_database(folder: Path) -> None:
    os.kill(int((folder / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)


def wait_until_whole(plant: Plant) -> None:
    """Start again until the server has its database."""

    def started() -> bool:
        try:
            plant.start_again()
            plant.require_whole()
        except StoreError:
            return False
        return True

    wait_for(started, 60)


@pytest.mark.long
def test_two_machines_register_at_once(plants: list[Plant]):
    """In any order: every version is there, one has the alias, and the record is whole."""
    for _ in range(FAULTS):
        processes = [preloaded.processes().Process(target=one.evaluate) for one in plants]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            assert process.exitcode == 0
    with store.connected(plants[0].uri):
        found = versions.with_accuracy(plants[0].name)
        assert [one.number for one in found] == list(range(1, 2 * FAULTS + 1))
        assert all(one.released for one in found)
        assert versions.in_production(plants[0].name) is not None
    for one in plants:
        one.require_whole()


@pytest.mark.long
def test_a_backup_of_the_server_is_restored_into_another(team: Team, tmp_path: Path):
    """The server runs on; the new one has its versions, its record, its users and its artifacts."""
    listed = team.run("src/promote.py", "--list", **team.server.credentials)
    env = team.server.credentials | team.server.variables
    said = team.run("src/backup.py", "--to", tmp_path / "backups", **env)
    made = said.partition(":")[0]
    project = Project(tmp_path / "new")
    project.configure(lambda config: config["paths"].update(cache=str(tmp_path / "cache")))
    other = TeamServer(project, workers=1)
    try:
        project.succeed(
            *("src/backup.py", "--restore", made),
            **other.variables | {"MLFLOW_TRACKING_URI": other.uri},
        )
        other.start()
        assert other.credentials == team.server.credentials | {"MLFLOW_TRACKING_URI": other.uri}
        assert project.succeed("src/promote.py", "--list", **other.credentials) == listed
        project.configure(lambda config: config["paths"].update(cache=str(tmp_path / "cache")))
        verdict = project.succeed("src/inference.py", team.image, **other.credentials)
        assert verdict == team.verdict
    finally:
        other.delete()


@pytest.mark.long
def test_a_server_that_is_killed_starts_again(team: Team):
    """Its children go on without it: the database is used, and MLflow gives way."""
    team.server.process.kill()
    team.server.process.wait()
    team.server.start()
    assert team.run("src/inference.py", team.image, **team.server.credentials) == team.verdict
    socket = Cluster(team.server.folder / "server" / "postgres", "").socket
    assert socket.is_dir()
    assert team.server.stop() == 143
    assert not postgres_of(team.server.folder)
    assert not socket.exists()
    team.server.start()


@pytest.mark.long
def test_a_given_database_and_artifacts_in_a_bucket(team: Team, bucket, tmp_path: Path):
    """The sqlite store is taken over into both; the version is fetched from there."""
    keys, s3 = bucket
    settings = json.loads((team.server.folder / "server" / "secrets.json").read_text())
    cluster = Cluster(team.server.folder / "server" / "postgres", settings["database_password"])
    engine = sqlalchemy.create_engine(with_driver(cluster.uri), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE second"))
    engine.dispose()
    second = TeamServer(team.project, workers=1)
    second.variables |= keys | {
        "SERVER_DATABASE": cluster.uri.replace("/mlflow?", "/second?"),
        "SERVER_ARTIFACTS": "s3://castings/mlflow",
    }
    try:
        team.run("src/server.py", "--migrate", **second.variables)
        filled = team.project.fail("src/server.py", "--migrate", **second.variables)
        assert "holds runs or models already" in filled and "***" in filled
        assert settings["database_password"] not in filled
        second.start()
        team.project.configure(lambda config: config["paths"].update(cache=str(tmp_path)))
        assert team.run("src/inference.py", team.image, **second.credentials) == team.verdict
        named = {one["Key"].split("/")[0] for one in s3.list_objects(Bucket="castings")["Contents"]}
        assert named == {"mlflow"}
        assert not (second.folder / "server" / "postgres").exists()
    finally:
        team.project.configure(lambda config: config["paths"].update(cache=str(Project.cache)))
        second.delete()
