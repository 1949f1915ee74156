#!/usr/bin/env python3
"""Compile llama-cpp-python so that it is right on this processor, and as fast as it can be there.

    .venv/bin/python infra/build_llama.py .cache/llama_cpp_python-VERSION.tar.gz [--check]

llama.cpp uses AMX where the processor has it, and two things make that wrong. GCC 12 believes that `ldtilecfg` reads 8
of its 64 bytes and drops the stores of the others, so that it faults or multiplies tiles of a wrong shape. And llama.cpp
loads that configuration once in a thread, while oneDNN, torch's own user of AMX, loads and releases another one in the
same thread. Hence: the configuration is loaded each time; a barrier goes before it where the compiler needs one; and
where neither can be had, AMX is left out.

What was chosen, and why, is printed and written to share/llama.cpp/build.json of the environment. It is compiled again
where the version, the processor's features, the compiler's answer or CMAKE_ARGS is not what is written there.
`--check` compiles nothing: exit code 1 says that it would be. The standard library alone.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RECORD = Path(sysconfig.get_path("data")) / "share" / "llama.cpp" / "build.json"
SOURCE = Path("vendor", "llama.cpp", "ggml", "src", "ggml-cpu", "amx", "mmq.cpp")
# Each replacement fits exactly once, or this is not the source that it was made for.
RELOAD = (
    ("    static thread_local bool done = false;\n\n    if (done) {\n        return;\n    }\n\n", ""),
    ("    done = true;\n", ""),
)
BARRIER = (("    _tile_loadconfig(&tc);\n", '    asm volatile("" ::: "memory");\n    _tile_loadconfig(&tc);\n'),)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
# As ggml_tile_config_init of that file does it.
PROBE = """
#include <immintrin.h>
struct configuration { unsigned char palette, row, reserved[14]; unsigned short bytes[16]; unsigned char rows[16]; };
void load() {
    alignas(64) configuration c = {};
    c.palette = 1;
    for (int i = 0; i < 8; i++) { c.rows[i] = i < 2 ? 8 : 16; c.bytes[i] = i == 2 || i == 3 ? 32 : 64; }
#ifdef BARRIER
    asm volatile("" ::: "memory");
#endif
    _tile_loadconfig(&c);
}
"""
RIGHT, KEPT, LEFT_OUT = "amx: compiled right by this compiler", "amx: kept, with a barrier", "amx: left out"
UNUSED, GOOD, DROPS = "unused", "right", "drops stores before ldtilecfg"  # what the compiler does with AMX
AMX_ASKED = re.compile(r"-DGGML_(AMX_\w+|CPU_ALL_VARIANTS)(:\w+)?=(ON|1|TRUE|YES)\b", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile llama-cpp-python for this processor.")
    parser.add_argument("tarball", type=Path, help="source package, llama_cpp_python-VERSION.tar.gz")
    parser.add_argument("--check", action="store_true", help="compile nothing; exit code 1 if that is needed")
    args = parser.parse_args()
    version = args.tarball.name.removeprefix("llama_cpp_python-").removesuffix(".tar.gz")
    recorded = load(RECORD)
    # What was asked for once holds until something else is: `make run` need not be told again.
    cmake_args = os.environ.get("CMAKE_ARGS", recorded.get("cmake_args", ""))
    compiler = which_compiler(cmake_args, os.environ.get("CXX", recorded.get("compiler", "")))
    if not shutil.which(compiler[0]):  # nobody could compile it again, nor say whether that would change anything
        print(f"llama-cpp-python {installed() or 'is not installed'}: there is no C++ compiler ({compiler[0]})")
        return 0 if installed() == version else 1
    want = wanted(version, compiler, cmake_args)
    if installed() == version and all(recorded.get(key) == value for key, value in want.items()):
        print(f"llama-cpp-python {version}: {recorded['amx']} ({recorded['reason']})")
        return 0
    if args.check:
        print(f"llama-cpp-python is to be compiled: {difference(recorded, want, installed())}")
        return 1
    with tempfile.TemporaryDirectory(prefix=".llama.", dir=args.tarball.parent) as folder:
        subprocess.run(["tar", "-xzf", args.tarball, "-C", folder, "--strip-components=1"], check=True)
        source = Path(folder) / SOURCE
        text, amx, reason = decide(source.read_text(encoding="utf-8"), want["compiler_with_amx"])
        source.write_text(text, encoding="utf-8")
        print(f"llama-cpp-python {version}: {amx} ({reason})", flush=True)
        RECORD.unlink(missing_ok=True)  # until the new one is installed, nobody knows what is there
        compile_and_install(Path(folder), compiler, cmake_args, no_amx=amx == LEFT_OUT)
    made = {**want, "amx": amx, "reason": reason, "compiler": shlex.join(compiler), "is": first_line(compiler)}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


def wanted(version: str, compiler: list[str], cmake_args: str) -> dict[str, Any]:
    """All that the result depends on."""
    native = not re.search(r"-DGGML_NATIVE(:\w+)?=(OFF|0|FALSE|NO)\b", cmake_args, re.IGNORECASE)
    flags = ["-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"]
    features = processor_features(compiler, flags) if native else []
    if "__AMX_INT8__" in features:
        amx = probe(compiler, flags)
    else:
        amx = probe(compiler, ["-mamx-tile"]) if AMX_ASKED.search(cmake_args) else UNUSED
    return {"version": version, "cmake_args": cmake_args, "features": features, "compiler_with_amx": amx}


def which_compiler(cmake_args: str, cxx: str) -> list[str]:
    """The C++ compiler that CMake takes, with its arguments; `cxx` as in the environment variable CXX."""
    asked = re.search(r"-DCMAKE_CXX_COMPILER(?::\w+)?=(\S+)", cmake_args)
    words = [asked[1]] if asked else shlex.split(cxx)
    return words if words and shutil.which(words[0]) else ["c++"]


def processor_features(compiler: list[str], flags: list[str]) -> list[str]:
    """What the compiler finds on this processor: the macros that are defined with `flags` alone. Where it knows no such
    flags, what the kernel says.
    """
    plain, native = (_macros([*compiler, *more]) for more in ([], flags))
    if native:
        return sorted(native - plain)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return sorted(found[1].split()) if found else [platform.machine()]


def _macros(command: list[str]) -> set[str]:
    done = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define ")}


def probe(compiler: list[str], flags: list[str]) -> str:
    """Whether the compiler stores all that `ldtilecfg` reads: then a barrier before it changes no instruction."""
    plain, barrier = (_before_ldtilecfg([*compiler, "-O3", *flags, *more]) for more in ([], ["-DBARRIER"]))
    if plain is None or barrier is None:
        return "cannot compile ldtilecfg"
    return GOOD if plain == barrier else DROPS


def _before_ldtilecfg(command: list[str]) -> list[str] | None:
    """The instructions' names, sorted, from the start of the probe up to `ldtilecfg`."""
    done = subprocess.run([*command, "-S", "-o", "-", "-x", "c++", "-"], input=PROBE, capture_output=True, text=True)
    # Neither labels nor directives, nor the remarks around inline assembly.
    found = re.findall(r"^\s+([a-z]\w*)\b", done.stdout, re.MULTILINE)
    if done.returncode != 0 or "ldtilecfg" not in found:
        return None
    return sorted(found[: found.index("ldtilecfg")])


def decide(source: str, compiler_with_amx: str) -> tuple[str, str, str]:
    """The text of `mmq.cpp` to compile, what becomes of AMX, and why."""
    if compiler_with_amx == UNUSED:
        return source, LEFT_OUT, "not needed: this build is for processors without it"
    if compiler_with_amx not in (GOOD, DROPS):
        return source, LEFT_OUT, f"the compiler {compiler_with_amx}"
    right = compiler_with_amx == GOOD
    try:
        text = replaced(source, RELOAD if right else RELOAD + BARRIER)
    except ValueError as error:
        return source, LEFT_OUT, f"llama.cpp's {SOURCE.name} is not the one that is known how to mend: {error}"
    if right:
        return text, RIGHT, "all stores precede ldtilecfg"
    return text, KEPT, "without it the compiler drops stores before ldtilecfg"


def replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """`text` with each replacement made, exactly once.

    Raises:
        ValueError: a replacement fits nowhere, or more than once.
    """
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"{old.strip().splitlines()[0]!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    return text


def compile_and_install(folder: Path, compiler: list[str], cmake_args: str, no_amx: bool) -> None:
    """Have pip compile and install the unpacked source; what it needs comes with the other packages."""
    environment = {**os.environ, "CXX": shlex.join(compiler)}
    # Said aloud: CMake's default is OFF, and with it the slowest code, where SOURCE_DATE_EPOCH is set.
    environment["CMAKE_ARGS"] = cmake_args if "GGML_NATIVE" in cmake_args else f"-DGGML_NATIVE=ON {cmake_args}".strip()
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    if no_amx and _macros([*compiler, *NO_AMX.split()]):  # a compiler that does not know the flags has no AMX
        for name in ("CFLAGS", "CXXFLAGS"):
            environment[name] = f"{environment.get(name, '')} {NO_AMX}".strip()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(folder)], env=environment, check=True)


def installed() -> str:
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return ""


def load(record: Path) -> dict[str, Any]:
    """What was written when it was compiled; empty if nothing was, or cannot be read."""
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def difference(recorded: Mapping[str, Any], want: Mapping[str, Any], have: str) -> str:
    """Why it is to be compiled, in words."""
    if have != want["version"]:
        return f"{have or 'nothing'} is installed, {want['version']} is wanted"
    if not recorded:
        return f"{RECORD} does not say what was compiled"
    names = {"features": "the processor", "cmake_args": "CMAKE_ARGS", "compiler_with_amx": "the compiler"}
    return "another " + ", another ".join(names.get(key, key) for key in want if recorded.get(key) != want[key])


def first_line(compiler: list[str]) -> str:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    return (done.stdout or done.stderr).partition("\n")[0]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(map(str, error.cmd))} ended with exit code {error.returncode}", file=sys.stderr)
        sys.exit(1)
