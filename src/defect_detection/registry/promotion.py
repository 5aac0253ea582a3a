"""Which version has the alias prod, and why: each change of the alias is recorded as a run."""

import getpass
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

from defect_detection import PipelineError
from defect_detection.registry import store, versions
from defect_detection.registry.versions import PRODUCTION_ALIAS, SET_ASIDE, Version

EXPERIMENT = "promotion/{}"
# Tags of the run that records a change.
CHANGE, DONE = "promotion.change", "promotion.done"
FIGURES = ("acc", "acc_unseen", "leaked_share", "escapes", "overkill", "comparison", "test_digest")


@dataclass(frozen=True)
class Change:
    """A change of the alias prod.

    Attributes:
        before: number of the version that had it, None if none had.
        after: number of the version that gets it.
        why: the reason.
        by: the user or the CI run that made it.
        at: ISO 8601, UTC.
        set_aside: numbers of the versions that evaluations must not give the alias any more.
        figures: of both versions at that time.
    """

    before: int | None
    after: int
    why: str
    by: str
    at: str
    set_aside: list[int]
    figures: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Recorded:
    """A change in the tracking store; `done` says whether the alias was moved."""

    change: Change
    run_id: str
    commit: str
    done: bool


def actor(env: Mapping[str, str]) -> str:
    """Return who runs this: a run of GitHub Actions, or a user on a machine."""
    if "GITHUB_RUN_ID" in env:
        where = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}"
        return f"{env.get('GITHUB_ACTOR', 'someone')}, {where.format_map(env)}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, as in some containers
        user = f"user {os.getuid()}"
    return f"{user} on {socket.gethostname()}"


def promote(name: str, digest: str, score: Callable[[Version], bool], by: str) -> Version | None:
    """Point the alias at the version with the highest `acc`, in a tie at the newer one.

    Accuracies on different test images cannot be compared, so only versions that were tested on
    the same images take part. The present version does: it is scored again if necessary.

    Another process may register a better version between the query and the move. Each process
    queries again after its move, so the last one to move has seen all versions.

    Args:
        name: of the registered model.
        digest: of the test images.
        score: updates a version's figures to these images; returns whether the version can be run.
        by: the user or the CI run that evaluates.

    Returns:
        The version that has the alias now, None if none is released.
    """
    _settle(name)
    target, unusable = None, set()
    while True:
        present = versions.in_production(name)
        kept = present.number if present is not None else None
        if present is not None and not score(present):
            unusable.add(kept)
        eligible = [
            version
            for version in versions.with_accuracy(name)
            if version.test_digest == digest
            and version.number not in unusable
            and (version.number == kept or _may_replace(version, present))
        ]
        if not eligible:
            return present
        best = max(eligible, key=lambda version: (version.acc, version.number))
        if best.number in (target, kept):
            return best
        why = f"highest acc on the test images {digest[:12]}"
        _move(best, f"{why}: {best.acc:.4f}", by)
        target = best.number


def _may_replace(version: Version, present: Version | None) -> bool:
    """Return whether a version with a higher accuracy gets the alias."""
    alike = present is None or not version.unlike(present)
    return version.released and version.qualified and not version.set_aside and alike


def choose(name: str, number: int, why: str, by: str) -> Change:
    """Point the alias at a version that a person chose.

    The version that had it, and all that evaluations would prefer, are set aside: the next
    evaluation does not bring them back.

    Raises:
        PipelineError: there is no such version, it is not released, or it has the alias already.
    """
    _settle(name)
    every = {version.number: version for version in versions.with_accuracy(name)}
    if number not in every:
        known = ", ".join(map(str, every)) or "none"
        raise PipelineError(f"{name} has no version {number} with an accuracy; there are: {known}")
    target, present = every[number], versions.in_production(name)
    if present is not None and present.number == number:
        raise PipelineError(f"{PRODUCTION_ALIAS} is version {number} of {name} already")
    if not target.released:
        raise PipelineError(
            f"{name} version {number} is not released: {target.why_not_released}. To release it "
            f"nevertheless, turn that rule off in src/config.yaml and evaluate it again"
        )
    preferred = {v.number for v in every.values() if (v.acc, v.number) > (target.acc, number)}
    left = {present.number} if present is not None else set()
    return _move(target, why, by, sorted(preferred | left))


def roll_back(name: str, why: str, by: str) -> Change:
    """Point the alias at the version that had it before; a second call goes one further back.

    Raises:
        PipelineError: there is none.
    """
    _settle(name)
    present = versions.in_production(name)
    if present is not None:
        usable = {v.number for v in versions.with_accuracy(name) if v.released and not v.set_aside}
        for recorded in history(name):
            change = recorded.change
            if recorded.done and change.after == present.number and change.before in usable:
                return choose(name, change.before, why, by)
    raise PipelineError(f"{name} has no former version to go back to; --list shows all")


def history(name: str) -> list[Recorded]:
    """Return the changes of the alias, the newest first."""
    return [_read(run) for run in _runs(name)]


def _move(target: Version, why: str, by: str, set_aside: list[int] | None = None) -> Change:
    """Record a change, carry it out, then tag the versions.

    Moving the alias is the one step that counts. A process that dies before it leaves a record
    that is not done. If it dies after it, the next change finishes the tags (`_settle`).
    """
    present = versions.in_production(target.name)
    known = {str(v.number): v for v in (present, target) if v is not None}
    change = Change(
        before=present.number if present is not None else None,
        after=target.number,
        why=why,
        by=by,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        set_aside=set_aside or [],
        figures={
            number: {figure: v.tags[figure] for figure in FIGURES if figure in v.tags}
            for number, v in known.items()
        },
    )
    with mlflow.start_run(
        experiment_id=store.open_experiment(EXPERIMENT.format(target.name)),
        run_name=f"{PRODUCTION_ALIAS}: version {target.number}",
        nested=True,  # in the run of an evaluation, if there is one
        tags={CHANGE: json.dumps(asdict(change)), "promotion.after": str(target.number)},
    ) as run:
        mlflow.log_dict(asdict(change), "promotion.json")
        versions.set_alias(target, PRODUCTION_ALIAS)
        _finish(target.name, _read(run))
    return change


def _settle(name: str) -> None:
    """Finish the change that moved the alias last, if its process died."""
    present = versions.in_production(name)
    if present is None:
        return
    for recorded in map(_read, _runs(name, f"tags.`promotion.after` = '{present.number}'", 1)):
        if not recorded.done:
            _finish(name, recorded)
            MlflowClient().set_terminated(recorded.run_id)


def _finish(name: str, recorded: Recorded) -> None:
    change = recorded.change
    for version in versions.with_accuracy(name):
        if version.number == change.after:
            said = {"from": str(change.before), "why": change.why, "by": change.by}
            said |= {"at": change.at, "commit": recorded.commit, "run": recorded.run_id}
            tags = {f"promotion.{key}": value for key, value in said.items()}
            versions.set_tags(version, tags | {SET_ASIDE: None})
        elif version.number in change.set_aside:
            versions.set_tags(version, {SET_ASIDE: "true"})
    MlflowClient().set_tag(recorded.run_id, DONE, "true")


def _runs(name: str, which: str = "", most: int = 1000) -> list[Run]:
    experiment = mlflow.get_experiment_by_name(EXPERIMENT.format(name))
    if experiment is None:  # there was no change yet, and a query must not create it
        return []
    newest_first = ["attributes.start_time DESC"]
    return MlflowClient().search_runs(
        [experiment.experiment_id], which, max_results=most, order_by=newest_first
    )


def _read(run: Run) -> Recorded:
    tags = run.data.tags
    return Recorded(
        change=Change(**json.loads(tags[CHANGE])),
        run_id=run.info.run_id,
        commit=tags.get("mlflow.source.git.commit", "unknown"),
        done=tags.get(DONE) == "true",
    )
