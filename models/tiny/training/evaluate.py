"""What training looks at: how many held-out answers would be right, and whether its forward pass is transformers' own.

`python -m models.tiny.training.evaluate --model qwen3_vl` prints the largest difference of logits. What a finished
checkpoint answers is scored by the product itself: `bash infer.sh config/quickstart.yaml eval --dataset tiny_world`.
"""

import argparse
import json
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"forward_difference": check(args.folder or HERE / args.model, args.model)}))


if __name__ == "__main__":
    main()
