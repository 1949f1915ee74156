"""`python -m tasks STAGE [ITEM ...]`: the one command behind every way in."""

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path

from tasks.frame import utf8
from tasks.frame.allocator import keep_blocks


def main(argv: list[str] | None = None) -> int:
    """Run one stage; exit code 1 with `error: ...` for anything a person can act on."""
    began = time.monotonic()
    faulthandler.enable()  # a crash in native code tells at least where in Python it was
    from tasks.stages import STAGES

    parser = argparse.ArgumentParser(
        prog="python -m tasks", description="Run one stage of the pipeline in a workspace."
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "item",
        nargs="*",
        help="a variant, a seed or a device profile of params.yaml, for a stage that is done for each",
    )
    parser.add_argument("--params", type=Path, help="parameters to use instead of params.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="or @FILE, for all that a file like params.yaml names",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the workspace (default: here)")
    args = parser.parse_args(argv)

    from tasks import params, selftest
    from tasks.errors import PipelineError, of_disk
    from tasks.frame import bounded, environment, events, stage

    environment.of_stage()
    try:
        events.open_sink(os.environ.get("SLMOPS_EVENTS"))
        values = params.load(args.params or args.root / "params.yaml", params.expanded(args.overrides))
        if bound := STAGES[args.stage].limits:
            bounded.watch(lambda: bound(values, args.root), args.stage)
        item = STAGES[args.stage].item(values, args.item)
        selftest.ensure(selftest.used(args.stage, item.get("variant")))
        stage.run(STAGES[args.stage], STAGES, values, args.root, *item.words)
        events.finished(time.monotonic() - began)
    except PipelineError as error:
        return _failed(error)
    except OSError as error:
        of_the_disk = of_disk(error)
        if of_the_disk is None:
            raise
        return _failed(of_the_disk)
    except KeyboardInterrupt:
        print("error: stopped by hand: run the stage again, it takes up where it can", file=sys.stderr)
        return 130
    return 0


def _failed(error: Exception) -> int:
    from tasks.frame import events

    try:
        events.error(type(error).__name__, str(error))
    except OSError as full:  # the disk that the error is about
        print(f"note: no events are written any more ({full.strerror})", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    utf8.ensure()
    if sys.argv[1:2] in (["finetune"], ["teach"], ["prune"], ["distill"]):
        keep_blocks([sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
