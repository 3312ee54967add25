"""What is written into a trace file is read back, by us and by whoever has only the format's description."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from trace_support import assert_same, make_header, random_sequence

from moert.errors import ConfigError, TransferError
from moert.trace import NO_EXPERT, LayerInfo, Phase, Sequence, Trace, TraceFile, TraceHeader, TraceWriter
from moert.trace.layout import from_spans, to_spans

ROOT = Path(__file__).resolve().parent.parent
HEADER = make_header((8, 2), (300, 3), model="org/model", config_hash="abc", sampled=False)


def write(path: Path, header: TraceHeader, *sequences: Sequence, exact: bool = False) -> Path:
    with TraceWriter(path, header, exact=exact) as writer:
        for sequence in sequences:
            writer.add(sequence)
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def documented() -> Any:
    """The reader that the description of the format prints."""
    page = (ROOT / "docs" / "trace-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return SimpleNamespace(**names).read_trace


@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layer = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 9))))
    header = replace(
        make_header(*data.draw(st.lists(layer, min_size=1, max_size=4))),
        model=data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        sampled=data.draw(st.sampled_from([None, True, False])),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sequences = [
        random_sequence(
            header,
            tokens := data.draw(st.integers(1, 12)),
            rng,
            optional=data.draw(st.sets(st.sampled_from(["weights", "scores", "token_ids"]))),
            num_prompt=data.draw(st.integers(0, tokens)),
            first_step=data.draw(st.integers(0, 2**40)),
            gaps=data.draw(st.booleans()),
            name=data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        )
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    path = write(tmp_path_factory.getbasetemp() / "trace.safetensors", header, *sequences)
    memory = Trace(header, sequences)
    with TraceFile(path) as trace:
        assert trace.header == memory.header == header
        assert len(trace) == len(memory) == len(sequences)
        assert trace.n_tokens == memory.n_tokens == sum(len(sequence.steps) for sequence in sequences)
        for index, (found, expected) in enumerate(zip(trace, sequences, strict=True)):
            assert_same(found, expected)
            summary = trace.summary(index)
            assert (summary.name, summary.n_tokens) == (expected.name, len(expected.steps))
            for phase in Phase:
                assert summary.tokens_by_phase[phase] == (expected.phases == phase).sum()
            steps = [step for first, last in summary.step_ranges for step in range(first, last + 1)]
            assert steps == sorted(set(expected.steps.tolist()))
            assert summary.has_weights == (expected.weights is not None)
            assert summary.has_scores == (expected.scores is not None)
            assert summary.has_token_ids == (expected.token_ids is not None)


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 0, 0, 1, 1, 1, 2, 5])), min_size=1, max_size=40)
)
def test_spans_are_phases_and_steps(tokens: list[tuple[int, int]]) -> None:
    phases = np.array([phase for phase, _ in tokens], dtype=np.uint8)
    steps = np.cumsum([apart for _, apart in tokens]).astype(np.int64)
    spans = to_spans(phases, steps)
    found_phases, found_steps = from_spans(spans)
    np.testing.assert_array_equal(found_phases, phases)
    np.testing.assert_array_equal(found_steps, steps)
    assert len(spans) <= len(tokens)


def test_a_prompt_and_what_follows_are_two_spans() -> None:
    phases = np.array([0] * 28 + [1] * 128, dtype=np.uint8)
    steps = np.array([5] * 28 + list(range(6, 134)), dtype=np.int64)
    assert to_spans(phases, steps).tolist() == [[0, 5, 0, 28], [1, 6, 1, 128]]


@pytest.mark.parametrize("experts", [255, 256])
def test_the_documented_reader_reads_the_same(
    tmp_path: Path, rng: np.random.Generator, documented: Any, experts: int
) -> None:
    header = make_header((experts, 3), (7, 2))
    every = ["weights", "scores", "token_ids"]
    sequences = [
        random_sequence(header, 9, rng, optional=every, num_prompt=4, gaps=True, name='a "name" \\ é'),
        random_sequence(header, 1, rng, first_step=9),
    ]
    path = write(tmp_path / "t", header, *sequences)
    found_header, found = documented(path)
    assert found_header["layers"][1] == {
        "name": "model.layers.1.experts",
        "num_experts": 7,
        "top_k": 2,
        "native_top_k": None,
        "expert_bytes": 0,
    }
    assert found_header["names"] == [sequence.name for sequence in sequences]
    none = 255 if experts == 255 else 65535
    for arrays, sequence in zip(found, sequences, strict=True):
        ids = arrays["experts"].astype(np.int64)
        np.testing.assert_array_equal(np.where(ids == none, NO_EXPERT, ids), sequence.experts)
        assert arrays["experts"].dtype == (np.uint8 if experts == 255 else np.uint16)
        assert arrays["steps"] == sequence.steps.tolist()
        assert arrays["phases"] == sequence.phases.tolist()
        for kind in every:
            expected = getattr(sequence, kind)
            assert (kind in arrays) == (expected is not None)
            if expected is not None:
                np.testing.assert_array_equal(arrays[kind], expected)


def test_the_bytes_of_a_small_trace(tmp_path: Path) -> None:
    header = TraceHeader((LayerInfo("e", 4, 2),), source="x")
    sequence = Sequence(
        experts=np.array([[[3, 1]], [[0, NO_EXPERT]]], dtype=np.int32),
        steps=np.array([0, 1]),
        phases=np.array([1, 1], dtype=np.uint8),
        weights=np.array([[[0.75, 0.25]], [[1, 0]]], dtype=np.float32),
        token_ids=np.array([-1, 2]),
    )
    text = (
        rb'{"__metadata__":{"moert_trace":"1","header":"{\"model\":\"\",\"config_hash\":\"\",\"sampled\":null,'
        rb"\"source\":\"x\",\"layers\":[{\"name\":\"e\",\"num_experts\":4,\"top_k\":2,\"native_top_k\":null,"
        rb'\"expert_bytes\":0}],\"sequences\":1}"},"spans.0":{"dtype":"I64","shape":[1,4],"data_offsets":[0,32]},'
        rb'"token_ids.0":{"dtype":"I32","shape":[2],"data_offsets":[32,40]},'
        rb'"weights.0":{"dtype":"F16","shape":[2,1,2],"data_offsets":[40,48]},'
        rb'"experts.0":{"dtype":"U8","shape":[2,1,2],"data_offsets":[48,52]}}'
    )
    text += b" " * (-len(text) % 8)
    data = b"".join(
        [
            *(number.to_bytes(8, "little") for number in (1, 0, 1, 2)),
            b"\xff\xff\xff\xff\x02\x00\x00\x00",
            b"\x00\x3a\x00\x34\x00\x3c\x00\x00",
            b"\x03\x01\x00\xff",
        ]
    )
    path = write(tmp_path / "t", header, sequence)
    assert path.read_bytes() == len(text).to_bytes(8, "little") + text + data


def test_the_safetensors_library_reads_it(tmp_path: Path, rng: np.random.Generator) -> None:
    odd = random_sequence(make_header((9, 3)), 3, rng, optional=["weights", "token_ids"])
    path = write(tmp_path / "t", make_header((9, 3)), odd, odd, odd)
    with safe_open(path, framework="np") as file:
        assert file.metadata().keys() == {"moert_trace", "header"}
        for index in range(3):
            np.testing.assert_array_equal(file.get_tensor(f"experts.{index}"), odd.experts)
    assert load_file(path)["weights.2"].numpy().tolist() == odd.weights.tolist()  # type: ignore[union-attr]


def test_error_of_sixteen_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    header = make_header((64, 8))
    sequence = random_sequence(header, 500, rng, optional=["weights"])
    weights = (10.0 ** rng.uniform(-9, 1, sequence.experts.shape)).astype(np.float32)
    sequence = replace(sequence, weights=weights)
    with TraceFile(write(tmp_path / "t", header, sequence)) as trace:
        error = np.abs(trace[0].weights - weights)
    assert (error <= np.maximum(weights * 2.0**-11, 3e-8)).all()
    assert (error > weights * 2.0**-12).any(), "else the format promises too little"
    with TraceFile(write(tmp_path / "t", header, sequence, exact=True)) as trace:
        np.testing.assert_array_equal(trace[0].weights, weights)


def test_a_float_too_large_for_sixteen_bits_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    sequence = random_sequence(HEADER, 3, rng, optional=["weights"])
    sequence = replace(sequence, weights=np.where(sequence.experts >= 0, 7e4, 0).astype(np.float32))
    with pytest.raises(ConfigError, match=r"weights: 70000.0 does not fit 16 bits"):
        write(tmp_path / "t", HEADER, sequence)
    write(tmp_path / "t", HEADER, sequence, exact=True)


def test_sequences_by_number_like_a_list(tmp_path: Path, rng: np.random.Generator) -> None:
    sequences = [random_sequence(HEADER, tokens, rng) for tokens in (1, 2, 3)]
    with TraceFile(write(tmp_path / "t", HEADER, *sequences)) as trace:
        for memory in (trace, Trace(HEADER, sequences)):
            assert len(memory[-1].steps) == len(memory[np.int64(2)].steps) == 3
            for index in (3, -4):
                with pytest.raises(IndexError):
                    memory[index]
            with pytest.raises(TypeError):
                memory["0"]  # type: ignore[index]
        again = pickle.loads(pickle.dumps(trace))
        assert_same(again[1], sequences[1])
        again.close()


def test_only_the_sequence_asked_for_is_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header((64, 8))
    path = write(tmp_path / "t", header, *(random_sequence(header, 50, rng) for _ in range(20)))
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])  # type: ignore[func-returns-value]
    with TraceFile(path) as trace:
        header_bytes = sum(read)
        read.clear()
        assert trace.n_tokens == 1000
        trace.summary(7)
        assert sum(read) == 32
        read.clear()
        trace[7]
        assert sum(read) == 32 + 50 * 8
    assert header_bytes < path.stat().st_size / 2


class Break(Exception):
    """What a test breaks off with."""


def fail() -> None:
    raise Break


def write_and(then: Callable[[], object], path: Path, rng: np.random.Generator) -> None:
    """Write a trace, and do something else before it is complete."""
    with TraceWriter(path, HEADER) as writer:
        writer.add(random_sequence(HEADER, 100, rng))
        then()


def test_nothing_is_left_after_an_exception(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "t"
    path.write_text("before")
    with pytest.raises(Break):
        write_and(fail, path, rng)
    assert os.listdir(tmp_path) == ["t"]
    assert path.read_text() == "before"


def test_the_file_appears_when_it_is_complete(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "t"
    with TraceWriter(path, HEADER) as writer:
        writer.add(random_sequence(HEADER, 5000, rng))
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == ["t"]
    writer.close()
    assert len(TraceFile(path)) == 1


def test_a_full_disk(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    path.write_text("before")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TransferError, match="No space left"):
        write_and(lambda: monkeypatch.setattr(os, "posix_fallocate", full), path, rng)
    assert os.listdir(tmp_path) == ["t"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("step", ["pwrite", "rename", "fsync"])
def test_a_disk_that_fails_at_the_end(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(TransferError):
        write_and(lambda: monkeypatch.setattr(os, step, broken), tmp_path / "t", rng)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TransferError):
        TraceWriter(tmp_path / "missing" / "t", HEADER)
    with pytest.raises(ConfigError, match="is a folder"):
        TraceWriter(tmp_path, HEADER)


def test_an_invalid_sequence_does_not_spoil_the_trace(tmp_path: Path, rng: np.random.Generator) -> None:
    good = random_sequence(HEADER, 3, rng)
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        writer.add(good)
        with pytest.raises(ConfigError):
            writer.add(replace(good, steps=good.steps[::-1].copy()))
        writer.add(good)
    with TraceFile(tmp_path / "t") as trace:
        assert [len(sequence.steps) for sequence in trace] == [3, 3]


def test_more_sequences_than_a_header_holds(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moert.trace.writer.MAX_HEADER_BYTES", 20_000)
    names = ['"\\\n\x00é' * 5, "", "plain"]
    sequences = [random_sequence(HEADER, 1, rng, name=name, optional=["weights", "scores"]) for name in names]
    with TraceWriter(tmp_path / "t", HEADER) as writer, pytest.raises(ConfigError, match="start another file"):
        list(map(writer.add, itertools.cycle(sequences)))
    with TraceFile(tmp_path / "t") as trace:
        assert 10 < len(trace) < 1000
        assert int.from_bytes((tmp_path / "t").read_bytes()[:8], "little") <= 20_000


def test_a_trace_without_sequences(tmp_path: Path) -> None:
    with TraceFile(write(tmp_path / "t", HEADER)) as trace:
        assert (len(trace), trace.n_tokens, list(trace)) == (0, 0, [])


def test_a_file_that_is_left_open_is_quiet_when_the_interpreter_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "t", HEADER)
    # Held by `os`, it goes when that module's names, `os.close` among them, have gone already.
    code = "import os, sys; from moert.trace import TraceFile; os.held = TraceFile(sys.argv[1])"
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "")


def test_a_file_that_could_not_be_opened_goes_quietly(tmp_path: Path) -> None:
    code = (
        "import contextlib, sys; from moert.trace import TraceFile\n"
        "with contextlib.suppress(Exception): TraceFile(sys.argv[1])"
    )
    child = subprocess.run([sys.executable, "-c", code, tmp_path / "t"], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "")
