"""Who may change anything through the API: holders of the token, or this machine only."""

import hmac
import ipaddress
import json
from urllib.parse import urlsplit

from flask import abort, g, request

from defect_detection.names import printable

READING = ("GET", "HEAD", "OPTIONS")
LONGEST_PROGRAM = 80  # characters of the header User-Agent that are kept


def guard(token: str | None) -> None:
    """Let the current call through, or end it with 401 or 403 and the reason.

    Args:
        token: that changing calls must bear; None if they must come from this machine.
    """
    if request.method in READING:
        return
    if token is not None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            abort(401, "This call needs 'Authorization: Bearer <token>' with the API's token")
        g.caller = _caller("token")
        return
    # The peer's address and never a forwarded one, since anyone can write that header.
    if not is_loopback(request.remote_addr or ""):
        abort(403, "Without API_TOKEN, changing calls are accepted from this machine only")
    if any(map(is_from_proxies, request.headers.keys())):
        abort(403, "The call came through a proxy, so its sender is not known: set API_TOKEN")
    # A page in a browser on this machine comes from loopback too, whoever wrote it. Its call names
    # the page in Origin; a foreign name that resolves to this machine stands in Host.
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if not is_local_name(host) or (origin and _host_of(origin) != host):
        abort(403, "Without API_TOKEN, changing calls are not accepted from other sites' pages")
    g.caller = _caller("this machine")


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


def _caller(right: str) -> str:
    """Return the current call's sender, by which right it came, and by which program."""
    agent = request.headers.get("User-Agent", "").encode("ascii", "replace").decode()
    program = printable(agent, LONGEST_PROGRAM)
    sender = f"{request.remote_addr}, by {right}"
    return f"{sender}, {json.dumps(program)}" if program else sender
