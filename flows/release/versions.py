"""MLflow's registry as releases use it: versions, aliases, and the bundles that versions point at.

MLflow holds no weights: a version's tags name the folder of its bundle, under `registry/` of the main checkout. It
does hold code, which it runs when the model is loaded: the digest of that is put on record, and held against it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.tracking import mlflow_store
from flows.workspace import locks, paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ArtifactError, ConfigError
from tasks.frame.manifest import sha256
from tasks.package.bundle import Bundle, bundle_digest, verify

MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CODE = Path(__file__).with_name("served_model.py")


@contextmanager
def opened(main: MainCheckout) -> Iterator[Any]:
    """The MLflow client, while no one else on this machine changes the registry: aliases know no compare-and-set.

    Raises:
        ConfigError: MLflow refuses what is asked of it.
        StageError: the MLflow server does not answer.
    """
    from mlflow.exceptions import MlflowException

    mlflow_store.check_server(mlflow_store.uri(main))
    with locks.opened(paths.registry_lock(main)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield mlflow_store.client(main)
        except MlflowException as error:
            raise ConfigError(f"MLflow refused: {str(error).splitlines()[0]}") from error


def by_digest(client: Any, name: str, digest: str) -> str | None:
    """The version that was made of a bundle."""
    model_versions = client.search_model_versions(_called(name))
    same = [version.version for version in model_versions if version.tags.get("bundle_digest") == digest]
    return str(same[0]) if same else None


def find_version(client: Any, name: str, version: str) -> Any:
    """A version, with its tags.

    Raises:
        ConfigError: there is none of that number.
    """
    known = {str(found.version): found for found in client.search_model_versions(_called(name))}
    if version in known:
        return known[version]
    if known:
        raise ConfigError(f"{name} has no version {version}: it has {', '.join(sorted(known, key=int))}")
    others = ", ".join(sorted(model.name for model in client.search_registered_models()))
    raise ConfigError(
        f"no model {name} is registered: "
        + (f"choose with --model among {others}" if others else "a run that passes its gates registers one")
    )


def aliased(client: Any, name: str, alias: str) -> str | None:
    """The version that an alias points at."""
    for model in client.search_registered_models(_called(name)):
        version = model.aliases.get(alias)
        return str(version) if version else None
    return None


def _called(name: str) -> str:
    """MLflow's filter for what has this name."""
    if not MODEL.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} is no name of a model: use letters, digits, dots, dashes and underscores")
    return f"name = '{name}'"


def tag(version: Any, key: str) -> str:
    """A tag that `slmops register` gave a version.

    Raises:
        ArtifactError: it is gone.
    """
    if key not in version.tags:
        raise ArtifactError(
            f"{version.name} version {version.version} has no tag {key} in MLflow: `slmops register` did not make it, or "
            "someone removed the tag: delete that version in MLflow and register its finished run again"
        )
    return str(version.tags[key])


def intact(version: Any) -> tuple[str, Bundle]:
    """Digest and manifest of a version's bundle, every file held against it.

    Raises:
        ArtifactError: it moved or changed since it was registered.
    """
    place, digest = Path(tag(version, "bundle")), tag(version, "bundle_digest")
    bundle = verify(place)
    if bundle_digest(place) != digest:
        raise ArtifactError(
            f"{place} is not the bundle that was registered as version {version.version}: restore it, or `slmops register` "
            "the finished run again"
        )
    return digest, bundle


def check_code(main: MainCheckout, version: Any, digest: str) -> None:
    """Hold what MLflow would run and read when it loads a version against the digest that is on record.

    Raises:
        ArtifactError: it was changed or removed.
    """
    actual = code_digest(main, str(version.source))
    if actual != digest:
        problem = "was changed" if actual else "is gone"
        raise ArtifactError(
            f"the code that MLflow keeps of {version.name} version {version.version} ({version.source}) {problem} since it "
            "was registered: do not load it; delete that version in MLflow and `slmops register` its finished run again"
        )


def code_digest(main: MainCheckout, source: str) -> str:
    """The sha256 over the files of a logged model: the code, its pointer, and what tells MLflow which of them to run. ""
    where they are not there.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = Path(
                mlflow.artifacts.download_artifacts(source, dst_path=temporary, tracking_uri=mlflow_store.uri(main))
            )
        except (MlflowException, OSError):
            return ""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "registered_model_meta"]
        listed = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest() if listed else ""


def place(source: Path, target: Path) -> Path:
    """The bundle `source` under its digest, linked where the file system can; whole or not at all. What is there and is not
    that bundle any more is replaced.

    Raises:
        ArtifactError: `source` changed while it was copied.
    """
    if _same(target, source):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    shutil.copytree(source, partial, copy_function=_link, dirs_exist_ok=True)
    partial.chmod(0o755)
    verify(partial)
    if target.exists():
        damaged = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        target.rename(damaged / target.name)
        partial.rename(target)
        shutil.rmtree(damaged)
    else:
        partial.rename(target)
    return target


def _same(place: Path, source: Path) -> bool:
    try:
        verify(place)
        return bundle_digest(place) == bundle_digest(source)
    except ArtifactError:
        return False


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def log_version(main: MainCheckout, name: str, place: Path, digest: str, tags: dict[str, str]) -> str:
    """A small pyfunc model whose one artifact points at the bundle, as a new version; the digest of its code is a tag."""
    from importlib.metadata import version as installed

    import mlflow

    runs_with = {"mlflow": installed("mlflow")} | json.loads((place / "bundle.json").read_bytes())["runtimes"]
    mlflow.set_tracking_uri(mlflow_store.uri(main))
    mlflow.set_registry_uri(mlflow_store.uri(main))
    mlflow.set_experiment(experiment_id=mlflow_store.experiment(mlflow_store.client(main), main))
    with tempfile.TemporaryDirectory() as temporary:
        pointer = Path(temporary) / "pointer.json"
        pointer.write_text(json.dumps({"folder": str(place), "digest": digest, "code": sha256(CODE)}))
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(CODE),
            artifacts={"pointer": str(pointer)},
            model_config={"unreleased": False},  # MLflow lets nobody set what is not here
            pip_requirements=[f"{name}=={version}" for name, version in runs_with.items()],
        )
    client = mlflow_store.client(main)
    if not client.search_registered_models(_called(name)):
        client.create_registered_model(name)
    source = f"models:/{logged.model_id}"
    tags = {**tags, "code_digest": code_digest(main, source)}
    made = client.create_model_version(name, source=source, model_id=logged.model_id, tags=tags)
    return str(made.version)
