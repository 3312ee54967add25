"""Importers of published traces: small files of each format, and every kind of malformed row."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_support import BIGMOE, WASTE, npz_arrays, read_with, replaced

from moert.errors import ConfigError, CorruptFileError
from moert.trace import (
    Phase,
)
from moert.trace.importing import recognise


def test_waste(tmp_path: Path) -> None:
    path = tmp_path / "trace_x.jsonl"
    path.write_text(WASTE + "\n")
    assert recognise(path) == "waste"
    header, (sequence,) = read_with("waste", path, experts=8, model="m", native_top_k=4)
    assert [(layer.num_experts, layer.top_k, layer.native_top_k) for layer in header.layers] == [(8, 2, 4)] * 2
    assert (header.model, header.source, sequence.name) == ("m", "waste", "trace_x")
    assert sequence.experts.tolist() == [[[0, 5], [1, 2]], [[5, 6], [2, 7]], [[0, 1], [1, 2]]]
    assert sequence.steps.tolist() == [0, 1, 2]
    assert set(sequence.phases) == {Phase.DECODE}


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (2, "{", "line 2: not JSON"),
        (2, "[" * 99999, "line 2: not JSON"),
        (2, '["tok", "layers"]', 'line 2: not an object with a whole number "tok"'),
        (2, '{"tok": 4.0, "layers": [[5, 6], [2, 7]]}', 'line 2: not an object with a whole number "tok"'),
        (2, '{"tok": 4}', 'line 2: "layers" is not a list of lists'),
        (2, '{"tok": 4, "layers": [3]}', 'line 2: "layers" is not a list of lists'),
        (2, '{"tok": 4, "layers": [[5, 6], [2, "7"]]}', "line 2: an expert's id is not a whole number"),
        (2, '{"tok": 4, "layers": [[5, 6], [2, true]]}', "line 2: an expert's id is not a whole number"),
        (2, '{"tok": 4, "layers": [[5, 6]]}', "line 2: 1 layers, line 1 has 2"),
        (3, '{"tok": 5, "layers": [[5, 6], [2]]}', "line 3: layer 1 has 1 experts, others 2"),
        (3, '{"tok": 5, "layers": [[5, 6], [2, 8]]}', "line 3: layer 1: id 8 is not below the layer's 8 experts"),
        (3, '{"tok": 5, "layers": [[5, 6], [2, -1]]}', "line 3: an expert's id is negative"),
        (3, '{"tok": 5, "layers": [[5, 6], [2, 4294967296]]}', "line 3: an expert's id is negative or beyond 32 bits"),
        (3, '{"tok": 5, "layers": [[5, 5], [2, 1]]}', "line 3: layer 0: expert 5 twice"),
        (2, None, 'line 2: "tok" is 5 after 3: tokens are missing'),
        (2, "", "line 2: empty, but line 3 is not"),
        (1, '{"tok": 3, "layers": [[0, 5], [1]]}', "line 1: layer 1 has 1 experts"),
        (1, '{"tok": 3, "layers": [[], []]}', "line 1: no experts"),
        (2, '{"tok": 4, "layers": [[5, 6], [2, 7]]}\udcff', "line 2: not UTF-8"),
    ],
)
def test_waste_malformed(tmp_path: Path, line: int, new: str | None, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(replaced(WASTE, line, new), errors="surrogateescape")
    with pytest.raises(CorruptFileError) as caught:
        read_with("waste", path, experts=8)
    assert f"{path}: {message}" in str(caught.value)


def test_what_is_missing_comes_from_options(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(WASTE)
    with pytest.raises(ConfigError, match=r"does not say the model's number of experts a layer; .* --experts N"):
        read_with("waste", path)
    with pytest.raises(ConfigError, match=r"--experts=0 must be at least 1"):
        read_with("waste", path, experts=0)
    with pytest.raises(ConfigError, match=r"has 2 experts a token, --top-k says 3"):
        read_with("waste", path, experts=8, top_k=3)
    with pytest.raises(ConfigError, match=r"2 experts a token, more than the 1 of a layer"):
        read_with("waste", path, experts=1)


def test_bigmoe(tmp_path: Path) -> None:
    path = tmp_path / "tiny.route.csv"
    path.write_text(BIGMOE)
    assert recognise(path) == "bigmoe"
    header, (first, second) = read_with("bigmoe", path, native_top_k=4)
    assert [(layer.num_experts, layer.top_k, layer.expert_bytes) for layer in header.layers] == [
        (8, 2, 100),
        (8, 2, 50),
    ]
    assert header.model == "Tiny.gguf"
    # The first token of the prompt did not run the last layer.
    assert first.experts.tolist() == [[[3, 1], [-1, -1]], [[3, 2], [7, 6]], [[5, 4], [0, 1]]]
    assert first.weights is not None
    np.testing.assert_array_equal(first.weights[1], np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    assert first.phases.tolist() == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE]
    assert first.steps.tolist() == [0, 0, 1]
    assert (second.steps.tolist(), second.phases.tolist()) == ([2], [Phase.DECODE])
    assert (first.name, second.name) == ("tiny/0", "tiny/1")


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (1, "# route_trace v2", "line 1: is not '# route_trace v1'"),
        (2, "# model=x arch=y n_layer=2", "line 2: is not '# model="),
        (2, "# model=x arch=y n_layer=2 n_expert=8 n_expert_used=9", "line 2: 2 layers and 9 of 8 experts"),
        (3, "# layer=1 expert_bytes=100", "line 3: is not '# layer=0 expert_bytes=N"),
        (4, None, "line 4: the bytes of 1 layers, line 2 says 2"),
        (5, "turn,phase", "line 5: is not '# layer=2"),
        (9, "0,0,1,0,1,2,0.5,0", "line 9: 8 fields, there must be 9"),
        (9, "0,0,1,0,1,2.0,0.5,0,0", "line 9: invalid literal for int"),
        (9, "0,0,1,0,1,2,x,0,0", "line 9: could not convert string to float"),
        (9, "0,0,1,0,1,2,nan,0,0", "line 9: weight nan"),
        (9, "0,2,1,0,1,2,0.5,0,0", "line 9: phase 2 is neither"),
        (9, "0,0,-1,0,1,2,0.5,0,0", "line 9: turn 0, step -1"),
        (9, "0,0,1,2,1,2,0.5,0,0", "line 9: layer 2, there are 2"),
        (9, "0,0,1,0,2,2,0.5,0,0", "line 9: slot 2, there are 2"),
        (9, "0,0,1,0,1,8,0.5,0,0", "line 9: expert 8, there are 8"),
        (9, "0,0,1,0,1,3,0.5,0,0", "line 9: expert 3 twice in step 1, layer 0; also on line 8"),
        (9, "0,0,1,0,0,2,0.5,0,0", "line 9: slot 0 of step 1, layer 0 where slot 1 must follow"),
        (9, None, "step 1, layer 0 has 1 picks, the last on line 8; it must have 2"),
        (15, None, "turn 0, which ends on line 14: step 2, layer 1 has 1 picks, the last on line 14"),
        (12, "0,0,2,0,0,5,1,1,0", "line 13: step 2 is of the prompt and decoded"),
        (16, "-1,1,0,0,0,5,1,1,0", "line 16: turn -1"),
        (12, "", "line 12: empty, but line 13 is not"),
        (16, "0,1,0,0,0,5,1,1,0", "line 16: step 0 is of the prompt and decoded"),
    ],
)
def test_bigmoe_malformed(tmp_path: Path, line: int, new: str | None, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(replaced(BIGMOE, line, new))
    with pytest.raises(CorruptFileError) as caught:
        read_with("bigmoe", path)
    assert f"{path}: " in str(caught.value)
    assert message in str(caught.value)


def test_bigmoe_order_and_missing_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    head = BIGMOE.split("expert_bytes\n0,0,0", maxsplit=1)[0]
    path.write_text(BIGMOE + "0,1,9,0,0,5,1,1,0\n")
    with pytest.raises(CorruptFileError, match="line 20: turn 0 after turn 1"):
        read_with("bigmoe", path)
    path.write_text("".join(line + "\n" for line in BIGMOE.splitlines() if not line.startswith("0,1,2,1,")))
    with pytest.raises(CorruptFileError, match="step 2, layer 1 has 0 picks; it must have 2"):
        read_with("bigmoe", path)
    path.write_text(head + "expert_bytes\n")
    with pytest.raises(CorruptFileError, match="there are no rows"):
        read_with("bigmoe", path)
    path.write_text(BIGMOE.replace("0,1,2,", "0,1,0,").replace("0,0,0,0,", "0,0,5,0,"))
    with pytest.raises(CorruptFileError, match="tokens of the prompt after decoded ones"):
        read_with("bigmoe", path)


ESFT: dict[str, bytes] = {
    "expert_weights_1.txt": b"3\t1\t2\t0\t\t0.5\t0.25\t0.5\t0.125\n7\t6\t\t1\t0.5\n",
    "expert_weights_2.txt": b"0\t1\t0\t5\t\t0.5\t0.25\t0.5\t0.125\n2\t1\t\t1\t0.5\n",
}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_esft(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "law", {**ESFT, "notes.txt": b"x"})
    assert recognise(folder) == "esft"
    header, (first, second) = read_with("esft", folder, experts=8, top_k=2)
    assert [layer.name for layer in header.layers] == ["layers.1", "layers.2"]
    assert header.sampled is False
    assert first.experts.tolist() == [[[3, 1], [0, 1]], [[2, 0], [0, 5]]]
    assert first.weights is not None
    assert first.weights[1].tolist() == [[0.5, 0.125], [0.5, 0.125]]
    assert (first.steps.tolist(), second.steps.tolist()) == ([0, 1], [2])
    assert (first.name, second.name) == ("law/0", "law/1")
    _, (first, second) = read_with("esft", folder, experts=8, top_k=2, phase=Phase.PREFILL)
    assert (first.steps.tolist(), second.steps.tolist()) == ([0, 0], [1])
    assert set(first.phases) == {Phase.PREFILL}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("expert_weights_2.txt", None, "folder: expert_weights_2.txt is missing, of 3 layers"),
        ("expert_weights_2.txt", b"0\t1\t0\t5\t\t1\t1\t1\t1\n", "expert_weights_2.txt: line 2: is missing"),
        ("expert_weights_2.txt", ESFT["expert_weights_2.txt"] + b"1\t2\t\t1\t1\n", "_1.txt: line 3: is missing"),
        ("expert_weights_2.txt", b"0\t1\t\t1\t1\n2\t1\t\t1\t1\n", "_2.txt: line 1: 1 tokens, the first layer has 2"),
        ("expert_weights_1.txt", b"3\t1\t2\t0\t0.5\t0.25\n7\t6\t\t1\t0.5\n", "_1.txt: line 1: 0 times two tabs"),
        ("expert_weights_1.txt", b"3\t1\t2\t0\t\t1\t1\t1\n7\t6\t\t1\t0.5\n", "line 1: 4 ids but 3 weights"),
        ("expert_weights_1.txt", b"3\t1\t2\t\t1\t1\t1\n7\t6\t\t1\t0.5\n", "line 1: 3 ids are no multiple of the 2"),
        ("expert_weights_1.txt", b"\t\t\n7\t6\t\t1\t0.5\n", "line 1: 0 ids are no multiple"),
        ("expert_weights_1.txt", b"\n7\t6\t\t1\t0.5\n", "line 1: 0 times two tabs"),
        ("expert_weights_1.txt", b"3\tx\t2\t0\t\t1\t1\t1\t1\n7\t6\t\t1\t1\n", "line 1: invalid literal"),
        (
            "expert_weights_1.txt",
            b"3\t1\t2\t8\t\t1\t1\t1\t1\n7\t6\t\t1\t1\n",
            "line 1: experts: token 1, layer 0: id 8",
        ),
        ("expert_weights_1.txt", b"3\t3\t2\t0\t\t1\t1\t1\t1\n7\t6\t\t1\t1\n", "token 0, layer 0: expert 3 twice"),
        ("expert_weights_1.txt", b"3\t1\t2\t-1\t\t1\t1\t1\t1\n7\t6\t\t1\t1\n", "line 1: ids from -1 to 3"),
        ("expert_weights_1.txt", b"3\t1\t2\t0\t\t1\tinf\t1\t1\n7\t6\t\t1\t1\n", "inf is not finite"),
        ("expert_weights_1.txt", b"3\t1\t2\t0\t\t1\t1\t1\t1\n\xff\t6\t\t1\t1\n", "line 2: not UTF-8"),
    ],
)
def test_esft_malformed(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    files = dict(ESFT)
    if content is None:
        files["expert_weights_3.txt"] = files.pop(name)
    else:
        files[name] = content
    with pytest.raises(CorruptFileError) as caught:
        read_with("esft", write_files(tmp_path / "x", files), experts=8, top_k=2)
    assert message in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


def test_esft_needs_top_k(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"number of experts a token \(top-k\); give it with --top-k N"):
        read_with("esft", write_files(tmp_path / "x", ESFT), experts=8)


def test_npz(tmp_path: Path) -> None:
    arrays = npz_arrays()
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    assert recognise(path) == "npz"
    header, sequences = read_with("npz", path, experts=8)
    assert (len(header.layers), header.top_k, header.layers[0].num_experts) == (2, 2, 8)
    assert [sequence.name for sequence in sequences] == ["set/p0", "set/p1", "set/p2"]
    for number, sequence in enumerate(sequences):
        np.testing.assert_array_equal(sequence.experts, arrays[f"experts_{number:03}"])
        np.testing.assert_array_equal(sequence.weights, arrays[f"weights_{number:03}"])
    assert np.concatenate([sequence.steps for sequence in sequences]).tolist() == list(range(9))
    _, kept = read_with("npz", path, experts=8, keep_repetition=False)
    assert [sequence.name for sequence in kept] == ["set/p0", "set/p2"]
    assert np.concatenate([sequence.steps for sequence in kept]).tolist() == list(range(6))


def with_array(name: str, array: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_array("experts_001", np.zeros((3, 2), np.uint8)),
            r"'experts_001': \[3, 2\] is not \[tokens, layers, k\]",
        ),
        (with_array("experts_001", np.zeros((0, 2, 2), np.uint8)), r"'experts_001': \[0, 2, 2\] is not"),
        (with_array("experts_001", np.zeros((3, 3, 2), np.uint8)), r"\[3, 3, 2\], the first has \[n, 2, 2\]"),
        (with_array("experts_001", np.zeros((3, 2, 2))), "'experts_001': expert ids must be integers, not float64"),
        (with_array("experts_001", np.full((3, 2, 2), 2**40)), "are no expert ids"),
        (
            with_array("experts_001", np.tile(np.uint8([3, 8]), (3, 2, 1))),
            "'experts_001': experts: token 0, layer 0: id 8",
        ),
        (with_array("experts_001", np.zeros((3, 2, 2), np.uint8)), "token 0, layer 0: expert 0 twice"),
        (with_array("experts_001", np.array([None])), "'experts_001'.*cannot be read: Object arrays"),
        (with_array("weights_001", np.zeros((3, 2, 1), np.float16)), r"'weights_001'.*must be floats \[3, 2, 2\]"),
        (with_array("weights_001", np.zeros((3, 2, 2), np.int8)), r"'weights_001'.*must be floats"),
        (with_array("weights_001", np.full((3, 2, 2), np.nan)), "nan is not finite"),
        (with_array("weights_007", np.zeros((3, 2, 2))), "'weights_007': there are no experts of that number"),
        (with_array("experts_1", np.zeros((3, 2, 2), np.uint8)), "two arrays experts_N have the same number"),
        (with_array("extra", np.zeros(3)), "'extra': is neither"),
        (with_array("meta_json", np.array("[")), "meta_json.*not JSON"),
        (with_array("meta_json", np.array("[{}]")), "1 entries for 3 sequences"),
        (with_array("meta_json", np.array("[1, 2, 3]")), "not a list of objects"),
    ],
)
def test_npz_malformed(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    arrays = npz_arrays()
    change(arrays)
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_with("npz", path, experts=8)
    assert str(path) in str(caught.value)


def test_npz_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **npz_arrays())
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("experts_001.npy").header_offset
    data = bytearray(path.read_bytes())
    data[begin + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"array 'experts_001': .*CRC"):
        read_with("npz", path, experts=8)
    path.write_bytes(data[:-30])
    with pytest.raises(CorruptFileError, match="cannot be read"):
        read_with("npz", path, experts=8)
    np.savez(path, meta_json=np.array("[]"))
    with pytest.raises(CorruptFileError, match="there is no array experts_N"):
        read_with("npz", path, experts=8)
    arrays = npz_arrays()
    arrays["meta_json"] = np.array('[{"repetition": true}, {"repetition": true}, {"repetition": true}]')
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match="all 3 sequences are marked as repetition"):
        read_with("npz", path, experts=8, keep_repetition=False)
