"""How a model is registered: compared with the one in production, by the configured rule."""

from dataclasses import replace

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from conftest import Project, draw_folders
from defect_detection import PipelineError, settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.evaluation import metrics
from defect_detection.evaluation.result import Evaluation, Registration, evaluate
from defect_detection.pipeline import record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.champions import Champions
from defect_detection.pipeline.register import Rules, move_alias, register
from defect_detection.registry import saved_model, versions
from defect_detection.registry import store as stores
from defect_detection.runtime.decision import DEFAULT_OPERATING_POINT
from defect_detection.settings import CONFIG_FILE, Config

SIZE = (32, 32)


class Right:
    """A model that judges a number of the images rightly, the first ones."""

    point = DEFAULT_OPERATING_POINT
    image_size = SIZE

    def __init__(self, labels: np.ndarray, right: int):
        found = labels == 1
        found[right:] = ~found[right:]
        self.probabilities = np.where(found, 0.9, 0.1).astype(np.float32)

    def examine(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert pictures.shape[1:3] == self.image_size
        return self.probabilities, np.zeros((len(pictures), 8, 8), np.float32)

    def ood_reasons(self, pictures: np.ndarray) -> list[str]:
        return ["blurred", *[""] * (len(pictures) - 1)]


class Line:
    """Registers models, on the same images or on others, as evaluations do."""

    def __init__(self, folder, names, monkeypatch):
        data = DataFolder(draw_folders(folder / "data", train=3, test=40), Project.cache)
        self.split = splits.load(data, SIZE)
        self.names = names
        self.models: dict[str, Right] = {}
        monkeypatch.setattr(saved_model, "load_classifier", self.load)

    def load(self, uri: str) -> Right:
        if uri not in self.models:
            raise PipelineError(f"{uri}: its files cannot be fetched")
        return self.models[uri]

    def judged(self, right: int) -> tuple[Right, Evaluation]:
        model = Right(self.split.testing.labels.copy(), right)
        return model, evaluate(model, self.split)

    def register(self, right: int, rule: str = "highest_acc") -> Registration:
        experiment = stores.open_experiment("eval/steps")
        with mlflow.start_run(experiment_id=experiment) as run:
            logged = MlflowClient().create_logged_model(experiment, source_run_id=run.info.run_id)
            trained = BestModel(run.info.run_id, logged.model_uri, 0.75, "digest", "now")
            model, evaluated = self.judged(right)
            rules = Rules(self.names, rule, "tester")
            champions = Champions(self.split)
            version, decision = register(trained, evaluated, champions, rules)
            record.version(version, decision.compared(), decision.comparison)
            done = move_alias(version, decision, evaluated, champions, rules)
        self.models[done.version.uri] = model
        self.run = mlflow.get_run(run.info.run_id)
        return done

    def take_other_pictures(self) -> None:
        testing = replace(self.split.testing, digest="other images")
        self.split = replace(self.split, testing=testing)

    @property
    def prod(self) -> versions.Version:
        return versions.in_production(self.names.production_model_name)


@pytest.fixture
def line(store, tmp_path, monkeypatch, request) -> Line:
    names = settings.read_yaml(CONFIG_FILE, Config).mlflow
    own = request.node.name.replace("[", "_").replace("]", "")
    names = replace(
        names, production_model_name=f"Production_{own}", testing_model_name=f"Testing_{own}"
    )
    return Line(tmp_path, names, monkeypatch)


def test_first_version_is_compared_with_none(line):
    first = line.register(60)
    assert first.in_production and first.champion is None and first.comparison is None
    assert line.run.data.tags["comparison"] == "There was no version in production to compare with."


def test_difference_and_its_test_are_logged_and_a_small_one_is_not_significant(line):
    line.register(60)
    second = line.register(62)
    assert second.in_production and second.comparison.pictures == metrics.Paired(2, 0, 80)
    said = line.run.data.tags["comparison"]
    start = f"Compared with {line.names.production_model_name} version 1 (prod): not significant; "
    assert said.startswith(f"{start}of images: difference +2.50%")
    assert second.version.tags["comparison"] == said
    assert line.run.data.metrics["pictures_difference"] == 0.025
    assert line.run.data.metrics["photographs_p_value"] == 0.5


def test_rule_significant_moves_the_alias_only_if_significantly_better(line):
    line.register(60)
    second = line.register(63, "significant")
    assert not second.in_production
    assert "only a version that is significantly better replaces it" in second.decision
    assert line.prod.number == 1
    third = line.register(72, "significant")
    assert third.in_production and third.comparison.verdict == "better"
    # Nor does a later evaluation by the other rule bring the second back.
    line.register(50)
    assert line.prod.number == 3


def test_champion_of_an_easier_test_is_scored_again_and_loses(line, capsys):
    line.register(79)
    first = line.prod
    line.models[first.uri] = line.judged(55)[0]  # what it is worth on the other images
    line.models[first.uri].image_size = (64, 96)
    line.take_other_pictures()
    second = line.register(58)
    assert second.in_production
    again = versions.with_accuracy(first.name)[0]
    assert (again.acc, again.test_digest) == (55 / 80, "other images")
    assert again.tags["acc_unseen"] == again.tags["leaked_share"] == "unknown"
    assert f"{first.uri} scored again on these images: accuracy 0.6875" in capsys.readouterr().out


def test_champion_is_not_scored_again_by_a_model_that_goes_to_testing(line):
    line.register(79)
    line.take_other_pictures()
    assert line.register(20).version.name == line.names.testing_model_name
    assert line.prod.acc == 79 / 80


def test_champion_that_cannot_be_run_is_said_and_replaced(line):
    line.register(79)
    line.models.clear()
    second = line.register(60)
    assert second.in_production and second.comparison is None
    name = line.names.production_model_name
    said = f"{name} version 1 (prod) was not compared, since it cannot be run."
    assert line.run.data.tags["comparison"] == said
