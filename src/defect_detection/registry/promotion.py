"""Which version has the alias prod, and why: each change of the alias is recorded as a run."""

import getpass
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import TypeAdapter

from defect_detection import PipelineError
from defect_detection.registry import runs, store, versions
from defect_detection.registry.versions import PRODUCTION_ALIAS, SET_ASIDE, Version

log = logging.getLogger(__name__)

STARTED_BY = "RETRAIN_STARTED_BY"  # variable in which the API says who started a retraining
EXPERIMENT = "promotion/{}"
# Tags of the run that records a change.
CHANGE, DONE = "promotion.change", "promotion.done"
FIGURES = ("acc", "acc_unseen", "leaked_share", "escapes", "overkill", "comparison", "test_digest")
LOOKED_AT = 50  # newest records, by which it is known who moved the alias


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


_CHANGES = TypeAdapter(Change)


@dataclass(frozen=True)
class Recorded:
    """A change in the tracking store.

    Attributes:
        change: what was changed.
        run_id: of the run that records it.
        commit: of the project.
        done: whether the alias was moved.
        began: when the run began, in milliseconds since 1970.
        ended: likewise; `began` if it did not end.
    """

    change: Change
    run_id: str
    commit: str
    done: bool
    began: int
    ended: int


def actor(env: Mapping[str, str]) -> str:
    """Return who runs this: a caller of the API, a run of GitHub Actions, or a user here."""
    if STARTED_BY in env:  # first, since a run of GitHub may have started the API
        return f"{env[STARTED_BY]}, by the API on {socket.gethostname()}"
    if "GITHUB_RUN_ID" in env:
        where = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}"
        return f"{env.get('GITHUB_ACTOR', 'someone')}, {where.format_map(env)}"
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

    def result(self, coming: Version | None = None) -> tuple[Version | None, Version | None]:
        """Return the present version and the one that should have the alias, each None if none.

        Args:
            coming: a version as it is going to be, whatever the store says of it now.
        """
        present = versions.in_production(self.name)
        kept = present.number if present is not None else None

        def wanted(one: Version) -> bool:
            takes_part = one.test_digest == self.digest and one.number not in self._unusable
            return takes_part and one.number != kept and _may_replace(one, present)

        best = versions.highest(
            self.name, self.digest, lambda one: one.number != _number(coming) and wanted(one)
        )
        known = [one for one in (best, coming) if one is not None and wanted(one)]
        if not known:  # nothing could replace it, so it is not scored again either
            return present, present
        if present is not None:
            if self._score(present):
                scored = versions.numbered(self.name, present.number)
                known += [scored] if scored.test_digest == self.digest else []
            else:
                self._unusable.add(present.number)
        return present, max(known, key=lambda one: (one.acc, one.number == kept, one.number))


def promote(election: Election, by: str) -> Version | None:
    """Point the alias at the winner of an election.

    Another process may register a better version between the query and the move. Each process
    queries again after its move, so the last one to move has seen all versions. Nothing is moved if
    the alias is no longer where the query found it, as after a person's choice.

    Args:
        election: among the versions of a registered model.
        by: the user or the CI run that evaluates.

    Returns:
        The version that has the alias now, None if none is released.
    """
    name, target = election.name, None
    while True:
        _settle(name)
        present, best = election.result()
        if best is None or best.number in (target, _number(present)):
            return best
        if _number(versions.in_production(name)) == _number(present):
            why = f"highest acc on the test images {election.digest[:12]}: {best.acc:.4f}"
            _move(present, best, why, by)
            target = best.number


def _number(version: Version | None) -> int | None:
    return version.number if version is not None else None


def _may_replace(version: Version, present: Version | None) -> bool:
    """Return whether a version with a higher accuracy gets the alias."""
    alike = present is None or not version.unlike(present)
    return version.released and version.qualified and not version.set_aside and alike


def why_set_aside(name: str, version: Version) -> str:
    """Return why a version that is not registered yet must wait for a person, "" if it need not.

    Whoever set a version aside meant the model, under whatever number it comes back.
    """
    for known in reversed(versions.those_set_aside(name)):
        if how := version.repeats(known):
            return f"it is {how} version {known.number}, which a person set aside"
    return ""


def moved_outside(name: str) -> str:
    """Return a warning if the alias was moved without a record, as MLflow's page can; else ""."""
    after, recorded = _number(versions.in_production(name)), history(name, LOOKED_AT)
    last = next((one for one in recorded if one.done), None)
    # Of several changes at once, any may have been the last to move the alias.
    possible = [
        one.change.after
        for one in recorded
        if last is None or (one.ended if one.done else one.began) >= last.began
    ]
    if after in possible or (after is None and last is None):
        return ""
    is_now = f"{PRODUCTION_ALIAS} of {name} is {f'version {after}' if after else 'no version'}"
    known = f"version {last.change.after} on {last.change.at}" if last else "no version"
    return (
        f"{is_now}, but the record gave it to {known}: it was moved outside this project, where "
        f"everyone who reaches MLflow can. 'python src/promote.py --version N' settles it"
    )


def check_record(name: str) -> None:
    """Log a warning if the alias was moved without a record."""
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
            f"{name} version {number} is not released: {target.why_not_released}. Evaluate it "
            f"again; src/config.yaml turns rules off"
        )
    aside = {v.number for v in every.values() if v.acc > target.acc}
    if present is not None:
        aside.add(present.number)
    # Under all numbers that their models have.
    meant = [every[one] for one in aside if one in every]
    aside |= {v.number for v in every.values() if any(v.repeats(one) for one in meant)}
    if outside:
        present = _recorded(name)
    return _move(present, target, why, by, sorted(aside - {number}))


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


def history(name: str, most: int = 1000) -> list[Recorded]:
    """Return the changes of the alias, the newest first."""
    return [found for found in map(_read, _runs(name, "", most)) if found is not None]


def _move(
    present: Version | None,
    target: Version,
    why: str,
    by: str,
    set_aside: Sequence[int] | None = None,
) -> Change:
    """Record a change, carry it out, then tag the versions.

    Moving the alias is the one step that counts. A process that dies before it leaves a record
    that is not done. If it dies after it, the next change finishes the tags (`_settle`).

    Args:
        present: the version that has the alias.
        target: the version that gets it.
        why: the reason.
        by: the user or the CI run that moves it.
        set_aside: numbers of versions that a person sets aside; None if no person moves it.
    """
    known = {str(v.number): v for v in (present, target) if v is not None}
    change = Change(
        before=_number(present),
        after=target.number,
        why=why,
        by=by,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        set_aside=list(set_aside or ()),
        figures={
            number: {figure: v.tags[figure] for figure in FIGURES if figure in v.tags}
            for number, v in known.items()
        },
    )
    # The order of changes is that of their runs, also when the clock was set back.
    newest = max((one.began for one in history(target.name, LOOKED_AT)), default=0)
    with runs.opened(
        store.open_experiment(EXPERIMENT.format(target.name)),
        f"{PRODUCTION_ALIAS}: version {target.number}",
        {CHANGE: json.dumps(asdict(change)), "promotion.after": str(target.number)},
        after=newest + 1,
    ) as run:
        mlflow.log_dict(asdict(change), "promotion.json")
        if set_aside is not None:  # first, so that no evaluation moves it back in between
            _set_aside(target, set_aside)
        versions.set_alias(target, PRODUCTION_ALIAS)
        _finish(target.name, change, run)
    return change


def _set_aside(chosen: Version, others: Sequence[int]) -> None:
    for version in versions.with_accuracy(chosen.name):
        if version.number in others:
            versions.set_tags(version, {SET_ASIDE: "true"})
    if chosen.set_aside:
        versions.set_tags(chosen, {SET_ASIDE: "false"})


def _recorded(name: str) -> Version | None:
    """Return the version that has the alias by the record."""
    last = next((one.change.after for one in history(name, LOOKED_AT) if one.done), None)
    return next((one for one in versions.with_accuracy(name) if one.number == last), None)


def _settle(name: str) -> None:
    """Finish the change that moved the alias last, if its process died."""
    present = versions.in_production(name)
    if present is None:
        return
    for run in _runs(name, f"tags.`promotion.after` = '{present.number}'", 1):
        recorded = _read(run)
        if recorded is not None and not recorded.done:
            _finish(name, recorded.change, run)
            MlflowClient().set_terminated(recorded.run_id)


def _finish(name: str, change: Change, run: Run) -> None:
    said = {"from": str(change.before), "why": change.why, "by": change.by, "at": change.at}
    said |= {"commit": _commit(run), "run": run.info.run_id}
    tags = {f"promotion.{key}": value for key, value in said.items()}
    versions.set_tags(versions.numbered(name, change.after), tags)
    versions.retry(MlflowClient().set_tag, run.info.run_id, DONE, "true")


def _runs(name: str, which: str, most: int) -> list[Run]:
    experiment = mlflow.get_experiment_by_name(EXPERIMENT.format(name))
    if experiment is None:  # there was no change yet, and a query must not create it
        return []
    newest_first = ["attributes.start_time DESC"]
    return MlflowClient().search_runs(
        [experiment.experiment_id], which, max_results=most, order_by=newest_first
    )


def _read(run: Run) -> Recorded | None:
    """Return the change that a run records, None for a run that someone else put there."""
    tags, info = run.data.tags, run.info
    try:
        change = _CHANGES.validate_json(tags.get(CHANGE, ""))
    except ValueError:
        return None
    done, ended = tags.get(DONE) == "true", max(info.end_time or 0, info.start_time)
    return Recorded(change, info.run_id, _commit(run), done, info.start_time, ended)


def _commit(run: Run) -> str:
    return str(run.data.tags.get("mlflow.source.git.commit", "unknown"))
