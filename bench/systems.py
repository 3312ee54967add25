"""The systems that the offload benchmark compares, each run alone in a process of its own: `systems.py SPEC RESULT`."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESIDENT = "moert-resident"
"""moert with every expert in memory and no limit: how fast it computes."""


@dataclass
class Spec:
    """One run. Byte counts of `hf_memory_bytes` are for the weights alone."""

    system: str
    checkpoint: str
    prompt: list[int]
    tokens: int
    host_memory: str | None = None
    hf_folder: str | None = None
    hf_memory_bytes: int = 0
    offload_folder: str | None = None
    gguf: str | None = None
    forced: list[int] | None = None
    """Tokens to put in place of the greedy ones; the run then tells how far each was from greedy."""


@dataclass
class Run:
    """What a run measured. Decoding is all tokens after the first."""

    tokens: list[int] = field(default_factory=list)
    load_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    decode_read_bytes: int = 0
    """Bytes that came from the disk while decoding, by the kernel's count."""
    read_bytes: int = 0
    peak_rss_bytes: int = 0
    cpu_s: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)
    """moert's own counts while decoding."""
    gaps: list[float] = field(default_factory=list)
    """With forced tokens: how far each is below the best logit, in standard deviations of the logits."""
    forced_differ: int = 0
    detail: str = ""


def disk_read_bytes() -> int:
    """Bytes this process has made the disk read; 0 where the kernel does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def peak_rss_bytes() -> int:
    # Not ru_maxrss: that one starts at the parent's peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class StepClock:
    """A streamer for `generate` that notes the state of things at the first token and at the end."""

    def __init__(self, sample: Callable[[], dict[str, float]]) -> None:
        self.sample = sample
        self.start = sample()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._calls = 0

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with each token."""
        self._calls += 1
        if self._calls == 2:
            self.first = self.sample()

    def end(self) -> None:
        """Called by `generate` when it is done."""
        self.last = self.sample()

    def decoding(self, name: str) -> float:
        """The growth of one number from the first token to the end."""
        return self.last[name] - self.first[name]


def load_moert(spec: Spec) -> Any:
    import moert

    budget = "100%" if spec.system == RESIDENT else spec.host_memory
    options: dict[str, Any] = {} if budget is None else {"host_memory": budget}
    return moert.load(spec.checkpoint, dtype="auto", **options)


def load_hf(spec: Spec) -> Any:
    """transformers with accelerate's disk offload: whole modules, as many in memory as the budget allows."""
    import torch
    from accelerate import infer_auto_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    assert spec.hf_folder is not None
    config = AutoConfig.from_pretrained(spec.hf_folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    device_map = infer_auto_device_map(
        skeleton, max_memory={"cpu": spec.hf_memory_bytes}, no_split_module_classes=skeleton._no_split_modules
    )
    return AutoModelForCausalLM.from_pretrained(
        spec.hf_folder, dtype="auto", device_map=device_map, offload_folder=spec.offload_folder
    ).eval()


def describe(spec: Spec, model: Any) -> str:
    """One phrase on where the weights of a loaded model are."""
    if spec.system == RESIDENT:
        return "host_memory=100%, no memory limit: what is left when nothing is read"
    if spec.system != "hf":
        return f"host_memory={spec.host_memory or 'measured'}"
    devices = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    return f"{devices.count('disk')} of {len(devices)} modules on disk"


def generate(spec: Spec, load: Callable[[Spec], Any]) -> Run:
    """Load a model and generate greedily with it, without regard to end-of-sequence tokens."""
    if spec.system in ("moert", RESIDENT):
        import moert

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    started = time.perf_counter()
    model = load(spec)
    run = Run(load_s=time.perf_counter() - started, detail=describe(spec, model))

    def sample() -> dict[str, float]:
        counts: dict[str, float] = {}
        if spec.system in ("moert", RESIDENT):
            now = moert.stats(model).as_dict()
            counts = {name: now[name] for name in ("hits", "misses", "bytes_read", "stall_s", "compute_s")}
        return {**counts, "s": time.perf_counter(), "cpu_s": time.process_time(), "disk_bytes": disk_read_bytes()}

    def force(past: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert spec.forced is not None
        token = spec.forced[past.shape[1] - len(spec.prompt)]
        row = scores[0].float()
        run.gaps.append(((row.max() - row[token]) / row.std()).item())
        run.forced_differ += int(row.argmax().item() != token)
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)

    model.generation_config.eos_token_id = None
    clock = StepClock(sample)
    output = model.generate(
        torch.tensor([spec.prompt]),
        attention_mask=torch.ones(1, len(spec.prompt), dtype=torch.int64),
        max_new_tokens=spec.tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        logits_processor=[] if spec.forced is None else [force],
    )
    run.tokens = output[0, len(spec.prompt) :].tolist()
    run.first_token_s = clock.first["s"] - clock.start["s"]
    run.decode_s = clock.decoding("s")
    run.decode_cpu_s = clock.decoding("cpu_s")
    run.decode_read_bytes = int(clock.decoding("disk_bytes"))
    run.stats = {name: clock.decoding(name) for name in clock.last if name not in ("s", "cpu_s", "disk_bytes")}
    return run


def generate_llama_cpp(spec: Spec) -> Run:
    """llama.cpp on the CPU, its weights mapped from a GGUF file."""
    from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]

    assert spec.gguf is not None
    context = len(spec.prompt) + spec.tokens + 8
    started = time.perf_counter()
    model = Llama(model_path=spec.gguf, n_gpu_layers=0, use_mmap=True, n_ctx=context, verbose=False)
    loaded = time.perf_counter()
    run = Run(load_s=loaded - started, detail="mmap")
    first_s, first_cpu_s, first_bytes = loaded, 0.0, 0
    for token in model.generate(spec.prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        run.tokens.append(token)
        if len(run.tokens) == 1:
            first_s, first_cpu_s, first_bytes = time.perf_counter(), time.process_time(), disk_read_bytes()
        if len(run.tokens) == spec.tokens:
            break
    run.first_token_s = first_s - loaded
    run.decode_s = time.perf_counter() - first_s
    run.decode_cpu_s = time.process_time() - first_cpu_s
    run.decode_read_bytes = disk_read_bytes() - first_bytes
    return run


SYSTEMS: dict[str, Callable[[Spec], Run]] = {
    "moert": lambda spec: generate(spec, load_moert),
    RESIDENT: lambda spec: generate(spec, load_moert),
    "hf": lambda spec: generate(spec, load_hf),
    "llama.cpp": generate_llama_cpp,
}


def prepare_hf(checkpoint: str, folder: str, scratch: str) -> None:
    """Write the checkpoint to `folder` in the fused form that transformers holds, shard by shard.

    From hub files it would fuse every expert anew at each load and write it all to its offload folder.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", device_map={"": "disk"}, offload_folder=scratch
    )
    model.save_pretrained(folder, save_original_format=False, max_shard_size="500MB")


def main(spec_path: str, result_path: str) -> None:
    """Run the spec in one file and leave the result in the other."""
    spec = Spec(**json.loads(Path(spec_path).read_text()))
    run = SYSTEMS[spec.system](spec)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    run.cpu_s = usage.ru_utime + usage.ru_stime
    run.read_bytes = disk_read_bytes()
    run.peak_rss_bytes = peak_rss_bytes()
    Path(result_path).write_text(json.dumps(asdict(run)))


if __name__ == "__main__":
    if sys.argv[1] == "prepare-hf":
        prepare_hf(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
