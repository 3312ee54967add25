"""`moert suit`: the verdict follows from the numbers, and the numbers are those of the simulator."""

from __future__ import annotations

from pathlib import Path

import cli_support
import numpy as np
import pytest
from cli_support import Cli, checkpoint, document_of
from hypothesis import given
from hypothesis import strategies as st
from report_support import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, routing, trace, write

from moert.simulate import simulate
from moert.suit import Forecast, enough_for, sweet_spot
from moert.suit.published import SRP_16, neighbours
from moert.trace import Sequence, Trace

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")


cli, path = cli_support.cli, cli_support.path


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


def test_forecasts_are_those_of_the_simulator(cli: Cli, path: Path) -> None:
    document = document_of(cli, "suit", path)
    slots = [one["slots"] for one in document["forecasts"]]
    assert slots == [2, 3, 4, 5, 6, 8, 12, 16], "multiples of two experts a token, three quarters and all of sixteen"
    for one in document["forecasts"]:
        own, lru, best = (simulate(path, policy, one["slots"]) for policy in ("ema", "lru", "belady"))
        assert (one["hit_rate"], one["lru_hit_rate"], one["best_hit_rate"]) == (
            own.hit_rate,
            lru.hit_rate,
            best.hit_rate,
        )
        assert one["ratio"] == one["slots"] / TOP_K
        assert one["share"] == one["slots"] / EXPERTS
        assert one["nbytes"] == one["slots"] * LAYERS * EXPERT_BYTES
        assert one["misses_per_token"] * EXPERT_BYTES == pytest.approx(one["fetched_bytes_per_token"])
        assert one["interval"] == list(own.interval() or ())
    assert document["counted"] == "decode"
    assert document["at_two"]["slots"] == 4


def test_the_verdict_says_what_was_found(cli: Cli, path: Path) -> None:
    document = document_of(cli, "suit", path)
    verdict = " ".join(document["verdict"])
    at_two = document["at_two"]
    assert "At 2x the experts that a token activates, 4 of 16 in each layer" in verdict
    assert f"you will hit {100 * at_two['hit_rate']:.1f} % with ema" in verdict
    assert f"MIN, which knows the future, hits {100 * at_two['best_hit_rate']:.1f} %" in verdict
    assert "These slots take 12.0 MiB for all layers, 25.0 % of all experts." in verdict
    per_s = 25e9 / at_two["fetched_bytes_per_token"]
    assert f"{per_s:,.0f} from PCIe 4.0 x16" in verdict
    best = document["sweet_spot"]
    gain = best["hit_rate"] - best["share"]
    assert document["suits"] == ("well" if gain >= 0.45 else "partly" if gain >= 0.25 else "hardly")
    for sentence in document["verdict"]:
        assert sentence in cli("suit", path).out


def test_a_model_that_chooses_at_random_hardly_suits(cli: Cli, tmp_path: Path) -> None:
    made = trace(num_sequences=1)
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((600, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.int32)
    sequence = Sequence(experts, np.arange(600), np.ones(600, np.uint8))
    document = document_of(cli, "suit", write(tmp_path / "random", Trace(made.header, [sequence])))
    assert document["suits"] == "hardly"
    # Which experts a cache holds is then all the same, but for those a step has just admitted.
    for one in document["forecasts"]:
        assert one["hit_rate"] == pytest.approx(one["share"], abs=0.03)


def test_a_trace_of_prompts_is_counted_whole(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts", trace(num_tokens=8, prompt=8))
    assert document_of(cli, "suit", path)["counted"] == "all"


def test_files_of_other_programs(cli: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", experts_000=routing(1, 40).astype(np.uint8))
    document = document_of(cli, "suit", tmp_path / "other.npz", "--experts", EXPERTS)
    assert document["at_two"]["nbytes"] is None
    assert document["forecasts"][0]["interval"] is None
    assert document_of(cli, "suit", tmp_path / "other.npz", "--experts", EXPERTS, "--expert-bytes", "2MiB")["at_two"][
        "nbytes"
    ] == 4 * LAYERS * (2 << 20)


def test_a_model_runs_over_a_text(cli: Cli, root: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\n\nthree\n")
    document = document_of(
        cli, "suit", checkpoint(root, "olmoe"), "--prompts", prompts, "--max-new-tokens", 6, "--host-memory", "50%"
    )
    assert (document["sequences"], document["num_layers"], document["num_experts"]) == (2, 2, 8)
    assert document["counted"] == "decode"
    # The last token of a generation is not run again.
    assert document["tokens"] == len("one two") + len("three") + 2 * 5
    assert document["at_two"]["nbytes"] > 0


def test_the_seed_makes_intervals_repeatable(cli: Cli, path: Path) -> None:
    first, again, other = (document_of(cli, "suit", path, "--seed", seed)["segments"] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [one["srp"] for one in first] == [one["srp"] for one in other]


def test_plot(cli: Cli, path: Path, tmp_path: Path) -> None:
    ran = cli("suit", path, "--plot", tmp_path / "out.png")
    assert ran.code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'out.png'}" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "clock"], "no policy named 'clock'"),
        (["--policy", "belady"], "cannot run live"),
        (["--expert-bytes", "0"], "--expert-bytes"),
        (["--plot", "out.svg"], "must end in .png"),
        (["--prompts", "some.txt"], "--prompts is for a model"),
    ],
)
def test_bad_options(arguments: list[str], message: str, cli: Cli, path: Path) -> None:
    assert message in cli("suit", path, *arguments).error


def test_bad_sources(cli: Cli, root: Path, tmp_path: Path) -> None:
    folder = checkpoint(root, "olmoe")
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "has no line with text" in cli("suit", folder, "--prompts", tmp_path / "none.txt").error
    assert "UTF-8" in cli("suit", folder, "--prompts", tmp_path / "bytes.txt").error
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert "is a conversation" in cli("suit", folder, "--prompts", tmp_path / "talk.jsonl").error
    assert "absent.txt" in cli("suit", folder, "--prompts", tmp_path / "absent.txt").error
    assert "--experts" in cli("suit", folder, "--experts", 8).error
    assert "none.txt" in cli("suit", tmp_path / "none.txt").error
    assert "./absent" in cli("suit", "./absent").error
    assert "does not exist" in cli("suit", "absent.safetensors").error
    assert "no experts" in cli("suit", checkpoint(root, "llama")).error


sizes = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


@given(sizes, st.floats(0, 1))
def test_sweet_spot_and_target(pairs: list[tuple[float, float]], target: float) -> None:
    ordered = sorted(pairs)
    forecasts = [
        Forecast(1.0, place, share, None, rate, None, 1.0, 0.0, 0.0, None)
        for place, (share, rate) in enumerate(ordered)
    ]
    gains = [rate - share for share, rate in ordered]
    best = sweet_spot(forecasts)
    assert best.hit_rate - best.share == max(gains)
    enough = enough_for(forecasts, target)
    fitting = [one.slots for one in forecasts if one.hit_rate >= target]
    assert (None if enough is None else enough.slots) == (fitting[0] if fitting else None)


def test_neighbours_among_published_models() -> None:
    assert neighbours(0.4) == ("OLMoE", "DeepSeek-V2-Lite")
    assert neighbours(0.509) == ("OLMoE", "DeepSeek-V2-Lite")
    assert neighbours(0.99) == (None, "LLaMA-MoE-v2")
    assert neighbours(0.0) == ("Switch", None)
    assert list(SRP_16.values()) == sorted(SRP_16.values(), reverse=True)
