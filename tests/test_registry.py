"""The gate, registration and the aliases."""

import threading
from dataclasses import replace

import mlflow
import pytest
from mlflow import MlflowClient

from defect_detection import PipelineError, registry, settings, tracking
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
    with mlflow.start_run(experiment_id=tracking.open_experiment("train/registry")) as run:
        pass

    def one(acc: float) -> registry.Version:
        name = registry.gate(acc, names)
        return registry.register(
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
    assert registry.gate(acc, names) == expected


def test_version_carries_accuracy_and_description(register):
    version = register(2 / 3)
    found = MlflowClient().get_model_version(version.name, str(version.number))
    assert float(found.tags["acc"]) == 2 / 3
    assert found.description == "described"
    assert {key: found.tags[key] for key in TAGS} == TAGS


def test_alias_goes_to_the_highest_accuracy_and_stays_there(register, names):
    for acc, expected in ((0.7, 1), (0.9, 2), (0.8, 2), (0.95, 4)):
        register(acc)
        assert registry.promote(names).number == expected
        assert alias(names.production_model_name, "prod") == expected
    assert registry.production_version(names).acc == 0.95


def test_tie_goes_to_the_newer_version(register, names):
    for expected in (1, 2):
        register(0.75)
        assert registry.promote(names).number == expected


def test_accuracies_are_compared_as_numbers_not_as_texts(register, names):
    register(0.7)
    register(1.0)
    MlflowClient().set_model_version_tag(names.production_model_name, "1", "acc", "7e-1")
    assert registry.promote(names).number == 2


def test_version_without_accuracy_never_gets_the_alias(register, names, caplog):
    register(0.7)
    register(0.9)
    MlflowClient().delete_model_version_tag(names.production_model_name, "2", "acc")
    assert registry.promote(names).number == 1
    assert "version 2 has no accuracy" in caplog.text


def test_testing_alias_follows_the_newest_version(register, names):
    for acc, expected in ((0.5, 1), (0.3, 2)):
        register(acc)
        registry.queue_for_retraining(names)
        assert alias(names.testing_model_name, "re-train") == expected


def test_better_version_registered_between_look_and_move_gets_the_alias(
    register, names, monkeypatch
):
    register(0.7)
    real, once = MlflowClient.set_registered_model_alias, []

    def registering_first(client, *arguments):
        if not once:
            once.append(register(0.9))
        return real(client, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", registering_first)
    assert registry.promote(names).number == 2
    assert alias(names.production_model_name, "prod") == 2


def test_simultaneous_promotions_leave_the_alias_on_the_best(register, names):
    accuracies = [0.6, 0.95, 0.7, 0.8]

    def evaluate(acc: float) -> None:
        register(acc)
        registry.promote(names)

    threads = [threading.Thread(target=evaluate, args=(acc,)) for acc in accuracies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.versions(names.production_model_name)) == 4
    assert registry.production_version(names).acc == 0.95


def test_missing_alias_is_said_with_the_way_to_get_it(names, register):
    with pytest.raises(PipelineError, match="Run 'python src/train.py', then"):
        registry.production_version(names)
    register(0.9)
    with pytest.raises(PipelineError, match="has the alias prod"):
        registry.production_version(names)
