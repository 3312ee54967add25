from collections.abc import Sequence
from typing import Any, TypeAlias

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
