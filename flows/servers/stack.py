"""`slmops up`: Prefect's server, MLflow's and a Prefect worker, without containers; and where they answer.

The servers bind to loopback, keep what they know in SQLite (Prefect in its own home, MLflow in the mlflow.db that
`slmops run` uses alone) or in two schemas of one PostgreSQL database, and want a password as soon as others can
reach them. Secrets come from the environment and go on by the environment: arguments, logs and the state file
can be read by others. One `up` a checkout: it holds a lock, and only while that is held is its state file believed.
"""

import base64
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from flows.release import pending
from flows.servers import prefect_api, server_env, supervise
from flows.servers.server_env import MLFLOW_SECRET, MLFLOW_USER, PREFECT, PREFECT_SECRET, Options
from flows.tracking import mlflow_store, spool
from flows.workspace import files, paths
from flows.workspace.paths import MainCheckout
from tasks.errors import ConfigError, PipelineError

POOL = "slmops"
MARK = "SLMOPS_UP"
EXPERIMENT_PAGE = "/#/experiments/{}"  # without an id: the list of experiments
NICE = ("nice", "-n", "10")  # the worker and its runs: the servers answer people while models train
# In processes of their own: Prefect reads its settings when it is imported, and each is 100 MB to keep.
APPLY = """
import sys
from pathlib import Path
from flows.deployed import apply
from tasks.errors import PipelineError
root, place, *runs = sys.argv[1:]
try:
    print(*apply.apply(Path(root), Path(place), *map(int, runs)), sep="\\n")
except PipelineError as error:
    sys.exit(f"error: {error}")
"""
CLOSE_S = 15.0  # from one attempt to close what killed runs left to the next


@dataclass(frozen=True)
class State:
    """What .runs/servers.json tells about a running `up`. `auth`: its servers want a password."""

    pid: int
    since: str
    prefect: str
    mlflow: str
    auth: bool
    experiment: str = ""  # MLflow's id of the one that our runs are in

    def text(self) -> str:
        """For a person: the pages that show the runs."""
        return f"Prefect  {self.prefect}/runs\nMLflow   {self.mlflow}{EXPERIMENT_PAGE.format(self.experiment)}"


def settings(main: MainCheckout) -> dict[str, str]:
    """The environment with which a command uses the servers of the `up` that runs now; empty where none does.

    Raises:
        ConfigError: they want a password that this environment lacks.
    """
    state = running(main)
    if state is None:
        return {}
    variables = {"PREFECT_API_URL": f"{state.prefect}/api", "MLFLOW_TRACKING_URI": state.mlflow, **PREFECT}
    needs = {
        "PREFECT_API_URL": ["PREFECT_API_AUTH_STRING"],
        "MLFLOW_TRACKING_URI": ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
    }
    missing = [
        name for url, names in needs.items() if url not in os.environ for name in names if name not in os.environ
    ]
    if state.auth and missing:
        raise ConfigError(
            f"the servers of `slmops up` (process {state.pid}) want a password: set {', '.join(missing)}, "
            f"to what they were started with"
        )
    return variables


def running(main: MainCheckout) -> State | None:
    """The `up` of this checkout that lives and is healthy."""
    folder = _folder(main)
    try:
        with (folder / "lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None  # no one holds it: whatever the state file says is over
    except FileNotFoundError:
        return None
    except BlockingIOError:
        path = _state(main)
        return State(**json.loads(path.read_bytes())) if path.exists() else None


def up(main: MainCheckout, options: Options) -> None:
    """Run the servers until Ctrl-C, SIGTERM or SIGHUP; tell where they are if they run already.

    Raises:
        ConfigError: a port is taken, a password is missing, the database cannot be used.
        supervise.Died: a server cannot be brought up.
        PipelineError: another `up` is just starting, or the deployments could not be applied.
    """
    began = time.monotonic()
    state = running(main)
    if state:
        _tell(f"runs already, since {state.since}, as process {state.pid}: `kill {state.pid}` stops it")
        _tell(state.text())
        return
    auth = server_env.passwords(options.host)
    folder, mark = _folder(main), f"{MARK}={main}"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_locked(folder / "lock", "another `slmops up` of this checkout starts or stops just now"))
        ended = supervise.end_marked(mark)
        if ended:
            _tell(f"ended {ended} processes that a killed `slmops up` had left")
        _state(main).unlink(missing_ok=True)
        if options.prefect_port == options.mlflow_port:
            raise ConfigError(f"--prefect-port and --mlflow-port are both {options.mlflow_port}: choose two")
        _check_port(options.host, options.prefect_port, "--prefect-port")
        _check_port(options.host, options.mlflow_port, "--mlflow-port")
        if options.database:
            server_env.make_schemas(options.database)
        else:
            home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
            prefect_api.check_home(home)
            why = f"the `slmops up` of another checkout uses Prefect's database in {home}: use it, or set PREFECT_HOME"
            stack.enter_context(_locked(home / "slmops-up.lock", why))
        supervisor = supervise.Supervisor(mark, main, _tell)
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
            signals.append(signal.SIGHUP)
        for number in signals:
            signal.signal(number, signal.default_int_handler)
        try:
            env = _bring_up(supervisor, main, options, auth, began)
            supervisor.watch(_closer(main, {**env, MARK: str(main)}))
        except KeyboardInterrupt:
            _tell("stopping")
        finally:
            for number in signals:  # a second Ctrl-C must not leave half of them
                signal.signal(number, signal.SIG_IGN)
            _state(main).unlink(missing_ok=True)
            supervisor.stop()


def _bring_up(
    supervisor: supervise.Supervisor, main: MainCheckout, options: Options, auth: dict[str, str], began: float
) -> dict[str, str]:
    """Start all; returns the environment of a client."""
    client = "127.0.0.1" if options.host == "0.0.0.0" else options.host  # 0.0.0.0 is no address to ask
    prefect, mlflow = f"http://{client}:{options.prefect_port}", f"http://{client}:{options.mlflow_port}"
    logs = paths.server_logs(main)
    worker_env = server_env.worker(prefect, mlflow, auth)
    worker = f"{socket.gethostname()}-{main.name}"

    def prefect_healthy(since: float) -> bool:
        return _ask(f"{prefect}/api/health")[0] == 200

    def mlflow_healthy(since: float) -> bool:
        if not auth:
            return _ask(f"{mlflow}/health")[0] == 200
        credentials = f"{auth[MLFLOW_USER]}:{auth[MLFLOW_SECRET]}"
        status, _ = _ask(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1", credentials)
        if status == 401:
            raise ConfigError(
                f"{MLFLOW_SECRET} is not MLflow's password: it counts at the first start alone; set the one from "
                f"then, or delete {_folder(main) / 'mlflow-auth.db'}, and its users with it"
            )
        return status == 200

    def worker_healthy(since: float) -> bool:
        status, answer = _ask(f"{prefect}/api/work_pools/{POOL}/workers/filter", auth.get(PREFECT_SECRET), b"{}")
        known = json.loads(answer) if status == 200 else []
        seen = [each["last_heartbeat_time"] for each in known if each["name"] == worker]
        return any(datetime.fromisoformat(at).timestamp() >= since for at in seen)

    # What only the command line can tell; the rest, and every secret, is in the environment.
    where = ("--host", options.host, "--port")
    basic = ("--app-name", "basic-auth") if auth else ()
    pool = ("--pool", POOL, "--type", "process", "--name", worker, "--install-policy", "never")
    python = (sys.executable, "-m")
    commands = {
        "prefect": (*python, "flows.servers.prefect_server", options.host, str(options.prefect_port)),
        "mlflow": (
            *python,
            "mlflow",
            "server",
            *where,
            str(options.mlflow_port),
            "--workers=1",
            "--no-serve-artifacts",
            *basic,
        ),
        "worker": (*NICE, *python, "prefect", "worker", "start", *pool),
    }

    def start(name: str, env: dict[str, str], healthy: Callable[[float], bool], needs: str | None = None) -> None:
        supervisor.start(supervise.Server(name, commands[name], env, logs / f"{name}.log", healthy, needs))

    start("prefect", server_env.prefect(options, prefect, auth), prefect_healthy)
    start("mlflow", server_env.mlflow(_folder(main), main, options, auth), mlflow_healthy)
    supervisor.wait("prefect")
    start("worker", worker_env, worker_healthy, needs="prefect")
    supervisor.wait("mlflow")
    supervisor.wait("worker")
    apply_deployments(main, worker_env, runs=options.runs)
    credentials = f"{auth[MLFLOW_USER]}:{auth[MLFLOW_SECRET]}" if auth else None
    experiment = _experiment(mlflow, credentials)
    state = State(os.getpid(), datetime.now().isoformat(" ", "seconds"), prefect, mlflow, bool(auth), experiment)
    files.write(_state(main), json.dumps(asdict(state), indent=1) + "\n", private=True)
    if not server_env.is_loopback(options.host):
        _tell("note: passwords go over the network in the clear: put a proxy with TLS in front, or use a tunnel")
    _tell(f"{state.text()}\nlogs     {logs}\nall healthy after {time.monotonic() - began:.1f} s; Ctrl-C stops them")
    return worker_env


def _experiment(mlflow: str, credentials: str | None) -> str:
    """Id of the experiment of our runs, made where it is missing so that its page opens."""
    api = f"{mlflow}/api/2.0/mlflow/experiments"
    status, answer = _ask(f"{api}/get-by-name?experiment_name={mlflow_store.EXPERIMENT}", credentials)
    if status == 200:
        return str(json.loads(answer)["experiment"]["experiment_id"])
    status, answer = _ask(f"{api}/create", credentials, json.dumps({"name": mlflow_store.EXPERIMENT}).encode())
    return str(json.loads(answer)["experiment_id"]) if status == 200 else ""


def _closer(main: MainCheckout, env: dict[str, str]) -> Callable[[], None]:
    """To be called again and again: has closed with the servers what killed or cut-off runs left (see recovery.py)."""
    process: subprocess.Popen[str] | None = None
    tried, last_said = 0.0, ""

    def look() -> None:
        nonlocal process, tried, last_said
        if process and process.poll() is not None:
            said, process = process.communicate()[0].strip(), None
            if said not in ("", last_said):  # the same trouble is told once
                _tell(said)
            last_said = said
        if process is None and time.monotonic() - tried > CLOSE_S and (spool.left(main) or pending.untold(main)):
            tried = time.monotonic()
            command = [sys.executable, "-m", "flows.run.recovery", str(main)]
            process = subprocess.Popen(
                command, cwd=main, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

    return look


def apply_deployments(
    main: MainCheckout, env: Mapping[str, str], place: Path | None = None, runs: int | None = None
) -> None:
    """Have `flows.deployed.apply` bring the server's deployments in step, and tell what it applied. `place`: the checkout
    as workers see it; `runs`: so many may be at work at once.

    Raises:
        PipelineError: it failed; with its last lines.
    """
    command = [sys.executable, "-c", APPLY, str(main), str(place or main), *([str(runs)] if runs else [])]
    done = subprocess.run(command, cwd=main, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        _, ours, message = done.stderr.rpartition("error: ")
        if ours and "Traceback" not in done.stderr:
            raise PipelineError(message.strip())
        last = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-supervise.TAIL :])
        raise PipelineError(
            f"the deployments were not applied:\n{last}\nmend that, then `slmops deploy` or `slmops up`"
        )
    _tell(f"deployments: {', '.join(done.stdout.split()) or 'none'}")


# --- files and sockets ----------------------------------------------------------------------------


def _folder(main: MainCheckout) -> Path:
    return paths.servers(main)


def _state(main: MainCheckout) -> Path:
    return paths.servers_state(main)


@contextmanager
def _locked(path: Path, why: str) -> Iterator[None]:
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(f"{why} ({path} is locked): try again when it has done") from None
        yield


def _check_port(host: str, port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: an old connection is no bar
        try:
            probe.bind((host, port))
        except socket.gaierror:
            raise ConfigError(f"--host {host} is neither an IPv4 address nor a name of this machine") from None
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"port {port} of {host} cannot be used ({why}): choose another with {option}, or stop "
                f"what holds it (`ss -ltnp sport = :{port}` names it)"
            ) from None


def _ask(url: str, credentials: str | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer; status 0 where there is none. Never by way of a proxy."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if credentials:
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except OSError:
        return 0, b""


def _tell(text: str) -> None:
    print(text, flush=True)
