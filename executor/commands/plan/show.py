"""A plan for the eye: tables with units. Every predicted number stands below the words "predicted, not measured"."""

from collections.abc import Sequence

from executor.capacity.answer import Answer
from executor.capacity.calibrate import Calibration
from executor.capacity.installation import Installation, assumed, measured
from executor.capacity.predict import Prediction
from executor.capacity.search import COST_ORDER, Search, Verdict
from executor.capacity.table import TableRow
from executor.capacity.workload import Workload, replicas_of
from executor.recipe.memory import GIB

PARTS = {
    "process": "process (Python, torch, libraries)",
    "weights": "weights",
    "kv_cache": "KV cache of the requests",
    "draft_weights": "draft model: weights",
    "draft_kv_cache": "draft model: KV cache",
    "draft_step": "draft model: its steps",
    "step": "peak of a step",
    "encoder_cache": "encoder cache",
    "pictures": "pictures in waiting",
    "graphs": "decode graphs",
    "communication": "communication buffers",
    "disk_cache": "on its way to and from the disk",
    "loading": "second layout while loading",
}
LIMITS = {
    "chips": "chips",
    "hosts": "hosts (HTTP, pictures)",
    "network": "network",
    "front_door": "front doors",
}
UNITS = {"tpot_ms": "ms TPOT", "ttft_ms": "ms TTFT", "tokens_per_s": "tokens/s"}
COUNTS = {
    "table": "counted by arithmetic and a table of kernels, which equals converted graphs and traced steps in tests",
    "ge_graph": "kernels, messages, products and weights of the decode step are those of its converted GE graph; "
    "prefill is eager and has none",
}
NOT_MEASURED = "predicted, not measured"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        placed = (cell.ljust(width) if at < left else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        return "  " + "  ".join(placed).rstrip()

    return "\n".join(map(line, (head, *rows)))


def amount(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def milliseconds(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 10_000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.2f} ms"


def each_request(workload: Workload) -> str:
    """What one request is, in words."""
    pictures = ""
    if workload.pictures:
        word = "picture" if workload.pictures == 1 else "pictures"
        pictures = f" + {workload.pictures} {word} of {workload.picture_tokens} tokens"
    return f"each {workload.text_tokens} tokens of text{pictures}, answer of {workload.output_tokens}"


def asked(workload: Workload) -> str:
    """The workload in words."""
    users = f"{workload.users} requests at once" if workload.users > 1 else "1 request"
    return f"{users}, {each_request(workload)}: {workload.request_tokens} tokens"


def plan(found: Answer) -> str:
    """Memory by part, what fits, and what is predicted."""
    recipe, memory = found.deployment.recipe, found.fit.memory
    replicas = replicas_of(found.deployment.paper)
    ranks = f"{recipe.parallel.world_size} ranks" if recipe.parallel.world_size > 1 else "1 rank"
    dealt = f" in {replicas} replicas" if replicas > 1 else ""
    place = found.chip.name if found.chip else "this machine's CPU"
    weights = recipe.model.dtype if recipe.model.quantization == "none" else recipe.model.quantization
    parts = [
        (PARTS[name], amount(count), f"{100 * count / memory.total_bytes:.0f} %")
        for name, count in memory.by_part().items()
        if count
    ]
    parts.append(("all", amount(memory.total_bytes), f"of {amount(memory.budget_bytes)} allowed"))
    lines = [
        f"{found.deployment.paper.shapes.name}, {weights}, on {ranks}{dealt} of {place}",
        f"asked: {asked(found.fit.workload)}",
        "",
        "memory of a rank, by arithmetic",
        columns(("part", "size", "share"), parts),
        *_phases(found),
        "",
        *_limits(found),
        "",
        *speed(found),
    ]
    return "\n".join(lines)


def _phases(found: Answer) -> list[str]:
    """The peak of a step is the widest of its phases."""
    step = found.fit.memory.step
    assert step is not None, "an estimate knows what its peak is made of"
    phases = {"vision": step.vision_bytes, "prefill": step.text_bytes, "logits": step.logits_bytes + step.unread_bytes}
    return [f"  peak of a step: the widest of {', '.join(f'{name} {amount(size)}' for name, size in phases.items())}"]


def _limits(found: Answer) -> list[str]:
    fit, limits = found.fit, found.deployment.recipe.scheduler
    verdict = "it fits" if fit.fits else "IT DOES NOT FIT"
    rows = [
        ("requests at once, as asked", str(fit.max_users), f"asked {fit.workload.users}"),
        ("max_num_seqs, requests of full max_model_len", str(fit.max_num_seqs), f"recipe {limits.max_num_seqs}"),
        ("max_model_len, with max_num_seqs requests", str(fit.max_model_len), f"recipe {limits.max_model_len}"),
    ]
    return [verdict, *(f"  {fault}" for fault in fit.faults), columns(("the most that the memory holds", "", ""), rows)]


def speed(found: Answer) -> list[str]:
    """What is predicted; nothing on a CPU, and of requests that the model does not take."""
    predicted = found.prediction
    if predicted is None and found.chip is not None:
        return ["no prediction: the model takes no request of this length"]
    if predicted is None:
        return ["no prediction: no figures of this machine's CPU are known (bench measures it)"]
    rows = [
        ("TTFT, a request that comes while the others decode", milliseconds(predicted.ttft_ms)),
        ("TTFT, the last of all when they come at once", milliseconds(predicted.ttft_all_ms)),
        ("TPOT, the model's decode step", milliseconds(predicted.tpot_ms)),
        ("TPOT, with the host and the prefills of others", milliseconds(predicted.tpot_host_ms)),
        ("output tokens a second, all requests", f"{predicted.tokens_per_s:.0f}"),
        ("output tokens a second, one request", f"{1e3 / predicted.tpot_host_ms:.1f}"),
    ]
    if predicted.drafts:
        accepted = found.deployment.recipe.plan.acceptance_probability
        drafted = f"tokens of a step, with {predicted.drafts} drafts of which {accepted:.0%} are right where they count"
        rows.append((drafted, f"{predicted.step_tokens:.2f}"))
    return [NOT_MEASURED, columns(("speed", "predicted"), rows), _step(predicted), f"  {COUNTS[found.counts_from]}"]


def _step(predicted: Prediction) -> str:
    """What a decode step costs one rank."""
    step, rows = predicted.step, f"{predicted.batch} rows" if predicted.batch > 1 else "1 row"
    messages = f", {step.collectives} messages" if step.collectives else ""
    integers = f" and {step.int8_flops / 1e9:.1f} of integers" if step.int8_flops else ""
    moved = f"{amount(step.weight_bytes)} of weights and {amount(step.kv_bytes)} of cache"
    done = f"{step.flops / 1e9:.1f} GFLOP{integers}"
    rows += f", each of {1 + predicted.drafts} tokens," if predicted.drafts else ""
    return f"  a decode step of {rows} on one rank: {step.kernels} kernels{messages}, {moved}, {done}"


def installation(one_door: Installation, doors: Installation, each: Workload) -> str:
    """What many dies give together, with one front door and with one on each node."""
    jobs = f"{one_door.replicas} jobs" if one_door.replicas != 1 else "1 job"
    rows = [(LIMITS[name], f"{one_door.limits[name]:,.0f}", f"{doors.limits[name]:,.0f}") for name in one_door.limits]
    rows.append(("all together", f"{one_door.tokens_per_s:,.0f}", f"{doors.tokens_per_s:,.0f}"))
    rows.append(("bound by", LIMITS[one_door.bound_by], LIMITS[doors.bound_by]))
    return "\n".join(
        [
            f"{one_door.dies} dies on {one_door.nodes} nodes: {jobs} of this recipe, {one_door.idle_dies} dies idle; "
            f"each job: {asked(each)}",
            f"output tokens a second on paper, {NOT_MEASURED}; nothing was tried on many nodes",
            columns(("limit", "one front door", "one on each node"), rows),
            f"  {_assumptions(one_door)}",
            f"  {_measurements()}",
        ]
    )


def _assumptions(found: Installation) -> str:
    told = assumed(found.node)
    return (
        f"assumptions: {told['node_cores']} cores and {told['node_network_bytes_per_s'] * 8 / 1e9:g} Gbit/s a node, "
        f"{told['cores_beside_each_die']} core beside each die; {told['jpeg_bytes_per_pixel']:g} bytes a JPEG's pixel, "
        f"{told['text_token_bytes']:g} a token of text, {told['streamed_token_bytes']:g} a streamed token"
    )


def _measurements() -> str:
    told = measured()
    return (
        f"measured on two x86 cores, not on a chip's host ({told['source']}): a core takes "
        f"{1e3 * told['http_token_s']:g} ms for a streamed token, {1e3 * told['picture_1080p_s']:g} ms for a 1080p JPEG"
    )


def calibration(fitted: Calibration, strict: Calibration) -> str:
    """The published points, those that constants were fitted to and those held out, each with its error.

    strict: of two fitted points; its errors are told beside them.
    """
    rows = [
        (
            checked.point.name,
            f"{checked.point.value:g} {UNITS[checked.point.metric]}",
            f"{checked.predicted:.4g}",
            f"{round(100 * checked.error, 1) + 0.0:+.1f} %",
            f"fitted: {checked.point.fits}" if checked.is_fitted else "held out",
        )
        for checked in fitted.points
    ]
    two = "; ".join(checked.point.name for checked in strict.points if checked.is_fitted)
    return "\n".join(
        [
            f"how good predictions are: published speeds of other programs; largest error on those held out: "
            f"{_errors(fitted)}",
            columns(("point", "published", "predicted", "error of time", ""), rows),
            f"  with two fitted points only ({two}), no constant of its own for the 300I DUO: {_errors(strict)}",
        ]
    )


def _errors(found: Calibration) -> str:
    return ", ".join(f"{kind} {100 * error:.0f} %" for kind, error in found.error.items() if error is not None)


def table(rows: Sequence[tuple[TableRow, Prediction | None]], workload: str) -> str:
    """All models on all chips: each row with its TPOT and TTFT in ms."""
    cells = [
        (
            row.model.removesuffix("-Instruct"),
            row.chip_name,
            row.precision,
            str(row.ranks or "-"),
            f"{row.weights_bytes / GIB:.1f}" if row.weights_bytes else "-",
            str(row.context_tokens),
            str(row.max_num_seqs) if row.ranks else "-",
            f"{found.tpot_ms:.1f}" if found else "-",
            f"{found.ttft_ms:.0f}" if found else "-",
        )
        for row, found in rows
    ]
    head = ("model", "chip", "weights", "fewest ranks", "GiB a rank", "context", "most requests", "TPOT ms", "TTFT ms")
    return "\n".join(
        [
            f"{NOT_MEASURED}: TPOT and TTFT of {workload}; most requests: of full context, by memory",
            columns(head, cells, left=3),
        ]
    )


def found_recipe(result: Search, words: str, settings: str, most_dies: int) -> str:
    """The answer to a demand: the cheapest recipe, how to write it, and what stops the next cheaper ones."""
    lines = [f"asked: {words}", f"  {asked(result.workload)}", f"cheapest: {COST_ORDER}", ""]
    if result.chosen is None:
        lines.append(f"NO RECIPE of up to {most_dies} dies holds it; the largest that were tried:")
    else:
        lines += [f"{result.chosen.candidate} holds it", f"  {settings or 'the recipe as it is'}"]
        if result.chosen.candidate.quantization not in ("none", "auto") and "model_config.model_path=" in settings:
            lines.append("  its weights are made as docs/quantization.md says, unless you have them")
        lines.append("")
        lines += [plan(result.chosen.answer), "", "what stops the next cheaper ones:"]
    lines += [f"  {verdict.candidate}: {'; '.join(verdict.faults)}" for verdict in result.next_cheaper]
    if not result.failed:
        lines.append("  nothing is cheaper")
    return "\n".join(lines)


def in_short(verdict: Verdict) -> dict[str, object]:
    """One candidate that does not hold the demand, for the document."""
    candidate = verdict.candidate
    return {
        "dies": candidate.dies,
        "chip": candidate.chip_name,
        "quantization": verdict.answer.deployment.recipe.model.quantization,
        "attn_tp_size": candidate.replica_ranks,
        "faults": list(verdict.faults),
    }
