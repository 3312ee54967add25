"""`moert verify`: the same prompt offloaded and resident, token by token."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moert.cli.comparison import (
    EXACT,
    FLOAT32,
    INT8_ACTIVATIONS,
    PRODUCT_ULPS,
    SIXTEEN_BIT,
    Reference,
    Tolerance,
    Trace,
    compare,
)
from moert.cli.opening import open_tokenizer, opened, opened_plain
from moert.cli.options import Json, LoadOptions, Model, resolve_model, with_load_options
from moert.cli.output import bar, facts, percent, print_json, stdout
from moert.config import format_bytes
from moert.errors import CapacityError, ConfigError
from moert.tiers.memory import available_bytes

PROMPT = "The first rule of caching is that what was used last will be used again, because"
REFERENCES = ("transformers", "resident")

# transformers converts a layer's experts at a time while it loads, beside the weights themselves.
_LOADING_SHARE = 1.1
_HEAD_ROOM_BYTES = 512 << 20


@with_load_options()
def verify(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to continue.", show_default=False)] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to compare.")] = 32,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(REFERENCES),
            help="What to compare with: transformers alone, or moert with every expert in memory. "
            "Default: transformers, if the whole model fits in memory and is not quantised.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Check that offloading changes nothing: greedy tokens, logits and routing against a resident model.

    Exit code 1 if they differ.
    """
    if reference is not None and reference not in REFERENCES:
        raise ConfigError(f"--reference={reference!r} must be one of {', '.join(REFERENCES)}")
    name = resolve_model(model)
    tokenizer = open_tokenizer(name, options)
    from moert.hf.text import encode

    inputs = encode(tokenizer, prompt, chat=False)

    with opened(name, options) as offloaded:
        chosen, other = _choose_reference(offloaded.model, reference, options)
        mine = _trace(offloaded.model, tokenizer, inputs, max_new_tokens, "offloaded")
        document = _describe(name, prompt, offloaded.model, options)
    del offloaded  # its dense weights: the two never stand side by side
    theirs = _run_reference(name, chosen, other, tokenizer, inputs, max_new_tokens)
    document.update(compare(mine, theirs, chosen, tokenizer))
    if json:
        print_json(document)
    else:
        _print(document, stdout())
    return 0 if document["passed"] else 1


def _describe(name: str, prompt: str, model: Any, options: LoadOptions) -> dict[str, Any]:
    import moert

    stats = moert.stats(model).as_dict()
    kept = ("hits", "misses", "hit_rate", "bytes_read", "resident_bytes", "expert_bytes")
    return {
        "model": name,
        "prompt": prompt,
        "dtype": str(model.dtype).removeprefix("torch."),
        "policy": options.offload.policy,
        **{key: stats[key] for key in kept},
    }


def _choose_reference(model: Any, asked: str | None, options: LoadOptions) -> tuple[Reference, LoadOptions]:
    """The reference, and the options to open it with, before anything more is loaded."""
    import moert

    quantised = _quantised_as(model)
    decoded = None if quantised is None else _decoded_tolerance(quantised, model)
    resident = replace(options, offload=replace(options.offload, host_memory="100%"))
    # With a GPU a step's share of the CPU is another one at each budget, and added up in another order.
    is_on_cpu = options.offload.device_memory is None
    same = EXACT if is_on_cpu else _decoded_tolerance(quantised or "plain", model)
    all_resident = Reference("resident", "moert with every expert in memory", same, decoded)
    if asked == "resident":
        return all_resident, resident
    if asked == "transformers" and quantised is not None:
        raise ConfigError(
            f"--reference transformers: it cannot compute from {quantised} weights; leave --reference out to hold the "
            "experts against their decoded weights, or verify the model that was packed"
        )
    stats = moert.stats(model)
    dense_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    needed = int((dense_bytes + stats.expert_bytes) * _LOADING_SHARE) + _HEAD_ROOM_BYTES
    room = available_bytes() + dense_bytes + stats.slot_bytes  # the offloaded model is closed by then
    if needed <= room:
        return (_plain_reference(model), options) if quantised is None else (all_resident, resident)
    who = "transformers" if quantised is None else "moert"
    lack = f"{who} needs {format_bytes(needed)} for the whole model, {format_bytes(room)} are available"
    if asked == "transformers":
        raise CapacityError(f"{lack}; use --reference resident, or leave --reference out")
    share = _other_share(model)
    warnings.warn(f"{lack}; comparing with moert at another budget instead", RuntimeWarning, stacklevel=2)
    other = replace(options, offload=replace(options.offload, host_memory=f"{share}%"))
    return Reference("moert", f"moert with {share} % of the experts ({lack})", same, decoded), other


def _quantised_as(model: Any) -> str | None:
    """The format of a quantised pack's experts."""
    from moert.hf.model import runtime_of

    storages = [layer.spec.storage for layer in runtime_of(model).layers]
    names = [storage.choice.name for storage in storages if storage is not None and not storage.choice.is_plain]
    return names[0] if names else None


def _decoded_tolerance(stored_as: str, model: Any) -> Tolerance:
    if stored_as in ("int8", "int4", "mxfp4"):
        return INT8_ACTIVATIONS
    return FLOAT32 if str(model.dtype) == "torch.float32" else SIXTEEN_BIT


def _plain_reference(model: Any) -> Reference:
    if str(model.dtype) == "torch.float32":
        return Reference("transformers", "transformers, its eager experts", FLOAT32)
    return Reference("transformers", "transformers, its eager experts, rounding where moert does", SIXTEEN_BIT)


def _other_share(model: Any) -> int:
    """A share of the experts, in percent, that one token can run with and that differs from the one in use."""
    from moert.hf.model import runtime_of

    layers = runtime_of(model).layers
    least = max(-(-100 * layer.spec.top_k // layer.spec.num_experts) for layer in layers)
    in_use = max(100 * layer.residency.capacity / layer.spec.num_experts for layer in layers)
    return least if in_use > 1.5 * least else min(100, 2 * least)


def _run_reference(
    name: str, reference: Reference, options: LoadOptions, tokenizer: Any, inputs: dict[str, Any], max_new_tokens: int
) -> Trace:
    gc.collect()
    if reference.kind != "transformers":
        from moert.hf.decoded import DecodedCheck

        with opened(name, options) as loaded:
            if reference.decoded_tolerance is None:
                return _trace(loaded.model, tokenizer, inputs, max_new_tokens, "reference")
            with DecodedCheck(loaded.model) as decoded:
                trace = _trace(loaded.model, tokenizer, inputs, max_new_tokens, "reference")
            return replace(trace, decoded=decoded)
    from moert.hf.reference import round_as_moert

    with opened_plain(name, options, experts_implementation="eager") as plain:
        products = None
        if reference.tolerance is SIXTEEN_BIT:
            products = round_as_moert(plain.model, dense_kernels=options.offload.dense_kernels)
            if products is None:
                warnings.warn(
                    "these experts cannot be made to round where moert does; rounding alone may change a token: "
                    "--dtype float32 takes it out",
                    RuntimeWarning,
                    stacklevel=2,
                )
        trace = _trace(plain.model, tokenizer, inputs, max_new_tokens, "reference")
        return replace(trace, products=products)


def _trace(model: Any, tokenizer: Any, inputs: dict[str, Any], max_new_tokens: int, title: str) -> Trace:
    from moert.hf.reference import RoutingRecorder
    from moert.hf.text import generate

    with bar(title, max_new_tokens) as progress, RoutingRecorder(model) as recorder:
        made = generate(
            model, tokenizer, inputs, max_new_tokens=max_new_tokens, keep_logits=True, on_token=progress.advance
        )
    assert made.logits is not None
    return Trace(made.token_ids, made.logits, recorder.picks)


def _print(result: dict[str, Any], console: Console) -> None:
    share = result["max_abs_logit_error"] / result["max_abs_logit"] if result["max_abs_logit"] else 0.0
    allowed = "0" if result["tolerance"] == 0 else f"{result['tolerance']:.1e}"
    tokens = f"{result['tokens_compared']} of {result['tokens_compared']} identical"
    if result["first_difference"]:
        tokens = _difference_text(result)
    routing = f"{result['picks_compared']:,} picks identical"
    if result["picks_differing"]:
        routing = (
            f"{result['picks_differing']:,} of {result['picks_compared']:,} picks differ, "
            f"first in {result['first_layer_differing']}"
        )
    logits = f"largest error {share:.1e} of the largest logit, allowed {allowed}"
    why = result["tolerance_reason"]
    if result["max_abs_logit_error"] == 0:
        logits, why = "equal to the last bit", ""
    rows: list[tuple[str, str | Text]] = [
        ("tokens", _mark(result["identical_tokens"], tokens)),
        ("routing", _mark(result["identical_routing"], routing)),
        ("logits", _mark(result["within_tolerance"], logits)),
        *([("", Text(why, style="bright_black"))] if why else []),
    ]
    if result["products_compared"]:
        ulps = f"{result['max_product_error_ulps']:.2g} units in the last place"
        rows += [
            (
                "products",
                _mark(result["products_within_tolerance"], f"at most {ulps} from torch's, allowed {PRODUCT_ULPS:.0f}"),
            ),
            ("", Text("--dtype float32 compares with transformers exactly as it ships", style="bright_black")),
        ]
    if result["decoded_compared"]:
        error, allowed = result["max_decoded_error"], result["decoded_tolerance"]
        text = f"at most {error:.1e} from their decoded weights' result, allowed {allowed:.1e}"
        rows += [
            ("experts", _mark(result["decoded_within_tolerance"], text)),
            ("", Text(result["decoded_tolerance_reason"], style="bright_black")),
        ]
    resident = percent(result["resident_bytes"] / result["expert_bytes"])
    console.print()
    console.print(
        facts(
            [
                ("offloaded", f"{resident} of the experts in memory, {result['dtype']}, policy {result['policy']}"),
                ("reference", result["reference_description"]),
                *rows,
                ("hit rate", f"{percent(result['hit_rate'])}, {format_bytes(result['bytes_read'])} read"),
            ]
        )
    )
    console.print()
    if result["passed"]:
        console.print("[bold green]identical[/] – offloading changed nothing")
    else:
        console.print("[bold red]DIFFERENT[/] – the offloaded model does not compute what the reference does")
        console.print(f"[bright_black]{_advice(result)}[/]", soft_wrap=True)


def _difference_text(result: dict[str, Any]) -> str:
    first = result["first_difference"]
    found, expected = (repr(first[key]) if first[key] is not None else "the end" for key in ("text", "reference_text"))
    margin = (
        ""
        if first["reference_margin"] is None
        else f", which the reference preferred by {first['reference_margin']:.3g}"
    )
    where = f"differ from token {first['step'] + 1} of {result['tokens_compared']} on"
    return f"{where}: {found} instead of {expected}{margin}"


def _advice(result: dict[str, Any]) -> str:
    if result["reference"] != "transformers":
        return "The two must agree to the last bit: please report this with the output of `moert doctor`."
    if result["dtype"] == "float32":
        return "`--reference resident` tells whether the budget matters; please report this with `moert doctor`."
    return "`--dtype float32` takes rounding out; `--reference resident` tells whether the budget matters."


def _mark(good: bool, text: str) -> Text:
    return Text.assemble(("✓ " if good else "✗ ", "green" if good else "bold red"), text)
