"""What a bank, a step and a launch refuse, before any kernel sees it: with the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
import triton_support
from triton_support import DEVICE, FORMATS, in_slots, stored

from moert.errors import KernelUnavailableError
from moert.formats import FormatChoice, TensorSpec
from moert.kernels import _launch
from moert.kernels.bank import GROUPS, STORED, Bank, BankMatrix, bank_matrix
from moert.kernels.decode_down import decode_down
from moert.kernels.decode_gate_up import decode_gate_up
from moert.kernels.gate import Gate

Tensors = dict[str, torch.Tensor]


def int4(n: int, k: int) -> Tensors:
    return {
        "w": torch.zeros(3, n, k // 2, dtype=torch.uint8, device=DEVICE),
        "w_scales": torch.zeros(3, n, k // 32, dtype=torch.float16, device=DEVICE),
        "w_zeros": torch.zeros(3, n, k // 32, dtype=torch.uint8, device=DEVICE),
        "w_bias": torch.zeros(3, n, device=DEVICE),
    }


def plain(n: int, k: int, slots: int = 3) -> BankMatrix:
    return bank_matrix("plain", {"w": torch.zeros(slots, n, k, device=DEVICE)}, "w")


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


@pytest.mark.parametrize("choice", FORMATS)
def test_every_format_is_taken_as_it_is_stored(choice: str) -> None:
    name = choice.partition(",")[0]
    matrix = bank_matrix(name, in_slots([stored(choice, torch.ones(256, 128))], [0], 2), "w")
    assert (matrix.n, matrix.k, matrix.slots, matrix.format) == (256, 128, 2, name)
    assert (matrix.zeros is not None) == ("symmetric=false" in choice)
    assert matrix.group == (0 if name == "plain" else 128 if "128" in choice or name == "fp8" else 32)


def test_the_table_of_stored_dtypes_is_that_of_the_formats() -> None:
    for name, (codes, scales) in STORED.items():
        specs = FormatChoice.parse(name).make().stored([TensorSpec("w", (128, 256), torch.float32)])
        assert {spec.name: spec.dtype for spec in specs} == {"w": codes, "w_scales": scales}
        groups = {256 // spec.shape[1] for spec in specs if spec.name == "w_scales"}
        assert groups <= set(GROUPS[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(w=t["w"].float()), "w must be torch.uint8, not torch.float32"),
        (lambda t: t.update(w=t["w"][0]), "w must have 3 dimensions and numbers in them, not [8, 32]"),
        (lambda t: t.update(w=t["w"][:0]), "not [0, 8, 32]"),
        (lambda t: t.update(w=t["w"].mT), "each slot must be contiguous"),
        (lambda t: t.update(w=t["w"][:1].expand(3, 8, 32)), "not overlap"),
        (lambda t: t.pop("w_scales"), "w is in int4 and needs w_scales"),
        (lambda t: t.update(w_scales=t["w_scales"].float()), "w_scales must be torch.float16, not torch.float32"),
        (lambda t: t.update(w_scales=t["w_scales"][:2]), "w_scales has 2 slots, the codes have 3"),
        (lambda t: t.update(w_scales=t["w_scales"][:, :, :1].contiguous()), "w_scales are [8, 1] an expert, which do"),
        (lambda t: t.update(w_scales=meta(t["w_scales"])), "w_scales is on meta, the codes on"),
        (lambda t: t.update(w_zeros=t["w_zeros"].half()), "w_zeros must be torch.uint8, not torch.float16"),
        (lambda t: t.update(w_zeros=t["w_zeros"][:, :4].contiguous()), "w_zeros [3, 4, 2]: zero points are int4's"),
        (lambda t: t.update(w_bias=t["w_bias"].double()), "w_bias must be torch.float32 or torch.bfloat16 or"),
        (lambda t: t.update(w_bias=t["w_bias"][:, :7].contiguous()), "w_bias is [3, 7], the weight has 8 rows and 3"),
    ],
)
def test_a_weight_that_is_not_what_its_format_stores(change: Callable[[Tensors], object], message: str) -> None:
    tensors = int4(8, 64)
    bank_matrix("int4", tensors, "w")
    change(tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        bank_matrix("int4", tensors, "w")


def test_a_format_that_does_not_fit_the_weight() -> None:
    with pytest.raises(ValueError, match="format 'int3' is unknown; there are plain, int8, int4, fp8, mxfp4"):
        bank_matrix("int3", int4(8, 64), "w")
    with pytest.raises(ValueError, match="never stored transposed"):
        bank_matrix("int4", int4(8, 64), "w", transposed=True)
    with pytest.raises(ValueError, match="neither scales nor zero points"):
        bank_matrix("plain", {**int4(8, 64), "w": torch.zeros(3, 8, 64, device=DEVICE)}, "w")
    fp8 = {"w": torch.zeros(1, 130, 128, dtype=torch.uint8), "w_scales": torch.zeros(1, 1, 1)}
    with pytest.raises(ValueError, match=re.escape("w_scales are [1, 1] an expert, which do not fit fp8 [130, 128]")):
        bank_matrix("fp8", fp8, "w")
    with pytest.raises(ValueError, match="65536 x 32768 numbers an expert"):
        bank_matrix("plain", {"w": torch.empty(1, 65536, 32768, device="meta")}, "w")


def test_weights_that_do_not_fit_each_other() -> None:
    Bank(plain(16, 6), plain(6, 8), Gate())
    with pytest.raises(ValueError, match=re.escape("the up weight is [16, 6]; a down weight [6, 8] and gated=False")):
        Bank(plain(16, 6), plain(6, 8), Gate(gated=False))
    with pytest.raises(ValueError, match="the up weight has 3 slots, the down weight 2"):
        Bank(plain(16, 6), plain(6, 8, slots=2), Gate())
    elsewhere = bank_matrix("plain", {"w": torch.empty(3, 6, 8, device="meta")}, "w")
    with pytest.raises(ValueError, match="the down weight on meta"):
        Bank(plain(16, 6), elsewhere, Gate())


STEP: Tensors = {
    "x": torch.zeros(2, 6, device=DEVICE),
    "ids": torch.zeros(2, 4, dtype=torch.int64, device=DEVICE),
    "weights": torch.zeros(2, 4, device=DEVICE),
    "slot_of": torch.zeros(5, dtype=torch.int32, device=DEVICE),
}

BAD_STEPS = [
    ("x", lambda x: x.double(), "x must be torch.float32 or torch.bfloat16 or torch.float16, not torch.float64"),
    ("x", lambda x: x[0], "x must have 2 dimensions and be contiguous, not [6]"),
    ("x", lambda x: x.T.contiguous().T, "be contiguous, not [2, 6] of strides (1, 2)"),
    ("x", lambda x: x[:, :5].contiguous(), "x is [2, 5], the bank takes 6 columns"),
    ("x", lambda x: x[:1], "has 1 rows, ids are for 2 tokens"),
    ("x", meta, "x is on meta, the bank on"),
    ("ids", lambda ids: ids.to(torch.int16), "ids must be torch.int32 or torch.int64, not torch.int16"),
    ("ids", lambda ids: ids[:, :3], "ids must have 2 dimensions and be contiguous"),
    ("ids", meta, "ids is on meta"),
    ("weights", lambda weights: weights[:, :3].contiguous(), "ids are [2, 4], the router's weights [2, 3]"),
    ("weights", lambda weights: weights.long(), "weights must be torch.float32"),
    ("slot_of", lambda slots: slots.long(), "slot_of must be torch.int32, not torch.int64"),
    ("slot_of", lambda slots: slots[:0], "4 picks a token of 0 experts"),
]


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(("name", "change", "message"), BAD_STEPS)
def test_a_step_that_does_not_fit(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, down: bool
) -> None:
    if down:
        bank = Bank(plain(12, 6), plain(6, 6), Gate())
        step = {**STEP, "x": torch.zeros(8, 6, device=DEVICE)}
        message = message.replace("[2, 5]", "[8, 5]").replace("[2, 6] of strides (1, 2)", "[8, 6] of strides (1, 8)")
        run: Callable[..., torch.Tensor] = decode_down
    else:
        bank, step, run = Bank(plain(14, 6), plain(6, 7), Gate()), STEP, decode_gate_up
    run(bank, *step.values())
    with pytest.raises(ValueError, match=re.escape(message)):
        run(bank, *{**step, name: change(step[name])}.values())


@pytest.mark.parametrize("out", [torch.zeros(8, 8), torch.zeros(8, 7).half(), torch.zeros(7, 8).T, torch.zeros(56)])
def test_an_output_that_does_not_fit(out: torch.Tensor) -> None:
    bank = Bank(plain(14, 6), plain(6, 7), Gate())
    with pytest.raises(ValueError, match=re.escape("out must be contiguous [8, 7] in torch.float32 on")):
        decode_gate_up(bank, *STEP.values(), out=out.to(DEVICE))


@triton.jit
def _nothing(x_ptr: tl.tensor) -> None:
    pass


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="there is a GPU")
def test_a_machine_that_cannot_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _launch.Launch(_nothing, (1,), {"x_ptr": torch.zeros(1)}, {})
    launch.run(torch.device("cpu"))
    with pytest.raises(KernelUnavailableError, match="the tensors are on cuda:0 and the interpreter is on"):
        launch.run(torch.device("cuda:0"))
    monkeypatch.setattr(_launch, "is_interpreted", lambda kernel: False)
    with pytest.raises(KernelUnavailableError, match="the tensors are on cpu and the interpreter is off"):
        launch.run(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with pytest.raises(KernelUnavailableError, match=re.escape("an old GPU is of compute capability 7.5; the kernels")):
        launch.run(torch.device("cuda:7"))
