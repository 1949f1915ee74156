"""Chat templates that write the day: Llama 3.2's, SmolLM3's and Granite's ask the clock.

Rows are trained and judged with one fixed day in its place, so that equal work gives equal results whatever the day.
A runtime that has Jinja writes the day of the question, as the template wants it.
"""

import json
import re
from datetime import datetime
from typing import Any

DAY = datetime(2024, 7, 26)
NOTE = (
    f"The model's chat template writes the day: it is trained and judged with {DAY:%d %B %Y} there, whatever the day."
)


def writes_day(template: object) -> bool:
    """Whether a chat template asks for the day."""
    return "strftime_now" in str(template)


def fixed(tokenizer: Any) -> dict[str, Any]:
    """What `apply_chat_template` is handed besides, so that the day is always the same one."""
    template = tokenizer.chat_template
    return {"chat_template": _fixed(template)} if writes_day(template) else {}


def _fixed(template: str) -> str:
    """The template with the day in the place of each call; a format that is not written out is taken for the usual one."""
    written = re.sub(
        r"""\bstrftime_now\(\s*(['"])([^'"\\]*)\1\s*\)""", lambda call: json.dumps(DAY.strftime(call[2])), template
    )
    macro = f"{{%- macro strftime_now(format) -%}}{DAY:%d %b %Y}{{%- endmacro -%}}"
    return macro + written if "strftime_now(" in written else written
