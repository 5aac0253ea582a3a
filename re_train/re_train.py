"""Fine-tune the model at Testing_Reg@re-train, evaluate it and register it.

If there is none, the model at Production_Reg@prod is fine-tuned; if there is none either, a new
model is fitted. Parameters come from re_train/re_train.yaml and, where it has none, from
src/config.yaml: a new model has the layers and the learning rate of its first set.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from defect_detection import cli, progress, settings  # noqa: E402
from defect_detection.dataset import split as splits  # noqa: E402
from defect_detection.dataset.field import FieldUse  # noqa: E402
from defect_detection.dataset.folder import DataFolder  # noqa: E402
from defect_detection.dataset.split import Split  # noqa: E402
from defect_detection.pipeline import delivery, fit, record, tell  # noqa: E402
from defect_detection.pipeline.delivery import Purpose  # noqa: E402
from defect_detection.pipeline.evaluate import (  # noqa: E402
    EvaluationPlan,
    evaluate_and_register,
)
from defect_detection.pipeline.fit import FitPlan, Observer  # noqa: E402
from defect_detection.pipeline.journal import RunInfo  # noqa: E402
from defect_detection.pipeline.record import Trained  # noqa: E402
from defect_detection.pipeline.register import Rules  # noqa: E402
from defect_detection.registry import promotion, runs, saved_model, store, versions  # noqa: E402
from defect_detection.registry.versions import PRODUCTION_ALIAS, Version  # noqa: E402
from defect_detection.runtime.preprocessing import ImageFormat  # noqa: E402
from defect_detection.service.reporter import Reporter  # noqa: E402
from defect_detection.settings import (  # noqa: E402
    Config,
    FitParameters,
    HyperParameters,
    MLflowNames,
    ModelParameters,
    RetrainConfig,
    RetrainOverrides,
)

if TYPE_CHECKING:
    import keras

SYNC = "python src/train.py --sync"
RETRAIN_FILE = ROOT / "re_train" / "re_train.yaml"


@dataclass(frozen=True)
class Start:
    """What a retraining starts from.

    Attributes:
        version: to fine-tune, None to fit a new model.
        source: the version in words, or that the model is new.
        takes: the pixels that the model takes.
        good_only: whether there are too few defects to learn from.
    """

    version: Version | None
    source: str
    takes: ImageFormat
    good_only: bool


def main() -> None:
    """Read settings, data and model; then fine-tune, evaluate, register, and try two images."""
    parser = cli.parser(__doc__, "python re_train/re_train.py --epochs 3")
    RetrainOverrides.add_options(parser)
    options = parser.parse_args()
    overrides = RetrainOverrides.from_options(options)
    env = settings.environment()
    config = settings.read_config(options.config)
    own = settings.read_yaml(RETRAIN_FILE, RetrainConfig)
    names = own.mlflow.of(config.product)
    folder = DataFolder.choose(options, env, config, own.paths.data_path)
    device, reporter = settings.device(env), Reporter(env)
    reporter.outlive_full_disk()
    promote = cli.command("src/promote.py", options, ["config"])
    rules = Rules(names, config.decisions, promotion.actor(env), promote)
    evaluation = EvaluationPlan(rules, prefix="test_", outcome=reporter)

    cache = settings.from_root(config.paths.cache)
    with store.connected(settings.tracking_uri(env), create=True), runs.watched(cache):
        delivery.deliver_all(cache)
        promotion.check_record(names.production_model_name)
        store.open_experiment(names.experiment_name)  # an error comes before the work
        examples = folder.examples(own.inference_examples, print)
        version = choose_version(names)
        takes = choose_format(version, folder, own, config.model_parameters)
        use = FieldUse(config.line.field_test_share, own.include_inbox)
        split = splits.load(folder, takes, use)
        start = choose_start(version, names, takes, split.training.few_defects)
        print(f"Starting from {start.source}\n{split.leakage}", flush=True)
        planned = plan(config, own, overrides, start, device)
        said = f"A retraining from {start.source} on {split.training}, judged on {split.testing}."
        purpose = Purpose(1, split.training.digest, "", SYNC)
        with delivery.training(cache, purpose) as kept:
            with kept.run(RunInfo(names.experiment_name, "re-train", said, {})) as fitted:
                fitted.append(fit_and_record(start, split, planned, reporter))
            kept.finish()
        classifier = saved_model.load_classifier(kept.best.model_uri)
        with record.gone_on(kept.best.run_id):
            evaluate_and_register(kept.best, classifier, split, evaluation)
    for image in examples:
        print(f"{image}  {classifier.classify(image)}")


def fit_and_record(start: Start, split: Split, planned: FitPlan, reporter: Reporter) -> Trained:
    """Fit the model and record it."""
    training = split.training
    record.started_from(start.source, start.version.source if start.version else "")
    record.dataset(training, "training")
    record.plan(planned, training)
    report_epoch(planned, reporter, 0, {})
    on_epoch = partial(report_epoch, planned, reporter)
    with progress.shown("Training", fit.costs([planned])) as shown:
        fitted = fit.fit(planned, training, Observer(shown, record.device, on_epoch))
    record.fit(fitted)
    return record.model(fitted, fit.to_served(fitted, training), training.content(0))


def choose_version(names: MLflowNames) -> Version | None:
    """Return the version to fine-tune, None to fit a new model."""
    waiting = versions.with_alias(names.testing_model_name, names.testing_model_alias)
    return waiting or versions.in_production(names.production_model_name)


def describe(start: Version | None, names: MLflowNames) -> str:
    """Return in words what the retraining starts from."""
    if start is None:
        return "a new model"
    waiting = start.name == names.testing_model_name
    alias = names.testing_model_alias if waiting else PRODUCTION_ALIAS
    return f"{start.name} version {start.number} ({alias})"


def choose_format(
    version: Version | None, folder: DataFolder, own: RetrainConfig, shared: ModelParameters
) -> ImageFormat:
    """Return the pixels that the model takes: those that the version to fine-tune takes."""
    configured = own.model_parameters.image_size
    if version is None:
        if configured != shared.image_size:
            print(
                f"A new model takes images of {configured[0]} x {configured[1]} (re_train.yaml), "
                f"those of src/train.py {shared.image_size[0]} x {shared.image_size[1]}: neither "
                f"replaces the other in production by itself"
            )
        return folder.image_format(configured, shared.color)
    saved = saved_model.load_classifier(version.uri).takes
    takes = replace(saved, most_pixels=folder.most_pixels)  # the configuration may allow more now
    if (takes.height, takes.width) != configured:
        print(
            f"{version.uri} takes images of {takes}; image_size {list(configured)} is for a new "
            f"model"
        )
    return takes


def choose_start(
    version: Version | None, names: MLflowNames, takes: ImageFormat, good_only: bool
) -> Start:
    """Decide whether a version is fine-tuned; models of good parts alone are fitted anew."""
    source = describe(version, names)
    if version is None:
        return Start(None, source, takes, good_only)
    if good_only:
        why = "there are too few defects to fine-tune it"
        return Start(None, f"a new model and not {source}, since {why}", takes, good_only)
    from defect_detection.training import network  # TensorFlow takes 4 s to import

    if network.is_good_only(saved_model.load_keras(version.uri)):
        why = "that learned from good parts alone"
        return Start(None, f"a new model and not {source}, since {why}", takes, good_only)
    return Start(version, source, takes, good_only)


def plan(
    config: Config,
    own: RetrainConfig,
    overrides: RetrainOverrides,
    start: Start,
    device: str,
) -> FitPlan:
    """Return how the model is fitted."""
    shared, first = config.model_parameters, config.model_parameters.sets[0]
    if start.good_only:
        first = replace(first, head="good")
    parameters = replace(own.model_parameters, **overrides.given())
    if start.version is None and overrides.learning_rate is None:
        # The rate for fine-tuning is too low to fit a new model.
        parameters = replace(parameters, learning_rate=first.learning_rate)
    return FitPlan(
        name="re-train",
        make_model=partial(make_model, start, first),
        parameters=FitParameters(
            parameters.learning_rate,
            first.weight_decay,
            parameters.batch_size,
            parameters.epochs,
            shared.validation_share,
            shared.seed,
        ),
        sampling=shared.sampling(settings.from_root(config.paths.cache)),
        decisions=config.decisions,
        quantize=shared.quantize,
        device=device,
        good_only=start.good_only,
        layers=first.layers() if start.version is None else {},
    )


def make_model(start: Start, hyper: HyperParameters) -> "keras.Model":
    """Load the Keras model to fine-tune, or build a new one with the layers of `hyper`."""
    from defect_detection.training import network

    if start.version is not None:
        return saved_model.load_keras(start.version.uri)
    return network.build(start.takes.shape, hyper)


def report_epoch(
    planned: FitPlan, reporter: Reporter, number: int, values: dict[str, float]
) -> None:
    """Log and print an epoch, and report it to the API; number 0 is the start."""
    if number:
        record.epoch(number, values)
        tell.epoch(planned, number, values)
    reporter.progress(number, planned.parameters.epochs, record.run_id())


if __name__ == "__main__":
    cli.run(main)
