"""A governor over `generate` with drafts: prompt lookup, and assistant models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from moert.errors import ConfigError
from moert.speculation.governor import LENGTHS, Governor

_MAKER = "_get_candidate_generator"
_DIALS = ("num_output_tokens", "num_assistant_tokens")
"""What generators of candidates call the drafts that they look for: prompt lookup, and assistant models."""


@contextlib.contextmanager
def govern(
    model: Any,
    governor: Governor | None = None,
    *,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[Governor]:
    """Within it, `model.generate` with `prompt_lookup_num_tokens` or `assistant_model` drafts as much as pays.

        with govern(model) as governor:
            model.generate(**inputs, prompt_lookup_num_tokens=7)
        print(governor.length, governor.promises())

    What the caller asks for is the most that is drafted, and an assistant model's own schedule is not followed. Tokens
    are those of `generate` with drafts. Other ways to draft, and `generate` without drafts, are left alone. Keep the
    governor and give it again, and it goes on with what it has learned.

    Args:
        model: a model of transformers, on moert or not; one thread at a time.
        governor: a fresh one by default, for the experts that the model's configuration names.
        clock: seconds.

    Raises:
        ConfigError: `model` has no place to follow `generate` from, or is governed already.
    """
    make = getattr(model, _MAKER, None)
    if not callable(make):
        raise ConfigError(
            f"{type(model).__name__} has no {_MAKER}, by which transformers makes drafts; set "
            "prompt_lookup_num_tokens from Governor.choose between calls of generate instead"
        )
    if _MAKER in vars(model):
        raise ConfigError(f"{type(model).__name__} is governed already; leave that `with` first")
    chosen = governor if governor is not None else Governor(*_experts_of(model))

    def make_governed(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        dial = next((name for name in _DIALS if isinstance(getattr(generator, name, None), int)), None)
        if dial is None or getattr(generator, "requires_model_outputs", False):
            return generator
        return _Governed(generator, dial, chosen, clock)

    vars(model)[_MAKER] = make_governed
    try:
        yield chosen
    finally:
        vars(model).pop(_MAKER, None)


class _Governed:
    """A generator of candidates that is asked for as many as the governor chooses."""

    requires_model_outputs = False

    def __init__(
        self,
        generator: Any,
        dial: str,
        governor: Governor,
        clock: Callable[[], float],
    ) -> None:
        self._generator = generator
        self._dial = dial
        self._most = 1 + getattr(generator, dial)
        self._governor = governor
        self._clock = clock
        self._is_first = True
        self._begun = 0.0
        self._drafted = 0
        self._known = 0
        """Tokens up to the first draft that was wrong."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The text so far with drafts after it [1, S + n - 1], and the drafts' logits where they have any."""
        self._begun = self._clock()
        # The first step runs the prompt, which an assistant model has to be given as well.
        length = 2 if self._is_first else self._governor.choose(min(self._most, LENGTHS[-1]))
        found = input_ids, None
        if length > 1:
            setattr(self._generator, self._dial, length - 1)
            found = self._generator.get_candidates(input_ids, **kwargs)
        else:
            self._take_back()
        self._drafted = found[0].shape[-1] - input_ids.shape[-1]
        return found

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        """The step has run: so many drafts were right."""
        accepted = min(int(num_matches), self._drafted)
        self._known = input_ids.shape[-1] - 1
        if not self._is_first:
            self._governor.note(self._drafted, accepted, self._clock() - self._begun)
        self._is_first = False
        if self._drafted:
            self._generator.update_candidate_strategy(input_ids, scores, num_matches)

    def _take_back(self) -> None:
        """Remove wrong drafts from an assistant's cache, which it does itself only if it is asked for the next ones."""
        cache = getattr(self._generator, "assistant_kwargs", {}).get("past_key_values")
        if cache is not None and (wrong := cache.get_seq_length() - self._known) > 0:
            cache.crop(-wrong)


def _experts_of(model: Any) -> tuple[int, int]:
    """E and picks per token as the configuration names them; 0 and 0 where it does not."""
    config = getattr(model, "config", None)
    read = getattr(config, "get_text_config", None)
    config = read() if callable(read) else config
    sizes = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    size = next((size for size in sizes if isinstance(size, int)), 0)
    picks = getattr(config, "num_experts_per_tok", None)
    return (size, picks) if isinstance(picks, int) and 0 < picks <= size else (0, 0)
