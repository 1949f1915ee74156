"""The code behind `mlflow.pyfunc.load_model("models:/NAME@champion")`. MLflow copies this file and runs it there.

It stands alone: the standard library, MLflow and the bundle's own runtime. The registered model holds no
weights, only a pointer to the bundle and its digest; loading checks every file of the bundle against it.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel

Messages = list[dict[str, str]]
MAX_TOKENS = 256


def conversations(asked: Any) -> list[Messages]:
    """One conversation (a list of messages, or a mapping with `messages`), a list of them, or a table.

    A table (a pandas frame) holds one conversation: columns role and content; or many: a column messages.

    Raises:
        ValueError: it is none of these.
    """
    if hasattr(asked, "to_dict"):
        asked = asked.to_dict("records")
    if isinstance(asked, dict):
        asked = [asked]
    if isinstance(asked, list) and asked and all(isinstance(item, dict) and "messages" in item for item in asked):
        return [list(item["messages"]) for item in asked]
    if isinstance(asked, list) and asked and all(isinstance(item, dict) and "content" in item for item in asked):
        return [[{"role": str(item["role"]), "content": str(item["content"])} for item in asked]]
    if isinstance(asked, list) and asked and all(isinstance(item, list) for item in asked):
        return [messages for item in asked for messages in conversations(item)]
    raise ValueError('ask with [{"role": "user", "content": "..."}], {"messages": [...]} or a table of them')


def check_bundle(folder: Path, digest: str) -> dict[str, Any]:
    """The bundle's manifest, after its files were held against it.

    Raises:
        ValueError: the bundle moved or changed.
    """
    path = folder / "bundle.json"
    if not path.is_file():
        raise ValueError(
            f"the bundle {folder} is not on this machine: bring it back (or `slmops register` the finished run again)"
        )
    if _sha256(path) != digest:
        raise ValueError(f"{path} is not the one that was registered (its sha256 is not {digest})")
    bundle: dict[str, Any] = json.loads(path.read_bytes())
    changed = [
        name
        for name, file in bundle["files"].items()
        if not (folder / name).is_file() or _sha256(folder / name) != file["sha256"]
    ]
    if changed:
        raise ValueError(f"the bundle {folder} is damaged: missing or changed {', '.join(changed)}")
    return bundle


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gguf(path: Path, context: int) -> Callable[[Messages], str]:
    from llama_cpp import Llama

    # The file's own template; left alone, llama-cpp-python puts a built-in one in the place of some.
    llama = Llama(str(path), n_ctx=context, chat_format="chat_template.default", verbose=False)

    def answer(messages: Messages) -> str:
        # As the model was validated: greedy, and no penalty on repeated tokens.
        made: Any = llama.create_chat_completion(
            messages, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS  # type: ignore[arg-type]
        )  # fmt: skip
        return str(made["choices"][0]["message"]["content"])

    return answer


def _onnx(folder: Path, context: int) -> Callable[[Messages], str]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)

    def answer(messages: Messages) -> str:
        prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=min(context, len(prompt) + MAX_TOKENS), do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return str(tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))

    return answer


# MLflow asks for type hints where the class is made, past any filter. It would make a schema of them and refuse
# all but one of the forms that `conversations` takes.
with warnings.catch_warnings(record=True):

    class ChatModel(PythonModel):  # type: ignore[misc]
        """Answers conversations with the bundle's chosen variant."""

        def load_context(self, context: Any) -> None:
            """Check the bundle and load its weights."""
            pointer = json.loads(Path(context.artifacts["pointer"]).read_bytes())
            folder = Path(pointer["folder"])
            bundle = check_bundle(folder, pointer["digest"])
            target = bundle["variants"][bundle["chosen"]][0]
            length = bundle["targets"][target]["context_length"]
            weights = sorted((folder / target).glob("*.gguf"))
            self._answer = _gguf(weights[0], length) if weights else _onnx(folder / target / "model", length)

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            """One answer (text) a conversation."""
            return [self._answer(messages) for messages in conversations(model_input)]


mlflow.models.set_model(ChatModel())
