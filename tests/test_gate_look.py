"""Routers asked for one token by the kernel: what torch would find in double precision."""

from __future__ import annotations

import pytest
import torch

from moert.kernels.gate_look import GateLook, Lines

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "width"), [(5, 7), (64, 96), (33, 200)])
def test_best_is_what_a_router_would_choose(
    experts: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype, isa: str
) -> None:
    source, weight = normal(1, width, seed=1, dtype=dtype), normal(experts, width, seed=2, dtype=weight_dtype)
    bias, correction = normal(experts, seed=3, dtype=weight_dtype), normal(experts, seed=4)
    lines, scaled = Lines(width), torch.empty(1, width)
    lines.gain.copy_(normal(width, seed=5))
    lines.offset.copy_(normal(width, seed=6))
    exact = source.double()
    over = exact / (exact.square().mean() + 1e-3).sqrt()
    moved = over * lines.gain.double() + lines.offset.double()
    for given_bias, given_correction in ((None, None), (bias, None), (bias, correction)):
        values = moved @ weight.double().T
        if given_bias is not None:
            values = values + given_bias.double()
        if given_correction is not None:
            values = values.sigmoid() + given_correction.double()
        order, found = GateLook(weight, given_bias, given_correction, 5).best(source, lines, 1e-3, scaled)
        torch.testing.assert_close(found, values.float(), rtol=1e-4, atol=1e-4)
        assert order == found[0].argsort(descending=True, stable=True)[:5].tolist()
    torch.testing.assert_close(scaled, over.float(), rtol=1e-5, atol=1e-6)
    plain, found = GateLook(weight, None, None, 1).best(source)
    torch.testing.assert_close(found, (exact @ weight.double().T).float(), rtol=1e-4, atol=1e-4)
    assert plain == [int(found.argmax())]


def test_of_equal_ones_the_first_come_first() -> None:
    order, _ = GateLook(torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]]), None, None, 4).best(torch.ones(1, 1))
    assert order == [1, 3, 0, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_names_nobody(bad: float) -> None:
    look = GateLook(torch.eye(3), None, None, 2)
    assert look.best(torch.tensor([[1.0, bad, 2.0]]))[0] == []
    assert look.best(torch.tensor([[1.0, -torch.inf, 2.0]]))[0] in ([], [2, 0])
    lines = Lines(3)
    assert not lines.learn(torch.tensor([[1.0, bad, 2.0]]), torch.ones(1, 3), 0.5)
    assert lines.mean.eq(0).all() and lines.gain.eq(1).all()


def test_lines_are_those_of_weighted_regression() -> None:
    width, share = 6, 0.25
    lines = Lines(width)
    mean, moments = torch.zeros(2, width).double(), torch.zeros(2, width).double()
    gain = torch.ones(width).double()
    for step in range(40):
        source = normal(1, width, seed=step)
        target = 3 * source + 2 + 0.1 * normal(1, width, seed=1000 + step)
        source[0, 5] = 0.5  # a channel that never varies keeps its gain
        is_first = step == 0
        assert lines.learn(source, target, 1.0 if is_first else share, moments=not is_first)
        both = torch.cat((source, target)).double()
        apart = both - mean
        mean += (1.0 if is_first else share) * apart
        if not is_first:
            moments += share * (apart * apart[0] - moments)
        gain = torch.where(moments[0] > 0, moments[1] / moments[0], gain)
    torch.testing.assert_close(lines.mean, mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lines.gain, gain.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lines.offset, (mean[1] - gain * mean[0]).float(), rtol=1e-3, atol=1e-3)
    assert (lines.gain[:5] - 3).abs().max() < 0.3


def test_bad_input() -> None:
    weight = torch.ones(4, 8)
    with pytest.raises(ValueError, match="best 5 of 4"):
        GateLook(weight, None, None, 5)
    with pytest.raises(ValueError, match=r"\[3\] numbers for 4 experts"):
        GateLook(weight, torch.ones(3), None, 2)
    with pytest.raises(ValueError, match="cannot be looked at"):
        GateLook(weight.T, None, None, 2)
    with pytest.raises(ValueError, match="cannot be looked at"):
        GateLook(weight.to(torch.int32), None, None, 2)
    look = GateLook(weight, None, None, 2)
    for source in (torch.ones(1, 7), torch.ones(2, 8), torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 16)[:, ::2]):
        with pytest.raises(ValueError, match="not one token of 8"):
            look.best(source)
    with pytest.raises(ValueError, match="scaled must be"):
        look.best(torch.ones(1, 8), None, 1e-6, torch.ones(1, 7))
    with pytest.raises(ValueError, match="best 2 of 4 experts"):
        look.best(torch.ones(1, 8), None, 1e-6)
    with pytest.raises(ValueError, match="not one token of 8"):
        Lines(8).learn(torch.ones(1, 8), torch.ones(1, 7), 0.5)
