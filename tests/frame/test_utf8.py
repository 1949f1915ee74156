"""That text is UTF-8 in any locale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

STARTS = r"""
import os, sys
from pathlib import Path
from tasks.frame import utf8

utf8.ensure()
Path(sys.argv[1]).write_text("gr\u00f6\u00dfe \u898f\u6a21")
print("\u898f\u6a21", sys.argv[2] == "\u898f\u6a21", os.getpid())
"""
LOCALES = {
    "ASCII": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "the system's": {},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_files_and_streams_are_utf8_in_the_same_process(name: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(file), "規模"], env=os.environ | LOCALES[name], stdout=subprocess.PIPE
    )
    said = process.communicate()[0].decode()
    assert said.split() == ["規模", "True", str(process.pid)]
    assert file.read_bytes().decode() == "größe 規模"


@pytest.mark.parametrize("module", ["flows.cli", "tasks"])
def test_both_commands_start_so(module: str, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; print(sys.flags.utf8_mode, file=open({str(starts)!r}, 'a'))"
    )
    env = os.environ | LOCALES["ASCII"] | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert subprocess.run([sys.executable, "-m", module, "--help"], env=env, capture_output=True).returncode == 0
    assert starts.read_text().split() == ["0", "1"]
