"""The recipe: one schema, one default per field, one way in (`load_recipe`).

A YAML file and `--set section.key=value` overrides become a frozen `Recipe`, or a UserError in plain words.
What needs the checkpoint (degrees, `auto` values, memory) is settled in settle.py; this module opens no checkpoint.
In the YAML the sections are `model_config`, `parallel_config`, ...; here they are `recipe.model`,
`recipe.parallel`, ... because pydantic keeps the name `model_config` for itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from executor.recipe.command_sections import BenchSection, EvalSection, PlanSection
from executor.recipe.file import parse_override, read_yaml
from executor.recipe.section import NonEmpty, Numbers, PictureSize, Positive, Section, Words, as_list
from executor.recipe.words import plain_words

Device = Literal["auto", "cpu", "npu", "npu_emulated", "cuda"]
Soc = Literal["atlas_800i_a2", "atlas_800i_a3", "atlas_300i_duo"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExeMode = Literal["eager", "ge_graph", "npugraph_ex"]
CpuIsa = Literal["auto", "avx2", "avx512"]
KVCacheDtype = Literal["auto", "float", "int8"]
Quantization = Literal[
    "auto", "none", "w8a8", "w8a8_dynamic", "w8a8_mix", "w8a16", "w4a8_dynamic", "w8a8s", "w8a8sc", "wint8"
]

DatasetName = Literal[
    *("default", "vision-arena-bench-v0.1", "jsonl", "random", "tiny_world", "textvqa", "docvqa", "chartqa", "mmmu"),
    *("ocrbench", "refcoco", "video_mc"),
]


class ModelSection(Section):
    """Which checkpoint, on what, and how it is run."""

    model_path: Annotated[str, Field(min_length=1)]
    """Folder of the checkpoint (looked for from here, then in this repository), or a hub id such as
    Qwen/Qwen3-VL-8B-Instruct."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where a hub id is looked for."""
    device: Device = "auto"
    """Backend that computes. auto: npu where the recipe names a soc, else cpu. cuda is not in this release."""
    soc: Soc | None = None
    """Chip of an npu device. null: asked from the driver."""
    dtype: Dtype = "auto"
    """Type of weights and activations. auto: the checkpoint's own, float16 on atlas_300i_duo."""
    exe_mode: ExeMode = "eager"
    """How a decode step runs: eager, or as a graph on A2 and A3, of torchair's GE (ge_graph) or as a captured ACL graph
    (npugraph_ex). Prefill is always eager."""
    strict_graph: bool = False
    """true: a graph that cannot be captured is an error, not a warning and eager steps."""
    quantization: Quantization = "auto"
    """Scheme of the weights. auto: what the checkpoint's own description says. wint8: text layers in int8, and the
    output head where the device gains by it, made of float weights while they are loaded. Another word must be what the
    checkpoint calls itself, or a type in it."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """How keys and values are kept. int8: with the checkpoint's scales (C8), half the memory or less. float: in the
    type that the device computes in. auto: int8 where the checkpoint has scales for it."""
    enable_weight_nz: bool = True
    """Keep linear weights in the NPU's tiled layout."""
    cpu_isa: CpuIsa = "auto"
    """Instructions that the cpu device may use. avx512: those with bfloat16 products, refused where they are not.
    avx2: none of them, for trying here what a smaller machine does. auto: what the CPU has."""
    profile: bool = False
    """Write a Chrome trace of the first steps of each rank, with named stages, under output_path/profile."""
    profile_steps: Positive = 50
    """Steps of such a trace."""
    output_path: str = "output"
    """Folder for logs, drawn pictures, traces, charts and reports."""


class ParallelSection(Section):
    """How many ranks, and how the model is spread over them."""

    world_size: Positive = 1
    """Number of ranks (dies, chips or processes) over all nodes."""
    attn_tp_size: Positive | None = None
    """Ranks that share one copy of attention and MLP. null: all of them."""
    moe_ep_size: Positive = 1
    """Groups the experts of a mixture-of-experts model are dealt to."""
    vision_parallel: Literal["tp", "data"] = "tp"
    """tp: every rank computes a slice of each picture's encoder. data: whole pictures are dealt to ranks."""
    hang_timeout_s: Positive = 300
    """Seconds a rank may give no sign of life before it is reported and the job is ended."""
    ray_jobs: Positive = 1
    """Jobs of the whole recipe on a Ray cluster, each of world_size ranks on one node, that share what is served,
    generated or evaluated. 1: no Ray."""
    ray_address: str | None = None
    """The Ray cluster, as HOST:PORT of its head. null: RAY_ADDRESS, else one on this machine for the time of the
    command."""


class SchedulerSection(Section):
    """Sizes of a step and of the KV cache."""

    max_model_len: Positive | None = None
    """Tokens of prompt and answer of one request. null: the checkpoint's, at most 32768."""
    max_num_seqs: Positive = 16
    """Requests answered at the same time."""
    max_num_batched_tokens: Positive = 8192
    """Tokens of one step."""
    block_size: Annotated[int, Field(ge=16, multiple_of=16)] = 128
    """Tokens of one KV cache block."""
    num_blocks: Positive | None = None
    """KV cache blocks. null: as many as the memory allows and max_num_seqs requests can use."""
    kv_cache_gb: Annotated[float, Field(gt=0)] | None = None
    """KV cache of one rank in GB (2^30 bytes), in place of num_blocks. null: as num_blocks says."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the free memory that weights, KV cache and activations may take together."""
    enable_chunked_prefill: bool = True
    """Split long prompts over several steps."""
    enable_prefix_caching: bool = True
    """Keep the blocks of finished prompts and reuse them for equal beginnings (pictures included)."""
    prefix_cache_path: NonEmpty | None = None
    """Folder on a local disk for a prefix cache that outlives the process: KV blocks and encoded pictures.
    docs/prefix_cache.md. null: none."""
    prefix_cache_gb: Annotated[float, Field(gt=0)] = 10.0
    """GB (2^30 bytes) that this folder may hold; the least recently used go first."""
    encoder_cache_tokens: Positive = 16384
    """Embeddings of pictures and videos kept between steps."""
    graph_batch_sizes: Annotated[tuple[Positive, ...], Field(strict=False), BeforeValidator(as_list)] | None = None
    """Batch sizes a decode graph is made for. null: powers of two up to max_num_seqs."""


class SpeculativeSection(Section):
    """Several tokens of an answer in one step: they are drafted, and verified together. Answers stay the same."""

    method: Literal["ngram", "lookahead", "draft"] | None = None
    """Where drafts come from. ngram: what followed the same tokens before, in prompt and answer. lookahead: that, and
    tokens that the model itself expects further on. draft: a smaller model. null: none are made."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=15)] = 7
    """Drafts of one request in one step at most: the chips verify 16 tokens of a request together."""
    adaptive: bool = True
    """Fewer drafts, or none, for a request whose drafts do not pay."""
    ngram_min: Positive = 2
    """Of ngram: tokens that must be the same, at least."""
    ngram_max: Positive = 4
    """Of ngram: tokens that must be the same, at most; the longest that are found decide."""
    level: Annotated[int, Field(ge=2, le=16)] = 4
    """Of lookahead: tokens of an n-gram, the first of which is looked for."""
    window: Annotated[int, Field(ge=1, le=15)] = 5
    """Of lookahead: tokens further on that every step expects anew."""
    guess_set_size: Annotated[int, Field(ge=1, le=16)] = 5
    """Of lookahead: n-grams kept of each first token."""
    model_path: str | None = None
    """Of draft: folder or hub id of the smaller model, of the same family and vocabulary."""


class GenerationSection(Section):
    """How answers are chosen. null: the checkpoint's generation_config.json, then greedy."""

    max_new_tokens: Positive | None = None
    """Tokens of an answer at most."""
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens before an end token may come."""
    do_sample: bool | None = None
    """false: always the likeliest token, whatever the temperature. true: at the checkpoint's temperature where none
    is set."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0: always the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Candidates kept. 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability mass of the candidates kept."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability of a candidate, as a share of the likeliest one's."""
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """Divides the scores of tokens already seen, the prompt's too. 1: off."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the score of every token that the answer holds already; the prompt does not count."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the score of a token for each time the answer holds it; the prompt does not count."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Fixes the sampling noise. null: another seed for each request, reported with its answer."""
    stop: Words | None = None
    """Texts that end an answer."""
    stop_token_ids: Numbers | None = None
    """Tokens that end an answer, besides the checkpoint's own."""
    ignore_eos: bool | None = None
    """Go on after the checkpoint's end tokens."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Candidates whose log probabilities are reported with every token."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers for each prompt."""
    draw: bool = False
    """Draw the boxes and points of an answer's JSON on a copy of the picture, under output_path."""


class DataSection(Section):
    """What is asked, and how pictures and videos are prepared."""

    dataset: DatasetName = "default"
    """default: dataset/default_prompt.json. jsonl: a file of your own, named by dataset_path. random: as random_tokens
    and random_pictures say. tiny_world: drawn for the tiny checkpoints. docs/datasets.md has the forms of all."""
    dataset_path: str | None = None
    """File or folder of the data set, if it is not at its usual place."""
    split: str | None = None
    """Part of a published data set, as its files name it (validation, test, testA). null: what its scores are usually
    given for."""
    random_tokens: Positive = 1000
    """Tokens of a prompt of the data set random, what the chat template and pictures add among them."""
    random_prefix_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of text that all prompts of the data set random begin with, among random_tokens. 0: they share nothing, so
    that no prefix cache helps."""
    random_pictures: Annotated[int, Field(ge=0)] = 0
    """Pictures of noise in each prompt of the data set random."""
    random_picture_size: PictureSize = (1920, 1080)
    """Width and height of these pictures in pixels, before the resize: [1920, 1080]."""
    random_seed: Annotated[int, Field(ge=0)] = 0
    """Decides what the data sets random and tiny_world hold."""
    prompt: str | None = None
    """Ask this instead of a data set. null with `media`: "Describe this image.", "Describe this video."."""
    media: Words = ()
    """Pictures and videos of `prompt`. A folder: `prompt` is asked of every file in it."""
    system_prompt: str | None = None
    """Put before every conversation that has none."""
    limit: Positive | None = None
    """Only the first so many requests. null: all; of the data set random, 100."""
    min_pixels: Positive | None = None
    """Smallest picture, in pixels after the resize. null: the checkpoint's."""
    max_pixels: Positive | None = None
    """Largest picture, in pixels after the resize. null: the checkpoint's."""
    fps: Annotated[float, Field(ge=0.001, le=10_000)] | None = None
    """Frames sampled from a second of video. null: the checkpoint's, else 2."""
    min_frames: Positive | None = None
    """Frames sampled from a video at least. null: the checkpoint's."""
    max_frames: Positive | None = None
    """Frames sampled from a video at most. null: the checkpoint's."""
    video_max_pixels: Positive | None = None
    """Largest video, in pixels of all its frames after the resize. null: of Qwen3-VL the checkpoint's, of Qwen2.5-VL
    24,576 tokens, and of both at most three quarters of max_model_len."""
    frame_max_pixels: Positive | None = None
    """Largest frame of a video, in pixels after the resize. null: of Qwen3-VL no bound of its own, of Qwen2.5-VL the
    checkpoint's, at most 768 tokens."""
    cap_pixels_per_frame: bool = False
    """Bound every frame of a video by its own share of the pixels, too."""
    video_timestamps: Literal["per_frame", "outer_pair"] = "per_frame"
    """Form of a video in a Qwen3-VL prompt. per_frame is the trained one; outer_pair keeps one more pair of marks."""
    allowed_media_domains: Words = ()
    """Hosts that pictures and videos may be fetched from over http(s), such as example.org, *.example.org (all below
    it) or example.org:8443; they must have public addresses. None: http(s) addresses are refused."""
    allowed_private_hosts: Words = ()
    """Hosts of your own network that they may be fetched from too, by name or address: store.internal:9000,
    10.0.0.5:9000."""
    fetch_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Seconds in which a picture or video must have come over http(s)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Handed to the checkpoint's chat template."""
    results_path: str | None = None
    """JSONL the answers are saved to as they come; an interrupted run goes on from it, one run at a time."""


class ServerSection(Section):
    """The HTTP server of the `serve` command."""

    host: NonEmpty = "127.0.0.1"
    """Address it listens on. 0.0.0.0: every network of the machine."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port it listens on. 0: a free one, which is printed."""
    served_model_name: NonEmpty | None = None
    """Name clients use. null: the last part of model_path."""
    api_key: Annotated[NonEmpty, Field(pattern=r"^[!-~]([ -~]*[!-~])?$")] | None = None
    """Key clients must send: letters, digits and signs of ASCII, as a header holds it. null: none."""
    allowed_origins: Words = ()
    """Web pages of other addresses that browsers may let ask, as https://host:port. "*": all."""
    allowed_local_media_path: str | None = None
    """Folder below which requests may name files, by path or as file:///path. null: none."""
    max_body_bytes: Positive = 512 * 1024 * 1024
    """Bytes of one HTTP request."""
    max_held_body_bytes: Positive = 1024 * 1024 * 1024
    """Bytes of all requests that wait, together. Further ones of more than 64 KiB are not read until there is room."""
    max_pictures: Annotated[int, Field(ge=0)] = 16
    """Pictures of one request."""
    max_videos: Annotated[int, Field(ge=0)] = 4
    """Videos of one request."""
    max_media_bytes: Positive = 256 * 1024 * 1024
    """Bytes of one picture or video."""
    max_media_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 100_000_000
    """Pixels of one picture or frame before the resize. Pillow opens no larger ones than 178,956,970."""
    max_video_frames: Positive = 100_000
    """Frames of one video, in the file."""
    max_video_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds of one video."""
    max_video_decode_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that decoding one video may take: a small file can hold much work."""
    max_queued_requests: Positive = 2048
    """Requests that wait; further ones are told to come back."""
    request_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds in which a request must be answered. null: no limit."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that running requests have to end after SIGTERM."""
    ssl_certfile: str | None = None
    """Certificate for https. null: http."""
    ssl_keyfile: str | None = None
    """Key of the certificate. null: in ssl_certfile."""
    log_prompts: bool = False
    """Write what is asked into the access log."""
    replicas: Positive | None = None
    """Jobs of the whole recipe on a Ray cluster that share the requests. null: parallel_config.ray_jobs."""


class Recipe(Section):
    """One deployment of one model."""

    model: Annotated[ModelSection, Field(alias="model_config")]
    parallel: Annotated[ParallelSection, Field(alias="parallel_config")] = ParallelSection()
    scheduler: Annotated[SchedulerSection, Field(alias="scheduler_config")] = SchedulerSection()
    speculative: Annotated[SpeculativeSection, Field(alias="speculative_config")] = SpeculativeSection()
    generation: Annotated[GenerationSection, Field(alias="generation_config")] = GenerationSection()
    data: Annotated[DataSection, Field(alias="data_config")] = DataSection()
    server: Annotated[ServerSection, Field(alias="server_config")] = ServerSection()
    bench: Annotated[BenchSection, Field(alias="bench_config")] = BenchSection()
    eval: Annotated[EvalSection, Field(alias="eval_config")] = EvalSection()
    plan: Annotated[PlanSection, Field(alias="plan_config")] = PlanSection()

    @property
    def attn_tp_size(self) -> int:
        """Ranks that share one copy of attention and MLP."""
        return self.parallel.attn_tp_size or self.parallel.world_size

    def num_jobs(self, command: str) -> int:
        """How many jobs of the recipe a Ray cluster runs for a command; 1: no Ray."""
        if command == "serve" and self.server.replicas is not None:
            return self.server.replicas
        return self.parallel.ray_jobs if command in ("serve", "generate", "eval") else 1

    def replace(self, **sections: dict[str, Any]) -> "Recipe":
        """A checked copy with fields changed: `recipe.replace(model={"dtype": "float32"})`."""
        changed = {name: getattr(self, name).model_dump() | fields for name, fields in sections.items()}
        aliases = {name: field.alias for name, field in Recipe.model_fields.items()}
        whole = {aliases[name]: changed.get(name, getattr(self, name).model_dump()) for name in aliases}
        return build_recipe(whole)


def build_recipe(tree: Mapping[str, Any], source: str = "recipe", overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a tree of plain values as YAML gives it.

    Raises UserError if it does not fit, naming `source`, or the override ("section.key" to its text) that is wrong.
    """
    # A section left empty in the YAML is null: it has its defaults.
    tree = {key: {} if value is None else value for key, value in tree.items()}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise plain_words(error, Recipe, source, overrides) from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and lay `section.key=value` overrides over it, the last one for a key winning.

    Raises UserError for a missing, empty or invalid file, unknown keys, and values of the wrong type or range.
    """
    tree = read_yaml(path)
    origins = {}
    for override in overrides:
        section, key, value = parse_override(override, Recipe)
        origins[f"{section}.{key}"] = f"--set {override}"
        if tree.get(section) is None:
            tree[section] = {}
        if isinstance(tree[section], dict):  # else the file is wrong there, which build_recipe says
            tree[section][key] = value
    return build_recipe(tree, str(path), origins)
