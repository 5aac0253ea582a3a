"""The three scripts as a user runs them, end to end, on each kind of store."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from conftest import ROOT, SETS, Project, draw_folders, draw_part, long, wait_for
from defect_detection.registry import saved_model, versions
from defect_detection.runtime.classifier import Classifier

SCRIPTS = ("src/train.py", "src/evaluation.py", "src/inference.py")


@pytest.fixture(
    scope="module",
    params=["sqlite:///mlflow.db", long("server")],
)
def trained(request, tmp_path_factory, learnable):
    """The project after `train.py` and `evaluation.py`, for each kind of store."""
    uri = request.param
    if uri == "server":
        uri = request.getfixturevalue("tracking_server")
    project = Project(tmp_path_factory.mktemp("trained") / "project")
    project.configure_sets(*SETS if uri.startswith("sqlite") else SETS[:1])
    (project.root / ".env").write_text(f"MLFLOW_TRACKING_URI={uri}\n")
    git = ["git", "-C", project.root, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    project.printed = [
        project.succeed(script, "--data", learnable, cwd=elsewhere)
        for script in ("src/train.py", "src/evaluation.py")
    ]
    assert list(elsewhere.iterdir()) == []  # nothing is written where the user happens to be
    project.uri = f"sqlite:///{project.root}/mlflow.db" if uri.startswith("sqlite") else uri
    mlflow.set_tracking_uri(project.uri)
    return project


def test_training_logs_a_run_for_each_set_and_names_the_best(trained):
    best = json.loads((trained.root / "best_model.json").read_text())
    experiment = mlflow.get_experiment_by_name("train/casting")
    runs = MlflowClient().search_runs([experiment.experiment_id])
    names = sorted(run.data.tags["mlflow.runName"] for run in runs)
    assert names == (["one", "three", "two"] if trained.uri.startswith("sqlite") else ["one"])
    assert best["val_accuracy"] == max(run.data.metrics["best_val_accuracy"] for run in runs)
    assert best["run_id"] in {run.info.run_id for run in runs}
    commit = subprocess.run(
        ["git", "-C", trained.root, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.note.content"].startswith("The set ")
        assert run.data.params["seed"] == "42"
        assert run.data.params["training_def_front"] == "60"
        assert run.data.tags["mlflow.source.git.commit"] == commit.stdout.strip()
        assert run.inputs.dataset_inputs[0].dataset.digest == best["data_digest"][:16]
        artifacts = [a.path for a in MlflowClient().list_artifacts(run.info.run_id)]
        assert "learning_curves.png" in artifacts
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            history = MlflowClient().get_metric_history(run.info.run_id, name)
            assert [metric.step for metric in history] == list(range(1, len(history) + 1))
            assert len(history) == 1 + int(run.data.params["epochs"])
            # What MLflow shows of a run is what the kept weights reach.
            assert run.data.metrics[name] == run.data.metrics[f"best_{name}"]
        assert run.info.run_id in trained.printed[0]


def test_evaluation_registers_and_gives_the_alias(trained):
    version = MlflowClient().get_model_version_by_alias("Production_Reg", "prod")
    best = json.loads((trained.root / "best_model.json").read_text())
    assert version.run_id == best["run_id"]
    assert "defects let through" in version.description
    experiment = mlflow.get_experiment_by_name("eval/casting")
    (run,) = MlflowClient().search_runs([experiment.experiment_id])
    assert run.data.tags["training_run_id"] == best["run_id"]
    assert run.data.metrics["accuracy"] == float(version.tags["acc"])
    counts = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/confusion_matrix.json")
    assert sum(counts.values()) == 20
    right = counts["defects_found"] + counts["ok_passed"]
    assert right / 20 == pytest.approx(run.data.metrics["accuracy"])
    artifacts = [a.path for a in MlflowClient().list_artifacts(run.info.run_id)]
    assert {"confusion_matrix.png", "report.html"} <= set(artifacts)
    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html")
    assert "Production_Reg version 1" in page and run.info.run_id in page
    assert f"Report: {run.info.artifact_uri}/report.html\n" in trained.printed[1]
    for kind in ("escapes", "overkill"):
        low, share, high = (run.data.metrics[f"{kind}_{of}"] for of in ("low", "share", "high"))
        assert low <= share <= high
        assert f"{run.data.metrics[kind]:.0f} of 10 ({share:.1%}" in run.data.tags[kind]
        assert version.tags[kind] == run.data.tags[kind]
        assert f"  {kind:24}{run.data.tags[kind]}" in trained.printed[1]
    for name in ("roc_auc", "recall_def_front", "recall_ok_front"):
        assert 0.5 < run.data.metrics[name] <= 1


def test_registered_model_loads_as_keras(trained):
    model = mlflow.tensorflow.load_model("models:/Production_Reg@prod")
    assert model.input_shape == (None, 64, 64, 1)


def test_drawn_defect_comes_out_as_defect_and_good_part_as_ok(trained, tmp_path):
    rng = np.random.default_rng(99)
    for folder, defect in (("bad", True), ("good", False)):
        (tmp_path / folder).mkdir()
        for number in range(10):
            draw_part(rng, defect).save(tmp_path / folder / f"{number}.png")
    pictures = [tmp_path / "bad", "good"]
    printed = trained.succeed("src/inference.py", *pictures, cwd=tmp_path).splitlines()
    files = ["--csv", "a.csv", "--jsonl", "a.jsonl"]
    said = trained.succeed("src/inference.py", *pictures, *files, cwd=tmp_path)
    assert said.startswith("20 images judged: ")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "verdict", "probability", "review", "reason", "model"]
    assert {row["model"] for row in rows} == {"Production_Reg/1"}
    assert len(rows) == len(printed) == 20
    assert [row["path"] for row in rows[:1] + rows[10:11]] == [
        str(tmp_path / "bad" / "0.png"),
        "good/0.png",
    ]
    right = [row["verdict"] == ("defect" if "bad" in row["path"] else "ok") for row in rows]
    assert sum(right) >= 18
    with saved_model.fetched("models:/Production_Reg/1") as files:
        point = Classifier.load(files).point
    assert 0 < point.threshold < 1
    for row, line in zip(rows, printed, strict=True):
        probability = float(row["probability"])
        assert (probability >= point.threshold) == (row["verdict"] == "defect")
        rounded = (probability - 5e-7, probability, probability + 5e-7)  # a row has six digits
        assert (row["review"] == "yes") in set(map(point.needs_review, rounded))
        assert line.split()[:2] == [row["path"], row["verdict"]]
        assert line.endswith("review") == (row["review"] == "yes")
    listed = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row | {"probability": float(row["probability"])} for row in rows] == [
        row | {"review": "yes" if row["review"] else "no"} for row in listed
    ]


def test_without_pictures_the_first_of_each_class_stand_in_for_missing_examples(trained, learnable):
    done = trained.run("src/inference.py", DATA_PATH=str(learnable))
    assert done.returncode == 0
    assert "cast_def_0_1153.jpeg does not exist, running" in done.stderr
    assert [Path(line.split()[0]).name for line in done.stdout.splitlines()] == [
        "part_000.jpeg",
        "part_000.jpeg",
    ]


def test_broken_pictures_are_named_and_the_others_judged(trained, tmp_path, learnable):
    good = sorted((learnable / "test" / "ok_front").iterdir())
    (tmp_path / "empty.jpeg").write_bytes(b"")
    done = trained.run("src/inference.py", tmp_path / "empty.jpeg", *good, tmp_path / "gone.jpeg")
    assert done.returncode == 1
    first, *between, last = done.stdout.splitlines()
    assert first == f"{tmp_path / 'empty.jpeg'}  error  review  is empty (0 bytes)"
    assert len(between) == len(good) and not any("error" in line for line in between)
    assert last == f"{tmp_path / 'gone.jpeg'}  error  review  does not exist"
    assert done.stderr.splitlines()[-1].startswith("error: 2 of 12 images cannot be read. ")


def test_worse_model_goes_to_testing_and_the_alias_stays(trained, learnable, tmp_path):
    if not trained.uri.startswith("sqlite"):
        pytest.skip("says nothing of the store")
    swapped = tmp_path / "swapped"
    shutil.copytree(learnable / "train", swapped / "train")
    shutil.copytree(learnable / "test" / "def_front", swapped / "test" / "ok_front")
    shutil.copytree(learnable / "test" / "ok_front", swapped / "test" / "def_front")
    printed = trained.succeed("src/evaluation.py", "--data", swapped)
    assert "Registered as Testing_Reg version 1, below the test accuracy of 60%" in printed
    client = MlflowClient()
    assert str(client.get_model_version_by_alias("Testing_Reg", "re-train").version) == "1"
    assert str(client.get_model_version_by_alias("Production_Reg", "prod").version) == "1"


@pytest.mark.long
def test_champion_is_judged_on_the_same_pictures_and_a_person_has_the_last_word(
    trained, learnable, tmp_path
):
    if not trained.uri.startswith("sqlite"):
        pytest.skip("test_promotion.py covers the stores")
    other = draw_folders(tmp_path / "other", train=1, test=12, seed=5)
    shutil.rmtree(other / "train")
    shutil.copytree(learnable / "train", other / "train")
    printed = trained.succeed("src/evaluation.py", "--data", other)
    assert "models:/Production_Reg/1 scored again on these images: accuracy" in printed
    assert "Compared with Production_Reg version 1 (prod): the same" in printed
    assert "prod is version 1 with a test accuracy" in printed
    assert "and stays, since this one is not better" in printed
    first, second = versions.with_accuracy("Production_Reg")
    assert first.acc == second.acc and first.test_digest == second.test_digest
    assert first.tags["acc_unseen"] == "unknown" != second.tags["acc_unseen"]
    decide = {"promotion": "significant"}
    trained.configure(lambda config: config["decisions"].update(decide))
    printed = trained.succeed("src/evaluation.py", "--data", other)
    assert "only a version that is significantly better replaces it" in printed

    trained.succeed("src/promote.py", "--version", 3, "--why", "a second pair of eyes")
    picture = next((learnable / "test" / "ok_front").iterdir())
    assert "version 3, test accuracy" in trained.run("src/inference.py", picture).stderr

    # A person moved the alias away from version 1: a rollback does not bring it back.
    assert "no former version to go back to" in trained.fail("src/promote.py", "--rollback")
    said = trained.succeed("src/promote.py", "--version", 1, "--why", "misses\ncracks")
    assert said.startswith("prod of Production_Reg is version 1, was 3\nset aside")
    assert "version 1, test accuracy" in trained.run("src/inference.py", picture).stderr
    listed = trained.succeed("src/promote.py", "--list").splitlines()
    assert [line.split()[0] for line in listed if line.endswith("prod")] == ["*"]
    assert "set aside, not significantly better" in listed[2]
    assert re.search(r"  3 -> 1  misses cracks  by .+ on \S+  commit [0-9a-f]{12}$", listed[7])
    assert "none -> 1  highest acc" in listed[9]
    assert "prod is version 1 of Production_Reg already" in trained.fail(
        "src/promote.py", "--version", 1
    )


@pytest.mark.long
def test_same_seed_gives_the_same_validation_accuracy(trained, learnable):
    if not trained.uri.startswith("sqlite"):
        pytest.skip("says nothing of the store")
    before = mlflow.search_runs(experiment_names=["train/casting"], output_format="list")
    (first,) = [run for run in before if run.info.run_name == "one"]
    trained.succeed("src/train.py", "--data", learnable, "--set", "one")
    second = json.loads((trained.root / "best_model.json").read_text())
    assert first.info.run_id != second["run_id"]
    assert abs(first.data.metrics["best_val_accuracy"] - second["val_accuracy"]) < 1e-6


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example(script):
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    assert f"example:\n  python {script}" in done.stdout
    assert "--data DIR" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_folder_is_one_line(project, script, tmp_path):
    assert "gone is not a folder" in project.fail(script, "--data", tmp_path / "gone")


def test_empty_class_folder_is_one_line(project):
    draw_folders(project.data, train=2, test=2)
    for path in (project.data / "train" / "ok_front").iterdir():
        path.unlink()
    assert "train/ok_front holds no images" in project.fail("src/train.py")


def test_too_many_broken_pictures_are_refused(project):
    draw_folders(project.data, train=4, test=2)
    (project.data / "train" / "def_front" / "part_001.jpeg").write_bytes(b"")
    assert "1 of 8 cannot be read" in project.fail("src/train.py")
    assert not (project.root / "best_model.json").exists()


def test_missing_best_model_is_one_line(project, _store):
    draw_folders(project.data, train=1, test=1)
    last = project.fail("src/evaluation.py", MLFLOW_TRACKING_URI=_store)
    assert "best_model.json does not exist" in last


def test_no_version_behind_the_alias_is_one_line(project, _store):
    draw_folders(project.data, train=1, test=1)
    last = project.fail("src/inference.py", MLFLOW_TRACKING_URI=_store)
    assert "No version of Production_Reg has the alias prod" in last


@pytest.mark.parametrize("script", SCRIPTS)
def test_unreachable_server_is_one_line(project, script):
    """`project.run` does not wait as long as MLflow would retry."""
    draw_folders(project.data, train=1, test=1)
    last = project.fail(script, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "The tracking server http://127.0.0.1:9 does not answer" in last


@pytest.mark.parametrize(
    ("section", "key", "script"),
    [("best_model", "{}/best_model.json", "src/train.py"), ("cache", "{}/cache", "src/train.py")],
)
def test_folder_that_cannot_be_written_is_one_line(project, section, key, script):
    draw_folders(project.data, train=1, test=1)
    folder = unwritable(project.root)
    project.configure(lambda c: c["paths"].update({section: key.format(folder)}))
    last = project.fail(script)
    assert str(folder) in last
    assert "cannot be written" in last


@pytest.mark.long
def test_terminated_training_ends_its_run(project):
    draw_folders(project.data, train=20, test=1)
    project.configure(lambda c: c["model_parameters"]["sets"][0].update(epochs=500))
    with (project.root / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "src/train.py"],
            cwd=project.root,
            env=project.environment(),
            stdout=output,
        )
    try:
        wait_for(lambda: "epoch 3 of" in (project.root / "output").read_text())
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    experiment = client.get_experiment_by_name("train/casting")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert not (project.root / "best_model.json").exists()


def test_store_in_a_folder_that_cannot_be_written_is_one_line(project):
    draw_folders(project.data, train=1, test=1)
    folder = unwritable(project.root)
    last = project.fail("src/train.py", MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")
    assert f"{folder}/" in last


def unwritable(root: Path) -> Path:
    """Return a folder that cannot be written, not even by root where that can be had."""
    folder = root / "read-only"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    try:
        (folder / "probe").touch()
    except OSError:
        return folder
    (folder / "probe").unlink()
    if not Path("/sys/kernel").is_dir():
        pytest.skip("root may write everywhere here")
    return Path("/sys/kernel")
