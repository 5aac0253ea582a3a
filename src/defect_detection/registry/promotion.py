"""Which version has the alias prod, and why: each change of the alias is recorded as a run."""

import getpass
import itertools
import json
import logging
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

log = logging.getLogger(__name__)

STARTED_BY = "RETRAIN_STARTED_BY"  # variable in which the API says who started a retraining
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
    """Return who runs this: a run of GitHub Actions, a caller of the API, or a user here."""
    if "GITHUB_RUN_ID" in env:
        where = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}"
        return f"{env.get('GITHUB_ACTOR', 'someone')}, {where.format_map(env)}"
    if STARTED_BY in env:
        return f"{env[STARTED_BY]}, by the API on {socket.gethostname()}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, as in some containers
        user = f"user {os.getuid()}"
    return f"{user} on {socket.gethostname()}"


class Election:
    """Finds the version that should have the alias: the one with the highest `acc`.

    Accuracies on different test images cannot be compared, so only versions that were tested on
    the same images take part. The present version does: it is scored again if necessary. In a tie
    it keeps the alias, since the other is not better.
    """

    def __init__(self, name: str, digest: str, score: Callable[[Version], bool]):
        """Choose among the versions of a registered model.

        Args:
            name: of the registered model.
            digest: of the test images.
            score: updates a version's figures to these images; returns whether the version can be
                run.
        """
        self.name = name
        self.digest = digest
        self._score = score
        self._unusable: set[int] = set()

    def winner(self, coming: Version | None = None) -> Version | None:
        """Return the version, None if none is released.

        Args:
            coming: a version as it is going to be, whatever the store says of it now.
        """
        present = versions.in_production(self.name)
        kept = present.number if present is not None else None
        others = [
            one
            for one in self._tested(coming)
            if one.number not in (kept, *self._unusable) and _may_replace(one, present)
        ]
        if not others:  # nothing could replace it, so it is not scored again either
            return present
        if present is not None:
            if self._score(present):
                others += [one for one in self._tested() if one.number == kept]
            else:
                self._unusable.add(present.number)
        return max(others, key=lambda one: (one.acc, one.number == kept, one.number))

    def _tested(self, coming: Version | None = None) -> list[Version]:
        known = {one.number: one for one in versions.with_accuracy(self.name)}
        if coming is not None:
            known[coming.number] = coming
        return [one for one in known.values() if one.test_digest == self.digest]


def promote(election: Election, by: str) -> Version | None:
    """Point the alias at the winner of an election.

    Another process may register a better version between the query and the move. Each process
    queries again after its move, so the last one to move has seen all versions.

    Args:
        election: among the versions of a registered model.
        by: the user or the CI run that evaluates.

    Returns:
        The version that has the alias now, None if none is released.
    """
    name, digest, target = election.name, election.digest, None
    _settle(name)
    while True:
        best = election.winner()
        present = versions.in_production(name)
        if best is None or best.number in (target, present and present.number):
            return best
        why = f"highest acc on the test images {digest[:12]}"
        _move(best, f"{why}: {best.acc:.4f}", by)
        target = best.number


def _may_replace(version: Version, present: Version | None) -> bool:
    """Return whether a version with a higher accuracy gets the alias."""
    alike = present is None or not version.unlike(present)
    return version.released and version.qualified and not version.set_aside and alike


def why_set_aside(name: str, version: Version) -> str:
    """Return why a version that is not registered yet must wait for a person, "" if it need not.

    Whoever set a version aside meant the model, under whatever number it comes back.
    """
    for known in reversed(versions.with_accuracy(name)):
        how = version.repeats(known) if known.set_aside else ""
        if how:
            return f"it is {how} version {known.number}, which a person set aside"
    return ""


def moved_outside(name: str) -> str:
    """Return that the alias was moved past the record, as MLflow's page can; "" if it was not."""
    present = versions.in_production(name)
    recorded = history(name)
    last = next((one.change for one in recorded if one.done), None)
    after = present.number if present is not None else None
    unfinished = {
        one.change.after for one in itertools.takewhile(lambda one: not one.done, recorded)
    }
    if after == (last.after if last else None) or after in unfinished:
        return ""
    is_now = f"{PRODUCTION_ALIAS} of {name} is {f'version {after}' if after else 'no version'}"
    known = f"version {last.after} on {last.at}" if last else "no version"
    return (
        f"{is_now}, but the record gave it to {known}: it was moved outside this project, where "
        f"everyone who reaches MLflow can. 'python src/promote.py --version N' settles it"
    )


def check_record(name: str) -> None:
    """Log a warning if the alias was moved past the record."""
    if found := moved_outside(name):
        log.warning("%s", found)


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
    outside = moved_outside(name)
    if present is not None and present.number == number and not outside:
        raise PipelineError(f"{PRODUCTION_ALIAS} is version {number} of {name} already")
    if not target.released:
        raise PipelineError(
            f"{name} version {number} is not released: {target.why_not_released}. To release it "
            f"nevertheless, turn that rule off in src/config.yaml and evaluate it again"
        )
    aside = {v.number for v in every.values() if (v.acc, v.number) > (target.acc, number)}
    if present is not None:
        aside.add(present.number)
    # Under all numbers that their models have.
    meant = [every[one] for one in aside if one in every]
    aside |= {v.number for v in every.values() if any(v.repeats(one) for one in meant)}
    change = _move(target, why, by, sorted(aside - {number}), confirm=bool(outside))
    assert change is not None
    return change


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
            # Two evaluations at once once recorded a change from a version to itself.
            led_here = change.after == present.number != change.before
            if recorded.done and led_here and change.before in usable:
                return choose(name, change.before, why, by)
    raise PipelineError(f"{name} has no former version to go back to; --list shows all")


def history(name: str) -> list[Recorded]:
    """Return the changes of the alias, the newest first."""
    return [_read(run) for run in _runs(name)]


def _move(
    target: Version,
    why: str,
    by: str,
    set_aside: list[int] | None = None,
    confirm: bool = False,
) -> Change | None:
    """Record a change, carry it out, then tag the versions.

    Nothing is done, and None returned, if the version has the alias already, as after another
    evaluation at the same time; unless `confirm` says that the record lacks it.

    Moving the alias is the one step that counts. A process that dies before it leaves a record
    that is not done. If it dies after it, the next change finishes the tags (`_settle`).
    """
    present = versions.in_production(target.name)
    if present is not None and present.number == target.number:
        if not confirm:
            return None
        present = _recorded(target.name)
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


def _recorded(name: str) -> Version | None:
    """Return the version that has the alias by the record."""
    last = next((one.change.after for one in history(name) if one.done), None)
    return next((one for one in versions.with_accuracy(name) if one.number == last), None)


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
