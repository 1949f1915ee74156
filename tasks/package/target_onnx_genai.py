"""The ONNX Runtime GenAI bundle: the model folder, and what a catalogue needs to register it."""

import json
from pathlib import Path

from tasks.package.prompt_format import PromptFormat
from tasks.package.release import Release, place_folder, write

README = """# {name} ({variant}) for ONNX Runtime GenAI

```python
# pip install onnxruntime-genai=={version}
import json, onnxruntime_genai as og
model = og.Model("model"); tokenizer = og.Tokenizer(model); params = og.GeneratorParams(model)
params.set_search_options(max_length={length}, do_sample=False); generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(tokenizer.apply_chat_template(json.dumps({messages}), add_generation_prompt=True)))
while not generator.is_done(): generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

`register.json` holds what a local catalogue (Foundry Local) is told about the model. Its prompt template must be
handed over as it stands: under another model's template the answers are gibberish.
"""
NO_TEMPLATE = "register.json has no prompt_template: only Jinja renders this model's chat template."


def onnx_genai(release: Release, out: Path) -> list[str]:
    """Write the bundle into `out`; returns what a person should know about it."""
    place_folder(release.weights, out / "model")
    entry = {
        "id": f"{release.name}:1",
        "task": "chat-completion",
        "path": "model",
        "runtime": f"onnxruntime-genai=={release.runtime_version}",
        "context_length": release.context_length,
        "stop": list(release.stops),
        "prompt_template": _template(release.prompt_format) if release.prompt_format else None,
    }
    write(out / "register.json", json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
    write(out / "LICENSE", release.licence)
    text = README.format(
        name=release.name, variant=release.variant, version=release.runtime_version,
        length=release.context_length, messages=repr(release.example),
    )  # fmt: skip
    write(out / "README.md", text)
    return [] if release.prompt_format else [NO_TEMPLATE]


def _template(prompt_format: PromptFormat) -> dict[str, str]:
    """Foundry Local's form: the text of a turn with {Content} in its place, and the prompt for an answer."""
    around = {role: f"{before}{{Content}}{after}" for role, (before, after) in prompt_format.around.items()}
    return around | {"prompt": around["user"] + prompt_format.generation}
