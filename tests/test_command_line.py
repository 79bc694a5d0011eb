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


def test_the_last_of_two_overrides_wins():
    assert recipe_of("--set", "generation_config.seed=1", "--set", "generation_config.seed=2").generation.seed == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--question", "x", "--question", "y"],
        ["--question", "x", "--prompt=y"],
        ["--model", "a", "--model_path", "b"],
        ["--seed", "1", "--temperature", "0", "--seed", "2"],
        ["--seed", "1", "--set", "generation_config.seed=2"],
        ["--set", "generation_config.seed=2", "--seed", "1"],
        ["--question", "x", "--set", "data_config.prompt=y"],
        ["--image", "a.png", "--set", "data_config.media=b.png"],
    ],
)
def test_two_values_of_one_flag_are_refused(words):
    with pytest.raises(UserError, match=r"_config\.\w+ is given twice, with two values: .* and "):
        parse([QUICK, *words])


def test_one_value_of_a_flag_may_be_repeated():
    recipe = recipe_of("--seed", "1", "--set", "generation_config.seed=1", "--question", "x", "--prompt", "x",
                       "--image", "a", "--set", "data_config.prompt=x", "--video", "b")  # fmt: skip
    assert (recipe.generation.seed, recipe.data.prompt, recipe.data.media) == (1, "x", ("a", "b"))


@pytest.mark.parametrize("flag", ["--question", "--image", "--max-new-tokens"])
def test_a_value_that_looks_like_a_flag(flag):
    with pytest.raises(UserError, match=f"{flag}.*: expected (at least )?one argument; write {flag}=-x"):
        parse([QUICK, flag, "-x"])
    with pytest.raises(UserError) as error:
        parse([QUICK, flag, "--seed", "1"])
    assert "write" not in str(error.value)
    assert parse([QUICK, "--question=-x"]).overrides == ['data_config.prompt="-x"']


def test_a_text_that_is_no_utf8():
    for words in (["--question", "a\udcff"], ["--set", "data_config.prompt=a\udcff"]):
        with pytest.raises(UserError, match=r"a\\udcff: the text is no UTF-8"):
            parse([QUICK, *words])
    assert parse([QUICK, "--image", "a\udcff.png"]).overrides  # a file's name may be any bytes


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "config/quickstart", "elsewhere/quickstart.yaml"])
def test_a_recipe_by_its_name_alone(name):
    with pytest.raises(UserError, match=rf"no recipe {name} \(did you mean 'config/quickstart.yaml'\?\)"):
        command_line.check(parse([name]))


@pytest.mark.parametrize("name", ["config/zzz", "zzz"])
def test_the_names_of_all_recipes_are_printed_once(name, capsys):
    assert command_line.main([name]) == command_line.REFUSED
    printed = capsys.readouterr()
    assert printed.err.count("qwen2_5_vl_72b.yaml") == 1 and "qwen2_5_vl_72b" not in printed.out
    assert f"there is no recipe {name}; config has " in printed.out


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
            command = ["bench", "serve"] if "--request-rates" in line or "--concurrencies" in line else []
            assert recipe_of(*command, *line.replace(" N", " 3").replace(" X", " 3").split())


def test_unknown_flags_name_the_nearest():
    with pytest.raises(UserError, match=r"unrecognized arguments: --questoin \(did you mean '--question'\?\)"):
        parse([QUICK, "--questoin", "x"])
    with pytest.raises(UserError, match="unrecognized arguments: extra"):
        parse([QUICK, "check", "extra"])


def test_a_rank_of_many_leaves_mistakes_to_the_job(monkeypatch, capsys):
    """infer.sh under srun: every rank is asked, and all say it once, together."""
    assert command_line.main([QUICK, "bnech"]) == command_line.REFUSED
    assert "unknown command 'bnech'" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert command_line.main([QUICK, "bnech"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve", QUICK), f"the recipe comes first: bash infer.sh {QUICK} serve$"),
        (("serv", QUICK, "--port", "1"), f"the recipe comes first: bash infer.sh {QUICK} serv$"),
        (("serve",), "the recipe comes first: bash infer.sh CONFIG.yaml serve$"),
        ((QUICK, "serve", "--question", "hi"), "data_config.prompt is not used by serve"),
        ((QUICK, "serve", "--image", "a.png"), "data_config.media is not used by serve"),
        ((QUICK, "serve", "--set", "data_config.dataset=jsonl"), "data_config.dataset is not used by serve"),
        (
            (QUICK, "bench", "--output", "a"),
            "data_config.results_path is not used by bench: .* bench_config.results_path",
        ),
        ((QUICK, "serve", "--prot", "1"), r"--prot \(did you mean '--port'\?\)"),
        ((QUICK, "bench", "--batch-size", "1"), r"--batch-size \(did you mean '--batch-sizes'\?\)"),
        ((QUICK, "bench", "--request-rate", "1"), r"--request-rate is no flag here; write --request-rates X"),
        ((QUICK, "--promt", "1"), r"--promt \(did you mean '--prompt'\?\)"),
    ],
)
def test_words_that_a_newcomer_gets_wrong(words: tuple[str, ...], says: str):
    with pytest.raises(UserError, match=says):
        parse(words)


@pytest.mark.parametrize(
    "words",
    [
        [QUICK, "bench", "serve", "--plot", "--request-rates", "[1,2]"],
        [QUICK, "--plot", "--request_rates=[1,2]", "bench", "serve"],
        ["--set", "bench_config.mode=serve", "bench_config.request_rates=[1,2]", "--plot", "--", QUICK, "bench"],
        ["--request-rates", "[1,2]", QUICK, "--plot", "bench", "--set", "bench_config.mode=serve"],
    ],
)
def test_words_and_flags_of_a_command_are_keys(words):
    parsed = parse(words)
    recipe = load_recipe(parsed.config, parsed.overrides)
    assert parsed.command == "bench"
    assert (recipe.bench.mode, recipe.bench.plot, recipe.bench.request_rates) == ("serve", True, (1.0, 2.0))


def test_one_flag_means_what_the_command_says():
    assert recipe_of("plan", "--plot", "--for", "32 users, TPOT 50 ms").plan.demand == "32 users, TPOT 50 ms"
    assert recipe_of("eval", "--dump-layers").eval.dump_layers == "transformers"
    assert recipe_of("eval", "--dump-layers=cpu").eval.dump_layers == "cpu"


@pytest.mark.parametrize(
    "before", [[], ["--set", "bench_config.warmups=0"], ["--set", "bench_config.warmups=0", "generation_config.seed=1"]]
)
def test_compare_takes_two_files(before):
    parsed = parse([QUICK, *before, "bench", "compare", "a.json", "b.json"])
    assert (parsed.command, [str(path) for path in parsed.compared]) == ("bench", ["a.json", "b.json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot"], "--plot belongs to the command bench and plan, got generate"),
        (["bench", "--for", "8k"], "--for belongs to the command plan, got bench"),
        (["bench", "serv"], "bench serv: it takes latency, throughput, serve, compare"),
        (["bench", "compare", "a.json"], "bench compare takes two files"),
        (["bench", "serve", "a.json"], "bench serve takes no more words; got a.json"),
        (["bench", "serve", "--set", "bench_config.mode=latency"], "bench_config.mode is given twice"),
        (["bench", "--batch-sizes", "1", "--batch_sizes", "2"], "bench_config.batch_sizes is given twice"),
        (["plan", "--for", ""], "--for: got an empty text"),
    ],
)
def test_words_and_flags_of_other_commands_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse([QUICK, *words])


def test_flags_of_one_command_are_keys_of_the_recipe():
    fields = {f"{field.alias}.{key}" for field in Recipe.model_fields.values() for key in field.annotation.model_fields}
    assert {key for keys in command_line.COMMAND_FORMS.values() for key in keys.values()} <= fields
