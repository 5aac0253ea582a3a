"""Who may change anything through the API: holders of the token, or this machine only."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from flask import abort, request

READING = ("GET", "HEAD", "OPTIONS")


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
        return
    # The peer's address and never a forwarded one, since anyone can write that header.
    if not is_loopback(request.remote_addr or ""):
        abort(403, "Without API_TOKEN, changing calls are accepted from this machine only")
    # A page in a browser on this machine comes from loopback too, whoever wrote it. Its call names
    # the page in Origin; a foreign name that resolves to this machine stands in Host.
    origin = request.headers.get("Origin")
    if not is_local_name(request.host) or (origin and urlsplit(origin).netloc != request.host):
        abort(403, "Without API_TOKEN, changing calls are not accepted from other sites' pages")


def is_loopback(address: str) -> bool:
    """Return whether an IP address is this machine's own."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def is_local_name(host: str) -> bool:
    """Return whether the header Host, with or without a port, names this machine."""
    name = urlsplit(f"//{host}").hostname or ""
    return name == "localhost" or is_loopback(name)
