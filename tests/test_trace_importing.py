"""Files become one trace: recognised, joined, real ones among them; of a bad one nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from trace_support import BIGMOE, WASTE, assert_same, npz_arrays, read_with, real_trace, replaced

from moert.errors import ConfigError, CorruptFileError, TransferError
from moert.plugins import available
from moert.trace import (
    NO_EXPERT,
    Phase,
    TraceFile,
)
from moert.trace.importers.base import Importer, ImportOptions
from moert.trace.importing import PACKAGE, import_traces, load_importer, recognise


def test_every_importer_is_found_and_described() -> None:
    names = available(PACKAGE)
    assert names == ["bigmoe", "esft", "hf_router_logits", "npz", "sglang", "vllm", "waste"]
    for name in names:
        importer = load_importer(name)
        assert isinstance(importer, Importer)
        assert importer.about


@pytest.mark.parametrize("name", available(PACKAGE))
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04garbage", b"{", b"\xff\xfe", None])
def test_other_files_are_not_recognised_and_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    importer = load_importer(name)
    assert not importer.recognises(path)
    assert not importer.recognises(tmp_path / "missing")
    options = ImportOptions(experts=8, top_k=2)
    for place in (path, tmp_path / "missing"):
        with pytest.raises((CorruptFileError, TransferError)) as caught:
            list(importer.read(place, options)[1])
        assert str(place) in str(caught.value)


def test_a_trace_is_said_to_be_one_already(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(WASTE)
    import_traces([tmp_path / "a.jsonl"], tmp_path / "ours", ImportOptions(experts=8))
    with pytest.raises(ConfigError, match="ours is a trace of moert's already"):
        recognise(tmp_path / "ours")


def test_several_files_become_one_trace(tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out.safetensors"
    first.write_text(WASTE)
    second.write_text(WASTE)
    done = []
    made = import_traces(
        [first, second], out, ImportOptions(experts=8, model="m"), progress=lambda *share: done.append(share)
    )
    assert (made.formats, made.sequences, made.tokens) == (("waste", "waste"), 2, 6)
    with TraceFile(out) as trace:
        assert trace.header == made.header
        assert [sequence.steps.tolist() for sequence in trace] == [[0, 1, 2], [3, 4, 5]]
        assert [sequence.name for sequence in trace] == ["a", "b"]
    assert all(0 <= share <= total for share, total in done)


def test_files_that_do_not_agree(tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out"
    first.write_text(WASTE)
    second.write_text('{"tok": 0, "layers": [[1, 2]]}\n')
    with pytest.raises(ConfigError, match=r"b.jsonl does not belong into one trace with .*a.jsonl: 1 layers, not 2;"):
        import_traces([first, second], out, ImportOptions(experts=8))
    second.write_text('{"tok": 0, "layers": [[1], [2]]}\n')
    with pytest.raises(ConfigError, match=r"top_k=1.*, not LayerInfo.*top_k=2"):
        import_traces([first, second], out, ImportOptions(experts=8))
    models = [BIGMOE, BIGMOE.replace("Tiny", "Other")]
    for path, text in zip((first, second), models, strict=True):
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"model 'Other.gguf', not 'Tiny.gguf'"):
        import_traces([first, second], out, ImportOptions())
    import_traces([first, second], out, ImportOptions(model="same"))


def test_nothing_is_written_of_a_malformed_file(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out"
    good.write_text(WASTE)
    bad.write_text(replaced(WASTE, 3, "{"))
    out.write_text("before")
    with pytest.raises(CorruptFileError, match="line 3"):
        import_traces([good, bad], out, ImportOptions(experts=8))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl", "out"]
    assert out.read_text() == "before"


def test_what_is_left_out(tmp_path: Path) -> None:
    path, out = tmp_path / "x.npz", tmp_path / "out"
    np.savez(path, **npz_arrays())
    import_traces([path], out, ImportOptions(experts=8), without=["weights"])
    with TraceFile(out) as trace:
        assert trace[0].weights is None
    with pytest.raises(ConfigError, match="'experts' is none of"):
        import_traces([path], out, ImportOptions(experts=8), without=["experts"])
    with pytest.raises(ConfigError, match="no file"):
        import_traces([], out, ImportOptions())


def test_an_unknown_file_lists_what_was_tried(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"tried: bigmoe .*esft .*hf_router_logits .*npz .*sglang .*vllm .*waste"):
        recognise(path)
    with pytest.raises(ConfigError, match="does not exist"):
        recognise(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no importer named 'no'"):
        import_traces([path], tmp_path / "out", ImportOptions(), format="no")


REAL = [
    ("npz", ("gpt-oss-20b", "gpt-oss-20b_mmlu_pro_test.npz"), {"experts": 32}, (24, 4)),
    ("npz", ("deepseek-v2-lite", "deepseek_v2_lite_law.npz"), {"experts": 64}, (26, 6)),
    ("waste", ("waste", "trace_olmoe_299.jsonl"), {"experts": 64}, (16, 8)),
    ("waste", ("waste", "trace_kimi_300.jsonl"), {"experts": 256}, (26, 8)),
    ("bigmoe", ("bigmoe", "qwen.route.csv"), {}, (48, 6)),
    ("bigmoe", ("bigmoe", "gemma.route.csv"), {}, (30, 6)),
    ("bigmoe", ("bigmoe", "gptoss.route.csv"), {}, (36, 2)),
]


@pytest.mark.parametrize(("name", "parts", "options", "shape"), REAL, ids=[parts[1] for _, parts, _, _ in REAL])
def test_real_traces(
    tmp_path: Path, name: str, parts: tuple[str, ...], options: dict[str, int], shape: tuple[int, int]
) -> None:
    path, out = real_trace(*parts), tmp_path / "out"
    assert recognise(path) == name
    made = import_traces([path], out, ImportOptions(**options))  # type: ignore[arg-type]
    assert (len(made.header.layers), made.header.top_k) == shape
    _, expected = read_with(name, path, **options)
    with TraceFile(out) as trace:
        assert trace.n_tokens == made.tokens
        for found, sequence in zip(trace, expected, strict=True):
            if sequence.weights is not None:  # the file's own digits need not fit 16 bits
                np.testing.assert_allclose(found.weights, sequence.weights, rtol=2**-11, atol=3e-8)
                sequence = type(sequence)(**{**vars(sequence), "weights": found.weights})
            assert_same(found, sequence)


def test_a_real_prompt_is_one_step_and_its_last_layer_one_token() -> None:
    header, (sequence,) = read_with("bigmoe", real_trace("bigmoe", "gptoss.route.csv"))
    assert sequence.phases.tolist() == [Phase.PREFILL] * 85 + [Phase.DECODE] * 64
    assert sequence.steps.tolist() == [0] * 85 + list(range(1, 65))
    ran = (sequence.experts != NO_EXPERT).all(axis=2)
    assert ran[:, :-1].all()
    assert ran[:, -1].tolist() == [False] * 84 + [True] * 65
    assert header.layers[0].expert_bytes == 13_219_200
