"""Files that are damaged or of another kind: an error that says where, and never anything else."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from trace_support import make_header, random_sequence

from moert.errors import ConfigError, CorruptFileError, MoertError, TransferError
from moert.trace import TraceFile, TraceWriter

HEADER = make_header((8, 2), (6, 3), model="m")


def sound() -> bytes:
    """A file of two sequences with everything."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with TraceWriter(path, HEADER) as writer:
            for tokens in (3, 5):
                every = ["weights", "scores", "token_ids"]
                writer.add(random_sequence(HEADER, tokens, rng, optional=every, num_prompt=2, name=f"s{tokens}"))
        return path.read_bytes()


SOUND = sound()


def read_all(path: Path) -> None:
    with TraceFile(path) as trace:
        for index in range(len(trace)):
            trace.summary(index)
            trace[index]


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The sound file with another header."""
    length = int.from_bytes(SOUND[:8], "little")
    header = json.loads(SOUND[8 : 8 + length])
    header = new if isinstance(new := change(header), list) else header
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + SOUND[8 + length :]


def changed_inner(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The sound file with another header of the trace."""

    def outer(header: dict[str, Any]) -> None:
        inner = json.loads(header["__metadata__"]["header"])
        inner = new if isinstance(new := change(inner), list) else inner
        header["__metadata__"]["header"] = json.dumps(inner)

    return changed(outer)


def changed_data(name: str, place: int, value: bytes) -> bytes:
    """The sound file with other bytes in a tensor."""
    length = int.from_bytes(SOUND[:8], "little")
    begin = 8 + length + json.loads(SOUND[8 : 8 + length])[name]["data_offsets"][0] + place
    return SOUND[:begin] + value + SOUND[begin + len(value) :]


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(fields)


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields.pop(name) and None


def span(row: int, column: int, value: int) -> bytes:
    return changed_data("spans.1", 8 * (4 * row + column), value.to_bytes(8, "little", signed=True))


def layer(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda inner: inner["layers"][0].update(fields)


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few"),
    "short": (SOUND[:7], "7 bytes are too few"),
    "cut in the header": (SOUND[:100], "truncated"),
    "cut in the data": (SOUND[:-3], r"'experts\.1' ends 3 bytes after the file"),
    "more than there should be": (SOUND + b"x", "the end of the file at byte"),
    "header's length": (b"\xff" * 8 + SOUND[8:], "a header of 18446744073709551615 bytes"),
    "no JSON": (SOUND[:8] + b"[" + SOUND[9:], "not sound JSON"),
    "no UTF-8": (SOUND[:20] + b"\xff" + SOUND[21:], "not sound JSON"),
    "deep JSON": ((50_000).to_bytes(8, "little") + b"[" * 50_000, "not sound JSON"),
    "list": ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
    "name twice": ((37).to_bytes(8, "little") + b'{"experts.0": {}, "experts.0": {}}   ', "a name twice"),
    "header no text": (changed(lambda h: h["__metadata__"].update(header=3)), "has no 'header'"),
    "header missing": (changed(lambda h: h["__metadata__"].pop("header")), "has no 'header'"),
    "version": (changed(lambda h: h["__metadata__"].update(moert_trace="one")), "'one' is no version"),
    "version zero": (changed(lambda h: h["__metadata__"].update(moert_trace="0")), "'0' is no version"),
    "version of many digits": (changed(lambda h: h["__metadata__"].update(moert_trace="9" * 9999)), "is no version"),
    "inner no JSON": (changed(lambda h: h["__metadata__"].update(header="{")), "header is malformed"),
    "inner deep": (changed(lambda h: h["__metadata__"].update(header="[" * 99999)), "nested too deeply"),
    "inner a list": (changed_inner(lambda i: [i]), "a JSON list, not an object"),
    "no layers": (changed_inner(lambda i: i.update(layers=[])), "at least one layer"),
    "layers missing": (changed_inner(drop("layers")), "'layers' is missing"),
    "layer a number": (changed_inner(lambda i: i.update(layers=[1])), "a layer is a JSON int"),
    "experts a text": (changed_inner(layer(num_experts="8")), "'num_experts' is '8', not a whole number"),
    "experts a truth": (changed_inner(layer(num_experts=True)), "'num_experts' is True"),
    "experts a fraction": (changed_inner(layer(num_experts=8.0)), "'num_experts' is 8.0"),
    "too many experts": (changed_inner(layer(num_experts=10**9)), "1000000000 experts"),
    "top-k": (changed_inner(layer(top_k=9)), "top-k of 9"),
    "negative bytes": (changed_inner(layer(expert_bytes=-1)), "'expert_bytes' is -1"),
    "model a number": (changed_inner(lambda i: i.update(model=3)), "'model' is 3"),
    "model null": (changed_inner(lambda i: i.update(model=None)), "'model' is None"),
    "names": (changed_inner(lambda i: i.update(names=["x"])), "names are not 2 texts"),
    "names numbers": (changed_inner(lambda i: i.update(names=[1, 2])), "names are not 2 texts"),
    "more sequences": (changed_inner(lambda i: i.update(sequences=3, names=None)), r"'spans\.2' is missing"),
    "far more sequences": (changed_inner(lambda i: i.update(sequences=10**12, names=None)), "cannot be in 10 tensors"),
    "fewer sequences": (changed_inner(lambda i: i.update(sequences=1, names=None)), r"'spans\.1', but the trace has 1"),
    "other tensor": (changed(lambda h: h.update(x=h.pop("scores.1"))), "'x' does not belong"),
    "other kind": (changed(lambda h: h.update({"x.1": h.pop("scores.1")})), r"'x\.1' does not belong"),
    "leading zero": (changed(lambda h: h.update({"scores.01": h.pop("scores.1")})), r"'scores\.01' does not belong"),
    "many digits": (changed(lambda h: h.update({f"scores.{'1' * 9999}": h.pop("scores.1")})), "does not belong"),
    "tensor missing": (changed(drop("experts.0")), r"'experts\.0' is missing"),
    "dtype": (changed(entry("experts.1", dtype="U16", shape=[5, 2, 3])), r"'experts\.1' is U16"),
    "dtype a number": (changed(entry("experts.1", dtype=8)), r"'experts\.1' has a malformed entry"),
    "shape": (
        changed(entry("experts.1", shape=[5, 3, 2])),
        r"'experts\.1' is U8 \[5, 3, 2\]; it must be U8 \[n, 2, 3\]",
    ),
    "no tokens": (changed(entry("experts.1", shape=[0, 2, 3])), "at least one row"),
    "negative shape": (changed(entry("experts.1", shape=[-5, 2, 3])), "malformed entry"),
    "offsets turned": (changed(entry("experts.1", data_offsets=[90, 60])), "bytes 90 to 60 cannot be 30 bytes"),
    "offset huge": (changed(entry("experts.1", data_offsets=[2**63, 2**63 + 30])), "malformed entry"),
    "overlap": (
        changed(lambda h: h["experts.1"].update(data_offsets=[n - 1 for n in h["experts.1"]["data_offsets"]])),
        "does not follow",
    ),
    "rows differ": (
        changed(lambda h: h.update({"token_ids.0": h["token_ids.1"], "token_ids.1": h["token_ids.0"]})),
        r"'token_ids\.0' has 5 rows, 'experts\.0' has 3",
    ),
    "id out of range": (changed_data("experts.1", 0, b"\x08"), r"tensor 'experts\.1': token 0, layer 0: id 8"),
    "id twice": (changed_data("experts.1", 0, b"\x03\x03"), r"tensor 'experts\.1': token 0, layer 0: expert 3 twice"),
    "gap": (changed_data("experts.1", 3, b"\xff"), r"tensor 'experts\.1': token 0, layer 1: place 0 has no expert"),
    "weight": (changed_data("weights.1", 0, b"\x00\x7e"), r"tensor 'weights\.1': .*nan is not finite"),
    "score beyond": (changed_data("scores.1", 2 * (8 + 6), b"\x00\x3c"), r"tensor 'scores\.1': .* layer 1, place 6"),
    "phase": (span(0, 0, 3), r"tensor 'spans\.1': row 0 is \[3, 0, 0, 2\]"),
    "first step": (span(0, 1, -1), "which is no span"),
    "stride": (span(0, 2, 2), "which is no span"),
    "count": (span(0, 3, 0), "which is no span"),
    "count huge": (span(0, 3, 2**62), "which is no span"),
    "counts": (span(0, 3, 3), "is about 6 tokens, there are 5"),
    "steps descend": (span(0, 1, 9), r"tensor 'spans\.1': token 2: step 1 comes after step 9"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_damaged_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = CORRUPT[case]
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(changed(lambda header: header["__metadata__"].update(moert_trace="2")))
    with pytest.raises(ConfigError, match="version 2 of the trace format, this moert knows up to 1: update"):
        TraceFile(path)


def test_keys_that_are_not_known_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for change in (lambda inner: inner.update(more=1), layer(more=2)):
        path.write_bytes(changed_inner(change))
        read_all(path)


def test_another_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ConfigError, match=r"no trace: .*moert trace import"):
        TraceFile(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="No such file"):
        TraceFile(tmp_path / "missing")
    with pytest.raises(TransferError, match="Is a directory"):
        TraceFile(tmp_path)


def test_a_file_that_is_cut_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(SOUND)
    with TraceFile(path) as trace:
        trace[1]
        os.truncate(path, len(SOUND) - 3)
        with pytest.raises(CorruptFileError, match="was cut while in use"):
            trace[1]


@given(st.data())
def test_no_damage_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    spoiled = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(SOUND) - 1))
        spoiled[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "spoiled"
    path.write_bytes(spoiled[: data.draw(st.sampled_from([None, None, data.draw(st.integers(0, len(SOUND)))]))])
    with contextlib.suppress(MoertError):
        read_all(path)
