"""A chat template taken apart: what stands before and after each turn.

Runtimes that do not run Jinja (Ollama's Go templates, Foundry's prompt template) need the strings around a
turn. They are found by rendering conversations of marked texts and reading what lies between the marks,
then trusted only after rendering every probe conversation to the same text as the tokenizer does.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.models import dated
from tasks.models.chat import Messages

_MARKS = ("mark-one", "mark-two", "mark-three", "mark-four", "mark-five")


@dataclass(frozen=True)
class PromptFormat:
    """`opening` comes before a conversation without a system message (a default one, the bos token);
    `around` maps a role to the text before and after its content; `generation` asks for the answer."""

    opening: str
    around: Mapping[str, tuple[str, str]]
    generation: str

    def render(self, messages: Messages) -> str:
        """The prompt for the assistant's next turn."""
        parts = ["" if messages[0]["role"] == "system" else self.opening]
        for message in messages:
            before, after = self.around[message["role"]]
            parts += [before, message["content"], after]
        return "".join([*parts, self.generation])

    def go(self) -> str:
        """The same as a Go text/template over `.Messages`, in the order Ollama hands them over."""
        opening = f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{_literal(self.opening)}{{{{ end }}}}'
        roles = "".join(
            f'{{{{ {"else " * (n > 0)}if eq $m.Role "{role}" }}}}{_literal(before)}{{{{ $m.Content }}}}{_literal(after)}'
            for n, (role, (before, after)) in enumerate(self.around.items())
        )
        each = (opening if self.opening else "") + roles + "{{ end }}"
        return f"{{{{ range $i, $m := .Messages }}}}{each}{{{{ end }}}}{_literal(self.generation)}"

    def without_bos(self, bos: str) -> "PromptFormat | None":
        """For a runtime that puts the bos token in front itself; None when the template has none there."""
        before, after = self.around["system"]
        if not self.opening.startswith(bos) or not before.startswith(bos):
            return None
        around = {**self.around, "system": (before.removeprefix(bos), after)}
        return replace(self, opening=self.opening.removeprefix(bos), around=around)


def _literal(text: str) -> str:
    # Braces can begin or end an action, even with one that follows, and quotes the Modelfile's string; Go reads JSON strings.
    plain = not any(each in text for each in '{}"')
    return text if plain else f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


def probe(tokenizer: Any, conversations: Iterable[Messages]) -> PromptFormat | None:
    """The turns of a tokenizer's chat template, or None when it does more than put text around turns."""
    from jinja2 import TemplateError

    try:
        turns = _split(tokenizer)
        if turns is None:
            return None
        same = all(turns.render(messages) == render(tokenizer, messages) for messages in conversations)
    except TemplateError:  # the template refuses a system message or an order of roles
        return None
    return turns if same else None


def render(tokenizer: Any, messages: Messages, *, generation: bool = True) -> str:
    """The tokenizer's own rendering, as text; where it writes the day, a fixed one."""
    text: str = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, tokenize=False, **dated.fixed(tokenizer)
    )
    return text


def _split(tokenizer: Any) -> PromptFormat | None:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    whole = render(tokenizer, messages, generation=False)
    first = render(tokenizer, messages[:2], generation=False)
    alone = render(tokenizer, messages[1:2], generation=False)
    asked = render(tokenizer, messages[1:2])
    # Phi's template closes what asks for no answer with the eos token.
    close = "" if asked.startswith(alone) else tokenizer.eos_token or ""
    whole, first, alone = (text.removesuffix(close) for text in (whole, first, alone))
    pieces = [whole]
    for mark in _MARKS:
        if pieces[-1].count(mark) != 1:
            return None
        pieces[-1:] = pieces[-1].split(mark)
    if _MARKS[1] not in first or alone.count(_MARKS[1]) != 1 or not asked.startswith(alone):
        return None
    after_user, after_assistant = first.split(_MARKS[1])[1], pieces[5]
    # What lies between two contents belongs to the turn that ends, as far as that turn's end is known.
    if not pieces[2].startswith(after_user) or not pieces[3].startswith(after_assistant):
        return None
    before_user = pieces[3].removeprefix(after_assistant)
    if not pieces[1].endswith(before_user) or not alone.split(_MARKS[1])[0].endswith(before_user):
        return None
    around = {
        "system": (pieces[0], pieces[1].removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (pieces[2].removeprefix(after_user), after_assistant),
    }
    opening = alone.split(_MARKS[1])[0].removesuffix(before_user)
    return PromptFormat(opening, around, asked.removeprefix(alone))
