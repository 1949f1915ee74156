"""Prefect's server behind a check of who asks: `python -m flows.servers.prefect_server HOST PORT`.

Prefect's own answers to whatever name it is asked by, and takes websockets and requests without a body from the pages of
any site. Without a password, every page in a browser on this machine could start flows that way. So a request must name
this server by a name of its own (else a foreign name that was made to point here would do), and what a browser sends
must come from Prefect's own pages. Programs send neither an origin nor fetch metadata, and go through.
"""

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

NAMES = "SLMOPS_PREFECT_HOSTS"  # the names of this server as browsers show them, a comma between two

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def guarded(app: App, names: Collection[str]) -> App:
    """The ASGI application behind the check. `names`: of this server, with or without a port."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the start and the end
            return await app(scope, receive, send)
        why = refusal(scope, names)
        if why is None:
            return await app(scope, receive, _unframed(send))
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": why})  # before accept: 403
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": why.encode()})

    return guard


def refusal(scope: Scope, names: Collection[str]) -> str | None:
    """Why a request is not answered; None where it is."""
    headers: dict[str, str] = {}
    for key, value in scope["headers"]:
        name = key.decode("latin-1").lower()
        if name in headers and name in ("host", "origin"):
            return f"there are two {name} headers"
        headers[name] = value.decode("latin-1")
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    if not _is_own(host, names):
        return f"this server has no such name: {NAMES} lists those that it has beside its own"
    if origin is not None and not _is_page_of(origin.lower(), host, names):
        return "this was sent by a page of another site"
    # A link to here may be followed; but a foreign page may not embed this one, for people to click on unawares.
    followed = (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
        return "this was sent by a page of another site"
    return None


def _is_own(host: str, names: Collection[str]) -> bool:
    """A name of this server, or an address: no one can make an address point elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if host in names or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_page_of(origin: str, host: str, names: Collection[str]) -> bool:
    """A page of this server: by the name that was asked, or, where a proxy asks by another one, by one of the names."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and (place == host or place in names)


def _unframed(send: Send) -> Send:
    """Answers say that no other page may frame them: browsers send no fetch metadata over plain HTTP."""

    async def tell(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-frame-options", b"SAMEORIGIN")]}
        await send(message)

    return tell


def main() -> None:
    """Serve until SIGTERM, as `prefect server start` does."""
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    host, port = sys.argv[1], int(sys.argv[2])
    server = get_current_settings().server
    uvicorn.run(
        guarded(create_app(final=True), {name for name in os.environ[NAMES].lower().split(",") if name}),
        host=host,
        port=port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
