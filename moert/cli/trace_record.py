"""`moert trace record`: run a model over prompts, and write which experts each token chooses."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from moert.cli.opening import open_tokenizer, opened
from moert.cli.options import Json, LoadOptions, Model, resolve_model, with_load_options
from moert.cli.output import bar, facts, percent, print_json, rate, stdout
from moert.cli.traces import check_output
from moert.config import format_bytes
from moert.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One entry of a file of prompts."""

    name: str
    text: str | None
    messages: list[dict[str, Any]] | None = None
    """A conversation, in place of a text."""


@with_load_options()
def record(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='Text with a prompt a line, or JSON lines with "prompt", "text" or "messages" (and "id").',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="Trace to write, a .safetensors file.", show_default=False),
    ],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that are added to each prompt.")
    ] = 128,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="Add nothing: run each text as it is, in one forward pass.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Run so many prompts at once.")] = 1,
    scores: Annotated[
        bool, typer.Option("--scores", help="Write the router's probabilities for all experts too; the file is large.")
    ] = False,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Write which experts each token chooses while MODEL continues the prompts, the likeliest token each time."""
    check_output(out, "--out", ".safetensors")
    entries = read_prompts(prompts)
    name = resolve_model(model)
    tokenizer = open_tokenizer(name, options)
    texts = [encode_prompt(tokenizer, entry, teacher_forced=teacher_forced) for entry in entries]
    from moert.hf.recording import record as recorded
    from moert.hf.text import pad_token_id

    began = perf_counter()
    with opened(name, options) as loaded:
        if not teacher_forced and not loaded.model.can_generate():
            raise ConfigError(f"{type(loaded.model).__name__} does not generate text; use --teacher-forced")
        with (
            recorded(loaded.model, out, scores=scores, weights=True) as (_, recording),
            bar("recording", len(entries)) as progress,
        ):
            began = perf_counter()
            pad = pad_token_id(loaded.model, tokenizer)
            sequences = recording.sequences
            sequences.end = replace(sequences.end, pad_id=pad)
            for first in range(0, len(entries), batch):
                last = min(first + batch, len(entries))
                recording.name([entry.name for entry in entries[first:last]])
                _run(loaded.model, texts[first:last], pad, None if teacher_forced else max_new_tokens)
                recording.finish()  # in the order of the prompts, whenever the caches are let go of
                progress.update(last, len(entries))
        document = _document(model, out, perf_counter() - began, loaded.model)
    if json:
        print_json(document)
    else:
        _print(document)
    return 0


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file; those without a name of their own are named by their line.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or a line that is none.
    """
    path = path.expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts: {str(path)!r} is no text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"--prompts: cannot read {str(path)!r}: {error.strerror}") from None
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ConfigError(f"--prompts: {str(path)!r} has no line with text")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return [_entry(path, number, line) for number, line in found]
    return [Prompt(str(number), line) for number, line in found]


def _entry(path: Path, number: int, line: str) -> Prompt:
    where = f"--prompts: {str(path)!r}, line {number}"
    try:
        entry = json_module.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not sound JSON ({error}); JSON lines have one object on each") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is no object with 'prompt', 'text' or 'messages'")
    name = str(entry.get("id", number))
    messages = entry.get("messages")
    if messages is not None:
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages)
        ):
            raise ConfigError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
        return Prompt(name, None, messages)
    text = next((entry[key] for key in ("prompt", "text") if key in entry), None)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where} has no text under 'prompt' or 'text', and no 'messages'")
    return Prompt(name, text)


def encode_prompt(tokenizer: Any, prompt: Prompt, *, teacher_forced: bool) -> list[int]:
    """The prompt's token ids, ready to be answered; with `teacher_forced` the whole text, which nobody answers."""
    if prompt.messages is None:
        ids = tokenizer(prompt.text)["input_ids"]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"prompt {prompt.name!r} has messages, and this model's tokenizer has no chat template")
        made = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=not teacher_forced, return_dict=True
        )
        ids = made["input_ids"]
    if not ids:
        raise ConfigError(f"this model's tokenizer makes no tokens of prompt {prompt.name!r}")
    return list(ids)


def _run(model: Any, texts: Sequence[Sequence[int]], pad: int, max_new_tokens: int | None) -> None:
    """One batch: generation, padded on the left, or one forward pass, padded on the right."""
    import torch

    width = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        filler = [pad] * (width - len(text))
        zeros, ones = [0] * len(filler), [1] * len(text)
        rows.append([*text, *filler] if max_new_tokens is None else [*filler, *text])
        masks.append([*ones, *zeros] if max_new_tokens is None else [*zeros, *ones])
    inputs = {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(masks, device=model.device),
    }
    if max_new_tokens is None:
        with torch.no_grad():
            model(**inputs, use_cache=False)
        return
    model.generate(
        **inputs,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
    )


def _document(model: str, out: Path, run_s: float, loaded: Any) -> dict[str, Any]:
    import moert
    from moert.trace.file import TraceFile
    from moert.trace.sequence import Phase

    stats = moert.stats(loaded)
    with TraceFile(out) as trace:
        summaries = [trace.summary(index) for index in range(len(trace))]
        header = trace.header
        by_phase = {phase: sum(summary.tokens_by_phase[phase] for summary in summaries) for phase in Phase}
        return {
            "model": model,
            "trace": str(out),
            "bytes": trace.nbytes,
            "sequences": len(summaries),
            "tokens": trace.n_tokens,
            "prefill_tokens": by_phase[Phase.PREFILL],
            "decode_tokens": by_phase[Phase.DECODE],
            "padding_tokens": by_phase[Phase.PADDING],
            "num_layers": len(header.layers),
            "num_experts": max(layer.num_experts for layer in header.layers),
            "top_k": header.top_k,
            "sampled": header.sampled,
            "scores": any(summary.has_scores for summary in summaries),
            "run_s": run_s,
            "tokens_per_s": trace.n_tokens / run_s if run_s > 0 else None,
            "hit_rate": stats.hit_rate,
        }


def _print(document: dict[str, Any]) -> None:
    padding = f", {document['padding_tokens']:,} of padding" if document["padding_tokens"] else ""
    stdout().print(
        facts(
            [
                ("trace", f"{document['trace']} ({format_bytes(document['bytes'])})"),
                (
                    "layers",
                    f"{document['num_layers']} of {document['num_experts']} experts, {document['top_k']} a token",
                ),
                ("sequences", f"{document['sequences']:,}"),
                (
                    "tokens",
                    f"{document['prefill_tokens']:,} of prompts, {document['decode_tokens']:,} generated{padding}",
                ),
                ("speed", rate(document["tokens_per_s"])),
                ("hit rate", percent(document["hit_rate"])),
            ]
        )
    )
