"""Entries on disk: whole and checked or not there, bounded, private, safe among several processes."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from executor.engine.disk_cache import folder as module
from executor.engine.disk_cache.folder import HEADER_BYTES, EntryFolder, make_root
from executor.errors import UserError
from tests.reference import REPO

KEY = "0a1b"


def name(number: int) -> str:
    return f"{number:032x}.kv"


def opened(root, key=KEY, capacity_bytes=10**9) -> EntryFolder:
    return EntryFolder(make_root(root), key, capacity_bytes)


def read(folder: EntryFolder, number: int, num_bytes: int) -> bytes | None:
    buffer = bytearray(num_bytes)
    return bytes(buffer) if folder.read(name(number), memoryview(buffer)) else None


def path_of(folder: EntryFolder, number: int):
    return folder.path / name(number)


def test_what_is_written_is_read_by_a_later_process(tmp_path):
    first = opened(tmp_path / "a" / "root")
    first.write(name(1), b"first entry")
    first.write(name(2), b"")
    again = opened(tmp_path / "a" / "root")
    assert again.names == {name(1), name(2)}
    assert again.total_bytes == 11 + 2 * HEADER_BYTES
    assert read(again, 1, 11) == b"first entry" and read(again, 2, 0) == b""
    assert read(again, 3, 11) is None


def test_folders_and_files_are_private(tmp_path):
    before = os.umask(0)
    try:
        folder = opened(tmp_path / "root")
        folder.write(name(1), b"x")
        folder.trim()
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "root").st_mode & 0o777 == 0o700
    assert os.stat(folder.path).st_mode & 0o777 == 0o700
    assert os.stat(path_of(folder, 1)).st_mode & 0o777 == 0o600
    os.chmod(folder.path, 0o755)
    opened(tmp_path / "root")
    assert os.stat(folder.path).st_mode & 0o777 == 0o700


DAMAGES = {
    "a bit is another": lambda content: content[:70] + bytes([content[70] ^ 1]) + content[71:],
    "its header is another": lambda content: b"x" + content[1:],
    "another length": lambda content: content[:8] + (7).to_bytes(8, "little") + content[16:],
    "half written": lambda content: content[: len(content) // 2],
    "a header alone": lambda content: content[:HEADER_BYTES],
    "a part of a header": lambda content: content[:10],
    "empty": lambda content: b"",
    "zeros as a power cut leaves them": lambda content: bytes(len(content)),
    "too long": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_dropped(tmp_path, caplog, damage):
    folder, content = opened(tmp_path), random.Random(0).randbytes(1000)
    folder.write(name(1), content)
    folder.write(name(2), content)
    path_of(folder, 1).write_bytes(DAMAGES[damage](path_of(folder, 1).read_bytes()))
    with caplog.at_level("WARNING"):
        assert read(folder, 1, 1000) is None
    assert "computed again" in caplog.text and folder.num_damaged == 1
    assert not path_of(folder, 1).exists() and name(1) not in folder.names
    assert read(folder, 2, 1000) == content, "the others stay"
    folder.write(name(1), content)
    assert read(folder, 1, 1000) == content, "and it comes again"


@pytest.mark.parametrize("moved", ["to another name", "to another key"])
def test_an_entry_belongs_to_its_name_and_key(tmp_path, moved):
    folder, other = opened(tmp_path), opened(tmp_path, "ffff")
    folder.write(name(1), b"abc")
    target = (folder, 2) if moved == "to another name" else (other, 1)
    path_of(*target).write_bytes(path_of(folder, 1).read_bytes())
    assert read(*target, 3) is None
    assert read(folder, 1, 3) == b"abc"


def test_the_least_recently_used_go_first_over_all_keys_and_nothing_else(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / f"{3:032x}.kv").write_bytes(bytes(10_000))
    old, folder = opened(tmp_path, "beef"), opened(tmp_path, capacity_bytes=10 * (100 + HEADER_BYTES))
    (folder.path / "notes.TXT").write_bytes(bytes(10_000))
    now_ns = time.time_ns()
    for number in range(3):
        old.write(name(number), bytes(100), now_ns - 10**12 + number)
    for number in range(7):
        folder.write(name(number), bytes(100), now_ns + number)
    folder.touch(name(0), now_ns + 100)
    old.touch(name(2), now_ns + 200)
    folder.write(name(50), bytes(100), now_ns + 300)
    total = sum(path.stat().st_size for path in tmp_path.glob("prefix-*/*.kv"))
    assert total <= folder.capacity_bytes and total == folder.total_bytes
    assert not path_of(old, 0).exists() and not path_of(old, 1).exists() and path_of(old, 2).exists()
    assert path_of(folder, 0).exists() and path_of(folder, 50).exists()
    assert (foreign / f"{3:032x}.kv").exists() and (folder.path / "notes.TXT").exists()
    assert read(old, 0, 100) is None, "its reader is told"


def test_two_writers_stay_within_the_bound_together(tmp_path):
    one, two = (opened(tmp_path, key, capacity_bytes=50_000) for key in ("aa", "bb"))
    for number in range(400):
        for folder in (one, two):
            folder.write(name(number), bytes(1000))
            total = sum(path.stat().st_size for path in tmp_path.glob("prefix-*/*.kv"))
            assert total <= 50_000 + module.LOOK_SHARE * 50_000 + 1000


def test_what_crashed_processes_left_is_removed(tmp_path):
    folder = opened(tmp_path)
    old, new = folder.path / ".tmp-1", folder.path / ".tmp-2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    opened(tmp_path)
    assert not old.exists() and new.exists(), "the newer one may be somebody's"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder, real = opened(tmp_path), os.write

    def full(file, content):
        if len(content) > 100:
            return real(file, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(name(1), bytes(1000))
    assert not list(folder.path.iterdir()) and not folder.names and not folder.total_bytes


def test_a_root_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"scheduler_config.prefix_cache_path: .*file/below cannot be written to"):
        make_root(tmp_path / "file" / "below")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    opened(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="another user"):
        opened(tmp_path)


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path):
    folder = opened(tmp_path)
    folder.path.rmdir()
    folder.write(name(1), b"abc")
    assert read(folder, 1, 3) == b"abc"


def test_a_root_that_is_removed_meanwhile_is_made_again(tmp_path):
    folder = opened(tmp_path / "a" / "root")
    shutil.rmtree(tmp_path / "a")
    folder.write(name(1), b"abc")
    assert read(folder, 1, 3) == b"abc"
    assert os.stat(tmp_path / "a" / "root").st_mode & 0o777 == 0o700


def test_a_bound_that_is_lowered_holds_from_the_start(tmp_path):
    old, folder, now_ns = opened(tmp_path, "beef"), opened(tmp_path), time.time_ns()
    for number in range(10):
        old.write(name(number), bytes(100), now_ns - 10**12 + number)
        folder.write(name(number), bytes(100), now_ns + number)
    capacity_bytes = 10 * (100 + HEADER_BYTES)
    again = opened(tmp_path, capacity_bytes=capacity_bytes)
    total = sum(path.stat().st_size for path in tmp_path.glob("prefix-*/*.kv"))
    assert total == again.total_bytes == module.KEPT_SHARE * capacity_bytes
    assert again.names == {name(number) for number in range(1, 10)}, "the least recently used go first"
    opened(tmp_path, capacity_bytes=capacity_bytes)
    assert sum(path.stat().st_size for path in tmp_path.glob("prefix-*/*.kv")) == total


@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize("made", [os.mkdir, os.mkfifo, lambda path: os.symlink("elsewhere", path)])
def test_what_has_the_name_of_an_entry_is_left_alone_and_told_once(tmp_path, caplog, made, is_filled):
    folder = opened(tmp_path)
    made(path_of(folder, 1))
    if is_filled and path_of(folder, 1).is_dir():
        (path_of(folder, 1) / "file").touch()
    for again in (folder, opened(tmp_path)):
        caplog.clear()
        for _ in range(2):
            assert read(again, 1, 3) is None and not again.has(name(1))
        assert again.names == set() and again.blocked == {name(1)}
        assert [record.message for record in caplog.records] == [
            f"{path_of(folder, 1)}: no regular file; it is left alone, and what belongs there is not kept"
        ]
    assert os.path.lexists(path_of(folder, 1))


def test_a_damaged_entry_that_cannot_be_removed_is_told_as_such(tmp_path, monkeypatch, caplog):
    folder = opened(tmp_path)
    folder.write(name(1), b"abc")
    path_of(folder, 1).write_bytes(b"x")

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refused)
    assert read(folder, 1, 3) is None
    assert "computed again, and cannot be removed (Operation not permitted)" in caplog.text


def test_a_link_in_place_of_the_folder_is_called_one(tmp_path):
    (tmp_path / "mine").mkdir()
    for target in ("mine", "nowhere"):
        (tmp_path / f"prefix-{KEY}").symlink_to(target)
        with pytest.raises(OSError, match="a link"):
            opened(tmp_path)
        (tmp_path / f"prefix-{KEY}").unlink()


def test_readers_see_whole_entries_while_others_write_and_remove(tmp_path):
    """Two processes write one folder that is far too small for both, and this one reads it all the while."""
    code = (
        "import sys; from pathlib import Path; from executor.engine.disk_cache.folder import EntryFolder\n"
        "folder = EntryFolder(Path(sys.argv[1]), '0a1b', 400_000)\n"
        "for round in range(30):\n"
        "    for number in range(40):\n"
        "        folder.write(f'{number:032x}.kv', bytes([number]) * 20_000)\n"
    )
    folder = opened(tmp_path, capacity_bytes=10**9)
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO) for _ in range(2)]
    ends = threading.Event()
    threading.Thread(target=lambda: ([writer.wait() for writer in writers], ends.set()), daemon=True).start()
    num_found = 0
    try:
        while not ends.is_set():
            for number in range(40):
                found = read(folder, number, 20_000)
                assert found in (None, bytes([number]) * 20_000)
                num_found += found is not None
    finally:
        for writer in writers:
            with suppress(ProcessLookupError):
                writer.kill()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert num_found and not folder.num_damaged
