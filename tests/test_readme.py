"""What the README says is so: its commands run, its Python runs, its table of cards is the arithmetic's."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from executor.capacity.table import readme_tables
from tests.reference import REPO

README = (REPO / "README.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(language: str) -> list[str]:
    lines = [line for block in fenced(language) for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def run(command: str, folder) -> subprocess.CompletedProcess:
    """As typed in the repository's root, with this interpreter; what it writes goes to `folder`."""
    words = [word.replace("output/answers.jsonl", str(folder / "answers.jsonl")) for word in shlex.split(command)]
    words += ["--set", f"model_config.output_path={folder}"]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)


ENDLESS = ("tests/run.sh", " serve")
QUICK_STARTS = {  # README's own commands where it has one
    "qwen3_vl": "bash infer.sh ./config/quickstart.yaml",
    "qwen2_5_vl": "bash infer.sh ./config/quickstart_qwen2_5_vl.yaml",
    "qwen3_vl_moe": "bash infer.sh ./config/quickstart_qwen3_vl_moe.yaml "
    "--set data_config.results_path=output/answers.jsonl",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A command's folder and outcome; several tests look at one."""

    @functools.cache
    def ran(command):
        folder = tmp_path_factory.mktemp("ran")
        return folder, run(command, folder)

    return ran


@pytest.mark.parametrize("command", [c for c in commands("bash") if not any(word in c for word in ENDLESS)])
def test_commands_run_as_written(command, ran):
    folder, done = ran(command)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.strip().splitlines()[-1])
    if document["command"] == "check":
        assert document["ok"] is True
        return
    if document["command"] == "plan":
        assert document["fits"] is True and document["predicted"]["tpot_ms"] > 0
        return
    if document["command"] == "bench":
        assert document["failed"] == 0 and len(document["points"]) == 2
        assert list(folder.rglob("*.png"))
        return
    if document["command"] == "eval":
        assert document["samples"] > 0 and document["failed"] == 0
        return
    assert document["outputs"] and all(row["error"] is None and row["text"] for row in document["outputs"])


def test_the_server_answers_the_line_that_it_prints(tmp_path):
    """Started as written (on a free port), asked by its own curl line, and ended by SIGTERM."""
    (command,) = (c for c in commands("bash") if " serve" in c)
    words = [*shlex.split(command), "--set", f"model_config.output_path={tmp_path}", "server_config.port=0"]
    environment = os.environ | {"PYTHON": sys.executable}
    with subprocess.Popen(
        words, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            curl = next(found[1] for line in server.stderr if (found := re.search(r"to try: (curl .*)", line)))
            reply = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
            server.terminate()
            document = json.loads(server.communicate(timeout=120)[0].strip().splitlines()[-1])
        finally:
            server.kill()
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"], reply.stderr
    assert server.returncode == 0 and document["command"] == "serve" and document["answered"] >= 1


def test_the_suite_is_a_command_of_the_readme():
    """It is what runs this test; running it again here would not end."""
    assert "bash tests/run.sh" in commands("bash") and (REPO / "tests" / "run.sh").is_file()


def test_commands_that_need_weights_say_so(tmp_path):
    (command,) = commands("text")
    done = run(command, tmp_path)
    assert done.returncode == 2
    assert "there is no folder /data/" in json.loads(done.stdout.strip().splitlines()[-1])["error"]


def test_python_as_written(monkeypatch, capsys):
    (code,) = fenced("python")
    monkeypatch.chdir(REPO)
    exec(compile(code, "README.md", "exec"), {})
    first, again = capsys.readouterr().out.strip().splitlines()
    assert first == again and "square" in first


def test_the_tables_of_cards_are_those_of_plan():
    for table in readme_tables():
        assert table in README


def test_troubleshooting_quotes_messages_that_exist():
    """Every quoted part of a heading stands in some message; `...`, N and M are what a message fills in."""
    folders = [REPO / name for name in ("executor", "models", "dataset", "emulator")]
    source = "".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))
    source += "".join(path.read_text() for path in (REPO / "executor" / "scripts").glob("*.sh"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that go over several lines
    headings = re.findall(r"^### (.*)$", (REPO / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    quoted = [text for heading in headings for text in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) >= 10
    for text in quoted:
        for part in re.split(r"\.\.\.|\b[NM]\b", text):
            assert part.strip() in source, text


def test_links_lead_somewhere():
    for page in (REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "family, convention", [("qwen3_vl", "qwen3"), ("qwen2_5_vl", "qwen2_5"), ("qwen3_vl_moe", "qwen3")]
)
def test_the_quick_starts_answer_right(family, convention, ran):
    """What the first command of the README says about the sample files is the generator's own truth."""
    assert family == "qwen2_5_vl" or QUICK_STARTS[family] in commands("bash")
    _, done = ran(QUICK_STARTS[family])
    truth = json.loads((REPO / "dataset" / "media" / "questions.json").read_text())
    for row in json.loads(done.stdout.strip().splitlines()[-1])["outputs"]:
        (media,) = row["media"]
        right = {entry["question"]: entry[convention] for entry in truth[media]}
        assert row["text"] == right[row["prompt"]], (media, row["prompt"])


def test_the_life_of_a_request_names_functions_that_exist():
    text = (REPO / "CONTRIBUTING.md").read_text().split("## Life of a request")[1].split("## To add")[0]
    named = re.findall(r"`([\w/]+\.py):(\w+)`", text)
    assert len(named) >= 12
    for file, function in named:
        assert re.search(rf"^\s*(async )?def {function}\(", (REPO / file).read_text(), flags=re.MULTILINE), (
            f"{file}:{function}"
        )
    for file in re.findall(r"`(executor/[\w/]+\.py)`", text):
        assert (REPO / file).is_file(), file
