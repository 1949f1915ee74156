"""Container build, compose file, Kubernetes manifests and work pools, against the schemas and classes that read them.

Building the images and starting them takes an engine, a cluster and a GPU: that is not done here.
"""

import asyncio
import configparser
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from checkout import ROOT, answers, commit, environment, free_ports, git, wait_for
from running import code_of

from tasks.frame.environment import NO_TELEMETRY

INFRA = ROOT / "infra"
SECRET_NAME = re.compile(r"password|secret|token|auth|access_key", re.IGNORECASE)


def values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with the key it lies under."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from values(child, name)
    elif isinstance(node, list):
        for child in node:
            yield from values(child, key)
    else:
        yield key, node


# --- the images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build() -> dict[str, list[tuple[str, str]]]:
    """The Containerfile: stage -> its instructions, FROM first."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Containerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = []
        stages[list(stages)[-1]].append((word, rest.strip()))
    return stages


def of(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in stage if name == word]


def variables(stage: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of(stage, "ENV") for pair in line.split())


def test_every_base_image_is_a_stage_or_pinned(build: dict) -> None:
    for name, stage in list(build.items())[1:]:
        base = stage[0][1].split()[0]
        known = base in build or {base.replace("${DEVICE}", device) for device in ("cpu", "cuda")} <= set(build)
        assert known or re.fullmatch(r"docker\.io/[\w./-]+:\d[\w.-]+", base), (name, base)


def test_what_is_copied_is_there_and_reaches_the_builder(build: dict) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[ignored.index("*") :][0] == "*", "all is shut out first"
    assert all((ROOT / name).exists() for name in allowed)
    for stage in build.values():
        for line in of(stage, "COPY"):
            if line.startswith("--from="):
                continue
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == name or name.startswith(f"{source}/") for name in allowed), source


def test_nothing_private_reaches_the_builder() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for private in (".dvc/config.local", ".env", ".git/config", "infra/.env", "mlflow.db", "data/mine.jsonl"):
        assert not any(fnmatch.fnmatch(private, name) or private.startswith(f"{name}/") for name in allowed), private


def test_the_images_are_silent_unprivileged_and_hold_no_secret(build: dict) -> None:
    for name in ("server", "worker"):
        assert NO_TELEMETRY.items() <= variables(build[name]).items()
        assert of(build[name], "USER") == ["10001"]
        assert [word for word, _ in build[name]].index("USER") > [word for word, _ in build[name]].index("COPY")
        assert of(build[name], "ENTRYPOINT")[0].startswith('["tini"')
    for stage in build.values():
        assert not any(SECRET_NAME.search(line) for word in ("ARG", "ENV") for line in of(stage, word))


def test_make_starts_nothing_that_reports_to_anyone() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    exported = dict(
        line.removeprefix("export ").split(" = ") for line in lines if line.startswith("export ") and " = " in line
    )
    assert exported == NO_TELEMETRY


def test_the_images_hold_the_pinned_versions_and_run_on_other_processors(build: dict) -> None:
    for stage in build.values():
        for line in of(stage, "RUN"):
            assert "pip install" not in line or "-c constraints.txt" in line
    worker = " ".join(of(build["build-worker"], "RUN"))
    assert worker.count("CMAKE_ARGS=") == worker.count("-DGGML_NATIVE=OFF") == 2
    assert "infra/setup.sh" in worker
    extras = variables(build["build-worker"])["SLMOPS_EXTRAS"].split(",")
    asked = of(build["build-server"], "RUN")[-1].split(".[")[1].split("]")[0].split(",")
    assert {*extras, *asked} <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert "${SLMOPS_EXTRAS:-all,dev}" in (INFRA / "setup.sh").read_text()


def start(volume: Path, repository: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
    """Run infra/checkout as the image does, on a volume."""
    settings = {"PATH": "/usr/bin:/bin", "SLMOPS_VOLUME": str(volume)}
    if repository:
        settings["SLMOPS_REPOSITORY"] = str(repository)
    return subprocess.run([INFRA / "checkout", *command], env=settings, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "dvc.yaml").write_text("stages: {}\n")
    git(tmp_path / "origin", "init", "-q", "-b", "main")
    commit(tmp_path / "origin")
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    return tmp_path / "origin"


def test_a_new_volume_gets_a_checkout_and_a_used_one_keeps_its_own(repository: Path) -> None:
    volume = repository.parent / "volume"
    assert start(volume, repository, "cat", "dvc.yaml").stdout == "stages: {}\n"
    (volume / "checkout" / "dvc.yaml").write_text("mine\n")
    assert start(volume, None, "cat", "dvc.yaml").stdout == "mine\n"
    assert sorted(path.name for path in volume.iterdir()) == ["checkout", "lost+found"]


def test_of_two_starts_at_once_both_find_the_whole_checkout(repository: Path) -> None:
    volume = repository.parent / "volume"
    settings = {"PATH": "/usr/bin:/bin", "SLMOPS_VOLUME": str(volume), "SLMOPS_REPOSITORY": str(repository)}
    both = [
        subprocess.Popen([INFRA / "checkout", "cat", "dvc.yaml"], env=settings, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [each.communicate()[0] for each in both] == [b"stages: {}\n"] * 4
    assert sorted(path.name for path in volume.iterdir()) == ["checkout", "lost+found"]


def test_a_volume_without_a_checkout_says_what_is_missing(repository: Path) -> None:
    volume = repository.parent / "volume"
    done = start(volume, None, "true")
    assert done.returncode != 0
    assert "SLMOPS_REPOSITORY" in done.stderr
    done = start(volume, repository.parent / "nowhere", "true")
    assert done.returncode != 0
    assert [path.name for path in volume.iterdir()] == ["lost+found"]  # no half-done clone stays


# --- compose ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    reader = pytest.importorskip("compose_spec", reason="compose-spec is not installed: make setup")
    content = yaml.safe_load((INFRA / name).read_text())
    reader.PyCompose.from_yaml(yaml.safe_dump(content))
    content["services"]["worker"]["healthcheck"] = ["no mapping"]
    with pytest.raises(ValueError, match="healthcheck"):
        reader.PyCompose.from_yaml(yaml.safe_dump(content))


def test_services_have_a_pinned_image_and_a_health_check(compose: dict) -> None:
    assert set(compose["services"]) == {"postgres", "store", "mlflow", "prefect", "worker"}
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?", service["image"]), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        if "build" in service:
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]


def test_services_wait_for_the_health_of_those_they_need(compose: dict) -> None:
    for service in compose["services"].values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in compose["services"][needed]
        addresses = set(re.findall(r"(?:https?://|@)(\w+)[:/]", str(service.get("environment"))))
        addresses.add(service.get("environment", {}).get("PGHOST"))
        assert addresses & set(compose["services"]) <= set(service.get("depends_on", {}))


def test_only_loopback_is_served(compose: dict) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_come_from_the_environment_and_are_asked_for(compose: dict) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name) and not name.endswith("_PATH"):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    text = (INFRA / "compose.yaml").read_text()
    assert not re.search(r"://[^/\s$]+:[^/\s@]+@", text), "a password in an address"


def test_addresses_of_databases_name_a_driver_that_is_in_the_image() -> None:
    """Without one, SQLAlchemy takes its default, which is not installed."""
    pinned = (ROOT / "constraints.txt").read_text()
    names = ("compose.yaml", "mlflow-auth.ini", "kubernetes/kustomization.yaml", "kubernetes/mlflow.yaml")
    drivers = [re.findall(r"\bpostgresql(\+\w+)?://", (INFRA / name).read_text()) for name in names]
    assert drivers == [["+psycopg2", "+asyncpg"], ["+psycopg2"], ["+asyncpg"], ["+psycopg2"]]
    assert all(f"\n{name}==" in pinned for name in ("asyncpg", "psycopg2-binary"))


def test_volumes_are_named_and_declared(compose: dict) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert {name for name in used if not name.startswith("./")} == set(compose["volumes"])
    assert all((INFRA / name).exists() for name in used if name.startswith("./"))


# --- Kubernetes ------------------------------------------------------------------------------------

MANIFESTS = sorted(path for path in (INFRA / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
OBJECTS = [made for path in MANIFESTS for made in yaml.safe_load_all(path.read_text())]
VERSIONS = ["1.30", "1.36"]  # of Kubernetes: old and new


def ident(made: dict) -> str:
    return f"{made['kind']}-{made['metadata']['name']}"


def pods() -> dict[str, dict]:
    return {made["metadata"]["name"]: made["spec"]["template"] for made in OBJECTS if made["kind"] == "Deployment"}


def check_schema(made: dict, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: make setup")
    validate.validate(made, version, strict=True)


def check_restricted(pod: dict) -> None:
    """The parts of Kubernetes' `restricted` standard that the namespace enforces, and a read-only root."""
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("made", OBJECTS, ids=ident)
def test_manifests_follow_the_schemas_of_kubernetes(made: dict, version: str) -> None:
    check_schema(made, version)


def test_a_misspelt_manifest_is_found() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selecter": {}}}
    with pytest.raises(Exception, match="selecter"):
        check_schema(wrong, VERSIONS[0])


@pytest.mark.parametrize("name", pods())
def test_pods_are_restricted_and_probed(name: str) -> None:
    pod = pods()[name]["spec"]
    check_restricted(pod)
    for container in pod["containers"]:
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports


def test_services_reach_the_pods() -> None:
    services = [each for each in OBJECTS if each["kind"] == "Service"]
    assert {each["metadata"]["name"] for each in services} == {"prefect", "mlflow"}
    for service in services:
        template = pods()[service["metadata"]["name"]]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        (port,) = service["spec"]["ports"]
        (served,) = template["spec"]["containers"][0]["ports"]
        assert (port["targetPort"], port["port"]) == (served["name"], served["containerPort"])


def references(pod: dict) -> set[tuple[str, str]]:
    """Kind and name of what a pod refers to."""
    found = {("ServiceAccount", pod["serviceAccountName"])} if "serviceAccountName" in pod else set()
    for volume in pod["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            found.add(("PersistentVolumeClaim", claim["claimName"]))
    for container in pod["containers"]:
        for source in container.get("envFrom", []):
            for kind, what in source.items():
                found.add(({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], what["name"]))
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                found.add(("Secret", variable["valueFrom"]["secretKeyRef"]["name"]))
    return found


def told_secrets() -> dict[str, set[str]]:
    """The secrets that a person is told to make, and their keys."""
    told = (INFRA / "kubernetes" / "kustomization.yaml").read_text().replace("\\\n#", "")
    made = re.findall(r"create secret generic (\S+) (.+)", told)
    return {name: set(re.findall(r"--from-literal=(\w+)=", keys)) for name, keys in made}


def test_what_pods_refer_to_exists_and_secrets_are_told_but_not_contained() -> None:
    have = {(made["kind"], made["metadata"]["name"]) for made in OBJECTS}
    assert not [name for kind, name in have if kind == "Secret"]
    assert not [key for made in OBJECTS for key in made.get("data", {}) if SECRET_NAME.search(key)]
    for template in pods().values():
        for kind, name in references(template["spec"]):
            assert name in told_secrets() if kind == "Secret" else (kind, name) in have
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                elsewhere = "valueFrom" in variable or variable["name"].endswith(("_NAME", "_KEY", "_PATH"))
                assert elsewhere or not SECRET_NAME.search(variable["name"]), variable["name"]
                if source := variable.get("valueFrom"):
                    assert source["secretKeyRef"]["key"] in told_secrets()[source["secretKeyRef"]["name"]]


def test_kustomization_has_every_manifest_and_image() -> None:
    made = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())
    assert sorted(made["resources"]) == [path.name for path in MANIFESTS]
    images = {container["image"] for template in pods().values() for container in template["spec"]["containers"]}
    assert {image["name"] for image in made["images"]} == images
    assert all(each["metadata"].get("namespace", "slmops") == made["namespace"] for each in OBJECTS)


def test_kustomize_puts_the_manifests_together() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", INFRA / "kubernetes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = list(yaml.safe_load_all(done.stdout))
    assert {ident(made) for made in together} == {ident(made) for made in OBJECTS}
    assert {image for key, image in values(together) if key == "image"} == {"slmops-server:0.1.0"}


# --- work pools ------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(r"\{\{\s*([^}]+?)\s*\}\}")
POOLS = {path.stem: json.loads(path.read_text()) for path in sorted((INFRA / "work-pools").glob("*.json"))}


@pytest.mark.parametrize("name", POOLS)
def test_placeholders_and_variables_are_the_same(name: str) -> None:
    pool = POOLS[name]
    texts = [text for _, text in values(pool["job_configuration"]) if isinstance(text, str)]
    named = {found for text in texts for found in PLACEHOLDER.findall(text)}
    assert named == set(pool["variables"]["properties"])


@pytest.mark.parametrize("name", POOLS)
def test_variables_are_a_schema_that_holds_their_own_defaults(name: str) -> None:
    from jsonschema import Draft202012Validator

    schema = POOLS[name]["variables"]
    Draft202012Validator.check_schema(schema)
    defaults = {key: part["default"] for key, part in schema["properties"].items()}
    strict = Draft202012Validator({**schema, "additionalProperties": False})
    strict.validate(defaults)
    examples = {key: part["examples"][0] for key, part in schema["properties"].items() if "examples" in part}
    strict.validate(defaults | examples)
    assert not strict.is_valid(defaults | {"image": 1})
    for key, value in schema["properties"]["env"]["default"].items():
        assert not SECRET_NAME.search(key) or value == f"{{{{ ${key} }}}}", "what the worker has, not the secret itself"


def configured(kind: str, name: str, chosen: dict[str, Any]) -> Any:
    """What Prefect's worker makes of the template for one flow run."""
    worker = pytest.importorskip(f"prefect_{name}.worker", reason="not installed: pip install 'slmops[workers]'")
    from prefect.client.schemas.objects import FlowRun

    made = getattr(worker, kind)
    # A client would be asked for blocks only, and the templates name none.
    configuration = asyncio.run(made.from_template_and_values(POOLS[name], chosen, client=object()))
    run = FlowRun(flow_id="00000000-0000-0000-0000-000000000000", name="brave-run")
    configuration.prepare_for_flow_run(run)
    return configuration


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chosen", [{}, {"gpus": 1, "image": "slmops-worker:0.1.0-cuda"}], ids=["cpu", "gpu"])
def test_prefect_makes_a_valid_job_of_the_kubernetes_pool(chosen: dict, version: str) -> None:
    job = configured("KubernetesWorkerJobConfiguration", "kubernetes", chosen).job_manifest
    check_schema(job, version)
    pod = job["spec"]["template"]["spec"]
    check_restricted(pod)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == chosen.get("gpus", 0)
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["image"] == chosen.get("image", "slmops-worker:0.1.0")
    have = {(made["kind"], made["metadata"]["name"]) for made in OBJECTS}
    assert {name for kind, name in references(pod) if kind == "Secret"} == {"slmops-s3", "slmops-mlflow"}
    assert {(kind, name) for kind, name in references(pod) if kind != "Secret"} <= have
    assert job["metadata"]["namespace"] == "slmops"


@pytest.mark.parametrize(
    "chosen", [{}, {"device_requests": [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}]}]
)
def test_docker_takes_what_prefect_makes_of_the_docker_pool(chosen: dict, compose: dict) -> None:
    configuration = configured("DockerWorkerJobConfiguration", "docker", chosen)
    import docker
    from docker.models.containers import _create_container_args

    settings = {
        "image": configuration.image,
        "command": configuration.command,
        "environment": configuration.env,
        "volumes": configuration.volumes,
        "mem_limit": configuration.mem_limit,
        "privileged": configuration.privileged,
        "auto_remove": configuration.auto_remove,
        **configuration.container_create_kwargs,
        "version": docker.constants.DEFAULT_DOCKER_API_VERSION,
    }
    host = _create_container_args(settings)["host_config"]
    assert host["DeviceRequests"] == [] if not chosen else host["DeviceRequests"][0]["Count"] == 1
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host.get("Privileged")
    assert configuration.networks == [f"{compose['name']}_default"]
    assert configuration.volumes[0].split(":")[0].removeprefix(f"{compose['name']}_") in compose["volumes"]


def test_pools_and_servers_use_the_same_images(compose: dict) -> None:
    images = {service["image"] for service in compose["services"].values() if "build" in service}
    assert {pool["variables"]["properties"]["image"]["default"] for pool in POOLS.values()} <= images
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert {image.split(":")[1] for image in images} == {version[1]}


# --- who may use the servers -----------------------------------------------------------------------

PASSWORDS = {"mlflow": "MLFLOW_AUTH_ADMIN_PASSWORD", "prefect": "PREFECT_SERVER_API_AUTH_STRING"}


@pytest.fixture(scope="module")
def users() -> dict[str, str]:
    """What MLflow in a container is told of its users."""
    reader = configparser.ConfigParser()
    reader.read(INFRA / "mlflow-auth.ini")
    return dict(reader["mlflow"])


def servers(compose: dict) -> Iterator[tuple[str, list[str], dict[str, str], set[str]]]:
    """Of each server, in compose and in Kubernetes: name, command, plain variables, and the names of its secrets."""
    for name, service in compose["services"].items():
        given = service["environment"]
        asked = {key for key, value in given.items() if value.startswith("${")}
        yield name, service.get("command", []), given, asked
    for name, template in pods().items():
        (container,) = template["spec"]["containers"]
        given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        asked = {each["name"] for each in container["env"] if "valueFrom" in each}
        for source in container.get("envFrom", []):
            asked |= told_secrets()[source["secretRef"]["name"]] if "secretRef" in source else set()
        yield name, container["args"], given, asked


def test_no_server_listens_without_a_password(compose: dict, build: dict) -> None:
    listening = [server for server in servers(compose) if "--host=0.0.0.0" in server[1]]
    assert [server[0] for server in listening] == ["mlflow", "prefect"] * 2
    for name, command, given, asked in listening:
        assert PASSWORDS[name] in asked
        if name == "mlflow":
            assert "--app-name=basic-auth" in command
            assert {"PGPASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} <= asked
            assert f"infra/mlflow-auth.ini {given['MLFLOW_AUTH_CONFIG_PATH']}" in of(build["server"], "COPY")


def test_mlflows_users_are_in_the_database_and_no_password_is_in_the_file(users: dict) -> None:
    assert users == {"admin_username": "admin", "default_permission": "READ", "database_uri": "postgresql+psycopg2://"}


def test_the_worker_and_its_flow_runs_know_the_passwords(compose: dict, users: dict) -> None:
    services = {name: service["environment"] for name, service in compose["services"].items()}
    assert services["worker"]["PREFECT_API_AUTH_STRING"] == services["prefect"][PASSWORDS["prefect"]]
    assert services["worker"]["MLFLOW_TRACKING_PASSWORD"] == services["mlflow"][PASSWORDS["mlflow"]]
    (settings,) = [made["data"] for made in OBJECTS if made["kind"] == "ConfigMap"]
    pool = POOLS["docker"]["variables"]["properties"]["env"]["default"]
    for client in (services["worker"], settings, pool):
        assert client["MLFLOW_TRACKING_USERNAME"] == users["admin_username"]


def test_jobs_in_kubernetes_take_the_passwords_from_secrets() -> None:
    job = configured("KubernetesWorkerJobConfiguration", "kubernetes", {"env": {"MINE": "1"}}).job_manifest
    (container,) = job["spec"]["template"]["spec"]["containers"]
    by_name = {variable["name"]: variable for variable in container["env"]}
    source = {"secretKeyRef": {"name": "slmops-mlflow", "key": PASSWORDS["mlflow"]}}
    assert by_name["MLFLOW_TRACKING_PASSWORD"]["valueFrom"] == source
    assert source["secretKeyRef"]["key"] in told_secrets()["slmops-mlflow"]
    assert by_name["MINE"]["value"] == "1"
    assert {"configMapRef": {"name": "slmops"}} in container["envFrom"], "it names MLflow's user"
    assert {"secretRef": {"name": "slmops-mlflow"}} not in container["envFrom"], "the database is the server's alone"
    # Prefect's worker puts its own password into the job, as a reference where these name one.
    (worker,) = pods()["worker"]["spec"]["containers"]
    given = {each["name"]: each.get("value") for each in worker["env"]}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert given[f"{prefix}_KEY"] in told_secrets()[given[f"{prefix}_NAME"]]


def test_containers_of_the_docker_pool_take_the_passwords_from_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-mlflow-pw")
    with temporary_settings({PREFECT_API_AUTH_STRING: "slmops:planted-prefect"}):
        for chosen in ({}, {"env": {"MINE": "1"}}):
            env = configured("DockerWorkerJobConfiguration", "docker", chosen).env
            assert env["PREFECT_API_AUTH_STRING"] == "slmops:planted-prefect"
            assert (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"]) == ("admin", "planted-mlflow-pw")


@pytest.mark.slow
def test_mlflow_as_compose_starts_it_asks_for_the_password(
    compose: dict,
    database: tuple[str, Callable[[], None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    port, where = free_ports()[0], urlsplit(database[0])
    address, log = f"http://127.0.0.1:{port}", tmp_path / "mlflow.txt"
    here = {"--host": "127.0.0.1", "--artifacts-destination": str(tmp_path)}
    parts = [part.partition("=") for part in compose["services"]["mlflow"]["command"]]
    parts = [(name, equals, here.get(name) or value.replace("5000", str(port))) for name, equals, value in parts]
    command = [sys.executable, "-m", *map("".join, parts)]
    env = environment(tmp_path, **compose["services"]["mlflow"]["environment"]) | {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(where.port),
        "PGDATABASE": where.path[1:],
        "PGUSER": unquote(where.username or ""),
        "PGPASSWORD": unquote(where.password or ""),
        "MLFLOW_AUTH_CONFIG_PATH": str(INFRA / "mlflow-auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-key",
    }

    @contextmanager
    def started(password: str) -> Iterator[None]:
        with log.open("a") as out:
            given = env | {"MLFLOW_AUTH_ADMIN_PASSWORD": password}
            process = subprocess.Popen(command, cwd=tmp_path, env=given, stdout=out, stderr=out)
        try:
            wait_for(lambda: answers(f"{address}/health") or process.poll() is not None, log.read_text)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()
            process.wait()

    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs a password to create the admin user" in done.stderr

    asked = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    with started("planted-mlflow-pw"):
        assert code_of(asked) == code_of(asked, "admin:wrong") == code_of(f"{address}/version") == 401
        assert code_of(asked, "admin:planted-mlflow-pw") == 200
        with pytest.raises(MlflowException, match="401"):
            client.search_experiments()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-mlflow-pw")
        run = client.create_run(client.create_experiment("kept")).info
        client.log_dict(run.run_id, {"answer": 42}, "answer.json")
        client.create_registered_model("kept")
        client.create_model_version("kept", run.artifact_uri, run.run_id)
    with started("planted-another-pw"):  # it is not taken: the user is there already
        assert code_of(asked) == code_of(asked, "admin:planted-another-pw") == 401
        assert client.get_model_version("kept", "1").run_id == run.run_id
        assert [each.path for each in client.list_artifacts(run.run_id)] == ["answer.json"]
    assert not list(tmp_path.rglob("*.db")), "users and runs are in PostgreSQL"
    assert "planted" not in log.read_text()
