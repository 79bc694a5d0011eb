"""The table of all models: its rows are the memory's arithmetic, and README's tables are made of them.

python -m tests.capacity.test_table      # prints README's two tables, after a change of the arithmetic
"""

import pytest

from executor.capacity.chips import chip_names, read_chip
from executor.capacity.choices import precisions, published_models
from executor.capacity.fits import deployment_on
from executor.capacity.table import WORLDS, paper_of, readme_tables, table_row, table_rows
from executor.recipe.memory import GIB
from executor.recipe.settle import tp_faults


@pytest.mark.parametrize("chip_name", chip_names())
@pytest.mark.parametrize("model", ["Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-72B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_the_fewest_ranks_hold_a_request_and_fewer_do_not(chip_name, model):
    chip = read_chip(chip_name)
    for quantization in precisions(chip, f"Qwen/{model}"):
        row = table_row(model, chip_name, chip, quantization)
        alone = deployment_on(paper_of(model, chip, quantization, row.context_tokens), chip.usable_bytes)
        for ranks in WORLDS:
            spread = alone.on_ranks(ranks)
            divides = not tp_faults(ranks, alone.paper.shapes, "data")
            assert divides or spread is None
            if spread is None or row.ranks is None or ranks > row.ranks:
                continue
            holds = spread.account(spread.blocks(row.context_tokens)).fits
            assert holds == (ranks == row.ranks), (ranks, quantization)
        if row.ranks:
            assert row.max_num_seqs >= 1 and row.weights_bytes < 0.9 * chip.usable_bytes


def test_every_model_stands_on_every_chip():
    rows = list(table_rows())
    combinations = {(row.model, row.chip_name) for row in rows}
    assert combinations == {(model, chip) for model in published_models() for chip in chip_names()}
    assert {row.context_tokens for row in rows if row.chip.soc == "atlas_300i_duo"} == {10240}
    assert {row.context_tokens for row in rows if row.chip.soc != "atlas_300i_duo"} == {32768}


def test_quantized_weights_are_counted_by_the_vendors_choice_of_types():
    """Static w8a8 leaves the MLPs' second linears float: more than half of the float weights, unlike w8a8_dynamic."""
    chip = read_chip("910b4")
    none, static, dynamic = (
        table_row("Qwen3-VL-8B-Instruct", "910b4", chip, word).weights_bytes
        for word in ("none", "w8a8", "w8a8_dynamic")
    )
    down = 36 * 4096 * 12288
    assert static - dynamic == pytest.approx(down, rel=0.1)
    assert none / 2 < dynamic < static < none


def test_the_readme_tables_name_all_models():
    ranks, sizes = readme_tables()
    for model in published_models():
        assert f"| {model.removesuffix('-Instruct')} |" in ranks and f"| {model} |" in sizes
    row = next(line for line in sizes.splitlines() if "Qwen2.5-VL-7B" in line)
    assert row.endswith("| - |")
    alone = deployment_on(paper_of("Qwen2.5-VL-7B-Instruct", read_chip("910b4"), "none", 32768))
    assert f"| {alone.account().weights_bytes / GIB:.1f} |" in row


if __name__ == "__main__":
    print(*readme_tables(), sep="\n\n")
