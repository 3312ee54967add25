"""Judge a demo model folder: held-out compression against gzip -9, and how local and specialised its routing is.

Everything runs through plain transformers; every number in moert/data/demo/README.md is printed by this script.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from stdlib_text import TextFile, gzip_bits_per_byte, load_split
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SRP_WINDOWS = (4, 16, 64)


def encode_file(tokenizer: Any, text: str) -> Tensor:
    """[N] int64: the end token, which stands before a file's first token, then the text's tokens."""
    return torch.tensor([tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids])


def cut(ids: Tensor, context: int, stride: int) -> list[tuple[Tensor, int]]:
    """Windows of at most context + 1 ids, each with its first scored target: every target is scored exactly once.

    After the first window each target is predicted from at least context - stride ids.
    """
    windows = [(ids[: context + 1], 0)]
    done = min(len(ids) - 1, context)
    while done < len(ids) - 1:
        end = min(done + stride, len(ids) - 1)
        start = end - context
        windows.append((ids[start : end + 1], done - start))
        done = end
    return windows


@torch.no_grad()
def bits_per_file(
    model: Any, tokenizer: Any, files: list[TextFile], context: int, stride: int, batch: int
) -> list[float]:
    """Bits the model needs for each file, files apart from one another; blocks for minutes on a CPU."""
    work = [
        (number, *window)
        for number, file in enumerate(files)
        for window in cut(encode_file(tokenizer, file.text), context, stride)
    ]
    work.sort(key=lambda item: -len(item[1]))
    bits = [0.0] * len(files)
    for begin in range(0, len(work), batch):
        part = work[begin : begin + batch]
        rows = torch.nn.utils.rnn.pad_sequence([window for _, window, _ in part], batch_first=True)
        logits = model(rows[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") / math.log(2)
        for row, (number, window, first) in enumerate(part):
            bits[number] += float(losses[row, first : len(window) - 1].sum())
    return bits


def whole_windows(tokenizer: Any, files: list[TextFile], context: int, limit: int) -> Tensor:
    """[n, context] ids: up to `limit` evenly chosen whole windows of the files, no two overlapping."""
    windows: list[Tensor] = []
    for file in files:
        ids = encode_file(tokenizer, file.text)
        windows += ids[: len(ids) // context * context].view(-1, context)
    step = max(1, len(windows) // limit)
    return torch.stack(windows[::step][:limit])


@torch.no_grad()
def record_routing(model: Any, windows: Tensor) -> tuple[np.ndarray, float]:
    """[n, S, layers, E] bool, the experts each token of windows [n, S] chose; and the mean loss in bits per token."""
    chosen, bits = [], []
    for ids in windows:
        output = model(ids[None], use_cache=False, output_router_logits=True)
        bits.append(float(F.cross_entropy(output.logits[0, :-1].float(), ids[1:])) / math.log(2))
        probs = torch.stack(output.router_logits, dim=1).softmax(-1, dtype=torch.float32)
        picks = probs.topk(model.config.num_experts_per_tok, dim=-1).indices
        chosen.append(F.one_hot(picks, model.config.num_experts).sum(2).bool().numpy())
    return np.stack(chosen), float(np.mean(bits))


@contextmanager
def misrouted(model: Any) -> Iterator[None]:
    """While open, every token goes to the neighbours of the experts its router meant, with the same weights."""
    routers = [layer.mlp.gate.weight.data for layer in model.model.layers]
    for router in routers:
        router.copy_(router.roll(1, dims=0))
    try:
        yield
    finally:
        for router in routers:
            router.copy_(router.roll(-1, dims=0))


def usage(chosen: np.ndarray) -> dict[str, Any]:
    """Entropy of expert usage per layer as a share of log E, and the largest share of picks one expert takes."""
    share = chosen.sum((0, 1)) / chosen.sum((0, 1)).sum(-1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(-1) / math.log(share.shape[-1])
    return {"entropy_share": [round(float(value), 4) for value in entropy], "largest_share": float(share.max())}


def overlap(chosen: np.ndarray) -> dict[str, Any]:
    """Mean share of a token's experts that the token before it chose too, per layer; chance is K / E for uniform picks.

    `popularity_alone` is what independent tokens with the same expert popularity would give.
    """
    picks = chosen[0, 0, 0].sum()
    both = (chosen[:, 1:] & chosen[:, :-1]).sum(-1).mean((0, 1)) / picks
    popularity = (chosen.mean((0, 1)) ** 2).sum(-1) / picks
    return {
        "per_layer": [round(float(value), 4) for value in both],
        "mean": float(both.mean()),
        "random": float(picks / chosen.shape[-1]),
        "popularity_alone": float(popularity.mean()),
    }


def segment_routing(chosen: np.ndarray, window: int) -> tuple[float, float]:
    """SRP(window) of the whole model and its size ratio at the best threshold.

    For every run of `window` tokens an expert counts as predicted for all of them iff it was active at least t times
    in it; SRP is the best F1 over t of those predictions against the activations, summed over runs, layers and experts.
    """
    totals = np.concatenate((np.zeros_like(chosen[:, :1], dtype=np.int32), chosen.cumsum(1, dtype=np.int32)), axis=1)
    counts = totals[:, window:] - totals[:, :-window]
    histogram = np.bincount(counts.ravel(), minlength=window + 1)
    values = np.arange(window + 1)
    acts = int((histogram * values).sum())
    matches = (histogram * values)[::-1].cumsum()[::-1]
    predictions = window * histogram[::-1].cumsum()[::-1]
    scores = 2 * matches[1:] / (predictions[1:] + acts)
    best = int(scores.argmax())
    return float(scores[best]), float(predictions[1 + best] / acts)


def routing_report(model: Any, windows: Tensor, seed: int = 0) -> dict[str, Any]:
    """Usage, overlap and SRP over windows [n, S], and what the experts' differences are worth.

    `shuffled` is SRP after mixing the order of all tokens, which keeps popularity alone. `bits_per_token` has the loss
    as it is and with every token sent to the wrong experts: equal losses would mean interchangeable experts.
    """
    chosen, own_bits = record_routing(model, windows)
    with misrouted(model):
        wrong_bits = record_routing(model, windows)[1]
    tokens = chosen.reshape(-1, *chosen.shape[2:])
    mixed = tokens[np.random.default_rng(seed).permutation(len(tokens))].reshape(chosen.shape)
    srp = {}
    for window in SRP_WINDOWS:
        value, ratio = segment_routing(chosen, window)
        srp[str(window)] = {"srp": value, "size_ratio": ratio, "shuffled": segment_routing(mixed, window)[0]}
    bits = {"own_experts": own_bits, "wrong_experts": wrong_bits}
    return {
        "tokens": len(tokens),
        "bits_per_token": bits,
        "usage": usage(chosen),
        "overlap": overlap(chosen),
        "srp": srp,
    }


def seen_line_share(train: list[TextFile], heldout: list[TextFile]) -> float:
    """Share of held-out bytes on lines of 20 or more characters that stand word for word in a training file too."""
    known = {line.strip() for file in train for line in file.text.splitlines()}
    lines = [line for file in heldout for line in file.text.splitlines(keepends=True)]
    seen = sum(len(line.encode()) for line in lines if len(line.strip()) >= 20 and line.strip() in known)
    return seen / sum(file.size_bytes for file in heldout)


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = getattr(torch, args.dtype)
    if args.random:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # The library's default on a CPU is slower than its plain loop over experts, for one thread and experts this small.
    model.set_experts_implementation("eager")
    context = model.config.max_position_embeddings
    train, heldout = load_split()
    if args.max_files:
        heldout = heldout[: args.max_files]
    bits = bits_per_file(model, tokenizer, heldout, context, args.stride, args.batch)
    texts = [file.text for file in heldout]
    size_bytes = sum(file.size_bytes for file in heldout)
    gzip_each, gzip_joined = gzip_bits_per_byte(texts)
    own_gzip = [gzip_bits_per_byte([text])[0] * file.size_bytes for file, text in zip(heldout, texts, strict=True)]
    xz_bytes = len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    return {
        "python": sys.version.split()[0],
        "dtype": args.dtype,
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_files": len(train),
        "train_bytes": sum(file.size_bytes for file in train),
        "heldout_files": len(heldout),
        "heldout_bytes": size_bytes,
        "heldout_seen_line_share": seen_line_share(train, heldout),
        "bits_per_byte": {
            "model": sum(bits) / size_bytes,
            "gzip9_per_file": gzip_each,
            "gzip9_concatenated": gzip_joined,
            "xz9e_concatenated": 8 * xz_bytes / size_bytes,
        },
        "files_where_model_beats_gzip9": sum(mine < its for mine, its in zip(bits, own_gzip, strict=True)),
        "routing": routing_report(model, whole_windows(tokenizer, heldout, context, args.sequences)),
    }


def print_table(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name == "bits_per_byte":
            for which, bits in value.items():
                print(f"bits/byte {which:22} {bits:.3f}")
        elif name != "routing":
            print(f"{name:32} {value if not isinstance(value, float) else round(value, 4)}")
    routing = report["routing"]
    print(f"\nrouting of {routing['tokens']:,} held-out tokens\nlayer  entropy/log E  next-token overlap")
    for layer, (entropy, shared) in enumerate(
        zip(routing["usage"]["entropy_share"], routing["overlap"]["per_layer"], strict=True)
    ):
        print(f"{layer:5}  {entropy:13.3f}  {shared:18.3f}")
    overlaps = routing["overlap"]
    print(f"overlap: mean {overlaps['mean']:.3f}, random K/E {overlaps['random']:.3f}, ", end="")
    print(f"by popularity alone {overlaps['popularity_alone']:.3f}")
    bits = routing["bits_per_token"]
    print(f"bits/token {bits['own_experts']:.3f}, each token sent to the wrong experts {bits['wrong_experts']:.3f}")
    print(f"largest share of a layer's picks by one expert {routing['usage']['largest_share']:.3f}")
    for window, row in routing["srp"].items():
        ratio, shuffled = row["size_ratio"], row["shuffled"]
        print(f"SRP({window:>2}) {row['srp']:.3f} at size ratio {ratio:.2f}; tokens shuffled {shuffled:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "moert" / "data" / "demo"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="what the forward runs in")
    parser.add_argument("--stride", type=int, default=256, help="new tokens scored per window")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128, help="windows whose routing is recorded")
    parser.add_argument("--max-files", type=int, default=0, help="only so many held-out files (0: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="judge fresh random weights instead, as a baseline")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = evaluate(args.folder, args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
