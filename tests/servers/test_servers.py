"""`slmops up` with real servers: they start, are found and used, and nothing of them is left, whatever ends them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from checkout import free_ports, git, holding, make_toy, slmops, wait_for
from running import DEADLINE_S, Up, code_of, left, options, own, start, stop

from flows.servers import server_env, stack, supervise
from tasks.errors import ConfigError, PipelineError

AUTH = {"PREFECT_SERVER_API_AUTH_STRING": "slmops:planted-prefect", "MLFLOW_AUTH_ADMIN_PASSWORD": "planted-mlflow-pw"}


SLEEPER = """
import os, time
from pathlib import Path
from prefect import flow
from prefect.deployments import run_deployment

@flow
def sleeper(seconds: float):
    Path("asleep.part").write_text(str(os.getpid()))
    Path("asleep.part").rename(f"asleep-{seconds:.0f}")
    time.sleep(seconds)
    Path("awake").touch()

if __name__ == "__main__":
    here = str(Path(__file__).parent)
    flow.from_source(here, "sleeper.py:sleeper").deploy("test", work_pool_name="slmops", job_variables={"working_dir": here})
    for seconds in (20, 600):  # 20: in which the worker looks for work again
        run_deployment("sleeper/test", parameters={"seconds": seconds}, timeout=0)
"""


def refused(root: Path, *more: str, **extra: str) -> str:
    done = subprocess.run(
        options(*more), cwd=root, env=own(root, **extra), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def answered(url: str, body: dict) -> int:
    """Of an answer other than 503: that says SQLite is busy, and Prefect's own client asks again too."""
    return wait_for(lambda: code if (code := code_of(url, body=body)) != 503 else None)


def status(url: str, method: str, /, **headers: str) -> int:
    """Of the answer to a request without a body."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


def asked(up: Up) -> dict[str, str]:
    state = stack.running(up.root)
    assert state
    return {
        "prefect": f"{state.prefect}/api/flows/filter",
        "mlflow": f"{state.mlflow}/api/2.0/mlflow/experiments/search?max_results=5",
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Servers on loopback, without passwords."""
    up = start(make_toy(tmp_path_factory.mktemp("plain")))
    yield up
    stop(up)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Servers on all addresses, with passwords."""
    up = start(make_toy(tmp_path_factory.mktemp("guarded")), "--host", "0.0.0.0", **AUTH)
    yield up
    stop(up)


def test_the_page_of_the_runs_is_told_and_its_experiment_made_once() -> None:
    made: list[str] = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200 if made else 404, {"experiment": {"experiment_id": "7"}})

        def do_POST(self) -> None:
            made.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["name"])
            self.reply(200, {"experiment_id": "7"})

        def reply(self, status: int, body: dict[str, object]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Store) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{store.server_port}"
        assert [stack._experiment(address, each) for each in (None, "a:b")] == ["7", "7"]
        store.shutdown()
    assert made == ["slmops"]
    assert stack._experiment(address, None) == ""  # nobody answers: the list of experiments is told
    assert stack.State(1, "now", "http://p", "http://m", False, "7").text().split() == [
        "Prefect", "http://p/runs", "MLflow", "http://m/#/experiments/7",
    ]  # fmt: skip


# --- one `up` ----------------------------------------------------------------------------------------


def test_all_three_are_up_and_told(plain: Up) -> None:
    state = stack.running(plain.root)
    assert state
    assert state.pid == plain.process.pid
    assert f"Prefect  {state.prefect}/runs\n" in plain.text()
    assert state.experiment.isdecimal()
    assert f"MLflow   {state.mlflow}/#/experiments/{state.experiment}\n" in plain.text()
    urls = asked(plain)
    assert code_of(urls["prefect"], body={}) == code_of(urls["mlflow"]) == 200
    assert code_of(f"{state.prefect}/api/work_pools/{stack.POOL}") == 200
    assert (plain.root / ".runs" / "servers.json").stat().st_mode & 0o777 == 0o600
    logs = plain.root / ".runs" / "logs" / "servers"
    assert {path.name for path in logs.iterdir()} == {"prefect.log", "mlflow.log", "worker.log"}


def test_a_second_up_says_what_runs(plain: Up) -> None:
    before = left(plain.root)
    done = slmops(plain.root, "up", **own(plain.root))
    assert done.returncode == 0, done.stderr
    assert f"as process {plain.process.pid}" in done.stdout
    assert stack.running(plain.root).text() in done.stdout
    assert left(plain.root) == before


def test_servers_listen_on_loopback_alone(plain: Up) -> None:
    ours = {int(part) for part in plain.process.args if part.isdigit()}
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    hosts = {row[1].split(":")[0] for row in listening if int(row[1].split(":")[1], 16) in ours}
    assert hosts == {"0100007F"}
    assert not Path("/proc/net/tcp6").exists() or not [
        row
        for row in Path("/proc/net/tcp6").read_text().splitlines()[1:]
        if int(row.split()[1].split(":")[1], 16) in ours
    ]


@pytest.mark.parametrize("server", ["prefect", "mlflow"])
def test_servers_answer_to_their_own_names_alone(plain: Up, server: str) -> None:
    assert status(asked(plain)[server], "GET" if server == "mlflow" else "POST", Host="evil.example") == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Content-Type": "text/plain"},
        {"Origin": "null"},  # of a sandboxed frame
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_another_page_cannot_use_prefect(plain: Up, headers: dict[str, str]) -> None:
    state = stack.running(plain.root)
    for method in ("POST", "OPTIONS", "GET"):
        assert status(f"{state.prefect}/api/flows/filter", method, **headers) == 403
    assert status(f"{state.prefect}/api/flows/filter", "POST", Origin=state.prefect) == 200


def test_another_page_cannot_send_events_and_an_own_one_can(plain: Up) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    prefect = stack.running(plain.root).prefect
    socket_in, socket_out = (f"{prefect.replace('http', 'ws')}/api/events/{way}" for way in ("in", "out"))
    for headers in ({"origin": "http://evil.example"}, {"additional_headers": {"Sec-Fetch-Site": "cross-site"}}):
        for place in (socket_in, socket_out):
            with pytest.raises(InvalidStatus) as refused, connect(place, proxy=None, **headers):
                pass
            assert refused.value.response.status_code == 403
    for origin in (prefect, None):  # Prefect's pages, and our flows
        with connect(socket_out, proxy=None, origin=origin, subprotocols=["prefect"]) as page:
            page.send(json.dumps({"type": "auth", "token": ""}))
            assert json.loads(page.recv(20)) == {"type": "auth_success"}


def test_prefects_pages_open_and_may_not_be_framed(plain: Up) -> None:
    prefect = stack.running(plain.root).prefect
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
    request = urllib.request.Request(f"{prefect}/runs", headers={**link, "Sec-Fetch-Dest": "document"})
    with urllib.request.urlopen(request, timeout=20) as page:
        assert page.headers["X-Frame-Options"] == "SAMEORIGIN"
        assert b"<script" in page.read()
    assert status(f"{prefect}/runs", "GET", **link, **{"Sec-Fetch-Dest": "iframe"}) == 403


def test_commands_find_the_servers(plain: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    state = stack.running(plain.root)
    found = stack.settings(plain.root)
    assert (found["PREFECT_API_URL"], found["MLFLOW_TRACKING_URI"]) == (f"{state.prefect}/api", state.mlflow)
    assert found["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "false"


def test_another_checkout_must_not_share_prefects_database(plain: Up, tmp_path: Path) -> None:
    other = make_toy(tmp_path)
    error = refused(other, PREFECT_HOME=str(plain.root / "prefect"))
    assert "another checkout" in error
    assert "PREFECT_HOME" in error


def test_a_server_that_dies_is_told_and_comes_back(plain: Up) -> None:
    [victim] = [pid for pid in left(plain.root) if "worker\0start" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: "worker is healthy again" in plain.text() or plain.process.poll() is not None, plain.text)
    assert "worker ended (killed by SIGKILL); the last lines of " in plain.text()
    assert "worker is started again (1 of 3 times an hour)" in plain.text()


def test_leases_and_runs_are_kept_on_the_disk(plain: Up) -> None:
    limits = f"{stack.running(plain.root).prefect}/api/v2/concurrency_limits/"
    assert answered(limits, {"name": "disk", "limit": 1}) == 201
    assert answered(f"{limits}increment-with-lease", {"names": ["disk"], "slots": 1, "lease_duration": 60}) == 200
    assert len(list((plain.root / "prefect" / "concurrency_leases").glob("*-*.json"))) == 1
    assert (plain.root / "prefect" / "prefect.db-wal").exists()


@pytest.mark.slow
def test_no_more_flows_run_at_once_than_told_and_all_end_with_their_servers(tmp_path: Path) -> None:
    root = make_toy(tmp_path)
    up = start(root, "--runs", "1")
    try:
        (root / "sleeper.py").write_text(SLEEPER)
        env = {**own(root), **stack.settings(root)}
        subprocess.run([sys.executable, "sleeper.py"], cwd=root, env=env, check=True, capture_output=True)
        wait_for((root / "asleep-600").exists)
        assert (root / "awake").exists()
        assert int((root / "asleep-600").read_text()) in left(root)
    finally:
        stop(up)
    assert left(root) == []
    assert up.process.returncode == 0, up.text()


@pytest.mark.slow
def test_a_run_uses_them_and_its_record_stays_when_they_are_gone(plain: Up) -> None:
    from flows.tracking import mlflow_store

    done = slmops(plain.root, "run", "--name", "under-up", **own(plain.root))
    assert done.returncode == 0, done.stderr
    state = stack.running(plain.root)
    request = urllib.request.Request(
        f"{state.prefect}/api/flow_runs/filter", b"{}", {"Content-Type": "application/json"}
    )
    assert [run["name"] for run in json.load(urllib.request.urlopen(request, timeout=20))] == ["under-up"]
    stop(plain)  # last in this module's order for these servers
    store = mlflow_store.client(plain.root)
    place = store.get_experiment_by_name(mlflow_store.EXPERIMENT)
    [parent] = store.search_runs([place.experiment_id], "tags.`slmops.stage` = 'run'")
    assert parent.info.status == "FINISHED"
    assert [file.path for file in store.list_artifacts(parent.info.run_id)] == ["bundle.json", "report.html"]


# --- how it ends -------------------------------------------------------------------------------------


def test_sigterm_leaves_no_process_and_no_state(plain: Up) -> None:
    stop(plain)
    assert plain.process.returncode == 0, plain.text()
    assert left(plain.root) == []
    assert not (plain.root / ".runs" / "servers.json").exists()
    assert stack.settings(plain.root) == {}


@pytest.mark.slow
def test_after_kill_9_the_next_up_ends_what_was_left(tmp_path: Path) -> None:
    root = make_toy(tmp_path)
    first = start(root)
    orphans = set(left(root))
    first.process.kill()
    first.process.wait()
    assert (root / ".runs" / "servers.json").exists()
    assert stack.settings(root) == {}  # a stale file is not believed
    assert left(root)

    second = start(root)
    try:
        assert f"ended {len(orphans)} processes that a killed `slmops up` had left" in second.text()
        assert not orphans & set(left(root))
        assert stack.running(root).pid == second.process.pid
    finally:
        stop(second)
    assert left(root) == []


# --- what is refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_taken_port_names_the_way_out(toy: Path, option: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        error = refused(toy, option, str(port))
    assert re.search(rf"port {port} of 127\.0\.0\.1 .*\(Address already in use\).*{option}", error)
    assert left(toy) == []


def test_servers_are_not_opened_to_the_network_without_passwords(toy: Path) -> None:
    error = refused(toy, "--host", "0.0.0.0")
    assert "--host 0.0.0.0 " in error
    assert "PREFECT_SERVER_API_AUTH_STRING and MLFLOW_AUTH_ADMIN_PASSWORD" in error
    error = refused(toy, MLFLOW_AUTH_ADMIN_PASSWORD="only-one-of-two")
    assert "set PREFECT_SERVER_API_AUTH_STRING (" in error
    assert "only-one-of-two" not in error


def test_both_servers_cannot_have_one_port(toy: Path) -> None:
    port = str(free_ports()[0])
    assert f"are both {port}" in refused(toy, "--prefect-port", port, "--mlflow-port", port)


def test_a_server_that_dies_as_it_starts_ends_all(toy: Path) -> None:
    error = refused(toy, PREFECT_SERVER_DATABASE_TIMEOUT="soon")
    assert re.search(r"prefect .*\(exit code 1\); .*prefect\.log", error)
    assert "unable to parse string as a number" in error
    assert left(toy) == []
    assert not (toy / ".runs" / "servers.json").exists()


def test_a_host_that_is_none_of_this_machine(toy: Path) -> None:
    assert re.search(r"port \d+ of 192\.0\.2\.1 ", refused(toy, "--host", "192.0.2.1", **AUTH))


@pytest.mark.parametrize(
    "url",
    ["mysql://me:planted@b/c", "postgresql:///planted", "postgresql://planted", "postgresql://h/n?password=planted",
     "postgresql://me:planted#1@host/name", "postgresql://me:plan/ted@host/name", "postgresql://host:planted/name"],
)  # fmt: skip
def test_what_is_no_postgresql_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://user@host/name") as caught:
        server_env.hide_password(url)
    assert "plan" not in str(caught.value)


# --- the deployments of another file -----------------------------------------------------------------


def test_deployments_are_applied_and_a_failure_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What the process that applies them finds: a package `flows` with such a file.
    package = tmp_path / "flows"
    package.mkdir()
    (package / "deployed").mkdir(parents=True)
    (package / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "WHERE": "http://127.0.0.1:1/api"}
    code = "import os\ndef apply(root, place):\n    return [root.name, place.name, os.environ['WHERE']]\n"
    (package / "deployed" / "apply.py").write_text(code)
    stack.apply_deployments(tmp_path, env, Path("/workspace/checkout"))
    assert capsys.readouterr().out == f"deployments: {tmp_path.name}, checkout, http://127.0.0.1:1/api\n"

    (package / "deployed" / "apply.py").write_text("def apply(root, place):\n    raise OSError('no such pool')\n")
    with pytest.raises(PipelineError, match=r"(?s)no such pool.*`slmops deploy`"):
        stack.apply_deployments(tmp_path, env)


# --- the supervisor ----------------------------------------------------------------------------------


def shell(tmp_path: Path, name: str, script: str) -> supervise.Server:
    ready = tmp_path / f"{name}.ready"
    command = ("/bin/sh", "-c", script)
    return supervise.Server(
        name, command, {"READY": str(ready)}, tmp_path / f"{name}.log", lambda since: ready.exists()
    )


def test_what_ignores_sigterm_or_left_its_group_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 1.0)
    supervisor = supervise.Supervisor(f"SLMOPS_TEST={tmp_path}", tmp_path, print)
    stubborn = (
        "trap '' TERM; setsid /bin/sh -c \"trap '' TERM; /bin/sleep 60 & wait\" & : >$READY; /bin/sleep 60 & wait; wait"
    )
    supervisor.start(shell(tmp_path, "stubborn", stubborn))
    supervisor.wait("stubborn")
    mark = f"SLMOPS_TEST={tmp_path}"
    wait_for(lambda: len(supervise.marked(mark)) >= 4, lambda: str(supervise.marked(mark)))  # two shells, two sleeps
    supervisor.stop()
    assert supervise.marked(mark) == []


def test_what_dies_too_often_ends_all(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = supervise.Supervisor(f"SLMOPS_TEST={tmp_path}", tmp_path, told.append)
    supervisor.start(shell(tmp_path, "frail", "echo too little memory; : >$READY; sleep 0.1; exit 3"))
    supervisor.wait("frail")
    with pytest.raises(supervise.Died, match=r"(?s)frail .*exit code 3.*too little memory.* 4 times"):
        supervisor.watch()
    supervisor.stop()
    assert [text.splitlines()[-1] for text in told if "again (" in text] == [
        f"frail is started again ({count} of 3 times an hour)" for count in (1, 2, 3)
    ]


def test_what_hangs_is_restarted_and_told_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "PROBE_S", 0.0)
    monkeypatch.setattr(supervise, "SILENT", 2)
    told: list[str] = []
    supervisor = supervise.Supervisor(f"SLMOPS_TEST={tmp_path}", tmp_path, told.append)
    port = free_ports()[0]

    def answers(since: float) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=0.5) as answer:
                return answer.status == 200
        except OSError:
            return False

    command = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    supervisor.start(supervise.Server("mute", command, dict(os.environ), tmp_path / "mute.log", answers))
    sleeps = ("/bin/sleep", "600")  # silent whenever the other is
    needy = supervise.Server("needy", sleeps, {}, tmp_path / "needy.log", answers, needs="mute")
    supervisor.start(needy)
    supervisor._asked["needy"], supervisor._silent["needy"] = 0.0, 0
    supervisor.wait("mute")
    stopped: set[int] = set()

    def stop_it() -> None:
        pid = supervisor._processes["mute"].pid
        if pid not in stopped and len(stopped) <= supervise.RESTARTS:
            os.kill(pid, signal.SIGSTOP)
            stopped.add(pid)
        if told and told[-1].endswith("it is left alone"):
            raise KeyboardInterrupt

    needy_pid = supervisor._processes["needy"].pid
    with pytest.raises(KeyboardInterrupt):
        supervisor.watch(stop_it)
    assert len(stopped) == supervise.RESTARTS + 1
    assert [text.split(";")[0] for text in told if ";" in text] == [
        "mute gave no answer 2 times in a row and was killed"
    ] * 3
    assert supervisor._processes["needy"].pid == needy_pid
    supervisor.stop()
    assert supervise.marked(f"SLMOPS_TEST={tmp_path}") == []


def test_what_does_not_become_healthy_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "DEADLINE_S", 0.5)
    supervisor = supervise.Supervisor(f"SLMOPS_TEST={tmp_path}", tmp_path, print)
    supervisor.start(shell(tmp_path, "slow", "echo waiting for the disk; exec sleep 60"))
    with pytest.raises(supervise.Died, match=r"(?s)slow .*healthy in 0 s.* waiting for the disk"):
        supervisor.wait("slow")
    supervisor.stop()


# --- with passwords ----------------------------------------------------------------------------------


def test_who_has_no_password_gets_401(guarded: Up) -> None:
    urls = asked(guarded)
    assert code_of(urls["prefect"], body={}) == code_of(urls["mlflow"]) == 401
    assert code_of(urls["prefect"], "slmops:wrong", body={}) == code_of(urls["mlflow"], "admin:wrong") == 401
    prefect, mlflow = AUTH.values()
    assert code_of(urls["prefect"], prefect, body={}) == code_of(urls["mlflow"], f"admin:{mlflow}") == 200


def test_no_secret_lies_in_a_log_a_file_or_an_argument(guarded: Up) -> None:
    files = [path for path in (guarded.root / ".runs").rglob("*") if path.is_file()]
    assert {"servers.json", "prefect.log", "mlflow.log", "worker.log", "mlflow-auth.ini"} <= {p.name for p in files}
    everything = [path.read_bytes() for path in [*files, guarded.output]]
    everything += [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [*left(guarded.root), guarded.process.pid]]
    assert not [text for text in everything if b"planted" in text]


def test_a_flow_does_not_get_the_servers_own_secrets(guarded: Up) -> None:
    [worker] = [pid for pid in left(guarded.root) if "worker\0start" in Path(f"/proc/{pid}/cmdline").read_text()]
    names = {line.split("=")[0] for line in Path(f"/proc/{worker}/environ").read_text().split("\0")}
    assert {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"} <= names
    assert not names & set(AUTH)


def test_a_command_without_passwords_is_told_which(guarded: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slmops(guarded.root, "register", **own(guarded.root))
    assert done.returncode == 1
    assert "PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD" in done.stderr
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "a:b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert stack.settings(guarded.root)["PREFECT_API_URL"].endswith("/api")


@pytest.mark.slow
def test_a_run_with_passwords(guarded: Up) -> None:
    prefect, mlflow = AUTH.values()
    known = {
        "PREFECT_API_AUTH_STRING": prefect,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": mlflow,
    }
    done = slmops(guarded.root, "run", "--worktree", **own(guarded.root, HF_TOKEN="hf_planted", **known))
    assert done.returncode == 0, done.stderr
    assert "version 1 registered" in done.stdout
    # Nothing that the run left holds a password or a token: files, both databases, commits.
    assert holding(guarded.root, b"planted") == []
    assert "planted" not in done.stdout + done.stderr + git(guarded.root, "log", "-p", "--all")


@pytest.mark.slow
def test_a_password_that_is_not_mlflows_is_told(guarded: Up, tmp_path: Path) -> None:
    root = make_toy(tmp_path)
    users = root / ".runs" / "servers" / "mlflow-auth.db"
    users.parent.mkdir(parents=True)
    shutil.copy(guarded.root / ".runs" / "servers" / users.name, users)
    error = refused(root, "--host", "0.0.0.0", **{**AUTH, "MLFLOW_AUTH_ADMIN_PASSWORD": "planted-another"})
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" in error
    assert str(users) in error
    assert "planted" not in error
    assert left(root) == []


# --- PostgreSQL --------------------------------------------------------------------------------------


@pytest.fixture
def postgres(database: tuple[str, Callable[[], None]]) -> str:
    """The URL of a PostgreSQL of one's own."""
    return database[0]


@pytest.mark.slow
def test_both_servers_on_postgresql(postgres: str, tmp_path: Path) -> None:
    import psycopg2

    root = make_toy(tmp_path)
    assert "/nowhere" in refused(root, "--database", postgres.replace("/slmops", "/nowhere"))
    up = start(root, "--database", postgres)
    try:
        urls = asked(up)
        assert code_of(urls["prefect"], body={}) == code_of(urls["mlflow"]) == 200
        state = stack.running(root)
        assert code_of(f"{state.mlflow}/api/2.0/mlflow/experiments/create", body={"name": "kept"}) == 200
        with psycopg2.connect(postgres) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT table_schema FROM information_schema.tables WHERE table_name = 'alembic_version'")
            assert {row[0] for row in cursor.fetchall()} == {"prefect", "mlflow"}
            cursor.execute("SELECT name FROM mlflow.experiments WHERE name = 'kept'")
            assert cursor.fetchall() == [("kept",)]
            cursor.execute("SELECT name FROM prefect.work_pool")
            assert cursor.fetchall() == [(stack.POOL,)]
        connection.close()
        texts = [path.read_bytes() for path in (root / ".runs").rglob("*") if path.is_file()] + [up.output.read_bytes()]
        texts += [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [*left(root), up.process.pid]]
        assert not [text for text in texts if b"planted" in text]
    finally:
        stop(up)
    assert left(root) == []
