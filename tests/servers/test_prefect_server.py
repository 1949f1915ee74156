"""Who may ask Prefect's server: the check alone here, real servers in test_servers.py."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from flows.servers import prefect_server

NAMES = {"localhost", "host.example", "prefect.example:8443"}
PAGE = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def refusal(method: str = "POST", kind: str = "http", **headers: str) -> str | None:
    told = {"host": "127.0.0.1:4200", **headers}
    scope = {
        "type": kind,
        "method": method,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()],
    }
    return prefect_server.refusal(scope, NAMES)


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program
        {"host": "localhost:4200"},
        {"host": "HOST.example"},
        {"host": "[::1]:4200"},
        {"host": "192.168.1.7:4200"},
        {"host": "prefect.example:8443"},
        {"origin": "http://127.0.0.1:4200", "sec_fetch_site": "same-origin"},
        {"origin": "https://prefect.example:8443"},  # behind a proxy that asks by the address
        {"sec_fetch_site": "none"},
    ],
)
def test_programs_and_own_pages_are_answered(headers: dict[str, str]) -> None:
    assert refusal(**headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:4200"},
        {"host": ""},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1:4200@evil.example"},
        {"host": "10.evil.example"},
        {"host": "[::1"},
        {"host": "prefect.example:1"},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8888"},
        {"origin": "http://127.0.0.1:4200.evil.example"},
        {"origin": "http://127.0.0.1:4200/x"},
        {"origin": ""},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_other_names_and_other_pages_are_not(headers: dict[str, str], kind: str) -> None:
    assert refusal(kind=kind, **headers)


def test_a_link_is_followed_and_a_frame_or_a_form_is_not() -> None:
    assert refusal("GET", **PAGE) is None
    assert refusal("GET", **PAGE | {"sec-fetch-dest": "iframe"})
    assert refusal("POST", **PAGE)
    assert refusal("GET", kind="websocket", **PAGE)


def test_of_two_hosts_none_counts() -> None:
    scope = {"type": "http", "method": "GET", "headers": [(b"host", b"localhost"), (b"Host", b"evil.example")]}
    assert prefect_server.refusal(scope, NAMES)


def test_what_is_answered_says_that_no_page_may_frame_it() -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def keep(message: Any) -> None:
        sent.append(message)

    def ask(**headers: str) -> None:
        told = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "headers": told}
        asyncio.run(prefect_server.guarded(app, NAMES)(scope, None, keep))  # type: ignore[arg-type]

    ask(host="localhost")
    assert sent == [{"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"SAMEORIGIN")]}]
    ask(host="localhost", origin="http://evil.example")
    assert sent[1]["status"] == 403


def test_a_process_ends_though_prefects_clients_wait_for_ever() -> None:
    code = (
        "import threading; from flows.servers import prefect_api; prefect_api.LEAVE_S = 0.2; prefect_api.leave_soon(7); "
        "threading.Thread(target=threading.Event().wait).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "they are lost" in done.stderr) == (7, True)
