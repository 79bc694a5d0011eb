"""The set-up: which interpreter is used, and that a .venv is taken for whole only when it is.

pip is replaced by a function that lays down an empty package, or fails; everything else is the real script.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reference import REPO

FAKE_PIP = r"""
_pip() {
    echo "$*" >>"$ROOT/pip.log"
    echo "Collecting nobodyhasthis>=1.0"
    echo "  Downloading https://index/packages/ab/nobodyhasthis-1.0-cp311-cp311-linux_x86_64.whl (190.3 MB)"
    echo "  Downloading northis-2.5.tar.gz (700 kB)"
    [ ! -f "$ROOT/slow" ] || sleep "$(cat "$ROOT/slow")"
    [ ! -f "$ROOT/no_network" ] || { echo "ERROR: no route to the index" >&2; return 1; }
    local site name
    site="$("$PYTHON_FOUND" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    for name in $(cat "$ROOT"/requirements*.txt | cut -d'>' -f1); do
        mkdir -p "$site/$name-1.0.dist-info"
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: 1.0\n' "$name" >"$site/$name-1.0.dist-info/METADATA"
    done
}
"""


LOG = ".cache/setup.log"


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

    def start(self, *files: str, before: str = "", start_new_session: bool = False, **environment: str):
        script = f'set -euo pipefail\nROOT="{self.root}"\nsource executor/scripts/find_python.sh\n{FAKE_PIP}{before}\n'
        script += f'find_python "$ROOT" {" ".join(files or ["requirements.txt"])}\necho "$PYTHON_FOUND"\n'
        variables = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.root,
            env=variables | {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    def find(self, *files: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*files, before=before, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

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


# What the set-up says


def test_the_set_up_is_a_few_lines_and_a_log(place):
    done = place.find()
    said = done.stderr.splitlines()
    assert len(said) <= 8 and all(line.startswith("set-up: ") for line in said), done.stderr
    assert f"log: {place.root / LOG}" in done.stderr
    assert re.search(r"^set-up: installing what requirements.txt names: \d+ s, 191 MB downloaded$", done.stderr, re.M)
    assert done.stdout.count("\n") == 1, "pip's words are in the log"
    log = (place.root / LOG).read_text()
    assert "== making .venv" in log and log.count("Collecting nobodyhasthis") == place.pip_calls() > 0


def test_a_set_up_that_fails_names_its_log_and_shows_the_end(place):
    (place.root / "no_network").touch()
    done = place.find()
    assert done.returncode == 1
    assert "  | ERROR: no route to the index" in done.stderr
    assert json.loads(done.stdout)["error"].endswith(f"All of it is in {place.root / LOG}")


def test_a_slow_stage_gives_signs_of_life(place):
    (place.root / "slow").write_text("1.5")
    done = place.find(before="PROGRESS_S=0.1 STILL_S=1")
    words = r"installing what requirements.txt names: still at it after [12] s: northis-2.5 \(700 kB\)"
    assert re.search(words, done.stderr)


def test_an_interrupted_set_up_leaves_nothing_running(place):
    """Ctrl-C reaches every process of the terminal's group."""
    (place.root / "slow").write_text("30")
    process = place.start(start_new_session=True)
    log = place.root / LOG
    deadline = time.monotonic() + 20
    while not (log.exists() and "Collecting" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) != 0
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
            continue
        return
    pytest.fail("something of the set-up still runs")


def test_a_repository_that_cannot_be_written(place):
    """As on a read-only mount: not even the lock can be made."""
    (place.root / ".venv.lock").mkdir()
    message = place.refused(1)
    assert f"needs to write .venv into {place.root}, and that cannot be written" in message
    assert "PYTHON=/path/to/python" in message


def test_a_log_that_cannot_be_written_lies_elsewhere(place, tmp_path):
    (place.root / ".cache").touch()
    done = place.find()
    assert done.returncode == 0, done.stderr
    assert Path(re.search(r"log: (\S+)", done.stderr)[1]).is_file()


def test_checkouts_that_share_an_environment_share_its_lock(place, tmp_path):
    """Else one would tear down what the other is making."""
    (place.root / ".venv").symlink_to(tmp_path / "shared")
    (tmp_path / "shared.lock").mkdir()  # neither can be taken
    assert "that cannot be written" in place.refused(1)
