"""Messages that a device posts to the CPU, the thread that answers them, and what becomes of the answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built_support import run_python
from triton_support import DEVICE, INTERPRETED

from moert.kernels import reference
from moert.kernels.collect import collect
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import matrix
from moert.kernels.gate import Gate
from moert.kernels.mailbox import NOT_COMPUTED, UNANSWERED, Letters, Mailbox, new_letters
from moert.kernels.moe_block import ExpertTable
from moert.kernels.post import post

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

HIDDEN, WIDTH, EXPERTS, PICKS = 72, 48, 9, 4


def pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not INTERPRETED)


class Layer:
    """Experts on the CPU, and what they give."""

    def __init__(self, dtype: torch.dtype, hidden: int = HIDDEN, width: int = WIDTH, n_experts: int = EXPERTS) -> None:
        self.ffn = ExpertFfn(Gate("silu"), hidden, width, dtype)
        self.experts: list[Expert] = []
        for _ in range(n_experts):
            tensors = {"up": torch.randn(2 * width, hidden) * 0.2, "down": torch.randn(hidden, width) * 0.2}
            up, down = (matrix("plain", {name: tensor.to(dtype)}, name) for name, tensor in tensors.items())
            self.experts.append(self.ffn.expert(up, down))
        self.table = ExpertTable(self.ffn, self.experts)

    def sums(self, hidden: torch.Tensor, chosen: list[int], weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(1, hidden.shape[1])
        experts = [self.experts[expert] for expert in chosen]
        self.ffn.run(hidden, experts, [None] * len(chosen), list(weights.split(1)), out)
        return out


class Case:
    """A device's side of two layers, and the CPU's."""

    def __init__(self, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> None:
        torch.manual_seed(1)
        self.dtype = dtype
        self.letters: Letters = new_letters(hidden, PICKS, dtype, DEVICE, pinned)
        self.box = Mailbox(self.letters)
        self.layers = [Layer(dtype, hidden) for _ in range(2)]
        for number, layer in enumerate(self.layers):
            self.box.set_layer(number, layer.ffn, layer.table)
        self.hidden = torch.randn(1, hidden).to(dtype)
        self.own = torch.randn(1, hidden)

    def post(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """How many, on the device."""
        experts = torch.tensor([*chosen, *[99] * (PICKS - len(chosen))], dtype=torch.int32, device=DEVICE)
        count = torch.tensor([len(chosen)], dtype=torch.int32, device=DEVICE)
        post(self.letters, layer, self.hidden.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), experts, count)
        return count

    def collect(self, count: torch.Tensor, **options: Any) -> torch.Tensor:
        # Under the interpreter the default would take an hour.
        options.setdefault("most_polls", 1 << 18)
        return collect(self.letters, self.own.to(DEVICE), count, dtype=self.dtype, **options).cpu()


@pytest.fixture
def case() -> Iterator[Case]:
    case = Case()
    yield case
    case.box.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_what_the_cpu_gives_is_added_and_rounded_once(dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    # More numbers than one block of the kernels holds.
    case = Case(dtype, 4104)
    ids = torch.tensor([[5, 0, 8, 3]], dtype=id_dtype)
    weights = torch.tensor([[0.3, 0.1, 0.4, 0.2]], dtype=dtype)
    case.box.arm()
    for layer, chosen in ((0, [0, 5, 8]), (1, [3]), (1, [0, 3, 5, 8]), (0, [8])):
        mine = reference.message(ids, weights, torch.tensor(chosen))
        assert mine.tolist() == [float(weights[0, ids[0].tolist().index(expert)]) for expert in chosen]
        theirs = case.layers[layer].sums(case.hidden, chosen, mine)
        count = case.post(layer, ids, weights, chosen)
        found = case.collect(count)
        assert torch.equal(found, reference.collected(case.own, theirs, dtype))
        assert not torch.equal(found, reference.collected(case.own, None, dtype))
    assert case.box.messages == 4 and case.box.failure is None
    case.box.close()


def test_with_nothing_for_the_cpu_nothing_is_posted_or_waited_for(case: Case) -> None:
    # Nobody would answer.
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.full((1, 4), 0.25)
    before = [tensor.clone() for tensor in (case.letters.posted, case.letters.header, case.letters.hidden)]
    count = case.post(0, ids, weights, [])
    assert torch.equal(case.collect(count, most_polls=1), reference.collected(case.own, None, case.dtype))
    now = (case.letters.posted, case.letters.header, case.letters.hidden)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert case.box.failure is None


def test_picks_of_weight_0_are_not_computed(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    case.box.arm()
    count = case.post(0, ids, weights, [5, 8])
    assert torch.equal(case.collect(count), case.own)
    count = case.post(0, ids, weights, [0, 5])
    theirs = case.layers[0].sums(case.hidden, [0], torch.tensor([0.5]))
    assert torch.equal(case.collect(count), case.own + theirs)


def test_who_waits_in_vain_gives_up_and_says_so(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.full((1, 4), 0.25)
    case.box.arm()
    case.box.pause()
    count = case.post(0, ids, weights, [5])
    assert case.collect(count, most_polls=40).isnan().all()
    assert int(case.letters.failed) == UNANSWERED
    assert "looked in vain" in str(case.box.failure)
    # The answer comes late, and is not taken for the next one's.
    case.box.arm()
    count = case.post(1, ids, weights, [3, 8])
    theirs = case.layers[1].sums(case.hidden, [3, 8], torch.full((2,), 0.25))
    assert torch.equal(case.collect(count), case.own + theirs)


def test_an_answer_is_to_the_message_that_was_there_when_it_was_begun() -> None:
    """One that comes meanwhile has another."""
    layer, most, untouched = Layer(torch.float32, 2048, 2048, 1), 16, 7.0
    letters = new_letters(2048, most, torch.float32, "cpu")
    box = Mailbox(letters)
    box.set_layer(0, layer.ffn, ExpertTable(layer.ffn, layer.experts))
    letters.header.copy_(torch.tensor([0, most]))
    letters.weights.fill_(0.5)
    box.arm()
    for number in (1, 3, 5):
        letters.sums.fill_(untouched)
        letters.posted.fill_(number)
        deadline = time.monotonic() + 20
        while float(letters.sums[0]) == untouched and time.monotonic() < deadline:
            pass
        # An expert of 50 MB is to be read 16 times: it is not done yet.
        letters.posted.fill_(number + 1)
        while box.messages <= number and time.monotonic() < deadline:
            pass
        assert (box.messages, int(letters.answered)) == (number + 1, number + 1)
    box.close()


def test_who_waits_for_one_that_is_closed_gives_up_at_once(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.full((1, 4), 0.25)
    case.box.arm()
    case.box.close()
    case.box.close()
    count = case.post(0, ids, weights, [5])
    assert case.collect(count).isnan().all()
    assert int(case.letters.failed) == UNANSWERED
    with pytest.raises(RuntimeError, match="the thread that answers a device has been stopped"):
        case.box.arm()


def test_what_cannot_be_computed_is_no_answer(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.full((1, 4), 0.25)
    case.box.arm()
    count = case.post(7, ids, weights, [5])
    case.collect(count)
    assert int(case.letters.failed) == NOT_COMPUTED
    assert "1 experts of layer 7, which is none" in str(case.box.failure)


def test_numbers_go_on_where_they_wrap(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]]), torch.full((1, 4), 0.25)
    case.letters.number.fill_(2**31 - 2)
    case.box.arm()
    theirs = case.layers[0].sums(case.hidden, [5], torch.full((1,), 0.25))
    seen = []
    for _ in range(3):
        count = case.post(0, ids, weights, [5])
        assert torch.equal(case.collect(count), case.own + theirs)
        seen.append(int(case.letters.answered))
    assert seen == [2**31 - 1, 0, 1]


def test_many_messages_beside_others_that_compute(case: Case) -> None:
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    over = threading.Event()

    def compute() -> None:
        layer, hidden = Layer(torch.float32), torch.randn(1, HIDDEN)
        right = layer.sums(hidden, [1, 2], torch.ones(2))
        while not over.is_set():
            assert torch.equal(layer.sums(hidden, [1, 2], torch.ones(2)), right)

    other = threading.Thread(target=compute)
    other.start()
    try:
        for turn in range(200):
            if turn % 9 == 0:
                case.box.arm()
            case.hidden = torch.randn(1, HIDDEN)
            ids = torch.randperm(EXPERTS)[:PICKS].view(1, PICKS)
            chosen = sorted(ids[0, : 1 + turn % PICKS].tolist())
            layer = case.layers[turn % 2]
            theirs = layer.sums(case.hidden, chosen, reference.message(ids, weights, torch.tensor(chosen)))
            assert torch.equal(case.collect(case.post(turn % 2, ids, weights, chosen)), case.own + theirs)
    finally:
        over.set()
        other.join()
    assert case.box.messages == 200


def test_a_fork_is_told_and_ends_well(case: Case) -> None:
    case.box.arm()
    child = os.fork()
    if child == 0:
        told = 1
        try:
            case.box.arm()
        except RuntimeError as error:
            told = 0 if "belongs to the process that started it" in str(error) else 2
        case.box.pause()
        case.box.close()
        os._exit(told)
    assert os.waitpid(child, 0)[1] == 0
    test_picks_of_weight_0_are_not_computed(case)


EXIT = """
import torch
from moert.kernels.mailbox import Mailbox, new_letters
letters = new_letters(64, 2, torch.float32, "cpu", lambda n: torch.empty(n, dtype=torch.uint8))
box = Mailbox(letters)
box.arm()
letters.header[1] = {count}
letters.posted.fill_({number})
print("done")
"""


@pytest.mark.parametrize(("count", "number"), [(0, 0), (1, 1)])
def test_the_process_ends_while_it_is_armed(tmp_path: Path, count: int, number: int) -> None:
    assert run_python(EXIT.format(count=count, number=number), tmp_path) == "done\n"


def test_bad_input(case: Case) -> None:
    ids, weights = torch.tensor([[5, 0, 8, 3]], device=DEVICE), torch.full((1, 4), 0.25, device=DEVICE)
    experts, count = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (4, 1))
    hidden = case.hidden.to(DEVICE)
    for arguments, message in (
        ((hidden.half(), ids, weights, experts, count), "hidden must be torch.float32"),
        ((hidden[:, 1:].contiguous(), ids, weights, experts, count), "of one token of 72 numbers"),
        ((hidden, ids.repeat(1, 2), weights, experts, count), "of one token"),
        ((hidden, ids, weights, torch.zeros(5, dtype=torch.int32, device=DEVICE), count), "no more than picks"),
        ((hidden, ids, weights, experts.long(), count), "experts must be torch.int32"),
        ((hidden, ids, weights, experts, experts), r"count \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            post(case.letters, 0, *arguments)
    sums = case.own.to(DEVICE)
    for given, options, message in (
        (sums.half(), {}, "sums must be torch.float32"),
        (sums[:, 1:].contiguous(), {}, "of one token of 72 numbers"),
        (sums, {"most_polls": 0}, "somebody has to look"),
        (sums, {"dtype": torch.int32}, "torch.int32"),
        (sums, {"out": torch.zeros(1, 72, dtype=torch.float64, device=DEVICE)}, "out must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(case.letters, given, count, **{"dtype": torch.float32, **options})
    other = Layer(torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer 2 takes \[72\] in torch.bfloat16"):
        case.box.set_layer(2, other.ffn, other.table)
    with pytest.raises(ValueError, match="layer 5 comes after 2 layers"):
        case.box.set_layer(5, case.layers[0].ffn, case.layers[0].table)
