"""Real clients against a real server: `bash tests/run.sh -m long tests/clients`, or `-k NAME` for one of them.

A client is a script of this folder that says in its head which packages it needs (the inline metadata of Python
scripts, a `// packages:` line for Node); it is run in an environment of its own below .cache/clients, as
`SCRIPT URL MODEL_FOLDER`, against one server over the tiny Qwen3-VL. It prints what it has seen and exits with 0 when
all of it is right.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference import REPO

FOLDER = Path(__file__).parent
MODEL = REPO / "models/tiny/qwen3_vl"
SCRIPTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix == ".mjs" or (
    path.suffix == ".py" and path.read_text().startswith("# /// script")
))  # fmt: skip
MEDIA = REPO / ".cache/clients/media"
PREPARE_S, RUN_S = 1800, 900

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a process of its own, started as a user does."""
    shutil.copytree(REPO / "dataset/media", MEDIA, dirs_exist_ok=True)
    overrides = ["server_config.port=0", f"server_config.allowed_local_media_path={MEDIA}"]
    command = ["bash", "infer.sh", "config/quickstart.yaml", "serve", "--set", *overrides]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = None
        for line in process.stderr:
            found = re.search(r"http://[\w.]+:\d+", line)
            if found:
                break
        assert found, "the server has not started"
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield found.group()
        process.terminate()
        assert process.wait(60) == 0
        drain.wait(10)


def packages_of(script: Path) -> list[str]:
    text = script.read_text()
    if script.suffix == ".mjs":
        return re.search(r"^// packages: (.+)$", text, re.M)[1].split()
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S)[1]
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"]


def python_of(script: Path) -> str:
    """An interpreter with the script's packages; made once."""
    home = REPO / ".cache/clients" / script.stem
    if not (home / "ready").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        command = [home / "bin/python", "-m", "pip", "install", "--quiet", *packages_of(script)]
        subprocess.run(command, check=True, timeout=PREPARE_S)
        (home / "ready").touch()
    return str(home / "bin/python")


def node_of(script: Path) -> Path:
    """A folder with the script's packages and a copy of it."""
    home = REPO / ".cache/clients" / script.stem
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "node_modules").exists():
        subprocess.run(["npm", "install", "--silent", *packages_of(script)], cwd=home, check=True, timeout=PREPARE_S)
    return Path(shutil.copy(script, home))


@pytest.mark.parametrize("name", SCRIPTS)
def test_client(name: str, url: str) -> None:
    script = FOLDER / name
    if script.suffix == ".mjs":
        if not (shutil.which("npm") and shutil.which("node")):
            pytest.skip("no node and npm here")
        command = ["node", str(node_of(script))]
    else:
        command = [python_of(script), str(script)]
    done = subprocess.run([*command, url, str(MODEL)], timeout=RUN_S, capture_output=True, text=True, cwd=REPO)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
