"""Fine-tune the model that waits at Testing_Reg@re-train, evaluate it and register it.

Without a model there, the one at Production_Reg@prod is taken; without that one, a new model.
Parameters come from re_train/re_train.yaml; what is not there, from src/config.yaml, where the
layers and the learning rate of a new model are those of the first set.
"""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import mlflow  # noqa: E402

from defect_detection import (  # noqa: E402
    audit,
    dataset,
    jobs,
    promotion,
    registry,
    script,
    settings,
    steps,
    tracking,
)
from defect_detection.settings import (  # noqa: E402
    Config,
    HyperParameters,
    MLflowNames,
    RetrainConfig,
    RetrainOverrides,
    RetrainParameters,
    Schedule,
)

if TYPE_CHECKING:
    import keras

RETRAIN_FILE = ROOT / "re_train" / "re_train.yaml"


def main() -> None:
    """Settings, data, model; then fine-tune, evaluate, register and try it on two pictures."""
    options = arguments()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    own = settings.read_yaml(RETRAIN_FILE, RetrainConfig)
    parameters = override(own.model_parameters, options)
    folder = script.data_folder(options.data, env, own.paths.data_path)
    cache = settings.from_root(config.paths.cache)
    reporter = jobs.Reporter(env)

    with tracking.connected(settings.tracking_uri(env)):
        experiment = tracking.open_experiment(own.mlflow.experiment_name)
        split = audit.load(folder, parameters.image_size, cache)
        print(split.leakage)
        pictures = dataset.example_pictures(folder, own.inference_examples, print)
        start, source = choose_start(own.mlflow)
        print(f"Starting from {source}", flush=True)
        shared = config.model_parameters
        if start is None and options.learning_rate is None:
            # A rate that fine-tunes a model teaches a new one nothing.
            parameters = replace(parameters, learning_rate=shared.sets[0].learning_rate)
        with mlflow.start_run(experiment_id=experiment, run_name="re-train") as run:
            mlflow.set_tag("started_from", source)
            if start is None:
                mlflow.log_params(shared.sets[0].layers())
            tracking.log_dataset(split.training, folder, "training")
            reporter.progress(0, parameters.epochs, run.info.run_id)
            fitted = steps.fit(
                "re-train",
                partial(make_model, start, parameters.image_size, shared.sets[0]),
                split,
                folder,
                shared.sampling(cache),
                Schedule(
                    parameters.learning_rate,
                    shared.sets[0].weight_decay,
                    parameters.batch_size,
                    parameters.epochs,
                    shared.validation_share,
                    shared.seed,
                ),
                config.decisions,
                shared.quantize,
                settings.device(env),
                on_epoch=lambda epoch: reporter.progress(epoch, parameters.epochs, run.info.run_id),
            )
            classifier = registry.load_classifier(fitted.model_uri)
            version = steps.evaluate_and_register(
                classifier,
                fitted,
                split,
                folder,
                cache,
                own.mlflow,
                config.decisions,
                promotion.whoever(env),
                prefix="test_",
            )
    for picture in pictures:
        print(f"{picture}  {classifier.classify(picture)}")
    reporter.result(version.name, version.number, version.acc)


def arguments() -> Namespace:
    """Read the options; those of the parameters win over re_train.yaml."""
    parser = script.parser(__doc__, "python re_train/re_train.py --epochs 3")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    return parser.parse_args()


def override(parameters: RetrainParameters, options: Namespace) -> RetrainParameters:
    """Put the options that were given in the place of re_train.yaml's values.

    Raises:
        PipelineError: one is out of range.
    """
    given = {
        name: getattr(options, name)
        for name in ("epochs", "batch_size", "learning_rate")
        if getattr(options, name) is not None
    }
    settings.parse_json(json.dumps(given), RetrainOverrides, "The options")
    return replace(parameters, **given)


def choose_start(names: MLflowNames) -> tuple[str | None, str]:
    """Return the URI of the model to start from, None for a new one, and its name in words."""
    for name, alias in (
        (names.testing_model_name, names.testing_model_alias),
        (names.production_model_name, registry.PRODUCTION_ALIAS),
    ):
        found = registry.behind_alias(name, alias)
        if found is not None:
            return found.uri, f"{name} version {found.number} ({alias})"
    return None, "a new model"


def make_model(
    start: str | None, image_size: tuple[int, int], hyper: HyperParameters
) -> "keras.Model":
    """Load the Keras model to start from, or build a new one with the layers of `hyper`."""
    from defect_detection import model  # imports TensorFlow

    if start is None:
        return model.build(image_size, hyper)
    return registry.load_keras(start, image_size)


if __name__ == "__main__":
    script.run(main)
