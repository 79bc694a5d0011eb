"""The planner's chips: every file is read, has sources, and agrees with what the rest of the project knows."""

import pytest

from executor.capacity.chips import DEFAULT_CHIPS, FOLDER, chip_names, chip_of_soc, read_chip
from executor.device.npu.soc import SOCS
from executor.device.table import CHIP_BYTES
from executor.errors import UserError


@pytest.mark.parametrize("name", chip_names())
def test_every_chip_of_the_folder_is_read(name):
    chip = read_chip(name)
    assert chip.soc in SOCS
    dtypes = {str(dtype).removeprefix("torch.") for dtype in SOCS[chip.soc].dtypes}
    assert set(chip.flops_per_s) == dtypes | {"int8"}
    assert chip.rate("int8") >= 2 * chip.rate("float16")


@pytest.mark.parametrize("soc", SOCS)
def test_the_chip_that_a_soc_stands_for_has_the_memory_that_recipes_are_checked_with(soc):
    chip = chip_of_soc(soc)
    assert chip.soc == soc
    assert chip.usable_bytes == CHIP_BYTES[soc]


def test_a_name_that_is_no_chip_is_refused_with_what_there_is():
    with pytest.raises(UserError, match=r"no chip 910b5 \(did you mean '910b\d'\?\); there are 310p3, .*a3_die"):
        read_chip("910b5")
    assert read_chip("A3_die") == read_chip("a3_die")
    assert set(DEFAULT_CHIPS.values()) <= set(chip_names())


@pytest.mark.parametrize(
    "change, message",
    [
        ("memory_bytes: -1", "memory_bytes: Input should be greater than 0"),
        ("colour: red", "colour: Extra inputs are not permitted"),
        ("usable_bytes: 99000000000", "usable_bytes: 99000000000 is more than memory_bytes, 48000000000"),
        ("sources: {memory_bytes: a page}", "no source for usable_bytes, bandwidth_bytes_per_s"),
        ("disputed: [memory]", "name figures of the chip, got memory"),
    ],
)
def test_a_file_of_ones_own_is_read_and_checked(tmp_path, change, message):
    key = change.partition(":")[0]
    chip_file = tmp_path / "mine.yaml"
    chip_file.write_text("\n".join([*_without(key), change]) + "\n")
    with pytest.raises(UserError, match=message):
        read_chip(str(chip_file))
    chip_file.write_text("\n".join(_without("")) + "\n")
    assert read_chip(str(chip_file)) == read_chip("310p3")


def _without(key: str) -> list[str]:
    """The lines of a chip's file without one key and what belongs to it."""
    lines, kept, inside = (FOLDER / "310p3.yaml").read_text().splitlines(), [], False
    for line in lines:
        if not line.startswith((" ", "#")):
            inside = line.partition(":")[0] == key
        if not inside:
            kept.append(line)
    return kept


def test_a_type_that_a_chip_has_no_products_of_is_refused():
    with pytest.raises(UserError, match="computes in float16, int8; got bfloat16"):
        read_chip("310p3").rate("bfloat16")
