"""The gate, registration and the aliases."""

import math
from dataclasses import replace

import mlflow
import pytest
from mlflow import MlflowClient

from defect_detection import settings
from defect_detection.registry import store, versions
from defect_detection.settings import CONFIG_FILE, Config, MLflowNames

TAGS = {"acc_unseen": "0.75", "leaked_share": "0.0", "test_digest": "abc"}


@pytest.fixture
def names(store, request) -> MLflowNames:
    """Registered models of the test's own in the shared store."""
    configured = settings.read_yaml(CONFIG_FILE, Config).mlflow
    own = request.node.name.replace("[", "_").replace("]", "")
    return replace(
        configured,
        production_model_name=f"Production_{own}",
        testing_model_name=f"Testing_{own}",
    )


@pytest.fixture
def register(names):
    """Register a version with an accuracy, as evaluation does."""
    with mlflow.start_run(experiment_id=store.open_experiment("train/registry")) as run:
        pass

    def one(acc: float, name: str = "") -> versions.Version:
        name = name or versions.gate(acc, names)
        return versions.register(
            run.info.artifact_uri, run.info.run_id, acc, "described", name, TAGS
        )

    return one


def alias(name: str, alias: str) -> int:
    return int(MlflowClient().get_model_version_by_alias(name, alias).version)


@pytest.mark.parametrize(
    ("acc", "production"), [(0.6, True), (1.0, True), (0.599999, False), (0.0, False)]
)
def test_gate_opens_at_60_percent(acc, production, names):
    expected = names.production_model_name if production else names.testing_model_name
    assert versions.gate(acc, names) == expected


def test_version_carries_accuracy_and_description(register):
    version = register(2 / 3)
    found = MlflowClient().get_model_version(version.name, str(version.number))
    assert float(found.tags["acc"]) == 2 / 3
    assert found.description == "described"
    assert {key: found.tags[key] for key in TAGS} == TAGS


def test_testing_alias_follows_the_newest_version(register, names):
    for acc, expected in ((0.5, 1), (0.3, 2)):
        register(acc)
        versions.queue_for_retraining(names)
        assert alias(names.testing_model_name, "re-train") == expected


def test_versions_without_accuracy_are_named_and_left_out(register, names, caplog):
    register(0.7)
    register(0.9)
    MlflowClient().delete_model_version_tag(names.production_model_name, "2", "acc")
    assert [v.number for v in versions.with_accuracy(names.production_model_name)] == [1]
    assert "version 2 has no accuracy" in caplog.text


ACCURACIES = [1.0, 0.9999, 0.99, 0.985, 0.91, 0.9, 0.85, 0.5, 0.1, 0.05, 0.0004, 1e-05, 5e-324, 0.0]


def test_highest_is_the_one_of_all_that_are_wanted(register, names):
    every = [*ACCURACIES[::2], *ACCURACIES[::-1]]  # each second one twice
    name = names.production_model_name
    for acc in every:
        register(acc, name)
    for number, acc in enumerate(ACCURACIES):
        wanted = ACCURACIES[number:]
        found = versions.highest(name, "abc", lambda one, wanted=wanted: one.acc in wanted)
        newest = max(n for n, other in enumerate(every, 1) if other == acc)
        assert (found.acc, found.number) == (acc, newest)
    assert versions.highest(name, "abc", lambda one: False) is None
    assert versions.highest(name, "def", lambda one: True) is None


def test_version_gets_the_figures_of_other_pictures(register):
    version = register(0.7)
    tags = {"acc_unseen": "unknown", "test_digest": "def", "escapes": "none"}
    versions.update(version, 0.8, tags, "scored again")
    (found,) = versions.with_accuracy(version.name)
    assert (found.acc, found.test_digest, found.tags["escapes"]) == (0.8, "def", "none")
    described = MlflowClient().get_model_version(version.name, "1").description
    assert described == "scored again"


def test_update_that_is_cut_off_leaves_figures_of_no_pictures(register, monkeypatch):
    version = register(0.7)
    real = versions.set_tags

    def cut_off(version, tags):
        if "acc" in tags:
            raise KeyboardInterrupt
        real(version, tags)

    monkeypatch.setattr(versions, "set_tags", cut_off)
    with pytest.raises(KeyboardInterrupt):
        versions.update(version, 0.8, {"test_digest": "def"}, "scored again")
    (found,) = versions.with_accuracy(version.name)
    assert found.test_digest == ""


@pytest.mark.parametrize("acc", ["a lot", "", "nan", "inf", "1.2", "-0.1", "9e-1", " 0.9"])
def test_accuracy_that_someone_edited_is_no_accuracy(register, acc, caplog):
    version = register(0.9)
    versions.set_alias(version, versions.PRODUCTION_ALIAS)
    MlflowClient().set_model_version_tag(version.name, "1", "acc", acc)
    assert math.isnan(versions.in_production(version.name).acc)
    assert versions.with_accuracy(version.name) == []
    assert f"{version.name} version 1 has no accuracy in its tag 'acc'" in caplog.text
