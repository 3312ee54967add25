"""Tiny configs of every family, made by shrinking whatever fields its config class has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .names import model_class
from .sizes import KEPT_WHEN_NONE, LAYERS, NEEDED_PARTS, OF_CONFIG_CLASS, OF_FAMILY, TEXT, VISION, VOCAB

_SENSE_WORDS = ("vision", "audio", "sam", "encoder", "code2wav", "siglip", "pixtral")
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(family: str) -> PreTrainedConfig:
    """A fresh config: hidden size 64, 8 experts, 2 a token, 2 to 4 layers, vocabulary of 128."""
    config_class = model_class(family).config_class
    assert config_class is not None
    config = config_class(**_fields(config_class, family))
    for part in all_configs(config):
        part._experts_implementation = "eager"
    if family.startswith("qwen3_omni_moe"):
        # Generation reads it from the thinker's config, where hub checkpoints have it and a fresh one does not.
        getattr(config, "thinker_config", config).vision_start_token_id = VOCAB - 20
    return config


def all_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and its sub-configs, depth first."""
    yield config
    for name in config.sub_configs or {}:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from all_configs(part)


def _fields(config_class: type[PreTrainedConfig], family: str) -> dict[str, Any]:
    own = OF_CONFIG_CLASS.get(config_class.__name__, {})
    if not config_class.sub_configs:
        if any(word in config_class.__name__.lower() for word in _SENSE_WORDS):
            return _shrunk(config_class, VISION, own)
        return _shrunk_text(config_class, {**OF_FAMILY.get(family.partition("+")[0], {}), **own})
    fields: dict[str, Any] = {}
    default: PreTrainedConfig | None = None
    needed = {name: CONFIG_MAPPING[kind] for name, kind in NEEDED_PARTS.get(config_class.__name__, {}).items()}
    for name, part_class in config_class.sub_configs.items():
        if part_class.__name__ == "AutoConfig":
            default = default or config_class()
            if getattr(default, name) is None and name not in needed:
                continue
            part_class = needed.get(name) or type(getattr(default, name))
        part = _fields(part_class, family)
        model_type = getattr(part_class, "model_type", None)
        fields[name] = {**part, "model_type": model_type} if model_type else part
    return {**fields, **_shrunk(config_class, {}, own)}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        return dict(config_class().to_dict())
    except Exception:  # some configs cannot be built from their defaults; their signature still tells the fields
        parameters = inspect.signature(config_class.__init__).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _shrunk(config_class: type[PreTrainedConfig], table: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    defaults = _defaults(config_class)
    return {**_from_table(defaults, table, own), **_small_token_ids(defaults), **own}


def _shrunk_text(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    defaults = _defaults(config_class)
    fields = _from_table(defaults, TEXT, own)
    kv_heads = defaults.get("num_key_value_heads")
    if kv_heads is not None:
        alike = kv_heads == defaults.get("num_attention_heads")
        fields["num_key_value_heads"] = 4 if alike else min(kv_heads, 2)
    rope_dim = defaults.get("qk_rope_head_dim")
    if rope_dim and defaults.get("head_dim") == rope_dim:
        fields["head_dim"] = TEXT["qk_rope_head_dim"]
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if name in defaults:
            fields[name] = min(1, defaults[name] or 0)
    fields.update(_per_layer_lists(defaults))
    return {**fields, **_small_token_ids(defaults), **own}


def _from_table(defaults: dict[str, Any], table: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    fields = {}
    for name, value in table.items():
        if name not in defaults or (defaults[name] is None and name in KEPT_WHEN_NONE):
            continue
        per_layer = isinstance(defaults[name], (list, tuple)) and not isinstance(value, (list, tuple))
        if not per_layer or name in own:
            fields[name] = value
    return fields


def _per_layer_lists(defaults: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer cut to as many layers as it takes to keep every kind of layer."""
    kinds = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, (list, tuple))
        and value
        and all(isinstance(item, str) for item in value)
        and ("types" in name or "block_type" in name)
        and not name.startswith("mtp")
    }
    layers = max([LAYERS, *(len(set(value)) for value in kinds.values())])
    fields: dict[str, Any] = {"num_hidden_layers": layers} if "num_hidden_layers" in defaults else {}
    for name, value in defaults.items():
        if name in TEXT or not isinstance(value, (list, tuple)) or not value:
            continue
        if name in kinds:
            distinct = list(dict.fromkeys(value))
            fields[name] = distinct + distinct[-1:] * (layers - len(distinct))
        elif len(value) == defaults.get("num_hidden_layers"):
            fields[name] = [4] * layers if name.startswith("num_attention_heads") else list(value[:layers])
    return fields


def _small_token_ids(defaults: dict[str, Any]) -> dict[str, Any]:
    """Special tokens moved into the tiny vocabulary, each with an id of its own."""
    names = sorted(
        name
        for name, value in defaults.items()
        if isinstance(value, (int, list))
        and (name.endswith(("_token_id", "_token_index")) or (name.endswith("_id") and "token" in name))
    )
    fields: dict[str, Any] = {}
    for rank, name in enumerate(names):
        value = defaults[name]
        if isinstance(value, list):
            fields[name] = [1]
        elif not isinstance(value, bool) and value >= VOCAB:
            fields[name] = _SPECIAL_TOKENS.get(name, VOCAB - 2 - rank)
    return fields
