"""Dumps of SGLang's expert distribution recorder become a trace, and malformed ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trace_support import random_ids, read_with

from moert.errors import ConfigError, CorruptFileError
from moert.trace import (
    NO_EXPERT,
    Phase,
)
from moert.trace.importing import recognise


def record(step: int, mode: int, experts: Any, positions: list[int], extend: list[int] | None = None) -> dict[str, Any]:
    """A forward pass as SGLang's recorder keeps it: layers first, 8 places, a dense layer in front."""
    num_tokens = len(positions)
    stored = np.full((4, num_tokens, 8), -1, dtype=np.int32)
    stored[1:, :, :2] = np.asarray(experts).reshape(num_tokens, 3, 2).transpose(1, 0, 2)
    return {
        "forward_pass_id": step,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [1000 + position for position in positions],
        "positions": positions,
        "extend_seq_lens": extend,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(stored),
        "misc_objects": [],
    }


def sglang_dump(first: Any, second: Any) -> dict[str, Any]:
    """Two requests: prompts of 3 and 2 tokens, the first in two chunks; the second ends earlier."""
    records = [
        record(5, 1, first[:2], [0, 1], [2]),
        record(6, 1, np.concatenate([first[2:3], second[:2]]), [2, 0, 1], [1, 2]),
        record(7, 2, np.concatenate([first[3:4], second[2:3]]), [3, 2]),
        record(8, 4, first[:0], []),
        record(9, 2, first[4:5], [4]),
        record(10, 2, first[5:6], [5]),
    ]
    return {"records": records, "last_physical_to_logical_map": torch.arange(8).repeat(4, 1)}


def test_sglang(tmp_path: Path) -> None:
    first, second = random_ids(6, 0), random_ids(3, 1)
    path = tmp_path / "dump_0.pt"
    torch.save(sglang_dump(first, second), path)
    assert recognise(path) == "sglang"
    header, (short, long) = read_with("sglang", path, native_top_k=2)
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in header.layers] == [
        ("layers.1", 8, 2),
        ("layers.2", 8, 2),
        ("layers.3", 8, 2),
    ]
    np.testing.assert_array_equal(long.experts, first)
    np.testing.assert_array_equal(short.experts, second)
    assert long.steps.tolist() == [5, 5, 6, 7, 9, 10]
    assert short.steps.tolist() == [6, 6, 7]
    assert long.phases.tolist() == [Phase.PREFILL] * 3 + [Phase.DECODE] * 3
    assert short.phases.tolist() == [Phase.PREFILL] * 2 + [Phase.DECODE]
    assert long.token_ids is not None
    assert long.token_ids.tolist() == [1000, 1001, 1002, 1003, 1004, 1005]


def test_sglang_copies_are_their_experts(tmp_path: Path) -> None:
    experts = random_ids(6)
    dump = sglang_dump(experts + 2, random_ids(3) + 2)
    # Experts 0 and 1 have two copies each, and all stand two places later.
    dump["last_physical_to_logical_map"] = torch.tensor([0, 1, *range(8)]).repeat(4, 1)
    torch.save(dump, tmp_path / "x.pt")
    header, sequences = read_with("sglang", tmp_path / "x.pt")
    assert header.layers[0].num_experts == 8
    np.testing.assert_array_equal(sequences[-1].experts, experts)


def test_sglang_a_recording_that_begins_in_the_middle(tmp_path: Path) -> None:
    experts = random_ids(4)
    records = [record(0, 2, experts[:2], [7, 7]), record(1, 2, experts[2:], [8, 8])]
    torch.save({"records": records, "last_physical_to_logical_map": torch.arange(8).repeat(4, 1)}, tmp_path / "x.pt")
    _, (first, second) = read_with("sglang", tmp_path / "x.pt")
    np.testing.assert_array_equal(first.experts, experts[[0, 2]])
    np.testing.assert_array_equal(second.experts, experts[[1, 3]])


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ({"rank": 0, "logical_count": torch.zeros(1, 4, 8)}, ConfigError, "recorded in mode stat: .*mode per_token"),
        ({"records": [{"global_physical_count": torch.zeros(4, 8)}]}, ConfigError, "recorded in mode per_pass"),
        ({"records": []}, CorruptFileError, 'there are no "records"'),
        ({"records": [3]}, CorruptFileError, 'there are no "records"'),
        ([1], CorruptFileError, "holds a list"),
    ],
)
def test_sglang_other_modes(tmp_path: Path, document: Any, error: type[Exception], message: str) -> None:
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(error, match=message):
        read_with("sglang", tmp_path / "x.pt", experts=8)


Change = Callable[[list[dict[str, Any]]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[2].update(forward_pass_id=6), "record 2: forward pass 6 after 6"),
        (lambda r: r[2].update(forward_pass_id="7"), "record 2: forward pass '7' of mode 2"),
        (lambda r: r[2].pop("forward_mode"), "record 2: forward pass 7 of mode None"),
        (lambda r: r[2].update(positions=[3]), r"record 2: \[2\] token ids at \[1\] positions"),
        (lambda r: r[2].update(input_ids="ab"), "record 2: holds"),
        (
            lambda r: r[2].update(topk_ids_of_layer=torch.zeros(4, 3, 8, dtype=torch.int32)),
            r"ids \[4, 3, 8\] of 2",
        ),
        (lambda r: r[2].update(topk_ids_of_layer=torch.zeros(4, 2, 8)), "record 2: holds float32"),
        (lambda r: r[2].update(topk_ids_of_layer=torch.zeros(3, 2, 8, dtype=torch.int32)), "in 3 layers, the map is"),
        (lambda r: r[2]["topk_ids_of_layer"][1].fill_(8), "record 2: ids up to 8 in 4 layers"),
        (lambda r: r[2]["topk_ids_of_layer"][1].fill_(-7), "record 2: ids from -7"),
        (lambda r: r[2]["topk_ids_of_layer"][1].fill_(3), "record 2: a token has more than 2 experts"),
        (lambda r: r[2]["topk_ids_of_layer"][0, :, 0].fill_(3), "record 2: a layer has experts that has none"),
        (lambda r: r[2]["topk_ids_of_layer"][1, :, :2].fill_(3), "expert 3 twice"),
        (lambda r: r[1].update(extend_seq_lens=[1, 3]), "record 1: 4 tokens of prompts, of 3"),
        (lambda r: r[1].update(extend_seq_lens=None), '"extend_seq_lens" is None'),
        (lambda r: r[1].update(extend_seq_lens=[1, -1]), '"extend_seq_lens" is'),
    ],
)
def test_sglang_malformed(tmp_path: Path, change: Change, message: str) -> None:
    dump = sglang_dump(random_ids(6), random_ids(3, 1))
    change(dump["records"])
    path = tmp_path / "x.pt"
    torch.save(dump, path)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_with("sglang", path)
    assert str(path) in str(caught.value)


def test_sglang_speculative_decoding(tmp_path: Path) -> None:
    dump = sglang_dump(random_ids(6), random_ids(3))
    dump["records"][2]["forward_mode"] = 6
    torch.save(dump, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="record 2: forward mode 6 is none of"):
        read_with("sglang", tmp_path / "x.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/nowhere"),)


@pytest.mark.parametrize("name", ["sglang", "hf_router_logits"])
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    torch.save({"records": [Evil()], "router_logits": Evil()}, path)
    with pytest.raises(CorruptFileError, match=r"cannot be read: .*[Ww]eights"):
        read_with(name, path, experts=8, top_k=2)
    torch.save(sglang_dump(random_ids(6), random_ids(3)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError):
        read_with(name, path, experts=8, top_k=2)


def test_tokens_without_experts_stay_without(tmp_path: Path) -> None:
    dump = sglang_dump(random_ids(6), random_ids(3))
    dump["records"][4]["topk_ids_of_layer"].fill_(-1)
    torch.save(dump, tmp_path / "x.pt")
    _, sequences = read_with("sglang", tmp_path / "x.pt")
    assert (sequences[-1].experts[4] == NO_EXPERT).all()
