"""What a CPU can do is asked by tried calls, forced by a recipe, and alike in a whole engine."""

import os
import subprocess
import sys

import pytest
import torch

from executor.commands.build import build_engine
from executor.device.cpu import capability as module
from executor.device.cpu.capability import Capability, capability
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare
from executor.schedule.request import SamplingParams
from tests.reference import REPO

F32, BF16 = torch.float32, torch.bfloat16
SMALL = Capability("avx2", "AVX2", frozenset((F32,)), packs_fp16=True)
BIG = Capability("avx512", "AVX512", frozenset((F32, BF16)), packs_fp16=True)
ARM = Capability("other", "DEFAULT", frozenset(), packs_fp16=False)
# What keeps the libraries from AVX-512, so that they refuse what they refuse on a smaller machine.
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.parametrize(
    "found, forced, isa",
    [
        (SMALL, "auto", "avx2"),
        (SMALL, "avx2", "avx2"),
        (BIG, "auto", "avx512"),
        (BIG, "avx512", "avx512"),
        (BIG, "avx2", "avx2"),
        (ARM, "auto", "other"),
        (SMALL, "avx512", None),
        (ARM, "avx2", None),
        (ARM, "avx512", None),
    ],
)
def test_a_path_can_be_forced_where_the_cpu_has_it(monkeypatch, found, forced, isa):
    monkeypatch.setattr(module, "_found", lambda: found)
    if isa is None:
        with pytest.raises(UserError, match=f"cpu_isa: {forced} is forced.*{found.vectors}.*cpu_isa: auto"):
            capability(forced)
    else:
        assert capability(forced).isa == isa


def test_a_forced_path_that_is_not_there_is_refused_before_weights(monkeypatch):
    monkeypatch.setattr(module, "_found", lambda: SMALL)
    with pytest.raises(UserError, match="cpu_isa: avx512"):
        prepare(recipe("bfloat16", "avx512"))


def recipe(dtype: str, isa: str):
    model = {"model_path": "models/tiny/qwen2_5_vl", "device": "cpu", "dtype": dtype, "cpu_isa": isa}
    return build_recipe({"model_config": model, "scheduler_config": {"block_size": 16, "num_blocks": 64}})


@pytest.mark.parametrize("dtype, factor", [("float32", 1), ("bfloat16", 2)])
def test_the_estimate_counts_the_cache_in_the_type_that_is_computed_in(monkeypatch, dtype, factor):
    monkeypatch.setattr(module, "_found", lambda: BIG)
    plain, packed = (prepare(recipe(dtype, isa)).memory for isa in ("avx512", "avx2"))
    assert packed.kv_bytes == factor * plain.kv_bytes
    assert packed.weights_bytes == plain.weights_bytes


def test_16_bit_weights_without_avx512_answer_as_float32_does():
    """The same values, in half the memory: logits differ by rounding of float32 alone."""
    if capability().isa == "other":
        pytest.skip("this CPU has no packed fp16 products")
    engines = [build_engine(recipe(dtype, "avx2")) for dtype in ("float32", "bfloat16")]
    question = {"role": "user", "content": [picture(), {"type": "text", "text": "What do you see?"}]}
    prompt = engines[0].processor.build([question])
    params = SamplingParams(max_new_tokens=24, logprobs=1)
    wide, packed = (engine.generate([prompt], params)[0] for engine in engines)
    assert packed.token_ids == wide.token_ids and len(wide.token_ids[0]) > 5
    for ours, exact in zip(packed.logprobs[0], wide.logprobs[0], strict=True):
        assert abs(ours.logprob - exact.logprob) <= 1e-4
    runner = engines[1].runner
    assert runner.dtype is F32 and runner.kv[0].k.dtype is F32
    assert runner.model.language_model.norm.weight.dtype is F32
    embedding = runner.model.language_model.embed_tokens.weight
    assert embedding.dtype is BF16 and is_of_a_file(embedding), "tied weights stand once in memory, packed"


def picture() -> dict:
    return {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}


def is_of_a_file(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a mapping of a safetensors file."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return line.rstrip().endswith(".safetensors")
    return False


def test_a_machine_without_avx512_answers_in_bfloat16():
    """In a process whose libraries refuse AVX-512, as on most laptops: the quick start in its checkpoint's own type."""
    if capability().isa == "other":
        pytest.skip("no x86-64 CPU with AVX2")
    command = [sys.executable, "-m", "executor", "config/quickstart.yaml", "--set", "model_config.dtype=bfloat16"]
    done = subprocess.run(
        [*command, "data_config.prompt=What do you see?", "data_config.media=dataset/media/objects.png"],
        env=os.environ | WITHOUT_AVX512 | {"OMP_NUM_THREADS": "1"}, cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "avx2 path" in done.stderr and "activations and KV cache in float32" in done.stderr
    assert "a blue square" in done.stdout


SPIN = """
import time, torch
torch.set_num_threads(2)
from executor.device.cpu.threads import let_idle_threads_sleep
x = torch.ones(1 << 20)
def spent():
    x.add_(1)
    start = time.process_time()
    for _ in range(30):
        x.add_(1)
        time.sleep(0.01)
    return time.process_time() - start
before = spent()
let_idle_threads_sleep(2)
print(before, spent())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: torch starts no thread that could spin")
def test_idle_threads_sleep_also_where_torch_was_loaded_before():
    """Processor time, which other processes do not change: a spinning thread burns some after every parallel region."""
    policies = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    bare = {name: value for name, value in os.environ.items() if name not in policies}
    done = subprocess.run([sys.executable, "-c", SPIN], env=bare, cwd=REPO, capture_output=True, text=True, check=True)
    spinning, sleeping = map(float, done.stdout.split())
    assert sleeping < 0.7 * spinning


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("isa", ["auto", "avx2"])
def test_what_is_found_does_not_depend_on_the_default_type(dtype, isa):
    """Weights are loaded while the default type is the model's, and schemes ask for the CPU meanwhile."""
    if capability().isa == "other":
        pytest.skip("this CPU has no avx2 path")
    wanted = capability(isa)
    module._found.cache_clear(), module._exact_int8.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert capability(isa) == wanted
    finally:
        torch.set_default_dtype(before)
        module._found.cache_clear(), module._exact_int8.cache_clear()
