"""The pictures of `plan --plot`: which numbers of a plan go into which, and under what name they are written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from executor.capacity.answer import Answer, answer
from executor.capacity.chart import bars_chart, memory_chart, speed_chart
from executor.capacity.predict import Prediction
from executor.capacity.table import TableRow
from executor.commands.plan import show

MOST_USERS = 1024


def of_plan(found: Answer) -> list[Path]:
    """The memory of a rank, and, where it is predicted, speed against requests at once; the files written."""
    recipe = found.deployment.recipe
    folder = Path(recipe.model.output_path)
    place = found.chip.name if found.chip else "CPU"
    title = f"{found.deployment.paper.shapes.name} on {recipe.parallel.world_size} x {place}"
    memory = found.fit.memory
    parts = {show.PARTS[name]: count for name, count in memory.by_part().items()}
    written = [memory_chart(folder / "plan_memory.png", title, parts, memory.budget_bytes)]
    if found.prediction is not None:
        wanted = show.each_request(found.fit.workload)
        written.append(speed_chart(folder / "plan_speed.png", title, _by_users(found), found.fit.max_users, wanted))
    return written


def _by_users(found: Answer) -> list[dict[str, float]]:
    """The prediction for powers of two of requests at once, to twice what the memory holds; max_num_seqs goes along."""
    most = min(MOST_USERS, 2 * max(found.fit.max_users, found.fit.workload.users))
    points = []
    for users in (1 << power for power in range(most.bit_length())):
        recipe = found.deployment.recipe.replace(scheduler={"max_num_seqs": users})
        deployment = replace(found.deployment, paper=replace(found.deployment.paper, recipe=recipe))
        workload = replace(found.fit.workload, users=users)
        predicted = answer(deployment, found.chip, workload, found.decode_step).prediction
        points.append(
            {
                "users": users,
                "tpot_ms": predicted.tpot_ms,
                "ttft_ms": predicted.ttft_all_ms,
                "tokens_per_s": predicted.tokens_per_s,
            }
        )
    return points


def of_table(rows: Sequence[tuple[TableRow, Prediction | None]], output_path: str, asked: str) -> list[Path]:
    """TPOT of every model by precision, a file for each chip."""
    written = []
    for chip_name in dict.fromkeys(row.chip_name for row, _ in rows):
        found = [(row, predicted) for row, predicted in rows if row.chip_name == chip_name]
        models = list(dict.fromkeys(row.model for row, _ in found))
        precisions = list(dict.fromkeys(row.precision for row, _ in found))
        values = {(row.model, row.precision): predicted.tpot_ms for row, predicted in found if predicted}
        ranks = {(row.model, row.precision): row.ranks for row, _ in found if row.ranks}
        bars = {word: [values.get((model, word)) for model in models] for word in precisions}
        labels = {word: [ranks.get((model, word)) for model in models] for word in precisions}
        path = Path(output_path) / f"plan_table_{chip_name}.png"
        names = [model.removesuffix("-Instruct") for model in models]
        written.append(
            bars_chart(path, f"{found[0][0].chip.name}: TPOT on the fewest ranks", names, bars, labels, asked)
        )
    return written
