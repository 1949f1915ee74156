"""The OpenVINO GenAI bundle: the model folder, and how its pipeline is asked."""

from pathlib import Path

from tasks.package.release import Release, place_folder, write

README = """# {name} ({variant}) for OpenVINO GenAI

```python
# pip install openvino-genai=={version}
import openvino_genai as ov
pipeline = ov.LLMPipeline("model", "CPU")
prompt = pipeline.get_tokenizer().apply_chat_template({messages}, add_generation_prompt=True)
tokens = pipeline.get_tokenizer().encode(prompt, add_special_tokens=False)
print(pipeline.get_tokenizer().decode(pipeline.generate(tokens, max_new_tokens={limit}, do_sample=False).tokens[0]))
```

Its numbers were taken with `INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE="0", KV_CACHE_PRECISION="f32"` (further
arguments of `LLMPipeline`): the same on every processor. By default a processor with bfloat16 or int8 instructions rounds more
and is faster. A conversation has at most {length} tokens.
"""


def openvino_genai(release: Release, out: Path) -> list[str]:
    """Write the bundle into `out`; returns what a person should know about it."""
    place_folder(release.weights, out / "model")
    write(out / "LICENSE", release.licence)
    text = README.format(
        name=release.name, variant=release.variant, version=release.runtime_version, messages=repr(release.example),
        limit=256, length=release.context_length,
    )  # fmt: skip
    write(out / "README.md", text)
    return []
