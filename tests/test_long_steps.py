"""Steps of many tokens: what predictors are shown of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moert
from moert.hf.model import runtime_of
from moert.runtime.look_ahead import LookAhead
from moert.runtime.step import SHOWN_TOKENS


@pytest.mark.parametrize("tokens", [SHOWN_TOKENS - 6, SHOWN_TOKENS + 50])
def test_predictors_see_the_last_tokens_of_a_long_step(
    tokens: int, tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[torch.Tensor]] = {"step": [], "enter": []}
    for name, seen in shown.items():
        own = getattr(LookAhead, name)

        def noting(self: Any, layer: int, hidden: torch.Tensor, own: Any = own, seen: list[Any] = seen) -> None:
            seen.append(hidden)
            own(self, layer, hidden)

        monkeypatch.setattr(LookAhead, name, noting)
    ids = torch.arange(tokens).remainder(60)[None] + 3
    with moert.load(tiny_olmoe, host_memory="40%", predictor="gate_ahead_corrected") as model, torch.no_grad():
        inputs: list[torch.Tensor] = []
        runtime = runtime_of(model)
        run = runtime.run
        monkeypatch.setattr(runtime, "run", lambda *args: (inputs.append(args[2]), run(*args))[1])
        model(ids)
    few = min(tokens, SHOWN_TOKENS)
    assert [len(hidden) for hidden in shown["step"]] == [few] * len(inputs)
    assert all(
        torch.equal(seen, whole.reshape(tokens, -1)[-few:]) for seen, whole in zip(shown["step"], inputs, strict=True)
    )
    assert {len(hidden) for hidden in shown["enter"]} <= {few}
    assert shown["enter"]
