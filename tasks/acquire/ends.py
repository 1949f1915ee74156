"""The ids that end a turn, and whether the runtimes will stop there."""

from typing import Any

from tasks.errors import ArtifactError, brief
from tasks.frame import bounded
from tasks.models import chat, loading, sizes

# At these llama.cpp stops by their names (llama-vocab.cpp); besides them only at the one eos token of the GGUF, which its
# converter takes from the tokenizer.
NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip


TEMPLATE_S = 10.0  # of the processor, to render one short conversation


def stops(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a turn, by the generation config, the tokenizer or the chat template.

    Raises:
        ArtifactError: there is none, one is no token, or llama.cpp would run past one.
    """
    stated, known = model.generation_config.eos_token_id, model.config.vocab_size
    eos: int | None = tokenizer.eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    template = "the model's chat template"
    with (
        loading.foreign(f"{template} cannot be rendered", "choose a model with a working one"),
        bounded.seconds(TEMPLATE_S, template),
    ):
        end = chat.end_of_turn(tokenizer)
    ids = {*listed, eos, end} - {None}
    if not ids:
        raise ArtifactError("neither tokenizer nor generation config names an end-of-turn token: choose another model")
    if strange := [i for i in ids if type(i) is not int or not 0 <= i < known]:
        raise ArtifactError(
            f"eos_token_id {brief(strange[0])} is no token of the model, whose vocabulary has {known}: correct "
            "generation_config.json, or take the model from its source again"
        )
    # Of other architectures the converter may write further ends into the GGUF.
    others = sorted(ids - {eos}) if model.config.model_type in sizes.DENSE else []
    passed = [tokenizer.convert_ids_to_tokens(i) for i in others]
    if unknown := [text for text in passed if text not in NAMES]:
        turn = tokenizer.convert_ids_to_tokens(end)
        cure = (
            f"set eos_token in tokenizer_config.json, and eos_token_id in config.json and generation_config.json, to {brief(turn)!r}"
            if turn in unknown
            else "take it out of eos_token_id in generation_config.json"
        )
        raise ArtifactError(
            f"{brief(unknown[0])!r} ends a turn of this model, and llama.cpp would not stop there: its GGUF has one eos token, "
            f"now {tokenizer.eos_token!r}: {cure}"
        )
    return sorted(ids)
