from collections.abc import Sequence
from typing import Any, TypeAlias

_Heads: TypeAlias = tuple[int, int, int]
_Token: TypeAlias = tuple[int, int | None, int | None, int, _Heads, _Heads, int, int, int | None]
_Group: TypeAlias = tuple[object, int, int | None, int | None, int | None]

def prefault(address: int, nbytes: int, threads: int, /) -> bool: ...
def fill(address: int, nbytes: int, byte: int, /) -> None: ...
def stream_read(address: int, nbytes: int, threads: int, repeats: int, /) -> float: ...
def cpu_features() -> dict[str, bool]: ...
def matrix(
    weight_format: str,
    transposed: bool,
    group: int,
    n: int,
    k: int,
    data: int,
    scales: int | None,
    zeros: int | None,
    /,
) -> object: ...
def expert(number: str, up: object, down: object, up_bias: int | None, down_bias: int | None, /) -> object: ...
def ffn_run(
    gate: tuple[Any, ...],
    number: str,
    hidden: int,
    width: int,
    x: int,
    x_rows: int,
    out: int,
    out_rows: int,
    groups: list[_Group],
    /,
) -> None: ...
def ffn_token(
    gate: tuple[object, ...],
    number: str,
    hidden: int,
    width: int,
    x: int,
    y: int,
    weights: int,
    count: int,
    experts: list[object],
    places: list[int],
    /,
) -> None: ...
def ffn_submit(
    gate: tuple[Any, ...],
    number: str,
    hidden: int,
    width: int,
    x: int,
    x_rows: int,
    out: int,
    out_rows: int,
    groups: list[_Group],
    /,
) -> object: ...
def add_rows(held: int, rows: int, width: int, to: int | None, weights: int, out: int, out_rows: int, /) -> None: ...
def job_ready(job: object, /) -> bool: ...
def job_wait(job: object, /) -> None: ...
def linear(matrix: object, number: str, x: int, tokens: int, bias: int | None, y: int, /) -> None: ...
def product(number: str, weight: int, n: int, k: int, x: int, tokens: int, bias: int | None, y: int, /) -> None: ...
def rms_norm(
    scale: str,
    number: str,
    eps: float,
    weight: int,
    width: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    rows: int,
    /,
) -> None: ...
def gate_look(
    number: str,
    source: int,
    width: int,
    eps: float,
    scaled: int | None,
    gain: int | None,
    offset: int | None,
    weight_number: str,
    weight: int,
    experts: int,
    bias: int | None,
    correction: int | None,
    count: int,
    values: int,
    /,
) -> list[int]: ...
def learn_lines(
    source_number: str,
    source: int,
    target_number: str,
    target: int,
    width: int,
    share: float,
    moments_too: bool,
    means: int,
    moments: int,
    gain: int,
    offset: int,
    /,
) -> bool: ...
def rotate(
    number: str,
    sizes: tuple[int, int, int, int, int],
    x: int,
    x_steps: tuple[int, ...],
    y: int,
    y_steps: tuple[int, ...],
    cos: int,
    sin: int,
    angle_steps: tuple[int, int],
    /,
) -> None: ...
def self_attention(
    number: str,
    sizes: tuple[int, int, int, int],
    scale: float,
    projections: tuple[tuple[object, int | None], ...],
    norms: tuple[tuple[str, float, int, int] | None, ...],
    /,
) -> object: ...
def same_bytes(a: int, b: int, nbytes: int, /) -> bool: ...
def holds(entries: list[tuple[Any, ...]], /) -> bool: ...
def attend_token(attention: object, token: _Token, /) -> None: ...
def moe_block(
    number: str,
    hidden: int,
    router: tuple[object, int | None, str],
    rule: tuple[Any, ...],
    gate: tuple[Any, ...],
    width: int,
    scale: float,
    shared: tuple[Any, ...] | None,
    /,
) -> object: ...
def run_block(block: object, x: int, token: tuple[Any, ...], /) -> float: ...
def token_layer(attention: object, block: object, /) -> object: ...
def pick(rule: tuple[Any, ...], logits: int, experts: int, ids: int, weights: int, /) -> None: ...
def expert_table(hidden: int, width: int, gated: bool, experts: list[object], /) -> object: ...
def run_layers(layers: list[tuple[object, _Token, tuple[Any, ...]]], /) -> list[float]: ...
def attend(
    number: str,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    q: int,
    q_steps: tuple[int, ...],
    k: int,
    k_steps: tuple[int, ...],
    v: int,
    v_steps: tuple[int, ...],
    mask_kind: str,
    mask: int | None,
    mask_steps: tuple[int, int, int],
    y: int,
    /,
) -> None: ...
def kernel_name(matrix: object, tokens: int, /) -> str: ...
def use_isa(name: str | None, /) -> str: ...
def isa() -> str: ...
def isa_names(usable_only: bool, /) -> str: ...
def threads() -> int: ...
def set_threads(count: int | None, /) -> int: ...
def stop_threads() -> None: ...
def pool_info() -> dict[str, Any]: ...
def cpu_limits(root: str, cpus: Sequence[int], /) -> dict[str, Any]: ...
def pool_probe(phases: int, tasks: int, task_ns: int, /) -> tuple[float, dict[int, int]]: ...
def pool_probe_submit(phases: int, tasks: int, task_ns: int, /) -> object: ...
def busy_clock() -> object: ...
def busy_enter(clock: object, /) -> None: ...
def busy_leave(clock: object, /) -> None: ...
def busy_seconds(clock: object, /) -> float: ...
def reader_open(lanes: int, guesses: int, clock: object, /) -> object: ...
def moves(moves: list[tuple[int, int, int, int, int, int, int, int, int]], /) -> object: ...
def reader_submit(
    reader: object,
    kind: int,
    nbytes: int,
    parts: list[tuple[int, int, int, int, int, int, int, int, int]],
    moving: tuple[object, int, int, int, int] | None = None,
    /,
) -> object: ...
def reader_cancel(reader: object, record: object, /) -> bool: ...
def reader_give_up(reader: object, record: object, /) -> bool: ...
def reader_promote(reader: object, record: object, /) -> bool: ...
def reader_set_lanes(reader: object, device: int, lanes: int, guesses: int, /) -> None: ...
def reader_saturation(reader: object, seconds: float, nbytes: float, /) -> list[tuple[int, int, float, float]]: ...
def reader_totals(reader: object, /) -> tuple[int, int]: ...
def reader_shut_down(reader: object, /) -> None: ...
def reader_close(reader: object, /) -> None: ...
def record_state(record: object, /) -> int: ...
def record_wait(record: object, seconds: float | None, /) -> int: ...
def record_seconds(record: object, /) -> float: ...
def record_begun(record: object, /) -> int: ...
def record_failure(record: object, /) -> tuple[int, int, int] | None: ...
