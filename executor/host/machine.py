"""What the doctor may ask of a computer: files, commands, packages, ports, addresses. Reads only, changes nothing.

Tests hand in another class with the same methods, and so have an A2, an A3, a 300I DUO or a laptop.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass

from executor.host.env import environment
from executor.host.limits import host_memory_bytes
from executor.host.nodes import is_address, parse_ip_addr


@dataclass(frozen=True)
class Output:
    """What a command printed. Status 124: it did not end in time; 126: it could not be started."""

    status: int
    stdout: str
    stderr: str = ""


class Machine:
    """This computer, and the Python that runs the doctor."""

    def __init__(self) -> None:
        self.environment = environment()
        self.python_version: tuple[int, ...] = tuple(sys.version_info[:3])
        self.python_path = sys.executable
        self.system = f"{platform.system()} {platform.release()}"
        self.arch = platform.machine()
        self.cwd = os.getcwd()

    def read(self, path: str) -> str | None:
        """The text of a file, None when it is not there or not to be read."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def is_dir(self, path: str) -> bool:
        return os.path.isdir(path)

    def accessible(self, path: str) -> bool:
        """Whether this user may read and write it (a device node)."""
        return os.access(path, os.R_OK | os.W_OK)

    def glob(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern))

    def size_bytes(self, path: str) -> int:
        """Size of a file, 0 when it is not there."""
        try:
            return os.path.getsize(path)
        except OSError:
            return 0

    def run(self, command: list[str], timeout_s: float = 30) -> Output | None:
        """Run a command without a shell; None when there is no such program."""
        # npu-smi lies in /usr/local/bin or sbin, which a service's PATH may lack.
        path = ":".join((self.environment.get("PATH", ""), "/usr/local/bin", "/usr/local/sbin", "/usr/sbin"))
        program = shutil.which(command[0], path=path)
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Output(124, "", f"no answer within {timeout_s:g} s")
        except OSError as error:
            return Output(126, "", str(error))
        return Output(done.returncode, done.stdout, done.stderr)

    def package(self, name: str) -> str | None:
        """The installed version of a Python package, None when it is not installed."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def port_is_free(self, port: int) -> bool:
        """Whether a server could listen on it now."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("", port))
            except OSError:
                return False
            return True

    def addresses(self) -> dict[str, list[str]]:
        """Interfaces and their addresses; {} where the `ip` command is missing."""
        shown = self.run(["ip", "-o", "addr", "show"], 10)
        return parse_ip_addr(shown.stdout) if shown and shown.status == 0 else {}

    def resolve(self, host: str) -> str | None:
        """The address of a host name; an address is its own."""
        if is_address(host) or not host:
            return host or None
        if re.fullmatch(r"[\d.]+", host):  # 192.168.1 is no address, though old rules read it as 192.168.0.1
            return None
        try:
            return socket.getaddrinfo(host, None)[0][4][0]
        except (OSError, UnicodeError):
            return None

    def address_towards(self, host: str) -> str | None:
        """The local address from which packets to `host` leave. Nothing is sent."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, 9))
                return probe.getsockname()[0]
            except OSError:
                return None

    def is_local(self, address: str) -> bool:
        """Whether a server could listen on this address here, i.e. whether it is this machine's."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as server:
            try:
                server.bind((address, 0))
            except OSError:
                return False
            return True

    def memory_bytes(self) -> int:
        """Host memory that is still to be had, the container's limit included."""
        return host_memory_bytes()

    def free_disk_bytes(self, path: str) -> int | None:
        """Free space where `path` is or would be made."""
        path = os.path.abspath(path)
        while path and not os.path.exists(path) and os.path.dirname(path) != path:
            path = os.path.dirname(path)
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return None
