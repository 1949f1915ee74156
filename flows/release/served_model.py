"""The code behind `mlflow.pyfunc.load_model("models:/NAME@champion")`. MLflow copies this file and runs it there.

It stands alone: the standard library, MLflow and the bundle's own runtime. The registered model holds no
weights, only a pointer to the bundle and its digest; loading checks every file of the bundle against it, and opens none
that it does not list. Where the record of decisions lies beside the bundle, it also asks that: what nobody approved, or
somebody rejected, is loaded only with `model_config={"unreleased": True}`.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel

Messages = list[dict[str, str]]
MAX_TOKENS = 256
UNLISTED = {"bundle.json", "report.json", "manifest.json"}  # of a bundle's folder


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
        ValueError: the bundle moved or changed, or a file is there that it does not list.
    """
    path = folder / "bundle.json"
    if not path.is_file():
        raise ValueError(
            f"the bundle {folder} is not on this machine: bring it back (or `slmops register` the finished run again)"
        )
    if _sha256(path) != digest:
        raise ValueError(f"{path} is not the one that was registered (its sha256 is not {digest})")
    bundle: dict[str, Any] = json.loads(path.read_bytes())
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()} - UNLISTED
    wrong = [f"unexpected {name}" for name in sorted(present - bundle["files"].keys())]
    wrong += [
        f"missing or changed {name}"
        for name, file in bundle["files"].items()
        if not (folder / name).is_file() or _sha256(folder / name) != file["sha256"]
    ]
    if wrong:
        raise ValueError(
            f"the bundle {folder} is damaged ({'; '.join(wrong)[:500]}): `slmops register` the finished run again mends it"
        )
    return bundle


def weights(bundle: Mapping[str, Any]) -> str:
    """What to load of a checked bundle, relative to its folder: the one GGUF file that the chosen variant's first target
    lists, or else that target's folder `model`.

    Raises:
        ValueError: it lists several.
    """
    target = bundle["variants"][bundle["chosen"]][0]
    listed = [name for name in bundle["files"] if name.startswith(f"{target}/") and name.endswith(".gguf")]
    if len(listed) > 1:
        raise ValueError(f"the bundle lists several GGUF files for {target}: {', '.join(listed)[:200]}")
    return listed[0] if listed else f"{target}/model"


def check_released(folder: Path, digest: str) -> None:
    """Hold the bundle `folder` against the record of decisions beside it, where there is one.

    Raises:
        ValueError: nobody approved it, or somebody rejected it.
    """
    path = folder.parent.parent / "history.jsonl"
    if not path.is_file():
        return
    lines = _record(path)
    gone = {line.get("voids") for line in lines if line.get("action") == "void"}
    lines = [line for line in lines if line.get("action") != "void" and ("seq" not in line or line["seq"] not in gone)]
    ours = [line for line in lines if line.get("bundle_digest") == digest]
    if not ours or ours[-1].get("action") not in ("approve", "rollback"):
        last = ours[-1].get("action") if ours else "missing"
        raise ValueError(
            f"{folder} is not released: the last line about it in {path} is {last}. Where an alias points at it, "
            '`slmops audit verify` tells why; model_config={"unreleased": True} loads it all the same'
        )
    model = ours[-1].get("model")
    *_, now = [line for line in lines if line.get("model") == model and line.get("action") in ("approve", "rollback")]
    if now.get("bundle_digest") != digest:
        warning = f"{folder} is not the champion: that is version {now.get('version')} of {model}, as {path} has it"
        warnings.warn(warning, stacklevel=2)


def _record(path: Path) -> list[dict[str, Any]]:
    """The lines that can be read: a torn or edited one is for `slmops audit verify` to tell."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def answerer(folder: Path, bundle: Mapping[str, Any]) -> Callable[[Messages], str]:
    """What answers a conversation with the weights of a checked bundle, greedily, by its own template.

    Raises:
        ValueError: they are for a runtime that this code does not know.
    """
    name = bundle["variants"][bundle["chosen"]][0]
    target, file = bundle["targets"][name], weights(bundle)
    if file.endswith(".gguf"):
        return _gguf(folder / file, target["context_length"])
    if target["runtime"] == "onnxruntime-genai":
        return _onnx(folder / file, target["context_length"])
    if target["runtime"] == "openvino-genai":
        return _openvino(folder / file)
    raise ValueError(f"nothing here runs {target['runtime']}: run the bundle as {folder / name} tells")


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


def _openvino(folder: Path) -> Callable[[Messages], str]:
    import openvino_genai

    # As it was validated: computed alike on every processor.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **exact)
    tokenizer = pipeline.get_tokenizer()

    def answer(messages: Messages) -> str:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        made = pipeline.generate(tokens, max_new_tokens=MAX_TOKENS, do_sample=False)
        return str(tokenizer.decode(made.tokens[0]))

    return answer


# MLflow asks for type hints where the class is made, past any filter. It would make a schema of them and refuse
# all but one of the forms that `conversations` takes.
with warnings.catch_warnings(record=True):

    class ChatModel(PythonModel):  # type: ignore[misc]
        """Answers conversations with the bundle's chosen variant."""

        def load_context(self, context: Any) -> None:
            """Check the bundle and load its weights."""
            path = Path(context.artifacts["pointer"])
            pointer = json.loads(path.read_bytes())
            code = path.parent.parent / "served_model.py"
            if "code" in pointer and _sha256(code) != pointer["code"]:
                raise ValueError(f"{code} was changed since it was registered: `slmops audit verify` tells what to do")
            folder = Path(pointer["folder"])
            bundle = check_bundle(folder, pointer["digest"])
            if not (context.model_config or {}).get("unreleased"):
                check_released(folder, pointer["digest"])
            self._answer = answerer(folder, bundle)

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            """One answer (text) a conversation."""
            return [self._answer(messages) for messages in conversations(model_input)]


mlflow.models.set_model(ChatModel())
