"""The forms in which people bring a row, made into messages.

| form | keys |
|---|---|
| chat (OpenAI, TRL) | `messages`: `role` and `content`, as text or as parts of text; `weight` 0 or 1 |
| ShareGPT | `conversations`: `from` and `value` |
| prompt and completion (TRL) | two texts or two lists of messages |
| Alpaca | `instruction`, perhaps `input` and `history`, `output` |
| tables | a pair of columns of `PAIRS` |

A `system` beside any of them becomes the first message. Keys that are null or empty are as good as absent; those that
would change what is learned are refused by name; all others are counted, to be told once.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.acquire.containers import missing
from tasks.models.chat import Messages

DIALOGUES = ("messages", "conversations", "conversation")
# What is asked and what is answered, in the order in which they are looked for.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("query", "response"), ("input", "output"), ("text", "label"),
)  # fmt: skip
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
SYSTEM = ("system", "system_prompt")
# What a row or a message cannot be stripped of without becoming another one.
MEANING = {
    "tools", "functions", "tool_choice", "tool_calls", "tool_call_id", "function_call", "refusal",
    "reasoning", "reasoning_content", "thinking", "chosen", "rejected", "chat_template_kwargs", "documents",
    "image", "images", "audio", "audios", "video", "videos", "loss", "loss_mask", "mask", "train", "train_on_input",
}  # fmt: skip
ADVICE = 'write {"messages": [...]} or {"prompt": "...", "completion": "..."}'


def messages(row: Mapping[str, Any], labelled: bool, unused: Counter[str]) -> Messages | str:
    """The messages of a row, or what is wrong with it; `unused` counts the keys that were left out."""
    rest = {str(key): value for key, value in row.items() if not missing(value)}
    dialogue = _dialogue(rest, unused) or _pair(rest, labelled, unused)
    if dialogue is None:
        shape = "is preference data" if {"chosen", "rejected"} <= set(rest) else "has no messages"
        return f"{shape}, only {', '.join(sorted(rest)) or 'nothing'}"[:200] + f": {ADVICE}"
    if isinstance(dialogue, str):
        return dialogue
    for key in SYSTEM:
        system = rest.pop(key, "")
        if not isinstance(system, str):
            return f"{key} is not text"
        if not system.strip():
            continue
        if dialogue[:1] and dialogue[0]["role"] == "system":
            if dialogue[0]["content"] != system:
                return f"{key} is another text than the system message"
        else:
            dialogue = [{"role": "system", "content": system}, *dialogue]
    return _left(rest, "", unused) or dialogue


def _dialogue(rest: dict[str, Any], unused: Counter[str]) -> Messages | str | None:
    """Take the messages of a chat or ShareGPT row out of it."""
    key = next((key for key in DIALOGUES if key in rest), None)
    return _listed(rest.pop(key), key, unused) if key else None


def _listed(turns: Any, key: str, unused: Counter[str]) -> Messages | str:
    if isinstance(turns, str):  # a cell of a table
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return f"{key} is a text that is not JSON"
    if not isinstance(turns, list) or not turns:
        return f"{key} is not a list with entries"
    messages: Messages = []
    for i, turn in enumerate(turns, 1):
        message = _message(turn, unused)
        if isinstance(message, str):
            return f"message {i} {message}"
        messages.append(message)
    return messages


def _message(turn: Any, unused: Counter[str]) -> dict[str, Any] | str:
    if not isinstance(turn, dict):
        return "is not an object of role and content"
    rest = {str(key): value for key, value in turn.items() if not missing(value)}
    names = ("from", "value") if rest.keys() & {"from", "value"} and "role" not in rest else ("role", "content")
    given = ", ".join(sorted(rest)) or "nothing"
    role, content = rest.pop(names[0], None), rest.pop(names[1], None)
    for name, value in zip(names, (role, content), strict=True):
        if value is None:
            return f"has no {name}, only {given}"[:200]
    if not isinstance(role, str) or role not in ROLES:
        return f"has the role {str(role)[:40]!r}, not system, user or assistant"
    text = content if isinstance(content, str) else _joined(content)
    if text is None:
        return f"has content that is not text{_kinds(content)}"
    weight = rest.pop("weight", 1)
    if weight not in (0, 1):
        return f"has the weight {str(weight)[:40]!r}, not 0 or 1"
    if problem := _left(rest, "messages.", unused):
        return problem
    message = {"role": ROLES[role], "content": text}
    return message | {"weight": 0} if weight == 0 and ROLES[role] == "assistant" else message


def _joined(content: Any) -> str | None:
    """Parts of text as one, a line each; None where a part is no text."""
    if not isinstance(content, list) or not content:
        return None
    texts: list[str] = []
    for part in content:
        given = {key: value for key, value in part.items() if not missing(value)} if isinstance(part, dict) else {}
        text = given.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or set(given) - {"type", "text"}:
            return None
        texts.append(text)
    return "\n".join(texts)


def _kinds(content: Any) -> str:
    if not isinstance(content, list):
        return ""
    kinds = {str(part.get("type")) for part in content if isinstance(part, dict)} - {"text", "None"}
    return f" ({', '.join(sorted(kinds))})"[:80] if kinds else ""


def _pair(rest: dict[str, Any], labelled: bool, unused: Counter[str]) -> Messages | str | None:
    """Take what is asked and, in a labelled row, what is answered out of it."""
    names = next((pair for pair in PAIRS if pair[0] in rest and (not labelled or pair[1] in rest)), None)
    if names is None:
        return None
    asked, answered = names
    messages: Messages = []
    if asked == "instruction":
        past = rest.pop("history", [])
        if not isinstance(past, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in past):
            return "history is not a list of pairs of texts"
        messages = [{"role": role, "content": text} for turn in past for role, text in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip
        if not all(isinstance(message["content"], str) for message in messages):
            return "history is not a list of pairs of texts"
    for key, role in ((asked, "user"), (answered, "assistant"))[: 2 if labelled else 1]:
        value = rest.pop(key)
        if isinstance(value, list):
            part = _listed(value, key, unused)
            if isinstance(part, str):
                return f"{key}: {part}"
            messages += part
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # a label
        if not isinstance(value, str):
            return f"{key} is not text"
        messages.append({"role": role, "content": value})
    if asked == "instruction" and isinstance(rest.get("input"), str) and (more := rest.pop("input")).strip():
        place = messages[-2 if labelled else -1]
        place["content"] = f"{place['content']}\n\n{more}"
    return messages


def _left(rest: Mapping[str, Any], inside: str, unused: Counter[str]) -> str | None:
    """What is wrong with the keys that were not taken, if anything is."""
    for key, value in rest.items():
        if value in ("", [], {}):
            continue
        if key in MEANING:
            return f"has {key}, which nothing here can learn from: remove it, or the row"
        if (key == "weight" and str(value) not in ("1", "1.0")) or (key == "label" and value is False):
            return f"has {key} {str(value)[:40]}, so it is not to be learned as it is: remove it, or the row"
        if key != "weight":
            unused[inside + key[:40]] += 1
    return None
