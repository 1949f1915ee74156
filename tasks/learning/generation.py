"""Greedy answers of a Hugging Face model, accelerated without loss by the reference as a draft.

One forward pass over prompt and reference shows, by the argmax at each position, how much of the reference
greedy decoding would have produced. A row that agrees to its stop token is done; the others are generated from
the first disagreement on. This is speculative decoding (Leviathan et al., 2023) with the reference as the
draft and argmax acceptance, so the answers are those of plain greedy decoding.
"""

from collections.abc import Sequence
from typing import Any

from tasks.frame import events
from tasks.learning.packing import pack
from tasks.learning.training import CHUNK, batches, target_states
from tasks.models.chat import Encoded
from tasks.models.logits import head_of
from tasks.models.scoring import Metric, hopeless

BATCH = 64


def answers(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], references: Sequence[str], stops: Sequence[int],
    max_new_tokens: int, metric: Metric, label: str,
) -> list[str]:  # fmt: skip
    """The model's greedy answer to the last turn of each row, as text: at most `max_new_tokens` tokens of it, as of the
    shipped file.

    An answer that can no longer match its reference (`hopeless`) is cut where that is certain.
    """
    import torch

    texts: dict[int, str] = {}
    open_rows: dict[int, list[int]] = {}
    head = head_of(model)
    with torch.no_grad(), events.progress(label, len(rows), "rows") as advance:
        for indices in batches([len(row.ids) for row in rows], 4096, 0, 1.0):
            tails = [_last_answer(rows[i]) for i in indices]
            hidden = target_states(model, pack(tails, model.device))
            guesses = [i for part in hidden.split(CHUNK) for i in head.logits(part).argmax(-1).tolist()]
            for i, tail in zip(indices, tails, strict=True):
                start, want = tail.answer_start, tail.ids[tail.answer_start :]
                got, guesses = guesses[: len(want)], guesses[len(want) :]
                same = next((n for n, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), len(want))
                said = (want[:same] + got[same : same + 1])[:max_new_tokens]
                text = tokenizer.decode(said, skip_special_tokens=True)
                done = said[-1] in stops or len(said) >= max_new_tokens
                if done or hopeless(metric, text, references[i]):
                    texts[i] = text
                    advance()
                else:
                    open_rows[i] = tail.ids[:start] + said
        prompts = {i: _last_answer(rows[i]).answer_start for i in open_rows}
        for i, ids in continued(model, open_rows, stops, prompts, max_new_tokens, advance).items():
            texts[i] = tokenizer.decode(ids[prompts[i] :], skip_special_tokens=True)
    return [texts[i] for i in range(len(rows))]


def continued(
    model: Any, starts: dict[int, list[int]], stops: Sequence[int], prompts: dict[int, int], max_new_tokens: int, advance: Any
) -> dict[int, list[int]]:  # fmt: skip
    """Greedy continuations of token ids, without their stop token; `prompts[i]` tokens of a start are its prompt."""
    import torch

    out: dict[int, list[int]] = {}
    order = sorted(starts, key=lambda i: (len(starts[i]), i))
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        longest = max(len(starts[i]) for i in part)
        ids = torch.full((len(part), longest), stops[0])
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for n, i in enumerate(part):
            ids[n, longest - len(starts[i]) :] = torch.tensor(starts[i])
            mask[n, longest - len(starts[i]) :] = 1
        room = max(max_new_tokens - (len(starts[i]) - prompts[i]) for i in part)
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=room, eos_token_id=list(stops), pad_token_id=stops[0],
        )[:, longest:].tolist()  # fmt: skip
        for i, tokens in zip(part, made, strict=True):
            end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens))
            out[i] = (starts[i] + tokens[:end])[: prompts[i] + max_new_tokens]
        advance(len(part))
    return out


def _last_answer(row: Encoded) -> Encoded:
    """The row with only its last answer as target."""
    start = row.answer_start
    return Encoded(row.ids, [False] * start + row.target[start:])
