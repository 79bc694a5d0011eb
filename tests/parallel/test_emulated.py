"""The NPU backend over two ranks: emulated chips answer as one CPU rank does, eagerly and from decode graphs."""

from pathlib import Path
from typing import Any

import pytest

from emulator.activate import available
from executor.commands.compress.__main__ import work
from tests.msmodelslim.folders import FOLDERS
from tests.parallel.jobs import case, run_ranks
from tests.quant.compressing import stand_in

SPARSE = ("qwen3_vl_w8a8s",)
CASES = {
    "a2_graph_tp2": ("qwen2_5_vl", {}, "atlas_800i_a2", {"exe_mode": "ge_graph", "strict_graph": True}),
    "a3_graph_moe_dp2_ep2": (
        "qwen3_vl_moe",
        {"attn_tp_size": 1, "moe_ep_size": 2},
        "atlas_800i_a3",
        {"exe_mode": "ge_graph", "strict_graph": True},
    ),
    # Each replica has drafts when it has them: both replay the graph that holds the longest row of either.
    "a3_graph_drafts_moe_dp2": (
        "qwen3_vl_moe",
        {"attn_tp_size": 1, "num_drafts": 5},
        "atlas_800i_a3",
        {"exe_mode": "ge_graph", "strict_graph": True},
    ),
    "duo_tp2": ("qwen3_vl", {"vision_parallel": "data"}, "atlas_300i_duo", {}),
    # Its routing knows no range of experts: each rank counts its own from 0.
    "duo_moe_ep2": ("qwen3_vl_moe", {"moe_ep_size": 2}, "atlas_300i_duo", {}),
    # Static, with a float down_proj; and dynamic, with biases that one rank adds.
    "a3_w8a8_tp2": ("qwen3_vl", {}, "atlas_800i_a3", {"model_path": "qwen3_vl_w8a8"}),
    "duo_w8a8_dynamic_tp2": ("qwen3_vl", {}, "atlas_300i_duo", {"model_path": "qwen3_vl_w8a8_dynamic"}),
    # Each rank reads its own part of compressed weights; one CPU rank reads the weights that they were made of.
    "duo_w8a8sc_tp2": ("qwen3_vl", {}, "atlas_300i_duo", {"model_path": "qwen3_vl_w8a8s"}),
}


def emulated(family: str, parallel: dict[str, Any], soc: str, model: dict[str, Any]) -> dict[str, Any]:
    told = case(family, 2, **parallel)
    told["model_config"] |= {"device": "npu_emulated", "soc": soc, "dtype": "auto", **model}
    told["scheduler_config"] |= {"block_size": 128, "max_num_batched_tokens": 512}
    told["generation_config"]["ignore_eos"] = False
    told["scheduler_config"]["graph_batch_sizes"] = [3]  # a conversion for each size, in each rank
    return told


def compressed(source: Path, folder: Path) -> Path:
    options = ["--tp", "2", "--executable", str(stand_in(folder))]
    work(["--model_path", str(source), "--save_directory", str(folder / "parts"), *options])
    return folder / "parts"


@pytest.fixture(scope="module")
def answers(tmp_path_factory, msmodelslim) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("emulated")
    alone, together = [case(family) for family, *_ in CASES.values()], [emulated(*each) for each in CASES.values()]
    for one, two in zip(alone, together, strict=True):
        one["generation_config"]["ignore_eos"] = False
        if (path := two["model_config"]["model_path"]) in FOLDERS:
            quantized = msmodelslim(path)
            one["model_config"]["model_path"] = str(quantized)
            two["model_config"]["model_path"] = str(compressed(quantized, folder) if path in SPARSE else quantized)
    wanted = run_ranks(1, alone, folder)
    # All in the same two processes, which change the chip in between: importing torch_npu is most of the cost.
    found = run_ranks(2, together, folder)
    return {
        name: {"found": ours, "wanted": theirs["answers"]}
        for name, ours, theirs in zip(CASES, found, wanted, strict=True)
    }


@pytest.mark.skipif(bool(available()), reason=available() or "")
@pytest.mark.parametrize("name", CASES)
def test_two_emulated_ranks_answer_as_the_cpu(name, answers) -> None:
    found, wanted = answers[name]["found"], answers[name]["wanted"]
    equal = [ours == theirs for ours, theirs in zip(found["answers"], wanted, strict=True)]
    # Half precision may move one box by a pixel.
    assert found["status"] == 0 and len(equal) == 6 and sum(equal) >= 5, found["answers"]
    lengths = {length for *_, length, _ in found["steps"]}
    drafts = CASES[name][1].get("num_drafts")
    in_graph = CASES[name][3].get("exe_mode") == "ge_graph"
    # Steps in which some prompt is read are eager (0), and decode rows among them. Which requests a replica has, and
    # what the other one does beside a step with drafts, is a matter of time: their lengths are the graphs' at most.
    known = {1, 1 + drafts} if drafts else {1} if in_graph else set()
    is_alone = "attn_tp_size" not in CASES[name][1]
    assert lengths - {0} == known if is_alone else lengths - {0} <= known
    if drafts and is_alone:
        with_drafts = {length for *_, num_drafts, length, _ in found["steps"] if num_drafts}
        assert with_drafts - {0} == {1 + drafts} and sum(num_drafts for *_, num_drafts, _, _ in found["steps"]) > drafts
