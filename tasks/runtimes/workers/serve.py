"""`python -I serve.py ENGINE.py`: have an engine do what standard input asks for, line by line.

A request is a line of JSON, `{"call": NAME, "with": [...]}`: a method of the script's class `Engine` and its arguments. The answer
is a line of JSON, `{"result": ...}` or `{"error": text}`; of an array `{"shape": [...]}`, and its float32 values follow as bytes.
What libraries print goes to standard error.
"""

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
from typing import Any, BinaryIO


def main(script: str) -> None:
    """Serve until standard input ends."""
    faulthandler.enable()  # whoever started this process reads where native code crashed
    _end_with(os.getppid())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engine = runpy.run_path(script)["Engine"]()
    say(answers, {"result": "ready"})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            result = getattr(engine, request["call"])(*request["with"])
        except Exception as error:  # noqa: BLE001 (whatever a library raises is told)
            say(answers, {"error": f"{type(error).__name__}: {error}".strip()})
            continue
        if hasattr(result, "tobytes"):
            say(answers, {"shape": list(result.shape)}, result.astype("<f4", copy=False).tobytes())
        else:
            say(answers, {"result": result})


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, also in the middle of native code (Linux's prctl)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended before
        sys.exit(1)


def say(answers: BinaryIO, message: dict[str, Any], content: bytes = b"") -> None:
    answers.write(json.dumps(message).encode() + b"\n" + content)
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
