"""Folders of compiled graphs: the newest few stay, and those in use."""

import os
import subprocess
import sys

from executor.engine.graph_folder import GraphFolder, remove_old
from tests.reference import REPO


def folders(root) -> set[str]:
    return {folder.name for folder in root.iterdir()}


def test_old_folders_go_and_those_in_use_stay(tmp_path, caplog):
    held = {}
    for number in range(8):
        held[number] = GraphFolder(tmp_path, f"key{number}", rank=0)
        (held[number].path / "compiled.bin").write_text("x")
        os.utime(tmp_path / f"key{number}", (1000 + number, 1000 + number))
    assert folders(tmp_path) == {f"key{number}" for number in range(8)}, "all in use"
    for number in (0, 1, 3, 5, 6, 7):
        held[number].release()
    (tmp_path / "not ours").mkdir()
    with caplog.at_level("INFO"):
        newest = GraphFolder(tmp_path, "new", rank=3)
    assert newest.path == tmp_path / "new" / "rank_03"
    # key4 to key7 are the four newest, key2 is in use.
    assert folders(tmp_path) == {"new", "key2", "key4", "key5", "key6", "key7", "not ours"}
    assert "removed 3 old folders" in caplog.text
    assert (tmp_path / "key7" / "rank_00" / "compiled.bin").read_text() == "x"
    for folder in (newest, held[2], held[4]):
        folder.release()


def test_a_folder_that_another_process_uses_stays(tmp_path):
    code = (
        "import sys; from pathlib import Path; from executor.engine.graph_folder import GraphFolder\n"
        "folder = GraphFolder(Path(sys.argv[1]), 'theirs', 1); print(folder.path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline().strip().endswith("theirs/rank_01")
        assert remove_old(tmp_path, "ours", kept=0) == []
        other.stdin.close()
        other.wait()
    assert remove_old(tmp_path, "ours", kept=0) == [tmp_path / "theirs"] and not folders(tmp_path)


def test_a_folder_removed_while_it_is_claimed_is_made_again(tmp_path, monkeypatch):
    import fcntl
    import shutil

    calls = []

    def flock(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / "key")  # by a rank that came just before

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = GraphFolder(tmp_path, "key", rank=0)
    assert len(calls) == 2 and folder.path.is_dir()
    folder.release()
