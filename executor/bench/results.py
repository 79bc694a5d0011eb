"""What a benchmark has measured, from one request to the whole file, and its JSON.

A file holds every request's times, so that all figures can be computed from it again; it holds no text and no key of
the server. Times of a request are seconds after its run began. Knows nothing of how requests are sent.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from executor.errors import UserError

SCHEMA_VERSION = 1
FORM = "bench"
TIME_DIGITS = 6  # of seconds in a file: microseconds
AtLeast0 = Annotated[int, Field(ge=0)]
_HEAD = f'{{"form": "{FORM}"'.encode()


@dataclass(frozen=True)
class RequestResult:
    """One request. `token_times_s`: when each piece of its answer came; over HTTP a piece may hold several tokens.

    `ended_s`: when its answer was complete, or when it failed. Counts are 0 where they are not known.
    """

    sent_s: float
    ended_s: float
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: AtLeast0 = 0  # pictures among them
    vision_tokens: AtLeast0 = 0
    output_tokens: AtLeast0 = 0
    cached_tokens: AtLeast0 = 0  # of the prompt, found in the prefix cache
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first piece; None where none came."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True)
class Run:
    """One repetition: all requests of one load, from the first one sent to the last one's end."""

    duration_s: Annotated[float, Field(gt=0)]
    requests: tuple[RequestResult, ...]
    stages_s: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds; empty where it cannot be seen
    model_tpot_s: float | None = None  # of a token of a decode step in the model alone, without the host's work
    peak_memory_bytes: int | None = None
    floor_s: float | None = None  # what its steps take at the least, see Floor
    beside: Mapping[str, float] = field(default_factory=dict)  # what else is known of server and client, by name


@dataclass(frozen=True)
class Floor:
    """The least time that bytes and operations allow, and what it is computed with.

    `origin`: measured (by a probe in the same process) or published (a chip's data sheet). See executor/bench/floor.py.
    """

    origin: str
    bytes_per_s: float
    flops_per_s: float
    ttft_s: float | None = None  # of the last prompt of a batch
    tpot_s: float | None = None  # of a token of a decode step, on average over the run's


@dataclass(frozen=True)
class Load:
    """What is varied. All None: everything at once."""

    batch_size: int | None = None
    request_rate: float | None = None
    concurrency: int | None = None

    @property
    def words(self) -> str:
        """For people."""
        parts = []
        if self.batch_size is not None:
            parts.append(f"batch size {self.batch_size}")
        if self.request_rate is not None:
            parts.append(f"{self.request_rate:g} requests/s")
        if self.concurrency is not None:
            parts.append(f"{self.concurrency} at once")
        return ", ".join(parts) or "all at once"


@dataclass(frozen=True)
class Point:
    """One load and its repetitions; warm-ups are not among them."""

    load: Load
    runs: Annotated[tuple[Run, ...], Field(min_length=1)]
    floor: Floor | None = None


@dataclass(frozen=True)
class Startup:
    """Seconds from the start of the process; None where it was not this command that started it."""

    weights_s: float | None = None  # until the engine was ready to take requests
    first_token_s: float | None = None  # until the first token of the first request, a warm-up


@dataclass(frozen=True)
class Report:
    """A whole benchmark. `recipe`: as a tree of plain values; `workload`: what is asked, in what decides its cost."""

    mode: str  # latency, throughput or serve
    dataset: str
    created: str  # ISO 8601, UTC
    recipe: Mapping[str, Mapping[str, Any]]
    workload: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    points: Annotated[tuple[Point, ...], Field(min_length=1)]
    startup: Startup = Startup()


for _kind in (RequestResult, Run, Floor, Load, Point, Startup, Report):
    _kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_FORM = TypeAdapter(Report)
"""What a file must hold. Objects that are made here are not looked at."""


def recipe_tree(recipe: Any) -> dict[str, Any]:
    """A recipe (executor.recipe.schema.Recipe) as plain values, without the server's key."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree["server_config"]["api_key"] = None
    return tree


def save(report: Report, path: Path) -> None:
    """Write a report. Raises UserError where that cannot be."""
    tree = {"form": FORM, "schema_version": SCHEMA_VERSION, **_rounded(asdict(report))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"bench_config.results_path: {path} cannot be written ({error.strerror}); give another file"
        ) from error


def load(path: Path) -> Report:
    """Read a report. Raises UserError for a file that is none, or of another version."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that bench has written") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no JSON ({error}); give a file that bench has written") from error
    if not isinstance(tree, dict) or tree.pop("form", None) != FORM:
        raise UserError(
            f"{path} is no results file of bench: it has no 'form': '{FORM}'; give one that bench has written"
        )
    version = tree.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version!r}, this release reads {SCHEMA_VERSION}; measure again")
    try:
        report = _FORM.validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is no whole results file of bench ({where}: {first['msg']}); measure again") from error
    if not isinstance(report.recipe.get("model_config", {}).get("model_path"), str):
        raise UserError(f"{path} is no whole results file of bench (recipe.model_config.model_path); measure again")
    return report


def is_results_file(path: Path) -> bool:
    """Whether a file may be overwritten with results: it has some, or nothing."""
    with open(path, "rb") as file:
        head = file.read(len(_HEAD))
    return head in (b"", _HEAD)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _rounded(value: Any) -> Any:
    """Times to the microsecond; what is no number that JSON knows is None."""
    if isinstance(value, float):
        return round(value, TIME_DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
