"""Train the demo model: a small Qwen3-MoE on the Python standard library's own sources, by wall-clock budget.

The run that made the shipped weights is in moert/data/demo/README.md. On a CPU, start it with the C allocator told to
keep freed memory (`GLIBC_TUNABLES`, see there): page faults otherwise take a third of each step.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import demo_forward
import numpy as np
import torch
import torch.nn.functional as F
from demo_data import Windows, prepare, token_sizes
from muon import Muon
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

COLUMNS = ("step", "tokens", "seconds", "train_loss", "heldout_bits_per_byte", "lr", "usage_entropy")


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=args.balance,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config).float()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.o_proj.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
            layer.mlp.experts.down_proj.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


@torch.no_grad()
def heldout_bits_per_byte(forward: Any, stream: np.ndarray, sizes: Tensor, context: int, windows: int) -> float:
    """A quick estimate over `windows` evenly spaced windows; bench/eval_demo.py has the whole held-out text."""
    starts = np.linspace(0, len(stream) - context - 2, windows).astype(np.int64)
    bits, size_bytes = 0.0, 0
    device = forward.model.device
    for start in starts:
        ids = torch.from_numpy(stream[start : start + context + 1].astype(np.int64))[None].to(device)
        logits = forward(ids[:, :-1])[0][0].float()
        bits += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")) / math.log(2)
        size_bytes += int(sizes[ids[0, 1:].cpu()].sum())
    return bits / size_bytes


def rate_at(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a half cosine to 1 % of the peak; progress runs 0..1 over the time budget."""
    if progress < warmup:
        return peak * max(progress / warmup, 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))))


def make_optimizers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, routers and norms (or AdamW for all)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("model.layers") and parameter.ndim >= 2 and ".gate.weight" not in name
        (matrices if is_matrix else others).append(parameter)
    adam = {"betas": (0.9, 0.95), "eps": 1e-10, "fused": True}
    if args.optimizer == "muon":
        return [
            Muon(matrices, weight_decay=args.weight_decay),
            torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, **adam),
        ]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=args.lr, **adam)]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def check_same_logits(model: Any, stream: np.ndarray, context: int) -> None:
    ids = torch.from_numpy(stream[: 2 * context].astype(np.int64)).view(2, context).to(model.device)
    difference = demo_forward.max_difference(model, ids)
    print(f"fast forward against the model's own: largest logit difference {difference:.2e}", flush=True)
    if not difference < 1e-4:
        raise RuntimeError(f"fast forward differs from the model's own by {difference:.2e}, allowed 1e-4")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, stream, heldout = prepare(work, args.vocab, args.context)
    sizes = token_sizes(tokenizer)
    train_bytes = int(sizes[stream.astype(np.int64)].sum())
    print(f"training text {train_bytes:,} bytes in {len(stream):,} tokens; held out {len(heldout):,} tokens")
    device = torch.device(args.device)
    model = build_model(tokenizer, args).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    check_same_logits(model, heldout, args.context)
    if args.compile:
        demo_forward.compile_pieces()
    forward = demo_forward.FastForward(model)
    optimizers = make_optimizers(model, args)
    data = Windows(stream, args.batch, args.context, args.seed)
    step, tokens, spent_s = 0, 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent_s = state["step"], state["tokens"], state["seconds"]
        data.seek(state["epoch"], state["position"])
    log_file = (work / "training_log.csv").open("a" if step else "w", newline="")
    log = csv.writer(log_file)
    if not step:
        log.writerow(COLUMNS)
    began = time.monotonic() - spent_s
    budget_s = args.minutes * 60
    last_eval_s = last_save_s = time.monotonic() - began
    recent: list[float] = []
    picks = 0
    progress = spent_s / budget_s
    while progress < 1.0:
        lr = rate_at(progress, args.lr)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        ids = data.next().to(device)
        logits, balance, counts = forward(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += ids[:, 1:].numel()
        recent.append(loss.item())
        picks = picks + counts
        seconds = time.monotonic() - began
        progress = seconds / budget_s
        is_eval = seconds - last_eval_s > args.eval_minutes * 60 or progress >= 1.0
        if step % args.log_steps == 0 or is_eval:
            share = picks / picks.sum(-1, keepdim=True)
            entropy = float(torch.special.entr(share).sum(-1).mean() / math.log(share.shape[-1]))
            bits = heldout_bits_per_byte(forward, heldout, sizes, args.context, 64) if is_eval else float("nan")
            numbers = (seconds, float(np.mean(recent)), bits, lr, entropy)
            row = (step, tokens, *(f"{number:.6g}" for number in numbers))
            log.writerow(row)
            log_file.flush()
            skew = float((picks.amax(-1) / picks.float().mean(-1)).mean())
            print(*(f"{k}={v}" for k, v in zip(COLUMNS, row, strict=True)), f"skew={skew:.2f}", flush=True)
            recent, picks = [], 0
            if is_eval:
                last_eval_s = seconds
        if seconds - last_save_s > args.save_minutes * 60 or progress >= 1.0:
            last_save_s = seconds
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "tokens": tokens,
                "seconds": seconds,
                "epoch": data.epoch,
                "position": data.position,
            }
            save_checkpoint(checkpoint, state)
    check_same_logits(model, heldout, args.context)
    export(model, tokenizer, Path(args.out))
    print(f"done: {step} steps, {tokens:,} tokens, {tokens / seconds:.0f} tokens/s, {data.epoch + 1} epochs begun")


def export(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 with its tokenizer to `out`, and check that it loads to the same weights."""
    model = model.cpu().eval().to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The library writes weights readable by their owner alone; a package's files are for everybody.
    (out / "model.safetensors").chmod(0o644)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for (name, saved), again in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if not torch.equal(saved, again):
            raise RuntimeError(f"{name} changed on its way through {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the finished model")
    parser.add_argument("--work", required=True, help="folder for tokens, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=55.0, help="wall-clock budget; the rate schedule follows it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work, if there is one")
    parser.add_argument("--compile", action="store_true", help="compile the element-wise pieces (needs a C++ compiler)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--log-steps", type=int, default=20)
    parser.add_argument("--eval-minutes", type=float, default=2.0)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
