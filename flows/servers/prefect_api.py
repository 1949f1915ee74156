"""Which Prefect server a run from the command line uses, seen to before any work: the one that is named, or one of its own.

One of its own serves this run alone and ends with it. It takes the run's password, which no one else has: pages in a
browser could use it else, and it knows what all runs before have told it.
"""

import os
import secrets
import socket
import tempfile
from pathlib import Path

from tasks.errors import ConfigError, StageError

ASK_S = 10.0


def ready() -> None:
    """See that a server answers; start the run's own one where none is named.

    Raises:
        ConfigError: it wants a password, or Prefect's folder cannot be written.
        StageError: it does not answer, or the own one does not start.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url:
        check(url)
    else:
        _start_own()


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


def _start_own() -> None:
    import httpx
    from prefect import context
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    check_home(get_current_settings().home)
    auth = f"slmops:{secrets.token_urlsafe(24)}"
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = os.environ["PREFECT_API_AUTH_STRING"] = auth
    context.refresh_global_settings_context()
    try:
        SubprocessASGIServer().start()  # of this process the only one; Prefect's clients use it
    except (RuntimeError, httpx.HTTPError) as error:  # httpx's where an answer takes longer than 5 s
        raise StageError(
            f"the run's own Prefect server did not start ({str(error)[:200] or type(error).__name__}): see whether the disk "
            "is full and the machine very busy, then run again; or start `slmops up`, whose log tells more"
        ) from error


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
