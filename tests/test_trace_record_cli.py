"""`moert trace record`: a file of prompts in, a trace out."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from moert.cli import trace_record
from moert.cli.trace_record import read_prompts, record
from moert.errors import ConfigError
from moert.hf.forwards import Rows
from moert.trace.file import TraceFile
from moert.trace.sequence import Phase

PROMPTS = "Once upon a time\n\nThe little dog ran to the park\nA ball\n"


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(record)
    return app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def test_prompts_are_continued(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.safetensors"
    options = ("--batch", 2, "--max-new-tokens", 6, "--host-memory", "50%", "--json")
    assert run("demo", "--prompts", prompts, "-o", out, *options) == 0
    document = json.loads(capsys.readouterr().out)
    with TraceFile(out) as trace:
        assert [sequence.name for sequence in trace] == ["1", "3", "4"]
        assert trace.header.sampled is True
        assert trace.header.model == "demo"
        phases = [phase for sequence in trace for phase in sequence.phases]
        assert document["decode_tokens"] == phases.count(Phase.DECODE) == 3 * 5
        assert document["padding_tokens"] == phases.count(Phase.PADDING) > 0
        assert document["tokens"] == len(phases)
        assert len({int(sequence.steps[0]) for sequence in trace}) == 2, "two batches"
    assert document["sequences"] == 3
    assert 0 < document["hit_rate"] < 1


def test_sequences_are_in_the_order_of_the_prompts_whoever_keeps_a_cache(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[object] = []
    bind = Rows.bind

    def kept(self: Rows, cache: object) -> None:
        bind(self, cache)
        if not caches:
            caches.append(cache)

    monkeypatch.setattr(Rows, "bind", kept)
    run_batch = trace_record._run

    def then_collect(*args: Any) -> None:
        run_batch(*args)
        gc.collect()

    monkeypatch.setattr(trace_record, "_run", then_collect)
    out = tmp_path / "trace.safetensors"
    assert run("demo", "--prompts", prompts, "-o", out, "--batch", 1, "--max-new-tokens", 3) == 0
    assert caches
    with TraceFile(out) as trace:
        assert [sequence.name for sequence in trace] == ["1", "3", "4"]


def test_texts_are_run_as_they_are(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.safetensors"
    assert run("demo", "--prompts", prompts, "-o", out, "--batch", 3, "--teacher-forced", "--scores") == 0
    with TraceFile(out) as trace:
        assert trace.header.sampled is False
        for sequence in trace:
            assert set(sequence.steps.tolist()) == {0}
            assert Phase.DECODE not in sequence.phases
            assert sequence.scores is not None
            assert sequence.scores.sum(-1) == pytest.approx(1, abs=1e-5)


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    lines = [{"prompt": "a"}, {"text": "b", "id": "second"}, {"messages": messages}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_prompts(path)
    assert [(one.name, one.text) for one in found] == [("1", "a"), ("second", "b"), ("3", None)]
    assert found[2].messages == messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not sound JSON"),
        ("3", "line 2 is no object"),
        ('{"prompt": 3}', "line 2 has no text under"),
        ('{"prompt": ""}', "line 2 has no text under"),
        ('{"messages": []}', "line 2: 'messages' must be"),
        ('{"messages": [{"role": "user"}]}', "line 2: 'messages' must be"),
    ],
)
def test_lines_that_are_no_prompts(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="no line with text"):
        read_prompts(path)
    path.write_bytes(b"a\n\xff")
    with pytest.raises(ConfigError, match=r"no text in UTF-8 \(byte 2\)"):
        read_prompts(path)


def test_what_cannot_be_is_said_before_the_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        run("demo", "--prompts", prompts, "-o", tmp_path / "trace.json")
    with pytest.raises(ConfigError, match="cannot write there"):
        run("demo", "--prompts", prompts, "-o", tmp_path / "no" / "trace.safetensors")
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    with pytest.raises(ConfigError, match="has messages, and this model's tokenizer has no chat template"):
        run("demo", "--prompts", path, "-o", tmp_path / "trace.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
