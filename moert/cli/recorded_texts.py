"""Running a model over a file of texts, and keeping what predictors are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moert.cli.opening import open_tokenizer, opened
from moert.cli.options import LoadOptions, resolve_model
from moert.cli.output import bar
from moert.cli.trace_record import encode_prompt, read_prompts
from moert.errors import ConfigError

TRACE_FILE, HIDDEN_FILE = "trace.safetensors", "hidden.safetensors"


def record_texts(
    folder: Path,
    model: str,
    prompts: Path,
    max_new_tokens: int,
    max_tokens: int | None,
    options: LoadOptions,
    *,
    with_hidden: bool,
) -> None:
    """Run the texts in a file one after another, and write their routing and, `with_hidden`, what the blocks are given.

    Args:
        folder: gets `TRACE_FILE` and `HIDDEN_FILE`, whole or not at all.
        max_new_tokens: that are added to each text; 0: none, each is run in one forward pass.
        max_tokens: of a text, its first ones.

    Raises:
        ConfigError: no texts, or a model that does not generate and should.
        MoertError: what opening, running or recording the model raises.
    """
    entries = read_prompts(prompts)
    name = resolve_model(model)
    tokenizer = open_tokenizer(name, options)
    texts = [encode_prompt(tokenizer, entry, teacher_forced=not max_new_tokens)[:max_tokens] for entry in entries]
    from moert.hf.recorded_hidden import record_hidden
    from moert.hf.recording import record
    from moert.trace.file import TraceFile
    from moert.training.examples import trace_hash
    from moert.training.hidden import HiddenWriter

    with opened(name, options) as loaded, ExitStack() as stack:
        if max_new_tokens and not loaded.model.can_generate():
            raise ConfigError(f"{type(loaded.model).__name__} does not generate text; leave --max-new-tokens out")
        states = stack.enter_context(record_hidden(loaded.model)) if with_hidden else None
        writer = stack.enter_context(HiddenWriter(folder / HIDDEN_FILE)) if with_hidden else None
        progress = stack.enter_context(bar("recording", len(texts)))
        with record(loaded.model, folder / TRACE_FILE, scores=False, weights=False) as (_, recording):
            for entry, text in zip(entries, texts, strict=True):
                recording.name([entry.name])
                _run(loaded.model, text, max_new_tokens)
                if states is not None and writer is not None:
                    writer.add(states.take())
                progress.advance()
        if writer is not None:
            with TraceFile(folder / TRACE_FILE) as trace:
                writer.close(trace_hash(trace))


def _run(model: Any, text: Sequence[int], max_new_tokens: int) -> None:
    import torch

    ids = torch.tensor([text], device=model.device)
    with torch.no_grad():
        if not max_new_tokens:
            model(input_ids=ids, use_cache=False)
            return
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            max_new_tokens=max_new_tokens,
        )
