"""The doctor as a command: exit status, report, JSON line, and that it needs nothing but an old Python."""

import ast
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from executor.commands import doctor
from executor.doctor.findings import Finding, lines
from executor.doctor.versions import PAIRS
from executor.host.env import REPO_ROOT
from executor.host.machine import Machine
from tests.doctor import fake


def run(machine, arguments):
    """Exit status, the lines for people, the JSON line."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = doctor.main(arguments, machine)
    *report, last = out.getvalue().splitlines()
    return status, report, json.loads(last)


def test_exit_status():
    machine = fake.laptop()
    machine.files["/home/user/r.yaml"] = f"model_config:\n  model_path: {fake.FOLDER}\n  device: npu\n"
    assert run(machine, [])[0] == 0
    assert run(machine, ["r.yaml"])[0] == 1
    assert run(machine, ["r.yaml", "--set", "model_config.device=cpu"])[0] == 0
    assert run(machine, ["--set", "model_config.device=cpu", "model_config.soc=null", "r.yaml"])[0] == 0
    assert run(fake.laptop(python_version=(3, 8, 18)), [])[0] == 0, "no recipe, nothing that cannot run"
    for arguments, said in (
        (["gone.yaml"], "there is no recipe"),
        (["a", "b"], "usage"),
        (["r.yaml", "--set", "x"], "section.key"),
        (["r.yaml", "--set", "model_config.soc="], "write null for none"),
    ):
        status, _, document = run(machine, arguments)
        assert status == 2 and said in document["error"] and set(document) == {"command", "error"}


def test_report_is_aligned_and_narrow():
    _, report, document = run(fake.duo(), [])
    column = next(line.index("2 x 310P3") for line in report if "2 x 310P3" in line)
    heads = [line for line in report if not line.startswith(" ")]
    assert len(heads) == len(document["findings"])
    assert all(line[column - 1] == " " and line[column] != " " for line in heads)
    assert max(map(len, report)) <= 120
    long = lines([Finding("a", "error", "word " * 60, "x", "do " * 60)])
    assert max(map(len, long)) <= 120 and any(line.strip().startswith("-> do") for line in long)


def test_fake_machine_has_the_real_ones_methods():
    public = {name for name in vars(Machine) if not name.startswith("_")}
    assert public <= set(dir(fake.FakeMachine))


def test_this_machine():
    """No fake: whatever this computer is, the doctor answers."""
    assert run(None, [])[0] == 0
    machine = Machine()
    assert machine.port_is_free(0) and machine.is_local("127.0.0.1") and machine.resolve("") is None
    assert machine.run(["no-such-program"]) is None
    assert machine.run([machine.python_path, "-c", "import time; time.sleep(9)"], 0.1).status == 124


SOURCES = [
    *(REPO_ROOT / "executor/doctor").glob("*.py"),
    *(REPO_ROOT / "executor/host").glob("*.py"),
    REPO_ROOT / "executor/host/env.py",
    REPO_ROOT / "executor/commands/doctor.py",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_standard_library_and_python_3_8(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or name.startswith(("executor.doctor", "executor.host")), name


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_runs_on_older_pythons(version):
    pythons = [Path(f"/usr/bin/python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    python = next((path for path in pythons if path.exists()), None)
    if python is None:
        pytest.skip(f"no Python {version} here")
    done = subprocess.run(
        [python, "-m", "executor.commands.doctor"], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and document["findings"], done.stderr


def test_page_has_the_table_of_pairs():
    page = (REPO_ROOT / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| (\d\S*) \| (\d.*) \|$", page, re.MULTILINE)
    told = {(name.split()[0], cann) for cann, names in rows if "." in cann for name in names.split(", ")}
    assert told == {(name, cann) for name, known in PAIRS.items() for cann in known}


def test_page_names_every_finding():
    page = (REPO_ROOT / "docs/doctor.md").read_text()
    wish = doctor.Wish(fake.FOLDER, "npu", world_size=2)
    machine = fake.set_env(fake.a2(taken_ports={8000}), ips=["192.168.0.10", "192.168.0.11"])
    for row in doctor.examine(machine, fake.ROOT, wish)["findings"]:
        assert re.search(rf"\b{row['id']}\b", page), row["id"]


def test_a_text_is_taken_as_it_stands():
    """As infer.sh takes it: no YAML in the name of a folder."""
    machine = fake.laptop()
    machine.files["/home/user/r.yaml"] = "model_config:\n  model_path: gone\n  device: cpu\n"
    _, _, document = run(machine, ["r.yaml", "--set", "model_config.model_path=/data/@a: [b]"])
    (row,) = (row for row in document["findings"] if row["id"] == "model_path")
    assert "/data/@a: [b]" in row["found"]


def test_a_reader_that_has_gone_is_no_error():
    code = "import sys, time; from executor.commands import doctor; time.sleep(0.3); sys.exit(doctor.main([]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_the_report_points_to_plan():
    machine = fake.laptop()
    machine.files["/home/user/r.yaml"] = f"model_config:\n  model_path: {fake.FOLDER}\n  device: cpu\n"
    assert "bash infer.sh CONFIG.yaml plan" in run(machine, [])[1][-1]
    assert "bash infer.sh r.yaml plan" in run(machine, ["r.yaml"])[1][-1]
