"""Write a checkpoint of a real MoE architecture, at its real shape, with random weights.

    python bench/make_checkpoint.py olmoe-bench /data/olmoe-bench
    python bench/make_checkpoint.py qwen3-30b-a3b /data/qwen3-4-layers --layers 4

The folder is what a hub download would be: shards, index, configuration and a byte-level tokenizer. Names and shapes
come from transformers: the model is built on the meta device and its state dict goes through the library's own reverse
conversion. Weights are a function of seed and tensor name alone. The process takes about 0.5 GB for any model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from architectures import ARCHITECTURES, configuration
from byte_tokenizer import write_tokenizer
from random_weights import filler, recipe_for
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from shards import TensorSpec, new_folder, plan_shards, write_json, write_shards

from moert.config import format_bytes, parse_budget
from moert.errors import ConfigError, MoertError

DTYPES = {"bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16"), "fp32": ("float32", "F32")}


def tensors_of(config: dict[str, Any], dtype: str) -> dict[TensorSpec, int]:
    """All tensors of a checkpoint of `config` in hub form and layer order, each with its fan-in; allocates none.

    A matrix is [out, in]; stacked experts kept in one tensor are [E, in, out] where their module says `is_transposed`.

    Raises:
        ConfigError: the installed transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    torch_name, stored_name = DTYPES[dtype]
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        model_config = AutoConfig.for_model(config["model_type"], **fields)
    except ValueError as error:
        raise ConfigError(f"transformers cannot configure {config['model_type']}: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, torch_name))
    transposed = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if getattr(module, "is_transposed", False)
        for name, _ in module.named_parameters(recurse=False)
    }
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    specs: dict[TensorSpec, int] = {}
    for name, tensor in revert_weight_conversion(model, kept).items():
        shape = tuple(tensor.shape)
        specs[TensorSpec(name, shape, stored_name)] = shape[-2 if name in transposed else -1]
    return specs


def write_checkpoint(
    config: dict[str, Any], target: Path, *, dtype: str = "bf16", seed: int = 0, shard_bytes: int = 2 * 10**9
) -> int:
    """Write a checkpoint of `config` (a config.json) to the new folder `target`; returns the tensors' bytes.

    Blocks until all is on the disk; `target` appears only then.

    Raises:
        ConfigError: `target` is taken, or transformers does not know the architecture.
        CapacityError: the disk is too small.
    """
    import transformers

    fan_ins = tensors_of(config, dtype)
    total_bytes = sum(spec.nbytes for spec in fan_ins)
    stamp = {"torch_dtype": DTYPES[dtype][0], "transformers_version": transformers.__version__}
    generation: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with new_folder(target) as folder, Progress(*columns) as progress:
        task = progress.add_task(target.name, total=total_bytes)
        write_shards(
            folder,
            plan_shards(list(fan_ins), shard_bytes),
            lambda spec: filler(
                spec.name, spec.shape, spec.dtype, recipe_for(spec.name, spec.shape, fan_ins[spec]), seed
            ),
            lambda nbytes: progress.advance(task, nbytes),
        )
        write_tokenizer(folder, config)
        write_json(folder / "config.json", {**config, **stamp})
        write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    return total_bytes


def main(
    arch: Annotated[str, typer.Argument(help=f"One of {', '.join(ARCHITECTURES)}.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist, or be empty.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Layers instead of the published number.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts a layer.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size.")] = None,
    expert_width: Annotated[int | None, typer.Option(min=1, help="Width of one expert.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Any other field of config.json.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other weights.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    shard_bytes: Annotated[str, typer.Option(help="The most one file holds.")] = "2GB",
) -> None:
    """Write a checkpoint of a real MoE architecture with random weights."""
    try:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        most_bytes = parse_budget(shard_bytes, "shard-bytes").nbytes
        if most_bytes is None:
            raise ConfigError(f"shard-bytes={shard_bytes!r} must be a size")
        overrides: dict[str, Any] = {}
        for pair in override or []:
            key, found, value = pair.partition("=")
            if not found:
                raise ConfigError(f"--set {pair!r} must be KEY=JSON, such as vocab_size=512")
            overrides[key] = json.loads(value)
        config = configuration(
            arch, layers=layers, experts=experts, hidden=hidden, expert_width=expert_width, overrides=overrides
        )
        written_bytes = write_checkpoint(config, out, dtype=dtype, seed=seed, shard_bytes=most_bytes)
    except (MoertError, json.JSONDecodeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out}: {format_bytes(written_bytes)} of weights")


if __name__ == "__main__":
    typer.run(main)
