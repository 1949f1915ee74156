"""One question to a bundle on this machine, answered as whoever loads the registered model gets it: see served_model.py."""

from pathlib import Path

from tasks.errors import ArtifactError, ConfigError, StageError
from tasks.package import bundle
from tasks.runtimes.worker import Worker
from tasks.variants import RUNTIMES

MOST = 256  # tokens of an answer, as in served_model.py


def answer(folder: Path, text: str, system: str | None = None) -> str:
    """The greedy answer of the bundle in `folder`, all of which is verified before anything of it is opened. `system`: by
    default the system prompt that all rows of the model's data share, if there is one.

    Raises:
        ArtifactError: there is no bundle, it does not match its manifest, or its runtime cannot load or run it.
        ConfigError: no variant passed its gates, the question is empty, or the runtime is not installed.
    """
    if not text.strip():
        raise ConfigError("the question is empty: slmops ask TEXT")
    made = bundle.verify(folder)
    if made.chosen is None:
        raise ConfigError(f"{folder} holds no model: {made.reason[:200]}")
    system = made.system if system is None else system
    asked = [{"role": "system", "content": system}] if system else []
    messages = [*asked, {"role": "user", "content": text}]
    target = made.variants[made.chosen][0]
    own = next((each for each in RUNTIMES.values() if each.distribution == made.targets[target].runtime), None)
    if own and own.isolated:
        weights = (folder / target / own.weights).resolve()
        try:
            with Worker(own) as worker:
                return str(worker.call("answer", str(weights), messages, MOST))
        except StageError as error:
            raise ArtifactError(f"{folder} does not answer ({error}): ask in fewer words") from error
    from flows.release import served_model

    try:
        return served_model.answerer(folder, made.model_dump())(messages)
    except ImportError as error:
        raise ConfigError(
            f"the runtime of this bundle is not installed ({error}): `slmops doctor` says what is"
        ) from None
    except (RuntimeError, ValueError) as error:  # what llama-cpp-python and ONNX Runtime GenAI raise
        said = (str(error).splitlines() or [""])[0][:200]
        raise ArtifactError(
            f"{folder} does not answer ({said}): ask in fewer words, or get the bundle again (`dvc checkout package`)"
        ) from error
