"""MLflow's registry as releases use it: versions, aliases, and the bundles that versions point at.

MLflow holds no weights: a version's tags name the folder of its bundle, under `registry/` of the main checkout.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import mlflow_store
from tasks.errors import ArtifactError, ConfigError
from tasks.package.bundle import Bundle, bundle_digest, verify


@contextmanager
def opened(main: Path) -> Iterator[Any]:
    """The MLflow client, while no one else on this machine changes the registry: aliases know no compare-and-set.

    Raises:
        ConfigError: MLflow refuses what is asked of it.
        StageError: the MLflow server does not answer.
    """
    from mlflow.exceptions import MlflowException

    mlflow_store.check_server(mlflow_store.uri(main))
    place = main / "registry"
    place.mkdir(exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield mlflow_store.client(main)
        except MlflowException as error:
            raise ConfigError(f"MLflow refused: {str(error).splitlines()[0]}") from error


def by_digest(client: Any, name: str, digest: str) -> str | None:
    """The version that was made of a bundle."""
    found = client.search_model_versions(f"name = '{name}'")
    same = [version.version for version in found if version.tags.get("bundle_digest") == digest]
    return str(same[0]) if same else None


def find_version(client: Any, name: str, version: str) -> Any:
    """A version, with its tags.

    Raises:
        ConfigError: there is none of that number.
    """
    for found in client.search_model_versions(f"name = '{name}'"):
        if str(found.version) == version:
            return found
    known = sorted(str(found.version) for found in client.search_model_versions(f"name = '{name}'"))
    raise ConfigError(
        f"{name} has no version {version}" + (f": it has {', '.join(known)}" if known else ": register one")
    )


def aliased(client: Any, name: str, alias: str) -> str | None:
    """The version that an alias points at."""
    for model in client.search_registered_models(f"name = '{name}'"):
        version = model.aliases.get(alias)
        return str(version) if version else None
    return None


def intact(version: Any) -> tuple[str, Bundle]:
    """Digest and manifest of a version's bundle, every file held against it.

    Raises:
        ArtifactError: it moved or changed since it was registered.
    """
    place, digest = Path(version.tags["bundle"]), str(version.tags["bundle_digest"])
    bundle = verify(place)
    if bundle_digest(place) != digest:
        raise ArtifactError(f"{place} is not the bundle that was registered as version {version.version}: restore it")
    return digest, bundle


def place(source: Path, target: Path) -> Path:
    """The bundle under its digest, linked where the file system can; whole or not at all."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        shutil.copytree(source, partial, copy_function=_link, dirs_exist_ok=True)
        partial.chmod(0o755)
        partial.rename(target)
    verify(target)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def log_version(main: Path, name: str, place: Path, digest: str, tags: dict[str, str]) -> str:
    """A small pyfunc model whose one artifact points at the bundle, as a new version."""
    from importlib.metadata import version as installed

    import mlflow

    mlflow.set_tracking_uri(mlflow_store.uri(main))
    mlflow.set_registry_uri(mlflow_store.uri(main))
    mlflow.set_experiment(experiment_id=mlflow_store.experiment(mlflow_store.client(main), main))
    with tempfile.TemporaryDirectory() as temporary:
        pointer = Path(temporary) / "pointer.json"
        pointer.write_text(json.dumps({"folder": str(place), "digest": digest}))
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"pointer": str(pointer)},
            pip_requirements=[f"{part}=={installed(part)}" for part in ("mlflow", "llama-cpp-python")],
        )
    client = mlflow_store.client(main)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(name, source=f"models:/{logged.model_id}", model_id=logged.model_id, tags=tags)
    return str(made.version)
