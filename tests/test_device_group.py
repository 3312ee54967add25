"""Several devices, each with some of a model's layers, over the same host memory and disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_support
from fault_support import LAYERS, ROUTING, E, Experts, check_books, right, step
from faulty_disk import FaultyDisk
from test_device_model import COSTS, LINK, PROMPT, generate, make
from test_faults_interrupt import Interrupter
from torch import nn

import moert
from moert.config import OffloadConfig, parse_budget
from moert.device.base import DeviceLostError
from moert.device.simulated import Machine, SimulatedDevice
from moert.errors import CapacityError, ConfigError
from moert.hf import loading, patching
from moert.hf.model import runtime_of
from moert.hf.placement import locate, move, read_device_map, remove_hooks, where_is
from moert.runtime import device_opening
from moert.runtime.device_building import Share
from moert.runtime.device_group import DeviceGroup, attach_devices
from moert.schedule import Costs, Curve
from moert.types import ExpertId

BY_LAYER = {"": 0, "model.layers.1": 1}
OPTIONS = {"costs": COSTS, "headroom_bytes": 0}


def machines(n: int = 2, *settings: Machine, virtual: bool = False) -> list[SimulatedDevice]:
    """Devices of one machine: what one of them page-locks, all may copy from, and nobody may lock it again."""
    each = settings or (LINK,) * n
    first = SimulatedDevice(each[0], name="simulated 0", virtual=virtual)
    others = enumerate(each[1:], start=1)
    return [first, *(SimulatedDevice(one, name=f"simulated {i}", virtual=virtual, beside=first) for i, one in others)]


def grouped(devices: list[SimulatedDevice], **options: Any) -> tuple[Any, DeviceGroup]:
    """A model of three layers, of which the second device has the one in the middle."""
    config = OffloadConfig(debug=True, **{"device_memory": "25%", "host_memory": "50%", **options})
    model = patching.patch(make(), config, device=devices, device_map=BY_LAYER, **OPTIONS)
    group = runtime_of(model).device
    assert isinstance(group, DeviceGroup)
    return model, group


def test_two_devices_give_the_bits_of_one() -> None:
    wanted = generate(moert.patch(make()))
    devices = machines()
    model, group = grouped(devices)
    for _ in range(2):
        tokens, numbers = generate(model)
        assert torch.equal(tokens, wanted[0])
        assert torch.equal(numbers, wanted[1])
    assert [tier.caches.layers for tier in group.tiers] == [(0, 2), (1,)]
    assert [tier.device for tier in group.tiers] == devices
    assert all(device.ledger.reads for device in devices)
    assert [cache.residency.capacity for tier in group.tiers for cache in tier.caches] == [10, 10, 10]
    each = [tier.counts for tier in group.tiers]
    assert all(one.on_device and one.on_cpu for one in each)
    for name in ("on_device", "fetched", "on_cpu"):
        assert getattr(group.counts, name) == sum(getattr(one, name) for one in each)
    assert sum(group.counts.ways.values()) == sum(sum(one.ways.values()) for one in each)
    moert.unpatch(model)
    assert not any(device.used_bytes for device in devices)
    assert not devices[0]._locked


def test_host_memory_changes_under_both_and_is_locked_once() -> None:
    wanted = generate(moert.patch(make()))
    devices = machines()
    model, group = grouped(devices)
    for host in ("30%", "100%", "40%"):
        runtime_of(model).prefetch([ExpertId(layer, 39) for layer in range(3)])
        moert.resize(model, host)
        assert group.pinned.locked_bytes == moert.stats(model).slot_bytes
        assert torch.equal(generate(model)[1], wanted[1])
    moert.close(model)


def test_nothing_is_unlocked_while_any_device_copies() -> None:
    devices = machines(2, *(Machine(latency_s=0.2),) * 2)
    model, group = grouped(devices, preload=False, host_memory="100%")
    for tier in group.tiers:
        tier.prefetch([ExpertId(tier.caches.layers[0], 39)])
        assert tier.transfers.copying
    group.before_host_changes()
    assert not any(tier.transfers.copying for tier in group.tiers)
    assert not devices[0]._locked
    group.after_host_changes()
    assert group.pinned.locked_bytes
    moert.close(model)


def test_closing_unlocks_nothing_while_another_device_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = machines(2, *(Machine(latency_s=0.2),) * 2)
    model, group = grouped(devices, preload=False, host_memory="100%")
    for tier in group.tiers:
        tier.prefetch([ExpertId(tier.caches.layers[0], 39)])
    events = [copy.event.done for tier in group.tiers for copy in tier.transfers._copies]
    assert len(events) == 2
    early = []
    for device in devices:
        unlock = device.page_unlock

        def unlocks(address: int, unlock: Any = unlock) -> None:
            early.append(any(done.at_s is None for done in events))
            unlock(address)

        monkeypatch.setattr(device, "page_unlock", unlocks)
    moert.close(model)
    assert early
    assert not any(early)


def test_a_self_check_of_both() -> None:
    devices = machines()
    with pytest.warns(RuntimeWarning, match="self-check on this one passed"):
        model = patching.patch(
            make(), OffloadConfig(device_memory="25%"), device=devices, device_map=BY_LAYER, check=True, **OPTIONS
        )
    assert all(device.ledger.reads for device in devices)
    moert.close(model)


@pytest.mark.parametrize("gone", [0, 1])
def test_one_lost_device_ends_it_and_both_are_given_back(gone: int) -> None:
    devices = machines()
    model, _ = grouped(devices)
    generate(model)
    devices[gone].lose()
    for _ in range(2):
        with pytest.raises(DeviceLostError, match=rf"simulated {gone}' was lost in mid-run"):
            generate(model)
    moert.close(model)
    moert.close(model)
    assert all(device._closed for device in devices)
    assert not devices[0]._locked


def test_recovering_puts_the_other_device_in_order_if_one_is_lost(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    devices = machines(virtual=True)
    with experts.runtime(host_memory="100%", preload=True) as runtime:
        group = shared(runtime, devices)
        runtime.prefetch([ExpertId(layer, 5) for layer in LAYERS])
        devices[0].lose()
        with pytest.raises(DeviceLostError):
            group.recover()
        assert group.tiers[0].transfers.copying
        assert not group.tiers[1].transfers.copying
        assert not group.tiers[1].transfers.all_coming()


def shared(runtime: Any, devices: list[SimulatedDevice], budget: str = "34%") -> DeviceGroup:
    """Even layers on the first device, odd ones on the second."""
    shares = [Share(one, runtime.layers[place::2]) for place, one in enumerate(devices)]
    options = {**OPTIONS, "guarded": False}
    return attach_devices(runtime, shares, budget=parse_budget(budget, ""), **options)


def test_an_interrupt_anywhere_loses_no_more_than_time(tmp_path: Path) -> None:
    experts, disk = Experts(tmp_path), FaultyDisk()
    want = {layer: right(experts, layer) for layer in LAYERS}
    devices = machines(2, *(Machine(latency_s=5e-4, launch_s=1e-4),) * 2, virtual=True)
    with experts.runtime(disk, host_memory="50%") as runtime:
        group = shared(runtime, devices)
        line = turn = uninterrupted = 0
        while uninterrupted < 4:
            line += 31
            turn += 1
            runtime.prefetch([ExpertId(layer, (turn + 2) % E) for layer in LAYERS])
            use: Callable[[], object] = functools.partial(step, runtime, turn % 4, [[turn % E, (turn + 1) % E], [5, 2]])
            uninterrupted += Interrupter(line).run(use)
            for layer in LAYERS:
                assert torch.equal(step(runtime, layer, ROUTING), want[layer]), f"interrupted at line {line}"
            group.check_integrity()
            check_books(runtime, experts)
        assert turn > 10


def test_a_budget_that_is_too_small_on_one_names_it() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    devices = machines(2, LINK, Machine(total_bytes=1 << 20))
    config = OffloadConfig(device_memory="100%", host_memory="50%", context=128)
    with pytest.raises(CapacityError, match=r"^simulated 1: the device has 1\.0 MiB .*64\.0 KiB KV cache"):
        patching.patch(model, config, device=devices, device_map=BY_LAYER, headroom_bytes=0)
    assert all(device._closed and not device.used_bytes for device in devices)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_loading_over_two_devices(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe) as model:
        wanted = generate(model)
    devices = machines()
    config = OffloadConfig(device_memory="50%", host_memory="50%", debug=True)
    model = loading.load(tiny_olmoe, config, None, device=devices, device_options={"device_map": BY_LAYER, **OPTIONS})
    assert torch.equal(generate(model)[1], wanted[1])
    assert all(device.ledger.reads for device in devices)
    moert.close(model)
    assert not any(device.used_bytes for device in devices)


def test_patching_by_a_device_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public way; here the GPUs that it opens are simulated, and tensors stay where they are."""
    opened: list[Any] = []

    def open_devices(wanted: list[torch.device]) -> list[SimulatedDevice]:
        opened.append(wanted)
        return machines(len(wanted))

    monkeypatch.setattr(device_opening, "check_machine", lambda config: None)
    monkeypatch.setattr(device_opening, "open_devices", open_devices)
    model = make()
    wanted = generate(model)[0]
    moert.patch(model, device_memory="25%", device_map={"": 1, "model.layers.1": "cuda", "model.layers.2": "cuda:0"})
    assert opened == [[torch.device("cuda", 1), torch.device("cuda", 0)]]
    group = runtime_of(model).device
    assert isinstance(group, DeviceGroup)
    assert [tier.caches.layers for tier in group.tiers] == [(0,), (1, 2)]
    assert torch.equal(generate(model)[0], wanted)
    moert.unpatch(model)
    moert.patch(model, device_memory="25%", device_map=1)
    assert opened[1:] == [[torch.device("cuda", 1)]]
    moert.unpatch(model)
    for given, message in (
        ({"": 0, "model.layers.1": "cpu"}, "puts model.layers.1.mlp.experts on cpu: with device_memory everything"),
        ({"": 0, "lm_head": "disk"}, "puts lm_head on meta"),
        ({"model.layers.0": 0}, "device_map says nothing of model.layers.1.mlp.experts"),
        ("everywhere", "device_map='everywhere'"),
    ):
        with pytest.raises(ConfigError, match=message):
            moert.patch(model, device_memory="25%", device_map=given)
        assert torch.equal(generate(model)[0], wanted)
    with pytest.raises(ConfigError, match="give device_memory too"):
        moert.patch(model, device_map="auto")


@pytest.mark.parametrize("device_map", [None, "auto", {"": 0}, {"": 0, "model.layers.1": 2, "model.layers.2": 1}])
def test_devices_need_a_map_that_gives_each_a_layer(device_map: Any) -> None:
    devices = machines()
    with pytest.raises(ConfigError, match="2 devices"):
        patching.patch(make(), OffloadConfig(device_memory="25%"), device=devices, device_map=device_map)


def test_the_longest_path_says_where_a_module_is() -> None:
    where = {"model.layers.1": "one", "model": "all", "model.layers.1.mlp": "inner"}
    assert locate("model.layers.1.mlp.experts", where) == "inner"
    assert locate("model.layers.1.self_attn", where) == "one"
    assert locate("model.layers.10.mlp", where) == "all"
    with pytest.raises(ConfigError, match="says nothing of lm_head"):
        locate("lm_head", where)


@pytest.mark.parametrize("word", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_words_are_worked_out_for_what_is_not_offloaded(word: str) -> None:
    model = moert.patch(make())
    dense = sum(tensor.nbytes for tensor in model.parameters())
    where = read_device_map(model, word, {0: 3 * dense, 1: 3 * dense, "cpu": 0})
    gpus = [locate(f"model.layers.{layer}.mlp.experts", where) for layer in range(3)]
    assert {one.type for one in where.values()} == {"cuda"}
    # In order, without going back; spread out unless it is to be filled up one by one.
    assert gpus == sorted(gpus, key=lambda one: one.index)
    assert len(set(where.values())) == (1 if word in ("sequential", "balanced_low_0") else 2)
    with pytest.raises(CapacityError, match="the dense weights do not fit on the GPUs"):
        read_device_map(model, word, {0: dense // 3, 1: dense // 3, "cpu": dense})
    moert.close(model)


def test_where_a_layer_is_can_be_seen_from_what_is_around_it() -> None:
    model = make()
    model.model.layers[1].mlp.gate.to("meta")
    moert.patch(model)
    found = [where_is(model, f"model.layers.{layer}.mlp.experts").type for layer in range(3)]
    assert found == ["cpu", "meta", "cpu"]
    moert.close(model)


def test_hooks_between_devices_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    attributes, right_ones = set(model.__dict__), model(torch.ones(1, 3))
    move(model, {"0": torch.device("cpu"), "1": torch.device("cpu", 0)})
    assert all(hasattr(module, "_hf_hook") for module in model)
    assert torch.equal(model(torch.ones(1, 3)), right_ones)
    remove_hooks(model)
    assert set(model.__dict__) == attributes
    assert not any(hasattr(module, "_hf_hook") or "forward" in vars(module) for module in model.modules())
    assert torch.equal(model(torch.ones(1, 3)), right_ones)


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")
def test_the_triton_kernels_find_the_experts_of_their_device() -> None:
    """Wherever their layers are in the model; on one device and on two they give the same bits."""
    options = {**OPTIONS, "costs": Costs(Curve.constant(1.0), Curve.constant(1e-6), move_s=1e-6)}
    found = []
    for n in (1, 2):
        devices = machines(n, virtual=True)
        placed = {} if n == 1 else {"device_map": {"": 0, "model.layers.2": 1}}
        given = devices[0] if n == 1 else devices
        model = patching.patch(
            make(), OffloadConfig(device_memory="100%"), device=given, triton=True, guarded=False, **placed, **options
        )
        found.append([model(PROMPT[:1, :length]).logits for length in (1, 3, 1)])
        moert.close(model)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
