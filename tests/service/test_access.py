"""Who may do what, signing in, and what a page of another site cannot do."""

import json
import re
import time
from http.cookies import SimpleCookie

import pytest

from backends import LOCAL, OTHER, backend, client
from defect_detection import PipelineError
from defect_detection.service import access
from defect_detection.service.access import Access, Role, secret_in

TOKENS = {Role.ENGINEER: "engineer", Role.OPERATOR: "operator"}
ALL = TOKENS | {Role.VIEWER: "viewer"}
PAGES = ("/line", "/review", "/labels", "/models", "/jobs")
BROWSER = {"Accept": "text/html,application/xhtml+xml", "Host": "localhost"}


def csrf(calls, page: str = "/sign-in") -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', calls.get(page).text).group(1)


def sign_in(calls, name: str = "Ada", token: str = "", **headers: str):
    form = {"name": name, "token": token, "csrf_token": csrf(calls)}
    return calls.post("/sign-in", data=form, headers=headers or {"Host": "localhost"})


def test_sign_in_gives_a_name_and_a_role_for_a_shift(tmp_path):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    answer = sign_in(calls, " Ada  Lovelace ", "operator")
    assert answer.status_code == 302
    assert 'Ada Lovelace<span class="role">, operator' in calls.get("/line").text
    cookie = SimpleCookie(answer.headers["Set-Cookie"])["defect-detection"]
    assert cookie["httponly"] and cookie["samesite"] == "Strict"
    kept = calls.application.session_interface.get_signing_serializer(calls.application)
    assert "operator" not in str(kept.loads(cookie.value))


def test_sign_in_ends_with_the_shift(tmp_path, monkeypatch):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    sign_in(calls, token="operator")
    assert "Sign out" in calls.get("/line").text
    later = time.time() + 9 * 3600  # no shift is longer than eight hours
    monkeypatch.setattr(access.time, "time", lambda: later)
    assert "Sign out" not in calls.get("/line").text
    answer = calls.post(
        "/review/1", headers=BROWSER | {"Referer": "http://localhost/review?blind=1"}
    )
    assert answer.headers["Location"].startswith("/sign-in?next=/review?blind%3D1&why=Your+sign")


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Basic eDp5"}, {"Authorization": "Bearer x"}]
)
def test_header_that_says_nothing_changes_nothing(tmp_path, headers):
    """Such as that of a proxy, or of a program whose token is not needed."""
    for tokens in ({}, TOKENS):
        calls = client(backend(tmp_path / str(len(tokens)), tokens), OTHER)
        for path in ("/health", "/line", "/static/page.css"):
            assert calls.get(path, headers=headers).status_code == 200


def test_two_roles_with_one_token_are_refused():
    with pytest.raises(PipelineError, match="API_TOKEN, OPERATOR_TOKEN are the same"):
        Access({Role.ENGINEER: "same", Role.OPERATOR: "same"}, "x")


def test_labels_need_a_name_also_on_this_machine(tmp_path):
    answer = client(backend(tmp_path)).post("/review/1", data={"answer": "ok_front"})
    assert answer.status_code == 401 and "Your sign-in has ended" in answer.json["message"]


@pytest.mark.parametrize(
    ("name", "token", "status"),
    [("", "operator", 400), ("Ada", "", 401), ("Ada", "wrong", 401), (" \n", "operator", 400)],
)
def test_sign_in_without_name_or_token_is_refused(tmp_path, name, token, status):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    assert sign_in(calls, name, token).status_code == status
    assert "Sign out" not in calls.get("/line").text


def test_without_tokens_this_machine_signs_in_by_name_alone(tmp_path):
    made = backend(tmp_path)
    calls = client(made)
    assert sign_in(calls).status_code == 302
    assert 'Ada<span class="role">, engineer' in calls.get("/line").text
    elsewhere = client(made, OTHER)
    assert sign_in(elsewhere).status_code == 401


def test_cookie_of_this_machine_is_worth_nothing_elsewhere(tmp_path):
    made = backend(tmp_path)
    calls = client(made)
    sign_in(calls)
    token = csrf(calls)
    calls.environ_base = {**calls.environ_base, **OTHER}
    answer = calls.post("/jobs", data={"csrf_token": token}, headers={"Host": "localhost"})
    assert answer.status_code == 403


def test_changed_token_ends_all_sign_ins(tmp_path):
    made = backend(tmp_path, TOKENS)
    calls = client(made, OTHER)
    sign_in(calls, token="engineer")
    assert "engineer" in calls.get("/line").text
    made.access._tokens[Role.ENGINEER] = "another"
    assert "Sign out" not in calls.get("/line").text


def test_forged_cookie_is_no_sign_in(tmp_path):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    other = client(backend(tmp_path / "other", TOKENS), OTHER)
    other.application.secret_key = "another"
    sign_in(other, token="engineer")
    cookie = other.get_cookie("defect-detection").value
    calls.set_cookie("defect-detection", cookie)
    assert "Sign out" not in calls.get("/line").text


@pytest.mark.parametrize("page", PAGES)
def test_with_view_token_nothing_is_shown_without_it(tmp_path, page):
    calls = client(backend(tmp_path, ALL), OTHER)
    assert calls.get(page).status_code == 401
    answer = calls.get(page, headers=BROWSER)
    assert answer.status_code == 303
    assert answer.headers["Location"] == f"/sign-in?next={page}"
    bearer = {"Authorization": "Bearer viewer"}
    assert calls.get(page, headers=bearer).status_code in (200, 303, 503)
    sign_in(calls, token="viewer")
    assert calls.get(page).status_code in (200, 303, 503)


@pytest.mark.parametrize("path", ["/health", "/sign-in", "/static/page.css", "/openapi.json"])
def test_what_needs_no_token_with_view_token(tmp_path, path):
    assert client(backend(tmp_path, ALL), OTHER).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/retrain", "/line/state", "/verdicts/1/image"])
def test_what_needs_view_token(tmp_path, path):
    assert client(backend(tmp_path, ALL), OTHER).get(path).status_code == 401


CHANGES = {
    "/predict": Role.OPERATOR,
    "/review/1": Role.OPERATOR,
    "/review/undo": Role.OPERATOR,
    "/labels": Role.ENGINEER,
    "/retrain": Role.ENGINEER,
    "/jobs": Role.ENGINEER,
    "/jobs/x/cancel": Role.ENGINEER,
    "/models/promote": Role.ENGINEER,
    "/models/rollback": Role.ENGINEER,
}


@pytest.mark.parametrize("role", [Role.NOBODY, Role.VIEWER, Role.OPERATOR, Role.ENGINEER])
@pytest.mark.parametrize("path", CHANGES)
def test_each_change_needs_its_role(tmp_path, path, role):
    calls = client(backend(tmp_path, ALL), OTHER)
    headers = {} if role == Role.NOBODY else {"Authorization": f"Bearer {role}"}
    refused = calls.post(path, headers=headers).status_code in (401, 403)
    assert refused == (role < CHANGES[path])
    if role > Role.NOBODY:  # the same for a person
        sign_in(calls, token=str(role))
        form = {"csrf_token": csrf(calls)}
        refused = calls.post(path, data=form).status_code in (401, 403)
        assert refused == (role < CHANGES[path])


def test_every_change_is_in_that_list(tmp_path):
    app = client(backend(tmp_path)).application
    free = {"/sign-in", "/sign-out"}
    found = {
        re.sub("<.*?>", "x" if "job" in rule.rule else "1", rule.rule)
        for rule in app.url_map.iter_rules()
        if rule.methods - {"GET", "HEAD", "OPTIONS"}
    }
    assert found - free == set(CHANGES) | {"/retrain/x"}


@pytest.mark.parametrize("path", ["/jobs", "/labels", "/review/1", "/sign-out", "/retrain"])
@pytest.mark.parametrize("given", [None, "wrong"])
def test_signed_in_browser_needs_the_token_of_its_page(tmp_path, path, given):
    """A page of another site makes the browser send the cookie, but cannot read the token."""
    calls = client(backend(tmp_path, TOKENS), OTHER)
    sign_in(calls, token="engineer")
    form = {} if given is None else {"csrf_token": given}
    answer = calls.post(path, data=form)
    assert answer.status_code == 400 and "CSRF" in answer.text
    assert "Sign out" in calls.get("/line").text


def test_sign_in_needs_the_token_of_its_page(tmp_path):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    answer = calls.post("/sign-in", data={"name": "Ada", "token": "operator"})
    assert answer.status_code == 400 and "CSRF" in answer.text


@pytest.mark.parametrize("page", [*PAGES, "/sign-in", "/none", "/retrain"])
def test_pages_allow_nothing_from_elsewhere_and_nothing_inline(tmp_path, page):
    answer = client(backend(tmp_path)).get(page, headers=BROWSER, follow_redirects=True)
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy and "*" not in policy and "http" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    if "html" in answer.mimetype:
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", answer.text)
        assert not re.search(r'(href|src|action)="(https?:)?//', answer.text)


@pytest.mark.parametrize(
    ("wanted", "led"),
    [
        ("/review?verdict=3", "/review?verdict=3"),
        ("https://elsewhere.example", "/line"),
        ("//elsewhere.example", "/line"),
        ("/\\elsewhere.example", "/line"),
        ("//[", "/line"),
        ("/sign-in", "/line"),
        ("/models/promote", "/line"),
        ("", "/line"),
    ],
)
def test_sign_in_leads_to_no_other_site(tmp_path, wanted, led):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    form = {"name": "Ada", "token": "operator", "csrf_token": csrf(calls), "next": wanted}
    assert calls.post("/sign-in", data=form).headers["Location"] == led


def test_guessing_tokens_is_slowed_down(tmp_path, monkeypatch):
    calls = client(backend(tmp_path, TOKENS), OTHER)
    wrong, right = ({"Authorization": f"Bearer {one}"} for one in ("wrong", "engineer"))
    for _ in range(access.MOST_WRONG):
        assert calls.post("/retrain", headers=wrong).status_code == 401
    assert calls.post("/retrain", headers=wrong).status_code == 429
    assert calls.post("/retrain", headers=right).status_code == 429  # it may be a guess
    elsewhere = client(backend(tmp_path / "b", TOKENS), LOCAL)
    assert elsewhere.post("/retrain", headers=right).status_code == 202
    monkeypatch.setattr(access, "WRONG_WITHIN", 0)
    assert calls.post("/retrain", headers=right).status_code in (202, 409)
    monkeypatch.undo()
    for _ in range(access.MOST_WRONG):
        calls.post("/retrain", headers=wrong)
    assert calls.post("/retrain", headers=wrong).status_code == 429
    assert calls.post("/retrain", headers=right).status_code in (202, 409)  # known by now


def test_key_of_sign_ins_is_made_once_for_its_owner_alone(tmp_path, caplog):
    first = secret_in(tmp_path / "line")
    assert secret_in(tmp_path / "line") == first and len(first) == 64
    assert (tmp_path / "line" / "secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "line" / "secret").write_text("short")
    assert secret_in(tmp_path / "line") != first
    assert "is damaged: people sign in again" in caplog.text
    (tmp_path / "file").touch()
    assert len(secret_in(tmp_path / "file")) == 64
    assert "cannot be kept" in caplog.text


def test_changes_are_written_down_with_the_name(tmp_path):
    made = backend(tmp_path, TOKENS)
    calls = client(made, OTHER)
    sign_in(calls, token="engineer")
    token = csrf(calls)
    assert calls.post("/jobs", data={"csrf_token": token, "epochs": "3"}).status_code == 302
    assert (
        calls.post("/models/promote", data={"csrf_token": token, "version": "7"}).status_code > 400
    )
    lines = [json.loads(line) for line in made.changes.file.read_text().splitlines()]
    actions = [line["action"] for line in lines]
    assert actions == [name for name in ("sign in", "retrain", "promote") for _ in "12"]
    assert all(line["by"].startswith("Ada, 192.168.0.7") for line in lines)
    assert lines[3]["parameters"] == {"epochs": 3}
    outcomes = [line["outcome"].split(":")[0] for line in lines]
    assert outcomes == ["begun", "done", "begun", "done", "begun", "failed"]


def test_change_that_cannot_be_written_down_is_not_made(tmp_path):
    made = backend(tmp_path)
    made.changes.file.parent.mkdir(exist_ok=True)
    made.changes.file.mkdir()
    answer = client(made).post("/retrain")
    assert (answer.status_code, made.jobs.all()) == (503, [])
    assert answer.json["message"] == "No retraining could be started: Is a directory"


def test_roles_are_ordered():
    assert Role.NOBODY < Role.VIEWER < Role.OPERATOR < Role.ENGINEER
    assert Access({Role.VIEWER: ""}, "x" * 32).has(Role.VIEWER) is False
