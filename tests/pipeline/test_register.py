"""How a model is registered: compared with the one in production, by the configured rule."""

from dataclasses import replace

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from conftest import Project, draw_folders
from defect_detection import PipelineError, StoreError, settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.evaluation import metrics
from defect_detection.evaluation.release import Registration
from defect_detection.evaluation.result import evaluate
from defect_detection.pipeline import record
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.champions import Champions
from defect_detection.pipeline.register import Rules, carry_out, foresee, register
from defect_detection.registry import promotion, saved_model, versions
from defect_detection.registry import store as stores
from defect_detection.runtime.decision import DEFAULT_OPERATING_POINT
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import CONFIG_FILE, Config

DECISIONS = settings.read_yaml(CONFIG_FILE, Config).decisions
# What else decides is not the question of most tests.
LENIENT = replace(DECISIONS, refuse_chance=False, refuse_escapes=False, refuse_overkill=False)
TAKES = ImageFormat(32, 32)


class Right:
    """A model that judges a number of the images rightly, the first ones."""

    point = DEFAULT_OPERATING_POINT
    takes = TAKES
    full_evidence = None
    litert_sha256 = ""

    def __init__(self, labels: np.ndarray, right: int):
        found = labels == 1
        found[right:] = ~found[right:]
        self.probabilities = np.where(found, 0.9, 0.1).astype(np.float32)

    def examine(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert pictures.shape[1:] == self.takes.shape
        return self.probabilities, np.zeros((len(pictures), 8, 8), np.float32)

    def ood_reasons(self, pictures: np.ndarray) -> list[str]:
        return ["blurred", *[""] * (len(pictures) - 1)]


class Line:
    """Registers models, on the same images or on others, as evaluations do."""

    def __init__(self, folder, names, monkeypatch):
        self.decisions = LENIENT
        data = DataFolder(draw_folders(folder / "data", train=3, test=40), Project.cache)
        self.split = splits.load(data, TAKES)
        self.names = names
        self.models: dict[str, Right] = {}
        self.error: type[PipelineError] = PipelineError
        monkeypatch.setattr(saved_model, "load_classifier", self.load)

    def load(self, uri: str) -> Right:
        if uri not in self.models:
            raise self.error(f"{uri}: its files cannot be fetched")
        return self.models[uri]

    def register(self, right: int, rule: str = "highest_acc") -> Registration:
        return self.register_model(Right(self.split.testing.labels.copy(), right), rule)

    def register_model(
        self, model: Right, rule: str = "highest_acc", uri: str | None = None
    ) -> Registration:
        experiment = stores.open_experiment("eval/steps")
        with mlflow.start_run(experiment_id=experiment) as run:
            logged = MlflowClient().create_logged_model(experiment, source_run_id=run.info.run_id)
            uri = uri or logged.model_uri
            trained = BestModel(run.info.run_id, uri, 0.75, "digest", "now")
            evaluated = evaluate(model, self.split)
            decisions = replace(self.decisions, promotion=rule)
            rules = Rules(self.names, decisions, "tester", "python src/promote.py --config a.yaml")
            champions = Champions(self.split)
            version, decision = register(trained, evaluated, champions, rules)
            record.version(version, decision.compared(), decision.comparison)
            foreseen = foresee(version, decision, champions, rules)
            done = carry_out(version, decision, champions, rules)
            assert (done.decision, done.in_production) == (
                foreseen.decision,
                foreseen.in_production,
            )
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
    # What it is worth on the other images.
    line.models[first.uri] = Right(line.split.testing.labels.copy(), 55)
    line.take_other_pictures()
    second = line.register(58)
    assert second.in_production
    again = versions.with_accuracy(first.name)[0]
    assert (again.acc, again.test_digest) == (55 / 80, "other images")
    assert again.tags["acc_unseen"] == again.tags["leaked_share"] == "unknown"
    assert f"{first.uri} scored again on these images: accuracy 0.6875" in capsys.readouterr().out


def test_champion_whose_accuracy_someone_edited_is_scored_again(line):
    line.register(79)
    MlflowClient().set_model_version_tag(line.prod.name, "1", "acc", "none")
    assert not line.register(70).in_production
    assert line.prod.acc == 79 / 80


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


class Verdicts(Right):
    """A model whose probabilities are given."""

    def __init__(self, probabilities: np.ndarray):
        self.probabilities = probabilities.astype(np.float32)


def test_champion_whose_files_are_away_for_a_moment_keeps_the_alias(line):
    line.register(60)
    line.error = StoreError
    models, line.models = line.models, {}
    second = line.register(79)
    assert not second.in_production and line.prod.number == 1
    assert "and stays: it cannot be compared now (" in second.decision
    assert f"promote.py --config a.yaml --version {second.version.number}" in second.decision
    line.models = models | line.models
    assert line.register(70).in_production is False
    assert line.prod.number == 2  # compared now, it is the best


def test_model_that_a_person_set_aside_does_not_come_back_by_another_evaluation(line):
    line.register(60)
    second = line.register(79)
    promotion.roll_back(second.version.name, "misses cracks", "tester")
    uri = versions.with_accuracy(second.version.name)[1].source
    again = line.register_model(Right(line.split.testing.labels.copy(), 79), uri=uri)
    assert not again.in_production and line.prod.number == 1
    assert "it is the same model as version 2, which a person set aside" in again.decision
    assert line.register(80).in_production


def test_version_of_which_the_evaluation_did_not_end_gets_no_alias(line, monkeypatch):
    """As when the disk of the artifacts is full at the report."""
    line.register(60)
    monkeypatch.setattr("test_register.foresee", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        line.register(80)
    monkeypatch.undo()
    monkeypatch.setattr(saved_model, "load_classifier", line.load)
    unfinished = versions.with_accuracy(line.prod.name)[1]
    assert unfinished.why_not_released == "its evaluation did not end"
    line.register(50)
    assert line.prod.number == 1


def test_two_images_do_not_replace_a_champion_that_was_tested_on_many(line):
    """Nor are its figures overwritten by those on the two."""
    line.register(79)
    before = line.prod
    strict(line, defects=1, good=1)
    second = line.register(2)
    assert second.version.acc == 1 and not second.in_production
    assert second.version.why_not_released.startswith("1 photograph of defects cannot tell a model")
    line.decisions = replace(line.decisions, refuse_chance=False)
    third = line.register(2)
    assert third.release.released and not third.in_production
    assert "and stays: it was tested on 1 def_front, 1 ok_front photographs" in third.decision
    assert (line.prod.acc, line.prod.tags) == (before.acc, before.tags)


def strict(line: Line, defects: int, good: int) -> np.ndarray:
    """Let all rules count, on fewer of the test images; return their labels."""
    labels = line.split.testing.labels
    rows = np.r_[np.flatnonzero(labels == 1)[:defects], np.flatnonzero(labels == 0)[:good]]
    kept = replace(
        line.split.testing,
        images=line.split.testing.images[rows],
        labels=labels[rows],
        photographs=np.arange(len(rows)),
        paths=tuple(line.split.testing.paths[row] for row in rows),
        digest=f"{defects} and {good}",
    )
    line.split = replace(line.split, testing=kept)
    line.decisions = DECISIONS
    return kept.labels


def test_a_model_that_rejects_most_good_parts_is_not_released(line):
    """It finds every defect and has an accuracy of 0.69, since there are few good parts."""
    labels = strict(line, defects=40, good=20)
    done = line.register_model(Verdicts(np.where(np.arange(60) < 59, 0.9, 0.1)))
    assert done.version.name == line.names.production_model_name
    assert done.version.acc == pytest.approx(41 / 60) and labels.sum() == 40
    assert not done.in_production and line.prod is None
    assert done.decision.endswith("version 1, not released; no version has the alias prod")
    assert done.version.tags["released"] == "false"
    assert "19 of 20 photographs of good parts are rejected" in done.version.why_not_released
    assert "at most 10% were asked for" in done.version.why_not_released
    (first, *_) = done.release.advice
    assert first == "more photographs of def_front: training has 3"


def test_a_model_that_finds_no_defect_does_not_take_prod_from_one_that_does(line):
    """Its accuracy of 0.89 is higher, since there are few defects."""
    labels = strict(line, defects=6, good=40)
    passes_some = np.where(labels == 1, 0.9, 0.1)
    passes_some[-6:] = 0.9  # good parts that it rejects
    champion = line.register_model(Verdicts(passes_some))
    assert champion.in_production and champion.version.acc == pytest.approx(40 / 46)
    blind = line.register_model(Verdicts(np.full(46, 0.1)))
    assert blind.version.acc == pytest.approx(40 / 46)
    assert not blind.in_production and line.prod.number == champion.version.number
    assert (
        "a balanced accuracy of 0.50 by photograph may be chance"
        in blind.version.tags["not_released"]
    )
    assert "6 of 6 photographs of defects pass" in blind.version.why_not_released
    # Nor does a person put it there, as long as the rule stands.
    with pytest.raises(PipelineError, match="version 2 is not released: .* Evaluate it again"):
        promotion.choose(blind.version.name, 2, "why not", "tester")
    assert line.prod.number == 1


def test_each_rule_of_the_release_can_be_turned_off(line):
    labels = strict(line, defects=6, good=40)
    line.decisions = replace(DECISIONS, refuse_chance=False)
    assert not line.register_model(Verdicts(np.full(len(labels), 0.1))).release.released
    line.decisions = replace(line.decisions, refuse_escapes=False)
    assert line.register_model(Verdicts(np.full(len(labels), 0.1))).in_production


def test_a_version_that_takes_other_images_does_not_replace_the_champion(line):
    """A person may decide; the champion is not scored again."""
    line.register(60)
    model = Right(line.split.testing.labels.copy(), 79)
    model.takes = ImageFormat(64, 96)
    second = line.register_model(model)
    assert not second.in_production and line.prod.number == 1
    assert "it takes images of 64 x 96, grey, version 1 of 32 x 32, grey" in second.decision
    assert "python src/promote.py --config a.yaml --version 2" in second.decision
    promotion.choose(second.version.name, 2, "larger images", "tester")
    assert line.prod.number == 2


def test_a_version_below_the_accuracy_of_production_is_not_released(line):
    """It waits for retraining, and the evaluation says what it lacks."""
    first = line.register(40)
    assert first.version.name == line.names.testing_model_name
    assert first.version.tags["released"] == "false"
    assert first.release.reasons[0] == "a test accuracy of 0.5000 is below 60%"


def test_a_person_is_not_asked_about_a_version_that_is_not_released(line):
    line.register(60)
    model = Verdicts(np.full(80, 0.9))
    model.takes = ImageFormat(64, 96)
    line.names = replace(line.names, evaluation_threshold=0.4)
    line.decisions = DECISIONS
    second = line.register_model(model)
    assert not second.release.released and "and stays: it takes images of" in second.decision
    assert "promote.py" not in second.decision


def test_a_version_of_another_product_neither_replaces_nor_rescores_the_champion(line):
    line.register(60)
    before = line.prod.tags
    foreign = tuple(f"{number:064x}" for number in range(80))
    testing = replace(line.split.testing, contents=foreign, digest="another product")
    training = replace(line.split.training, contents=("f" * 64,) * len(line.split.training))
    line.split = replace(line.split, testing=testing, training=training)
    second = line.register(80)
    assert second.version.acc == 1 and not second.in_production
    assert "its data has no image in common with that of version 1" in second.decision
    assert second.comparison is None
    assert {k: v for k, v in line.prod.tags.items() if "promotion" not in k} == {
        k: v for k, v in before.items() if "promotion" not in k
    }


def test_data_that_grew_is_still_the_same_product(line):
    line.register(60)
    grown = (*line.split.testing.contents[:10], *(f"{number:064x}" for number in range(70)))
    testing = replace(line.split.testing, contents=grown, digest="grown")
    line.split = replace(line.split, testing=testing)
    assert line.register(62).in_production
