"""The sections of single commands: what `bench` measures, `eval` scores and `plan` is asked."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from executor.recipe.section import Counts, PictureSize, Positive, Rates, Section, as_list

Metric = Literal[
    *("vqa_accuracy", "anls", "relaxed_accuracy", "mmmu_accuracy", "ocrbench_accuracy", "box_iou"),
    *("choice_accuracy", "exact_match"),
]


class BenchSection(Section):
    """What the `bench` command measures. Its requests are those of data_config and generation_config."""

    mode: Literal["latency", "throughput", "serve"] = "throughput"
    """latency: batches of batch_sizes, one after the other. throughput: all requests at once, offline. serve: over
    HTTP, at request_rates or concurrencies. Also a word of the command line: bench latency."""
    batch_sizes: Counts = (1,)
    """Requests of a batch, for latency: each size is measured."""
    request_rates: Rates = ()
    """Requests sent a second, for serve: each rate is measured. None: all at once, as far as concurrencies allow."""
    concurrencies: Annotated[tuple[Positive, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    """Requests that may be under way at once, for serve: each number is measured. None: all."""
    burstiness: Annotated[float, Field(gt=0)] = 1.0
    """How even the gaps between requests are. 1: as of independent users (Poisson); less: in bursts; more: evener."""
    base_url: str | None = None
    """The running server that serve measures, as http://HOST:PORT; its key is server_config.api_key, its model
    server_config.served_model_name, else the first one it names. null: the recipe's own, started on a free port."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """Seconds in which a request of serve must be answered, else it has failed."""
    warmups: Annotated[int, Field(ge=0)] = 1
    """Runs before those that count: batches of latency and throughput, requests of serve."""
    repetitions: Positive = 3
    """Runs that count; results are their medians, with their spread."""
    plot: bool = False
    """Draw latency and throughput into a PNG file beside that of the results."""
    results_path: str | None = None
    """JSON file of the results. null: a new one under output_path, named by mode and time."""


class EvalSection(Section):
    """What the `eval` command scores, and how. Its requests are those of data_config."""

    metric: Metric | None = None
    """null: the data set's own."""
    dump_layers: Literal["transformers", "cpu", "npu_emulated"] | None = None
    """Instead of scores: the hidden states of the first requests (data_config.limit, else 2) beside those of this,
    stage by stage. docs/dump_layers.md has what is compared."""
    reference_model: str | None = None
    """Checkpoint of the other side of dump_layers: the float weights of a quantized model, say. null: model_path."""
    report_path: str | None = None
    """HTML file of eval compare. null: one under output_path."""


class PlanSection(Section):
    """What the `plan` command is asked."""

    chip: str | None = None
    """A chip of config/device/ by its file's name, or a file of the same form. null: that of model_config.soc."""
    input_tokens: Positive = 1000
    """Tokens of a prompt's text."""
    pictures: Annotated[int, Field(ge=0)] = 0
    """Pictures of a prompt."""
    picture_size: PictureSize = (1920, 1080)
    """Width and height of these pictures in pixels, before the resize."""
    output_tokens: Positive = 1000
    """Tokens of an answer."""
    users: Positive | None = None
    """Requests under way at once. null: scheduler_config.max_num_seqs."""
    acceptance_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of a draft to be right where all before it were: what speculative_config's drafts gain is predicted by it. null:
    as without drafts."""
    demand: str | None = None
    """What must hold, as "32 users, 4 pictures of 1080p, 8k context, TPOT 50 ms": the cheapest recipes that hold it are
    named."""
    dies: Positive | None = None
    """Dies of the whole installation, for what replicas on many nodes give. null: those of the recipe."""
    table: bool = False
    """All models on all chips in all precisions."""
    from_graph: bool = False
    """Read kernels, messages, products and weights of the decode step off its graph, converted by emulation as check
    does, rather than take them by arithmetic. Atlas A2 and A3, with a graph as exe_mode."""
    plot: bool = False
    """Draw the prediction into PNG files under output_path."""
