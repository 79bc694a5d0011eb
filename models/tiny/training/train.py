"""Train a tiny model on the little world: `python -m models.tiny.training.train --model qwen3_vl`.

One thread is enough (two models train side by side on two cores). Hidden matrices by Muon, the rest by AdamW, linear
decay to zero. Batches are a function of (seed, step), so a run resumed from .work/<model>.pt goes on as it would have.
The first `--easy-steps` steps show one object per picture. `--export-every` writes the checkpoint folder on the way.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from models.tiny.training import aids, configs, data, tokenizer
from models.tiny.training.evaluate import teacher_forced
from models.tiny.training.forward import Forward

HERE = Path(__file__).parents[1]  # models/tiny, where the checkpoints are
WORK = HERE / ".work"
QUERY_KEY_RATE = 0.5
QUERY_KEY_RMS = 0.026  # attention logits up to 15; at 0.044 they saturate, at 0.02 they stay flat


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=list(configs.FAMILY))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step; a quarter of them clips")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="AdamW: embeddings, head, norms, biases, patch embedding"
    )
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon: hidden matrices; 0 leaves all to AdamW")
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--easy-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=600)
    parser.add_argument("--upcycle", metavar="FOLDER", help="start a qwen3_vl_moe from this dense checkpoint's weights")
    parser.add_argument("--start", type=Path, help="begin with the weights of this saved state (a .pt of --work)")
    parser.add_argument("--work", type=Path, default=WORK, help="where the resumable state and the log lie")
    parser.add_argument("--aids", action="store_true", help="the probe and the look loss of aids.py (qwen2_5_vl)")
    parser.add_argument("--no-export", action="store_true")
    return parser.parse_args()


def initialised(name, tok, seed):
    """A fresh fp32 model; residual outputs start small, so that depth does not matter at first."""
    torch.manual_seed(seed)
    model = configs.MODEL_CLASS[name](configs.config(name, tok)).float()
    for key, parameter in model.named_parameters():
        if key.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight")):
            parameter.data.mul_(0.5)
    return model


def upcycled(folder, tok, seed, noise=0.05):
    """Sparse upcycling: every expert is the dense MLP plus a little noise. The top-2 weights sum to one, so the mixture
    starts as the dense model; the router starts small and random."""
    torch.manual_seed(seed)
    dense = configs.MODEL_CLASS["qwen3_vl"].from_pretrained(folder, dtype=torch.float32).state_dict()
    model = configs.MODEL_CLASS["qwen3_vl_moe"](configs.config("qwen3_vl_moe", tok)).float()
    state = model.state_dict()
    for key, value in state.items():
        base = key.split(".mlp.experts.")[0] + ".mlp."
        if key.endswith("experts.gate_up_proj"):
            value[:] = torch.cat([dense[base + "gate_proj.weight"], dense[base + "up_proj.weight"]])
        elif key.endswith("experts.down_proj"):
            value[:] = dense[base + "down_proj.weight"]
        elif key.endswith("mlp.gate.weight"):
            value.normal_(std=0.02)
        else:
            value.copy_(dense[key])
        if ".experts." in key:
            value.mul_(1 + noise * torch.randn_like(value))
    model.load_state_dict(state)
    return model


def optimizers(model, lr, muon_lr, probe=None):
    """[AdamW over embeddings, head, biases and norms, Muon over hidden matrices]; each group keeps its peak in
    `peak_lr`. Without q/k norms (qwen2_5_vl) Muon drives attention logits past 100, and at a low rate attention stays
    flat: either way nothing is ever looked up. So there the text's q and k turn, but keep their size (`rms`)."""
    hidden, query_key, rest, bare = [], [], [], []
    normed = any("q_norm" in key for key, _ in model.named_parameters())
    for key, parameter in model.named_parameters():
        if muon_lr and parameter.ndim == 2 and not any(s in key for s in ("embed", "lm_head", "gate.weight")):
            kept = not normed and any(s in key for s in ("q_proj", "k_proj"))
            (query_key if kept else hidden).append(parameter)
        else:
            (rest if parameter.ndim >= 2 else bare).append(parameter)
    rest += list(probe.parameters()) if probe else []
    found = [
        torch.optim.AdamW(
            [{"params": rest, "weight_decay": 0.02}, {"params": bare, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        )
    ]
    if muon_lr:
        groups = [{"params": hidden}]
        if query_key:
            groups.append({"params": query_key, "lr": QUERY_KEY_RATE * muon_lr, "rms": QUERY_KEY_RMS})
        found.append(torch.optim.Muon(groups, lr=muon_lr, weight_decay=0.01, momentum=0.95))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


def balance_loss(expert_shares):
    """Pushes the experts' mean shares of the tokens towards equal ones; 0 when they are. One [tokens, E] per layer."""
    return sum(share.shape[1] * (share.mean(0) ** 2).sum() - 1 for share in expert_shares)


def train_step(forward, batch, found, scale, probe=None):
    """One update at `scale` times the peak learning rates; returns (loss, share of answer tokens right)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, target = forward.answer_logits(batch)
    loss = F.cross_entropy(logits.float(), target)
    total = loss + 0.01 * balance_loss(forward.expert_shares)
    if probe:
        total = total + aids.PROBE_WEIGHT * probe.loss(forward.merged, batch["cells"])
        look = aids.look_loss(forward.attended, batch["look"], batch["first_vision"])
        total = total + aids.LOOK_WEIGHT * look
    total.backward()
    torch.nn.utils.clip_grad_norm_([p for g in found[0].param_groups for p in g["params"]], 1.0)
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            for weight in group["params"] if "rms" in group else ():
                weight.data.mul_(group["rms"] / weight.data.square().mean().sqrt())
    return loss.item(), (logits.argmax(-1) == target).float().mean().item()


def export(model, name, tok, folder):
    """Write the checkpoint folder in bf16, the running model untouched."""
    copy = configs.MODEL_CLASS[name](configs.config(name, tok)).to(torch.bfloat16)
    copy.load_state_dict({key: value.to(torch.bfloat16) for key, value in model.state_dict().items()})
    copy.tie_weights()
    copy.config.dtype = torch.bfloat16
    copy.save_pretrained(folder)
    configs.store_experts_as_published(Path(folder) / "model.safetensors")
    written = Path(folder) / "config.json"  # the published files say num_experts
    written.write_text(written.read_text().replace("num_local_experts", "num_experts"))
    configs.save_side_files(name, folder, tok)


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    state_path, log_path = args.work / f"{args.model}.pt", args.work / f"{args.model}.jsonl"
    tok = tokenizer.build()
    packer = data.Packer(tok, configs.FAMILY[args.model])
    model = upcycled(args.upcycle, tok, args.seed) if args.upcycle else initialised(args.model, tok, args.seed)
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=False)["model"])
    model.train()
    probe = aids.Probe(model.config.vision_config.out_hidden_size) if args.aids else None
    forward, found = Forward(model), optimizers(model, args.lr, args.muon_lr, probe)
    first, spent_s = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(found, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent_s = state["step"], state["spent_s"]
    num_clips = args.batch // 4
    clips = (num_clips - num_clips // 4, num_clips // 4)
    started, losses = time.time() - spent_s, []
    for step in range(first, args.steps):
        batch = data.training_batch(packer, args.seed, step, args.batch - num_clips, clips, easy=step < args.easy_steps)
        scale = min((step + 1) / args.warmup_steps, (args.steps - step) / args.steps)
        losses.append(train_step(forward, batch, found, scale, probe))
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            loss, right = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            losses = []
            entry = {
                "step": done,
                "loss": round(loss, 4),
                "token_right": round(right, 4),
                "minutes": round((time.time() - started) / 60, 2),
            }
            if done % args.eval_every == 0 or done == args.steps:
                entry["held_out"] = teacher_forced(forward, packer, seed=1000, num=220)
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizers": [o.state_dict() for o in found],
                        "step": done,
                        "spent_s": time.time() - started,
                    },
                    state_path,
                )
            with log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            assert math.isfinite(loss), "the loss is not finite"
        if not args.no_export and (done % args.export_every == 0 or done == args.steps):
            export(model, args.model, tok, HERE / args.model)


if __name__ == "__main__":
    main()
