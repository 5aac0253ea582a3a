"""The pages, in process: what they show, and what the people at them change."""

import io
import json
import re
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import mlflow
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from backends import LOCAL, backend, client
from defect_detection.inference import verdict_log
from defect_detection.inference.verdict_log import Origin, Rules
from defect_detection.registry import store as stores
from defect_detection.registry import versions
from defect_detection.runtime.classifier import Verdict
from defect_detection.service import shifts
from defect_detection.service.health import StoreWatch
from defect_detection.service.store_desk import StoreDesk
from logged import MODEL, OK, PART, judged

BAND = Verdict("ok", 0.45, True, evidence=np.ones((4, 4), np.float32))
DEFECT = Verdict("defect", 0.97, False, evidence=np.ones((4, 4), np.float32))
UNKNOWN = Verdict("unknown", 0.5, True, "too dark", np.ones((4, 4), np.float32))
ERROR = Verdict("error", None, True, "is empty (0 bytes)")


@pytest.fixture
def made(tmp_path):
    return backend(tmp_path)


def log(made, *entries) -> list[int]:
    """Log verdicts; each is a verdict, or one with the name of its file."""
    pairs = [one if isinstance(one, tuple) else (one, "part_7.jpeg") for one in entries]
    found = [judged(name, verdict) for verdict, name in pairs]
    return made.log.add(found, [Origin("predict")] * len(found))


def sign_in(made, name: str = "Ada"):
    calls = client(made)
    page = calls.get("/sign-in").text
    token = re.search(r'name="csrf_token" value="([^"]+)"', page).group(1)
    calls.post("/sign-in", data={"name": name, "csrf_token": token}, headers={"Host": "localhost"})
    return calls


def act(calls, path: str, **form):
    """Send a form of a page."""
    page = calls.get("/labels").text
    token = re.search(r'name="csrf_token" value="([^"]+)"', page).group(1)
    return calls.post(path, data={"csrf_token": token, **form}, headers={"Host": "localhost"})


def shown(calls, path: str) -> str:
    """Return the text of a page in one line."""
    return " ".join(re.sub("<[^>]+>", " ", calls.get(path).text).split())


@pytest.mark.parametrize(
    ("verdict", "word", "kind"),
    [(OK, "OK", "ok"), (DEFECT, "Defect", "defect"), (BAND, "Check", "review")]
    + [(UNKNOWN, "Unknown", "unknown"), (ERROR, "Unreadable", "error")],
)
def test_line_shows_the_newest_verdict_by_word_and_shape(made, verdict, word, kind):
    log(made, OK, (verdict, "part_8.jpeg"))
    page = client(made).get("/line").text
    assert f'<div class="stage {kind}"' in page
    assert re.search(r'<p class="word">(.*?)</p>', page).group(1) == word
    assert "part_8" in page and (not verdict.reason or verdict.reason in page)
    strip = page[page.index('<ol class="strip"') : page.index("</ol>")]
    assert strip.count("<li class=") == 2


def test_line_without_verdicts_says_what_to_do(made):
    page = shown(client(made), "/line")
    assert "No model No verdict yet. The model is being loaded" in page


def test_silence_is_as_loud_as_a_defect(made):
    (number,) = log(made, OK)
    calls = client(made)
    assert calls.get("/line/state").json["silent"] is None
    with closing(sqlite3.connect(made.verdicts.file)) as connection:
        connection.execute("UPDATE verdicts SET at = at - 75")
        connection.commit()
    state = calls.get("/line/state").json
    assert state["last"] == number and 75 <= state["silent"] < 80
    assert "False none arrive" in state["lights"]
    page = calls.get("/line").text
    assert '<div class="stage silent"' in page and '<p class="word">No image</p>' in page


def test_lights_say_what_does_not_work(made):
    log(made, OK)
    lights = client(made).get("/line/state").json["lights"]
    assert lights == [
        *("True arrive", "False The model is being loaded", "False does not answer"),
    ]
    made.log.trouble, made.log.unlogged = "database or disk is full", 3
    lights = client(made).get("/line/state").json["lights"]
    assert lights[3] == "False database or disk is full; 3 verdicts are not in it"


def test_shift_counts_each_part_once_by_its_worst_image(made):
    log(made, (OK, "a.1.jpeg"), (DEFECT, "a.2.jpeg"), (OK, "a.3.jpeg"), (OK, "b.jpeg"))
    log(made, (UNKNOWN, "c.jpeg"), (OK, "c.jpeg"), (ERROR, ".jpeg"), (ERROR, ".jpeg"))
    now = datetime.now(timezone.utc)
    shift = made.verdicts.shift(now)
    assert (shift.parts, shift.rejected.count, shift.unknown.count) == (5, 1, 3)
    assert shift.to_person.count == 3
    log(made, (DEFECT, "b.jpeg"), (BAND, "a.jpeg"))  # counted on, not from the start
    shift = made.verdicts.shift(now)
    assert (shift.parts, shift.rejected.count, shift.to_person.count) == (5, 2, 4)
    low, high = shift.rejected.bounds
    assert f"40.0% ({low:.1%} to {high:.1%})" in shown(client(made), "/line")
    assert made.verdicts.shift(now + timedelta(hours=24)).parts == 0


@pytest.mark.parametrize(
    ("now", "began"),
    [("05:59", "22:00"), ("06:00", "06:00"), ("13:59", "06:00"), ("14:00", "14:00")]
    + [("21:59", "14:00"), ("23:30", "22:00"), ("00:00", "22:00")],
)
def test_shift_begins_at_the_times_of_the_configuration(now, began):
    moment = datetime.fromisoformat(f"2026-03-04T{now}").astimezone()
    found = shifts.began(["06:00", "14:00", "22:00"], moment)
    assert found.strftime("%H:%M") == began and found <= moment


def test_images_are_of_our_own_making(made):
    """Whatever else stands in a file that was sent, a browser never gets it."""
    polyglot = PART + b"<script>alert(1)</script>"
    made.log.add([judged("a.html", DEFECT, polyglot)], [Origin("predict")])
    calls = client(made)
    for kind, of in (("image", "JPEG"), ("thumbnail", "JPEG"), ("evidence", "PNG")):
        answer = calls.get(f"/verdicts/1/{kind}")
        assert answer.status_code == 200 and b"script" not in answer.data
        image = Image.open(io.BytesIO(answer.data))
        assert (image.format, answer.mimetype) == (of, f"image/{of.lower()}")
    evidence = np.asarray(Image.open(io.BytesIO(calls.get("/verdicts/1/evidence").data)))
    assert (evidence[..., 3] == 255).all()
    assert calls.get("/verdicts/2/image").status_code == 404


def test_image_that_is_kept_no_longer_is_shown_small(made):
    log(made, DEFECT)
    with closing(sqlite3.connect(made.verdicts.file)) as connection:
        connection.execute("DELETE FROM images")
        connection.commit()
    calls = sign_in(made)
    image = Image.open(io.BytesIO(calls.get("/verdicts/1/image").data))
    assert max(image.size) == verdict_log.THUMBNAIL
    answer = act(calls, "/review/1", answer="ok_front")
    assert answer.status_code == 410 and "not kept any more" in answer.text


def test_queue_shows_what_waits_and_the_random_sample_last(tmp_path):
    made = backend(tmp_path, rules=Rules(audit_share=0.999999))
    numbers = log(made, OK, DEFECT, BAND, UNKNOWN, ERROR)
    assert [one.id for one in made.verdicts.waiting(9)] == [*numbers[2:], numbers[0]]
    assert made.verdicts.backlog() == {"audit": 1, "band": 1, "unknown": 1, "error": 1}
    calls = sign_in(made)
    for number in [*numbers[2:], numbers[0]]:
        page = calls.get("/review").text
        assert f'data-verdict="{number}"' in page
        assert act(calls, f"/review/{number}", answer="ok_front").status_code == 302
    assert "Nothing waits for you" in calls.get("/review").text
    assert [one.waits for one in made.inbox.labels()] == ["band", "unknown", "error", "audit"]


def test_label_says_who_and_undo_brings_the_image_back(made):
    numbers = log(made, BAND, UNKNOWN)
    calls = sign_in(made)
    act(calls, f"/review/{numbers[0]}", answer="def_front")
    (label,) = made.inbox.labels()
    assert (label.by, label.label, label.verdict, label.corrects) == (
        *("Ada", "def_front", "ok", True),
    )
    page = shown(calls, "/review")
    assert "you said defect , the model said ok (0.450): correction" in page
    assert act(calls, "/review/undo", label=label.id).status_code == 302
    assert made.inbox.labels() == []
    assert [one.id for one in made.verdicts.waiting(9)] == numbers
    assert act(calls, "/review/undo", label=label.id).status_code == 409
    lines = [json.loads(line) for line in made.changes.file.read_text().splitlines()]
    done = [line["action"] for line in lines if line["outcome"] == "done"]
    assert done == ["sign in", "label", "undo label"]


def test_queue_goes_on_past_what_cannot_be_labelled_any_more(made):
    numbers = log(made, BAND, UNKNOWN, BAND)
    with closing(sqlite3.connect(made.verdicts.file)) as connection:
        connection.execute("DELETE FROM images WHERE id = ?", (numbers[0],))
        connection.commit()
    ada, bob = sign_in(made), sign_in(made, "Bob")
    assert f'data-verdict="{numbers[1]}"' in ada.get("/review").text
    act(ada, f"/review/{numbers[1]}", answer="def_front")
    act(bob, f"/review/{numbers[1]}", answer="ok_front")
    last = made.inbox.labels()[-1]
    act(bob, "/review/undo", label=last.id)  # Ada's label stands
    assert f'data-verdict="{numbers[2]}"' in ada.get("/review").text
    assert act(ada, "/review/undo", label=last.id).status_code == 409
    made.verdicts.settle(numbers[1], False)  # as if the log had been locked at her label
    assert f'data-verdict="{numbers[2]}"' in ada.get("/review").text


def test_labels_of_a_former_log_are_not_those_of_this_one(made):
    numbers = log(made, BAND)
    calls = sign_in(made)
    act(calls, f"/review/{numbers[0]}", answer="def_front")
    made.verdicts.file.unlink()
    made.log.add([judged("new.jpeg", BAND, PART + b"another")], [Origin("predict")])
    page = calls.get("/review").text
    assert 'data-verdict="1"' in page and "You said" not in page
    assert act(calls, "/review/1", answer="ok_front").status_code == 302


def test_worst_image_of_the_newest_part_stands_on_the_line(made):
    log(made, (DEFECT, "a.front.jpeg"), (OK, "a.back.jpeg"))
    page = shown(client(made), "/line")
    assert "Defect on an earlier image of this part (a.front.jpeg)" in page
    log(made, (OK, "b.front.jpeg"))
    assert "earlier image" not in shown(client(made), "/line")


def test_damaged_table_of_labels_is_a_light_and_stops_no_page(made):
    log(made, OK)
    made.inbox.folder.mkdir(parents=True)
    (made.inbox.folder / "labels.csv").write_text("id;image\n")
    calls = client(made)
    assert calls.get("/line").status_code == 200
    assert any("its first line must be" in one for one in calls.get("/line/state").json["lights"])
    assert "verdicts_total" in calls.get("/metrics").text


def test_huge_id_is_404(made):
    calls = sign_in(made)
    for path in ("/verdicts/%d/image", "/verdicts/%d/evidence", "/review?verdict=%d"):
        assert calls.get(path % 10**25).status_code == 404
    assert act(calls, f"/review/{10**25}", answer="ok_front").status_code == 404


def test_blind_review_shows_no_verdict_until_it_is_judged(made):
    numbers = log(made, UNKNOWN, BAND)
    calls = sign_in(made)
    page = calls.get("/review?blind=1").text
    part = page[page.index('id="part"') :]
    for hint in ("too dark", "nknown", "unlike", "0.500", "/evidence", "correction"):
        assert hint not in part
    answer = act(calls, f"/review/{numbers[0]}", answer="ok_front", blind="1")
    assert "blind=1" in answer.headers["Location"]
    assert made.inbox.labels()[0].blind == "yes"
    assert "the model said unknown" in shown(calls, answer.headers["Location"])


def test_review_needs_a_name(made):
    answer = client(made).get("/review", headers={"Accept": "text/html"})
    assert answer.status_code == 303 and "/sign-in?next=/review" in answer.headers["Location"]


@pytest.mark.parametrize(
    ("path", "form", "status"),
    [
        ("/review/1", {"answer": "maybe"}, 400),
        ("/review/99", {"answer": "ok_front"}, 404),
        ("/labels", {"decision": "approve"}, 400),
        ("/labels", {"decision": "maybe", "label": "x"}, 400),
        ("/labels", {"decision": "approve", "label": "x"}, 409),
        ("/jobs", {"epochs": "many"}, 400),
        ("/jobs", {"epochs": "[" * 3000}, 400),
        ("/jobs", {"learning_rate": "nan"}, 400),
        ("/jobs/none/cancel", {}, 404),
        ("/models/promote", {}, 400),
        ("/models/promote", {"version": "x"}, 400),
    ],
)
def test_wrong_form_is_refused_with_the_reason(made, path, form, status):
    log(made, BAND)
    calls = sign_in(made)
    answer = act(calls, path, **form)
    assert answer.status_code == answer.json["status"] == status and answer.json["message"]
    assert made.jobs.all() == [] and made.inbox.labels() == []


def test_engineer_decides_on_labels(made):
    numbers = log(made, (BAND, "a.jpeg"), (BAND, "b.jpeg"), (UNKNOWN, "c.jpeg"))
    calls = sign_in(made)
    for number, answer in zip(numbers, ("def_front", "ok_front", "cannot_tell"), strict=True):
        act(calls, f"/review/{number}", answer=answer)
    first, second, third = made.inbox.labels()
    page = calls.get("/labels").text
    assert page.index(first.id) < page.index(second.id)  # the correction comes first
    assert calls.get(f"/labels/{first.id}/image").mimetype == "image/jpeg"
    act(calls, "/labels", decision="approve", label=[first.id])
    act(calls, "/labels", decision="reject", label=[second.id])
    act(calls, "/labels", decision="ok_front", label=[third.id])
    # The same image was approved as a defect just now: all three are of one file.
    assert [one.state for one in made.inbox.labels()] == ["approved", "rejected", "waiting"]
    assert "1 wait for an engineer" in shown(calls, "/labels")


def test_pages_are_small(made):
    numbers = log(made, *[BAND] * 110)
    calls = sign_in(made)
    for number in numbers[:100]:
        act(calls, f"/review/{number}", answer="cannot_tell")
    for label in made.inbox.labels()[:50]:
        made.inbox.reject(label.id, "Eve")
    for page in ("/line", "/review", "/labels", "/models", "/jobs", "/sign-in"):
        answer = calls.get(page)
        size = len(answer.data)
        for address in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
            part = calls.get(address)
            assert "immutable" in part.headers["Cache-Control"]
            size += len(part.data)
        assert size < 100_000, page


def test_pages_answer_quickly_with_a_hundred_thousand_verdicts(made):
    number = log(made, BAND)[0]
    with closing(sqlite3.connect(made.verdicts.file)) as connection:
        columns = ", ".join(verdict_log.COLUMNS)
        values = columns.replace("part,", "'p' || value,").replace("waits", "'band'")
        connection.execute(
            f"WITH RECURSIVE n (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE "
            f"value < 100000) INSERT INTO verdicts ({columns}) SELECT "
            f"{values.replace('path,', 'NULL,')} FROM verdicts, n WHERE id = {number}"
        )
        connection.execute(
            "INSERT INTO images (id, wanted, content) SELECT id, 1, x'ffd8' FROM verdicts "
            f"WHERE id != {number}"
        )
        connection.commit()
    calls, median = sign_in(made), {}
    for page in ("/line", "/line/state", "/review"):
        calls.get(page)  # the first counts the shift
        taken = []
        for _ in range(20):
            started = time.perf_counter()
            assert calls.get(page).status_code == 200
            taken.append(time.perf_counter() - started)
        median[page] = 1000 * float(np.median(taken))
    print(json.dumps(median))
    assert made.verdicts.shift(datetime.now(timezone.utc)).parts == 100_001
    assert max(median.values()) < 50, median
    assert made.verdicts.backlog() == {"band": 100_001}

    with closing(sqlite3.connect(made.verdicts.file)) as connection:
        connection.execute(f"DELETE FROM images WHERE id != {number}")  # they made room for others
        connection.commit()
    started = time.perf_counter()
    assert "p1" not in calls.get("/review").text
    assert time.perf_counter() - started < 5
    assert made.verdicts.backlog() == {"band": 1}


def test_metrics_count_verdicts_calls_and_what_waits(made):
    log(made, OK, DEFECT, BAND, BAND)
    calls = sign_in(made)
    act(calls, "/review/3", answer="def_front")
    calls.get("/nowhere")
    found = {}
    for family in text_string_to_metric_families(calls.get("/metrics").text):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.values()))] = sample.value
    assert found["verdicts_total", "ok", "predict"] == 3
    assert found["review_backlog", "band"] == 1
    assert found["overrides_total", "def_front", "ok"] == 1
    assert found["verdicts_unlogged_total",] == 0
    assert found["http_requests_total", "/review/<int:number>", "302", "POST"] == 1
    assert found["http_requests_total", "404", "GET", "unknown"] == 1
    assert found["http_request_seconds_count", "/review/<int:number>"] == 1
    assert found["job_state", "running"] == 0
    made.serving.model = MODEL
    assert 'model_info{model="Production_Reg/1"} 1.0' in calls.get("/metrics").text


def test_openapi_describes_all_calls_that_are_no_pages(made):
    document = client(made).get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        *("/predict", "/retrain", "/retrain/{job_id}", "/retrain/{job_id}/log", "/health"),
    }
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) >= {"multipart/form-data", "image/jpeg"}
    assert {one["name"] for one in predict["parameters"]} == {"heatmap", "name", "source"}
    assert {"200", "422"} <= set(predict["responses"])


@pytest.fixture
def registered(tmp_path, _store):
    """A backend whose store has two released versions, the first of them in production."""
    name = f"Pages_{tmp_path.name[-6:]}"
    made = replace(
        backend(tmp_path, store=StoreWatch(_store, name)),
        registered_model=name,
        desk=StoreDesk(_store),
    )
    with stores.connected(_store):
        with mlflow.start_run(experiment_id=stores.open_experiment("train/pages")) as run:
            mlflow.log_text("<style>p{}</style><script>1</script><p>the report</p>", "report.html")
        tags = {versions.RELEASED: "true", versions.EVALUATED_BY: run.info.run_id}
        first = versions.register(
            f"runs:/{run.info.run_id}/m", run.info.run_id, 0.9, "", name, tags
        )
        versions.register(f"runs:/{run.info.run_id}/m2", run.info.run_id, 0.95, "", name, tags)
        versions.set_alias(first, versions.PRODUCTION_ALIAS)
    return made


def test_models_are_shown_promoted_and_rolled_back(registered):
    calls = sign_in(registered)
    page = shown(calls, "/models")
    assert "version 1 is in production" in page and "0.9500" in page
    assert "it was moved outside this project" in page
    for version, expected in ((2, 2), (1, 1)):
        answer = act(calls, "/models/promote", version=str(version), why="knows <cracks>")
        assert answer.status_code == 302
        assert f"version {expected} is in production" in shown(calls, "/models")
    assert "knows &lt;cracks&gt;" in calls.get("/models").text
    assert "Ada, 127.0.0.1, by sign-in" in calls.get("/models").text
    assert act(calls, "/models/promote", version="1", why="again").status_code == 409
    assert act(calls, "/models/promote", version="9", why="none").status_code == 409
    assert act(calls, "/models/rollback", why="no").status_code == 409  # 2 was set aside


def test_report_comes_with_its_own_styles_and_no_others(registered):
    answer = client(registered, LOCAL).get("/models/1/report")
    assert "the report" in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert policy.count("'sha256-") == 2 and "unsafe" not in policy
    assert "sandbox allow-scripts" in policy and "form-action 'none'" in policy
    assert client(registered).get("/models/9/report").status_code == 404


def test_store_that_hangs_holds_up_no_page(made, monkeypatch):
    monkeypatch.setattr(StoreDesk.ask, "__defaults__", (0.2,))
    monkeypatch.setattr(versions, "with_accuracy", lambda _: time.sleep(3))
    monkeypatch.setattr(stores, "connected", lambda *_: closing(io.StringIO()))
    started = time.monotonic()
    answer = client(made).get("/models")
    assert (answer.status_code, time.monotonic() - started < 2) == (503, True)
    assert "does not answer" in answer.text
