"""Convert an OLMoE checkpoint to a bf16 GGUF file, so that llama.cpp can run the very same weights.

    python bench/make_gguf.py /data/olmoe-bench /data/olmoe-bench.gguf

Needs numpy and the package `gguf`, nothing of this project: keep it in an environment of its own, beside llama_cpp.
One tensor is in memory at a time (all experts' gates of a layer are one tensor).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import numpy.typing as npt

EXPERT = re.compile(r"(?P<before>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<after>\w+)\.weight")
BF16 = gguf.GGMLQuantizationType.BF16


def read_tensors(folder: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """Every tensor of a bf16 checkpoint as mapped bit patterns, by name."""
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data_start = file.tell()
        header.pop("__metadata__", None)
        mapped = np.memmap(path, mode="r")
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; only bf16 checkpoints can be converted")
            first, last = (data_start + offset for offset in entry["data_offsets"])
            tensors[name] = mapped[first:last].view(np.uint16).reshape(entry["shape"])
    return tensors


def gather(names: list[str], layers: int) -> dict[str, list[str]]:
    """GGUF names with the checkpoint's tensors that make them up: one, or one an expert in the experts' order."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, layers)
    parts: dict[str, dict[int, str]] = {}
    for name in names:
        match = EXPERT.fullmatch(name)
        whole, place = (f"{match['before']}.{match['after']}", int(match["expert"])) if match else (name, 0)
        target = mapping.get_name(whole, try_suffixes=(".weight",))
        if target is None:
            raise SystemExit(f"GGUF has no place for {name} in an OLMoE model")
        target = target if target.endswith(".weight") else f"{target}.weight"
        parts.setdefault(target, {})[place] = name
    return {target: [found[place] for place in sorted(found)] for target, found in parts.items()}


def is_float32(name: str) -> bool:
    """llama.cpp keeps norms and routers in float32."""
    return "norm" in name or "ffn_gate_inp" in name


def describe(writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Write the model's hyperparameters and its tokens."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    place_of = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    names = {place: name for name, place in place_of.items()}
    kinds = [
        gguf.TokenType.CONTROL if place in special else gguf.TokenType.NORMAL for place in range(config["vocab_size"])
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([names.get(place, f"<unused{place}>") for place in range(config["vocab_size"])])
    writer.add_token_types(kinds)
    # llama.cpp insists on some merge; the two bytes of this one never make a token of ours.
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]] or ["Ā ā"])
    if config.get("eos_token_id") is not None:
        writer.add_eos_token_id(config["eos_token_id"])


def main() -> None:
    """Convert one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    config = json.loads((options.checkpoint / "config.json").read_text())
    if config["model_type"] != "olmoe":
        raise SystemExit(f"{options.checkpoint} is a {config['model_type']} model; only olmoe can be converted")
    tensors = read_tensors(options.checkpoint)
    made_of = gather(list(tensors), config["num_hidden_layers"])

    partial = options.out.with_name(f".{options.out.name}.partial")
    writer = gguf.GGUFWriter(partial, "olmoe")
    describe(writer, config, json.loads((options.checkpoint / "tokenizer.json").read_text()))
    for target, names in made_of.items():
        shape = (*([len(names)] if "_exps." in target else []), *tensors[names[0]].shape)
        elements = int(np.prod(shape))
        if is_float32(target):
            writer.add_tensor_info(target, shape, np.dtype(np.float32), 4 * elements)
        else:
            writer.add_tensor_info(target, shape, np.dtype(np.uint16), 2 * elements, raw_dtype=BF16)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, names in made_of.items():
            bits = np.stack([tensors[name] for name in names])
            writer.write_tensor_data((bits.astype(np.uint32) << 16).view(np.float32) if is_float32(target) else bits)
        writer.close()
        partial.rename(options.out)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
