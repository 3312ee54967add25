"""`moert run`: text as it comes, numbers that are those of the model's own statistics."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import PROMPT, Cli, checkpoint, plain_tokens, tokenizer
from own_threads import check_no_disk_threads, disk_threads

import moert
from moert.hf.text import Generation

KEYS = {
    "text",
    "tokens",
    "tokens_per_s",
    "time_to_first_token_s",
    "hits",
    "misses",
    "hit_rate",
    "bytes_read",
    "stall_s",
    "peak_rss_bytes",
    "read_s",
    "compute_s",
    "resident_bytes",
    "expert_bytes",
    "slot_bytes",
    "load_s",
    "policy",
    "model",
}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_document_has_the_tokens_of_transformers_and_the_counts_of_stats(family: str, cli: Cli, root: Path) -> None:
    folder = checkpoint(root, family)
    # Without predictions, since what is prefetched is read or not as time allows.
    options = ("--host-memory", "25%", "--predictor", "none")
    ran = cli("run", folder, PROMPT, *options, "--max-new-tokens", 12, "--json")
    assert ran.code == 0
    assert ran.err == ""
    document = ran.document
    assert document.keys() >= KEYS
    expected = plain_tokens(folder, PROMPT, 12)
    assert document["token_ids"] == expected
    assert document["tokens"] == 12
    assert document["prompt_tokens"] == len(PROMPT)
    assert document["text"] == tokenizer().decode(expected)
    assert (document["policy"], document["model"], document["dtype"]) == ("ema", str(folder), "float32")
    with moert.load(folder, host_memory="25%", predictor="none") as model:
        ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
        stats = moert.stats(model).as_dict()
    for name in ("hits", "misses", "hit_rate", "bytes_read", "expert_bytes", "resident_bytes", "slot_bytes"):
        assert document[name] == stats[name], name
    assert document["misses"] > 0
    for name in ("tokens_per_s", "time_to_first_token_s", "load_s", "compute_s", "read_s", "peak_rss_bytes"):
        assert document[name] > 0, name
    assert "layers" not in document


def test_text_is_streamed_to_standard_output_and_nothing_else(cli: Cli, root: Path) -> None:
    folder = checkpoint(root)
    ran = cli("run", folder, PROMPT, "--max-new-tokens", 9)
    assert ran.code == 0
    assert ran.err == ""
    text = str(tokenizer().decode(plain_tokens(folder, PROMPT, 9)))
    assert ran.out == (text if text.endswith("\n") else text + "\n")


def test_text_comes_in_pieces_before_the_end(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("moert.cli.run._print_piece", pieces.append)
    assert cli("run", checkpoint(root), PROMPT, "--max-new-tokens", 40).code == 0
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer().decode(plain_tokens(checkpoint(root), PROMPT, 40))


def test_prompt_from_standard_input(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    document = cli("run", checkpoint(root), "-", "--max-new-tokens", 4, "--json").document
    assert document["token_ids"] == plain_tokens(checkpoint(root), PROMPT, 4)


def test_a_seed_repeats_what_was_drawn(cli: Cli, root: Path) -> None:
    def drawn(*options: object) -> dict[str, Any]:
        return cli("run", checkpoint(root), PROMPT, "--max-new-tokens", 12, "--json", *options).document

    first = drawn("--temperature", 1.5, "--seed", 7)
    assert first["sampling"] == {"seed": 7, "temperature": 1.5, "top_p": None}
    assert drawn("--temperature", 1.5, "--seed", 7)["token_ids"] == first["token_ids"]
    assert drawn("--temperature", 1.5, "--seed", 8)["token_ids"] != first["token_ids"]
    unseeded = drawn("--top-p", 0.9)
    again = drawn("--top-p", 0.9, "--seed", unseeded["sampling"]["seed"])
    assert again["token_ids"] == unseeded["token_ids"], "the seed that was drawn is told"
    greedy = drawn("--temperature", 0)
    assert greedy["sampling"] is None
    assert greedy["token_ids"] == plain_tokens(checkpoint(root), PROMPT, 12)


def test_a_budget_changes_the_hits_and_not_the_tokens(cli: Cli, root: Path) -> None:
    # What is being read ahead at the end would be no resident yet.
    how = ("--predictor", "none", "--max-new-tokens", 8, "--json")
    small, large = (
        cli("run", checkpoint(root), PROMPT, "--host-memory", share, *how).document for share in ("25%", "100%")
    )
    assert small["token_ids"] == large["token_ids"]
    assert small["hit_rate"] < large["hit_rate"] == 1
    assert small["resident_bytes"] * 4 == large["resident_bytes"] == large["expert_bytes"]


def test_chat_template_is_used_where_there_is_one(cli: Cli, root: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint(root), tmp_path / "chat"))
    words = tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    words.save_pretrained(folder)
    lengths = [
        cli("run", folder, "hello", "--max-new-tokens", 1, "--json", *option).document["prompt_tokens"]
        for option in ([], ["--chat"], ["--no-chat"])
    ]
    assert lengths == [len("<user>hello<assistant>"), len("<user>hello<assistant>"), len("hello")]


def test_statistics_are_a_table_on_standard_error(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("run", checkpoint(root), PROMPT, "--host-memory", "25%", "--max-new-tokens", 8, "--predictor", "none")
    ran = cli(*arguments, "--stats")
    assert ran.code == 0
    document = cli(*arguments, "--stats", "--json").document
    assert [layer["name"] for layer in document["layers"]] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    rows = {line.split()[0]: line.split()[1:3] for line in ran.err.splitlines() if line.strip()}
    for number, layer in enumerate(document["layers"]):
        assert rows[str(number)] == [str(layer["hits"]), str(layer["misses"])]
    assert rows["all"] == [str(document["hits"]), str(document["misses"])]
    assert "tokens/s" in ran.err
    assert max(map(len, ran.err.splitlines())) <= 80


def test_rate_is_of_the_tokens_after_the_first() -> None:
    made = Generation(prompt_tokens=3, token_ids=[1, 2, 3], text="", time_to_first_token_s=9.0, decode_s=0.5)
    assert made.tokens_per_s == 4


def test_one_token_has_no_rate(cli: Cli, root: Path) -> None:
    assert cli("run", checkpoint(root), PROMPT, "--max-new-tokens", 1, "--json").document["tokens_per_s"] is None
    assert cli("run", checkpoint(root), PROMPT, "--max-new-tokens", 1, "--stats").code == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_model_is_closed_however_it_ends(
    error: type[BaseException], cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    close = moert.close

    def fail(_text: str) -> None:
        assert disk_threads() > 0
        raise error

    def note(model: Any) -> None:
        close(model)
        closed.append(True)

    monkeypatch.setattr("moert.cli.run._print_piece", fail)
    monkeypatch.setattr("moert.cli._forget_stdout", lambda: None)
    monkeypatch.setattr(moert, "close", note)
    ran = cli("run", checkpoint(root), PROMPT, "--host-memory", "25%")
    assert ran.code == (130 if error is KeyboardInterrupt else 1)
    assert closed == [True]
    assert (ran.out, ran.err) == ("", "")
    check_no_disk_threads()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moert")]
