"""The variables that libraries read: no telemetry, no chatter, threads that wait without holding a core. The only list.

The Makefile and infra/Containerfile repeat NO_TELEMETRY for what starts before Python; a test holds them equal.
"""

import os
from collections.abc import Mapping

NO_TELEMETRY: Mapping[str, str] = {
    "DO_NOT_TRACK": "true",  # MLflow accepts this word only
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
OFFLINE: Mapping[str, str] = {"HF_HUB_OFFLINE": "1"}  # for libraries that would look on the Hub by themselves
QUIET: Mapping[str, str] = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Threads that wait for each other spin for a moment and then sleep: spinning on, they take the core from the one that is
# waited for as soon as anything else runs here; sleeping at once, they make decoding on two cores four times as slow.
# OpenMP reads it when it is loaded, so before any library.
THREADS: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}


def apply(*settings: Mapping[str, str]) -> None:
    """Set each variable that the person has not set."""
    for setting in settings:
        for name, value in setting.items():
            os.environ.setdefault(name, value)


def of_stage() -> None:
    """What a stage's process needs before it loads a library."""
    threads = THREADS if "OMP_WAIT_POLICY" not in os.environ else {}
    apply(NO_TELEMETRY, QUIET, threads)
