"""The set-up: which interpreter is used, and that a .venv is taken for whole only when it is.

pip is replaced by a function that lays down an empty package, or fails; everything else is the real script.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import REPO

FAKE_PIP = r"""
_pip() {
    echo "$*" >>"$ROOT/pip.log"
    [ ! -f "$ROOT/no_network" ] || return 1
    local site name
    site="$("$PYTHON_FOUND" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    for name in $(cat "$ROOT"/requirements*.txt | cut -d'>' -f1); do
        mkdir -p "$site/$name-1.0.dist-info"
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: 1.0\n' "$name" >"$site/$name-1.0.dist-info/METADATA"
    done
}
"""


class Place:
    """A repository with the real scripts, a requirement that nothing meets, and a python3 on its PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "executor").mkdir()
        (root / "executor" / "scripts").symlink_to(REPO / "executor" / "scripts")
        (root / "requirements.txt").write_text("nobodyhasthis>=1.0\n")
        (root / "requirements-test.txt").write_text("northis>=1.0\n")
        (root / "bin").mkdir()
        # Bringing pip into a venv takes seconds, and nobody calls it here.
        self.interpreter(
            f'[ "$1 $2" != "-m venv" ] || {{ shift 2; set -- -m venv --without-pip "$@"; }}\n{sys.executable} "$@"'
        )

    def interpreter(self, script: str, name: str = "python3") -> Path:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def find(self, *files: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        script = f'set -euo pipefail\nROOT="{self.root}"\nsource executor/scripts/find_python.sh\n{FAKE_PIP}'
        script += f'find_python "$ROOT" {" ".join(files or ["requirements.txt"])}\necho "$PYTHON_FOUND"\n'
        search = path or f"{self.root / 'bin'}:{os.environ['PATH']}"
        variables = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.root,
            env=variables | {"PATH": search} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def found(self, *files: str, **environment: str) -> Path:
        done = self.find(*files, **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip().splitlines()[-1])

    def refused(self, status: int, **environment: str) -> str:
        done = self.find(**environment)
        assert done.returncode == status, done.stderr
        message = json.loads(done.stdout.strip().splitlines()[-1])["error"]
        assert message in done.stderr
        return message

    def pip_calls(self) -> int:
        log = self.root / "pip.log"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_an_interpreter_that_has_everything_is_used_as_it_is(place):
    (place.root / "requirements.txt").write_text("pytest>=1.0  # here\n")
    assert place.found() == place.root / "bin" / "python3"
    assert not (place.root / ".venv").exists()


def test_the_second_run_starts_at_once(place):
    venv = place.root / ".venv" / "bin" / "python"
    assert place.found() == venv
    calls = place.pip_calls()
    assert calls > 0
    assert place.found() == venv
    assert place.pip_calls() == calls


def test_what_failed_or_was_interrupted_is_made_anew(place):
    (place.root / "no_network").touch()
    assert "pip could not install" in place.refused(1)
    remains = place.root / ".venv" / "half"
    remains.touch()
    assert "pip could not install" in place.refused(1)
    assert not remains.exists()
    (place.root / "no_network").unlink()
    assert place.found() == place.root / ".venv" / "bin" / "python"


def test_more_requirements_extend_what_is_there(place):
    place.found()
    marker = place.root / ".venv" / "marker"
    marker.touch()
    assert place.found("requirements.txt", "requirements-test.txt") == place.root / ".venv" / "bin" / "python"
    assert marker.exists()
    calls = place.pip_calls()
    place.found()
    place.found("requirements.txt", "requirements-test.txt")
    assert place.pip_calls() == calls
    (place.root / "requirements.txt").write_text("nobodyhasthis>=1.0\nnewone>=1.0\n")
    place.found()
    assert place.pip_calls() == calls + 1 and marker.exists()


def test_a_torch_that_is_there_is_kept_and_seen(place):
    """It may lie in a venv of the user's own, which --system-site-packages alone would not show."""
    own = place.root / "own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    site = next((own / "lib").glob("python*/site-packages"))
    (site / "torch.py").write_text("")
    (site / "torch-2.9.1.dist-info").mkdir()
    (site / "torch-2.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    place.interpreter(
        f'[ "$1 $2" != "-m venv" ] || {{ shift 2; set -- -m venv --without-pip "$@"; }}\n{own}/bin/python "$@"'
    )
    python = place.found()
    assert "--constraint" in (place.root / "pip.log").read_text()
    assert "torch==2.13" not in (place.root / "pip.log").read_text()
    code = "import importlib.metadata as m, torch; print(m.version('torch'), torch.__file__)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["2.9.1", str(site / "torch.py")]


def test_an_old_python_is_refused(place):
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        place.interpreter('[ "$1" != "-V" ] || echo "Python 3.10.13"\nexit 1', name)
    message = place.refused(2)
    assert "Python 3.11 or newer is needed; found: Python 3.10.13" in message


def test_a_newer_python_under_its_own_name_is_found(place):
    real = (place.root / "bin" / "python3").read_text()
    place.interpreter("exit 1", "python3")
    place.interpreter("exit 1", "python3.14")
    place.interpreter("exit 1", "python3.13")
    place.interpreter(real.removeprefix("#!/bin/sh\n"), "python3.12")
    (place.root / "requirements.txt").write_text("pytest>=1.0\n")
    assert place.found() == place.root / "bin" / "python3.12"


def test_the_interpreter_that_the_user_names(place):
    assert "there is no such interpreter" in place.refused(2, PYTHON="/no/such/python")
    assert "lacks what this project needs: nobodyhasthis is missing" in place.refused(2, PYTHON=sys.executable)
    (place.root / "requirements.txt").write_text("pytest>=1.0\n")
    assert place.found(PYTHON=sys.executable) == Path(sys.executable)
