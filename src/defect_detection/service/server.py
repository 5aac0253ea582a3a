"""The server of the API: what one caller may take of it, so that enough is left for others."""

import copy
import logging
import resource
import socket
import time
from contextlib import suppress
from typing import Any

import waitress  # type: ignore[import-untyped]
from flask import Flask
from waitress.channel import HTTPChannel  # type: ignore[import-untyped]
from waitress.parser import HTTPRequestParser, ParsingError  # type: ignore[import-untyped]
from waitress.server import BaseWSGIServer  # type: ignore[import-untyped]

from defect_detection import PipelineError
from defect_detection.service import predict
from defect_detection.service.access import LARGEST_BODY

log = logging.getLogger("api")

THREADS = 40  # a call with ?wait=true holds one while its job runs, one with images waits
MOST_CONNECTIONS = 512
FILES_PER_CONNECTION = 3  # the socket, and two for what is too large for the memory
PATIENCE = 20  # seconds in which a call must arrive whole; then, between two calls
LARGEST_HEADERS = 16 * 1024  # bytes
MOST_UNREAD = 4 * 1024 * 1024  # bytes of answers; waitress lets a thread wait at 16 MB of them


class Call(HTTPRequestParser):  # type: ignore[misc]
    """A call as it arrives."""

    adj: Any  # limits, which all calls share
    path = ""  # until it is read; waitress names it when the caller hangs up

    def parse_header(self, header_plus: bytes) -> None:
        """Read the headers; an address such as http://[ is the caller's mistake, thus 400.

        Only /predict takes large bodies; others are not even read.
        """
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            raise ParsingError("Malformed address") from error
        if self.path != predict.PATH and (self.content_length or self.chunked):
            limits = copy.copy(self.adj)
            limits.max_request_body_size = 64 * LARGEST_BODY
            self.adj = limits


class Connection(HTTPChannel):  # type: ignore[misc]
    """A connection that is closed if a call takes too long to arrive, or its answer to leave.

    Waitress measures from the last byte, so a byte now and then would hold it for ever; and it
    waits for a caller that reads nothing. Once a call has arrived, answering it may take any time.
    A caller that sends more calls must read the answers, so that no thread waits for it.
    """

    parser_class = Call
    last_activity: float  # seconds since 1970
    total_outbufs_len: int  # bytes of answers that the caller has not taken

    def handle_read(self) -> None:
        """Read what has arrived."""
        unfinished, active = self.request, self.last_activity
        super().handle_read()
        if unfinished is not None and self.request is unfinished:
            self.last_activity = active

    def service(self) -> None:
        """Answer a call, or hang up on a caller that leaves former answers unread."""
        if self.total_outbufs_len > MOST_UNREAD:
            self.cancel()
        super().service()

    def readable(self) -> bool:
        """Return whether more may be read; hang up on a caller that takes nothing of an answer."""
        if self.total_outbufs_len and time.time() - self.last_activity > PATIENCE:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        return bool(super().readable())


def create(app: Flask, host: str, port: int) -> Any:
    """Return waitress's server, which listens; `run()` serves until the process is ended.

    Raises:
        PipelineError: the address cannot be served.
    """
    sockets: dict[int, Any] = {}
    try:
        server = waitress.create_server(
            app,
            map=sockets,
            host=host,
            port=port,
            threads=THREADS,
            connection_limit=min(MOST_CONNECTIONS, _open_files() // FILES_PER_CONNECTION),
            channel_timeout=PATIENCE,
            cleanup_interval=PATIENCE // 4,
            max_request_header_size=LARGEST_HEADERS,
            max_request_body_size=predict.LARGEST_BODY + 1,
            asyncore_use_poll=True,  # select takes no descriptor above 1023
            clear_untrusted_proxy_headers=False,  # `access` refuses what bears them
            log_socket_errors=False,  # a traceback for each caller that hangs up
            ident="defect-detection",
        )
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(
            f"{host}:{port} cannot be served ({reason}). Choose another port with --port or "
            f"API_PORT"
        ) from error
    for one in sockets.values():
        if isinstance(one, BaseWSGIServer):
            one.channel_class = Connection
    log.info("Serving on http://%s:%d", host, port)
    return server


def _open_files() -> int:
    """Raise the limit of open files, 256 on macOS, to what all connections need; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_PER_CONNECTION * MOST_CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else wanted
