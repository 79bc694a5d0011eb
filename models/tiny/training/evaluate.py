"""Scores of a tiny model on held-out samples: `python -m models.tiny.training.evaluate --model qwen3_vl --num 500`.

The folder's weights run in fp32 through transformers' own class, one first-turn question at a time in batches of equal
length, greedily; a box is also scored by IoU. Prints JSON. `--check`: training's forward pass against transformers'.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from models.tiny.training import configs, data, tokenizer
from models.tiny.training import world as shapes
from models.tiny.training.forward import Forward

HERE = Path(__file__).parents[1]  # models/tiny, where the checkpoints are


@torch.no_grad()
def teacher_forced(forward, packer, seed, num, batch=44):
    """{kind: share answered exactly} where an answer counts if each of its tokens is the argmax given those before it,
    which is what greedy decoding would have produced."""
    samples, right = shapes.held_out(seed, num), defaultdict(list)
    for start in range(0, num, batch):
        part = samples[start : start + batch]
        fed = data.question_batch(packer, part, with_system=start % 2 == 0)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = forward.answer_logits(fed)
        row = (fed["target"].flatten() >= 0).nonzero()[:, 0] // packer.length
        wrong = set(row[logits.argmax(-1) != target].tolist())
        for n, sample in enumerate(part):
            right[sample.question.kind].append(n not in wrong)
    scores = {kind: round(sum(v) / len(v), 3) for kind, v in right.items()}
    return {**scores, "all": round(sum(map(sum, right.values())) / num, 4)}


def media_inputs(batch, is_clip):
    """transformers' keyword arguments of a one-sequence batch's picture or clip."""
    kind, values = ("video", "pixel_values_videos") if is_clip else ("image", "pixel_values")
    return {values: batch["patches"].flatten(0, 1), f"{kind}_grid_thw": torch.tensor([[len(batch["patches"]), 8, 8]])}


@torch.no_grad()
def answer(model, packer, sample, max_tokens=48, with_system=True):
    """Greedy answer text by transformers' class with its cache; positions are ours (see data.positions)."""
    batch = data.question_batch(packer, [sample], with_system)
    length = int((batch["target"][0] >= 0).nonzero()[0]) + 1
    ids, positions = batch["ids"][:, :length], batch["positions"][:, :, :length]
    inputs = {**media_inputs(batch, sample.scene.is_clip), "mm_token_type_ids": torch.zeros_like(ids)}
    stop, said, cache = packer.tokenizer.token_to_id("<|im_end|>"), [], None
    for _ in range(max_tokens):
        out = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **inputs)
        cache, inputs = out.past_key_values, {}
        token = int(out.logits[0, -1].argmax())
        if token == stop:
            break
        said.append(token)
        ids, positions = torch.tensor([[token]]), positions[:, :, -1:] + 1
    return packer.tokenizer.decode(said)


def said_box(text):
    """The four numbers of the first bbox_2d in `text`, or None."""
    found = re.search(r"bbox_2d\": \[(\d+), (\d+), (\d+), (\d+)\]", text)
    return tuple(map(int, found.groups())) if found else None


def evaluate(folder, name, seed, num):
    """{kind: exact share} over `num` held-out samples, with "all" and "box_iou" (share of boxes with IoU >= 0.5)."""
    packer = data.Packer(tokenizer.build(), configs.FAMILY[name], length=256)
    model = configs.MODEL_CLASS[name].from_pretrained(folder, dtype=torch.float32).eval()
    right, boxes = defaultdict(list), []
    for n, sample in enumerate(shapes.held_out(seed, num)):
        said = answer(model, packer, sample, with_system=n % 2 == 0)
        right[sample.question.kind].append(sample.question.is_right(said, packer.family))
        if sample.question.kind == "box":
            box, truth = said_box(said), said_box(sample.question.answer_for(packer.family))
            boxes.append(box is not None and shapes.iou(box, truth) >= 0.5)
    scores = {kind: round(sum(v) / len(v), 3) for kind, v in right.items()}
    return {
        **scores,
        "box_iou": round(sum(boxes) / len(boxes), 3),
        "all": round(sum(map(sum, right.values())) / num, 4),
    }


@torch.no_grad()
def check(folder, name):
    """Largest logit difference between training's forward pass and transformers' own, picture and clip, fp32."""
    packer = data.Packer(tokenizer.build(), configs.FAMILY[name])
    model = configs.MODEL_CLASS[name].from_pretrained(folder, dtype=torch.float32).eval()
    forward, worst = Forward(model), 0.0
    for index in range(22):
        sample = shapes.sample(3, index)
        batch = data.question_batch(packer, [sample])
        length = int((batch["target"][0] >= 0).nonzero()[-1]) + 2
        theirs = model(
            input_ids=batch["ids"][:, :length],
            position_ids=batch["positions"][:, :, :length],
            mm_token_type_ids=torch.zeros(1, length, dtype=torch.long),
            **media_inputs(batch, sample.scene.is_clip),
        ).logits
        hidden = forward.hidden(
            batch["ids"], batch["positions"], batch["mask"], batch["vision_index"], batch["patches"]
        )
        worst = max(worst, float((model.lm_head(hidden[:, :length]) - theirs).abs().max()))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=list(configs.FAMILY))
    parser.add_argument("--folder", type=Path, help="default: the folder of that name here")
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder or HERE / args.model
    print(
        json.dumps(
            {"forward_difference": check(folder, args.model)}
            if args.check
            else evaluate(folder, args.model, args.seed, args.num)
        )
    )


if __name__ == "__main__":
    main()
