"""The command quantize stopped and started again: it goes on with its own work, and with nobody else's."""

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest

from executor.calibrate import identity, run
from executor.calibrate import work as work_module
from executor.commands import quantize
from executor.commands.quantize import work
from executor.commands.tool import run_tool, terminate_as_interrupt
from executor.host import locks
from tests.calibrate.making import quantized, tiny, words
from tests.commands.test_quantize import refused

SHARD = "quant_model_weights-00001-of-00001.safetensors"


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """(source, folder, words) of a w8a16 that was stopped before its third stage; started again it goes on."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("qwen3_vl"), source)
    real = run.run_stage

    def stopping(job, stage, number, *more):
        if number == 2:
            raise KeyboardInterrupt
        real(job, stage, number, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="the same words go on where this"):
        patch.setattr(run, "run_stage", stopping)
        quantized(source, out, "w8a16", None)
    return source, out, words(source, out, "w8a16", None)


def test_nothing_goes_on_over_other_files_of_the_checkpoint(unfinished, capsys):
    source, _, argv = unfinished
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        before = (source / file).read_text()
        (source / file).write_text(before + "\n")
        assert f"an unfinished quantization with other files of the checkpoint ({file})" in refused(capsys, *argv)
        (source / file).write_text(before)


def test_nothing_goes_on_with_other_code_or_on_another_device(unfinished, capsys, monkeypatch):
    _, _, argv = unfinished
    for name, said in (("code_digest", "version of this program"), ("computed_on", "device or version of torch")):
        with monkeypatch.context() as patch:
            patch.setattr(identity, name, lambda *_: "another")
            assert f"an unfinished quantization with another {said}" in refused(capsys, *argv)


def test_files_of_weights_that_lie_there_are_not_believed(unfinished, capsys):
    """Without the manifest nothing may lie beside the work; with it, a file counts as finished where it says so."""
    source, out, argv = unfinished
    (out / SHARD).write_bytes(b"of another quantization")
    manifest = out / ".quantize" / "manifest.json"
    held = manifest.read_text()
    manifest.unlink()
    assert "is not empty, and holds no unfinished quantization" in refused(capsys, *argv)
    assert (out / SHARD).read_bytes() == b"of another quantization"
    manifest.write_text(held)
    work(argv)
    quantized(source, out.with_name("whole"), "w8a16", None)
    assert (out / SHARD).read_bytes() == (out.with_name("whole") / SHARD).read_bytes()
    assert not (out / ".quantize").exists()


def test_a_finished_file_that_was_changed_is_an_error(unfinished, capsys, monkeypatch):
    """What it was made of is gone."""
    _, out, argv = unfinished

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "copy_files", stopped)
        work(argv)
    (out / SHARD).unlink()
    assert f"{out / SHARD} was finished, and has been changed or removed since" in refused(capsys, *argv)


def test_the_manifest_is_the_last_that_goes(unfinished, monkeypatch):
    """Stopped while it tidies up, a run leaves what the next one needs to know that all is done."""
    _, out, argv = unfinished
    real, gone = shutil.rmtree, []

    def stopping(path, **options):
        real(path, **options)
        if Path(path).name == "stages":
            gone.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work_module.shutil, "rmtree", stopping)
        work(argv)
    assert gone and json.loads((out / ".quantize" / "manifest.json").read_text())["is_written"]
    weights = (out / SHARD).stat().st_mtime_ns
    assert work(argv)["kinds"]["W8A16"] > 0 and not (out / ".quantize").exists()
    assert (out / SHARD).stat().st_mtime_ns == weights


def test_the_result_is_judged_while_the_work_is_there(unfinished, monkeypatch):
    _, out, argv = unfinished
    seen = []
    manifest = out / ".quantize" / "manifest.json"
    monkeypatch.setattr(quantize, "verify", lambda folder: seen.append(manifest.exists()))
    work(argv)
    assert seen == [True] and not (out / ".quantize").exists()


def test_a_second_run_into_the_same_folder_is_refused(unfinished, capsys):
    _, out, argv = unfinished
    with (out / ".quantize" / "lock").open("ab") as lock:
        assert locks.take(lock)
        assert f"another run is writing {out}; wait for its end" in refused(capsys, *argv)
    assert work(argv)["scheme"] == "w8a16"


def test_a_full_disk_is_told_with_its_path(unfinished, capsys, monkeypatch):
    _, out, argv = unfinished

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "pack", full)
    assert run_tool("quantize", work, argv) == 1
    said = capsys.readouterr().err
    assert f"{out}: No space left on device; once that is mended, the same words go on where this stopped" in said


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_it_with_a_word_of_what_goes_on(sent, status, unfinished, capsys, monkeypatch):
    _, _, argv = unfinished
    monkeypatch.setattr(run, "run_stage", lambda *_: signal.raise_signal(sent))
    before = signal.getsignal(signal.SIGTERM)
    try:
        terminate_as_interrupt()
        assert run_tool("quantize", work, argv) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted: " in (said := capsys.readouterr().err) and "the same words go on where this stopped" in said
