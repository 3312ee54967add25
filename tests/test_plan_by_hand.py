"""Plans and forecasts against arithmetic by hand, and what they name against what works when it is typed back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moert.cli.plan import _command, make_plan
from moert.config import Budget, format_at_least, format_at_most, parse_budget
from moert.errors import CapacityError
from moert.hf.model_needs import _weight_bits, read_needs
from moert.plan import LayerNeed, plan_slots
from moert.planning.forecast import Placement, Prompts, decode_speed, prefill_speed, typical_hits
from moert.planning.machine import Machine
from moert.planning.memory import lay_out
from moert.planning.model import CacheLayer, ModelNeeds

MIB, GIB = 1 << 20, 1 << 30
WORKSPACE = 256 * MIB

odd_needs = st.lists(
    st.tuples(st.integers(2, 40), st.integers(1, 5_000_000), st.integers(1, 4)).map(
        lambda t: LayerNeed("layer", t[0], t[1], t[1], min(t[2], t[0]))
    ),
    min_size=1,
    max_size=5,
)


def model_of(layers: tuple[LayerNeed, ...], *, dense: int = 0, kv: int = 0, fixed: int = 0) -> ModelNeeds:
    return ModelNeeds("Model", layers, dense, dense, (CacheLayer(kv, fixed_bytes=fixed),) * len(layers))


def machine_of(**numbers: float) -> Machine:
    return Machine("m", **{"host_memory_bytes": 8 * GIB, "host_bytes_per_s": 1e10, "cpu_flops": 1e12, **numbers})


def device_of(**numbers: float) -> Machine:
    card = {"device_memory_bytes": 8 * GIB, "device_bytes_per_s": 1e11, "device_flops": 1e13, "link_bytes_per_s": 1e9}
    return machine_of(**{**card, **numbers})


@given(nbytes=st.integers(1, 1 << 45))
def test_sizes_to_type_back_are_on_the_right_side(nbytes: int) -> None:
    least, most = (parse_budget(text(nbytes), "x").nbytes for text in (format_at_least, format_at_most))
    assert least is not None
    assert most is not None
    assert most <= nbytes <= least
    assert least - most <= max(1, nbytes * 0.11)


def named(pattern: str, error: pytest.ExceptionInfo[CapacityError]) -> tuple[str, ...]:
    found = re.search(pattern, str(error.value))
    assert found is not None, error.value
    return found.groups()


@settings(max_examples=200, deadline=None)
@given(needs=odd_needs, percent=st.integers(1, 99))
def test_the_smallest_budget_that_is_named_works(needs: list[LayerNeed], percent: int) -> None:
    least = sum(need.top_k * need.slot_bytes for need in needs)
    if least > 1:
        with pytest.raises(CapacityError) as error:
            plan_slots(needs, Budget(nbytes=least - 1))
        (text,) = named(r"but ([\d.]+ \w+) ", error)
        plan_slots(needs, parse_budget(text, "host_memory"))
    try:
        plan_slots(needs, Budget(share=percent / 100))
    except CapacityError:
        with pytest.raises(CapacityError) as error:
            plan_slots(needs, Budget(share=percent / 100))
        share, text = named(r'give at least "(\d+%)" or ([\d.]+ \w+)$', error)
        plan_slots(needs, parse_budget(text, "host_memory"))
        plan_slots(needs, parse_budget(share, "host_memory"))
        if (fewer := int(share[:-1]) - 1) >= 1:
            with pytest.raises(CapacityError):
                plan_slots(needs, Budget(share=fewer / 100))


def test_a_share_is_rounded_down_but_not_by_its_own_rounding() -> None:
    assert plan_slots([LayerNeed("layer", 100, 1, 1, 1)], parse_budget("29%", "host_memory")) == [29]


@settings(max_examples=100, deadline=None)
@given(needs=odd_needs, dense=st.integers(0, GIB), kv=st.integers(0, 1000))
def test_the_smallest_machine_that_is_named_works(needs: list[LayerNeed], dense: int, kv: int) -> None:
    model = model_of(tuple(needs), dense=dense, kv=kv)
    smallest = dense + 3 * 100 * kv * len(needs) + WORKSPACE + model.least_bytes
    with pytest.raises(CapacityError) as error:
        lay_out(model, machine_of(host_memory_bytes=smallest - 1), context=100, batch=3)
    (text,) = named(r"needs at least ([\d.]+ \w+) of host memory", error)
    assert lay_out(model, machine_of(host_memory_bytes=smallest), context=100, batch=3).host.used_bytes == smallest
    named_bytes = parse_budget(text, "host_memory").nbytes
    assert named_bytes is not None
    lay_out(model, machine_of(host_memory_bytes=named_bytes), context=100, batch=3)


SMALL, LARGE = LayerNeed("small", 16, 2 * MIB, 2 * MIB - 5, 2), LayerNeed("large", 16, 6 * MIB, 6 * MIB - 5, 2)
TWO = model_of((SMALL, LARGE), dense=100 * MIB, kv=1024, fixed=MIB)


def test_the_parts_of_both_memories_by_hand() -> None:
    """Two sequences of 1024 tokens: in each of two layers a MiB for its state and one for its tokens, twice."""
    assert TWO.expert_bytes == 16 * 8 * MIB
    for device, option in ((8 * GIB, None), (480 * MIB, None), (8 * GIB, Budget(nbytes=33 * MIB))):
        found = lay_out(TWO, device_of(device_memory_bytes=device), context=1024, batch=2, device_memory=option)
        host, card = found.host, found.device
        assert card is not None
        assert (host.dense_bytes, host.cache_bytes, host.workspace_bytes, host.staging_bytes) == (0, 0, WORKSPACE, 0)
        assert (card.dense_bytes, card.cache_bytes, card.workspace_bytes) == (100 * MIB, 8 * MIB, WORKSPACE)
        # Three experts arrive, wait, or run without a slot.
        assert card.staging_bytes == 3 * 6 * MIB
        # Of 480 MiB 98 are left, but four fifths of all beside the dense weights leave 22.
        experts = {8 * GIB: 128, 480 * MIB: 22}[device] if option is None else 32
        assert card.expert_bytes == experts * MIB
        assert found.placement.device == ((16, 16) if experts == 128 else (5, 2) if experts == 22 else (4, 4))
        assert found.placement.host == (16, 16)
        assert not found.is_read_from_disk


def test_what_is_in_neither_memory_is_read_from_disk() -> None:
    half, whole = Budget(share=0.5), Budget(share=1.0)
    for host, card, is_read in ((half, half, True), (half, whole, False), (whole, half, False)):
        found = lay_out(TWO, device_of(), context=1, batch=1, host_memory=host, device_memory=card)
        assert found.is_read_from_disk == is_read
    for host, is_read in ((half, True), (whole, False)):
        assert lay_out(TWO, machine_of(), context=1, batch=1, host_memory=host).is_read_from_disk == is_read


def test_a_device_that_is_too_small_is_named_and_the_last_byte_counts() -> None:
    smallest = (100 + 8 + 256 + 18 + 16) * MIB
    with pytest.raises(CapacityError, match=r"needs at least 398\.0 MiB of device memory .* 274\.0 MiB workspace"):
        lay_out(TWO, device_of(device_memory_bytes=smallest - 1), context=1024, batch=2)
    found = lay_out(TWO, device_of(device_memory_bytes=smallest), context=1024, batch=2)
    assert found.device is not None
    assert found.device.used_bytes == smallest, "all of it, where four fifths are too few"
    room = smallest + 16 * MIB
    exact = lay_out(
        TWO, device_of(device_memory_bytes=room), context=1024, batch=2, device_memory=Budget(nbytes=32 * MIB)
    )
    assert exact.device is not None
    assert exact.device.used_bytes == room
    with pytest.raises(CapacityError) as error:
        lay_out(
            TWO, device_of(device_memory_bytes=room - 1), context=1024, batch=2, device_memory=Budget(nbytes=32 * MIB)
        )
    for text in named(r"from ([\d.]+ \w+) to ([\d.]+ \w+) work", error):
        budget = parse_budget(text, "device_memory")
        lay_out(TWO, device_of(device_memory_bytes=room - 1), context=1024, batch=2, device_memory=budget)


def test_costs_by_hand() -> None:
    """An expert of a MB in 4 bits is 2 million weights; each is a product and a sum for a token."""
    numbers = {"cpu_expert_start_s": 1e-6, "cpu_start_s": 2e-6, "merge_s": 3e-6, "disk_bytes_per_s": 1e8}
    machine = device_of(**numbers)
    costs = machine.costs(1e6, weight_bits=4)
    assert costs.device is not None
    assert costs.cpu_s(1) == pytest.approx(1e-6 + 1e6 / 1e10)
    assert costs.cpu_s(4096) == pytest.approx(1e-6 + 4096 * 4e6 / 1e12)
    assert costs.device(1) == pytest.approx(1e6 / 1e11)
    assert costs.device(4096) == pytest.approx(4096 * 4e6 / 1e13)
    assert (costs.move_s, costs.read_s) == (pytest.approx(1e-3), pytest.approx(1e-2))
    assert (costs.cpu_start_s, costs.merge_s) == (2e-6, 3e-6)
    alone = machine_of(**numbers).costs(1e6, weight_bits=4)
    assert (alone.device, alone.move_s, alone.cpu_start_s, alone.merge_s) == (None, 0, 0, 0)
    assert machine.layer_s(1e6, 1) == pytest.approx(1e6 / 1e11)
    assert machine.layer_s(1e6, 1000, 4) == pytest.approx(1000 * 4e6 / 1e13)
    assert machine_of().layer_s(1e6, 1000, 4) == pytest.approx(1000 * 4e6 / 1e12)


def forecasts(**numbers: Any) -> ModelNeeds:
    """Four layers of 16 experts of a MB, two a token."""
    return replace(model_of((LayerNeed("layer", 16, 10**6, 10**6, 2),) * 4), **numbers)


def test_the_kv_cache_of_every_sequence_is_read() -> None:
    needs = forecasts(cache=(CacheLayer(1000),) * 8)
    machine = device_of(layer_start_s=1e-3, host_bytes_per_s=1e6)
    everything = Placement((16,) * 4, (16,) * 4)
    one = decode_speed(needs, machine, everything, context=5000, batch=1, hits=typical_hits)
    # Eight layers have attention; four have two experts, that the device runs in 10 us each.
    assert one.busy["overhead"] == pytest.approx(8e-3)
    assert one.seconds == pytest.approx(8e-3 + 8 * 5000 * 1000 / 1e11 + 4 * 2e-5)
    assert one.busy["device"] == pytest.approx(one.seconds - 8e-3)
    two = decode_speed(needs, machine, everything, context=5000, batch=2, hits=typical_hits)
    # Of 16 experts two tokens use 3.75.
    assert two.seconds == pytest.approx(8e-3 + 2 * 8 * 5000 * 1000 / 1e11 + 4 * 4e-5)
    assert two.tokens_per_s == pytest.approx(2 / two.seconds)
    read = prefill_speed(needs, machine, everything, prompt=512, batch=3, hits=typical_hits)
    assert read.tokens == 3 * 512
    # 16 experts with 192 tokens each, at 2 operations for each of half a million weights: 19.2 us.
    assert read.seconds == pytest.approx(8e-3 + 3 * 8 * 512 * 1000 / 1e11 + 4 * 16 * 192 * 1e6 / 1e13)


def test_narrow_weights_are_more_of_them() -> None:
    """A prompt of 512 tokens, 64 of them in each of 64 experts: memory sets the pace, or 4 operations a byte do."""
    found = [
        prefill_speed(
            forecasts(weight_bits=bits), machine_of(), Placement((16,) * 4), prompt=512, batch=1, hits=typical_hits
        )
        for bits in (16.0, 4.0)
    ]
    assert [speed.seconds for speed in found] == [pytest.approx(64 * 1e-4), pytest.approx(64 * 64 * 4e-6)]


def test_what_an_event_waits_for_beside_computing_by_hand() -> None:
    """All of two experts missing, from disk (10 ms each) to a device (a move of 1 ms) that nothing else can replace."""
    machine = device_of(disk_bytes_per_s=1e8, host_bytes_per_s=1e6)
    found = decode_speed(forecasts(), machine, Placement((2,) * 4, (2,) * 4), context=1, batch=1, hits=lambda _: 0.0)
    assert found.busy["link"] == pytest.approx(4 * 2e-3)
    assert found.busy["disk"] == pytest.approx(4 * 2e-2)
    # Both moves, the run of the second, and the reads.
    assert found.seconds == pytest.approx(4 * (2e-3 + 1e-5 + 2e-2))
    assert found.bottleneck == "disk"


@pytest.mark.parametrize(("tokens", "counts"), [(255, False), (256, True), (1024, True), (1025, False)])
def test_prompts_of_a_trace_count_where_they_are_about_as_long(tokens: int, counts: bool) -> None:
    """512 tokens that use 8 of 16 experts, of which 4 slots hold a quarter at most."""
    machine = machine_of(disk_bytes_per_s=1e8)
    slots = Placement((4,) * 4)
    prompts = Prompts(512, 0.5, lambda share: share)
    told = prefill_speed(forecasts(), machine, slots, prompt=tokens, batch=1, hits=typical_hits, prompts=prompts)
    assert told.busy["disk"] == pytest.approx(4 * (6 if counts else 12) * 1e-2)
    full = replace(prompts, hits=lambda _: 1.0)
    held = prefill_speed(forecasts(), machine, slots, prompt=512, batch=1, hits=typical_hits, prompts=full)
    assert held.hit_rate == pytest.approx(4 / 8), "no more than there are slots"


def plan_in(host_bytes: int, machine: Machine, needs: ModelNeeds, **options: Any) -> dict[str, Any]:
    options = {"context": 100, "batch": 1, "hits": typical_hits, "host_memory": Budget(nbytes=host_bytes), **options}
    return make_plan(needs, machine, **options)


def test_another_gib_is_worth_what_a_plan_with_it_says() -> None:
    needs = model_of((LayerNeed("layer", 64, 32 * MIB, 32 * MIB, 4),) * 4)
    machine = machine_of(disk_bytes_per_s=1e9, host_memory_bytes=32 * GIB)
    for now, more in ((2 * GIB, 3 * GIB), (7 * GIB + GIB // 2, 8 * GIB)):
        found = plan_in(now, machine, needs)
        after = plan_in(more, machine, needs)
        gain = after["decode"]["tokens_per_s"] - found["decode"]["tokens_per_s"]
        assert found["one_more_gib"] == {"host": pytest.approx(gain)}
        assert gain > 0.1
    assert plan_in(8 * GIB, machine, needs)["one_more_gib"] == {"host": None}
    # The same where the machine is full.
    full = plan_in(2 * GIB, replace(machine, host_memory_bytes=2 * GIB + WORKSPACE), needs)
    assert full["one_more_gib"] == plan_in(2 * GIB, machine, needs)["one_more_gib"]


def test_another_gib_of_one_memory_leaves_the_other_as_it_is() -> None:
    needs = model_of((LayerNeed("layer", 64, 32 * MIB, 32 * MIB, 4),) * 4)
    machine = device_of(disk_bytes_per_s=1e9, host_memory_bytes=32 * GIB)

    def plan_with(host: int, device: int) -> dict[str, Any]:
        return plan_in(host * GIB, machine, needs, device_memory=Budget(nbytes=device * GIB))

    found, now = plan_with(4, 2)["one_more_gib"], plan_with(4, 2)["decode"]["tokens_per_s"]
    assert found["device"] == pytest.approx(plan_with(4, 3)["decode"]["tokens_per_s"] - now)
    assert found["host"] == pytest.approx(plan_with(5, 2)["decode"]["tokens_per_s"] - now)
    assert found["host"] > 0.01
    assert found["device"] > 0.01


@settings(max_examples=150, deadline=None)
@given(
    layers=odd_needs,
    host=st.floats(0.0, 1.0),
    device=st.none() | st.floats(0.0, 1.0),
)
def test_the_command_gives_the_slots_of_the_plan(layers: list[LayerNeed], host: float, device: float | None) -> None:
    needs = model_of(tuple(layers))

    def budget(share: float) -> Budget:
        return Budget(nbytes=needs.least_bytes + int(share * (needs.expert_bytes - needs.least_bytes)))

    options = {} if device is None else {"device_memory": budget(device)}
    machine = machine_of(disk_bytes_per_s=1e9) if device is None else device_of(disk_bytes_per_s=1e9)
    found = make_plan(needs, machine, context=1, batch=1, hits=typical_hits, host_memory=budget(host), **options)
    words = _command("a model", needs, found).split()
    assert words[:4] == ["moert", "run", "'a", "model'"]
    for tier in ("host", "device") if device is not None else ("host",):
        text = words[words.index(f"--{tier}-memory") + 1]
        assert plan_slots(layers, parse_budget(text, f"{tier}_memory")) == found[f"{tier}_slots"]
    assert ("--device-memory" in words) == (device is not None)


def test_a_prompt_is_no_longer_than_the_context() -> None:
    lengths = [plan_in(64 * MIB, machine_of(), TWO, context=n)["prefill"]["prompt_tokens"] for n in (100, 512, 4000)]
    assert lengths == [100, 512, 512]


class Measured(Machine):
    def ends(self) -> tuple[Machine, Machine]:
        """Twice as fast, and half."""
        return tuple(replace(machine_of(disk_bytes_per_s=1e9), host_bytes_per_s=rate) for rate in (2e10, 5e9))  # type: ignore[return-value]


def test_a_plan_has_the_forecasts_of_its_machine() -> None:
    machine = Measured(**vars(machine_of(disk_bytes_per_s=1e9)))
    found = plan_in(64 * MIB, machine, TWO)
    slots = Placement(tuple(found["host_slots"]))

    def decode(where: Machine, hits: Any) -> float:
        return decode_speed(TWO, where, slots, context=100, batch=1, hits=hits).tokens_per_s

    assert found["decode"]["tokens_per_s"] == pytest.approx(decode(machine, typical_hits))
    worst = decode(machine, lambda share: share)
    assert found["decode_without_locality"]["tokens_per_s"] == pytest.approx(worst)
    assert worst < 0.9 * found["decode"]["tokens_per_s"]
    slow, fast = (decode(end, typical_hits) for end in reversed(machine.ends()))
    assert found["decode"]["range_tokens_per_s"] == pytest.approx([slow, fast])
    assert slow < found["decode"]["tokens_per_s"] < fast
    # Reads ahead of time are those of a machine without a device.
    assert found["reads_ahead"] is not None
    card = plan_in(64 * MIB, device_of(disk_bytes_per_s=1e9), TWO, device_memory=Budget(nbytes=32 * MIB))
    assert card["reads_from_disk"]
    assert card["reads_ahead"] is None


def test_bits_of_weights() -> None:
    assert (_weight_bits((), torch.float32), _weight_bits((), torch.bfloat16)) == (32, 16)
    for stored, bits in (("int4,group_size=32", 4), ("mxfp4", 4), ("int8,group_size=64", 8), ("fp8", 8)):
        assert _weight_bits((stored,), torch.bfloat16) == bits
    assert _weight_bits(("int8", "int4"), torch.bfloat16) == 4


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_token_reads_the_table_of_embeddings_where_it_is_the_output_s_too(is_tied: bool, tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "cli", "olmoe"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = is_tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    needs = read_needs(tmp_path / "tied")
    table = model.get_input_embeddings().weight.nbytes
    assert needs.dense_bytes - needs.dense_read_bytes == (0 if is_tied else table)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    buffers = sum(b.nbytes for b in model.buffers())
    assert needs.dense_bytes == sum(p.nbytes for p in model.parameters()) - experts + buffers
