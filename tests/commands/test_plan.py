"""The `plan` command over every shipped recipe, in all its forms, and what it answers to wrong input."""

import json
import re
import shlex

import pytest
from PIL import Image

from executor.__main__ import main
from executor.capacity.answer import settled
from executor.capacity.chips import chip_names
from executor.capacity.choices import published_models
from executor.command_line import parse
from executor.commands.plan.run import run
from executor.commands.plan.show import COUNTS, NOT_MEASURED, PARTS
from executor.errors import UserError
from executor.recipe.schema import load_recipe
from executor.recipe.settle import prepare
from tests.reference import REPO

CONFIGS = sorted(path.name for path in (REPO / "config").glob("*.yaml"))
CONTRACT = {"command", "device", "memory_bytes", "max_num_seqs", "max_model_len", "predicted", "calibration_error"}


RATE = "plan_config.acceptance_probability=0.8"
NGRAM = ("speculative_config.method=ngram",)


def planned(config: str, *words: str) -> dict:
    """The document of a command line; the exit status is always 0."""
    arguments = parse([str(REPO / "config" / config), "plan", *words])
    document, status = run(load_recipe(arguments.config, arguments.overrides))
    assert status == 0
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_recipe_is_planned(config, capsys):
    document = planned(config)
    shown = capsys.readouterr().out
    assert document.keys() >= CONTRACT | {"fits"} and document["command"] == "plan"
    assert document["memory_bytes"].keys() == PARTS.keys()
    assert sum(document["memory_bytes"].values()) == document["memory_needed_bytes"]
    assert document["fits"] is True and document["faults"] == []
    assert document["max_num_seqs"] >= 1 and document["max_users"] >= document["workload"]["users"]
    if config.startswith("quickstart"):
        assert document["device"] == "cpu" and document["predicted"] is document["calibration_error"] is None
        assert document["counts_from"] is document["decode_step"] is None
        assert "no prediction" in shown and document["memory_bytes"]["process"] > 0
        return
    assert document["predicted"]["tpot_ms"] > 0 and document["predicted"]["ttft_ms"] > document["predicted"]["tpot_ms"]
    assert document["memory_bytes"]["process"] == 0
    assert NOT_MEASURED in shown and "held out" in shown and "fitted: node_s" in shown
    assert "with two fitted points only" in shown and "decode 13 %, ttft 14 %" in shown
    assert document["calibration_error_two_points"]["decode"] > document["calibration_error"]["decode"]
    assert document["counts_from"] == "table" and COUNTS["table"] in shown
    assert document["decode_step"]["kernels"] > 0 and f"{document['decode_step']['kernels']} kernels" in shown
    for part, size in document["memory_bytes"].items():
        assert (PARTS[part] in shown) == bool(size)


@pytest.mark.parametrize("words", [("--for", "one user, two 1080p pictures"), ("--table", "--chip", "910b4")])
def test_what_is_tried_on_the_way_is_not_talked_about(words, caplog):
    with caplog.at_level("INFO"):
        planned("qwen3_vl_2b.yaml", *words)
    talked = [record.getMessage() for record in caplog.records if record.name.startswith("executor.recipe")]
    assert talked == [] and caplog.text.count("looking through") == 1


@pytest.mark.parametrize("config, is_said", [("qwen3_vl_32b_300i_duo_w8a8.yaml", False), ("qwen3_vl_8b.yaml", True)])
def test_weights_that_the_recipe_names_need_not_be_made(config, is_said, capsys):
    planned(config, "--for", "one user, w8a8, 300I DUO")
    assert ("its weights are made as" in capsys.readouterr().out) == is_said


def test_the_recipes_of_config_hold_all_that_they_promise():
    """max_num_seqs requests of max_model_len, or at least one where the file says less of both."""
    held = {config: planned(config) for config in ("qwen3_vl_8b.yaml", "qwen2_5_vl_72b.yaml")}
    for config, document in held.items():
        recipe = load_recipe(REPO / "config" / config)
        assert document["max_num_seqs"] >= recipe.scheduler.max_num_seqs
        assert document["max_model_len"] >= recipe.scheduler.max_model_len


@pytest.mark.parametrize("chip", chip_names())
def test_any_chip_can_be_asked(chip):
    document = planned("qwen3_vl_8b.yaml", "--chip", chip, "--dtype", "auto", "--set", "model_config.exe_mode=eager")
    wanted = "float16" if chip.startswith("310p3") else "bfloat16"
    assert document["dtype"] == wanted and document["predicted"]["tokens_per_s"] > 0


def test_a_recipe_for_a_cpu_is_planned_on_a_chip():
    document = planned("quickstart.yaml", "--chip", "910b4", "--dtype", "auto")
    assert document["soc"] == "atlas_800i_a2" and document["dtype"] == "bfloat16" and document["predicted"]


def test_what_does_not_fit_is_an_answer(capsys):
    document = planned("qwen2_5_vl_72b.yaml", "--set", "parallel_config.world_size=2", "parallel_config.attn_tp_size=2")
    assert document["fits"] is False and document["max_num_seqs"] == document["max_model_len"] == 0
    ranks = re.search(r"(\d+) ranks hold it", document["faults"][0])[1]
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    words = [f"parallel_config.world_size={ranks}", f"parallel_config.attn_tp_size={ranks}"]
    assert planned("qwen2_5_vl_72b.yaml", "--set", *words, "parallel_config.vision_parallel=data")["fits"] is True


@pytest.mark.parametrize(
    "config, words, parts",
    [
        ("qwen3_vl_8b.yaml", ["--chip", "910b9"], ["there is no chip 910b9", "910b4"]),
        ("qwen3_vl_8b.yaml", ["--chip", "310p3"], ["float16 only", "dtype: auto"]),
        ("quickstart.yaml", ["--chip", "910b4"], ["got float32", "dtype: bfloat16"]),
        ("qwen3_vl_8b.yaml", ["--set", "parallel_config.world_size=3"], ["cannot be split over 3 ranks"]),
        ("qwen2_5_vl_7b.yaml", ["--set", "parallel_config.world_size=8"], ["28 query heads do not divide by 8"]),
        ("qwen3_vl_8b.yaml", ["--model", "Qwen/Qwen9-VL-1B"], ["not on this machine", "sizes that plan has"]),
        ("qwen3_vl_8b.yaml", ["--set", "model_config.quantization=w8a8"], ["the checkpoint", "is none"]),
        ("qwen3_vl_8b.yaml", ["--set", "model_config.soc=null"], ["asks no driver", "--chip"]),
        ("qwen3_vl_8b.yaml", ["--for", "32 usrs"], ["'32 usrs' is not understood", "TPOT 50 ms"]),
        ("qwen3_vl_8b.yaml", ["--for", "4 pictures of 1080p, 2k in all"], ["leave none for text", "8168"]),
        ("qwen3_vl_8b.yaml", ["--for", "w8a8sc, A2"], ["no chip of", "takes w8a8sc weights"]),
        ("qwen3_vl_30b_a3b.yaml", ["--for", "w8a8sc"], ["takes w8a8sc weights"]),
        ("qwen3_vl_8b.yaml", ["--set", "plan_config.picture_size=[4000,10]"], ["one side is 400.0 times the other"]),
        ("qwen3_vl_8b.yaml", ["--table", "--for", "8 users"], ["given beside demand", "leave out one"]),
        ("qwen3_vl_8b.yaml", ["--table", "--set", "plan_config.dies=16"], ["given beside dies"]),
        ("qwen3_vl_8b.yaml", ["--table", "--from-graph"], ["plan_config.table", "given beside from_graph"]),
        ("qwen3_vl_8b.yaml", ["--for", "8 users", "--from-graph"], ["plan_config.demand", "given beside from_graph"]),
        ("quickstart.yaml", ["--from-graph"], ["from_graph", "no graph to convert", "--chip 910b4"]),
        ("qwen3_vl_8b_300i_duo.yaml", ["--from-graph"], ["310P3", "decodes eagerly and has no graph", "leave it out"]),
        ("qwen3_vl_8b.yaml", ["--from-graph", "--set", "model_config.exe_mode=eager"], ["is eager", "set ge_graph"]),
        (
            "qwen3_vl_8b.yaml",
            ["--set", RATE],
            ["acceptance_probability", "makes no drafts"],
        ),
        (
            "qwen3_vl_8b.yaml",
            ["--set", RATE, *NGRAM, "--from-graph"],
            ["acceptance_", "given beside from_graph"],
        ),
        ("qwen3_vl_8b.yaml", ["--set", RATE, *NGRAM, "--table"], ["acceptance_probability", "given beside table"]),
    ],
)
def test_what_contradicts_itself_is_refused(config, words, parts):
    with pytest.raises(UserError) as refused:
        planned(config, *words)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "config, demand",
    [
        ("qwen3_vl_8b.yaml", "32 users, 4 pictures of 1080p, 8k context, TPOT 50 ms"),
        ("qwen3_vl_8b.yaml", "100 users, 2k context, 300 output tokens, on 300I DUO, TPOT 300 ms"),
        ("qwen3_vl_8b_w8a8.yaml", "8 users, w8a8, A2, TPOT 20 ms"),
        ("qwen2_5_vl_72b.yaml", "16 users, a picture of 720p, TTFT 4 s, A3"),
        ("qwen3_vl_30b_a3b.yaml", "64 users, TPOT 60 ms"),
        ("quickstart.yaml", "20 users, Qwen3-VL-32B, TPOT 100 ms, 400 tokens/s"),
        ("quickstart.yaml", "4 users, 256 context, 64 output tokens"),
    ],
)
def test_the_recipe_that_is_named_holds_the_demand_as_typed(config, demand, capsys):
    """The printed overrides are typed behind `plan`: the same memory, the same prediction, and it fits."""
    document = planned(config, "--for", demand)
    assert document["fits"] is True and NOT_MEASURED in capsys.readouterr().out
    _, *overrides = shlex.split(document["overrides"])
    again = planned(config, "--set", *overrides)
    assert again["fits"] is True
    for key in ("device", "quantization", "world_size", "workload", "memory_bytes", "predicted", "max_users"):
        assert again[key] == document[key], key
    assert document["dies"] == again["world_size"]


def test_the_bounds_of_a_demand_are_kept():
    document = planned("qwen3_vl_8b.yaml", "--for", "48 users, TPOT 30 ms, TTFT 500 ms, 1200 tokens/s")
    predicted = document["predicted"]
    assert predicted["tpot_host_ms"] <= 30 and predicted["ttft_ms"] <= 500 and predicted["tokens_per_s"] >= 1200


def test_what_stops_the_next_cheaper_recipes_is_said(capsys):
    document = planned("qwen3_vl_8b.yaml", "--for", "32 users, 4 pictures of 1080p, 8k context, TPOT 50 ms")
    shown = capsys.readouterr().out
    assert document["cheaper"] and all(each["faults"] for each in document["cheaper"])
    assert all(each["dies"] <= document["dies"] for each in document["cheaper"])
    assert document["cheaper"][0]["faults"][0] in shown and document["overrides"] in shown
    assert document["cost_order"] in shown


@pytest.mark.parametrize("demand", ["1 user, TPOT 0.1 ms", "9,000 users, 100k context, at most 2 dies", "500k context"])
def test_an_impossible_demand_is_an_answer(demand, capsys):
    document = planned("qwen3_vl_8b.yaml", "--for", demand)
    assert document["fits"] is False and document["faults"] and document["overrides"] == ""
    assert "NO RECIPE" in capsys.readouterr().out


def test_the_table_has_all_models_on_all_chips(capsys):
    document = planned("qwen3_vl_8b.yaml", "--table")
    rows = document["table"]
    assert {row["chip"] for row in rows} == set(chip_names())
    assert {row["model"] for row in rows} == set(published_models())
    assert {row["quantization"] for row in rows} == {"none", "w8a8", "w8a8_dynamic", "w8a8sc"}
    assert all(row["predicted"]["tpot_ms"] > 0 for row in rows if row["fewest_ranks"])
    assert sum(row["fewest_ranks"] is None for row in rows) < len(rows) / 20
    shown = capsys.readouterr().out
    assert shown.count("Qwen2.5-VL-72B") == sum("72B" in row["model"] for row in rows)
    assert NOT_MEASURED in shown and "held out" in shown
    assert document["calibration_error"]["decode"] > 0


def test_the_table_of_one_chip():
    rows = planned("qwen3_vl_8b.yaml", "--table", "--chip", "a3_die")["table"]
    assert {row["chip"] for row in rows} == {"a3_die"} and len(rows) == 3 * len(published_models())


@pytest.mark.parametrize(
    "words, names",
    [
        ([], ["plan_memory.png", "plan_speed.png"]),
        (["--for", "4 users, on 910b4"], ["plan_memory.png", "plan_speed.png"]),
        (["--table", "--chip", "310p3"], ["plan_table_310p3.png"]),
    ],
)
def test_charts_are_pictures(words, names, tmp_path):
    document = planned("qwen3_vl_2b.yaml", "--plot", *words, "--set", f"model_config.output_path={tmp_path}")
    assert document["plots"] == [str(tmp_path / name) for name in names]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] >= 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_an_installation_of_many_dies(capsys):
    """2,048 jobs of two ranks; one front door is full long before the chips are."""
    alone = planned("qwen3_vl_8b.yaml")
    found = planned("qwen3_vl_8b.yaml", "--set", "plan_config.dies=4097")["installation"]
    assert (found["nodes"], found["jobs"], found["idle_dies"]) == (513, 2048, 1)
    assert found["limits"]["chips"] == pytest.approx(2048 * alone["predicted"]["tokens_per_s"], rel=1e-3)
    assert found["bound_by"] == "front_door" and found["tokens_per_s"] == min(found["limits"].values())
    assert found["tokens_per_s_with_a_front_door_on_each_node"] > 100 * found["tokens_per_s"]
    shown = capsys.readouterr().out
    assert "4097 dies on 513 nodes: 2048 jobs" in shown and "nothing was tried on many nodes" in shown
    assumptions = re.search(r"assumptions: .*", shown)[0]
    for value in found["assumed"].values():
        assert f"{value * 8 / 1e9 if value > 1e6 else value:g}" in assumptions
    measured = re.search(r"measured on .*", shown)[0]
    assert "(docs/serving.md)" in measured and "0.24 ms" in measured and "not on a chip's host" in measured


@pytest.mark.parametrize(
    "config, dies, part", [("quickstart.yaml", 8, "a CPU has none"), ("qwen3_vl_8b.yaml", 1, "takes 2 ranks")]
)
def test_dies_that_hold_no_job_are_refused(config, dies, part):
    with pytest.raises(UserError, match=part):
        planned(config, "--set", f"plan_config.dies={dies}")


def test_the_installation_of_a_demand_is_of_the_recipe_that_is_named():
    document = planned("qwen3_vl_8b.yaml", "--for", "32 users, TPOT 20 ms", "--set", "plan_config.dies=64")
    assert document["installation"]["jobs"] == 64 // document["dies"]


@pytest.mark.parametrize("config", [name for name in CONFIGS if name.startswith("quickstart")])
def test_plan_and_a_start_count_the_same_memory(config):
    """Of what does not depend on the process that asks."""
    started = prepare(load_recipe(REPO / "config" / config))
    deployment, _ = settled(load_recipe(REPO / "config" / config))
    found = deployment.account()
    assert (found.weights_bytes, found.block_bytes) == (started.memory.weights_bytes, started.memory.block_bytes)
    assert found.step == started.memory.step and found.num_blocks == started.memory.num_blocks
    assert deployment.recipe.model_copy(update={"plan": started.recipe.plan}) == started.recipe


def test_a_mistake_ends_with_status_2_and_its_line(capsys):
    """What does not fit ends with 0, what contradicts itself with 2."""
    config = str(REPO / "config" / "qwen3_vl_8b.yaml")
    assert main([config, "plan", "--chip", "310p3"]) == 2
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["command"] == "plan" and "float16 only" in document["error"]
    assert main([config, "plan", "--set", "plan_config.users=9999"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] is False


@pytest.mark.parametrize(
    "words, part",
    [
        (("--chip", "x" * 300), "there is no chip"),
        (("--device", "cpu"), "is an NPU, but device is cpu"),
        (("--device", "cuda"), "plan knows no cuda"),
        (("--plot", "--set", "model_config.output_path=/etc/passwd"), "model_config.output_path"),
        (("--set", "plan_config.picture_size=[100000,1]"), "plan_config.picture_size"),
    ],
)
def test_mistakes_are_refused_in_words(words, part):
    with pytest.raises(UserError, match=re.escape(part)):
        planned("qwen3_vl_8b.yaml", *words)


def test_what_drafts_gain_is_predicted_where_their_acceptance_is_named(capsys):
    one_user = "plan_config.users=1"
    plain, silent = (
        planned("qwen3_vl_8b.yaml", "--set", one_user),
        planned("qwen3_vl_8b.yaml", "--set", one_user, *NGRAM),
    )
    assert plain["predicted"]["drafts"] == 0 and plain["predicted"]["tokens_per_step"] == 1
    assert silent["predicted"] == plain["predicted"]
    assert "drafts of which" not in capsys.readouterr().out
    found = planned("qwen3_vl_8b.yaml", "--set", one_user, *NGRAM, RATE)["predicted"]
    assert found["drafts"] == 7 and found["tokens_per_step"] == pytest.approx(4.161, abs=1e-3)
    assert 3 < found["tokens_per_s_per_user"] / plain["predicted"]["tokens_per_s_per_user"] < found["tokens_per_step"]
    shown = capsys.readouterr().out
    assert "with 7 drafts of which 80% are right" in shown and "each of 8 tokens" in shown and NOT_MEASURED in shown


def test_millions_of_requests_and_endless_ones_are_answered():
    many = "scheduler_config.max_num_seqs=1000000000"
    assert planned("qwen3_vl_8b.yaml", "--set", many, "plan_config.users=1000000000")["fits"] is False
    endless = planned("qwen3_vl_8b.yaml", "--set", "plan_config.input_tokens=1000000000000")
    assert endless["fits"] is False and endless["predicted"] is None
