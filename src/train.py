"""Train the CNN with each hyper-parameter set of src/config.yaml and keep the best.

Each set is an MLflow run. The model with the highest accuracy on photographs held out from
data/train is written to best_model.json, which src/evaluation.py reads.

With --folds no model is kept: each set is cross-validated on data/train, by photograph.

What MLflow does not take is kept in .cache/undelivered and delivered at the end, at the next start
or by --sync.
"""

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError, cli, cluster, progress, settings
from defect_detection.atomic import require_writable
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.dataset.split import Dataset, Split
from defect_detection.evaluation import release
from defect_detection.evaluation.labels import LabelError
from defect_detection.pipeline import delivery, fit, record, tell
from defect_detection.pipeline.delivery import Purpose, Training
from defect_detection.pipeline.fit import Engine, FitPlan, Fold, Observer
from defect_detection.pipeline.journal import RunInfo
from defect_detection.pipeline.record import TRAINING_TAG
from defect_detection.registry import runs, store
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import Config, HyperParameters, ModelParameters

if TYPE_CHECKING:
    import keras


def main() -> None:
    """Read settings and data; then fit each set, and keep the best."""
    parser = cli.parser(__doc__, "python src/train.py --data ~/images/castings")
    parser.add_argument("--folds", type=_folds, metavar="N", help="cross-validate instead")
    parser.add_argument("--sync", action="store_true", help="only deliver what MLflow lacks")
    parser.add_argument("--ray", metavar="ADDRESS", help="fit on this Ray cluster, such as auto")
    parser.add_argument("--set", metavar="NAME", help="fit only this set of the configuration")
    options = parser.parse_args()
    cli.refuse_empty(parser, options, ("ray", "set"))
    env = settings.environment()
    config = settings.read_config(options.config)
    cache = settings.from_root(config.paths.cache)
    folder = DataFolder.choose(options, env, config)
    best_file = config.best_model
    require_writable(best_file.parent)

    with store.connected(settings.tracking_uri(env), create=not options.sync), runs.watched(cache):
        delivery.deliver_all(cache, strict=options.sync)
        if options.sync:
            return
        experiment = f"train/{config.names.experiment_name}"
        experiment_id = store.open_experiment(experiment)
        parameters = config.model_parameters
        takes = folder.image_format(parameters.image_size, parameters.color)
        split = splits.load(folder, takes)
        print(f"{split.training}: {folder.describe(split.training.counts)}, {takes}")
        print(split.leakage, flush=True)
        device = settings.device(env)
        sets = chosen(parameters, options.set)
        print(release.describe_defects(split))
        if split.training.few_defects:
            sets = of_good_parts(sets)
        plans = [plan(config, one, takes, cache, device) for one in sets]
        if options.folds:
            with engine(options.ray, plans, split.training, options.folds) as fits:
                tell.folds(cross_validate_sets(plans, split, experiment_id, options.folds, fits))
            return
        sync = f"{cli.command('src/train.py', options)} --sync"
        purpose = Purpose(len(plans), split.training.digest, str(best_file), sync)
        with delivery.training(cache, purpose) as kept:
            with engine(options.ray, plans, split.training) as fits:
                fit_sets(plans, split, experiment, kept, fits)
            kept.finish()
    trained = list(kept.trained.values())
    tell.sets(trained, kept.best, best_file, cli.command("src/evaluation.py", options))


def chosen(parameters: ModelParameters, name: str | None) -> list[HyperParameters]:
    """Return the sets to fit: all, or the one with a name.

    Raises:
        PipelineError: no set has the name.
    """
    found = [one for one in parameters.sets if name in (None, one.name)]
    if not found:
        known = ", ".join(one.name for one in parameters.sets)
        raise PipelineError(f"There is no set {name}, expected one of: {known}")
    return found


def of_good_parts(sets: list[HyperParameters]) -> list[HyperParameters]:
    """Return the sets that remain, with another head, where good parts alone are learned from."""
    whole = [one for one in sets if one.head != "map"] or sets[:1]
    return [replace(one, head="good") for one in whole]


def plan(
    config: Config, hyper: HyperParameters, takes: ImageFormat, cache: Path, device: str
) -> FitPlan:
    """Return how a set is fitted."""
    parameters = config.model_parameters
    return FitPlan(
        name=hyper.name,
        make_model=partial(build, takes, hyper),
        parameters=parameters.fit_parameters(hyper),
        sampling=parameters.sampling(cache),
        decisions=config.decisions,
        quantize=parameters.quantize,
        device=device,
        good_only=hyper.head == "good",
        layers=hyper.layers(),
    )


def build(takes: ImageFormat, hyper: HyperParameters) -> "keras.Model":
    """Build the CNN of a set."""
    from defect_detection.training import network  # TensorFlow takes 4 s to import

    return network.build(takes.shape, hyper)


@contextmanager
def engine(
    ray: str | None, plans: list[FitPlan], data: Dataset, folds: int | None = None
) -> Iterator[Engine]:
    """Yield what fits the sets: this process, or the Ray cluster at an address."""
    if ray is None:
        yield fit
        return
    with cluster.connected(ray):
        from defect_detection.pipeline.on_ray import OnRay

        yield OnRay(plans, data, folds)


def fit_sets(
    plans: list[FitPlan], split: Split, experiment: str, kept: Training, fits: Engine = fit
) -> None:
    """Fit each set to the same images and log it in a run of its own."""
    tags = {TRAINING_TAG: datetime.now(timezone.utc).isoformat()}
    data = split.training
    example = data.content(0)
    with progress.shown("Training", fit.costs(plans)) as shown:
        for number, planned in enumerate(plans, start=1):
            print(f"\nSet {number} of {len(plans)}: {planned.name}", flush=True)
            said = f"The set {planned.name} of the configuration, fitted to {data}."
            with kept.run(RunInfo(experiment, planned.name, said, tags)) as trained:
                record.dataset(data, "training")
                record.leakage(split)
                record.plan(planned, data, set=planned.name)
                observer = Observer(shown, record.device, partial(report_epoch, planned))
                fitted = fits.fit(planned, data, observer)
                record.fit(fitted)
                report_label_errors(fit.label_errors(fitted, data))
                trained.append(record.model(fitted, fit.to_served(fitted, data), example))


def report_label_errors(found: list[LabelError]) -> None:
    """Log and print likely label errors."""
    record.label_errors(found)
    tell.label_errors(found)


def report_epoch(planned: FitPlan, number: int, values: dict[str, float]) -> None:
    """Log and print an epoch."""
    record.epoch(number, values)
    tell.epoch(planned, number, values)


def cross_validate_sets(
    plans: list[FitPlan], split: Split, experiment: str, folds: int, fits: Engine = fit
) -> dict[str, list[Fold]]:
    """Cross-validate each set on the same folds and log it in a run of its own."""
    validated, data = {}, split.training
    with progress.shown("Cross-validation", fit.costs(plans, folds)) as shown:
        for number, planned in enumerate(plans, start=1):
            print(f"\nSet {number} of {len(plans)}: {planned.name}", flush=True)
            said = f"The set {planned.name}, cross-validated by photograph on {data}."
            with record.run(experiment, f"{planned.name} {folds} folds", said):
                record.dataset(data, "training")
                record.plan(planned, data, set=planned.name, folds=folds)
                observer = Observer(shown, record.device, on_fold=report_fold)
                scored = fits.cross_validate(planned, data, folds, observer)
                record.folds(scored)
            validated[planned.name] = scored
    return validated


def report_fold(scored: Fold) -> None:
    """Log and print a fold."""
    record.fold(scored)
    tell.fold(scored)


def _folds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text} is not a number of folds, 2 or more")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
