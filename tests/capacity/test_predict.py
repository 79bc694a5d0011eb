"""Predictions: what they are made of, what they grow with, and the sums of many replicas."""

import re
from dataclasses import dataclass, replace

import pytest

from executor.capacity.calibrate import calibrated
from executor.capacity.chips import read_chip
from executor.capacity.costs import Row, decode_cost, prefill_cost, vision_cost
from executor.capacity.installation import (
    EVENT_BYTES,
    HTTP_TOKEN_S,
    JPEG_PIXEL_BYTES,
    MEASURED_IN,
    PICTURE_S,
    Node,
    install,
    measured,
    replicas_of,
)
from executor.capacity.predict import HOST_ROW_S, Prediction, predict
from executor.capacity.times import Constants, chunks, prompts_cost, step_time
from executor.capacity.work import StepCost, Work
from executor.serve.asks import Delta
from executor.serve.openai.chat_reply import ChunkWriter, ReplyStyle
from executor.serve.parser import AnswerParser
from tests.capacity.models import MOE, QWEN3, published, recipe_of
from tests.reference import REPO

A3 = read_chip("a3_die")
_, SHAPES = published(QWEN3)


@dataclass(frozen=True)
class Workload:
    users: int = 8
    text_tokens: int = 500
    pictures: int = 0
    grid: tuple[int, int] = (34, 60)
    output_tokens: int = 400

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.pictures * (self.grid[0] * self.grid[1] + 2)


def on_a3(quantization: str = "none", degrees=(1, 1, 1, "tp"), exe_mode: str = "ge_graph", **scheduler):
    return recipe_of(QWEN3, quantization, degrees, soc="atlas_800i_a3", exe_mode=exe_mode, **scheduler)


def predicted(workload: Workload, *arguments, **options) -> Prediction:
    return predict(on_a3(*arguments, **options), SHAPES, A3, workload)


def test_a_step_is_the_longer_of_reading_and_computing_of_each_part_and_what_stands_between():
    chip = A3.model_copy(
        update={
            "bandwidth_bytes_per_s": 10.0,
            "flops_per_s": {"bfloat16": 8.0, "int8": 16.0},
            "link_bytes_per_s": 5.0,
            "link_latency_s": 2.0,
        }
    )
    cost = StepCost({"reads": Work(8, 0, 90, 10), "computes": Work(8, 32, 0, 0, 10)}, 3, 1, 10.0, 4)
    time = step_time(cost, chip, "bfloat16", Constants(7.0, 11.0, 0.5), 7.0)
    assert time.parts == {"reads": 10.0, "computes": 8 / 4 + 32 / 8}
    assert (time.launching_s, time.sending_s) == (21.0, 10.0)
    assert time.total_s == 47.0


def test_a_decode_step_is_never_faster_than_its_floor_and_near_its_own_terms():
    found = predicted(Workload())
    cost = decode_cost(on_a3(), SHAPES, 8, 500 + 200)
    floor_s = cost.floor_s(A3.bandwidth_bytes_per_s, A3.rate("bfloat16"), A3.rate("int8"))
    assert floor_s < found.tpot_ms / 1e3 < floor_s + cost.kernels * calibrated().constants.node_s + 1e-3
    assert sum(found.parts_ms.values()) == pytest.approx(found.tpot_ms)
    assert found.tpot_host_ms > found.tpot_ms + 8e3 * HOST_ROW_S


def test_what_a_prediction_grows_with():
    base = predicted(Workload())
    assert predicted(Workload(users=1)).tpot_ms < base.tpot_ms
    assert predicted(Workload(text_tokens=5000)).ttft_ms > 5 * base.ttft_ms
    assert predicted(Workload(pictures=1)).ttft_ms > predicted(Workload(text_tokens=500 + 2042)).ttft_ms
    assert predicted(Workload(), "w8a8").tpot_ms < base.tpot_ms
    assert base.tpot_ms / 2 < predicted(Workload(), degrees=(2, 2, 1, "tp")).tpot_ms < base.tpot_ms
    assert predicted(Workload(), exe_mode="eager").tpot_ms > base.tpot_ms
    assert base.ttft_all_ms > 5 * (base.ttft_ms - base.tpot_ms), "eight prompts compute eight times as much"


def test_replicas_share_the_users_and_add_their_tokens():
    one, two = predicted(Workload(users=8)), predicted(Workload(users=16), degrees=(2, 1, 1, "tp"))
    assert (two.replicas, two.batch) == (2, 8)
    assert two.tpot_ms == one.tpot_ms
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    crowded = predicted(Workload(users=100))
    assert crowded.batch == 8, "max_num_seqs"


def test_tokens_a_second_are_those_of_the_steps():
    found = predicted(Workload())
    seconds = 400 * (found.decode.total_s + 8 * HOST_ROW_S) + 8 * found.prefill.total_s
    assert found.tokens_per_s == pytest.approx(8 * 400 / seconds)
    assert found.tpot_host_ms == pytest.approx(1e3 * seconds / 400)


def drafting(rate: float | None, num_drafts: int = 7, workload=Workload(), **options) -> Prediction:
    speculative = {"method": "ngram", "num_speculative_tokens": num_drafts}
    recipe = on_a3(**options).replace(speculative=speculative, plan={"acceptance_probability": rate})
    return predict(recipe, SHAPES, A3, workload)


def test_drafts_are_predicted_by_how_often_they_are_right():
    plain, none, never, often, always = predicted(Workload()), *(drafting(rate) for rate in (None, 0.0, 0.8, 1.0))
    assert replace(none, step=plain.step, decode=plain.decode) == plain, "no rate, no gain and no cost"
    assert (never.step_tokens, often.step_tokens, always.step_tokens) == (1, pytest.approx(4.16, abs=0.01), 8)
    assert never.step == often.step == always.step == decode_cost(on_a3(), SHAPES, 8, 700, drafts=7)
    assert always.tpot_ms < plain.tpot_ms < never.tpot_ms, "all are verified, few are kept"
    assert never.tpot_ms == pytest.approx(8 * always.tpot_ms)
    seconds = 400 * (often.decode.total_s / often.step_tokens + 8 * HOST_ROW_S) + 8 * often.prefill.total_s
    assert often.tokens_per_s == pytest.approx(8 * 400 / seconds)


def test_few_tokens_of_a_step_cost_no_more_than_one():
    """A request alone: weights are read once, for one token or for eight."""
    one, eight = predicted(Workload(users=1)).decode.total_s, drafting(0.5, workload=Workload(users=1)).decode.total_s
    assert one < eight < 1.02 * one


def test_drafts_that_no_graph_holds_are_verified_eagerly():
    """More tokens than the largest graph has, and attention over an int8 cache."""
    in_graph, large, odd = drafting(0.5), drafting(0.5, 15), drafting(0.5, graph_batch_sizes=(4,))
    assert in_graph.step.kernels == predicted(Workload()).step.kernels
    assert in_graph.decode.launching_s == pytest.approx(in_graph.step.kernels * calibrated().constants.node_s)
    assert large.decode.launching_s == in_graph.decode.launching_s, "8 x 16 tokens are 128"
    assert odd.decode.launching_s == pytest.approx(odd.step.kernels * calibrated().constants.call_s)


def test_a_converted_step_takes_the_place_of_the_counted_one():
    recipe, workload, asked = on_a3(), Workload(), []

    def step(batch: int, context: float) -> StepCost:
        asked.append((batch, context))
        return decode_cost(recipe, SHAPES, batch, context) + StepCost(kernels=1000)

    found, counted = predict(recipe, SHAPES, A3, workload, decode_step=step), predicted(workload)
    assert asked == [(8, 700)]
    assert found.tpot_ms == pytest.approx(counted.tpot_ms + 1e6 * calibrated().constants.node_s)


def test_the_calibrations_errors_come_with_every_prediction():
    assert predicted(Workload()).calibration_error == calibrated().error


def test_prompts_fill_steps_in_order():
    assert chunks(2, 10, 4, 100) == [[Row(10, visual=4), Row(10, visual=4)]]
    cut = chunks(2, 10, 0, 8)
    assert cut == [[Row(8, 0, False)], [Row(2, 8), Row(6, 0, False)], [Row(4, 6)]]
    assert sum(row.new for step in cut for row in step) == 20


def test_a_prompts_cost_is_its_pictures_and_its_steps():
    recipe, grids = on_a3(max_num_batched_tokens=4096), [(1, 68, 120)]
    found = prompts_cost(recipe, SHAPES, 1, 100, grids)
    row = Row(2140, visual=2040)
    assert found == vision_cost(recipe, SHAPES, grids) + prefill_cost(recipe, SHAPES, [row])


def test_experts_of_all_replicas_see_all_tokens():
    """Two replicas bring twice the tokens to the same experts, which more of them are read for."""
    _, shapes = published(MOE)
    one, two = (recipe_of(MOE, degrees=d, soc="atlas_800i_a3") for d in ((4, 4, 4, "tp"), (4, 2, 4, "tp")))
    found = [decode_cost(each, shapes, 4, 100).parts["experts"] for each in (one, two)]
    assert found[1].flops == pytest.approx(2 * found[0].flops)
    assert found[0].weight_bytes < found[1].weight_bytes < 2 * found[0].weight_bytes


@pytest.mark.parametrize(
    "dies, world, per_node, replicas",
    [(16, 2, 8, 8), (15, 2, 8, 7), (8, 3, 8, 2), (16, 16, 8, 1), (40, 16, 8, 2), (24, 12, 8, 1), (4096, 2, 16, 2048)],
)
def test_replicas_of_many_dies(dies, world, per_node, replicas):
    assert replicas_of(dies, world, per_node) == replicas


def test_an_installation_is_bound_by_the_resource_that_is_full_first():
    workload = Workload(pictures=1)
    each = predicted(workload, degrees=(2, 2, 1, "tp"))

    def of(dies: int, **options):
        return install(dies, 2, A3, workload, each, 32, **options)

    small = of(4)
    assert (small.replicas, small.nodes, small.idle_dies) == (2, 1, 0)
    assert small.tokens_per_s == pytest.approx(2 * each.tokens_per_s) and small.bound_by == "chips"
    large = of(4096)
    assert large.limits["chips"] == pytest.approx(2048 * each.tokens_per_s)
    assert large.bound_by == "front_door" and large.tokens_per_s == pytest.approx(1 / HTTP_TOKEN_S)
    assert of(4096, front_doors=256).limits["front_door"] == pytest.approx(256 / HTTP_TOKEN_S)
    assert of(4096, front_doors=10_000, node=Node(network_bytes_per_s=1e6)).bound_by == "network"
    assert of(4096, front_doors=10_000, node=Node(cores=17)).bound_by == "hosts"
    assert of(5).idle_dies == 1


def test_more_pictures_fill_the_network_and_the_hosts_sooner():
    each = predicted(Workload())
    without, with_pictures = (
        install(64, 1, A3, workload, each, 32).limits for workload in (Workload(), Workload(pictures=2))
    )
    for resource in ("hosts", "network"):
        assert with_pictures[resource] < without[resource]
    assert with_pictures["chips"] == without["chips"]


def test_measured_figures_of_hosts_are_those_of_the_page_that_they_name():
    page = (REPO / MEASURED_IN).read_text()
    assert measured()["source"] == MEASURED_IN and "## Measured" in page
    told = page.partition("## Measured")[2]
    assert f"{1e3 * HTTP_TOKEN_S:g} ms of CPU time" in re.search(r"HTTP per token.*", told)[0]
    assert f"{1e3 * PICTURE_S:g} ms of CPU time" in re.search(r"1080p JPEG of .*", told)[0]
    assert f"and {1e3 * 32 * HOST_ROW_S:g} ms" in re.search(r"decode step of 32 rows.*", told)[0]
    jpeg_bytes = float(re.search(r"1080p JPEG of ([\d.]+) MB", told)[1]) * 1e6
    assert pytest.approx(jpeg_bytes / (1920 * 1080), rel=0.02) == JPEG_PIXEL_BYTES


def test_a_streamed_tokens_bytes_are_about_those_of_the_servers_events():
    """Of a usual name, with the frames of HTTP, TCP and IP around it."""
    frame = {"id": f"chatcmpl-{'0' * 32}", "created": 1764000000, "model": "Qwen3-VL-8B-Instruct"}
    writer = ChunkWriter(frame, ReplyStyle(1, AnswerParser, str))
    events = [writer.write(Delta(0, " word", (5,), 9)) for _ in range(2)]
    assert 0.7 < (len(events[1]) + 6 + 66) / EVENT_BYTES < 1.3


def test_a_slower_chip_is_slower():
    slow = replace(SHAPES, num_layers=SHAPES.num_layers // 2)
    assert predict(on_a3(), slow, A3, Workload()).tpot_ms < predicted(Workload()).tpot_ms
    half = A3.model_copy(update={"bandwidth_bytes_per_s": A3.bandwidth_bytes_per_s / 2})
    assert predict(on_a3(), SHAPES, half, Workload()).tpot_ms > predicted(Workload()).tpot_ms
