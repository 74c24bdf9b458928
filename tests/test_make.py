"""The Makefile's own behaviour: its list of targets, and what it says when there is no usable Python."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    "Run make in an empty folder that has only the files it reads."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)

    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PIP_"))}

    def run(*args): return subprocess.run(["make", *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    run.folder = tmp_path
    return run


def python(folder, version):
    "A stand-in for an interpreter of that version, which can be asked for it and writes down what else it was told to do."
    path = folder / "python"
    old = version < (3, 10)
    path.write_text(f'''#!/bin/sh
case "$1" in
  --version) echo "Python {version[0]}.{version[1]}.0";;
  -c) exit {int(old)};;
  *) echo "$@${{PIP_CONSTRAINT:+ ($PIP_CONSTRAINT)}}" >> "{folder}/told"; mkdir -p .venv/bin; ln -sf "{path}" .venv/bin/python;;
esac
''')
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_help_is_the_default_and_lists_every_target(make):
    listed = make().stdout
    assert make("help").stdout == listed
    for target in ("demo", "test", "export", "notebooks"): assert f"make {target}" in listed


def test_a_missing_interpreter_is_named(make):
    done = make("test", "PYTHON=no-such-python")
    assert done.returncode and "no-such-python was not found. Install Python 3.10 or later" in done.stdout
    assert not (make.folder / ".venv").exists()


def test_an_old_interpreter_is_refused(make):
    done = make("demo", python(make.folder, (3, 9)))
    assert done.returncode and "Python 3.9.0 is too old: unify_rl needs 3.10 or later" in done.stdout
    assert not (make.folder / "told").exists() and not (make.folder / ".venv").exists()


def test_set_up_is_done_once_and_again_when_the_requirements_change(make):
    interpreter, told = python(make.folder, (3, 10)), make.folder / "told"
    assert make(".venv/.ready", interpreter).returncode == 0
    assert told.read_text().splitlines() == ["-m venv .venv", "-m pip install -e .[dev] (constraints.txt)"]
    make(".venv/.ready", interpreter)
    assert len(told.read_text().splitlines()) == 2
    make("-W", "constraints.txt", ".venv/.ready", interpreter)
    assert len(told.read_text().splitlines()) == 4
