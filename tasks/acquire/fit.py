"""Whether the rows fit the model and the limits of `task`, while they can still be named by file and line."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.acquire import rows
from tasks.frame import events
from tasks.models import chat
from tasks.models.params import Task


def check(tokenizer: Any, config: Any, splits: Mapping[str, Sequence[rows.Row]], task: Task) -> None:
    """Hold every row against the vocabulary, the model's window, `task.max_length` and `task.max_new_tokens`.

    Raises:
        ConfigError: rows are longer than training or the model takes, have words that it does not know, have answers that
            no runtime may give whole, or are refused by its chat template.
    """
    from jinja2 import TemplateError

    known, window = config.vocab_size, _window(config)
    limit = min(task.max_length, window or task.max_length)
    # No token stands for more characters, so what is longer need not be cut into tokens to be refused.
    most = limit * max(map(len, tokenizer.get_vocab()))
    long, answers, others = [], [], []
    need = longest = 0
    with events.progress("check row lengths", sum(map(len, splits.values())), "rows") as advance:
        for name, members in splits.items():
            for row in members:
                advance()
                if (size := sum(len(message["content"]) for message in row.messages)) > most:
                    long.append(f"{row.where}: {size:,} characters, more than {limit} tokens hold")
                    continue
                try:
                    prompt = chat.prompt_ids(tokenizer, row.prompt)
                except TemplateError as error:
                    others.append(f"{row.where}: the model's chat template refuses it: {str(error)[:200]}")
                    continue
                answer = [] if name == rows.UNLABELLED else chat.answer_ids(tokenizer, row.messages[-1])
                ids = prompt + answer
                if len(ids) > limit:
                    longest = max(longest, len(ids))
                    long.append(f"{row.where}: {len(ids)} tokens")
                if (said := len(answer) - 1) > task.max_new_tokens:  # the end of the turn may be cut off
                    need = max(need, len(answer))
                    answers.append(f"{row.where}: an answer of {said} tokens")
                if max(ids) >= known:
                    others.append(f"{row.where}: the model has nothing for {tokenizer.decode([max(ids)])[:40]!r}")
    advice = []
    if long and window and window <= task.max_length:
        advice.append(f"the model's window is {window} tokens: shorten these rows, or choose a model with a larger one")
    elif long:
        to = f" to {longest}" if longest and longest <= (window or longest) else ""
        advice.append(f"task.max_length is {limit} tokens: raise it{to}, or shorten these rows")
    if answers:
        advice.append(f"task.max_new_tokens is {task.max_new_tokens}, so no model may say so much: set it to {need}")
    if others:
        advice.append("change these rows, or choose another model")
    rows.report([*long, *answers, *others], "the data", "; ".join(advice))


def _window(config: Any) -> int | None:
    """Tokens of a conversation for which the model was made, where its config tells."""
    # From this length on Phi's rotary embedding is another one.
    positions = getattr(config, "original_max_position_embeddings", None) or getattr(
        config, "max_position_embeddings", None
    )
    return positions if isinstance(positions, int) and positions > 0 else None
