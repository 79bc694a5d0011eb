"""torch_npu's own profiler over an emulated chip: of the host there is a trace, of a chip there is nothing."""

from collections import Counter

from executor.commands.build import build_engine
from executor.engine.parts import parts
from executor.recipe.schema import build_recipe
from executor.schedule.request import SamplingParams
from tests.engine.traces import outer_of, read_spans
from tests.reference import REPO


def test_a_trace_of_an_emulated_chip(tmp_path, capsys):
    model = {
        **{"model_path": str(REPO / "models" / "tiny" / "qwen3_vl"), "device": "npu_emulated", "soc": "atlas_800i_a2"},
        **{"profile": True, "profile_steps": 3, "output_path": str(tmp_path)},
    }
    recipe = build_recipe({"model_config": model, "scheduler_config": {"max_model_len": 1024, "num_blocks": 32}})
    picture = {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}
    with build_engine(recipe) as engine:
        engine.generate([[{"role": "user", "content": [picture]}]], SamplingParams(max_new_tokens=4, ignore_eos=True))
        names = set(parts(engine.runner.model))
    (file,) = (tmp_path / "profile").glob("*.json")
    stages = {"vision", "prefill", "decode", "sampling", "host"}  # media are made in a thread that it does not record
    pairs = Counter(outer_of(read_spans(file, stages | names)))
    assert {name for name, _ in pairs} == stages | names
    assert pairs["layer 0", "prefill"] == pairs["vision block 0", "vision"] == pairs["vision", "host"] == 1
    assert pairs["decode", "host"] == pairs["layer 0", "decode"] == 2
    said = capsys.readouterr()
    assert not said.out and "profiler.py" in said.err  # results alone go to stdout
