"""What a user types: the command, overrides, short flags, and the flags of other tools."""

import pytest

from executor import command_line
from executor.command_line import FOREIGN, SHORT_FORMS, parse
from executor.errors import UserError
from executor.recipe.schema import Recipe, load_recipe
from tests.reference import REPO

QUICK = "config/quickstart.yaml"


def recipe_of(*arguments: str) -> Recipe:
    parsed = parse([QUICK, *arguments])
    return load_recipe(parsed.config, parsed.overrides)


def test_overrides_may_be_repeated_or_listed():
    parsed = parse([QUICK, "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert parsed.overrides == ["a.b=1", "c.d=2", "e.f=3"]


@pytest.mark.parametrize(
    "words",
    [
        [QUICK, "check", "--set", "a.b=1"],
        [QUICK, "--set", "a.b=1", "check"],
        ["--set", "a.b=1", "--save", "f", QUICK, "check"],
        [QUICK, "--image", "a.png", "check", "--set", "a.b=1"],
        [QUICK, "--seed", "1", "check", "--set", "a.b=1"],
    ],
)
def test_the_command_may_stand_anywhere(words):
    parsed = parse(words)
    assert (parsed.config, parsed.command, parsed.overrides[-1]) == (QUICK, "check", "a.b=1")


def test_short_flags():
    recipe = recipe_of(
        "--question", "Where: left, #1 or [2]?", "--image", "a#1.png", "b, c.png", "--video=d[1]*.mp4", "--media", "@e",
        "--max-new-tokens", "7", "--top_p", "0.5", "--temperature=0.3", "--model", "./x: y", "--output", "null",
    )  # fmt: skip
    assert recipe.data.prompt == "Where: left, #1 or [2]?"
    assert recipe.data.media == ("a#1.png", "b, c.png", "d[1]*.mp4", "@e")
    generation = recipe.generation
    assert (generation.max_new_tokens, generation.top_p, generation.temperature) == (7, 0.5, 0.3)
    assert (recipe.model.model_path, recipe.data.results_path) == ("./x: y", "null")


def test_the_last_of_flag_and_override_wins():
    assert recipe_of("--seed", "1", "--set", "generation_config.seed=2").generation.seed == 2
    assert recipe_of("--set", "generation_config.seed=2", "--seed", "1").generation.seed == 1


@pytest.mark.parametrize("flag", ["--question", "--image", "--max-new-tokens"])
def test_an_empty_flag_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag}: got an empty text"):
        parse([QUICK, flag, ""])


def test_every_short_form_is_a_key():
    sections = {field.alias: field.annotation for field in Recipe.model_fields.values()}
    for key in SHORT_FORMS.values():
        section, _, name = key.partition(".")
        assert name in sections[section].model_fields


def test_flags_of_other_tools_are_translated():
    """Every advice is a line that parses, and the page for newcomers has it."""
    page = (REPO / "docs" / "coming_from.md").read_text()
    for flag, advice in FOREIGN.items():
        with pytest.raises(UserError) as error:
            parse([QUICK, f"--{flag.replace('-', '_')}", "4"])
        assert f"is no flag here; write {advice}" in str(error.value)
        assert f"`--{flag}`" in page, flag
        line = (
            advice.partition(" (")[0].replace("TP*DP", "4").replace("TP", "2").replace("=N", "=2").replace("=X", "=1")
        )
        if line.startswith("--set"):
            line = line.replace("[TEXT]", "[end]")
            assert recipe_of(*line.split())
        elif line.startswith("--"):
            assert recipe_of(*line.replace(" N", " 3").split())


def test_unknown_flags_name_the_nearest():
    with pytest.raises(UserError, match=r"unrecognized arguments: --questoin \(did you mean '--question'\?\)"):
        parse([QUICK, "--questoin", "x"])
    with pytest.raises(UserError, match="unrecognized arguments: extra"):
        parse([QUICK, "check", "extra"])


def test_a_rank_of_many_leaves_mistakes_to_the_job(monkeypatch, capsys):
    """infer.sh under srun: every rank is asked, and all say it once, together."""
    assert command_line.main([QUICK, "bench"]) == command_line.REFUSED
    assert "not part of this release" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert command_line.main([QUICK, "bench"]) == 0
    assert capsys.readouterr().out == ""
