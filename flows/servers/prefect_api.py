"""Which Prefect server a run from the command line uses, seen to before any work: the one that is named, or one of its own.

One of its own serves this run alone and ends with it. It takes the run's password, which no one else has: pages in a
browser could use it else, and it knows what all runs before have told it.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flows.workspace import processes
from tasks.errors import ConfigError, StageError

ASK_S = 10.0
GRACE_S = 5  # of the own server, from SIGINT to SIGKILL
LEAVE_S = 30.0


def started() -> Callable[[], None]:
    """See that a server answers; where none is named, let one of the run's own begin to start. Returns what waits until it
    can be used: its start takes seconds, in which this process can load what it needs.

    Raises:
        ConfigError: it wants a password, or Prefect's folder cannot be written.
        StageError: it does not answer; the function that is returned, too.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url:
        check(url)
        return lambda: None
    return _start_own()


def check(url: str) -> None:
    """Ask the server at `url` for its health, and for something that only those with its password get.

    Raises:
        ConfigError: it wants a password.
        StageError: it does not answer.
    """
    import httpx
    from prefect import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings

    trusted = not get_current_settings().api.tls_insecure_skip_verify
    try:
        httpx.get(f"{url}/health", timeout=ASK_S, verify=trusted).raise_for_status()
        with get_client(sync_client=True) as client:
            client.read_flows(limit=1)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise down(url, error.response.status_code) from None
        raise ConfigError(
            f"Prefect's server at {url} ({_named()}) wants a password: set PREFECT_API_AUTH_STRING to user:password, or "
            "PREFECT_API_KEY to a key"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise down(url, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def down(url: str, why: object) -> StageError:
    """The error for a server that does not answer."""
    return StageError(
        f"Prefect's server at {url} ({_named()}) does not answer ({str(why)[:200]}): start it, or take its address out "
        "there (`prefect config unset PREFECT_API_URL` for a profile) to use one of the run's own"
    )


def _named() -> str:
    """Who names the server."""
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_URL

    if "PREFECT_API_URL" in os.environ:
        return "by the variable PREFECT_API_URL"
    used = get_settings_context()
    if PREFECT_API_URL in used.profile.settings:
        return f"by the profile {used.profile.name} in {used.settings.profiles_path}"
    return "by prefect.toml, pyproject.toml or .env"


def _start_own() -> Callable[[], None]:
    from prefect import context
    from prefect.settings import get_current_settings

    check_home(get_current_settings().home)
    auth = f"slmops:{secrets.token_urlsafe(24)}"
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = os.environ["PREFECT_API_AUTH_STRING"] = auth
    context.refresh_global_settings_context()
    port = free_port()
    process = _serve(port)

    def wait() -> None:
        import httpx
        from prefect.server.api.server import SubprocessASGIServer

        class OwnServer(SubprocessASGIServer):
            """Prefect's temporary server, which its clients use where no address is set, with the process that we began."""

            first: subprocess.Popen[bytes] | None = process

            def _run_uvicorn_command(self) -> subprocess.Popen[bytes]:
                begun, self.first = self.first, None
                return begun or _serve(self.port or 0)  # again where another program took the port meanwhile

            def stop(self) -> None:
                ended = self.server_process
                super().stop()
                if ended and ended.stdin:
                    ended.communicate(b"done\n")

        OwnServer._instances[None] = server = OwnServer(port)
        try:
            server.start()
        except (RuntimeError, httpx.HTTPError) as error:  # httpx's where an answer takes longer than 5 s
            raise StageError(
                f"the run's own Prefect server did not start ({str(error)[:200] or type(error).__name__}): see whether the "
                "disk is full and the machine very busy, then run again; or start `slmops up`, whose log tells more"
            ) from error

    return wait


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _serve(port: int) -> "subprocess.Popen[bytes]":
    """Prefect's server, without its pages, in a session of its own: Ctrl-C is for the run, which tells the server how it
    ended and stops it then. It ends with this process, however that ends.
    """
    import prefect
    from prefect.settings import get_current_settings

    command = [
        sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on",
    ]  # fmt: skip
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    temporary = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return subprocess.Popen(
        processes.watched(command, GRACE_S),
        env={**os.environ, **temporary, **settings},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def leave_soon(code: int) -> None:
    """See that this process ends, with that exit code, though Prefect's clients wait for a server that is gone: as they end
    they wait without limit for it to take their last records.
    """

    def leave() -> None:
        time.sleep(LEAVE_S)
        print(f"note: Prefect's server took no records for {LEAVE_S:.0f} s: they are lost", file=sys.stderr, flush=True)
        os._exit(code)

    threading.Thread(target=leave, name="leave", daemon=True).start()


def check_home(home: Path) -> None:
    """See that Prefect's folder can be made and written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"{home}, where Prefect keeps its database, cannot be written ({error.strerror}): set PREFECT_HOME to a folder "
            f"that can, on a disk of {socket.gethostname()} with room"
        ) from None
