"""The environment that every process we start gets: no telemetry (tasks/frame/environment.py), no chatter, short waits."""

from collections.abc import Mapping

from tasks.frame import environment
from tasks.frame.environment import NO_TELEMETRY as NO_TELEMETRY

# A server that does not answer must fail in seconds, where MLflow's own default keeps trying for minutes; and
# the terminal is for our own bars.
MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# Read by Prefect when it is imported. Only the command line sets it: a deployed run keeps its worker's logs.
PREFECT = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # its first start migrates a database
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # to the API as always, to the terminal not
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}


def apply(*settings: Mapping[str, str]) -> None:
    """Set each variable that the person has not set; without settings, those that every command of ours needs."""
    environment.apply(*(settings or (NO_TELEMETRY, MLFLOW)))
