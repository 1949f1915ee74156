"""`python -m tasks STAGE [ITEM]`: the one command behind every way in."""

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
        "item", nargs="?", help="for quantize, validate and judge a variant, for distill a seed of params.yaml"
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
    from tasks.frame import bounded, events, stage

    _quiet()
    try:
        events.open_sink(os.environ.get("SLMOPS_EVENTS"))
        values = params.load(args.params or args.root / "params.yaml", params.expanded(args.overrides))
        if bound := STAGES[args.stage].limits:
            bounded.watch(lambda: bound(values, args.root), args.stage)
        selftest.ensure(selftest.used(args.stage, args.item))
        stage.run(STAGES[args.stage], STAGES, values, args.root, args.item)
        events.finished(time.monotonic() - began)
    except PipelineError as error:
        return _failed(error)
    except OSError as error:
        told = of_disk(error)
        if told is None:
            raise
        return _failed(told)
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


def _quiet() -> None:
    """No telemetry, no network behind our back, no progress bars but ours."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for name, value in {
        "DO_NOT_TRACK": "true", "OLIVE_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        # Threads that wait for each other spin for a moment (above) and then sleep: spinning on, they take the core from
        # the one that is waited for as soon as anything else runs here; sleeping at once, they make decoding on two cores
        # four times as slow. OpenMP reads it when it is loaded, so before any library.
        "OMP_WAIT_POLICY": "passive",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    utf8.ensure()
    if sys.argv[1:2] in (["finetune"], ["distill"]):
        keep_blocks([sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
