"""The `slmops` command. Parsing needs the standard library alone; what a command needs it imports itself."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.workspace import paths
from flows.workspace.paths import MainCheckout, Workspace
from tasks.errors import ConfigError, PipelineError, of_disk
from tasks.frame import utf8

if TYPE_CHECKING:
    from flows.run import pipeline
    from tasks import params

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 1 with `error: ...` for anything a person can act on, 130 for Ctrl-C."""
    if argv is None:
        utf8.ensure()
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 2
    args = parser.parse_args(argv)
    from flows import environment

    environment.apply()
    code = 1
    try:
        code = _carried_out(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        if argv is None and "prefect" in sys.modules:
            from flows.servers import prefect_api

            prefect_api.leave_soon(code)
    return code


def _carried_out(args: argparse.Namespace) -> int:
    command: Command = args.command
    try:
        args.overrides = _expanded(args.overrides)
        return command(args)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        of_the_disk = of_disk(error)
        if of_the_disk is None:
            raise
        print(f"error: {of_the_disk}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped by hand: run it again, it takes up where it can", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slmops",
        description="From an open small language model to a validated, packaged, registered edge release.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--params", type=Path, metavar="FILE", help="parameters to use instead of params.yaml")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="KEY=VALUE",
            help="change one parameter, or with @FILE all that a file names (recipes/ has some); repeatable, the last one counts. "
            "A run that is not in a worktree writes it into params.yaml",
        )
        return sub

    def shown(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="as JSON, for a program")

    def registered(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = add(name, command, text)
        sub.add_argument("--model", metavar="NAME", help="the registered model (default: package.name of params.yaml)")
        return sub

    sub = add("run", run, "run the whole pipeline")
    sub.add_argument("--name", help="name of the run (default: the time)")
    sub.add_argument("--worktree", action="store_true", help="in a git worktree of its own, ending as branch runs/NAME")
    sub.add_argument("--commit", default="HEAD", help="what a worktree starts from (default: HEAD)")
    sub = add("stage", stage, "run one stage alone, without DVC, Prefect and MLflow")
    sub.add_argument("stage", help="its name, as `dvc.yaml` has it")
    sub.add_argument("item", nargs="*", help="the variant or the seed, for a stage that is done for each")
    shown(add("plan", plan, "predict sizes, memory and time before any work"))
    shown(add("doctor", doctor, "check that this machine has what is needed"))
    sub = add(
        "runtimes", runtimes, "list what can run files here, or install a runtime that needs an environment of its own"
    )
    sub.add_argument("what", nargs="?", choices=["install"], help="install one instead of listing")
    sub.add_argument("name", nargs="?", help="which, by its name in the list")
    shown(sub)
    add("report", report, "write report.html from the finished stages")
    sub = registered("ask", ask, "ask the packaged model something; or a registered one")
    sub.add_argument("text", help="what a user of the model would say")
    _one_of(sub)
    sub.add_argument(
        "--system", metavar="TEXT", help="system prompt (default: the one that all rows of its data share)"
    )
    sub = registered(
        "certify", certify, "write what the packaged model, or a registered one, is good for, and check that"
    )
    sub.add_argument("what", nargs="?", choices=["verify"], help="check a certificate instead of writing one")
    sub.add_argument("file", nargs="?", type=Path, help="the certificate to check (default: certificate/)")
    _one_of(sub)
    sub.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="for this device alone; repeatable (default: all)",
    )
    sub.add_argument(
        "--key", type=Path, metavar="FILE", help="sign with this private key, or check with this public one (PEM)"
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="where to write it (default: certificate/)")
    sub.add_argument("--bundle", type=Path, metavar="DIR", help="hold this bundle against the certificate, too")
    add("register", register, "register the packaged model as `candidate`")
    sub = registered("compare", compare, "show a registered version's numbers beside the champion's")
    sub.add_argument("version", type=int, help="its number in the registry")
    shown(sub)
    sub = registered("approve", approve, "make a registered version the `champion`")
    sub.add_argument("version", type=int, help="its number in the registry")
    sub.add_argument("--bundle", metavar="DIGEST", help="only if it is this one, as `compare` shows it")
    sub.add_argument("--even-if-worse", action="store_true", help="than the champion, on the same test rows")
    sub.add_argument("--even-if-rejected", action="store_true", help="by someone before")
    _signed(sub)
    sub = registered("reject", reject, "record that a registered version is not to be released")
    sub.add_argument("version", type=int, help="its number in the registry")
    _signed(sub)
    _signed(registered("rollback", rollback, "make the previous champion champion again"))
    _signed(registered("withdraw", withdraw, "take the champion back without another one: nothing is released"))
    shown(registered("history", history, "show who released what, when and why"))
    sub = registered("audit", audit, "check that no line of that history was changed, removed or cut off")
    sub.add_argument("what", choices=["verify"], help="the check")
    shown(add("runs", runs, "list the runs in worktrees"))
    sub = add("up", up, "run the servers: Prefect, MLflow and a worker, until Ctrl-C")
    sub.add_argument("--host", default="127.0.0.1", help="address to bind to (default: this machine alone)")
    sub.add_argument(
        "--prefect-port", type=int, default=4200, metavar="PORT", help="of Prefect's server (default: 4200)"
    )
    sub.add_argument("--mlflow-port", type=int, default=5000, metavar="PORT", help="of MLflow's server (default: 5000)")
    sub.add_argument("--database", metavar="URL", help="postgresql://user@host/name instead of SQLite")
    sub.add_argument("--runs", type=int, default=(os.cpu_count() or 1) + 2, metavar="N", help="at once; others wait")
    sub = add("deploy", deploy, "apply infra/prefect.yaml and infra/automations.yaml to Prefect's server")
    sub.add_argument("--root", type=Path, metavar="DIR", help="where the workers find this checkout (default: here)")
    sub = add("prune", prune, "remove the worktrees of finished runs; their branches stay")
    sub.add_argument("name", nargs="*", help="of these runs, finished or not")
    sub = add("gc", gc, "show what of the DVC cache no run, branch or tag needs any more")
    sub.add_argument("--yes", action="store_true", help="remove it")
    sub = add("completion", completion, "write a shell's completion script: eval it, or put it where the shell looks")
    sub.add_argument("shell", choices=["bash", "zsh"])
    return parser


class _Version(argparse.Action):
    """`--version`: read from what is installed, and only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"slmops {version('slmops')}")
        parser.exit()


def _print(args: argparse.Namespace, facts: Any, show: Callable[[Any], None]) -> None:
    """What a command has to show: for a program, or by `show` for a person."""
    if not args.json:
        show(facts)
        return
    import json

    print(json.dumps(facts, indent=1, ensure_ascii=False, default=str))


def _expanded(overrides: list[str]) -> list[str]:
    if not any(text.startswith("@") for text in overrides):
        return overrides  # the parameters' checks take a while to load
    from tasks import params

    return params.expanded(overrides)


def _one_of(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, metavar="N", help="this registered version, released or not")
    which.add_argument("--champion", action="store_true", help="the version that is released")


def _signed(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--by", required=True, metavar="NAME", help="who decides")
    sub.add_argument("--reason", required=True, metavar="TEXT", help="why")


def run(args: argparse.Namespace) -> int:
    """`slmops run`."""
    started = time.monotonic()
    _listen()
    from flows import environment
    from flows.workspace import locks, worktrees

    locks.mark()
    here = worktrees.find(Path())
    main = worktrees.main_root(here)
    worktrees.check_commit(here)
    _use_servers(main)
    environment.apply(environment.PREFECT)
    name = args.name or worktrees.new_name()
    if not args.worktree:
        with worktrees.in_place(here, name, args.params, args.overrides) as checked:
            if args.params or args.overrides:
                print("note: params.yaml now holds the effective values of this run", file=sys.stderr)
            with locks.one_at_a_time(main, checked.package.name, name):
                _go(here, name, checked, started, always=False)
        return 0
    if unseen := [*worktrees.uncommitted(main), *worktrees.new_files(main)]:
        shown = ", ".join(unseen[:8]) + (f" and {len(unseen) - 8} more" if len(unseen) > 8 else "")
        print(f"note: not in this run, since not committed: {shown}", file=sys.stderr)
    planned = worktrees.planned(main, name, args.commit, args.params, args.overrides)
    print(f"run {name}: should it stop, `slmops run --worktree --name {name}` takes it up again", file=sys.stderr)
    with (
        locks.one_at_a_time(main, planned.params.package.name, name),
        worktrees.worktree(main, name, args.commit, planned) as root,
    ):
        said = _go(root, name, planned.params, started, always=True)
        commit = worktrees.finish(root, name, f"Run {name}\n\n{said}")
    worktrees.retire(main, planned.params.machine.keep_runs)
    print(f"commit {commit[:12]} on branch runs/{name}; its files are in {root} until `slmops prune`")
    return 0


def _use_servers(main: MainCheckout) -> None:
    """Work with the servers of a running `slmops up`, but for those that the person has named."""
    from flows import environment
    from flows.servers import stack

    environment.apply(stack.settings(main))


def _listen() -> None:
    """What ends a run does as Ctrl-C: stages are stopped, runs closed and Prefect's server ended, then the process."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, _terminated)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A script's background: Ctrl-C is for the script. But stages are stopped by SIGINT, and would inherit that it is
        # ignored, where they do not inherit a handler.
        signal.signal(signal.SIGINT, lambda number, frame: None)


def _terminated(number: int, frame: object) -> None:
    print(f"error: stopped by {signal.Signals(number).name}: run it again, it takes up where it can", file=sys.stderr)
    raise SystemExit(128 + number)


def _go(root: Workspace, name: str, checked: "params.Params", started: float, *, always: bool) -> str:
    """Run the flow in a workspace that is locked (`always`: though nothing is to be done), print what it came to, and say
    what was registered.
    """
    from flows.tracking import mlflow_store
    from flows.workspace import versioning, worktrees

    # What would stop the run later is asked before Prefect's server takes its seconds to start.
    mlflow_store.check_server(mlflow_store.uri(worktrees.main_root(root)))
    versioning.check_state(root)
    changed = versioning.status(root)
    if not changed and not always:
        from flows.run import nothing_to_do

        if not nothing_to_do.left_by_a_run(root):
            said = nothing_to_do.end(root, checked)
            print(f"everything is up to date: no stage ran ({time.monotonic() - started:.1f} s)")
            print(f"{said}\nreport: {paths.report(root)}")
            return said
    from flows.servers import prefect_api

    ready = prefect_api.started()

    from flows.run import pipeline

    ready()
    result = pipeline.run(root, name, checked, changed=frozenset(changed))
    print(_summary(result, time.monotonic() - started))
    return result.said


def _summary(result: "pipeline.Result", wall_s: float) -> str:
    from flows.run.terminal import HOW

    lines = []
    for (stage, item), outcome in result.outcomes.items():
        name = " ".join((stage, *item.words))
        lines.append(f"  {name:<22}{outcome.total_s:8.1f} s  {HOW[outcome.how]}")
    rest = wall_s - result.work_s
    lines.append(
        f"  {'total':<22}{wall_s:8.1f} s  of it {rest:.1f} s ({rest / wall_s:.0%}) around the stages: servers, checks, records"
    )
    shown = [f"MLflow: {result.page}"] if result.page else []
    return "\n".join([*lines, result.said, f"report: {result.report}", *shown])


def stage(args: argparse.Namespace) -> int:
    """`slmops stage NAME [ITEM ...]`."""
    from flows.workspace import worktrees
    from tasks.__main__ import main as tasks_main
    from tasks.stages import STAGES

    if args.stage not in STAGES:
        raise ConfigError(f"there is no stage {args.stage}: name one of {', '.join(STAGES)}")
    argv = [args.stage, *args.item, "--root", str(worktrees.find(Path()))]
    if args.params:
        argv += ["--params", str(args.params)]
    return tasks_main([*argv, *(word for override in args.overrides for word in ("--set", override))])


def plan(args: argparse.Namespace) -> int:
    """`slmops plan`."""
    from rich.console import Console

    from flows.preflight.plan import facts, show
    from flows.workspace import worktrees

    root = worktrees.find(Path())
    with Console(stderr=True).status("reads the data, and measures how fast this machine is"):
        facts_of_run = facts(root, args.params or paths.params_file(root), args.overrides)
    _print(args, facts_of_run, show)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """`slmops doctor`: exit code 1 if something needed is missing."""
    from flows.preflight.doctor import facts, failed, show

    checks: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for check in facts(Workspace(Path())):
            checks.append(check)
            yield check  # at once: some take a while

    _print(args, list(kept()) if args.json else kept(), show)
    return 1 if failed(checks) else 0


def runtimes(args: argparse.Namespace) -> int:
    """`slmops runtimes` and `slmops runtimes install NAME`."""
    from dataclasses import asdict

    from flows.preflight import runtimes

    if args.what == "install":
        if not args.name:
            raise ConfigError("say which runtime: `slmops runtimes` lists them")
        print(runtimes.install(args.name))
        return 0

    def show(found: list[dict[str, Any]]) -> None:
        print("\n".join(runtimes.lines([runtimes.State(**each) for each in found])))

    _print(args, [asdict(each) for each in runtimes.states()], show)
    return 0


def report(args: argparse.Namespace) -> int:
    """`slmops report`."""
    from flows.report.page import write_report
    from flows.workspace import worktrees
    from tasks import params
    from tasks.frame.stage import folder

    root = worktrees.find(Path())
    checked = params.load(args.params or paths.params_file(root), args.overrides)
    out = paths.report(root)
    write_report(folder(root, "package"), folder(root, "select"), out, params=checked)
    print(out)
    return 0


def ask(args: argparse.Namespace) -> int:
    """`slmops ask TEXT`."""
    from flows.release.ask import answer

    print(answer(_bundle(args), args.text, args.system))
    return 0


def _bundle(args: argparse.Namespace) -> Path:
    """The folder of the bundle that a command is about: the packaged one, or that of a registered version."""
    from flows.release import released
    from flows.workspace import worktrees
    from tasks.frame.stage import folder

    if args.champion:
        return released.champion(*_model(args))[1]
    if args.version is not None:
        return released.registered_bundle(*_model(args), str(args.version))
    place = folder(worktrees.find(Path()), "package")
    if not place.exists():
        raise ConfigError(
            "nothing is packaged here yet: `slmops run` does it; a registered model is named by --version N or --champion, "
            "one of another name with --model NAME"
        )
    return place


def certify(args: argparse.Namespace) -> int:
    """`slmops certify` and `slmops certify verify FILE`."""
    from flows.certificate import certificate
    from flows.release import history
    from flows.workspace import worktrees

    if args.what == "verify":
        for line in certificate.check(args.file or paths.certificate(worktrees.find(Path())), args.key, args.bundle):
            print(line)
        return 0
    place = _bundle(args)
    root = worktrees.find(Path())
    out = args.out or paths.certificate(root)
    decided = history.decided(worktrees.main_root(root), certificate.model(place))
    values = certificate.issue(place, out, decided, args.profile, args.key)
    for device in values["devices"]:
        print(f"{device['label']}: {device['verdict']}. {device['reason']}")
    signed = f"signed with {args.key}" if args.key else "not signed: --key FILE signs it"
    print(f"certificate: {out / certificate.PAGE} ({signed})")
    return 0


def register(args: argparse.Namespace) -> int:
    """`slmops register`."""
    from flows.release import registration
    from flows.workspace import worktrees

    root = worktrees.find(Path())
    main = worktrees.main_root(root)
    _use_servers(main)
    print(registration.register(root, main, separate_duties=_checked(args).release.separate_duties).text())
    return 0


def compare(args: argparse.Namespace) -> int:
    """`slmops compare VERSION`."""
    from dataclasses import asdict

    from flows.release import decisions

    main, name = _model(args)
    comparison = decisions.compare(main, name, str(args.version))
    facts = {"model": name, **asdict(comparison), "gain": comparison.gain, "worse": comparison.worse}
    _print(args, facts, lambda _: print(comparison.table(name)))
    return 0


def approve(args: argparse.Namespace) -> int:
    """`slmops approve VERSION`."""
    from flows.release import decisions, pending

    main, name = _model(args)
    for line in pending.expire(main):
        print(line)
    print(
        decisions.approve(
            main, name, str(args.version), args.by, args.reason,
            digest=args.bundle, separate_duties=_checked(args).release.separate_duties,
            even_if_worse=args.even_if_worse, even_if_rejected=args.even_if_rejected,
        )
    )  # fmt: skip
    _wake(main, name, args, "approve")
    return 0


def reject(args: argparse.Namespace) -> int:
    """`slmops reject VERSION`."""
    from flows.release import decisions

    main, name = _model(args)
    print(decisions.reject(main, name, str(args.version), args.by, args.reason))
    _wake(main, name, args, "reject")
    return 0


def _wake(main: MainCheckout, name: str, args: argparse.Namespace, decision: str) -> None:
    """Let the deployed runs that wait for this decision end."""
    from flows.release import pending

    runs = pending.decide(main, name, str(args.version), decision=decision, name=args.by, reason=args.reason)
    if runs and "PREFECT_API_URL" in os.environ:
        from flows.run import recovery

        for line in recovery.deliver(main):
            print(line)
    elif runs:
        print(f"note: {', '.join(runs)} still waits for it: `slmops up` tells it as soon as it runs")


def rollback(args: argparse.Namespace) -> int:
    """`slmops rollback`."""
    from flows.release import decisions

    print(decisions.rollback(*_model(args), args.by, args.reason))
    return 0


def withdraw(args: argparse.Namespace) -> int:
    """`slmops withdraw`."""
    from flows.release import decisions

    print(decisions.withdraw(*_model(args), args.by, args.reason))
    return 0


def history(args: argparse.Namespace) -> int:
    """`slmops history`."""
    from flows.release import history, pending

    main, name = _model(args)
    pending.expire(main)
    _print(args, history.decided(main, name), lambda decided: print(history.listed(decided, name)))
    return 0


def audit(args: argparse.Namespace) -> int:
    """`slmops audit verify`."""
    from flows.release import history

    print(history.verify_audit(*_model(args)))
    return 0


def _model(args: argparse.Namespace) -> "tuple[MainCheckout, str]":
    """The main checkout, where the registry lies, and the name of the registered model."""
    from flows.workspace import worktrees

    main = worktrees.main_root(worktrees.find(Path()))
    _use_servers(main)
    return main, args.model or _checked(args).package.name


def _checked(args: argparse.Namespace) -> "params.Params":
    from flows.workspace import worktrees
    from tasks import params

    return params.load(args.params or paths.params_file(worktrees.find(Path())), args.overrides)


def runs(args: argparse.Namespace) -> int:
    """`slmops runs`."""
    from dataclasses import asdict

    from flows.workspace import worktrees

    def show(listed: list[dict[str, Any]]) -> None:
        width = max((len(run["name"]) for run in listed), default=0)
        for run in listed:
            print(f"{run['name']:<{width}}  {run['state']:<8}  {run['commit']}  {run['folder']}")

    _print(args, list(map(asdict, worktrees.runs(worktrees.main_root(worktrees.find(Path()))))), show)
    return 0


def prune(args: argparse.Namespace) -> int:
    """`slmops prune [NAME ...]`."""
    from flows.workspace import worktrees

    for name in worktrees.prune(worktrees.main_root(worktrees.find(Path())), args.name):
        print(f"removed the worktree of {name}")
    return 0


def gc(args: argparse.Namespace) -> int:
    """`slmops gc`."""
    from flows.workspace import worktrees

    print(worktrees.collect(worktrees.main_root(worktrees.find(Path())), do=args.yes))
    if not args.yes:
        print("nothing was removed: `slmops gc --yes` removes it")
    return 0


def completion(args: argparse.Namespace) -> int:
    """`slmops completion SHELL`."""
    import shtab

    print(shtab.complete(_parser(), shell=args.shell))
    return 0


def deploy(args: argparse.Namespace) -> int:
    """`slmops deploy`."""
    from flows.servers import stack
    from flows.workspace import worktrees
    from tasks.errors import ConfigError

    main = worktrees.main_root(worktrees.find(Path()))
    _use_servers(main)
    if "PREFECT_API_URL" not in os.environ:
        raise ConfigError("there is no Prefect server to deploy to: start `slmops up`, or set PREFECT_API_URL")
    stack.apply_deployments(main, os.environ, args.root)
    return 0


def up(args: argparse.Namespace) -> int:
    """`slmops up`."""
    from flows.servers import server_env, stack
    from flows.workspace import worktrees

    database = server_env.hide_password(args.database) if args.database else None
    main = worktrees.main_root(worktrees.find(Path()))
    stack.up(main, server_env.Options(args.host, args.prefect_port, args.mlflow_port, database, args.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
