"""The Ollama bundle: weights and a Modelfile."""

from pathlib import Path

from tasks.frame.stage import place
from tasks.models import dated
from tasks.package.prompt_format import PromptFormat
from tasks.package.release import Release, write

README = """# {name} ({variant}) for Ollama

```sh
ollama create {name} -f Modelfile
ollama run {name} {question}
```
{notes}"""

NO_TEMPLATE = (
    "The Modelfile has no TEMPLATE: this model's chat template does more than put text around turns, so no Go "
    "template renders it exactly. Ollama then takes the nearest template it knows for the one in the GGUF, or none: "
    "compare `ollama show --template {name}` with the model's chat template before use, or serve the llama-server bundle."
)
ADDS_BOS = "Ollama puts a bos token before every prompt of this GGUF, which the model's own template does not do."
NO_SYSTEM = (
    'The data\'s system prompt ends with a quote or holds """, which a Modelfile cannot carry: send it yourself.'
)
NO_STOP = "A Modelfile cannot carry the end-of-turn token {stop!r}: send it as a stop sequence with each request."
FIXED_DAY = (
    "The chat template writes the day, which the Modelfile's TEMPLATE cannot: it says {day:%d %B %Y} for good, as the model "
    "was trained. Serve the llama-server bundle where the day matters."
)


def ollama(release: Release, out: Path) -> list[str]:
    """Write the bundle into `out`; returns what a person should know about it."""
    turns, notes = _turns(release)
    lines = ["FROM ./model.gguf", f"PARAMETER num_ctx {release.context_length}"]
    # Greedy and unpenalised, as the model was validated; Ollama's defaults sample and punish repetition.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    for stop in release.stops:
        quoted = _quoted(stop)
        lines += [f"PARAMETER stop {quoted}"] if quoted else []
        notes += [] if quoted else [NO_STOP.format(stop=stop)]
    if release.system is not None:
        quoted = _quoted(release.system, always_long=True)
        lines += [f"SYSTEM {quoted}"] if quoted else []
        notes += [] if quoted else [NO_SYSTEM]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
        notes += [FIXED_DAY.format(day=dated.DAY)] if release.dated else []
    licence = release.licence.strip().replace('"""', "'''")
    lines.append(f'LICENSE """{licence}\n"""')
    place(release.weights, out / "model.gguf")
    write(out / "Modelfile", "\n".join(lines) + "\n")
    # A shell takes single-quoted text as it is.
    question = "'" + release.example[-1]["content"].replace("'", "'\\''") + "'"
    paragraphs = "".join(f"\n{note}\n" for note in notes)
    write(
        out / "README.md",
        README.format(name=release.name, variant=release.variant, question=question, notes=paragraphs),
    )
    return notes


def _quoted(text: str, always_long: bool = False) -> str | None:
    """A value of a Modelfile; None: it has no way to say this one."""
    if not always_long and not any(each in text for each in '"\n\r'):
        return f'"{text}"'
    return None if '"""' in text or text.endswith('"') else f'"""{text}"""'


def _turns(release: Release) -> tuple[PromptFormat | None, list[str]]:
    turns = release.prompt_format
    if turns is None:
        return None, [NO_TEMPLATE.format(name=release.name)]
    if not release.adds_bos:
        return turns, []
    stripped = turns.without_bos(release.bos) if release.bos else None
    return (turns, [ADDS_BOS]) if stripped is None else (stripped, [])
