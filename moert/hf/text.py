"""Prompts in, text out: a checkpoint's tokenizer, and generation that is watched token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.generation.streamers import TextStreamer
from transformers.utils import logging

from moert.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; an unset number is as the model's own generation configuration has it."""

    seed: int
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Generation:
    """What one `generate` made of one prompt, and when."""

    prompt_tokens: int
    token_ids: list[int]
    """The new tokens, without the prompt's."""
    text: str
    """They as text, without special tokens."""
    time_to_first_token_s: float
    decode_s: float
    """From the first new token to the last."""
    logits: torch.Tensor | None = field(default=None, repr=False)
    """[new tokens, vocabulary] fp32, if they were asked for."""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time after the first; None with fewer than two tokens."""
        n = len(self.token_ids) - 1
        return n / self.decode_s if n > 0 and self.decode_s > 0 else None


def hush(*, bars: bool) -> None:
    """Keep the hub's notes on each retry off standard error and, if `bars`, all progress bars of transformers too.

    For the rest of the process. What went wrong in the end is still raised.
    """
    hub_logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()


def read_settings(path_or_id: str, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's config.json; raises whatever transformers raises."""
    return PreTrainedConfig.get_config_dict(path_or_id, revision=revision)[0]


def load_tokenizer(path_or_id: str, revision: str | None = None) -> Any:
    """The checkpoint's tokenizer; raises whatever transformers raises."""
    return AutoTokenizer.from_pretrained(path_or_id, revision=revision)


def encode(tokenizer: Any, prompt: str, *, chat: bool | None = None) -> dict[str, torch.Tensor]:
    """The inputs of a forward over `prompt`: ids and mask, [1, T].

    Args:
        chat: put the prompt into the tokenizer's chat template as a user's message. None: if there is a template.

    Raises:
        ConfigError: a template was asked for and there is none, or the prompt has no tokens.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("this model's tokenizer has no chat template: leave out --chat")
    if has_template if chat is None else chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        why = "is its tokenizer.json missing?" if prompt else "give some text"
        raise ConfigError(f"this model's tokenizer makes no tokens of the prompt {prompt[:40]!r}; {why}")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


class _Watcher(TextStreamer):
    """Notes when tokens come, and passes text on as soon as it forms words."""

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None] | None, on_token: Callable[[], None] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._on_token = on_token
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(perf_counter())
            if self._on_token is not None:
                self._on_token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    repetition_penalty: float | None = None,
    keep_logits: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[], None] | None = None,
) -> Generation:
    """Continue one prompt on the calling thread; blocks until done.

    Args:
        inputs: as `encode` makes them.
        sampling: None takes the likeliest token each time.
        repetition_penalty: above 1 makes tokens that are there already less likely; None: as the model has it.
        keep_logits: return every step's logits; costs 4 bytes a token and vocabulary entry.
        on_text: called with each piece of text as it becomes certain.
        on_token: called for each new token.

    Raises:
        UnsupportedModelError: the model's class does not generate text.
    """
    if not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} does not generate text")
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling is not None:
        numbers = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        options = {"do_sample": True, **{name: value for name, value in numbers.items() if value is not None}}
        torch.manual_seed(sampling.seed)
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    watcher = _Watcher(tokenizer, on_text, on_token)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    began = perf_counter()
    output = model.generate(
        **inputs,
        **options,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id(model, tokenizer),
        streamer=watcher,
        output_logits=keep_logits,
        return_dict_in_generate=True,
    )
    prompt_tokens = inputs["input_ids"].shape[-1]
    ids = output.sequences[0, prompt_tokens:].tolist()
    return Generation(
        prompt_tokens=prompt_tokens,
        token_ids=ids,
        text=tokenizer.decode(ids, skip_special_tokens=True),
        time_to_first_token_s=watcher.times[0] - began,
        decode_s=watcher.times[-1] - watcher.times[0],
        logits=torch.cat(output.logits).float().cpu() if keep_logits else None,
    )


def pad_token_id(model: Any, tokenizer: Any) -> int:
    """Any id will do for a single prompt; without one, transformers warns before each run."""
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((candidate for candidate in candidates if candidate is not None), 0)
