"""`python -m tasks.selftest LIBRARY FOLDER`: the self-test itself, one line of JSON for what begins and for what it gave."""

import argparse
import faulthandler
import json
import sys
from importlib import import_module
from pathlib import Path

from tasks.variants import RUNTIMES


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 says that all was computed, not that it was right."""
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m tasks.selftest", description=__doc__)
    parser.add_argument("library", choices=[each.name for each in RUNTIMES.values() if each.native])
    parser.add_argument("folder", type=Path, help="an empty one, for the models")
    args = parser.parse_args(argv)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def say(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    module = import_module(f"tasks.selftest.{args.library}")
    say(kernels=module.kernels())
    for what, compute, limit in module.steps(args.folder):
        say(what=what)
        say(what=what, distance=compute(), limit=limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
