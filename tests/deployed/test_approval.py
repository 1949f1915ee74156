"""Who is told that an approval waits, and that a run goes on whatever comes of telling."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from checkout import prefect_server

from flows.deployed import approval

QUESTION = {
    "name": "home-commands", "version": "3", "text": "Release **home-commands version 3** (bundle 0123456789ab)?",
    "flow_run": "11111111-2222-3333-4444-555555555555", "expires": "2026-11-29T12:00:00+00:00",
}  # fmt: skip


class Hook(HTTPServer):
    """A webhook on loopback: what it was sent, and the status that it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = 200
        self.heard: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret-path"


class Answer(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def webhook(hook: Hook) -> Any:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    return CustomWebhookNotificationBlock(
        name="x", url=hook.url, json_data={"about": "{{subject}}", "text": "{{body}}"}
    )


def test_a_webhook_is_told_what_waits_and_how_to_decide(hook: Hook) -> None:
    assert approval.ring(QUESTION, lambda: [webhook(hook)]) == []
    (heard,) = hook.heard
    assert "home-commands version 3" in heard["about"]
    assert QUESTION["text"] in heard["text"]
    assert "slmops approve 3 --model home-commands" in heard["text"]


def test_a_webhook_that_fails_is_one_line_without_its_address_and_the_next_is_told(hook: Hook) -> None:
    hook.status = 500
    said = approval.ring(QUESTION, lambda: [webhook(hook), webhook(hook)])
    assert len(said) == len(hook.heard) == 2
    assert "500" in said[0]
    assert "secret-path" not in said[0]


def test_a_block_that_cannot_be_read_is_one_line() -> None:
    def load() -> list[Any]:
        raise ValueError("unable to load")

    assert len(approval.ring(QUESTION, load)) == 1
    assert approval.ring(QUESTION, list) == []


@pytest.mark.slow
def test_the_block_of_that_name_is_found_on_the_server(hook: Hook) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_server()}):
        assert approval.bells() == []
        webhook(hook).save(approval.BELL)
        webhook(hook).save("another")
        assert approval.ring(QUESTION) == []
    assert len(hook.heard) == 1
