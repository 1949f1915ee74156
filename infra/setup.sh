#!/usr/bin/env bash
# Build the environment in .venv: what `make run` and `make test` call when constraints.txt or pyproject.toml
# is newer than the last set-up. Every step looks at what is there first, so a set-up that was stopped, or one
# that failed for want of a compiler or of the network, goes on where it was when it is called again.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
cache=.cache
python=${PYTHON:-python3}
pin() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }
llama_version=$(pin llama-cpp-python)
[ -n "$llama_version" ] || llama_version=$(pin llama_cpp_python)

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
step='set-up'
# Run a command that takes minutes, and say each minute that it still does.
slowly() {
    local what=$1 code=0
    shift
    (for ((minute = 1; ; minute++)); do sleep 60 >&- 2>&-; kill -0 $$ 2>/dev/null || exit; say "still $what, $minute min"; done) &
    local clock=$!
    "$@" || code=$?
    kill "$clock" 2>/dev/null && wait "$clock" 2>/dev/null || true
    return "$code"
}
trap 'printf "error: %s failed, see above; mend it and call make again: it goes on from here\n" "$step" >&2' ERR

step='looking for what is needed'
command -v "$python" >/dev/null || die "$python was not found: install Python 3.11 or newer, or say which: make run PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is $("$python" -V 2>&1 | cut -d' ' -f2), 3.11 or newer is needed: make run PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv module: apt-get install python3-venv"
command -v git >/dev/null || die 'git was not found: apt-get install git'
command -v "${CXX:-c++}" >/dev/null || die 'no C++ compiler was found: apt-get install g++, or name one: make run CXX=clang++'
[ -n "$llama_version" ] || die 'constraints.txt has no line llama-cpp-python==...: restore it with git checkout constraints.txt'

step='making the virtual environment'
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "virtual environment in $venv"
    "$python" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

step='downloading the source package of llama-cpp-python'
mkdir -p "$cache"
tarball=$cache/llama_cpp_python-$llama_version.tar.gz
if ! tar -tzf "$tarball" >/dev/null 2>&1; then
    say "source package of llama-cpp-python $llama_version"
    rm -f "$tarball"
    pip download --quiet --no-deps --no-binary llama-cpp-python -d "$cache" "llama-cpp-python==$llama_version"
fi

step='unpacking the GGUF converter'
# From the very package that is compiled next, so that converter and runtime cannot drift apart.
converter=$venv/share/llama.cpp
if [ "$(cat "$converter/VERSION" 2>/dev/null || true)" != "$llama_version" ]; then
    say 'GGUF converter'
    rm -rf "$converter" "$converter.new"
    mkdir -p "$converter.new"
    inside=llama_cpp_python-$llama_version/vendor/llama.cpp
    tar -xzf "$tarball" -C "$converter.new" --strip-components=3 \
        "$inside/convert_hf_to_gguf.py" "$inside/conversion" "$inside/gguf-py" "$inside/LICENSE"
    echo "$llama_version" >"$converter.new/VERSION"
    mv "$converter.new" "$converter"
fi

step='compiling llama-cpp-python'
say 'llama-cpp-python: about 7 minutes on 2 cores where it is to be compiled'
slowly "$step" "$venv/bin/python" infra/build_llama.py "$tarball"

step='installing the packages'
say 'packages, 3 GB in all'
slowly "$step" pip install --quiet -c constraints.txt -e ".[${SLMOPS_EXTRAS:-all,dev}]" "torch==$(pin torch)"
step='checking what was installed'
say 'checking, with a self-test of the runtimes'
"$venv/bin/slmops" doctor >"$cache/doctor.txt" || { cat "$cache/doctor.txt"; die 'slmops doctor found something missing, see above'; }

touch "$venv/.ready"
say 'ready'
