"""Which way each part of moert takes on a machine, and why, from what `moert doctor` found there."""

from __future__ import annotations

from typing import Any

from moert.config import OffloadConfig, format_bytes
from moert.torch_threads import SPIN_COUNT

LONG_SPINNING_S = 0.001
"""Several times what `SPIN_COUNT` comes to."""

_NATIVE = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("avx512_fp16",)}


def choose_paths(document: dict[str, Any], config: OffloadConfig) -> list[dict[str, str]]:
    """One `{part, path, why}` for each part; `document` is doctor's, without its paths."""
    rows = [
        ("expert compute", *_compute(document)),
        ("dense layers", *_dense(document, config)),
        ("torch's threads", *_torch_threads(document["torch_threads"])),
        ("disk reads", *_reads(document, config)),
        ("host memory", *_arena(document)),
        ("device memory", *_device(document)),
        ("GPU self-check", *_self_check(document)),
        ("pinned memory", *_pinned(document)),
        ("cache policy", config.policy, f"slots are shared out evenly over the layers; {_budget(document, config)}"),
        ("prediction", *_prediction(config)),
    ]
    return [{"part": part, "path": path, "why": why} for part, path, why in rows]


def _compute(document: dict[str, Any]) -> tuple[str, str]:
    model = document["model"] or {}
    dtype = model.get("dtype") or "bfloat16"
    reasons = model.get("unfused_reasons") or []
    weights = dtype if model.get("stored_as") in (None, "plain") else f"{model['stored_as']} weights in {dtype}"
    path = f"moert's {document['cpu'].get('kernel') or 'unknown'} kernels, whole layers at once; {weights}"
    if reasons:
        some = "some layers " if model.get("fused_gates") else ""
        path = f"{some}expert by expert through the model's own gate; {dtype}"
    return path, "; ".join([*reasons, _speed(document, dtype), _threads(document)])


def _speed(document: dict[str, Any], dtype: str) -> str:
    if dtype not in _NATIVE:
        return "fp32 is read at full width: 16 bits would be twice as fast"
    features = document["cpu"].get("features", {})
    native = [name for name in _NATIVE[dtype] if features.get(name)]
    if native:
        return f"this processor multiplies {dtype} itself ({', '.join(native)})"
    return f"this processor has no instructions for {dtype}: it is converted, so long prompts are slower"


def _threads(document: dict[str, Any]) -> str:
    threads = document["cpu"].get("compute_threads")
    return f"{threads['count']} threads: {threads['why']}" if threads else "threads unknown"


def _dense(document: dict[str, Any], config: OffloadConfig) -> tuple[str, str]:
    dtype = (document["model"] or {}).get("dtype") or "bfloat16"
    if dtype not in _NATIVE:
        return f"torch CPU kernels in {dtype}", "moert takes over dense layers of 16-bit weights only"
    if config.dense_kernels is False:
        return f"torch CPU kernels in {dtype}", "--no-dense-kernels asks for it"
    why = "--dense-kernels asks for it" if config.dense_kernels else "if all of the model is on the CPU"
    return f"as the experts, in {dtype}; torch's where gradients are needed", why


def _torch_threads(found: dict[str, Any]) -> tuple[str, str]:
    if "problem" in found:
        return "unknown", f"they could not be probed: {found['problem']}"
    if found["count"] == 1:
        return "one, which never spins", "OMP_NUM_THREADS, or the cores that this process may use"
    after = f"{1e3 * found['spinning_s']:.1f} ms after an operation"
    if found["spinning_s"] > LONG_SPINNING_S:
        return f"spin for {after}", f"on cores that moert computes with: set GOMP_SPINCOUNT={SPIN_COUNT}"
    if found["settings"] == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}:
        return f"rest {after}", f"GOMP_SPINCOUNT={SPIN_COUNT}: moert sets it where it is imported before torch"
    return f"rest {after}", "moert's own threads have the cores"


def _reads(document: dict[str, Any], config: OffloadConfig) -> tuple[str, str]:
    disk = document["disks"].get("checkpoint") or document["disks"]["cache"]
    threads = "4 threads at first" if config.io_depth is None else f"{config.io_depth} threads"
    if not config.direct_io:
        return f"through the page cache, {threads}", "--no-direct-io asks for it"
    if "problem" in disk:
        return f"O_DIRECT if the file system can, {threads}", "the disk could not be probed"
    if disk["direct"]:
        return f"O_DIRECT, {threads}", f"{disk['file_system']} can read past the page cache"
    return (
        f"through the page cache, {threads}",
        f"{disk['file_system']} cannot read past the page cache: costs more CPU",
    )


def _prediction(config: OffloadConfig) -> tuple[str, str]:
    if config.predictor == "none":
        return "none", "--predictor none asks for it"
    why = "what it expects is read before anybody waits, where experts come from disk and routers are known"
    return config.predictor, why


def _arena(document: dict[str, Any]) -> tuple[str, str]:
    memory = document["memory"]
    if "problem" in memory:
        return "one private mapping", "memory could not be probed"
    huge = memory["arena_huge_bytes"]
    if huge is None:
        return "one private mapping", "the kernel does not say whether it has huge pages"
    if huge * 2 >= memory["arena_bytes"]:
        return "one private mapping in 2 MiB pages", f"the kernel gave {format_bytes(huge)} of huge pages to a test"
    setting = memory["huge_pages"]
    reason = "huge pages are switched off" if setting == "never" else "the kernel had too few huge pages in a row"
    return "one private mapping in 4 KiB pages", f"{reason}: disk reads cost more CPU"


def _device(document: dict[str, Any]) -> tuple[str, str]:
    devices = document["devices"]
    if "problem" in devices:
        return "none", "CUDA could not be probed"
    if not devices["devices"]:
        return "none", devices["why"]
    names = ", ".join(device["name"] for device in devices["devices"])
    return "only if --device-memory asks for it", f"experts on a GPU are new in moert; without it {names} stays idle"


def _self_check(document: dict[str, Any]) -> tuple[str, str]:
    if not document["devices"].get("devices"):
        return "none", "there is no device to check"
    why = "moert's authors have not run experts on a GPU, so each model is refused there that does not pass"
    return "steps of the model's own experts against the CPU's, at load", why


def _pinned(document: dict[str, Any]) -> tuple[str, str]:
    if not document["devices"].get("devices"):
        return "none", "there is no device to copy to"
    return "with --device-memory, what host memory has of experts", "as much as the system lets be page-locked"


def _budget(document: dict[str, Any], config: OffloadConfig) -> str:
    if config.host_memory is not None:
        return f"--host-memory {config.host_memory}"
    default = (document["model"] or {}).get("default_host_bytes")
    return "the budget is measured" if default is None else f"{format_bytes(default)} by default"
