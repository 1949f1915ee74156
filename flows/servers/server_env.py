"""What each process of `slmops up` finds in its environment: addresses, its database, and its secrets alone.

Arguments can be read by every user of a machine and logs by many, so passwords go from environment to environment.
"""

import ipaddress
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from flows import environment
from flows.servers import prefect_server
from flows.workspace import files, paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ConfigError

SCHEMAS = ("prefect", "mlflow")
LATE = "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS"
PREFECT_SECRET = "PREFECT_SERVER_API_AUTH_STRING"  # user:password
MLFLOW_SECRET, MLFLOW_USER = "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_ADMIN_USERNAME"
# Each process gets what it needs of these, and a flow that runs under the worker none of the servers' own. With
# PREFECT_API_KEY, which is for Prefect's cloud, the worker would not send its password.
WITHHELD = (
    PREFECT_SECRET, MLFLOW_SECRET, "MLFLOW_FLASK_SERVER_SECRET_KEY", "PGPASSWORD", "PREFECT_API_KEY",
    "PREFECT_API_URL", "MLFLOW_TRACKING_URI",
)  # fmt: skip
PREFECT = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    # By default leases are kept in memory, and a restart would forget who holds a concurrency limit.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # infra/automations.yaml marks runs as crashed whose heart stopped, also those that died with the server.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
}
WORKER = {"PREFECT_WORKER_QUERY_SECONDS": "3"}  # how often it looks for queued runs: by Prefect's default every 10 s
MLFLOW = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges and scorers: processes that we have no use for
    "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
}
# By which addresses a machine that listens on all of them may be asked, as MLflow's patterns, whose * stands for anything:
# hence the digits at the end, in which no name of a page elsewhere can end.
NETWORKS = ("10.*", "192.168.*", *(f"172.{second}.*" for second in range(16, 32)))
PRIVATE = {f"{network}.{'[0-9]' * digits}" for network in NETWORKS for digits in (1, 2, 3)}
AUTH_CONFIG = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/mlflow-auth.db
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Options:
    """What a person chooses. `database`: a PostgreSQL URL without a password. `runs`: so many at once, each a process."""

    host: str = "127.0.0.1"
    prefect_port: int = 4200
    mlflow_port: int = 5000
    database: str | None = None
    runs: int = os.cpu_count() or 1


def base() -> dict[str, str]:
    """What all of them get."""
    kept = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    return {**environment.NO_TELEMETRY, **kept, **PREFECT}


def worker(prefect: str, mlflow: str, auth: dict[str, str]) -> dict[str, str]:
    """For the worker, and so for every flow that runs under it: the clients' side."""
    env = {**WORKER, **environment.MLFLOW, **base(), "PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow}
    if auth:
        env["PREFECT_API_AUTH_STRING"] = auth[PREFECT_SECRET]
        env["MLFLOW_TRACKING_USERNAME"] = auth[MLFLOW_USER]
        env["MLFLOW_TRACKING_PASSWORD"] = auth[MLFLOW_SECRET]
    return env


def prefect(options: Options, url: str, auth: dict[str, str]) -> dict[str, str]:
    """For Prefect's server at `url`."""
    extra_names = os.environ.get(prefect_server.NAMES, "")
    env = {
        **base(),
        # Any page in a browser on this machine could start flows else: what pages may ask, and (see prefect_server.py) whose.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{options.prefect_port}",
        prefect_server.NAMES: ",".join(
            sorted(_names(options) | {name.strip() for name in extra_names.split(",") if name})
        ),
        "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL", "/api"),  # the host that the browser asked
        # Runs wait for their turn here, so none is late after 15 s; and to mark hundreds as late blocks SQLite for minutes.
        LATE: os.environ.get(LATE, "3600"),
    }
    if auth:
        env[PREFECT_SECRET] = auth[PREFECT_SECRET]
    if options.database:
        env |= {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": _with_driver(options.database, "asyncpg"),
            # public: an extension that Prefect uses may be there already
            "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH": "prefect,public",
            **_database_password(),
        }
    return env


def mlflow(folder: Path, main: MainCheckout, options: Options, auth: dict[str, str]) -> dict[str, str]:
    """For MLflow's server, whose users are kept in `folder`."""
    names = _names(options)
    if options.host == "0.0.0.0":
        names |= PRIVATE
    hosts = ",".join(f"{name},{name}:{options.mlflow_port}" for name in sorted(names))
    origins = ",".join(f"http://{name}:{options.mlflow_port}" for name in sorted(names))
    env = {
        **base(),
        **MLFLOW,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{paths.mlflow_database(main)}",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": paths.mlflow_artifacts(main).as_uri(),
        # Behind a name of its own, the person tells it by the same two variables.
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", hosts),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": os.environ.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", origins),
    }
    if auth:
        config = folder / "mlflow-auth.ini"
        files.write(config, AUTH_CONFIG.format(folder=folder), private=True)
        key = os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32)
        env |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": key}
        env |= {name: auth[name] for name in (MLFLOW_SECRET, MLFLOW_USER)}
    if options.database:
        env |= {
            "MLFLOW_BACKEND_STORE_URI": _with_driver(options.database, "psycopg2"),
            "PGOPTIONS": "-c search_path=mlflow",
            **_database_password(),
        }
    return env


def _names(options: Options) -> set[str]:
    """By which the servers may be asked."""
    return {"localhost", "127.0.0.1", options.host, socket.gethostname(), socket.getfqdn()}


# --- passwords ------------------------------------------------------------------------------------


def passwords(host: str) -> dict[str, str]:
    """The passwords of the servers; none where they are on loopback and no one asks for one.

    Raises:
        ConfigError: one is missing that has to be there.
    """
    given = {name: os.environ[name] for name in (PREFECT_SECRET, MLFLOW_SECRET) if os.environ.get(name)}
    if not given and is_loopback(host):
        return {}
    missing = [name for name in (PREFECT_SECRET, MLFLOW_SECRET) if name not in given]
    if missing:
        why = "one password was set and the other not" if given else f"with --host {host} others reach the servers"
        raise ConfigError(
            f"{why}: set {' and '.join(missing)} ({PREFECT_SECRET} is `user:password`, {MLFLOW_SECRET} the password "
            "of MLflow's first user, `admin`), or leave out --host and both"
        )
    if ":" not in given[PREFECT_SECRET]:
        raise ConfigError(f"{PREFECT_SECRET} is not of the form `user:password`: set it anew")
    return {**given, MLFLOW_USER: os.environ.get(MLFLOW_USER) or "admin"}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- PostgreSQL -----------------------------------------------------------------------------------


def hide_password(database: str) -> str:
    """Check a PostgreSQL URL; with a password in it, start this process anew without, the password in PGPASSWORD.

    Every user of the machine can read a process's arguments. Both servers' drivers read PGPASSWORD.

    Raises:
        ConfigError: it is no such URL.
    """
    try:
        parts = urlsplit(database)
        right = (
            parts.scheme in ("postgresql", "postgres") and parts.hostname and len(parts.path) > 1 and not parts.query
        )
        right = right and parts.port != 0 and not parts.fragment
    except ValueError:  # its port is no number
        right = False
    if not right:  # the URL is not repeated: where in it a password lies is not known
        raise ConfigError(
            "--database is not of the form postgresql://user@host/name: write it so, the password in PGPASSWORD (or, "
            "with %XX for special characters, as user:password) and other settings in PGSSLMODE and the like"
        )
    if parts.password is not None:
        os.environ["PGPASSWORD"] = unquote(parts.password)
        plain = database.replace(f":{parts.password}@", "@", 1)
        os.execv(sys.executable, [argument.replace(database, plain) for argument in sys.orig_argv])
    return database


def make_schemas(database: str) -> None:
    """Make a schema for each server: both call a table `alembic_version`. One database is one backup, one grant.

    Raises:
        ConfigError: the driver is missing, or the database refuses.
    """
    try:
        import psycopg2  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("PostgreSQL's driver is not installed: pip install 'slmops[postgres]'") from None
    try:
        connection = psycopg2.connect(database, connect_timeout=10)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT nspname FROM pg_namespace")
            known = {row[0] for row in cursor.fetchall()}
            for schema in (name for name in SCHEMAS if name not in known):
                cursor.execute(f"CREATE SCHEMA {schema}")
        connection.close()
    except psycopg2.Error as error:
        raise ConfigError(
            f"{database} cannot be used ({str(error).strip().splitlines()[0]}): make the database, and a user who "
            "may create schemas in it; its password goes into PGPASSWORD"
        ) from None


def _with_driver(database: str, driver: str) -> str:
    parts = urlsplit(database)
    user = f"{quote(unquote(parts.username))}@" if parts.username else ""
    return f"postgresql+{driver}://{user}{parts.hostname}:{parts.port or 5432}{parts.path}"


def _database_password() -> dict[str, str]:
    password = os.environ.get("PGPASSWORD")
    return {"PGPASSWORD": password} if password else {}
