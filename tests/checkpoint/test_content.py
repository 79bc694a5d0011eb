"""A checkpoint is known by its bytes, whatever names, sizes and dates say."""

import fcntl
import json
import os
import time

import pytest

from executor.checkpoint import content
from executor.checkpoint.content import content_digest


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"hidden_size": 8}')
    for number in range(3):
        (made / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    return made


@pytest.fixture
def settled(monkeypatch):
    """Files of the test count as old enough to be remembered."""
    monkeypatch.setattr(content, "SETTLED_S", -1.0)


def digest(folder):
    return content_digest(folder, sorted(folder.glob("*.safetensors")), folder.parent / "checkpoints.json")


def changed(path, place):
    """One byte is another; size and dates stay."""
    before = os.stat(path)
    found = bytearray(path.read_bytes())
    found[place] ^= 1
    with open(path, "r+b") as file:
        file.write(found)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json"])
def test_one_byte_is_another_checkpoint(folder, settled, name):
    first = digest(folder)
    assert digest(folder) == first
    time.sleep(0.02)  # the resolution of ctime
    changed(folder / name, 7)
    assert digest(folder) != first
    changed(folder / name, 7)
    assert digest(folder) == first, "the same bytes again"


def test_bytes_are_read_once(folder, settled, monkeypatch):
    first = digest(folder)
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert digest(folder) == first
    assert os.stat(folder.parent / "checkpoints.json").st_mode & 0o777 == 0o600


def test_a_file_that_has_just_changed_is_not_remembered(folder):
    digest(folder)
    assert not (folder.parent / "checkpoints.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": [1, 2]}', "null", "\x00"])
def test_a_damaged_memory_is_read_over(folder, settled, text):
    first = digest(folder)
    (folder.parent / "checkpoints.json").write_text(text)
    assert digest(folder) == first
    assert len(json.loads((folder.parent / "checkpoints.json").read_text())) >= 4


def test_the_same_bytes_elsewhere_are_the_same_checkpoint(folder, tmp_path, settled):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "other")
    assert digest(copy) == digest(folder)


@pytest.fixture
def held(folder):
    """Another process has the lock."""
    with open(folder.parent / "checkpoints.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def test_a_lock_that_is_held_is_not_waited_for_where_all_is_remembered(folder, settled, monkeypatch):
    first = digest(folder)
    monkeypatch.setattr(content.time, "sleep", lambda _: pytest.fail("waits"))
    with open(folder.parent / "checkpoints.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert digest(folder) == first


def test_a_lock_that_is_held_for_long_is_told_and_not_waited_for(folder, settled, held, monkeypatch, caplog):
    monkeypatch.setattr(content, "PATIENCE_S", 0.3)
    with caplog.at_level("INFO"):
        first = digest(folder)
    told = [record.message for record in caplog.records if "checkpoints.lock" in record.message]
    assert len(told) == 2 and "waiting" in told[0] and "still held" in told[1]
    held.close()
    assert digest(folder) == first


def test_a_lock_that_comes_free_is_waited_for(folder, settled, held, monkeypatch, caplog):
    monkeypatch.setattr(content.time, "sleep", lambda _: held.close())
    with caplog.at_level("INFO"):
        digest(folder)
    assert "still held" not in caplog.text and (folder.parent / "checkpoints.json").exists()


@pytest.mark.parametrize("name", ["checkpoints.json", "checkpoints.lock"])
@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir, lambda path: os.symlink("elsewhere", path)])
def test_what_is_no_regular_file_is_not_opened(folder, name, made):
    made(folder.parent / name)
    with pytest.raises(OSError) as refused:
        digest(folder)
    assert str(refused.value.filename) == str(folder.parent / name)
