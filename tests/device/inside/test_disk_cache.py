"""The prefix cache on disk behind caches as chips lay them out: blocks come back bit for bit."""

import pytest
import torch

from executor.engine.disk_cache.cache import DiskCache
from executor.engine.disk_cache.folder import EntryFolder, make_root
from executor.schedule.request import SamplingParams
from tests.device.inside.npu import A2, A3, backend, engine_on, exact
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen3_vl"
PARAMS = SamplingParams(max_new_tokens=12, logprobs=2, ignore_eos=True)
PICTURE = {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}
QUESTIONS = [
    [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What do you see?"}]}],
    "Count from one to twenty and say every word again. " * 4,
]


def opened(path, soc: str, cache: str):
    engine = engine_on(backend(soc, cache=cache), TINY, torch.float32)
    runner, config = engine.runner, engine.runner.model.config
    folder = EntryFolder(make_root(path), "ab", 10**9)
    features = 1 + runner.model.num_taps, config.text.hidden_size
    runner.disk_cache = DiskCache(folder, runner.kv, runner.block_size, runner.device, features, runner.dtype)
    engine.scheduler.store = runner.disk_cache
    return engine


@pytest.mark.parametrize("soc, cache", [(A2, "ND"), (A2, "NZ"), (A3, "NZ")])
def test_blocks_come_back(tmp_path, soc, cache) -> None:
    with exact():
        with opened(tmp_path, soc, cache) as engine:
            assert (engine.runner.kv[0].k.shape[-1] == 16) == (cache == "NZ")
            cold, warm = (engine.generate(QUESTIONS, PARAMS) for _ in range(2))
        with opened(tmp_path, soc, cache) as engine:
            found = engine.generate(QUESTIONS, PARAMS)
            assert engine.scheduler.num_store_hits == sum(x.cached_tokens for x in warm) > 0
    assert [(x.token_ids, x.logprobs) for x in found] == [(x.token_ids, x.logprobs) for x in warm]
    assert [x.token_ids for x in found] == [x.token_ids for x in cold]
