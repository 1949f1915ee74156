"""infra/build_llama.py: what it decides by the compiler and the processor, what it writes, and when it compiles again.

The compilers are small scripts, and so is pip: a real build takes minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "infra"))
import build_llama

# ggml_tile_config_init as llama.cpp has it, without what is between.
SOURCE = """inline void ggml_tile_config_init(void) {
    static thread_local bool done = false;

    if (done) {
        return;
    }

    alignas(64) tile_config_t tc = {};

    _tile_loadconfig(&tc);
    done = true;
}
"""
RELOADED = SOURCE.replace(SOURCE[SOURCE.index("    static") : SOURCE.index("    alignas")], "").replace(
    "    done = true;\n", ""
)
AMX = "#define __AMX_INT8__ 1"
STORES = "\\tvmovdqa\\t%xmm0, -48(%rsp)\\n\\tmovq\\t%rax, -16(%rsp)\\n"


def compiler(folder: Path, *, plain: str = "", barrier: str = STORES, native: str = AMX, code: int = 0) -> list[str]:
    """A C++ compiler that finds `native` on this processor and writes these instructions before ldtilecfg."""
    path = folder / "c++"
    path.write_text(
        f"""#!/bin/sh
case "$*" in
    *--version*) echo "fake 1.0" ;;
    *native*-dM*|*-mno-amx*) printf '%s\\n' '#define __x86_64__ 1' {native!r} ;;
    *-dM*) echo '#define __x86_64__ 1' ;;
    *-DBARRIER*) printf '_Z4loadv:\\n\\t.cfi_startproc\\n{barrier}#APP\\n\\tldtilecfg\\t-64(%%rsp)\\n\\tret\\n'; exit {code} ;;
    *-S*) printf '_Z4loadv:\\n\\t.cfi_startproc\\n{plain}#APP\\n\\tldtilecfg\\t-64(%%rsp)\\n\\tret\\n'; exit {code} ;;
esac
""".replace("%xmm", "%%xmm")
        .replace("%rax", "%%rax")
        .replace("(%rsp)", "(%%rsp)")
    )
    path.chmod(0o755)
    return [str(path)]


def test_a_compiler_that_drops_stores_gets_a_barrier(tmp_path: Path) -> None:
    found = build_llama.wanted("1", compiler(tmp_path, plain="\\tmovb\\t$1, -64(%rsp)\\n"), "")
    assert found["compiler_with_amx"] == build_llama.DROPS
    text, amx, _ = build_llama.decide(SOURCE, found["compiler_with_amx"])
    assert amx == build_llama.KEPT
    barrier = '    asm volatile("" ::: "memory");\n    _tile_loadconfig(&tc);\n'
    assert text == RELOADED.replace("    _tile_loadconfig(&tc);\n", barrier)


def test_a_compiler_that_keeps_them_gets_none_yet_the_configuration_is_loaded_each_time(tmp_path: Path) -> None:
    """What another user of the tiles in the same thread has loaded would else stay."""
    swapped = "\\tmovq\\t%rax, -16(%rsp)\\n\\tvmovdqa\\t%xmm0, -48(%rsp)\\n"
    found = build_llama.wanted("1", compiler(tmp_path, plain=swapped), "")
    assert found["compiler_with_amx"] == build_llama.GOOD
    assert build_llama.decide(SOURCE, build_llama.GOOD)[:2] == (RELOADED, build_llama.RIGHT)


def test_amx_is_left_out_where_the_compiler_cannot_or_the_source_is_another(tmp_path: Path) -> None:
    cannot = build_llama.wanted("1", compiler(tmp_path, code=1), "")["compiler_with_amx"]
    assert build_llama.decide(SOURCE, cannot)[:2] == (SOURCE, build_llama.LEFT_OUT)
    for other in (SOURCE + SOURCE, SOURCE.replace("done", "ready"), ""):
        text, amx, reason = build_llama.decide(other, build_llama.DROPS)
        assert (text, amx) == (other, build_llama.LEFT_OUT)
        assert "mmq.cpp" in reason


def test_the_source_of_the_version_in_use_is_the_one_that_is_mended() -> None:
    packages = list((ROOT / ".cache").glob("llama_cpp_python-*.tar.gz"))
    if not packages:
        pytest.skip("no source package here: make setup")
    for package in packages:
        name = f"{package.name.removesuffix('.tar.gz')}/{build_llama.SOURCE}"
        done = subprocess.run(["tar", "-xOzf", package, name], capture_output=True, text=True, check=True)
        assert build_llama.decide(done.stdout, build_llama.DROPS)[1] == build_llama.KEPT


@pytest.mark.parametrize(
    ("native", "cmake_args"), [("", ""), (AMX, "-DGGML_NATIVE=OFF"), (AMX, "-DGGML_CUDA=ON -DGGML_NATIVE:BOOL=off")]
)
def test_where_no_processor_has_amx_nothing_is_changed(tmp_path: Path, native: str, cmake_args: str) -> None:
    found = build_llama.wanted("1", compiler(tmp_path, native=native), cmake_args)
    assert found["compiler_with_amx"] == build_llama.UNUSED
    assert build_llama.decide(SOURCE, build_llama.UNUSED)[:2] == (SOURCE, build_llama.LEFT_OUT)


def test_amx_that_is_asked_for_is_probed_on_any_processor(tmp_path: Path) -> None:
    found = build_llama.wanted("1", compiler(tmp_path, native=""), "-DGGML_NATIVE=OFF -DGGML_AMX_INT8=ON")
    assert (found["features"], found["compiler_with_amx"]) == ([], build_llama.DROPS)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_compiler_of_this_machine_is_understood() -> None:
    found = build_llama.wanted("1", ["c++"], "")
    assert found["features"]
    assert found["compiler_with_amx"] in (build_llama.GOOD, build_llama.DROPS, build_llama.UNUSED)


def test_cmakes_own_choice_of_a_compiler_is_probed(tmp_path: Path) -> None:
    [path] = compiler(tmp_path)
    assert build_llama.which_compiler(f"-DCMAKE_CXX_COMPILER={path} -DA=B", "c++") == [path]
    assert build_llama.which_compiler("", f"{path} -pipe") == [path, "-pipe"]
    assert build_llama.which_compiler("", "/nowhere/g++") == build_llama.which_compiler("", "") == ["c++"]


# --- the whole script ------------------------------------------------------------------------------


class Environment:
    """An environment whose pip notes what it was told, and the source package."""

    def __init__(self, home: Path) -> None:
        self.home, self.pip_log = home, home / "pip.jsonl"
        inside = home / "llama_cpp_python-1.0" / build_llama.SOURCE
        inside.parent.mkdir(parents=True)
        inside.write_text(SOURCE)
        self.tarball = home / "llama_cpp_python-1.0.tar.gz"
        with tarfile.open(self.tarball, "w:gz") as tar:
            tar.add(home / "llama_cpp_python-1.0", "llama_cpp_python-1.0")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
        self.python = home / "venv" / "bin" / "python"
        site = next((home / "venv" / "lib").iterdir()) / "site-packages"
        (site / "pip").mkdir()
        (site / "pip" / "__main__.py").write_text(f"""
import json, os, pathlib, sys
source = pathlib.Path(sys.argv[-1], {str(build_llama.SOURCE)!r}).read_text()
told = {{name: os.environ.get(name, "") for name in ("CMAKE_ARGS", "CXXFLAGS", "CXX")}}
with open({str(self.pip_log)!r}, "a") as log:
    log.write(json.dumps({{**told, "source": source, "arguments": sys.argv[1:]}}) + chr(10))
if "PIP_FAILS" in os.environ: sys.exit(2)
made = pathlib.Path({str(site)!r}, "llama_cpp_python-1.0.dist-info")
made.mkdir(exist_ok=True)
(made / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 1.0\\n")
""")
        self.record = home / "venv" / "share" / "llama.cpp" / "build.json"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        command = [self.python, build_llama.__file__, self.tarball, *arguments]
        return subprocess.run(command, env=kept | variables, capture_output=True, text=True)

    def builds(self) -> list[dict]:
        return [json.loads(line) for line in self.pip_log.read_text().splitlines()] if self.pip_log.exists() else []


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_the_choice_is_printed_recorded_and_made_once(environment: Environment, tmp_path: Path) -> None:
    [cxx] = compiler(tmp_path)
    assert environment.run("--check", CXX=cxx).returncode == 1
    done = environment.run(CXX=cxx)
    assert done.returncode == 0, done.stderr
    [build] = environment.builds()
    assert (build["CMAKE_ARGS"], build["CXXFLAGS"], build["CXX"]) == ("-DGGML_NATIVE=ON", "", cxx)
    assert 'asm volatile("" ::: "memory");' in build["source"]
    made = json.loads(environment.record.read_text())
    assert (made["version"], made["amx"], made["is"]) == ("1.0", build_llama.KEPT, "fake 1.0")
    assert made["amx"] in done.stdout
    assert made["reason"] in done.stdout
    assert "__AMX_INT8__" in made["features"]
    assert [environment.run(CXX=cxx).returncode, environment.run("--check").returncode] == [0, 0]
    assert len(environment.builds()) == 1
    assert not list(tmp_path.glob(".llama.*"))


@pytest.mark.parametrize("change", ["processor", "compiler", "arguments", "record", "library"])
def test_it_is_compiled_again_where_what_it_depends_on_is_another(
    environment: Environment, tmp_path: Path, change: str
) -> None:
    [cxx] = compiler(tmp_path)
    environment.run(CXX=cxx)
    asked = {}
    if change == "processor":
        compiler(tmp_path, native="#define __AVX2__ 1")
    elif change == "compiler":
        compiler(tmp_path, plain=STORES)
    elif change == "arguments":
        asked = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF"}
    elif change == "record":
        environment.record.write_text("[]")
    else:
        shutil.rmtree(next(environment.home.rglob("llama_cpp_python-1.0.dist-info")))
    assert environment.run("--check", CXX=cxx, **asked).returncode == 1
    done = environment.run(CXX=cxx, **asked)
    assert done.returncode == 0, done.stderr
    assert len(environment.builds()) == 2
    # What was asked for once holds: the next call is told nothing.
    assert environment.run("--check").returncode == 0


def test_a_build_that_failed_is_made_again(environment: Environment, tmp_path: Path) -> None:
    [cxx] = compiler(tmp_path)
    environment.run(CXX=cxx)
    done = environment.run(CXX=cxx, CMAKE_ARGS="-DGGML_CUDA=ON", PIP_FAILS="1")
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert environment.run("--check", CXX=cxx).returncode == 1


def test_amx_that_is_left_out_is_switched_off(environment: Environment, tmp_path: Path) -> None:
    [cxx] = compiler(tmp_path, code=1)
    assert environment.run(CXX=cxx, CXXFLAGS="-pipe").returncode == 0
    [build] = environment.builds()
    assert build["source"] == SOURCE
    assert build["CXXFLAGS"] == f"-pipe {build_llama.NO_AMX}"
