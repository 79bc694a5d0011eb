"""`generate` with the real engine over the tiny checkpoints: rows, errors among them, files, resuming, drawing."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dataset.sample import Sample
from executor.commands.generate import answering, taking
from executor.commands.generate import run as generate
from executor.commands.generate.printer import Printer
from executor.commands.generate.rows import failed_row
from executor.errors import UserError
from executor.media import draw
from executor.media.draw import COLORS, Mark, find_marks
from executor.recipe.schema import Recipe, build_recipe
from tests.media.media_files import make_frames, write_video
from tests.media.web import ok, serving
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
TOLD = {"media", "prompt", "text", "finish_reason", "prompt_tokens", "vision_tokens", "completion_tokens", "error"}
ROW_KEYS = TOLD | {"ttft_ms", "tpot_ms", "e2e_ms"}


def recipe_of(family: str = "qwen3_vl", **sections: dict) -> Recipe:
    tree = {
        "model_config": {"model_path": f"models/tiny/{family}", "device": "cpu", "dtype": "float32"},
        "scheduler_config": {"max_num_seqs": 4, "block_size": 16},
        "generation_config": {"temperature": 0, "max_new_tokens": 8},
    }
    for name, fields in sections.items():
        tree[f"{name}_config"] = tree.get(f"{name}_config", {}) | fields
    return build_recipe(tree)


def answers(recipe: Recipe) -> tuple[list[dict], int, str]:
    out = io.StringIO()
    document, status = generate.run(recipe, out=out)
    json.dumps(document)
    assert (document["command"], document["device"], document["exe_mode"]) == ("generate", "cpu", "eager")
    return document["outputs"], status, out.getvalue()


def own(prompt: str, *media: object, **fields: object) -> dict:
    return {"prompt": prompt, "media": [str(item) for item in media], **fields}


def rows_file(path: Path, rows: list[dict]) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset": "jsonl", "dataset_path": str(path)}


def test_drafts_are_told_in_the_last_line_and_the_document():
    sections = {"speculative": {"method": "ngram", "ngram_min": 1, "adaptive": False}}
    sections["generation"] = {"max_new_tokens": 40, "ignore_eos": True}
    out = io.StringIO()
    document, status = generate.run(recipe_of(data=own("a b a b a b a b"), **sections), out=out)
    drafts = document["drafts"]
    assert status == 0 and 0 < drafts["accepted_draft_tokens"] <= drafts["draft_tokens"]
    last = out.getvalue().splitlines()[-1]
    assert f"; drafts: {drafts['accepted_draft_tokens']} of {drafts['draft_tokens']} tokens right" in last


def test_own_question_about_a_picture_and_a_video():
    rows, status, printed = answers(recipe_of(data=own("What do you see?", MEDIA / "objects.png", MEDIA / "clip.mp4")))
    (row,) = rows
    assert status == 0
    assert set(row) >= ROW_KEYS
    assert row["media"] == ["objects.png", "clip.mp4"]
    assert row["error"] is None and row["text"]
    assert row["prompt_tokens"] > row["vision_tokens"] > 16
    assert 0 < row["ttft_ms"] <= row["e2e_ms"]
    for told in ("[1/1] objects.png, clip.mp4", "What do you see?", row["text"], "TTFT", "TPOT", "e2e"):
        assert told in printed


def test_pictures_are_fetched_from_hosts_that_the_recipe_allows(tmp_path):
    """By the recipe's own keys, with the system's resolver and connections; loopback is a private address."""
    with serving({"/objects?sig=1": ok((MEDIA / "objects.png").read_bytes()), "/page": ok(b"<html>")}) as web:
        here = f"http://127.0.0.1:{web.port}"
        rows = [
            {"question": "What do you see?", "image": str(MEDIA / "objects.png")},
            {"question": "What do you see?", "image": f"{here}/objects?sig=1"},
            {"question": "Locate the blue square.", "image_url": f"{here}/objects?sig=1"},
            *({"question": "?", "image": url} for url in (f"{here}/lost", f"{here}/page", "http://127.0.0.1:9/a.png")),
        ]
        data = rows_file(tmp_path / "rows.jsonl", rows) | {"allowed_private_hosts": [f"127.0.0.1:{web.port}"]}
        model = {"output_path": str(tmp_path)}
        rows, status, _ = answers(recipe_of(data=data, model=model, generation={"draw": True, "max_new_tokens": 40}))
    assert status == 2 and rows[0]["text"] == rows[1]["text"] != ""
    assert rows[2]["drawn"] and not rows[2]["warnings"]
    for row, says in zip(
        rows[3:], (f"{here}/lost: answers 404", "it is an HTML page", "127.0.0.1:9 is not among the hosts"), strict=True
    ):
        assert says in row["error"]
    assert "data_config.allowed_private_hosts" in rows[5]["error"]


def test_bad_requests_do_not_keep_the_good_ones_from_being_answered(tmp_path):
    (tmp_path / "corrupt.png").write_bytes((MEDIA / "objects.png").read_bytes()[:60])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes((MEDIA / "clip.mp4").read_bytes()[:300])
    Image.new("RGB", (2010, 10)).save(tmp_path / "stripe.png")
    good = {"question": "How many objects are there?", "image": str(MEDIA / "objects_2.jpg")}
    rows = [
        good,
        {"question": "Q?", "image": "corrupt.png"},
        {"question": "Q?", "video": "empty.mp4"},
        {"question": "Q?", "video": "cut.mp4"},
        {"question": "Q?", "image": "stripe.png"},
        {"question": "long " * 3000},
        {"question": "Q?", "image": "absent.png"},
        {"queston": "Q?"},
        good,
    ]
    found, status, printed = answers(recipe_of(data=rows_file(tmp_path / "mine.jsonl", rows)))
    assert status == 2
    assert [row["index"] for row in found] == list(range(9))
    assert found[0]["text"] == found[8]["text"] and found[0]["error"] is None
    wanted = {
        1: ["corrupt.png"],
        2: ["empty.mp4", "empty"],
        3: ["cut.mp4"],
        4: ["2010x10", "200"],
        5: ["2048"],
        6: ["mine.jsonl:7", "absent.png"],
        7: ["mine.jsonl:8", "no question"],
    }
    for index, words in wanted.items():
        assert found[index]["text"] is None
        for word in words:
            assert word in found[index]["error"], found[index]["error"]
    assert "2 answered, 7 failed" in printed


def test_rows_are_printed_in_their_order_and_equal_those_asked_alone(tmp_path):
    questions = ["What do you see?", "How many objects are there?", "Locate the blue square."]
    rows = [{"question": question, "image": str(MEDIA / "objects.png")} for question in questions * 2]
    many, status, printed = answers(recipe_of(data=rows_file(tmp_path / "mine.jsonl", rows)))
    assert status == 0
    places = [printed.index(f"[{number}/6]") for number in range(1, 7)]
    assert places == sorted(places)
    for index, question in enumerate(questions):
        (alone,), _, _ = answers(recipe_of(data=own(question, MEDIA / "objects.png")))
        assert alone["text"] == many[index]["text"] == many[index + 3]["text"]


def test_several_answers_their_seed_and_log_probabilities():
    sampled = {"temperature": 1.5, "n": 3, "logprobs": 2}
    ask = own("What do you see?", MEDIA / "objects.png")
    (row,), _, printed = answers(recipe_of(generation=sampled, data=ask))
    assert len(row["texts"]) == 3 and row["texts"][0] == row["text"]
    assert printed.count("  answer ") == 3
    assert len(row["logprobs"]) == 3
    for answer in row["logprobs"]:
        assert 1 <= len(answer) <= 8
    (again,), _, _ = answers(recipe_of(generation=sampled | {"seed": row["seed"]}, data=ask))
    assert (again["texts"], again["seed"], again["logprobs"]) == (row["texts"], row["seed"], row["logprobs"])
    (other,), _, _ = answers(recipe_of(generation=sampled, data=ask))
    assert other["seed"] != row["seed"]


def test_a_system_prompt_is_put_before_conversations_without_one(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]},
    ]
    data = rows_file(tmp_path / "mine.jsonl", rows)
    bare, _, _ = answers(recipe_of(data=data))
    told, _, _ = answers(recipe_of(data=data | {"system_prompt": "You are a careful observer of pictures."}))
    assert told[0]["prompt_tokens"] > bare[0]["prompt_tokens"]
    assert told[1]["prompt_tokens"] == bare[1]["prompt_tokens"]


@pytest.mark.parametrize("family, side_px, unit", [("qwen2_5_vl", 112, 112), ("qwen3_vl", 128, 1000)])
def test_boxes_are_drawn_on_a_copy_in_the_family_s_own_unit(tmp_path, family, side_px, unit):
    """The model sees the picture at `side_px` a side; what it names is found on the picture of 336."""
    picture = tmp_path / "big.png"
    Image.open(MEDIA / "objects.png").convert("RGB").resize((336, 336), Image.Resampling.NEAREST).save(picture)
    before = picture.read_bytes()
    recipe = recipe_of(
        family,
        model={"output_path": str(tmp_path / "out")},
        generation={"draw": True, "max_new_tokens": 64},
        data=own("Locate the blue square.", picture, max_pixels=side_px**2),
    )
    (row,), _, printed = answers(recipe)
    (mark,) = find_marks(row["text"])
    assert row["drawn"] in printed
    assert picture.read_bytes() == before
    plain, drawn = Image.open(picture).convert("RGB"), Image.open(row["drawn"])
    assert drawn.size == (336, 336)
    color = tuple(bytes.fromhex(COLORS[0][1:]))
    x1, y1, x2, y2 = (min(round(value * 336 / unit), 335) for value in mark.coordinates)
    assert x2 - x1 > 60 and y2 - y1 > 60
    for x, y in ((x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        near = {drawn.getpixel((min(x + dx, 335), min(y + dy, 335))) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
        assert color in near
    # The box is where the square is: its inside is blue, and untouched.
    middle = ((x1 + x2) // 2, (y1 + y2) // 2)
    red, green, blue = drawn.getpixel(middle)
    assert (red, green, blue) == plain.getpixel(middle)
    assert blue > max(red, green)


def test_an_output_folder_that_cannot_be_written_is_refused_before_weights(tmp_path):
    (tmp_path / "file").write_text("")
    drawing = {"generation": {"draw": True}, "data": own("What?", MEDIA / "objects.png")}

    def no_engine(*opened):
        raise AssertionError("an engine was made")

    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none", "a\0b"):
        recipe = recipe_of(model={"output_path": str(place)}, **drawing)
        with pytest.raises(UserError, match=r"model_config.output_path: drawn pictures go to .* cannot be written"):
            generate.run(recipe, build=no_engine, out=io.StringIO())


def test_a_drawing_that_fails_is_a_warning_of_its_row(tmp_path, monkeypatch):
    """The folder was there at the start, and is a file by the time of the first answer."""
    monkeypatch.setattr(draw, "find_marks", lambda text: [Mark((1, 2, 3, 4), "x")])
    out = tmp_path / "out"
    out.write_text("")
    monkeypatch.setattr(answering, "check_drawing", lambda recipe: None)
    recipe = recipe_of(
        model={"output_path": str(out)}, generation={"draw": True}, data=own("What?", MEDIA / "objects.png")
    )
    (row,), status, printed = answers(recipe)
    assert (status, row["error"], row["drawn"]) == (0, None, None) and row["text"]
    (warning,) = row["warnings"]
    assert warning.startswith("the answer could not be drawn: ") and warning in printed


def test_sizes_and_warnings_are_reported_with_the_answer(tmp_path):
    whole = tmp_path / "whole.mp4"
    content = write_video(whole, make_frames(40, 64, 96), container_options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    data = own("What?", tmp_path / "wide.png", tmp_path / "cut.mp4", whole)
    (row,), status, printed = answers(recipe_of("qwen2_5_vl", data=data))
    assert status == 0 and row["error"] is None
    (picture, cut, whole) = row["media_sizes"]
    assert picture == {"original": [200, 300], "resized": [196, 308], "box_units": [308, 196]}
    assert cut == whole and set(cut) == {"original", "resized", "box_units"}
    (warning,) = row["warnings"]
    assert "cut.mp4: the video is cut short" in warning and warning in printed


def test_a_prompt_that_is_too_long_names_the_keys_of_what_it_holds():
    limits = {"max_model_len": 128, "max_num_seqs": 2, "block_size": 16}
    for media, says, says_not in (
        ("clip.mp4", "of videos: lower data_config.video_max_pixels, or fps or max_frames", "data_config.max_pixels"),
        ("objects.png", "of pictures: lower data_config.max_pixels", "video_max_pixels"),
    ):
        data = own("What? " * 40, MEDIA / media)
        (row,), status, _ = answers(recipe_of(scheduler=limits, data=data))
        assert status == 2
        assert row["error"].startswith("data_config: maximum context length is 128 tokens")
        assert says in row["error"] and says_not not in row["error"] and "shorten its text" in row["error"]


def test_nothing_is_drawn_for_an_answer_without_boxes(tmp_path):
    recipe = recipe_of(
        model={"output_path": str(tmp_path / "out")},
        generation={"draw": True},
        data=own("How many objects are there?", MEDIA / "objects.png"),
    )
    (row,), status, _ = answers(recipe)
    assert (status, row["drawn"]) == (0, None)
    assert not (tmp_path / "out").exists()


def test_the_progress_bar_is_on_stderr_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(taking, "BAR_AFTER_S", 0.0)
    rows = [{"question": f"{number}?"} for number in range(3)]
    generate.run(recipe_of(data=rows_file(tmp_path / "mine.jsonl", rows)))
    printed = capsys.readouterr()
    assert "3/3" in printed.err and "request" in printed.err
    assert "request/s" not in printed.out and "\r" not in printed.out


def test_results_are_saved_resumed_and_tried_again(tmp_path):
    results = tmp_path / "out.jsonl"
    rows = [{"question": "What?", "image": str(MEDIA / "word.png")}, {"question": "What?", "image": "later.png"}]
    data = rows_file(tmp_path / "mine.jsonl", rows) | {"results_path": str(results)}
    found, status, _ = answers(recipe_of(data=data))
    assert (status, found[1]["error"] is None) == (2, False)
    kept = results.read_text().splitlines()[0]

    # The picture is there now: only its row is asked again.
    (tmp_path / "later.png").write_bytes((MEDIA / "objects.png").read_bytes())
    found, status, printed = answers(recipe_of(data=data))
    assert (status, [row["error"] for row in found]) == (0, [None, None])
    assert results.read_text().splitlines()[0] == kept
    assert "[2/2]" in printed and "[1/2]" not in printed
    now = found[1]["completion_tokens"]
    assert f"\n1 answered now, 1 before, {now} tokens, " in printed

    # Everything is there: no engine is made.
    def no_engine(*opened):
        raise AssertionError("an engine was made")

    document, status = generate.run(recipe_of(data=data), build=no_engine, out=io.StringIO())
    assert (status, len(document["outputs"])) == (0, 2)

    other = rows_file(tmp_path / "other.jsonl", [{"question": "Another?"}]) | {"results_path": str(results)}
    with pytest.raises(UserError, match="holds the answers of another run"):
        generate.run(recipe_of(data=other), build=no_engine, out=io.StringIO())


def test_a_results_path_that_is_no_file_is_refused_before_anything_is_read(tmp_path):
    data = {"dataset": "jsonl", "dataset_path": str(tmp_path / "nowhere.jsonl"), "results_path": "/dev/full"}
    with pytest.raises(UserError, match="results_path: /dev/full cannot be written: it is a device, no regular file"):
        generate.run(recipe_of(data=data))


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    results = tmp_path / "out.jsonl"
    names = ("objects.png", "objects_2.jpg", "word.png")
    rows = [
        {"question": f"What do you see? ({number})", "image": str(MEDIA / names[number % 3])} for number in range(40)
    ]
    rows_file(tmp_path / "mine.jsonl", rows)
    line = [sys.executable, "-m", "executor", "config/quickstart.yaml", "--set"]
    line += ["data_config.dataset=jsonl", f"data_config.dataset_path={tmp_path / 'mine.jsonl'}"]
    line += [f"data_config.results_path={results}", "scheduler_config.max_num_seqs=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (results.exists() and results.read_bytes().count(b"\n") >= 3):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = results.read_bytes()
    whole = before[: before.rfind(b"\n") + 1].splitlines()
    assert len(whole) < 40
    results.write_bytes(before + b'{"index": 4, "te')  # as a machine that lost its power leaves it

    second = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    after = results.read_bytes().splitlines()
    assert [json.loads(item)["index"] for item in after] == list(range(40))
    assert set(whole) <= set(after), "what was answered stays as it was"
    outputs = json.loads(second.stdout.splitlines()[-1])["outputs"]
    assert len(outputs) == 40
    assert {row["error"] for row in outputs} == {None}
    assert f"{len(whole)} of 40 answers are in {results} already" in second.stderr


@pytest.mark.parametrize(
    "sections, says",
    [
        ({"generation": {"min_new_tokens": 500, "max_new_tokens": 100}}, "generation_config.min_new_tokens is 500"),
        ({"generation": {"stop_token_ids": [10**9]}}, "generation_config.stop_token_ids holds 1000000000"),
        ({"data": own("Q?", chat_template_kwargs={"tokenize": True})}, "chat_template_kwargs may not set 'tokenize'"),
        ({"data": own("Q?", max_pixels=10)}, r"data_config.max_pixels: got 10; .* one token .* 1024 pixels"),
        (
            {"data": own("Q?", max_pixels=2000, min_pixels=9000)},
            "data_config.min_pixels: got 9000, above max_pixels 2000",
        ),
        ({"data": own("Q?", max_pixels=1024)}, "data_config.max_pixels: got 1024, below the checkpoint's min_pixels"),
        ({"data": own("Q?", video_max_pixels=100)}, "data_config.video_max_pixels: got 100; the smallest video"),
        ({"data": own("Q?", frame_max_pixels=100)}, "data_config.frame_max_pixels: got 100; the smallest frame"),
        ({"data": own("Q?", min_frames=20, max_frames=10)}, "data_config.min_frames: got 20, above max_frames 10"),
        ({"data": own("Q?", min_pixels=2**40)}, "data_config.min_pixels: got 1099511627776, at most"),
    ],
)
def test_what_no_row_could_be_asked_with_is_refused_before_weights_are_read(monkeypatch, sections, says):
    def reads_weights(*given):
        raise AssertionError("weights were read")

    monkeypatch.setattr("executor.commands.build.load_model", reads_weights)
    with pytest.raises(UserError, match=says):
        generate.run(recipe_of(**sections), out=io.StringIO())


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_says_what_is_saved_and_how_to_go_on(monkeypatch, tmp_path, saved):
    """The rows that had come are in the file, and in nothing else."""

    def two_rows(engine, recipe, params, spread, take):
        for index in range(2):
            take(failed_row(index, Sample(f"mine.jsonl:{index}"), "as good as an answer"))
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "answer_all", two_rows)
    path = tmp_path / "out.jsonl"
    data = rows_file(tmp_path / "mine.jsonl", [{"question": f"{number}?"} for number in range(5)])
    with pytest.raises(KeyboardInterrupt) as interrupt:
        data |= {"results_path": str(path)} if saved else {}
        generate.run(recipe_of(data=data), build=lambda *opened: None, out=io.StringIO())
    if saved:
        assert str(interrupt.value) == f"2 of 5 answers are in {path}; the same command goes on from there"
        assert path.read_bytes().count(b"\n") == 2
    else:
        assert "2 of 5 requests were answered, and nothing is saved" in str(interrupt.value)
        assert "--set data_config.results_path=FILE" in str(interrupt.value)


def test_a_time_per_token_of_few_tokens_is_for_scripts_alone():
    """Most of it is other requests' prompts."""
    row = {"index": 0, "media": [], "prompt": "?", "error": None, "text": "3", "vision_tokens": 0, "prompt_tokens": 9}
    row |= {"ttft_ms": 1.0, "tpot_ms": 527.7, "e2e_ms": 2.0}
    for tokens, shown in ((2, "TPOT -"), (7, "TPOT -"), (8, "TPOT 527.7 ms")):
        out = io.StringIO()
        Printer(1, out, ()).print_ready({0: row | {"completion_tokens": tokens}})
        assert shown in out.getvalue()
