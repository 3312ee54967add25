"""Machines, forecasts and plans: against what models really keep, and against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import moert
from moert.config import Budget
from moert.errors import CapacityError, ConfigError
from moert.hf.model import runtime_of
from moert.hf.model_needs import read_needs
from moert.plan import LayerNeed, plan_slots
from moert.planning.forecast import Placement, decode_speed, prefill_speed, typical_hits, uniform_hits
from moert.planning.machine import Machine, load_machine, machine_names, read_machine
from moert.planning.memory import STAGED_SLOTS, WORKSPACE_BYTES, lay_out
from moert.planning.model import CacheLayer, ModelNeeds
from moert.runtime import building, sizing
from moert.runtime.host_tier import HostTier
from moert.tiers.memory import MemoryLimit, MemoryReport

GIB = 1 << 30
each_machine = pytest.mark.parametrize("name", machine_names())


def needs_of(
    *,
    layers: int = 4,
    experts: int = 16,
    slot_bytes: int = 1 << 20,
    top_k: int = 2,
    dense: int = 64 << 20,
    kv: int = 1024,
) -> ModelNeeds:
    need = LayerNeed("layer", experts, slot_bytes, slot_bytes, top_k)
    return ModelNeeds("Model", (need,) * layers, dense, dense, (CacheLayer(kv),) * layers, longest_context=8192)


def machine_of(**numbers: float) -> Machine:
    return Machine("m", **{"host_memory_bytes": 8 * GIB, "host_bytes_per_s": 1e10, "cpu_flops": 1e12, **numbers})


@each_machine
def test_every_number_of_a_machine_says_where_it_is_from(name: str) -> None:
    machine = load_machine(name)
    numbers = {key for key, value in vars(machine).items() if isinstance(value, (int, float)) and value}
    assert machine.notes is not None
    assert numbers == set(machine.notes)
    assert all(note.split(":")[0] in ("source", "assumed", "measured") for note in machine.notes.values())
    costs = machine.costs(13e6)
    assert costs.read_s > costs.cpu_s(1)
    if costs.device is not None:
        assert costs.device(1) < costs.move_s
        assert costs.device(1) < costs.cpu_s(1)


@each_machine
def test_a_token_more_never_takes_less(name: str) -> None:
    machine = load_machine(name)
    costs = machine.costs(5e6, 4)
    for n in (1, 3, 100, 5000, 100000):
        assert costs.cpu_s(n) <= costs.cpu_s(n + 1)
        assert machine.layer_s(1e8, n) <= machine.layer_s(1e8, n + 1)


def value(number: object, **origin: str) -> dict[str, object]:
    return {"value": number, **(origin or {"source": "s"})}


LEAST = {"host_memory_bytes": value(1e9), "host_bytes_per_s": value(1e9), "cpu_flops": value(1e9)}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a description is"),
        ({"values": 3}, "a description is"),
        ({"values": {}}, "lacks host_memory_bytes, host_bytes_per_s, cpu_flops"),
        ({"values": {**LEAST, "colour": value(1)}}, "'colour' is unknown"),
        ({"values": {**LEAST, "disk_bytes_per_s": {"value": 1}}}, '"source", "assumed" or "measured"'),
        ({"values": {**LEAST, "disk_bytes_per_s": value(1, source="a", assumed="b")}}, "with one of"),
        ({"values": {**LEAST, "disk_bytes_per_s": value(-1)}}, "disk_bytes_per_s=-1"),
        ({"values": {**LEAST, "disk_bytes_per_s": value("fast")}}, "'fast' must be a finite number"),
        ({"values": {**LEAST, "merge_s": value(float("nan"))}}, "merge_s=nan"),
        ({"values": {**LEAST, "merge_s": value(True)}}, "merge_s=True"),
        ({"values": {**LEAST, "cpu_flops": value(0)}}, "cpu_flops must be above 0"),
        ({"values": {**LEAST, "device_memory_bytes": value(1e9)}}, "needs device_bytes_per_s"),
    ],
)
def test_what_is_no_machine_is_refused(document: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_machine(document, "m")


def test_files_of_machines(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"values": LEAST}))
    assert load_machine(str(path)).name == "mine"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_machine(str(path))
    with pytest.raises(ConfigError, match="no machine named 'nobody'; there are 12gb-pcie4"):
        load_machine("nobody")


def test_where_the_kv_cache_cannot_be_known_it_is_said(tmp_path: Path) -> None:
    save(build("minimax"), tmp_path)  # its attention has a cache of its own
    needs = read_needs(tmp_path)
    assert needs.cache is None
    assert "cache of its own" in needs.cache_problem
    assert needs.cache_bytes(1000, 4) == 0


def test_the_needs_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    from cli_support import checkpoint

    folder = Path(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))
    needs = read_needs(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    everything = sum(p.nbytes for p in model.parameters())
    assert sum(need.num_experts * need.expert_bytes for need in needs.layers) == experts
    assert needs.dense_bytes == pytest.approx(everything - experts, rel=0.01)  # and a few buffers
    assert needs.dense_bytes - needs.dense_read_bytes == model.get_input_embeddings().weight.nbytes
    assert needs.longest_context == 512
    assert needs.cache is not None
    assert len(needs.cache) == model.config.num_hidden_layers


@pytest.mark.parametrize("context", [None, 64, 300, 4096])
def test_loading_divides_memory_as_planned(
    context: int | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli_support import checkpoint

    folder = Path(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))
    needs = read_needs(folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    tokens = min(512, context or 4096)
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert needs.cache_bytes(tokens, 1) == tokens * config.num_hidden_layers * 2 * width * 4, "keys and values in fp32"
    # Four fifths of it leave room for the KV cache and more than half of the experts.
    room = needs.cache_bytes(tokens, 1) + int(0.6 * needs.expert_bytes)
    whole = needs.dense_bytes + int((WORKSPACE_BYTES + room) / 0.8)
    planned = lay_out(needs, machine_of(host_memory_bytes=whole), context=tokens, batch=1)
    monkeypatch.setattr(building, "available_bytes", lambda: whole - needs.dense_bytes)
    model = moert.load(folder, context=context, preload=False)
    slots = tuple(layer.residency.capacity for layer in runtime_of(model).layers)
    moert.close(model)
    assert slots == planned.placement.host
    assert sum(slots) < sum(need.num_experts for need in needs.layers)


@pytest.mark.parametrize("how", ["loaded", "loaded with a share", "patched", "wrapped"])
@pytest.mark.parametrize("context", [None, 300])
def test_resizing_by_default_divides_memory_as_loading(
    context: int | None, how: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli_support import checkpoint

    folder = Path(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))
    needs = read_needs(folder)
    tokens = min(512, context or 4096)
    room = needs.cache_bytes(tokens, 1) + int(0.6 * needs.expert_bytes)
    whole = needs.dense_bytes + int((WORKSPACE_BYTES + room) / 0.8)
    want = lay_out(needs, machine_of(host_memory_bytes=whole), context=tokens, batch=1).placement.host
    if how == "patched":
        model = AutoModelForCausalLM.from_pretrained(folder)
        moert.patch(model, context=context, host_memory="25%")
        tier = runtime_of(model)._tier
        assert tier is not None
        # Its records are not those of the checkpoint.
        free = int(0.8 * (whole - needs.dense_bytes)) - WORKSPACE_BYTES
        want = tuple(plan_slots(tier.needs, Budget(nbytes=free - needs.cache_bytes(tokens, 1))))
    else:
        model = moert.load(folder, context=context, host_memory="25%" if how == "loaded with a share" else "100%")
    held = moert.stats(model).slot_bytes
    report = MemoryReport((MemoryLimit("a limit", whole, needs.dense_bytes + held, 0),))
    monkeypatch.setattr(sizing, "memory_report", lambda: report)
    # So small a machine is short of memory from the beginning; that is another test's.
    monkeypatch.setattr(HostTier, "check_room", lambda *_: None)
    resized = moert.resize(torch.nn.Sequential(model) if how == "wrapped" else model)
    moert.close(model)
    assert resized.slots == want
    assert sum(resized.slots) < sum(need.num_experts for need in needs.layers)


def test_decode_by_hand() -> None:
    """4 layers, 2 experts a token of 1 MB, 10 GB/s: .1 ms each; all in memory, or none found and 1 GB/s of disk."""
    needs = needs_of(slot_bytes=10**6, dense=10**7, kv=0)
    machine = machine_of(disk_bytes_per_s=1e9, layer_start_s=1e-3)
    every = Placement((16,) * 4)
    found = decode_speed(needs, machine, every, context=1, batch=1, hits=typical_hits)
    assert found.seconds == pytest.approx(4 * 1e-3 + 1e-3 + 4 * 2e-4)
    assert found.hit_rate == 1
    assert found.bottleneck == "overhead"
    none = decode_speed(needs, machine, Placement((2,) * 4), context=1, batch=1, hits=lambda _: 0.0)
    # Two reads of 1 ms, the second expert computed after the last of them.
    assert none.seconds == pytest.approx(4 * 1e-3 + 1e-3 + 4 * (2e-3 + 1e-4))
    assert none.bottleneck == "disk"


@pytest.mark.parametrize(("on_device", "in_host"), [(2, 8), (4, 12), (8, 8), (4, 16)])
def test_with_a_device_what_neither_memory_has_is_read(on_device: int, in_host: int) -> None:
    """An expert is missing from both as often as from the larger one, which has what the smaller one has."""
    needs = needs_of(slot_bytes=10**6, dense=10**6, kv=0)
    machine = machine_of(
        disk_bytes_per_s=1e8, device_memory_bytes=1e9, device_bytes_per_s=1e11, device_flops=1e13, link_bytes_per_s=1e10
    )
    placement = Placement((in_host,) * 4, (on_device,) * 4)
    found = decode_speed(needs, machine, placement, context=1, batch=1, hits=uniform_hits)
    picks = needs.layers[0].top_k
    assert found.busy["disk"] == pytest.approx(4 * picks * (1 - in_host / 16) * 0.01)
    assert found.hit_rate == pytest.approx(on_device / 16)


def test_prefill_reads_each_expert_once() -> None:
    needs = needs_of(slot_bytes=10**6, dense=10**6, kv=0)
    machine = machine_of(disk_bytes_per_s=1e8)
    found = prefill_speed(needs, machine, Placement((4,) * 4), prompt=512, batch=1, hits=typical_hits)
    assert found.busy["disk"] == pytest.approx(4 * 12 * 0.01)
    assert found.tokens == 512


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(2, 15),
    name=st.sampled_from(machine_names()),
    batch=st.integers(1, 4),
    slot_mb=st.integers(1, 20),
)
def test_more_slots_are_never_slower(slots: int, name: str, batch: int, slot_mb: int) -> None:
    needs, machine = needs_of(slot_bytes=slot_mb << 20), load_machine(name)

    def seconds(n: int) -> float:
        many = (n,) * 4
        placement = Placement((16,) * 4, many) if machine.has_device else Placement(many)
        return decode_speed(needs, machine, placement, context=10, batch=batch, hits=typical_hits).seconds

    assert seconds(slots + 1) <= seconds(slots) * (1 + 1e-9)


def test_typical_hits_lie_between_nothing_and_all() -> None:
    shares = [n / 100 for n in range(101)]
    rates = [typical_hits(share) for share in shares]
    assert rates[0] == 0
    assert rates[-1] == 1
    assert rates == sorted(rates)
    assert all(rate >= uniform_hits(share) for rate, share in zip(rates, shares, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    host_gib=st.floats(0.05, 8),
    device_gib=st.one_of(st.just(0.0), st.floats(0.05, 8)),
    experts=st.integers(2, 64),
    slot_mb=st.integers(1, 60),
    context=st.integers(1, 8192),
    batch=st.integers(1, 8),
    kv=st.integers(0, 200_000),
    budget_gib=st.one_of(st.none(), st.floats(0.01, 8)),
)
def test_nothing_is_planned_that_does_not_fit(
    host_gib: float,
    device_gib: float,
    experts: int,
    slot_mb: int,
    context: int,
    batch: int,
    kv: int,
    budget_gib: float | None,
) -> None:
    needs = needs_of(experts=experts, slot_bytes=slot_mb << 20, kv=kv)
    device: dict[str, float] = {}
    if device_gib:
        device = {"device_memory_bytes": int(device_gib * GIB)}
        device |= {"device_bytes_per_s": 1e11, "device_flops": 1e13, "link_bytes_per_s": 1e10}
    machine = machine_of(host_memory_bytes=int(host_gib * GIB), **device)
    budget = None if budget_gib is None else Budget(nbytes=int(budget_gib * GIB))
    cache = batch * context * kv * 4
    assert needs.cache_bytes(context, batch) == cache
    smallest = needs.dense_bytes + cache + WORKSPACE_BYTES + needs.least_bytes
    try:
        found = lay_out(needs, machine, context=context, batch=batch, host_memory=budget)
    except CapacityError:
        if not device_gib and budget is None:
            assert smallest > machine.host_memory_bytes
        return
    for tier in (found.host, found.device):
        if tier is not None:
            assert tier.used_bytes <= tier.available_bytes
            assert needs.least_bytes <= tier.expert_bytes <= needs.expert_bytes
    main = found.device or found.host
    assert (main.dense_bytes, main.cache_bytes) == (needs.dense_bytes, cache)
    assert main.available_bytes >= smallest
    if found.device is not None:
        assert found.device.staging_bytes == STAGED_SLOTS * (slot_mb << 20) > 0
    if budget is not None:
        assert budget.nbytes is not None
        assert found.host.expert_bytes <= budget.nbytes


def test_what_is_impossible_is_refused_with_what_would_work() -> None:
    needs = needs_of()
    with pytest.raises(CapacityError, match=r"at least 3\d\d\.\d MiB of host memory .* and there are 200\.0 MiB"):
        lay_out(needs, machine_of(host_memory_bytes=200 << 20), context=100, batch=1)
    with pytest.raises(CapacityError, match=r"from 8\.0 MiB to 59\.\d MiB work"):
        lay_out(
            needs, machine_of(host_memory_bytes=380 << 20), context=100, batch=1, host_memory=Budget(nbytes=80 << 20)
        )
    with pytest.raises(CapacityError, match=r"host_memory is 1\.0 MiB .* 8\.0 MiB"):
        lay_out(needs, machine_of(), context=100, batch=1, host_memory=Budget(nbytes=1 << 20))
    with pytest.raises(ConfigError, match="context=9000 is more than the 8192 tokens"):
        lay_out(needs, machine_of(), context=9000, batch=1)
    with pytest.raises(ConfigError, match="m has no device"):
        lay_out(needs, machine_of(), context=1, batch=1, device_memory=Budget(share=0.5))
    with pytest.raises(ConfigError, match="at least 1"):
        lay_out(needs, machine_of(), context=1, batch=0)
