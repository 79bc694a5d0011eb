"""Training batches: pictures to patches, questions to packed token sequences with positions and an attention mask.

A sequence is one picture (or clip) and as many question/answer turns about it as fit in `length` tokens. Mostly each
turn sees the picture and itself only, at the positions of a first turn ("branches" over a shared prefix); some
sequences are plain chats, where a turn sees all turns before it. Only answers and their <|im_end|> are learnt.

Shapes: B sequences, T tokens, N temporal patches (one per picture, two or three per clip), 64 patches of D values each.
"""

import io
import random

import numpy as np
import torch
from PIL import Image

from models.tiny.training import aids
from models.tiny.training import world as shapes
from models.tiny.training.configs import CLIP_MEAN, CLIP_STD, PATCH_PX
from models.tiny.training.tokenizer import SYSTEM_PROMPT

TOKENS_PER_PATCH_PAIR = 16  # 8x8 patches, merged 2x2
MERGED_SIDE = 4
HEADER = "<|im_end|>\n<|im_start|>assistant\n"
SECONDS_STEP = 2  # qwen2_5: second_per_grid 1.0 x tokens_per_second 2


def patches(frames, family):
    """uint8 [2N, 112, 112, 3] (pairs of frames; a picture stands twice) to float32 [N, 64, 3*2*P*P], as the
    transformers default processors do: bicubic antialiased resize of uint8 to a multiple of 2P, then normalise."""
    size_px = PATCH_PX[family]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    if family == "qwen3":
        pixels = torch.nn.functional.interpolate(pixels, size=(8 * size_px,) * 2, mode="bicubic", antialias=True)
    mean, std = (CLIP_MEAN, CLIP_STD) if family == "qwen2_5" else ([0.5] * 3, [0.5] * 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    pixels = (pixels.float() / 255 - mean) / std
    grid = pixels.view(-1, 2, 3, 4, 2, size_px, 4, 2, size_px)  # N, frame, channel, (row, sub, y), (column, sub, x)
    return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 64, 3 * 2 * size_px**2).contiguous()


def sampled_frames(scene, family, fps=2.0):
    """Frame indices the family's processor takes of a clip at `fps` (transformers' sample_frames)."""
    total = scene.num_frames
    count = max(int(total / scene.fps * fps), 4) // 2 * 2
    if family == "qwen3":
        return np.linspace(0, total - 1, count).round().astype(int)
    return np.arange(0, total, total / count).astype(int)[:count]


def media_frames(scene, family, rng=None):
    """(uint8 [2n, 112, 112, 3], frame times in seconds or None); with `rng`, sometimes through JPEG."""
    if scene.is_clip:
        picked = sampled_frames(scene, family)
        frames, times = np.stack([scene.frame(i) for i in picked]), picked / scene.fps
    else:
        frames, times = scene.picture()[None], None
    if rng is not None and rng.random() < 0.25:
        frames = np.stack([_through_jpeg(f, rng.randint(60, 95)) for f in frames])
    return (frames if scene.is_clip else np.repeat(frames, 2, axis=0)), times


def _through_jpeg(frame, quality):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def media_text(family, num_pairs, times):
    """The prompt's vision part in the form the families are trained on."""
    if times is None:
        return "<|vision_start|>" + "<|image_pad|>" * TOKENS_PER_PATCH_PAIR + "<|vision_end|>"
    pads = "<|video_pad|>" * TOKENS_PER_PATCH_PAIR
    if family == "qwen2_5":
        return "<|vision_start|>" + pads * num_pairs + "<|vision_end|>"
    stamps = [(times[2 * i] + times[2 * i + 1]) / 2 for i in range(num_pairs)]
    return "".join(f"<{stamp:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for stamp in stamps)


def positions(ids, pad_ids, family, start=0):
    """M-RoPE positions int64 [3, len(ids)] of a prefix: text counts on, a vision span has (t, h, w) and what follows it
    resumes at max + 1. In qwen3 each temporal patch is a span of its own (t = 0)."""
    out, next_position, i = np.zeros((3, len(ids)), np.int64), start, 0
    while i < len(ids):
        if ids[i] not in pad_ids:
            out[:, i] = next_position
            next_position, i = next_position + 1, i + 1
            continue
        end = i
        while end < len(ids) and ids[end] in pad_ids:
            end += 1
        index = np.arange(end - i)
        cell = index % TOKENS_PER_PATCH_PAIR
        time = index // TOKENS_PER_PATCH_PAIR * SECONDS_STEP
        assert family == "qwen2_5" or end - i == TOKENS_PER_PATCH_PAIR
        out[:, i:end] = next_position + np.stack([time, cell // MERGED_SIDE, cell % MERGED_SIDE])
        next_position, i = out[:, i:end].max() + 1, end
    return out, next_position


class Packer:
    """Turns scenes into token sequences; holds the tokenizer, the family and a cache of encoded strings."""

    def __init__(self, tokenizer, family, length=128):
        self.tokenizer, self.family, self.length = tokenizer, family, length
        self.pad_ids = {tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id("<|video_pad|>")}
        self.pad_id = tokenizer.token_to_id("<|endoftext|>")
        self.label_ids = {tokenizer.token_to_id(f"Ġ{word}") for word in (*shapes.COLORS, *shapes.SHAPES)}
        self._cache = {}

    def encode(self, text):
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[text] = self.tokenizer.encode(text).ids
        return self._cache[text]

    def prefix(self, num_pairs, times, with_system):
        system = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n" if with_system else ""
        return self.encode(system + "<|im_start|>user\n" + media_text(self.family, num_pairs, times))

    def pack(self, num_pairs, times, questions, with_system, chat=False, scene=None):
        """One sequence: dict of ids [T], positions [3, T], segment [T] (0 shared, n the nth turn, -1 padding) and
        target [T] (the token to predict next, -100 none). Turns that do not fit are left out. Given the `scene` it adds
        `look` [T, 16] (aids.looked_at), and the shape in "the red circle" of a question is learnt too: it must be
        looked up by the colour before it."""
        prefix = self.prefix(num_pairs, times, with_system)
        pos, next_position = positions(prefix, self.pad_ids, self.family)
        ids, segment = list(prefix), [0] * len(prefix)
        target, parts = [-100] * len(prefix), [pos]
        look = np.zeros((self.length, aids.NUM_CELLS), np.float32)
        for turn, question in enumerate(questions):
            lead = "\n<|im_start|>user\n" if chat and turn else ""
            asked = self.encode(lead + question.text + HEADER)
            answer = self.encode(question.answer_for(self.family) + "<|im_end|>")
            size = len(asked) + len(answer)
            if len(ids) + size > self.length:
                continue
            hinted = [
                b if scene and not chat and {a, b} <= self.label_ids else -100
                for a, b in zip(asked, asked[1:], strict=False)
            ]
            target += hinted + answer + [-100]
            if scene:
                look[len(ids) + len(asked) - 1 : len(ids) + size - 1] = aids.looked_at(question, scene)
            ids += asked + answer
            segment += [0 if chat else turn + 1] * size
            parts.append(np.broadcast_to(next_position + np.arange(size), (3, size)))
            next_position += size if chat else 0
        room = self.length - len(ids)
        return {
            "ids": np.array(ids + [self.pad_id] * room),
            "segment": np.array(segment + [-1] * room),
            "target": np.array(target + [-100] * room),
            "look": look,
            "positions": np.concatenate([*parts, np.zeros((3, room), np.int64)], axis=1),
        }


def collate(rows, frames, family, pad_ids):
    """Rows of `pack` and their frames to tensors; adds `mask` bool [B, 1, T, T], `vision_index`, where in the
    flattened [B*T] the vision tokens stand, and `first_vision` [B], where in its row the first stands."""
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows], axis=key == "positions")) for key in rows[0]}
    segment = batch.pop("segment")
    length = segment.shape[1]
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    batch["mask"] = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    is_vision = torch.isin(batch["ids"], torch.tensor(sorted(pad_ids)))
    batch["vision_index"] = is_vision.flatten().nonzero()[:, 0]
    batch["first_vision"] = is_vision.long().argmax(1)
    batch["patches"] = patches(np.concatenate(frames), family)
    return batch


def training_batch(packer, seed, step, num_pictures=24, num_clips=(6, 2), easy=False):
    """The batch number `step` of a run: `num_pictures` pictures and (two-pair, three-pair) clips, a fixed count each,
    so that every batch has the same shapes. A function of its arguments alone."""
    rng = random.Random(f"train:{seed}:{step}")
    media = ["objects"] * (num_pictures - num_pictures // 3) + ["word", "number"] * (num_pictures // 6)
    media += ["objects"] * (num_pictures - len(media))
    rows, frames, facts = [], [], []
    for medium, seconds in [(m, 0) for m in media] + [("clip", 2)] * num_clips[0] + [("clip", 3)] * num_clips[1]:
        most = 1 if easy else 3
        scene = shapes.make_scene(rng, medium, max_things=most, min_things=min(most, rng.choice((1, 2, 2))))
        while scene.is_clip and scene.num_frames != seconds * scene.fps:
            scene = shapes.make_scene(rng, medium)
        pixels, times = media_frames(scene, packer.family, rng)
        questions = scene.questions(rng) + aids.drills(scene, rng)
        rng.shuffle(questions)
        if len(scene.things) > 1 and rng.random() < 0.2:  # what must look an object up is hardest: more of it
            questions = [q for q in questions if q.kind not in ("describe", "count")]
        chat = rng.random() < 0.15
        rows.append(packer.pack(len(pixels) // 2, times, questions, rng.random() < 0.5, chat, scene))
        frames.append(pixels)
        facts += [aids.cell_facts(scene)] * (len(pixels) // 2)
    return {**collate(rows, frames, packer.family, packer.pad_ids), "cells": torch.from_numpy(np.concatenate(facts))}


def question_batch(packer, samples, with_system=True):
    """First-turn sequences of held-out samples, one question each, in one batch."""
    rows, frames = [], []
    for sample in samples:
        pixels, times = media_frames(sample.scene, packer.family)
        rows.append(packer.pack(len(pixels) // 2, times, [sample.question], with_system))
        frames.append(pixels)
    return collate(rows, frames, packer.family, packer.pad_ids)
