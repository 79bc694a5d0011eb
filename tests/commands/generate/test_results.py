"""The JSONL of answers: whole rows only, resumed, refused when it is another run's."""

import json
import os
import socket

import pytest

from dataset.sample import Sample
from executor.commands.generate import results as results_module
from executor.commands.generate.results import ResultsFile, settings_of
from executor.errors import UserError
from executor.recipe.schema import build_recipe


def sample(text: str) -> Sample:
    return Sample(text, ({"role": "user", "content": text},))


def row(index: int, error: str | None = None) -> tuple[dict, str]:
    counts = dict.fromkeys(("prompt_tokens", "vision_tokens", "completion_tokens"), 3)
    head = {"index": index, "id": f"line {index}", "media": ["a.png"], "prompt": f"question {index}"}
    return {**head, "text": f"answer {index}", **counts, "error": error}, SAMPLES[index].fingerprint()


SAMPLES = [sample(f"question {index}") for index in range(4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "out.jsonl"


def test_rows_are_on_disk_as_they_come_and_sorted_at_the_end(path):
    with ResultsFile(path, "s", SAMPLES) as results:
        for index in (2, 0):
            results.append(*row(index))
            assert json.loads(path.read_text().splitlines()[-1])["index"] == index
        results.sort({})
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2]
    assert list(path.parent.iterdir()) == [path]


def test_a_half_written_line_is_dropped_and_failures_are_tried_again(path):
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
        results.append(*row(1, error="broken picture"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 2, "te')
    with ResultsFile(path, "s", SAMPLES) as results:
        assert set(results.answered()) == {0}
        results.append(*row(1))
        results.append(*row(2))
        results.sort({})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(item["index"], item["error"]) for item in rows] == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("settings, samples", [("other", SAMPLES), ("s", SAMPLES[::-1])])
def test_answers_of_another_run_are_refused_and_kept(path, settings, samples):
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
    before = path.read_bytes()
    with (
        ResultsFile(path, settings, samples) as results,
        pytest.raises(UserError, match="holds the answers of another run"),
    ):
        results.answered()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["not json\n", '{"a": 1}\n', "precious text without an end", '{"index": 1, "a": "b"}', '{"index": 1, "a']
)
def test_a_file_of_something_else_is_refused_and_kept(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match="give another results_path"):
        ResultsFile(path, "s", SAMPLES)
    assert path.read_text() == content


def test_a_first_row_cut_anywhere_is_answered_again(path):
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
    line = path.read_bytes()
    for length in range(len(line)):
        path.write_bytes(line[:length])
        with ResultsFile(path, "s", SAMPLES) as results:
            assert results.answered() == {}
        assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "key, value",
    [
        *(("text", 5), ("text", None), ("text", ["a"]), ("error", 7), ("index", True), ("index", -1), ("id", 4)),
        *(("media", "a.png"), ("media", [1]), ("prompt", None), ("completion_tokens", "3"), ("vision_tokens", [])),
        *(("warnings", [3]), ("texts", "a"), ("tpot_ms", "fast"), ("fingerprint", 0), ("finish_reason", {})),
    ],
)
def test_a_row_with_fields_of_other_types_is_refused_and_kept(path, key, value):
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
    changed = json.dumps({**json.loads(path.read_text()), key: value}) + "\n"
    path.write_text(changed)
    with pytest.raises(UserError, match=rf"line 1 was changed: .*({key}|neither an answer)"):
        ResultsFile(path, "s", SAMPLES)
    assert path.read_text() == changed


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/full")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket")
        for name, kind in [("/dev/full", "device"), ("link", "device"), ("/dev/zero", "device"), ("pipe", "pipe"),
                           (".", "folder"), ("socket", "socket")]:  # fmt: skip
            with pytest.raises(UserError, match=f"cannot be written: it is a {kind}, no regular file"):
                ResultsFile(name, "s", SAMPLES)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "out.jsonl"):
        with pytest.raises(UserError, match="cannot be written"):
            ResultsFile(place, "s", SAMPLES)


def test_settings_count_what_answers_depend_on():
    def digest(**sections) -> str:
        tree = {"model_config": {"model_path": "a"} | sections.pop("model", {})}
        return settings_of(build_recipe(tree | {f"{name}_config": value for name, value in sections.items()}))

    plain = digest()
    for same in (
        digest(data={"limit": 3}),
        digest(data={"results_path": "x"}),
        digest(generation={"draw": True}),
        digest(scheduler={"max_num_seqs": 2}),
        digest(model={"output_path": "elsewhere"}),
    ):
        assert same == plain
    for other in (
        digest(model={"model_path": "b"}),
        digest(model={"device": "npu"}),
        digest(model={"kv_cache_dtype": "int8"}),
        digest(generation={"seed": 1}),
        digest(data={"max_pixels": 100_000}),
        digest(data={"system_prompt": "Be brief."}),
    ):
        assert other != plain


def test_one_run_at_a_time_has_the_file(path):
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
        for _ in range(2):
            with pytest.raises(UserError, match=r"out.jsonl is being written by another run; wait for its end"):
                ResultsFile(path, "s", SAMPLES)
        results.append(*row(1))
        results.sort({})
        # The sorted file is another one, in the same place.
    with ResultsFile(path, "s", SAMPLES) as results:
        assert set(results.answered()) == {0, 1}
        with pytest.raises(UserError, match="another run"):
            ResultsFile(path, "s", SAMPLES)


def test_a_file_replaced_before_it_was_locked_is_opened_again(path, monkeypatch):
    """The run before may put its sorted file in place between our opening and our locking."""
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(0))
    flock, replaced = results_module.locks.fcntl.flock, []

    def late(file, flags):
        if not replaced:
            replaced.append(path.rename(path.with_name("old")))
            path.write_bytes(replaced[0].read_bytes())
        return flock(file, flags)

    monkeypatch.setattr(results_module.locks.fcntl, "flock", late)
    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(1))
    assert len(path.read_text().splitlines()) == 2 and len(replaced[0].read_text().splitlines()) == 1


def test_only_rows_that_are_answered_already_are_read(path):
    class Counted(list):
        read: list[int] = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    with ResultsFile(path, "s", SAMPLES) as results:
        results.append(*row(2))
    with ResultsFile(path, "s", Counted(SAMPLES)) as results:
        results.answered()
        results.append(*row(1))
    assert Counted.read == [2]


def test_a_full_disk_is_said_and_what_is_saved_stays(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match="cannot be written any more .No space left"),
        ResultsFile(path, "s", SAMPLES) as results,
        monkeypatch.context() as patch,
    ):
        results.append(*row(0))
        patch.setattr(results, "_file", FullFile(results._file))
        results.append(*row(1))
    with ResultsFile(path, "s", SAMPLES) as results:
        assert set(results.answered()) == {0}
        with monkeypatch.context() as patch:
            patch.setattr("executor.commands.generate.results.os.replace", full)
            with pytest.raises(UserError, match="cannot be written any more"):
                results.sort({})
    assert [each.name for each in path.parent.iterdir()] == [path.name]


class FullFile:
    """A file on a full disk."""

    def __init__(self, file) -> None:
        self._file = file

    def write(self, content: bytes) -> None:
        raise OSError(28, "No space left on device")
