"""The engine of OpenVINO: a folder of `optimum-cli export openvino`, its key-value cache cut back where a sequence parts.

Products are computed in float32, and activations are not rounded to 8 bits: by default a processor with bfloat16 or int8
instructions computes otherwise than one without, and a result that depends on the machine is none.
"""

from pathlib import Path
from typing import Any

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


class Engine:
    """One model with one sequence."""

    def __init__(self) -> None:
        import openvino

        self._api = openvino
        self._request: Any = None
        self._tokenizer: Any = None
        self._held = 0

    def version(self) -> str:
        """That of the library."""
        return str(self._api.__version__).split("-")[0]

    def load(self, folder: str, threads: int) -> None:
        """Load the weights."""
        core = self._api.Core()
        settings = {**EXACT, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        model = core.read_model(Path(folder) / "openvino_model.xml")
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._names = {name for port in self._request.model_inputs for name in port.names}
        self._held = 0

    def best(self, tokens: list[int], position: int, last: int) -> list[int]:
        """The most likely next token after each of the last `last` tokens, the first of `tokens` standing at `position`."""
        return [int(each) for each in self._computed(tokens, position)[-last:].argmax(axis=1)]

    def logits(self, tokens: list[int], first: int) -> Any:
        """Of a window: of every position from `first` on but the last, (n, vocabulary)."""
        return self._computed(tokens, 0)[first:-1]

    def _computed(self, tokens: list[int], position: int) -> Any:
        import numpy as np

        if position == 0:
            self._request.reset_state()
        elif position < self._held:
            for state in self._request.query_state():
                kept = np.ascontiguousarray(state.state.data[:, :, :position])
                state.state = self._api.Tensor(kept)
        length = position + len(tokens)
        given = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(position, length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: value for name, value in given.items() if name in self._names})
        self._held = length
        return self._request.get_tensor("logits").data[0]

    def load_tokenizer(self, folder: str) -> None:
        """Load the folder's own tokenizer and template."""
        import openvino_genai

        self._tokenizer = openvino_genai.Tokenizer(folder)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation by the folder's template, with the beginning of an answer."""
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return [int(each) for each in self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]]

    def stop_ids(self, folder: str) -> list[int]:
        """Where its pipeline ends an answer."""
        import openvino_genai

        settings = openvino_genai.GenerationConfig(str(Path(folder) / "generation_config.json"))
        return sorted(({int(each) for each in settings.stop_token_ids} | {int(settings.eos_token_id)}) - {-1})

    def answer(self, folder: str, messages: list[dict[str, str]], limit: int) -> str:
        """What a person gets of the library's own pipeline."""
        import openvino_genai

        pipeline = openvino_genai.LLMPipeline(folder, "CPU", **EXACT)
        text = pipeline.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
        tokens = pipeline.get_tokenizer().encode(text, add_special_tokens=False)
        found = pipeline.generate(tokens, max_new_tokens=limit, do_sample=False)
        return str(pipeline.get_tokenizer().decode(found.tokens[0]))
