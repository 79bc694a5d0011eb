"""From a recipe to an engine: the one place where backend, model, processor, scheduler and runner are joined."""

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint.content import content_digest
from executor.checkpoint.description import Description
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.load import load_model
from executor.checkpoint.part_pulls import open_checkpoint
from executor.checkpoint.settings import PixelSettings, read_pixel_settings
from executor.device import ops
from executor.device.table import BACKENDS
from executor.engine.disk_cache.cache import DiskCache
from executor.engine.disk_cache.folder import EntryFolder, make_root
from executor.engine.disk_cache.key import cache_key
from executor.engine.engine import Engine
from executor.engine.graph_folder import GraphFolder
from executor.engine.graphs import DecodeGraphs
from executor.engine.profile import Profile
from executor.engine.replica import Replica
from executor.engine.runner import Runner
from executor.engine.sampler import Sampler
from executor.engine.speculation.draft_model import DraftProposer
from executor.engine.speculation.lookahead import LookaheadProposer
from executor.engine.speculation.ngram import NgramProposer
from executor.engine.speculation.speculator import Proposer, Speculator
from executor.engine.step import ModelStep, cache_scales
from executor.errors import UserError
from executor.host.env import code_digest, rank_place
from executor.media.fetch import Fetcher
from executor.media.hosts import DOMAINS_KEY, PRIVATE_KEY, parse_rules
from executor.media.local import Folder
from executor.media.media import MediaLimits
from executor.parallel.groups import Group, Parallel
from executor.prompt.options import media_options
from executor.quant.choose import MADE, choose_cache, choose_schemes, make_schemes
from executor.recipe.device import compute_bytes, device_settings, takes_int8_head
from executor.recipe.disk_cache import MEMORY
from executor.recipe.draft import Draft
from executor.recipe.graph_sizes import decode_tokens, graph_shapes, most_inputs, spare_blocks
from executor.recipe.memory import GIB, estimate
from executor.recipe.schema import Recipe, SpeculativeSection
from executor.recipe.settle import Prepared, prepare
from executor.schedule.plan import GraphShape
from executor.schedule.scheduler import Scheduler
from models.registry import family_runner

logger = logging.getLogger(__name__)

ANIMATION_FRAMES = 5  # of the largest size, that a server draws of one animated picture


def build_engine(recipe: Recipe, runner: Any = None) -> Engine:
    """Check the recipe, load the model, and return an engine that is ready for requests.

    For whoever embeds one: the process is theirs, and its garbage collector stays as it is.
    `runner` stands in for the family's own (models/FAMILY/runner.py), with the same names in it.
    Raises UserError for a recipe, checkpoint or machine that cannot work.
    """
    prepared = prepare(recipe, rank_place().local_world_size)
    return _build(prepared, *open_rank(prepared, runner), runner)


def open_rank(prepared: Prepared, runner: Any = None) -> tuple[ops.Ops, Parallel]:
    """This process's device, and its place among the ranks of the job."""
    runner = runner or family_runner(prepared.config)
    device = open_device(prepared.recipe)
    return device, runner.connect(prepared.recipe, device)


def engine_of(
    prepared: Prepared, device: ops.Ops, parallel: Parallel, runner: Any = None, limits: MediaLimits | None = None
) -> Engine:
    """A command's engine, of a recipe that has been settled and checked, on what `open_rank` gives.

    limits: of its media; None: those of a user's own command (media_limits).
    """
    engine = _build(prepared, device, parallel, runner, limits)
    settle_memory()
    return engine


def settle_memory() -> None:
    """What is there now stays: Python's collector looks only at what comes later. For a process that is a command.

    Of libraries' objects and an engine's a full collection takes 0.2 to 0.8 s, in which no token is written.
    """
    gc.collect()
    gc.freeze()


def _build(
    prepared: Prepared, device: ops.Ops, parallel: Parallel, runner: Any = None, limits: MediaLimits | None = None
) -> Engine:
    recipe = prepared.recipe
    options = replace(media_options(recipe), limits=limits or media_limits(recipe))
    runner = runner or family_runner(prepared.config)
    path = recipe.scheduler.prefix_cache_path
    root = None if path is None else make_root(path)
    ops.bind(device)
    free_bytes = device.free_bytes()
    memory = prepared.memory
    if free_bytes is not None:
        size = compute_bytes(recipe)
        memory = estimate(
            recipe, prepared.shapes, free_bytes, size,
            picture_tokens=prepared.picture_tokens, stored=prepared.stored, draft=prepared.draft,
        )  # fmt: skip
    logger.info("%s", memory)
    # One scheduler plans for all of them.
    (num_blocks,) = parallel.control.min(memory.num_blocks)
    processor = runner.build_processor(prepared.folder, options)
    model = _load(recipe, prepared.folder, prepared.config, prepared.description, device, parallel, runner)
    drafting = None
    if prepared.draft is not None and parallel.leads:
        drafting = load_draft(prepared.draft, device, parallel, runner)
    replica = runner.build_replica(model, parallel)
    dtype = device.compute_dtype(getattr(torch, recipe.model.dtype))
    engine = join(recipe, num_blocks, model, processor, device, dtype, replica, runner.decode_graphs, drafting)
    if root is not None:
        checkpoint = open_checkpoint(prepared.folder, parallel.text.rank, parallel.text.size)
        engine.runner.disk_cache = engine.scheduler.store = _disk_cache(recipe, root, checkpoint, engine.runner)
    return engine


@dataclass(frozen=True)
class LoadedDraft:
    """A draft model on this rank's device; `replica`: of this rank by itself."""

    draft: Draft
    model: torch.nn.Module
    replica: Replica


def load_draft(draft: Draft, device: ops.Ops, parallel: Parallel, runner: Any) -> LoadedDraft:
    """The draft model whole on this rank, which is one of `parallel`. `runner`: the family's."""
    alone = Parallel(world=Group(parallel.rank))  # the number among all ranks stays, for what is kept in files
    model = _load(draft.recipe, draft.folder, draft.config, draft.description, device, alone, runner)
    return LoadedDraft(draft, model, runner.build_replica(model, alone))


def _load(
    recipe: Recipe,
    folder: Path,
    config: Mapping[str, Any],
    description: Description | None,
    device: ops.Ops,
    parallel: Parallel,
    runner: Any,
) -> torch.nn.Module:
    """This rank's part of the model in `folder`, on the device."""
    checkpoint = open_checkpoint(folder, parallel.text.rank, parallel.text.size)
    model, _ = load_model(
        lambda: runner.build_model(config, parallel),
        checkpoint,
        device,
        getattr(torch, recipe.model.dtype),
        lambda model: _choose(model, recipe, checkpoint, description),
    )
    return model


def _disk_cache(recipe: Recipe, root: Path, checkpoint: Checkpoint, runner: Runner) -> DiskCache:
    config = runner.model.config
    try:
        content = content_digest(checkpoint.folder, checkpoint.files, root / MEMORY)
        key = cache_key(recipe, content, runner.step, runner.device)
        folder = EntryFolder(root, key, round(recipe.scheduler.prefix_cache_gb * GIB))
    except OSError as error:
        file, reason = Path(error.filename or root), error.strerror or error
        if file.is_relative_to(root):
            words = f"{file} cannot be used ({reason}); name a folder of this user's"
        else:
            words = f"{file} cannot be read for the digest that the checkpoint is known by ({reason}); make it readable"
        raise UserError(f"scheduler_config.prefix_cache_path: {words}") from error
    features = 1 + runner.model.num_taps, config.text.hidden_size
    return DiskCache(folder, runner.kv, runner.block_size, runner.device, features, runner.dtype)


def _choose(model: Any, recipe: Recipe, checkpoint: Checkpoint, description: Description | None) -> list[str]:
    """Schemes that are made of float weights, or those of the folder's description."""
    if recipe.model.quantization in MADE:
        rounds_head = takes_int8_head(recipe, model.config.text.vocab_size)
        left = make_schemes(model, recipe.model.quantization, rounds_head)
    else:
        left = choose_schemes(model, checkpoint.catalog, description)
    return left + choose_cache(model, checkpoint.catalog, description, recipe.model.kv_cache_dtype == "int8")


def open_device(recipe: Recipe) -> ops.Ops:
    """The backend of a settled recipe. Raises UserError where this machine has not what it needs."""
    model, backend = recipe.model, BACKENDS[recipe.model.device]
    if backend.is_emulated:
        from emulator.activate import activate

        activate(model.soc)
    settings = device_settings(model, rank_place().local_rank)
    return backend.open(replace(settings, decode_rows=decode_tokens(recipe)))


def join(
    recipe: Recipe,
    num_blocks: int,
    model: torch.nn.Module,
    processor: Any,
    device: ops.Ops,
    dtype: torch.dtype,
    replica: Replica,
    decode_graphs: Callable[..., DecodeGraphs] = DecodeGraphs,
    drafting: LoadedDraft | None = None,
) -> Engine:
    """The engine over a loaded model. `drafting`: of a leader whose recipe has a draft model."""
    limits, text = recipe.scheduler, model.config.text
    num_blocks = min(
        _possible_blocks(recipe, num_blocks, each, device) for each in (model, drafting and drafting.model) if each
    )
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        enable_chunked_prefill=limits.enable_chunked_prefill,
        enable_prefix_caching=limits.enable_prefix_caching,
        encoder_cache_tokens=limits.encoder_cache_tokens,
        eos_token_ids=processor.eos_token_ids,
        max_yield=most_inputs(recipe),
    )
    runner = _runner(recipe, num_blocks, model, processor, device, dtype, replica, decode_graphs)
    processor.around_media = partial(runner.clock.beside, "media")
    if recipe.speculative.method and replica.leads:
        proposer = _proposer(recipe, num_blocks, processor, device, dtype, text.vocab_size, decode_graphs, drafting)
        speculative = recipe.speculative
        runner.speculator = Speculator(proposer, speculative.num_speculative_tokens, is_adaptive=speculative.adaptive)
    if recipe.model.profile:
        runner.profile = Profile(
            device, model, runner.clock,
            folder=Path(recipe.model.output_path) / "profile", name=_profile_name(recipe, replica.parallel.rank),
            num_steps=recipe.model.profile_steps,
        )  # fmt: skip
    return Engine(processor, scheduler, runner, text.vocab_size)


def _possible_blocks(recipe: Recipe, num_blocks: int, model: torch.nn.Module, device: ops.Ops) -> int:
    """`num_blocks`, or the fewer that one cache of this model may have, and a warning."""
    attention, size = model.language_model.layers[0].self_attn, recipe.scheduler.block_size
    most = device.most_blocks(size, attention.num_kv_heads, model.config.text.head_dim)
    spare = spare_blocks(graph_shapes(recipe), size)
    if most is None or num_blocks <= most - spare:
        return num_blocks
    logger.warning("KV cache: %d blocks instead of %d, the most that one cache may have", most - spare, num_blocks)
    return most - spare


def _runner(
    recipe: Recipe,
    num_blocks: int,
    model: torch.nn.Module,
    processor: Any,
    device: ops.Ops,
    dtype: torch.dtype,
    replica: Replica,
    decode_graphs: Callable[..., DecodeGraphs],
    pixel_format: PixelSettings | None = None,
    vocab_size: int | None = None,
) -> Runner:
    """A model's runner over a cache of its own, with graphs where the recipe has them.

    `pixel_format`: the model's own where it is not the processor's; `vocab_size`: tokens to choose among, None: all.
    """
    text, size, shapes = model.config.text, recipe.scheduler.block_size, graph_shapes(recipe)
    attention = model.language_model.layers[0].self_attn
    kv = device.kv_cache(
        text.num_layers, num_blocks + spare_blocks(shapes, size), size, attention.num_kv_heads, text.head_dim, dtype,
        normed=attention.q_norm is not None, scales=cache_scales(model),
    )  # fmt: skip
    eos_token_ids, on_host = processor.eos_token_ids, device.name == "cpu"
    sampler = Sampler(
        vocab_size or text.vocab_size, device.device, eos_token_ids, dtype,
        reads_freely=on_host, send=device.send, read_back=device.read_back,
    )  # fmt: skip
    runner = Runner(model, device, kv, size, sampler, pixel_format or processor.picture, dtype, replica)
    if shapes:
        runner.graphs = _captured(recipe, runner.step, device, shapes, num_blocks, replica.parallel, decode_graphs)
        if runner.graphs is not None and most_inputs(recipe) > 1 and cache_scales(model):
            logger.info("int8 KV cache: graphs take one token of a request, steps that verify drafts run eagerly")
    return runner


def _proposer(
    recipe: Recipe,
    num_blocks: int,
    processor: Any,
    device: ops.Ops,
    dtype: torch.dtype,
    vocab_size: int,
    decode_graphs: Callable[..., DecodeGraphs],
    drafting: LoadedDraft | None,
) -> Proposer:
    """Where the drafts of a model with `vocab_size` tokens come from."""
    settings = recipe.speculative
    if settings.method != "draft":
        return text_proposer(settings)
    assert drafting is not None, "a leader has loaded the draft model"
    draft, model = drafting.draft, drafting.model
    pixel_format = read_pixel_settings(draft.folder, processor.picture_defaults)
    pixel_format.check_against(model.config.vision, draft.folder)
    runner = _runner(
        draft.recipe, num_blocks, model, processor, device, dtype, drafting.replica, decode_graphs, pixel_format,
        min(vocab_size, model.config.text.vocab_size),
    )  # fmt: skip
    return DraftProposer(
        runner,
        num_blocks,
        vocab_size=vocab_size,
        step_tokens=recipe.scheduler.max_num_batched_tokens,
        shares_blocks=recipe.scheduler.enable_prefix_caching,
        end_ids=processor.eos_token_ids,
    )


def text_proposer(settings: SpeculativeSection) -> Proposer:
    """Drafts of the request's own tokens."""
    if settings.method == "lookahead":
        return LookaheadProposer(settings.level, settings.window, settings.guess_set_size)
    return NgramProposer(settings.ngram_min, settings.ngram_max)


def _profile_name(recipe: Recipe, rank: int) -> str:
    return f"{Path(recipe.model.model_path).name}_{time.strftime('%Y%m%d_%H%M%S')}_rank_{rank:02d}"


def _captured(
    recipe: Recipe,
    step: ModelStep,
    device: ops.Ops,
    shapes: tuple[GraphShape, ...],
    num_blocks: int,
    parallel: Parallel,
    decode_graphs: Callable[..., DecodeGraphs],
) -> DecodeGraphs | None:
    """The decode graphs, or None and a warning where the device cannot make them and the recipe allows eager steps.

    All ranks of the job have them, or none: a collective needs every rank in the same place.
    """
    mode = recipe.model.exe_mode
    root = Path(recipe.model.output_path) / "graphs"
    folder = GraphFolder(root, graph_key(recipe, step, device), parallel.rank)
    graphs = decode_graphs(step, device, mode, shapes, num_blocks, recipe.scheduler.max_model_len, folder)
    fault: RuntimeError | None = None
    try:
        graphs.capture()
    except RuntimeError as error:
        fault = error
    (failed,) = parallel.job.max(fault is not None)
    if not failed:
        return graphs
    reason = fault or "another rank could not make them; its log says why"
    if recipe.model.strict_graph:
        raise RuntimeError(
            f"model_config.exe_mode: {mode} graphs cannot be made: {reason}. Set exe_mode: eager, or strict_graph: "
            "false to run eagerly where there is no graph"
        ) from fault
    logger.warning("no %s graphs, decode steps run eagerly: %s", mode, reason)
    return None


def graph_key(recipe: Recipe, step: ModelStep, device: ops.Ops) -> str:
    """A name for what a compiled graph depends on: sizes, degrees, the cache, versions and our own code.

    The rank counts as well: it has a folder of its own below this name.
    """
    parts = {
        "model": repr(step.model.config),
        "recipe": recipe.model_dump(include={"model", "parallel", "scheduler"}),
        "cache": [
            (tuple(x.shape), str(x.dtype)) for layer in step.kv for x in (layer.k, layer.v)
        ],  # num_blocks, block_size, heads and head dim, in the device's own layout
        "block_size": step.block_size,
        "versions": device.versions(),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def media_limits(recipe: Recipe) -> MediaLimits:
    """Of a user's own command: files anywhere, and the hosts that the recipe allows. Raises UserError for odd hosts."""
    return MediaLimits(fetcher=fetcher_of(recipe))


def request_limits(recipe: Recipe) -> MediaLimits:
    """Of a server's requests. Raises UserError for odd hosts and a folder that is not there."""
    server = recipe.server
    folder = server.allowed_local_media_path
    return MediaLimits(
        paths=folder is not None,
        folder=None if folder is None else Folder.at(folder),
        fetcher=fetcher_of(recipe),
        pictures=server.max_pictures,
        videos=server.max_videos,
        fetched_bytes=server.max_body_bytes,
        image_bytes=server.max_media_bytes,
        image_pixels=server.max_media_pixels,
        video_bytes=server.max_media_bytes,
        video_duration_s=server.max_video_s,
        video_frames=server.max_video_frames,
        animation_pixels=ANIMATION_FRAMES * server.max_media_pixels,
        decode_s=server.max_video_decode_s,
    )


def fetcher_of(recipe: Recipe) -> Fetcher | None:
    """None where the recipe allows no hosts."""
    data = recipe.data
    hosts = parse_rules(data.allowed_media_domains, DOMAINS_KEY)
    private_hosts = parse_rules(data.allowed_private_hosts, PRIVATE_KEY)
    return Fetcher(hosts, private_hosts, data.fetch_timeout_s) if hosts or private_hosts else None
