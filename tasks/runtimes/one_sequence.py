"""Greedy answers of a runtime that holds one growing sequence, which can be cut back."""

from collections.abc import Callable, Sequence

from tasks.runtimes.protocol import Hopeless

# best(tokens, position, last) -> the most likely next token after each of the last `last` tokens; positions before
# `position`, where the first of `tokens` stands, are kept
Best = Callable[[Sequence[int], int, int], list[int]]


def answers(
    best: Best,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    limit: int,
    advance: Callable[[int], None],
    hopeless: Hopeless = lambda row, answer: False,
) -> list[list[int]]:
    """What greedy decoding generates for each prompt, without its stop token, at most `limit` tokens.

    `drafts` (each ending with a stop token) only speed it up, and a `hopeless` answer is cut: see the same function for GGUF. Where
    a runtime's kernels round differently for one token than for several, and two tokens are as good as equally likely, a
    checked draft and a step-by-step generation may take different ones.
    """
    held: list[int] = []
    all_answers = []
    for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        draft = draft[:limit]
        # Prompts share their beginning (system prompt, template): keep it, it is most of a short prompt.
        kept = next((i for i, (a, b) in enumerate(zip(held, prompt[:-1], strict=False)) if a != b), None)
        kept = min(len(held), len(prompt) - 1) if kept is None else kept
        checked = best([*prompt[kept:], *draft[:-1]], kept, len(draft))
        held = list(prompt)
        answer: list[int] = []
        for token, drafted in zip(checked, draft, strict=True):
            if token in stops:
                break
            answer.append(token)
            if token != drafted:
                while len(answer) < limit and not hopeless(row, answer):
                    (token,) = best([answer[-1]], len(prompt) + len(answer) - 1, 1)
                    if token in stops:
                        break
                    answer.append(token)
                break
        all_answers.append(answer)
        advance(1)
    return all_answers
