"""KV blocks and encoded media of one rank on disk, for later processes: what was computed once is read again.

Before a request is queued, its prompt's blocks and features are read and checked into host memory (`fetch`, by the
thread that prepares it), so that a plan only copies what is right already; whatever is missing or damaged is computed.
What steps compute is copied beside the model and written by a thread of this module; when it lags behind, new entries
are dropped. A block is written only behind the one before it: without that nobody would find it.

Bytes come back as they were in the cache, so answers are those that blocks kept in memory give.
Invariants: `load` finds all that is `staged`, and fails for lack of memory only; no step reads or writes a file.
Knows nothing of the order of requests, nor of models.
Legend: L layers, M visual tokens of a media item, n hidden size.
"""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from executor.device.ops import KVLayer, Ops
from executor.engine.disk_cache.folder import EntryFolder
from executor.engine.disk_cache.stats import DiskCacheStats
from executor.engine.prepare import NICENESS
from executor.recipe.memory import GIB, QUEUED_BYTES, STAGED_BYTES
from executor.schedule.plan import BlockToKeep, BlockToLoad
from executor.schedule.request import MediaItem, Prompt

logger = logging.getLogger(__name__)

PLACE_NS = 1_000_000
"""A block counts as used so much earlier than the one before it: of a prefix the end goes first."""
FRESH_NS = 60 * 10**9  # what was used less long ago is not touched again
RETRY_S = 60.0  # after a write that failed
FLUSH_S = 30.0


class Staged:
    """An entry in host memory, uint8."""

    __slots__ = ("__weakref__", "content")

    def __init__(self, content: Tensor) -> None:
        self.content = content


class DiskCache:
    """`kv`: the rank's cache, every tensor contiguous with blocks first. `feature_shape`: [1 + taps, n] of a visual
    token, of type `feature_dtype`."""

    def __init__(
        self,
        folder: EntryFolder,
        kv: Sequence[KVLayer],
        block_size: int,
        device: Ops,
        feature_shape: tuple[int, int],
        feature_dtype: torch.dtype,
    ) -> None:
        self.folder = folder
        self.block_size = block_size
        self._tensors = [x for layer in kv for x in (layer.k, layer.v)]
        first = self._tensors[0]
        assert all(x.shape == first.shape and x.dtype == first.dtype for x in self._tensors), "layers of one form"
        self._device = device
        self._feature_shape, self._feature_dtype = feature_shape, feature_dtype
        self._block_bytes = len(self._tensors) * first[0].numel() * first.itemsize
        cache_bytes = len(first) * self._block_bytes
        self.most_staged_bytes, self.most_queued_bytes = min(STAGED_BYTES, cache_bytes), min(QUEUED_BYTES, cache_bytes)
        self._staged: weakref.WeakValueDictionary[str, Staged] = weakref.WeakValueDictionary()
        self._of_prompt: weakref.WeakKeyDictionary[Prompt, dict[bytes, Staged]] = weakref.WeakKeyDictionary()
        self._media_of_prompt: weakref.WeakKeyDictionary[Prompt, list[Staged]] = weakref.WeakKeyDictionary()
        self._fetched: weakref.WeakSet[Prompt] = weakref.WeakSet()  # since they were released last
        self._reading = threading.Lock()  # one prompt at a time: what two share is read once
        self._doubted: set[str] = set()  # behind a block that was damaged or gone: checked when they are computed
        self._touched_ns: dict[str, int] = {}
        self._media_queries = self._media_hits = self._read_bytes = 0
        # Names, bytes of each, stamps, and contents on the device, one in each row.
        self._queue: SimpleQueue[tuple[list[str], int, list[int], Tensor] | threading.Event | None] = SimpleQueue()
        self._queued: set[str] = set()
        self._queued_bytes = 0
        self._accounts = threading.Lock()  # of the two above and those below
        self._written_bytes = self._num_dropped = 0
        self._warned: set[str] = set()
        self._resting_until_s = 0.0
        self._writer = threading.Thread(target=self._write_queued, name="disk cache", daemon=True)
        self._writer.start()
        logger.info(
            "prefix cache on disk: %s has %d entries; %.2f of %.2f GiB of the whole folder are in use",
            folder.path, len(folder.names), folder.total_bytes / GIB, folder.capacity_bytes / GIB,
        )  # fmt: skip

    def stats(self) -> DiskCacheStats:
        return DiskCacheStats(
            self._media_queries, self._media_hits, self._read_bytes, self._written_bytes, self.folder.total_bytes,
            self.folder.num_damaged, self._num_dropped,
        )  # fmt: skip

    def count_anew(self) -> None:
        """Media that were looked for until now do not count; bytes do."""
        self._media_queries = self._media_hits = 0

    # What the scheduler asks: executor.schedule.prefix_cache.BlockStore.

    def staged(self, prompt: Prompt) -> dict[bytes, Staged]:
        return self._of_prompt.get(prompt, {})

    def release(self, prompt: Prompt) -> None:
        self._of_prompt.pop(prompt, None)
        self._fetched.discard(prompt)

    def drop(self, prompt: Prompt) -> None:
        self.release(prompt)
        self._media_of_prompt.pop(prompt, None)

    def wants(self, digest: bytes) -> bool:
        return self._lacks(_block_name(digest)) and time.monotonic() >= self._resting_until_s

    def _lacks(self, name: str) -> bool:
        """Whether an entry is to be written: as far as known it is not there, nor queued, and nothing has its place."""
        return not self._holds(name) and name not in self._queued and name not in self.folder.blocked

    def _holds(self, name: str) -> bool:
        """Whether an entry is there as far as known, and not to be doubted."""
        return name in self.folder.names and name not in self._doubted

    # For the threads that prepare prompts.

    def has_fetched(self, prompt: Prompt) -> bool:
        """Whether a prompt has been fetched, and none of its requests been begun since."""
        return prompt in self._fetched

    def fetch(
        self, prompt: Prompt, digests: Sequence[bytes], num_known: int, knows_media: Callable[[bytes], bool]
    ) -> None:
        """Read what the disk has of a prompt, behind its first `num_known` blocks, which are in memory.

        `digests`: of the blocks that a request of it can take over. `knows_media`: whether features are in memory.
        """
        self._fetched.add(prompt)
        found: dict[bytes, Staged] = {}
        if len(digests) > num_known and self._may_have(_block_name(digests[num_known])):
            with self._reading:
                for digest in digests[num_known:]:
                    entry = self._read(_block_name(digest), self._block_bytes)
                    if entry is None:
                        break
                    found[digest] = entry
        if found:
            self._of_prompt[prompt] = found
        self._doubt([_block_name(digest) for digest in digests[num_known + len(found) :]])
        num_cached = (num_known + len(found)) * self.block_size
        spans = (span for span in prompt.spans if span.start + span.num_tokens > num_cached)
        needed = {prompt.media[span.media_index].digest: prompt.media[span.media_index] for span in spans}
        features: list[Staged] = []
        for digest, item in needed.items():
            if knows_media(digest):
                continue
            self._media_queries += 1
            if self._may_have(_media_name(digest)):
                with self._reading:
                    entry = self._read(_media_name(digest), self._feature_bytes(item))
                if entry is not None:
                    self._media_hits += 1
                    features.append(entry)
        if features:
            self._media_of_prompt[prompt] = features
        self._touch([_block_name(digest) for digest in digests])
        self._touch([_media_name(digest) for digest in {item.digest for item in prompt.media}])

    def _doubt(self, names: Sequence[str]) -> None:
        """Of a prompt's blocks those that were not found. Where the first is not there, nobody has read what stands
        behind it, and what harmed that one may have harmed them all."""
        if names and not self.folder.has(names[0]):
            self._doubted.update(name for name in names[1:] if name in self.folder.names)

    def _may_have(self, name: str) -> bool:
        """Asked before anything is waited for."""
        return name in self._staged or self.folder.has(name)

    def _read(self, name: str, num_bytes: int) -> Staged | None:
        """An entry in memory: one that another prompt has there, or from the disk; None where it is not to be had."""
        entry = self._staged.get(name)
        if entry is None and self._staged_bytes() + num_bytes <= self.most_staged_bytes:
            content = torch.empty(num_bytes, dtype=torch.uint8)
            if self.folder.read(name, memoryview(content.numpy())):
                self._read_bytes += num_bytes
                self._doubted.discard(name)
                entry = self._staged[name] = Staged(content)
        return entry

    def _staged_bytes(self) -> int:
        return sum(entry.content.nbytes for entry in list(self._staged.values()))

    def _touch(self, names: Sequence[str]) -> None:
        """Entries that a prompt uses, found in memory or on disk, count as used now."""
        now_ns, known = time.time_ns(), self.folder.names
        for place, name in enumerate(names):
            stamp_ns = now_ns - place * PLACE_NS
            if name in known and stamp_ns - self._touched_ns.get(name, 0) > FRESH_NS:
                self._touched_ns[name] = stamp_ns
                self.folder.touch(name, stamp_ns)
        if len(self._touched_ns) > 2 * len(known) + 1000:
            self._touched_ns = {name: stamp_ns for name, stamp_ns in self._touched_ns.copy().items() if name in known}

    # For the thread of the steps.

    def load(self, blocks: Sequence[BlockToLoad]) -> None:
        """Copy blocks that are staged into the cache, before the step that reads them."""
        rows = torch.stack([self._staged[_block_name(block.digest)].content for block in blocks])
        rows = rows.view(self._tensors[0].dtype).view(len(blocks), len(self._tensors), *self._tensors[0].shape[1:])
        rows = rows.to(self._device.device)
        for first, count, start in _runs([block.block_id for block in blocks]):
            for place, tensor in enumerate(self._tensors):
                tensor[first : first + count].copy_(rows[start : start + count, place])

    def keep(self, blocks: Sequence[BlockToKeep]) -> None:
        """Have full blocks written. They are copied now, before anything is put in their place."""
        kept: list[BlockToKeep] = []
        with self._accounts:
            for block in blocks:
                name = _block_name(block.digest)
                if not self._lacks(name):
                    continue
                before = block.parent and _block_name(block.parent)
                if before and before not in self._queued and not self._holds(before):
                    continue
                if self._queued_bytes + self._block_bytes > self.most_queued_bytes:
                    self._num_dropped += 1
                    continue
                self._queued.add(name)
                self._queued_bytes += self._block_bytes
                kept.append(block)
        if not kept:
            return
        names = [_block_name(block.digest) for block in kept]
        try:
            rows = self._copied([block.block_id for block in kept])
        except (RuntimeError, MemoryError) as error:
            self._resting_until_s = time.monotonic() + RETRY_S
            with self._accounts:
                self._queued.difference_update(names)
                self._queued_bytes -= self._block_bytes * len(names)
                self._num_dropped += len(names)
            logger.warning(
                "%s: blocks cannot be copied (%s); they are not kept, nor others for %.0f s",
                self.folder.path, error, RETRY_S,
            )  # fmt: skip
            return
        now_ns = time.time_ns()
        stamps_ns = [now_ns - block.place * PLACE_NS for block in kept]
        self._queue.put((names, self._block_bytes, stamps_ns, rows))

    def _copied(self, block_ids: Sequence[int]) -> Tensor:
        """Blocks of all layers, one in each row."""
        form = self._tensors[0]
        rows = torch.empty(len(block_ids), len(self._tensors), *form.shape[1:], dtype=form.dtype, device=form.device)
        for first, count, start in _runs(block_ids):
            for place, tensor in enumerate(self._tensors):
                rows[start : start + count, place].copy_(tensor[first : first + count])
        return rows

    def features(self, item: MediaItem) -> Tensor | None:
        """Features `[M, 1 + taps, n]` of a media item on the device, where `fetch` has found them; once."""
        entry = self._staged.pop(_media_name(item.digest), None)
        if entry is None:
            return None
        content, entry.content = entry.content, torch.empty(0, dtype=torch.uint8)
        return content.view(self._feature_dtype).view(item.num_tokens, *self._feature_shape).to(self._device.device)

    def keep_features(self, item: MediaItem, features: Tensor) -> None:
        """Have the features of a media item written; they are not changed any more."""
        name, num_bytes = _media_name(item.digest), self._feature_bytes(item)
        with self._accounts:
            if not self._lacks(name) or time.monotonic() < self._resting_until_s:
                return
            if self._queued_bytes + num_bytes > self.most_queued_bytes:
                self._num_dropped += 1
                return
            self._queued.add(name)
            self._queued_bytes += num_bytes
        self._queue.put(([name], num_bytes, [time.time_ns()], features.unsqueeze(0)))

    def flush(self) -> None:
        """Wait until what is queued is written, FLUSH_S at most."""
        done = threading.Event()
        self._queue.put(done)
        if self._writer.is_alive() and not done.wait(FLUSH_S):
            logger.warning("%s: the disk is slow; the process ends before all is written", self.folder.path)

    def close(self) -> None:
        """`flush`, and end the thread. Nothing can be kept after that."""
        self.flush()
        self._queue.put(None)
        self._writer.join(FLUSH_S)

    def _feature_bytes(self, item: MediaItem) -> int:
        return item.num_tokens * self._feature_shape[0] * self._feature_shape[1] * self._feature_dtype.itemsize

    def _write_queued(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (task := self._queue.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            self._write_all(*task)
            del task  # its memory, until the next one comes

    def _write_all(self, names: list[str], num_bytes: int, stamps_ns: list[int], rows: Tensor) -> None:
        """What was queued together; a fault ends no more than that."""
        num_left = len(names)
        try:
            rows = rows.cpu()  # waits for a device that computes behind the host's back; no step does
            for name, stamp_ns, row in zip(names, stamps_ns, rows, strict=True):
                self._write(name, row, stamp_ns)
                num_left -= 1
        except (RuntimeError, MemoryError) as error:
            self._drop(num_left)
            self._warn_once("copied", f"entries cannot be copied to the host ({error}); they are not kept")
        with self._accounts:
            self._queued.difference_update(names)
            self._queued_bytes -= num_bytes * len(names)

    def _drop(self, count: int) -> None:
        with self._accounts:
            self._num_dropped += count

    def _warn_once(self, kind: str, words: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s: %s", self.folder.path, words)

    def _write(self, name: str, row: Tensor, stamp_ns: int) -> None:
        if time.monotonic() < self._resting_until_s:
            self._drop(1)
            return
        if name in self._doubted:
            if self.folder.read(name, memoryview(bytearray(row.nbytes))):
                self._doubted.discard(name)
                return
        elif self.folder.has(name):  # another process has been faster
            return
        if name in self.folder.blocked:
            return
        try:
            self.folder.write(name, memoryview(row.contiguous().view(-1).view(torch.uint8).numpy()), stamp_ns)
        except OSError as error:
            self._resting_until_s = time.monotonic() + RETRY_S
            self._drop(1)
            self._warn_once(
                "written",
                f"cannot be written to ({error.strerror or error}); the engine goes on without new entries on disk, "
                f"and tries again every {RETRY_S:.0f} s",
            )
            return
        self._doubted.discard(name)
        self._written_bytes += row.nbytes


def _block_name(digest: bytes) -> str:
    return f"{digest.hex()}.kv"


def _media_name(digest: bytes) -> str:
    return f"{digest.hex()}.media"


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive block ids: (the first, how many, where they begin in the list)."""
    start = 0
    for end in range(1, len(block_ids) + 1):
        if end == len(block_ids) or block_ids[end] != block_ids[end - 1] + 1:
            yield block_ids[start], end - start, start
            start = end
