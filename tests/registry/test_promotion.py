"""Which version is behind prod: the rule, a person's choice, the record; races and kills."""

import getpass
import os
import random
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict

import mlflow
import pytest
from mlflow import MlflowClient

import preloaded
from conftest import long
from defect_detection import PipelineError
from defect_detection.registry import promotion, store, versions
from defect_detection.registry.promotion import Election
from defect_detection.registry.versions import (
    LITERT,
    PARENT,
    QUALIFIED,
    SET_ASIDE,
    TRAINED,
    Version,
)
from plant import FAULTS

DIGEST = "abcdef" * 10
ROUNDS = {"sqlite": max(10, FAULTS), "server": max(4, FAULTS)}  # a second for each


def new_name() -> str:
    return f"Production_{uuid.uuid4().hex[:12]}"


def register(name: str, acc: float, digest: str = DIGEST, **tags: str) -> Version:
    """Register a version as an evaluation does; what the files are does not matter here."""
    client, experiment = MlflowClient(), store.open_experiment("train/promotion")
    run = client.create_run(experiment)
    model = client.create_logged_model(experiment, source_run_id=run.info.run_id)
    return register_model(name, model.model_uri, acc, digest, **tags)


def register_model(name: str, uri: str, acc: float, digest: str = DIGEST, **tags: str) -> Version:
    """Register a logged model, perhaps once more; one that was set aside stays so."""
    tags = {"test_digest": digest, "acc_unseen": "0.5"} | tags
    if promotion.why_set_aside(name, Version(name, 0, 0.0, tags, uri)):
        tags[SET_ASIDE] = "true"
    return versions.register(uri, None, acc, "", name, tags)


def as_it_is(version: Version) -> bool:
    """Say of a version that was tested on the same images that it can be run."""
    return True


def promote(name: str, digest: str = DIGEST, score: Callable[[Version], bool] = as_it_is) -> int:
    return promotion.promote(Election(name, digest, score), "tester").number


def evaluate(name: str, *accuracies: float) -> None:
    """Register a version for each accuracy, and promote after each."""
    for acc in accuracies:
        register(name, acc)
        promote(name)


def prod(name: str) -> int | None:
    found = versions.with_alias(name, "prod")
    return found and found.number


@pytest.fixture
def name(store) -> str:
    """A registered model of the test's own in the shared store."""
    return new_name()


def test_alias_goes_to_the_highest_accuracy_and_a_worse_challenger_never_takes_it(name):
    for acc, expected in ((0.7, 1), (0.9, 2), (0.8, 2), (0.95, 4), (0.1, 4)):
        register(name, acc)
        assert promote(name) == expected
        assert prod(name) == expected


def test_in_a_tie_the_alias_stays_since_the_newer_version_is_not_better(name):
    for _ in range(2):
        register(name, 0.75)
        assert promote(name) == 1
    assert len(promotion.history(name)) == 1


def test_champion_is_not_scored_again_where_nothing_could_replace_it(name):
    register(name, 0.8, digest="large")
    promote(name, "large")
    register(name, 0.9, digest="small", released="false")
    assert promote(name, "small", score=lambda version: pytest.fail("scored again")) == 1


def test_version_tested_on_fewer_photographs_does_not_replace_the_champion(name):
    register(name, 0.9778, digest="large", test_photographs="90 def_front, 90 ok_front")
    promote(name, "large")
    for few in ("1 def_front, 1 ok_front", "200 def_front, 89 ok_front"):
        found = register(name, 1.0, digest=few, test_photographs=few)
        assert promote(name, few, score=lambda version: pytest.fail("scored again")) == 1
        assert f"tested on {few} photographs" in found.unlike(versions.in_production(name))
    more = "91 def_front, 90 ok_front"
    register(name, 0.98, digest=more, test_photographs=more)

    def score(version: Version) -> bool:
        versions.update(version, 0.97, {"test_digest": more}, "")
        return True

    assert promote(name, more, score=score) == 4


def test_accuracies_are_compared_as_numbers_not_as_texts(name):
    register(name, 0.7)
    register(name, 1.0)
    MlflowClient().set_model_version_tag(name, "1", "acc", "7e-1")
    assert promote(name) == 2


def test_version_that_is_not_qualified_does_not_take_the_alias(name):
    register(name, 0.7)
    promote(name)
    register(name, 0.9, **{QUALIFIED: "false"})
    assert promote(name) == 1


def test_accuracy_on_other_pictures_counts_only_after_it_was_measured_on_these(name):
    # 0.99 on an easier test set: the champion is scored again, its forerunner is left out.
    register(name, 0.98, digest="easy")
    promote(name, "easy")
    register(name, 0.99, digest="easy")
    promote(name, "easy")
    register(name, 0.8)

    def score(version: Version) -> bool:
        if version.test_digest != DIGEST:
            versions.update(version, 0.6, {"test_digest": DIGEST}, "")
        return True

    assert promote(name, score=score) == 3
    assert versions.with_accuracy(name)[1].acc == 0.6


def test_champion_that_cannot_be_run_loses_the_alias(name):
    register(name, 0.9)
    promote(name)
    register(name, 0.7)
    assert promote(name, score=lambda version: version.number != 1) == 2


def test_better_version_registered_between_look_and_move_gets_the_alias(name, monkeypatch):
    register(name, 0.7)
    real, once = MlflowClient.set_registered_model_alias, []

    def registering_first(client, *arguments):
        if not once:
            once.append(register(name, 0.9))
        return real(client, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", registering_first)
    assert promote(name) == 2
    assert prod(name) == 2


def test_each_change_is_recorded_as_tags_and_as_an_artifact(name, monkeypatch):
    register(name, 0.7, escapes="3 of 9")
    promote(name)
    register(name, 0.9)
    with mlflow.start_run(experiment_id=store.open_experiment("eval/promotion")) as parent:
        promote(name)
    newest, oldest = promotion.history(name)
    assert (oldest.change.before, oldest.change.after) == (None, 1)
    assert (newest.change.before, newest.change.after, newest.done) == (1, 2, True)
    assert newest.change.by == "tester"
    assert newest.change.why == f"highest acc on the test images {DIGEST[:12]}: 0.9000"
    assert newest.change.figures["1"]["escapes"] == "3 of 9"
    assert newest.change.figures["2"]["acc"] == "0.9"
    run = mlflow.get_run(newest.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FINISHED"
    kept = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/promotion.json")
    assert kept == asdict(newest.change)
    tags = versions.with_accuracy(name)[1].tags
    said = {key: tags[f"promotion.{key}"] for key in ("from", "why", "by", "at", "commit", "run")}
    assert said == {
        "from": "1",
        "why": newest.change.why,
        "by": "tester",
        "at": newest.change.at,
        "commit": newest.commit,
        "run": newest.run_id,
    }


def test_no_change_leaves_no_record(name):
    register(name, 0.9)
    promote(name)
    register(name, 0.7)
    promote(name)
    assert len(promotion.history(name)) == 1


def test_persons_choice_stands_against_the_next_evaluations_until_something_better(name):
    evaluate(name, 0.7, 0.8, 0.9)
    change = promotion.choose(name, 1, "fewer escapes", "person")
    assert (change.before, change.after, change.set_aside) == (3, 1, [2, 3])
    register(name, 0.65)
    assert promote(name) == 1
    register(name, 0.75)
    assert promote(name) == 5
    promotion.choose(name, 3, "after all", "person")
    assert not versions.with_accuracy(name)[2].set_aside
    assert promote(name) == 3


def test_rollback_restores_the_former_version_and_again_the_one_before(name):
    evaluate(name, 0.7, 0.8, 0.9)
    for expected in (2, 1):
        assert promotion.roll_back(name, "scratches", "person").after == expected
        assert prod(name) == expected
        assert promote(name) == expected
    with pytest.raises(PipelineError, match="no former version to go back to"):
        promotion.roll_back(name, "scratches", "person")
    assert prod(name) == 1


def test_model_that_was_set_aside_stays_so_under_another_number(name):
    first = register(name, 0.8, **{LITERT: "a"})
    promote(name)
    second = register(name, 0.9, **{LITERT: "b"})
    promote(name)
    promotion.roll_back(name, "misses cracks", "person")
    assert register_model(name, second.source, 0.9).number == 3  # evaluated once more
    assert promote(name) == 1
    register(name, 0.9, **{LITERT: "b"})  # trained once more, with the same result
    assert promote(name) == 1
    same_images = {PARENT: second.source, TRAINED: "digest"}
    versions.set_tags(versions.with_accuracy(name)[1], {TRAINED: "digest"})
    child = register(name, 0.9, **same_images)
    assert promote(name) == 1
    said = promotion.why_set_aside(name, Version(name, 0, 0.0, same_images, "models:/another"))
    assert said == (
        "it is fine-tuned, on the same images, from version 2, which a person set aside"
    )
    register(name, 0.95, **same_images | {TRAINED: "more images"})
    assert promote(name) == 6
    assert child.number == 5 and first.number == 1


def test_rollback_sets_aside_all_numbers_of_a_model(name):
    register(name, 0.8)
    promote(name)
    second = register(name, 0.9)
    promote(name)
    register_model(name, second.source, 0.7)
    assert promotion.roll_back(name, "misses cracks", "person").set_aside == [2, 3]


def test_rollback_works_after_two_evaluations_moved_the_alias_at_once(name, monkeypatch):
    evaluate(name, 0.7, 0.8)
    register(name, 0.9)
    move, once = promotion._move, []

    def after_the_other(*arguments):
        """The other evaluation moves between this one's look and its move."""
        if not once:
            once.append(1)
            promote(name)
        return move(*arguments)

    monkeypatch.setattr(promotion, "_move", after_the_other)
    assert promote(name) == 3
    monkeypatch.undo()
    changes = [(one.change.before, one.change.after) for one in promotion.history(name)]
    assert changes == [(2, 3), (2, 3), (1, 2), (None, 1)]
    assert not promotion.moved_outside(name)
    assert promotion.roll_back(name, "scratches", "person").after == 2


def test_record_of_a_change_to_itself_does_not_stop_a_rollback(name, monkeypatch):
    """Two evaluations at once left such records."""
    evaluate(name, 0.7, 0.8)
    present = versions.in_production(name)
    promotion._move(present, present, "highest acc", "tester")
    newest = promotion.history(name)[0].change
    assert (newest.before, newest.after) == (2, 2)
    assert promotion.roll_back(name, "scratches", "person").after == 1


def test_alias_that_was_moved_outside_is_said_until_a_person_settles_it(name, caplog):
    promotion.check_record(name)
    evaluate(name, 0.7, 0.8)
    promotion.check_record(name)
    assert not caplog.records
    client = MlflowClient()
    client.set_registered_model_alias(name, "prod", "1")
    promotion.check_record(name)
    assert f"prod of {name} is version 1, but the record gave it to version 2" in caplog.text
    change = promotion.choose(name, 1, "that was me", "person")
    assert (change.before, change.after, change.set_aside) == (2, 1, [2])
    assert not promotion.moved_outside(name)
    client.delete_registered_model_alias(name, "prod")
    assert "is no version, but the record gave it to version 1" in promotion.moved_outside(name)
    promotion.choose(name, 1, "it stays", "person")
    assert not promotion.moved_outside(name)


@pytest.mark.parametrize("when", ["before the alias", "after the alias"])
def test_evaluation_in_the_middle_of_a_rollback_does_not_undo_it(name, monkeypatch, when):
    evaluate(name, 0.7, 0.8)
    real, once = versions.set_alias, []

    def evaluated(*arguments):
        if once:
            return real(*arguments)
        once.append(register(name, 0.5))
        if when == "before the alias":
            promote(name)
        real(*arguments)
        if when == "after the alias":
            promote(name)

    monkeypatch.setattr(versions, "set_alias", evaluated)
    promotion.roll_back(name, "misses cracks", "person")
    assert prod(name) == promote(name) == 1
    assert versions.with_accuracy(name)[1].set_aside
    assert not promotion.moved_outside(name)


def test_rollback_in_the_middle_of_an_evaluation_stands(name, monkeypatch):
    evaluate(name, 0.7, 0.8)
    register(name, 0.9)
    real, once = Election.result, []

    def rolled_back(election, coming=None):
        found = real(election, coming)
        if not once:
            once.append(promotion.roll_back(name, "misses cracks", "person"))
        return found

    monkeypatch.setattr(Election, "result", rolled_back)
    # The person has set version 3 aside too, as one that is better than the one chosen.
    assert promote(name) == prod(name) == 1


def test_runs_that_others_put_beside_the_record_change_nothing(name):
    evaluate(name, 0.7, 0.8)
    experiment = mlflow.get_experiment_by_name(f"promotion/{name}").experiment_id
    client = MlflowClient()
    for content in (None, "", "{", "[]", '{"after": 2}', "null"):
        tags = {"promotion.after": "2"} | ({"promotion.change": content} if content else {})
        client.create_run(experiment, tags=tags)
    assert not promotion.moved_outside(name)
    assert len(promotion.history(name)) == 2
    assert promotion.roll_back(name, "scratches", "person").after == 1
    register(name, 0.75)
    assert promote(name) == 3


def test_versions_as_good_as_the_chosen_one_are_not_set_aside(name):
    evaluate(name, 0.7, 0.7, 0.8)
    assert promotion.choose(name, 1, "fewer escapes", "person").set_aside == [3]


def test_champion_of_which_it_is_not_known_on_how_many_it_was_tested_waits_for_a_person(name):
    register(name, 0.9778, digest="from before")
    promote(name, "from before")
    few = "6 def_front, 6 ok_front"
    found = register(name, 1.0, digest="few", test_photographs=few)
    assert promote(name, "few", score=lambda version: pytest.fail("scored again")) == 1
    said = found.unlike(versions.in_production(name))
    assert said.endswith("the accuracy of version 1 rests on an unknown number")


def test_alias_without_any_record_is_said(name):
    versions.set_alias(register(name, 0.7), "prod")
    assert "but the record gave it to no version" in promotion.moved_outside(name)


def test_impossible_changes_are_refused_in_one_line(name):
    with pytest.raises(PipelineError, match="no former version"):
        promotion.roll_back(name, "", "person")
    with pytest.raises(PipelineError, match="has no version 1 with an accuracy; there are: none"):
        promotion.choose(name, 1, "", "person")
    register(name, 0.7)
    promote(name)
    with pytest.raises(PipelineError, match="no version 2 with an accuracy; there are: 1"):
        promotion.choose(name, 2, "", "person")
    with pytest.raises(PipelineError, match="prod is version 1 of .* already"):
        promotion.choose(name, 1, "", "person")
    assert len(promotion.history(name)) == 1


def test_who_is_a_user_or_a_run_of_github(monkeypatch):
    monkeypatch.setenv("LOGNAME", "kim")
    assert promotion.actor({}) == f"kim on {socket.gethostname()}"
    monkeypatch.setattr(getpass, "getuser", lambda: {}["uid not found"])
    assert promotion.actor({}) == f"user {os.getuid()} on {socket.gethostname()}"
    env = {
        "GITHUB_RUN_ID": "7",
        "GITHUB_SERVER_URL": "https://github.example",
        "GITHUB_REPOSITORY": "plant/castings",
        "GITHUB_ACTOR": "kim",
    }
    said = "kim, https://github.example/plant/castings/actions/runs/7"
    assert promotion.actor(env) == said
    by = {"RETRAIN_STARTED_BY": "192.168.0.7 with the token"}
    # Also where a run of GitHub has started the API.
    for variables in (by, env | by):
        said = f"192.168.0.7 with the token, by the API on {socket.gethostname()}"
        assert promotion.actor(variables) == said


# Below, real processes: forked by a server that has MLflow imported, and no store open.


def _evaluate(uri: str, name: str, accuracies: list[float], turn, outcome) -> None:
    """Register and promote in each round, at about the same moment as the other process."""
    chance, set_alias = random.Random(os.getpid()), versions.set_alias

    def after_a_while(*arguments) -> None:  # the other may look, register and move meanwhile
        time.sleep(chance.choice((0, 0.3)))
        set_alias(*arguments)

    versions.set_alias = after_a_while
    with store.connected(uri):
        for number, acc in enumerate(accuracies):
            turn.wait(60)
            time.sleep(chance.choice((0, 0.1)))
            register(f"{name}_{number}", acc)
            promote(f"{name}_{number}")
    outcome.put(True)


@pytest.mark.parametrize("kind", ["sqlite", long("server")])
def test_two_processes_that_race_leave_the_alias_on_the_better_version(kind, request, name):
    uri = request.getfixturevalue("_store" if kind == "sqlite" else "tracking_server")
    processes = preloaded.processes()
    turn, outcome = processes.Barrier(2), processes.Queue()
    rounds = [(0.7, 0.8) if number % 2 else (0.9, 0.6) for number in range(ROUNDS[kind])]
    racing = [
        processes.Process(target=_evaluate, args=(uri, name, list(each), turn, outcome))
        for each in zip(*rounds, strict=True)
    ]
    for process in racing:
        process.start()
    for process in racing:
        process.join(240)
        assert process.exitcode == 0
    with store.connected(uri):
        for number, accuracies in enumerate(rounds):
            raced = f"{name}_{number}"
            assert sorted(v.acc for v in versions.with_accuracy(raced)) == sorted(accuracies)
            assert versions.with_alias(raced, "prod").acc == max(accuracies)
            assert not promotion.moved_outside(raced)


def _killed(uri: str, name: str, what: str, steps: int) -> None:
    """Promote or choose, and die without a word before the store's call number `steps`."""
    left = [steps]
    for client, call in (
        (MlflowClient, "set_registered_model_alias"),
        (MlflowClient, "set_model_version_tag"),
        (MlflowClient, "delete_model_version_tag"),
        (MlflowClient, "create_run"),
        (MlflowClient, "set_tag"),
        (MlflowClient, "log_dict"),
        (MlflowClient, "set_terminated"),
    ):
        real = getattr(client, call)

        def counted(*arguments, real=real, **named):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*arguments, **named)

        setattr(client, call, counted)
    with store.connected(uri):
        if what == "promote":
            promote(name)
        else:
            promotion.choose(name, 1, "chosen", "person")


@pytest.mark.long
@pytest.mark.parametrize("what", ["promote", "choose"])
def test_kill_at_any_step_leaves_the_old_or_the_new_state_whole(what, _store):
    uri = _store
    states, killed = [], True
    with store.connected(uri):
        store.open_experiment("train/promotion")
    steps = 0
    while killed:
        name = new_name()
        with store.connected(uri):
            register(name, 0.7)
            promote(name)
            register(name, 0.9)
            if what == "choose":
                promote(name)
        process = preloaded.processes().Process(target=_killed, args=(uri, name, what, steps))
        process.start()
        process.join(60)
        killed = process.exitcode == 9
        assert killed or process.exitcode == 0
        old, new = (1, 2) if what == "promote" else (2, 1)
        with store.connected(uri):
            found = prod(name)
            states.append(found)
            assert found in (old, new)
            if what == "promote":  # the next evaluation ends where this one would have
                register(name, 0.5)
                assert promote(name) == 2
            else:  # or leaves a person's choice, if it was carried out, as it is
                register(name, 0.5)
                assert promote(name) == found
                # Killed before the move, it may have set the version aside.
                assert versions.with_accuracy(name)[1].set_aside or found == 2
            assert not promotion.moved_outside(name)
            done = [one for one in promotion.history(name) if one.done]
            assert done[0].change.after == prod(name)
            if found == new:
                assert versions.with_accuracy(name)[new - 1].tags["promotion.by"]
        steps += 1
    # It was killed before the move and after it, at several steps each.
    assert states == sorted(states, key=lambda state: state == new)
    assert states.count(old) >= 2 and states.count(new) >= 4
