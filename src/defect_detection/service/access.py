"""Who may do what through the API: viewers look, operators label, engineers decide.

A program sends a token as a bearer; a person signs in with it once a shift and gets a signed
cookie. Without API_TOKEN, everything but looking is for this machine only.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from flask import Flask, abort, current_app, g, request, session
from flask_wtf import CSRFProtect  # type: ignore[import-untyped]

from defect_detection import PipelineError
from defect_detection.names import printable
from defect_detection.service import shifts

log = logging.getLogger("api")

READING = ("GET", "HEAD", "OPTIONS")
LONGEST_PROGRAM = 80  # characters of the header User-Agent that are kept
LONGEST_NAME = 40  # characters of a person's name
LONGEST_SHIFT = timedelta(hours=25)  # of cookies, which end with the shift that they say
LATE = timedelta(minutes=30)  # before the end of a shift, a sign-in counts for the next one
LARGEST_BODY = 16 * 1024  # bytes, but for images
MOST_WRONG, WRONG_WITHIN = 10, 60  # wrong tokens from one address, in so many seconds
SECRET = "secret"  # the file of the key of sign-ins
SIGN_IN = "pages.signed_in"  # the endpoint that makes a cookie

View = TypeVar("View", bound=Callable)


class Role(IntEnum):
    """What somebody may do; each role may do what those below it may."""

    NOBODY = 0
    VIEWER = 1
    OPERATOR = 2
    ENGINEER = 3

    def __str__(self) -> str:
        """Return it in a word."""
        return self.name.lower()


TOKENS = {Role.ENGINEER: "API_TOKEN", Role.OPERATOR: "OPERATOR_TOKEN", Role.VIEWER: "VIEW_TOKEN"}


@dataclass(frozen=True)
class Caller:
    """Who makes the current call.

    Attributes:
        role: what the caller may do.
        name: of a person who signed in, else "".
        described: name, address, right and program, for records.
        why_not_more: why the role is not higher.
        by_token: whether the call bears a token.
    """

    role: Role
    name: str
    described: str
    why_not_more: str
    by_token: bool = False

    @property
    def signed_in(self) -> bool:
        """Whether a cookie says who it is."""
        return bool(self.name)

    @property
    def known_as(self) -> str:
        """What stands beside labels: the name of a person, else the description."""
        return self.name or self.described


class Access:
    """The tokens, and who bears them."""

    def __init__(self, tokens: dict[Role, str], secret: str, shifts: Sequence[str] = ("00:00",)):
        """Know who may do what.

        Args:
            tokens: of roles, as far as they are set.
            secret: the key of sign-ins.
            shifts: when shifts begin, in local time; a sign-in ends with the shift.

        Raises:
            PipelineError: two roles have the same token, so one would have the rights of the other.
        """
        self._tokens = {role: token for role, token in tokens.items() if token}
        if len(set(self._tokens.values())) < len(self._tokens):
            names = ", ".join(TOKENS[role] for role in self._tokens)
            raise PipelineError(f"Two of {names} are the same. Give each a value of its own")
        self.secret, self._shifts = secret, shifts
        self._right: set[str] = set()  # proofs of tokens that were right
        self._wrong: dict[str, deque[float]] = {}

    def attach(self, app: Flask) -> None:
        """Make an application ask who calls, before each call."""
        app.config.update(
            SECRET_KEY=self.secret,
            SESSION_COOKIE_NAME="defect-detection",
            SESSION_COOKIE_HTTPONLY=True,
            SESSION_COOKIE_SAMESITE="Strict",
            SESSION_REFRESH_EACH_REQUEST=False,
            PERMANENT_SESSION_LIFETIME=LONGEST_SHIFT,
            WTF_CSRF_CHECK_DEFAULT=False,  # calls with a token need none; see `guard`
            WTF_CSRF_TIME_LIMIT=None,  # as long as the cookie
        )
        csrf = CSRFProtect(app)
        app.before_request(lambda: self.guard(csrf))

    def guard(self, csrf: CSRFProtect) -> None:
        """Let the current call through, or end it with 401 or 403 and the reason."""
        view = current_app.view_functions.get(request.endpoint or "")
        reads = request.method in READING
        usual = Role.NOBODY if view is None else Role.VIEWER if reads else Role.ENGINEER
        needed = getattr(view, "needs", usual)
        request.max_content_length = getattr(view, "largest_body", LARGEST_BODY)
        g.caller = caller = self._caller(needed)
        if caller.role >= needed:
            if not reads and (caller.signed_in or request.endpoint == SIGN_IN):
                csrf.protect()
            return
        if caller.signed_in or caller.by_token:
            abort(403, f"This is for {_with_article(needed)}; you are {_with_article(caller.role)}")
        known = [TOKENS[role] for role in sorted(self._tokens) if role >= needed]
        if not known:
            abort(403, caller.why_not_more)
        abort(401, f"Sign in, or send 'Authorization: Bearer <token>' with {' or '.join(known)}")

    def has(self, role: Role) -> bool:
        """Return whether a role has a token."""
        return role in self._tokens

    def sign_in(self, name: str, token: str) -> Role:
        """Give the current caller a cookie with a name; return the role that comes with it.

        The call ends with 401, 403 or 429 if it is refused.
        """
        shown = printable(" ".join(name.split()), LONGEST_NAME)
        if not shown:
            abort(400, "Enter your name: it stands beside what you decide")
        role, why = self._by_machine()
        if token and self._tokens:
            role = self._role_of(token)
        if role == Role.NOBODY:
            abort(401, why)
        session.clear()
        session.permanent = True
        session["name"] = shown
        session["proof"] = self._proof(token) if token and self._tokens else ""
        session["until"] = self._end_of_shift()
        return role

    def why_token(self) -> str:
        """Return why the current caller must enter a token to sign in, "" if it need not."""
        return self._by_machine()[1]

    def _caller(self, needed: Role) -> Caller:
        """Return who makes the current call, which needs a role."""
        role, why = self._by_machine()
        anyone = Role.NOBODY if self.has(Role.VIEWER) else Role.VIEWER
        header = request.headers.get("Authorization", "")
        # A token is looked at only where it matters, and other kinds of headers are a proxy's.
        if header.startswith("Bearer ") and self._tokens and needed > anyone:
            by_token = self._role_of(header.removeprefix("Bearer "))
            return Caller(by_token, "", _described("token"), why, by_token=True)
        name = str(session.get("name", ""))
        if name and float(session.get("until", 0)) > time.time():
            proof = str(session.get("proof", ""))
            if proof:  # of a token; a token that was changed since proves nothing
                role = self._proven(proof)
            if role > Role.NOBODY:
                return Caller(role, name, f"{name}, {_described('sign-in')}", why)
        return Caller(max(role, anyone), "", _described("this machine"), why)

    def _by_machine(self) -> tuple[Role, str]:
        """Return the role of a caller without a token, and why it is no higher."""
        if self.has(Role.ENGINEER):
            return Role.NOBODY, "Enter the token that your engineer gave you"
        why = _why_not_local()
        return (Role.NOBODY, why) if why else (Role.ENGINEER, "")

    def _end_of_shift(self) -> float:
        """Return when a sign-in ends, in seconds since 1970; a late one counts for the next."""
        now = datetime.now().astimezone()
        return shifts.next_after(self._shifts, now + LATE).timestamp()

    def _role_of(self, token: str) -> Role:
        """Return the role of a token; end the call if it is wrong.

        Many wrong ones from an address are not even looked at, but those that were right before
        are: behind a proxy, all callers have one address.
        """
        address, given = request.remote_addr or "", self._proof(token)
        recent = self._wrong.setdefault(address, deque(maxlen=MOST_WRONG))
        now = time.monotonic()
        blocked = len(recent) == MOST_WRONG and now - recent[0] < WRONG_WITHIN
        if blocked and given not in self._right:
            abort(429, "Too many wrong tokens from this address. Wait a minute")
        role = self._proven(given)
        if role > Role.NOBODY:
            self._right.add(given)
            return role
        recent.append(now)
        if len(self._wrong) > 10_000:
            self._wrong.clear()
        abort(401, "The token is wrong")

    def _proof(self, token: str) -> str:
        return hmac.new(self.secret.encode(), token.encode(), hashlib.sha256).hexdigest()

    def _proven(self, proof: str) -> Role:
        for role, token in self._tokens.items():
            if hmac.compare_digest(proof, self._proof(token)):
                return role
        return Role.NOBODY


def needs(role: Role) -> Callable[[View], View]:
    """Mark a view with the role that its callers need.

    Without a mark, reading is for viewers and everything else for engineers.
    """

    def mark(view: View) -> View:
        view.needs = role  # type: ignore[attr-defined]
        return view

    return mark


def takes(largest: int) -> Callable[[View], View]:
    """Mark a view with the largest body that it takes, in bytes."""

    def mark(view: View) -> View:
        view.largest_body = largest  # type: ignore[attr-defined]
        return view

    return mark


def secret_in(folder: Path) -> str:
    """Return the key of sign-ins that a folder keeps; make it at the first time."""
    file = folder / SECRET
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as made:
                made.write(secrets.token_hex(32))
        kept = file.read_text().strip()
        if len(kept) >= 32:
            return kept
        log.warning("%s is damaged: people sign in again after each start", file)
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be kept (%s): people sign in again after each start", file, error)
    return secrets.token_hex(32)


def _why_not_local() -> str:
    """Return why the current caller is not this machine's own, "" if it is."""
    # The peer's address and never a forwarded one, since anyone can write that header.
    if not is_loopback(request.remote_addr or ""):
        return "Without API_TOKEN, changing calls are accepted from this machine only"
    if any(map(is_from_proxies, request.headers.keys())):
        return "The call came through a proxy, so its sender is not known: set API_TOKEN"
    # A page in a browser on this machine comes from loopback too, whoever wrote it. Its call names
    # the page in Origin; a foreign name that resolves to this machine stands in Host.
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if not is_local_name(host) or (origin and _host_of(origin) != host):
        return "Without API_TOKEN, changing calls are not accepted from other sites' pages"
    return ""


def is_loopback(address: str) -> bool:
    """Return whether an IP address is this machine's own."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def is_from_proxies(header: str) -> bool:
    """Return whether a header is one that only proxies send."""
    name = header.lower()
    return name in ("forwarded", "via", "x-real-ip") or name.startswith("x-forwarded-")


def is_local_name(host: str) -> bool:
    """Return whether the header Host, with or without a port, names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # as of "["
        return False
    return name == "localhost" or is_loopback(name)


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _described(right: str) -> str:
    """Return the current call's sender, by which right it came, and by which program."""
    agent = request.headers.get("User-Agent", "").encode("ascii", "replace").decode()
    program = printable(agent, LONGEST_PROGRAM)
    sender = f"{request.remote_addr}, by {right}"
    return f"{sender}, {json.dumps(program)}" if program else sender


def _with_article(role: Role) -> str:
    return f"a {role}" if role == Role.VIEWER else f"an {role}"
