"""Starts jobs as a user does, and looks for what they leave behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from executor.host.env import REPO_ROOT as REPO

CONFIG = "config/quickstart.yaml"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Job:
    """The launchers of one job, one a node, and the folder of its logs on each."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    launchers: list[subprocess.Popen] = field(default_factory=list)

    def start(
        self,
        *settings: str,
        prompt: str = "",
        prefix=(),
        command=None,
        cwd=REPO,
        config=CONFIG,
        run="probe",
        **variables,
    ):
        """One launcher; `prefix` puts it on another node, `command` is another way to start it, `run` what it runs."""
        node = len(self.launchers)
        line = [*prefix, *(command or [sys.executable, "-m", "executor"]), config, run, "--set"]
        line += [f"model_config.output_path={self.folder / f'node{node}'}", *settings]
        line += [f"data_config.prompt={prompt}"] if prompt else []
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        inherited |= {
            "RECIPE_COMMANDS": "probe=tests.launch.probe",
            "PYTHONPATH": f"{cwd}:{REPO}",
            "TEST_MARK": self.mark,
        }
        inherited |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RECIPE_NODES": ""}
        inherited = {key: value for key, value in (inherited | variables).items() if value is not None}
        with (self.folder / f"out{node}").open("w") as out, (self.folder / f"err{node}").open("w") as err:
            launcher = subprocess.Popen(line, cwd=cwd, env=inherited, stdout=out, stderr=err)
        self.launchers.append(launcher)
        return self

    def wait(self, timeout_s: float = 60) -> list[int]:
        """The exit status of each launcher."""
        deadline = time.monotonic() + timeout_s
        return [launcher.wait(max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def out(self, node: int = 0) -> str:
        return (self.folder / f"out{node}").read_text()

    def err(self, node: int = 0) -> str:
        return (self.folder / f"err{node}").read_text()

    def document(self, node: int = 0) -> dict:
        """The last line of stdout; no other line is a JSON document."""
        lines = self.out(node).splitlines()
        assert not [line for line in lines[:-1] if line.startswith("{")]
        return json.loads(lines[-1])

    def log(self, rank: int, timeout_s: float = 60) -> Path:
        """A rank's log, once it is there."""
        return self.until(lambda: next(iter(self.folder.glob(f"*/logs/*/rank_{rank:02d}.log")), None), timeout_s)

    def sleeper(self, rank: int) -> int:
        """The process id of a rank that was told to sleep, once it does."""
        log = self.log(rank)
        return int(self.until(lambda: re.search(r"is process (\d+)", log.read_text()))[1])

    def until(self, found, timeout_s: float = 60):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = found()
            if value:
                return value
            time.sleep(0.05)
        raise TimeoutError(self.err())

    def processes(self) -> list[int]:
        """Everything of this job that still runs."""
        left = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if f"TEST_MARK={self.mark}".encode() in (folder / "environ").read_bytes():
                        left.append(int(folder.name))
        return left

    def ends(self, after: float, within_s: float = 10) -> list[int]:
        """The exit statuses; everything is gone `within_s` of `after` (time.monotonic)."""
        codes = self.wait(within_s + 5)
        self.until(lambda: not self.processes(), within_s + 5)
        took = time.monotonic() - after
        print(f"gone after {took:.1f} s")
        assert took < within_s
        return codes

    def clear(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()
