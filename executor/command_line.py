"""The command line: `CONFIG.yaml [COMMAND] [--set section.key=value ...]`, and short flags for the commonest keys.

Standard library only, and importable on Python 3.8: infer.sh asks `main` before
it installs anything, so that help and a mistake are answered at once. Knows no schema: what a key may hold is
said when the recipe is read.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from executor.errors import UserError, nearest, printable
from executor.host.env import environment
from executor.host.streams import print_document
from executor.recipe.place import find_recipe, split_override

COMMANDS = {
    "generate": "answer the recipe's questions (the default)",
    "serve": "an HTTP server with the OpenAI interface",
    "bench": "measure throughput and latency",
    "eval": "measure accuracy on a benchmark",
    "plan": "memory and speed of the recipe, by arithmetic",
    "check": "what the recipe needs of a chip, without weights",
}
MODULES = {  # the commands of this release
    "generate": "executor.commands.generate.run",
    "serve": "executor.commands.serve.run",
    "bench": "executor.commands.bench.run",
    "plan": "executor.commands.plan.run",
    "eval": "executor.commands.eval.run",
    "check": "executor.commands.check",
}

WORDS = {  # command -> what may stand behind it, with how many files; a mode sets bench_config.mode
    "bench": {"latency": 0, "throughput": 0, "serve": 0, "compare": 2},
    "eval": {"compare": 2},
}

SHORT_FORMS = {  # flag -> key; the flag may be written with - or _
    "question": "data_config.prompt",
    "prompt": "data_config.prompt",
    "image": "data_config.media",
    "video": "data_config.media",
    "media": "data_config.media",
    "model": "model_config.model_path",
    "model-path": "model_config.model_path",
    "device": "model_config.device",
    "dtype": "model_config.dtype",
    "max-new-tokens": "generation_config.max_new_tokens",
    "temperature": "generation_config.temperature",
    "top-p": "generation_config.top_p",
    "top-k": "generation_config.top_k",
    "seed": "generation_config.seed",
    "max-model-len": "scheduler_config.max_model_len",
    "max-num-seqs": "scheduler_config.max_num_seqs",
    "output": "data_config.results_path",
    "dataset": "data_config.dataset",
    "dataset-path": "data_config.dataset_path",
    "num-prompts": "data_config.limit",
    "host": "server_config.host",
    "port": "server_config.port",
}
COMMAND_FORMS = {  # flag -> command -> key: short forms that only these commands have
    "plot": {"bench": "bench_config.plot", "plan": "plan_config.plot"},
    "batch-sizes": {"bench": "bench_config.batch_sizes"},
    "request-rates": {"bench": "bench_config.request_rates"},
    "concurrencies": {"bench": "bench_config.concurrencies"},
    "base-url": {"bench": "bench_config.base_url"},
    "metric": {"eval": "eval_config.metric"},
    "dump-layers": {"eval": "eval_config.dump_layers"},
    "chip": {"plan": "plan_config.chip"},
    "table": {"plan": "plan_config.table"},
    "for": {"plan": "plan_config.demand"},
    "from-graph": {"plan": "plan_config.from_graph"},
}
ALONE = {
    "plot": "true",
    "table": "true",
    "from-graph": "true",
    "dump-layers": "transformers",
}  # what such a flag means without a value
UNUSED_BY = {  # command -> keys that it does not use, so that a flag for one of them is a mistake, and what to do
    "serve": {
        **dict.fromkeys(
            ("data_config.prompt", "data_config.media", "data_config.dataset", "data_config.dataset_path"),
            "its requests ask the questions; leave it out",
        )
    },
    "plan": {
        "data_config.prompt": "it answers no question; plan_config says what is asked",
        "data_config.media": "it reads no picture; --set plan_config.pictures=N says how many",
        "data_config.dataset": "it answers no question; plan_config says what is asked",
        "data_config.dataset_path": "it answers no question; plan_config says what is asked",
        "data_config.results_path": "it keeps no answers; leave it out",
        "generation_config.max_new_tokens": "--set plan_config.output_tokens=N says how long an answer is",
    },
    "bench": {"data_config.results_path": "it keeps no answers; its figures go to bench_config.results_path"},
}
LISTS = ("data_config.media",)  # repeated flags add up
TEXTS = (
    *("data_config.prompt", "model_config.model_path", "data_config.results_path", "server_config.host"),
    *("data_config.dataset_path", "bench_config.base_url", "plan_config.chip", "plan_config.demand"),
)

FOREIGN = {  # flags of vLLM, MindIE, PaddleMIX and others -> what stands for them here (docs/coming_from.md has all)
    "tensor-parallel-size": "--set parallel_config.world_size=N (attn_tp_size: null splits over all ranks)",
    "tp": "--set parallel_config.world_size=N (attn_tp_size: null splits over all ranks)",
    "data-parallel-size": "--set parallel_config.world_size=TP*DP parallel_config.attn_tp_size=TP",
    "enable-expert-parallel": "--set parallel_config.moe_ep_size=N",
    "gpu-memory-utilization": "--set scheduler_config.memory_fraction=0.9",
    "kv-cache-memory-bytes": "--set scheduler_config.kv_cache_gb=N",
    "max-num-batched-tokens": "--set scheduler_config.max_num_batched_tokens=N",
    "block-size": "--set scheduler_config.block_size=128",
    "no-enable-prefix-caching": "--set scheduler_config.enable_prefix_caching=false",
    "enable-prefix-caching": "--set scheduler_config.enable_prefix_caching=true",
    "enforce-eager": "--set model_config.exe_mode=eager",
    "quantization": "--set model_config.quantization=auto (read from the checkpoint)",
    "quant-type": "--set model_config.quantization=wint8 (for weight_only_int8, with the float checkpoint)",
    "served-model-name": "--set server_config.served_model_name=NAME",
    "api-key": "--set server_config.api_key=KEY",
    "allowed-local-media-path": "--set server_config.allowed_local_media_path=FOLDER",
    "allowed-media-domains": "--set data_config.allowed_media_domains=[HOST,...]",
    "allowed-origins": "--set server_config.allowed_origins=[ORIGIN,...]",
    "limit-mm-per-prompt": "--set server_config.max_pictures=N server_config.max_videos=N",
    "mm-processor-kwargs": "--set data_config.min_pixels=N data_config.max_pixels=N data_config.fps=X",
    "ssl-certfile": "--set server_config.ssl_certfile=FILE",
    "ssl-keyfile": "--set server_config.ssl_keyfile=FILE",
    "enable-auto-tool-choice": "nothing: tools are taken wherever the checkpoint's chat template takes them",
    "tool-call-parser": "nothing: Qwen's form of tool calls is known",
    "reasoning-parser": "nothing: told from the checkpoint's chat template",
    "async-scheduling": "nothing",
    "model-name-or-path": "--model PATH",
    "question-file": "--dataset jsonl --dataset-path FILE",
    "image-file": "--image FILE",
    "image-path": "--image FILE (or a folder)",
    "video-file": "--video FILE",
    "max-length": "--max-new-tokens N",
    "max-tokens": "--max-new-tokens N",
    "max-output-length": "--max-new-tokens N",
    "min-length": "--set generation_config.min_new_tokens=N",
    "max-input-length": "--max-model-len N (prompt and answer together)",
    "max-batch-size": "--max-num-seqs N",
    "repetition-penalty": "--set generation_config.repetition_penalty=X",
    "ignore-eos": "--set generation_config.ignore_eos=true",
    "do-sample": "--set generation_config.do_sample=true",
    "stop": "--set generation_config.stop=[TEXT]",
    "trust-remote-code": "nothing: no code of a checkpoint is ever run",
    "benchmark": "the command bench",
    "request-rate": "--request-rates X (or a list, [1,2]: each is measured)",
    "max-concurrency": "--concurrencies N (or a list, [4,8]: each is measured)",
    "parallel": "--concurrencies N (or a list, [4,8]: each is measured)",
    "num-warmups": "--set bench_config.warmups=N",
    "burstiness": "--set bench_config.burstiness=X",
    "dataset-name": "--dataset random (or jsonl, ...)",
    "random-input-len": "--set data_config.random_tokens=N (the chat template counts)",
    "random-output-len": "--max-new-tokens N",
    "random-prefix-len": "--set data_config.random_prefix_tokens=N",
    "random-mm-base-items-per-request": "--set data_config.random_pictures=N",
    "result-filename": "--set bench_config.results_path=FILE",
    "save-result": "nothing: results are always saved (bench_config.results_path)",
}

EXAMPLES = """without a recipe (each has --help):
  python -m executor.commands.doctor       what this machine has and lacks
  python -m executor.commands.quantize     a quantized checkpoint of a float one, or --check one
  python -m executor.commands.compress     w8a8s weights compressed for the 300I DUO (w8a8sc)
  python -m executor.commands.cast_scales  deq_scale tensors from one type to the other

examples:
  bash infer.sh config/quickstart.yaml
  bash infer.sh config/quickstart.yaml --image a.png --question "What do you see?"
  bash infer.sh config/quickstart.yaml serve --port 8000
  bash infer.sh config/quickstart.yaml bench latency --batch-sizes [1,4,16] --dataset random --plot
  bash infer.sh config/quickstart.yaml eval --dataset tiny_world --num-prompts 50
  bash infer.sh config/qwen3_vl_8b.yaml plan --for "32 users, 4 pictures of 1080p, TPOT 50 ms"
  bash infer.sh config/quickstart.yaml --set generation_config.temperature=0.7 data_config.media=[a.png,b.mp4]
"""
ANSWERED, REFUSED = 64, 65
"""Exit statuses that tell infer.sh to go no further: help was shown, or a mistake was reported."""


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    words: Sequence[str] = ()  # the command line

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"argument (--[a-z_-]+).*: expected (at least )?one argument", message)
        if flag:  # a value that looks like a flag
            spellings = {spelling for spelling in self._option_string_actions if spelling in self.words}
            behind = [b for a, b in zip(self.words, self.words[1:]) if a in spellings and b[:1] == "-"]  # noqa: B905
            values = [word for word in behind if word not in self._option_string_actions]
            message += f"; write {flag[1]}={shlex.quote(values[0])}" if values else ""
        raise UserError(f"{message}\n{self.format_usage().strip()}")


class _Set(argparse.Action):
    """`--set` takes several overrides; what follows them without a `=` may be the command."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        behind = [place for place, value in enumerate(values) if place and value in COMMANDS]
        if behind:
            namespace.behind = values[behind[0] :]
            values = values[: behind[0]]
        for value in values:
            _refuse_broken_text(value, value.partition("=")[0], option_string)
        namespace.overrides = [*namespace.overrides, *values]


class _ShortForm(argparse.Action):
    """A short flag becomes an override of its key; UserError where the key has another value from a flag already."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        key = SHORT_FORMS[self.option_strings[0][2:]]
        values = values if isinstance(values, list) else [values]
        if len(values) > 1 and values[-1] in COMMANDS and not Path(values[-1]).exists():
            namespace.behind = [values.pop()]
        if not all(values):
            raise UserError(f"{option_string}: got an empty text (an unset variable of the shell?); give a value")
        for value in values:
            _refuse_broken_text(value, key, option_string)
        if key in LISTS:
            before = namespace.flags.get(key)
            namespace.overrides = [override for override in namespace.overrides if override != before]
            namespace.listed[key] = [*namespace.listed.get(key, ()), *values]
            value: Any = namespace.listed[key]
        else:
            value = values[0]
        # JSON is YAML that needs no thought about # , [ or quotes.
        text = json.dumps(value, ensure_ascii=False) if key in (*TEXTS, *LISTS) else value
        if key not in LISTS and namespace.flags.get(key, f"{key}={text}") != f"{key}={text}":
            raise _two_values(key, namespace.flags[key], f"{key}={text}")
        namespace.flags[key] = f"{key}={text}"
        namespace.overrides = [*namespace.overrides, f"{key}={text}"]


class _CommandForm(argparse.Action):
    """A flag whose key the command decides; kept until that is known."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = self.option_strings[0][2:]
        if values in COMMANDS and name in ALONE:
            namespace.behind, values = [values], None
        value = ALONE.get(name) if values is None else values
        if not value:
            raise UserError(f"{option_string}: got an empty text (an unset variable of the shell?); give a value")
        _refuse_broken_text(value, "", option_string)
        namespace.command_flags = [*namespace.command_flags, (name, value)]


def _command_overrides(arguments: argparse.Namespace) -> None:
    """Turn the flags and words of `arguments.command` into overrides; UserError for those of other commands."""
    for name, value in arguments.command_flags:
        key = COMMAND_FORMS[name].get(arguments.command)
        if key is None:
            owners = " and ".join(COMMAND_FORMS[name])
            raise UserError(f"--{name} belongs to the command {owners}, got {arguments.command}")
        override = f"{key}={json.dumps(value, ensure_ascii=False) if key in TEXTS else value}"
        if arguments.flags.setdefault(key, override) != override:
            raise _two_values(key, arguments.flags[key], override)
        arguments.overrides = [*arguments.overrides, override]
    allowed = WORDS.get(arguments.command, {})
    arguments.compared = None
    if not arguments.words:
        return
    if not allowed:
        raise UserError(_unknown(arguments.words))
    word, *files = arguments.words
    if word not in allowed:
        known = f"it takes {', '.join(allowed)}{nearest(word, allowed)}"
        raise UserError(f"{arguments.command} {printable(word)}: {known}")
    if len(files) != allowed[word]:
        wanted = "two files of results, as in  compare first.json second.json" if allowed[word] else "no more words"
        raise UserError(f"{arguments.command} {word} takes {wanted}; got {printable(' '.join(files)) or 'none'}")
    if word == "compare":
        arguments.compared = tuple(Path(file) for file in files)
        return
    override = f"bench_config.mode={word}"
    arguments.flags["bench_config.mode"] = override
    arguments.overrides = [*arguments.overrides, override]


def _refuse_broken_text(text: str, key: str, flag: str | None) -> None:
    """Names of files may be any bytes; other texts are read by a model or by YAML."""
    if not key.endswith("_path") and key not in LISTS:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{flag} {printable(text)}: the text is no UTF-8; set the terminal to UTF-8 (LC_ALL=C.UTF-8), or write "
                "the text into a file in UTF-8 (data_config.dataset: jsonl)"
            ) from None


def _value_of(override: str) -> Any:
    """What an override says, alike for a flag (JSON) and for words as they stand."""
    key, _, text = override.partition("=")
    try:
        value = json.loads(text)
    except ValueError:
        value = text.strip()
    return [value] if key.strip() in LISTS and not isinstance(value, list) else value


def _two_values(key: str, first: str, second: str) -> UserError:
    shown = " and ".join(printable(repr(_value_of(override))) for override in (first, second))
    return UserError(f"{key} is given twice, with two values: {shown}; give one of them")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as (config, command, overrides, save, compared). UserError for anything else."""
    parser = _parser()
    parser.words = list(argv)
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise UserError(_unknown(unknown))
    said = [word for word in (arguments.command, *arguments.words) if word is not None]
    arguments.command, *arguments.words = [*said, *arguments.behind] or ["generate"]
    is_recipe = arguments.command.endswith((".yaml", ".yml"))
    if (is_recipe or arguments.config in COMMANDS) and not Path(arguments.config).exists():
        recipe = shlex.quote(arguments.command) if is_recipe else "CONFIG.yaml"
        raise UserError(f"the recipe comes first: bash infer.sh {recipe} {arguments.config}")
    if arguments.command not in {**COMMANDS, **extra_commands()}:
        known = f"{', '.join(COMMANDS)}{nearest(arguments.command, COMMANDS)}"
        raise UserError(f"unknown command '{arguments.command}'; commands: {known}")
    _command_overrides(arguments)
    for override in arguments.overrides:
        flag = arguments.flags.get(override.partition("=")[0].strip(), override)
        if flag != override and _value_of(flag) != _value_of(override):
            raise _two_values(override.partition("=")[0].strip(), flag, override)
    for override in arguments.overrides:
        key = override.partition("=")[0].strip()
        reason = UNUSED_BY.get(arguments.command, {}).get(key)
        if reason is not None:
            raise UserError(f"{key} is not used by {arguments.command}: {reason}")
    if arguments.save is not None and arguments.command != "check":
        raise UserError(f"--save belongs to the command check, got {arguments.command}")
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """UserError for a command that is not in this release, a missing recipe, and an override without a value."""
    if arguments.command not in {**MODULES, **extra_commands()}:
        raise UserError(
            f"the command {arguments.command} is not part of this release yet; there is: {', '.join(MODULES)}"
        )
    find_recipe(arguments.config)
    for override in arguments.overrides:
        split_override(override)


def _parser() -> argparse.ArgumentParser:
    later = {name: "" if name in MODULES else " (not in this release yet)" for name in COMMANDS}
    commands = "\n".join(f"  {name:<10}{purpose}{later[name]}" for name, purpose in COMMANDS.items())
    parser = _Parser(
        prog="bash infer.sh",
        usage="bash infer.sh CONFIG.yaml [COMMAND [WORD ...]] [--set section.key=value ...]",
        description=f"Run one recipe.\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(listed={}, flags={}, behind=[], command_flags=[], overrides=[])
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe, e.g. config/quickstart.yaml")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="see above")
    parser.add_argument(
        "words", metavar="WORD", nargs="*", help="bench: latency, throughput, serve, or compare A B; eval: compare A B"
    )
    change = "change a value of the recipe; may be repeated; docs/recipe.md has every key"
    parser.add_argument(
        "--set", metavar="section.key=value", dest="overrides", action=_Set, nargs="+", help=change
    )  # fmt: skip
    parser.add_argument("--save", metavar="FILE", type=Path, help="check: write the decode graph there (GE, as text)")
    short = parser.add_argument_group("short forms of keys (with - or _)")
    for flag, key in SHORT_FORMS.items():
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('-', '_')}"))
        number = "+" if key in LISTS else None
        short.add_argument(*spellings, dest="overrides", metavar="X", nargs=number, action=_ShortForm, help=key)
    own = parser.add_argument_group("short forms of one command")
    for flag, keys in COMMAND_FORMS.items():
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('-', '_')}"))
        number = "?" if flag in ALONE else None
        words = f"{', '.join(keys)}: {', '.join(dict.fromkeys(keys.values()))}"
        own.add_argument(*spellings, dest="command_flags", metavar="X", nargs=number, action=_CommandForm, help=words)
    return parser


def _unknown(words: Sequence[str]) -> str:
    """What to say of words that are no flags here: what they are for users of other tools, or what is near."""
    lines = []
    known = ["--set", *(f"--{flag}" for flag in (*SHORT_FORMS, *COMMAND_FORMS))]
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("_", "-")
        if not word.startswith("-"):
            continue
        if name in FOREIGN:
            lines.append(f"{word} is no flag here; write {FOREIGN[name]}")
        else:
            lines.append(f"unrecognized arguments: {word}{nearest(f'--{name}', known)}")
    if not lines:
        lines.append(f"unrecognized arguments: {' '.join(words)}")
    return "\n".join(
        [*lines, "every key can be changed: --set section.key=value (docs/recipe.md, docs/coming_from.md)"]
    )


def extra_commands() -> dict[str, str]:
    """Commands beyond those of COMMANDS, as RECIPE_COMMANDS names them: `probe=package.module,...`.

    Such a module has `run(recipe)`, and `check(recipe)`, which settles the recipe of several ranks or raises UserError
    for what keeps a node from starting.
    """
    named = environment().get("RECIPE_COMMANDS", "")
    return dict(entry.split("=", 1) for entry in named.split(",") if "=" in entry)


def main(argv: Sequence[str]) -> int:
    """Answer what needs no installation. 0: nothing to say, run it; ANSWERED or REFUSED: it has been said."""
    if {"RANK", "SLURM_PROCID"} & environment().keys():
        return 0  # one rank of many: they say it once, together
    command = "launch"
    try:
        arguments = parse(argv)
        command = arguments.command
        check(arguments)
    except UserError as error:
        print(f"error: {error}{error.more}", file=sys.stderr)
        print_document({"command": command, "error": str(error)})
        return REFUSED
    except SystemExit:  # help was printed
        return ANSWERED
    return 0
