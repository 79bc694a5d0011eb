"""The contract of all commands: exit status, one JSON document as the last line, errors in plain words."""

import json
import logging
import subprocess
import sys

import pytest

from executor import __main__ as launch
from executor.commands.generate import run as generate
from executor.errors import UserError
from tests.reference import REPO

QUICK = "config/quickstart.yaml"


@pytest.fixture(autouse=True)
def quiet_logs(monkeypatch):
    """`main` sets logging up for a process of its own; the tests' process keeps its handlers."""
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)


def command_line(capsys, *arguments: str) -> tuple[int, dict, str]:
    status = launch.main(arguments)
    printed = capsys.readouterr()
    return status, json.loads(printed.out.splitlines()[-1]), printed.err


def test_generate_is_the_default(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(generate, "run", lambda recipe: (seen.append(recipe), ({"command": "generate"}, 0))[1])
    assert command_line(capsys, QUICK)[:2] == (0, {"command": "generate"})
    assert command_line(capsys, QUICK, "generate", "--set", "generation_config.seed=7")[0] == 0
    assert [recipe.generation.seed for recipe in seen] == [None, 7]


def test_overrides_may_be_repeated_or_listed():
    parsed = launch.parse([QUICK, "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert parsed.overrides == ["a.b=1", "c.d=2", "e.f=3"]


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("mend this"), 2, "mend this"),
        (RuntimeError("the disk is full"), 1, "RuntimeError: the disk is full"),
        (ValueError("a library's"), 1, "ValueError: a library's"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_status_of_what_a_command_raises(monkeypatch, capsys, error, status, words):
    def fail(recipe):
        raise error

    monkeypatch.setattr(generate, "run", fail)
    got, document, stderr = command_line(capsys, QUICK)
    assert (got, document) == (status, {"command": "generate", "error": words})
    assert ("Traceback" in stderr) == (status == 1)


@pytest.mark.parametrize(
    "arguments, command, words",
    [
        ([], "launch", "CONFIG.yaml"),
        ([QUICK, "--sett", "a.b=1"], "launch", "unrecognized arguments: --sett"),
        ([QUICK, "generat"], "launch", "unknown command 'generat'; commands: generate, serve"),
        ([QUICK, "bench"], "bench", "bench is not part of this release yet; there is: generate"),
        (["config/absent.yaml"], "generate", "there is no recipe config/absent.yaml"),
        ([QUICK, "--set", "model_config.model_pth=a"], "generate", "did you mean 'model_path'?"),
        ([QUICK, "--set", "scheduler_config.max_num_seqs=many"], "generate", "a whole number, at least 1"),
        ([QUICK, "--set", "model_config.model_path=./absent"], "generate", "there is no folder ./absent"),
        ([QUICK, "--set", "model_config.device=cuda"], "generate", "the cuda backend is not part of this release"),
    ],
)
def test_mistakes_of_the_user(capsys, arguments, command, words):
    status, document, stderr = command_line(capsys, *arguments)
    assert (status, document["command"]) == (2, command)
    assert words in document["error"]
    assert words in stderr and "Traceback" not in stderr


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(command in text for command in launch.COMMANDS)
    assert "--set data_config.prompt" in text


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
