"""The job's store: who can reach it, and what is said of something that is none."""

import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from executor.errors import UserError
from executor.host.env import REPO_ROOT
from executor.host.machine import Machine
from executor.launch import store as stores
from executor.launch.layout import LOCAL_ADDRESS


def listening(port: int) -> set[str]:
    """The addresses on which something listens on `port`, as the kernel shows them: 0100007F is 127.0.0.1."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


@pytest.fixture
def store():
    return stores.serve(LOCAL_ADDRESS, 0, Machine())


def test_a_store_listens_on_its_own_address_alone(store):
    opened, port = store
    assert listening(port) == {"0100007F"}
    stores.join(LOCAL_ADDRESS, port).set("a", "b")
    assert opened.get("a") == b"b"
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))


def test_torch_shares_the_store_of_its_process(store):
    """init_process_group opens one on the same port (multi_tenant)."""
    opened, port = store
    again = PrefixStore(
        "recipe", TCPStore(LOCAL_ADDRESS, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    )
    again.set("a", "c")
    assert opened.get("a") == b"c" and listening(port) == {"0100007F"}


def test_a_port_that_is_taken(store):
    with pytest.raises(UserError, match=f"the master port {store[1]} is taken"):
        stores.serve(LOCAL_ADDRESS, store[1], Machine())
    assert stores.serve(LOCAL_ADDRESS, 0, Machine())[1] > store[1]


def test_a_name_that_leads_here_by_way_of_another_machine(monkeypatch, caplog):
    """A service's name under another launcher: rank 0 has to listen all the same."""
    there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.1", 0))]
    monkeypatch.setattr(stores.socket, "getaddrinfo", lambda *arguments, **more: there)
    with socket.socket(fileno=stores._listen("head.cluster", 0)) as server:
        assert listening(server.getsockname()[1]) == {"00000000"}
    assert "head.cluster is no address of this machine" in caplog.text


def test_what_answers_and_is_no_store_is_one_plain_message():
    """Without 26 lines of C++ frames before it; ranks that are started later warn as ever."""
    with socket.socket() as server:
        server.bind((LOCAL_ADDRESS, 0))
        server.listen()

        def hang_up():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        code = f"""
import os
from executor.host.env import quiet_torch
with quiet_torch():
    from executor.launch import store as stores
assert "TORCH_CPP_LOG_LEVEL" not in os.environ
stores.CONNECT_S = 1
stores.join("{LOCAL_ADDRESS}", {server.getsockname()[1]}, 5)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
        server.shutdown(socket.SHUT_RDWR)
    assert re.search(r"UserError: what answers on the master .* is no job of this project", done.stderr)
    assert "frame #" not in done.stderr and "[c10d]" not in done.stderr
