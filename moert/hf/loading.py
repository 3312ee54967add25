"""`moert.load`: a HuggingFace model from a checkpoint, its experts in moert's tiers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.errors import ConfigError, CorruptFileError, MoertError, UnsupportedModelError
from moert.hf import quantizer
from moert.runtime.preload import Progress
from moert.tiers.safetensors_file import read_entries, read_index

_REFUSED = {
    "gguf_file": "GGUF experts are packed in blocks that moert cannot read: use its safetensors checkpoint",
    "use_kernels": "it replaces the MoE block's forward and goes round its experts module",
    "kernel_config": "it replaces the MoE block's forward and goes round its experts module",
    "tp_plan": "experts cannot be offloaded and sharded at once",
    "tp_size": "experts cannot be offloaded and sharded at once",
    "distributed_config": "experts cannot be offloaded and sharded at once",
    "device_mesh": "experts cannot be offloaded and sharded at once",
    "state_dict": "moert reads experts from files; use transformers and moert.patch",
    "quantization_config": "moert.load makes its own; pass moert's options as they are, or use from_pretrained",
}
_CONFIG_KWARGS = (
    "revision",
    "cache_dir",
    "token",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
    "force_download",
)


def load(
    path_or_id: str | os.PathLike[str],
    config: OffloadConfig,
    progress: Progress | None,
    device: Device | Sequence[Device] | None = None,
    device_options: Mapping[str, Any] | None = None,
    **hf_kwargs: Any,
) -> Any:
    """See `moert.load`; `device` and `device_options` are as for `moert.hf.patching.patch`.

    If anything fails before the experts come to `device`, it is still the caller's to close.
    """
    for name, why in _REFUSED.items():
        if hf_kwargs.get(name):
            raise UnsupportedModelError(f"{name}={hf_kwargs[name]!r} cannot be used with moert.load: {why}")
    name = os.fspath(path_or_id)
    if os.path.isdir(name):
        check_folder(Path(name) / hf_kwargs.get("subfolder", ""))
    elif os.path.exists(name) or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name!r} is not a folder; give the folder of a checkpoint, or a model id of the hub")
    known = {key: hf_kwargs[key] for key in _CONFIG_KWARGS if key in hf_kwargs}
    given = hf_kwargs.get("config")
    settings = (
        given.to_dict() if isinstance(given, PreTrainedConfig) else PreTrainedConfig.get_config_dict(name, **known)[0]
    )
    check_not_packed(settings)
    if not is_pack_config(settings):
        hf_kwargs["quantization_config"] = config
    handed = None if device is None else quantizer.Handed(device, dict(device_options or {}))
    with _told_to_quantizer(hf_kwargs.get("key_mapping"), progress, config, handed):
        try:
            loaded = model_class(settings).from_pretrained(name, **hf_kwargs)
        except RuntimeError as error:
            if isinstance(error, MoertError) or "ignore_mismatched_sizes" not in str(error):
                raise
            raise CorruptFileError(
                f"{name}: tensors of the checkpoint do not have the shapes that its config.json asks for; transformers "
                f"says: {error}"
            ) from error
    return loaded


@contextlib.contextmanager
def _told_to_quantizer(
    key_mapping: dict[str, str] | None,
    progress: Progress | None,
    config: OffloadConfig,
    device: quantizer.Handed | None,
) -> Iterator[None]:
    tokens = quantizer.key_mapping.set(key_mapping), quantizer.progress.set(progress), quantizer.options.set(config)
    handed = quantizer.handed.set(device)
    try:
        yield
    finally:
        quantizer.key_mapping.reset(tokens[0])
        quantizer.progress.reset(tokens[1])
        quantizer.options.reset(tokens[2])
        quantizer.handed.reset(handed)


def model_class(settings: dict[str, Any]) -> Any:
    """The class that a checkpoint was saved from, or the automatic class for causal language models.

    Args:
        settings: the checkpoint's config.json.
    """
    for architecture in settings.get("architectures") or ():
        found = getattr(transformers, architecture, None)
        if found is not None and not settings.get("auto_map"):
            return found
    return AutoModelForCausalLM


def is_pack_config(settings: dict[str, Any]) -> bool:
    """Whether a config.json is that of a pack."""
    found = settings.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == OffloadConfig.quant_method


def check_not_packed(settings: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for a checkpoint whose weights are quantised already, by others than moert."""
    if is_pack_config(settings):
        return
    inner = [value for value in settings.values() if isinstance(value, dict)]
    packed = next((part["quantization_config"] for part in (settings, *inner) if part.get("quantization_config")), None)
    if packed is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", packed)
        raise UnsupportedModelError(
            f"this {settings.get('model_type')} checkpoint is quantised already ({method}); this version of moert "
            "reads bf16, fp16 and fp32 experts only: use the unquantised checkpoint"
        )


def check_folder(folder: Path) -> None:
    """Check a checkpoint folder before anything is loaded: all shards there, all headers sound.

    Raises:
        ConfigError: no checkpoint in the folder.
        CorruptFileError, TransferError: a shard is missing, truncated or malformed.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a HuggingFace checkpoint")
    shards = read_index(folder)
    if shards is None and (folder / "model.safetensors").is_file():
        shards = [str(folder / "model.safetensors")]
    if shards is None:
        others = sorted(path.name for path in folder.glob("*.bin"))
        if others:
            raise UnsupportedModelError(
                f"{folder} holds {others[0]} and no safetensors; convert it with save_pretrained, or load it with "
                "transformers and use moert.patch"
            )
        if not any(folder.glob("*.safetensors")):
            raise CorruptFileError(f"{folder} has a config.json but no weights; finish the download")
        return
    for shard in shards:
        read_entries(shard)
