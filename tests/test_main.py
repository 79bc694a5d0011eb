"""The contract of all commands: exit status, one JSON document as the last line, errors in plain words."""

import ast
import json
import logging
import shutil
import subprocess
import sys

import pytest

from executor import __main__ as launch
from executor import command_line
from executor.commands.generate import run as generate
from executor.errors import UserError
from executor.host.streams import READER_GONE, print_document
from tests.reference import REPO

QUICK = "config/quickstart.yaml"


@pytest.fixture(autouse=True)
def quiet_logs(monkeypatch):
    """`main` sets logging up for a process of its own; the tests' process keeps its handlers."""
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)


def typed(capsys, *arguments: str) -> tuple[int, dict, str]:
    status = launch.main(arguments)
    printed = capsys.readouterr()
    return status, json.loads(printed.out.splitlines()[-1]), printed.err


def test_generate_is_the_default(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(generate, "run", lambda recipe: (seen.append(recipe), ({"command": "generate"}, 0))[1])
    assert typed(capsys, QUICK)[:2] == (0, {"command": "generate"})
    assert typed(capsys, QUICK, "generate", "--set", "generation_config.seed=7")[0] == 0
    assert [recipe.generation.seed for recipe in seen] == [None, 7]


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("mend this"), 2, "mend this"),
        (RuntimeError("the disk is full"), 1, "RuntimeError: the disk is full"),
        (ValueError("a library's"), 1, "ValueError: a library's"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("2 answers are saved"), 130, "interrupted: 2 answers are saved"),
    ],
)
def test_exit_status_of_what_a_command_raises(monkeypatch, capsys, error, status, words):
    def fail(recipe):
        raise error

    monkeypatch.setattr(generate, "run", fail)
    got, document, stderr = typed(capsys, QUICK)
    assert (got, document) == (status, {"command": "generate", "error": words})
    assert ("Traceback" in stderr) == (status == 1)


@pytest.mark.parametrize(
    "arguments, command, words",
    [
        ([], "launch", "CONFIG.yaml"),
        ([QUICK, "--sett", "a.b=1"], "launch", "unrecognized arguments: --sett"),
        ([QUICK, "generat"], "launch", "unknown command 'generat'; commands: generate, serve"),
        ([QUICK, "bench", "speed"], "launch", "bench speed: it takes latency, throughput, serve, compare"),
        ([QUICK, "--tp", "2"], "launch", "--tp is no flag here; write --set parallel_config.world_size=N"),
        (["config/absent.yaml"], "generate", "there is no recipe config/absent.yaml"),
        ([QUICK, "--set", "model_config.model_pth=a"], "generate", "did you mean 'model_path'?"),
        ([QUICK, "--set", "scheduler_config.max_num_seqs=many"], "generate", "a whole number, at least 1"),
        ([QUICK, "--set", "model_config.model_path=./absent"], "generate", "there is no folder ./absent"),
        ([QUICK, "--set", "model_config.device=cuda"], "generate", "the cuda backend is not part of this release"),
    ],
)
def test_mistakes_of_the_user(capsys, arguments, command, words):
    status, document, stderr = typed(capsys, *arguments)
    assert (status, document["command"]) == (2, command)
    assert words in document["error"]
    assert words in stderr and "Traceback" not in stderr


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(command in text for command in command_line.COMMANDS)
    assert "--set generation_config.temperature" in text and "--question" in text


@pytest.mark.parametrize("environment", [{}, {"PYTHON": sys.executable}])
def test_infer_sh_from_another_directory(tmp_path, environment):
    """The whole chain of one line, up to a mistake that is found before anything is loaded."""
    base = {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)} | environment
    line = ["bash", str(REPO / "infer.sh"), "config/quickstart.yaml", "--set", "generation_config.top_p=7"]
    done = subprocess.run(line, cwd=tmp_path, env=base, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "--set generation_config.top_p=7" in json.loads(done.stdout.splitlines()[-1])["error"]


def test_infer_sh_refuses_an_interpreter_that_is_not_there(tmp_path):
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": "/absent/python"}
    line = ["bash", str(REPO / "infer.sh"), "config/quickstart.yaml"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "there is no such interpreter" in json.loads(done.stdout.splitlines()[-1])["error"]


def copied(root, *folders: str):
    """A repository of its own, whose infer.sh finds no interpreter that would do."""
    for name in ("executor/scripts", "executor/host", "config", *folders):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("infer.sh", "executor/__init__.py", "executor/errors.py", "executor/command_line.py"):
        shutil.copy(REPO / name, root / name)
    (root / "executor" / "recipe").mkdir()
    for name in ("__init__.py", "place.py"):
        shutil.copy(REPO / "executor" / "recipe" / name, root / "executor" / "recipe" / name)
    (root / "requirements.txt").write_text("nobodyhasthis>=1.0\n")
    (root / ".venv.lock").mkdir()  # a set-up would end here
    return root


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["-h"], 0, "usage: bash infer.sh"),
        ([], 2, "CONFIG.yaml"),
        (["config/quickstart.yaml", "bench", "speed"], 2, "bench speed: it takes latency"),
        (["config/quickstrt.yaml"], 2, "did you mean 'quickstart.yaml'?"),
        (["config/quickstart.yaml", "--set", "data_config.prompt="], 2, "write null for none"),
        (["config/quickstart.yaml", "--set", "nonsense"], 2, "section.key=value"),
        (["config/quickstart.yaml", "--sett", "a.b=1"], 2, "unrecognized arguments: --sett"),
        (["config/quickstart.yaml"], 1, "the set-up needs to write .venv"),
    ],
)
def test_what_needs_no_installation_is_answered_before_it(tmp_path, arguments, status, words):
    """By a python3 that has nothing but its standard library."""
    root = copied(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    line = ["bash", str(root / "infer.sh"), *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert words in done.stdout
    if status:
        assert "Traceback" not in done.stderr and json.loads(done.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize("name", ["errors", "command_line", "host/env", "host/streams", "host/limits", "recipe/place"])
def test_what_answers_first_is_readable_to_an_old_python(name):
    ast.parse((REPO / "executor" / f"{name}.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("way", ["link", "sh", "family"])
def test_infer_sh_by_other_ways(tmp_path, way):
    """Through a link, with sh, and from the folder of a model family as other repositories have it."""
    (tmp_path / "link").symlink_to(REPO / "infer.sh")
    line, folder = {
        "link": (["bash", str(tmp_path / "link")], tmp_path),
        "sh": (["sh", "infer.sh"], REPO),
        "family": (["bash", "infer.sh"], REPO / "models" / "qwen2_5_vl"),
    }[way]
    line += ["./config/quickstart.yaml", "--top-p", "7"]
    environment = {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "generation_config.top_p: got 7" in json.loads(done.stdout.splitlines()[-1])["error"]


# stdout


def test_a_reader_that_has_gone_is_no_error():
    """`| head -1`: nothing is said of the closed pipe, and the status is SIGPIPE's."""
    code = (
        "import time; from executor import __main__ as launch, command_line; launch.run = lambda *a: (time.sleep(0.3), "
    )
    code += "print('late', flush=True)); launch.end(launch.main(['config/quickstart.yaml']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == READER_GONE


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch, capsys):
    def fail(recipe):
        raise BrokenPipeError("a socket's")

    monkeypatch.setattr(generate, "run", fail)
    assert typed(capsys, QUICK)[:2] == (1, {"command": "generate", "error": "BrokenPipeError: a socket's"})


def test_a_closed_stdout_gets_nothing(monkeypatch):
    """`>&-`: Python has no stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    print_document({"command": "check"})


def test_a_terminal_gets_a_short_document(monkeypatch, capsys):
    document = {"command": "generate", "outputs": [{"text": "a" * 90}] * 9, "model": "m", "error": "e" * 500}
    print_document(document)
    assert json.loads(capsys.readouterr().out) == document
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_document(document)
    short = json.loads(capsys.readouterr().out)
    assert (short["command"], short["outputs"], short["error"]) == ("generate", "9 entries", "e" * 500)
    assert "a pipe or a file gets the whole" in short["shortened"]
    print_document({"command": "check", "ok": True})
    assert json.loads(capsys.readouterr().out) == {"command": "check", "ok": True}
