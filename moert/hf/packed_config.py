"""What transformers reads from a pack's config.json, so that its own `from_pretrained` can open packs."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from moert import config


@register_quantization_config("moert")
class OffloadConfig(config.OffloadConfig, QuantizationConfigMixin):  # type: ignore[misc]  # the stub-less base is Any
    """The options, as a pack has them, and which pack that is.

    It has the name of moert's own configuration because transformers compares the names of the two when a pack is
    opened with options of the caller's.
    """

    source: str | None = None
    """The fingerprint of the checkpoint that the pack was made from."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**{name: config_dict[name] for name in cls.option_names() if name in config_dict})
        made.source = config_dict.get("source")
        return (made, kwargs) if return_unused_kwargs else made

    # transformers puts the caller's options into an object that it has made itself.
    __setattr__ = object.__setattr__


# Without this the caller's options would be ignored, with a warning.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (
    *getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ()),
    config.OffloadConfig,
)
