"""A prefix cache that outlives its engine: the same answers, whatever is on the disk, and less to compute."""

import errno
import os
import random
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from executor.engine.disk_cache.folder import EntryFolder
from executor.engine.loop import EngineLoop
from executor.errors import UserError
from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import Request, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO, random_checkpoint

TINY = REPO / "models" / "tiny" / "qwen3_vl"
MEDIA = REPO / "dataset" / "media"
GREEDY = SamplingParams(max_new_tokens=12, logprobs=2)
NOISY = SamplingParams(max_new_tokens=12, temperature=1.5, seed=5, ignore_eos=True)
LONG = "Count from one to twenty and say every word again. " * 6


def opened(path, folder=TINY, **settings):
    model = settings.pop("model", None)
    settings = {"max_num_batched_tokens": 1024, "encoder_cache_tokens": 2048} | settings  # little memory
    return engine_over(folder, model=model, prefix_cache_path=None if path is None else str(path), **settings)


def message(text: str, **media: str):
    parts = [{"type": kind, kind: str(MEDIA / file)} for kind, file in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def questions():
    return [message("What do you see?", image="objects.png"), message(LONG), message("What?", video="clip.mp4")]


def answers(engine, params=GREEDY, asked=None):
    return engine.generate(asked or questions(), params)


def cached_digests(engine, prompt):
    """Names of the blocks of a prompt that a request of it can take over."""
    return BlockDigests(Request("", prompt, GREEDY), 16).extend(len(prompt.token_ids) - 1)


def same(found, wanted) -> bool:
    return [(x.token_ids, x.logprobs) for x in found] == [(x.token_ids, x.logprobs) for x in wanted]


@pytest.fixture(scope="module")
def wanted():
    """What is answered without a cache, and what a second time by the cache in memory."""
    with opened(None) as engine:
        return answers(engine), answers(engine)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, wanted):
    """A cache that an engine has left. Tests copy it."""
    path = tmp_path_factory.mktemp("filled")
    with opened(path) as engine:
        assert same(answers(engine), wanted[0])
        stats = engine.runner.disk_cache.stats()
    assert not stats.num_dropped and not stats.read_bytes
    assert engine.runner.disk_cache.stats().written_bytes > 0
    return path


@pytest.fixture
def path(filled, tmp_path):
    """A copy of the filled cache."""
    for file in filled.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(filled)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path


def entries(path, suffix="*"):
    return sorted(path.glob(f"prefix-*/*.{suffix}"))


def test_a_new_engine_finds_what_one_before_has_computed(path, wanted):
    cold, warm = wanted
    with opened(path) as engine:
        found = answers(engine)
        assert same(found, warm), "bit for bit what the cache in memory gives"
        assert [x.token_ids for x in found] == [x.token_ids for x in cold]
        assert [x.cached_tokens for x in found] == [x.cached_tokens for x in warm]
        assert all(x.cached_tokens >= x.prompt_tokens - 17 for x in found)
        stats = engine.runner.disk_cache.stats()
        assert engine.scheduler.num_store_hits == sum(x.cached_tokens for x in found)
        assert stats.read_bytes and not stats.written_bytes and not stats.num_damaged
        before = stats.read_bytes
        assert same(answers(engine), warm) and engine.runner.disk_cache.stats().read_bytes == before, "now in memory"
        engine.scheduler.check()


def test_encoded_media_are_found_where_blocks_are_not(path, wanted):
    for file in entries(path, "kv"):
        file.unlink()
    with opened(path) as engine:
        encoded = []
        engine.runner.model.encode = lambda *inputs: encoded.append(inputs)
        assert same(answers(engine), wanted[0]) and not encoded
        stats = engine.runner.disk_cache.stats()
        assert (stats.num_media_queries, stats.num_media_hits) == (2, 2)
        assert engine.scheduler.num_store_hits == 0
    assert entries(path, "kv"), "blocks were written again"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_other_families(tmp_path, family):
    folder = REPO / "models" / "tiny" / family
    with opened(tmp_path, folder) as engine:
        first, warm = answers(engine), answers(engine)
    with opened(tmp_path, folder) as engine:
        found = answers(engine)
        assert same(found, warm) and [x.token_ids for x in found] == [x.token_ids for x in first]
        assert engine.scheduler.num_store_hits == sum(x.cached_tokens for x in warm) > 0


DAMAGES = {
    "corrupted": lambda content: content[:-3] + bytes([content[-3] ^ 255]) + content[-2:],
    "truncated": lambda content: content[:-1],
    "half written": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_computed_again(path, wanted, caplog, damage):
    for place, file in enumerate(entries(path)):
        if place % 3 == 1:
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with opened(path) as engine:
        found = answers(engine)
        assert [x.token_ids for x in found] == [x.token_ids for x in wanted[0]]
        assert engine.runner.disk_cache.stats().num_damaged > 0
        assert "computed again" in caplog.text
    with opened(path) as engine:
        assert same(answers(engine), wanted[1]), "all is whole again"
        assert not engine.runner.disk_cache.stats().num_damaged


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_what_stands_behind_a_lost_block_is_checked_when_it_is_computed(path, wanted, harm):
    with opened(path) as engine:
        names = [digest.hex() for digest in cached_digests(engine, engine.prompt(message(LONG)))]
    files = [next(path.glob(f"prefix-*/{name}.kv")) for name in names]
    before = {file: (os.stat(file).st_ino, file.read_bytes()) for file in files}
    for file in (files[1], files[3], files[4]):
        file.write_bytes(bytes(100))
    with opened(path) as engine:
        if harm == "gone":
            for file in (files[1], files[3], files[4]):
                file.unlink()
        assert answers(engine)[1].token_ids == wanted[0][1].token_ids
        cache = engine.runner.disk_cache
    assert not cache._doubted and cache.stats().num_damaged == (3 if harm == "damaged" else 0)
    written = [file for file in files if os.stat(file).st_ino != before[file][0] or file in (files[1], *files[3:5])]
    assert written == [files[1], files[3], files[4]], "what is right is not written again"
    assert all(os.stat(file).st_size == len(before[file][1]) for file in files)
    assert cache.stats().written_bytes == 3 * cache._block_bytes
    with opened(path) as engine:
        assert same(answers(engine), wanted[1]) and not engine.runner.disk_cache.stats().num_damaged


def test_another_checkpoint_of_the_same_shapes_shares_nothing(tmp_path):
    """Two folders of one shape, size and date, under one path."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    texts = []
    for seed in (0, 1):
        made = random_checkpoint(folder, "qwen3_vl")
        weights = made / "model.safetensors"
        if seed:
            content = bytearray(weights.read_bytes())
            content[-2000:-1000] = bytes(1000)
            weights.write_bytes(content)
        os.utime(weights, (10**9, 10**9))
        with opened(cache, folder, num_blocks=128) as engine:
            texts.append(answers(engine, replace(GREEDY, ignore_eos=True)))
            assert engine.scheduler.num_store_queries > 0 and engine.scheduler.num_store_hits == 0
    assert len(list(cache.glob("prefix-*"))) == 2
    assert not same(*texts)


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 32}, {"model": {"dtype": "bfloat16"}}, {"model": {"quantization": "wint8"}}],
    ids=["block size", "dtype", "quantization"],
)
def test_other_bytes_have_another_folder(path, settings):
    with opened(path, **settings) as engine:
        answers(engine)
        assert engine.scheduler.num_store_hits == 0 and not engine.runner.disk_cache.stats().read_bytes
    assert len(list(path.glob("prefix-*"))) == 2
    with opened(path, **settings) as engine:
        answers(engine)
        assert engine.scheduler.num_store_hits > 0


def test_another_version_of_the_code_has_another_folder(path, monkeypatch):
    monkeypatch.setattr("executor.engine.disk_cache.key.code_digest", lambda: "another")
    with opened(path) as engine:
        answers(engine)
        assert engine.scheduler.num_store_hits == 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_batched_tokens": 24},
        {"num_blocks": 26, "max_model_len": 400},
        {"max_num_seqs": 1},
        {"encoder_cache_tokens": 64},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
    ],
    ids=["chunks", "preemptions", "one at a time", "a small encoder cache", "whole prompts"],
)
def test_sizes_of_steps_and_caches_change_no_answer(path, sizes, wanted):
    params = replace(NOISY, max_new_tokens=60 if "num_blocks" in sizes else 20)
    asked = [*questions(), message(LONG + "Now!"), message(LONG)]
    with opened(None, **sizes) as engine:
        plain = answers(engine, params, asked)
    with opened(path, **sizes) as engine:
        found = answers(engine, params, asked)
        assert [x.token_ids for x in found] == [x.token_ids for x in plain]
        assert engine.scheduler.num_store_hits > 0
        assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in sizes)
        engine.scheduler.check()


def test_several_answers_of_a_prompt_load_its_blocks_once(path):
    params = replace(NOISY, n=3)
    with opened(None) as engine:
        plain = answers(engine, params)
    with opened(path) as engine:
        found = answers(engine, params)
        assert [x.token_ids for x in found] == [x.token_ids for x in plain]
        assert engine.scheduler.num_store_hits == sum(x.cached_tokens for x in found)


def test_answers_are_kept_for_the_next_turn(tmp_path):
    params = replace(GREEDY, max_new_tokens=60, ignore_eos=True)
    with opened(tmp_path) as engine:
        prompt = engine.prompt(message(LONG))
        (first,) = engine.generate([prompt], params)
        turn = engine.processor.build_tokens([*prompt.token_ids, *first.token_ids[0], 5, 6, 7])
        (wanted,) = engine.generate([turn], GREEDY)
    with opened(tmp_path) as engine:
        (found,) = engine.generate([turn], GREEDY)
        assert same([found], [wanted])
        assert found.cached_tokens == wanted.cached_tokens > len(prompt.token_ids) + 30


def test_prompt_logprobs_take_nothing_from_the_cache(path):
    params = replace(GREEDY, prompt_logprobs=1, max_new_tokens=4)
    with opened(None) as engine:
        plain = answers(engine, params)
    with opened(path) as engine:
        found = answers(engine, params)
        assert [x.prompt_logprobs for x in found] == [x.prompt_logprobs for x in plain] and same(found, plain)
        assert all(not x.cached_tokens for x in found) and not engine.scheduler.num_store_hits
        assert engine.runner.disk_cache.stats().num_media_hits == 2, "pictures are"


def test_through_the_loop(path, wanted):
    """Blocks are read by the threads that prepare prompts."""
    with opened(path) as engine:
        readers, read = set(), EntryFolder.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EntryFolder, "read", lambda *given: readers.add(threading.current_thread()) or read(*given))
            with EngineLoop(engine).start() as loop:
                handles = [loop.submit(lambda q=q: q, GREEDY) for q in questions()]
                found = [handle.result(60) for handle in handles]
        assert same(found, wanted[1])
        assert engine.scheduler.num_store_hits == sum(x.cached_tokens for x in found)
        assert readers and all(reader.name.startswith("prepare") for reader in readers)


def test_a_step_that_fails_loads_again(path, wanted, monkeypatch):
    with opened(path) as engine:
        forward, faults = engine.runner.forward, [KeyboardInterrupt, RuntimeError]

        def failing(plan, *rest):
            if plan.load and faults:
                raise faults.pop(0)
            return forward(plan, *rest)

        monkeypatch.setattr(engine.runner, "forward", failing)
        ids = [engine.add(question, GREEDY) for question in questions()]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.scheduler.check()
        tokens = {request_id: [] for request_id in ids}
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                tokens[output.request_id] += output.token_ids
        assert not faults
        assert [tuple(tokens[x]) for x in ids] == [x.token_ids[0] for x in wanted[1]]


def test_a_load_that_fails_ends_its_request_alone(path, wanted, monkeypatch):
    with opened(path) as engine:
        cache, load = engine.runner.disk_cache, engine.runner.disk_cache.load
        lost = cached_digests(engine, engine.prompt(message(LONG)))[-1]

        def failing(blocks):
            if lost in {block.digest for block in blocks}:
                raise RuntimeError("no memory for copies")
            load(blocks)

        monkeypatch.setattr(cache, "load", failing)
        found = answers(engine)
        assert "no memory for copies" in found[1].error
        assert same([found[0], found[2]], [wanted[1][0], wanted[1][2]])
        engine.scheduler.check()
        monkeypatch.undo()
        assert same(answers(engine), wanted[1]), "nothing of it has been taken for loaded"


def test_requests_that_leave_early_keep_nothing(path):
    with opened(path) as engine:
        prompts = [engine.prompt(question) for question in questions()]
        ids = [engine.add(prompt, GREEDY) for prompt in prompts]
        cache = engine.runner.disk_cache
        assert cache._staged
        for request_id in ids:
            engine.abort(request_id)
        engine.step()
        assert not engine.has_work and not cache._staged, "although their prompts are still there"
        engine.scheduler.check()


def test_what_is_read_ahead_is_bounded(path, wanted):
    with opened(path) as engine:
        cache = engine.runner.disk_cache
        cache.most_staged_bytes = 3 * cache._block_bytes
        found = answers(engine)
        assert [x.token_ids for x in found] == [x.token_ids for x in wanted[0]]
        assert 0 < engine.scheduler.num_store_hits <= 3 * 16


def test_what_waits_to_be_written_is_bounded_and_leaves_no_gap(tmp_path, wanted):
    with opened(tmp_path) as engine:
        cache = engine.runner.disk_cache
        cache.most_queued_bytes = 4 * cache._block_bytes
        prompts = [engine.prompt(question) for question in questions()]
        found = answers(engine, asked=prompts)
    assert cache.stats().num_dropped > 0
    there, num_there = {file.stem for file in entries(tmp_path, "kv")}, 0
    for prompt, answer in zip(prompts, found, strict=True):
        request = Request("", prompt, GREEDY, output_token_ids=list(answer.token_ids[0]))
        names = [digest.hex() for digest in BlockDigests(request, 16).extend(request.num_tokens - 1)]
        num_first = next((place for place, name in enumerate(names) if name not in there), len(names))
        assert there.isdisjoint(names[num_first:]), "a block that nobody finds"
        num_there += num_first
    assert num_there == len(there) > 0
    with opened(tmp_path) as engine:
        assert [x.token_ids for x in answers(engine)] == [x.token_ids for x in wanted[0]]


def test_a_full_disk_is_said_once(tmp_path, monkeypatch, caplog, wanted):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("executor.engine.disk_cache.folder._write_all", full)
    with opened(tmp_path) as engine:
        assert same(answers(engine), wanted[0])
        assert same(answers(engine), wanted[1])
    assert caplog.text.count("No space left on device") == 1
    assert not entries(tmp_path) and engine.runner.disk_cache.stats().num_dropped > 0


def test_a_folder_that_is_removed_under_an_engine(path, wanted):
    with opened(path) as engine:
        for file in entries(path):
            file.unlink()
        assert same(answers(engine), wanted[0])
    assert entries(path)


def test_what_has_the_place_of_a_block_harms_no_other_entry(path, wanted, caplog):
    with opened(path) as engine:
        digest = cached_digests(engine, engine.prompt(message(LONG)))[2]
    (file,) = path.glob(f"prefix-*/{digest.hex()}.kv")
    for each in entries(path, "kv"):
        each.unlink()
    file.mkdir()
    with opened(path) as engine:
        assert same(answers(engine), wanted[0])
        engine.scheduler.forget()
        assert [x.token_ids for x in answers(engine)] == [x.token_ids for x in wanted[0]]
        stats = engine.runner.disk_cache.stats()
    assert stats.num_dropped == 0 and stats.num_damaged == 0
    assert caplog.text.count("is left alone") == 1 and "cannot be written to" not in caplog.text
    assert file.is_dir() and len(entries(path, "kv")) > 3


def test_the_bound_holds_and_the_beginning_of_a_prompt_stays(tmp_path, wanted):
    with opened(None) as engine:
        block_bytes = sum(2 * x.k[0].nbytes for x in engine.runner.kv)
    capacity = 6 * block_bytes
    with opened(tmp_path, prefix_cache_gb=capacity / 2**30) as engine:
        first = answers(engine, asked=[message(LONG)])
    assert sum(file.stat().st_size for file in entries(tmp_path)) <= capacity
    with opened(tmp_path, prefix_cache_gb=capacity / 2**30) as engine:
        again = answers(engine, asked=[message(LONG)])
        assert again[0].token_ids == first[0].token_ids
        assert engine.scheduler.num_store_hits >= 4 * 16, "of a prompt that does not fit its beginning is kept"


def test_two_engines_at_once_on_one_folder(tmp_path, wanted):
    """Each finds what the other has written, and removes it, too."""
    rng, results = random.Random(0), {}
    asked = [message(f"{LONG} {number}") for number in range(6)] + questions()
    with opened(None) as engine:
        plain = [x.token_ids for x in answers(engine, asked=asked)]
        block_bytes = sum(2 * x.k[0].nbytes for x in engine.runner.kv)
    engines = [opened(tmp_path, num_blocks=64, max_model_len=512, prefix_cache_gb=40 * block_bytes / 2**30)
               for _ in range(2)]  # fmt: skip

    def work(number, order):
        for _ in range(2):
            found = answers(engines[number], asked=[asked[place] for place in order])
            results[number] = [x.token_ids for x in found] == [plain[place] for place in order]

    orders = [rng.sample(range(len(asked)), len(asked)) for _ in engines]
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.scheduler.check()
        engine.close()
        assert not engine.runner.disk_cache.stats().num_damaged
    assert results == {0: True, 1: True}
    with opened(tmp_path, prefix_cache_gb=1) as engine:
        assert [x.token_ids for x in answers(engine, asked=asked)] == plain
        assert engine.scheduler.num_store_hits > 0


def test_a_folder_that_cannot_be_made_stops_the_start_before_weights_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("executor.commands.build.load_model", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="prefix_cache_path: .* cannot be written to"):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_prefix_caching": False}, "beside enable_prefix_caching: false"),
        ({"prefix_cache_gb": 0}, "prefix_cache_gb"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **settings)


def test_features_are_read_as_they_were(path):
    with opened(None) as plain, opened(path) as engine:
        for question in (questions()[0], questions()[2]):
            prompt = engine.prompt(question)
            engine.runner.disk_cache.fetch(prompt, [], 0, lambda _: False)
            engine.runner.encode(prompt.media)
            plain.runner.encode(prompt.media)
            for digest, features in engine.runner.features.items():
                assert torch.equal(features, plain.runner.features[digest])
        assert engine.runner.disk_cache.stats().num_media_hits == 2


def test_a_warm_up_does_not_count_as_looked_for(path):
    with opened(path) as engine:
        engine.fetch(engine.prompt(message("A first picture", image="objects.png")), GREEDY)
        answers(engine, asked=[message("And another", image="objects.png")])
        cache, scheduler = engine.runner.disk_cache, engine.scheduler
        assert cache.stats().num_media_queries and scheduler.num_store_queries and scheduler.encoder_queries[0]
        engine.end_warm_up()
        stats = cache.stats()
        assert (stats.num_media_queries, stats.num_media_hits) == scheduler.encoder_queries == (0, 0)
        assert (scheduler.num_store_queries, scheduler.num_store_hits) == (0, 0)
        assert stats.read_bytes, "bytes were read all the same"


def test_what_is_fetched_before_a_request_is_added_is_fetched_once(path, wanted, monkeypatch):
    """The thread of the steps waits for nobody who reads, and media count once."""
    for file in entries(path, "kv")[::2]:
        file.unlink()
    with opened(path) as engine:
        cache, prompts = engine.runner.disk_cache, [engine.prompt(question) for question in questions()]
        for prompt in prompts:
            engine.fetch(prompt, GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_reading", None)
            found = engine.generate(prompts, GREEDY)
        assert [x.token_ids for x in found] == [x.token_ids for x in wanted[0]]
        stats = cache.stats()
        assert (stats.num_media_queries, stats.num_media_hits) == (2, 2)
        engine.scheduler.forget()
        engine.generate(prompts, GREEDY)
        assert cache.stats().num_media_queries == 4, "a prompt that is asked again is fetched again"


def test_lack_of_memory_for_copies_harms_no_step(tmp_path, wanted, caplog, monkeypatch):
    def failing(block_ids):
        raise RuntimeError("out of memory")

    with opened(tmp_path) as engine:
        cache = engine.runner.disk_cache
        with monkeypatch.context() as patch:
            patch.setattr("executor.engine.disk_cache.cache._runs", failing)
            assert same(answers(engine), wanted[0])
        cache.flush()
        assert not cache._queued and not cache._queued_bytes and cache.stats().num_dropped
        assert [record.message for record in caplog.records if "out of memory" in record.message] == [
            f"{cache.folder.path}: blocks cannot be copied (out of memory); they are not kept, nor others for 60 s"
        ]
        cache._resting_until_s = 0.0
        engine.scheduler.forget()
        assert same(answers(engine), wanted[0])
    assert entries(tmp_path, "kv")


class Lost:
    """Rows of a device that has lost them."""

    def cpu(self):
        raise RuntimeError("device lost")


def test_what_cannot_be_copied_to_the_host_is_dropped_and_the_next_is_written(tmp_path, wanted, caplog, monkeypatch):
    with opened(tmp_path) as engine:
        cache = engine.runner.disk_cache
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_copied", lambda block_ids: Lost())
            engine.generate([message(LONG)], GREEDY)
            cache.flush()
        num_lost = cache.stats().num_dropped
        assert num_lost > 1 and not entries(tmp_path)
        assert not cache._queued and not cache._queued_bytes
        assert caplog.text.count("device lost") == 1
        engine.scheduler.forget()
        assert same(answers(engine), wanted[0])
    assert cache.stats().num_dropped == num_lost
    with opened(tmp_path) as engine:
        assert same(answers(engine), wanted[1]), "all of it is there"


def test_two_pictures_that_are_alike_are_read_once(tmp_path):
    picture = {"type": "image", "image": Image.effect_noise((128, 128), 60).convert("RGB")}
    asked = [[{"role": "user", "content": [picture, picture, {"type": "text", "text": text}]}] for text in ("A", "B")]
    with opened(tmp_path) as engine:
        wanted = answers(engine, asked=asked)
    assert len(entries(tmp_path, "media")) == 1
    for file in entries(tmp_path, "kv"):
        file.unlink()
    with opened(tmp_path) as engine:
        assert same(answers(engine, asked=asked), wanted)
        assert engine.runner.disk_cache.stats().read_bytes == entries(tmp_path, "media")[0].stat().st_size - 64
