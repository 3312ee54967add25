"""The training loop: epochs over batches, the best weights kept, an early end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from moert.errors import ConfigError, MoertError

Batch = TypeVar("Batch")

WARM_UP = 0.05
"""Of all steps, over which the rate rises; from there it falls to `END` of it."""
END = 0.05
MAX_NORM = 1.0
"""Of a step's gradient."""


@dataclass(frozen=True)
class Point:
    """One point of a learning curve."""

    epoch: int
    n_tokens: int
    """Tokens trained on up to here, those seen several times counted as often."""
    train_loss: float | None
    validation_loss: float | None
    validation_recall: float
    """At k."""


@dataclass(frozen=True)
class Effort:
    """How long, and on what."""

    epochs: int | None = None
    """At most; None: the recipe's own number."""
    seed: int = 0
    device: str = "auto"
    """`auto`: a GPU if there is one."""
    patience: int = 3
    """Epochs without a better recall on the validation sequences before training ends."""
    report: Callable[[int, int, str], None] | None = None
    """Told (done, in all, how it stands) after each step."""

    def torch_device(self) -> torch.device:
        """Where to train.

        Raises:
            ConfigError: there is no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return torch.device(self.device)


def fit(
    network: nn.Module,
    batches: Callable[[random.Random], Iterable[Batch]],
    loss: Callable[[Batch], tuple[torch.Tensor, int]],
    validate: Callable[[], tuple[float, float]],
    effort: Effort,
    *,
    epochs: int,
    steps: int,
    rate: float,
    decay: float = 0.0,
) -> list[Point]:
    """Train `network` where it is, and leave it with the weights that were best in validation. Blocks.

    Args:
        network: in evaluation mode when this returns.
        batches: those of one epoch, about `steps` of them, in an order that its argument decides.
        loss: of a batch, a mean, and the tokens in it.
        validate: the loss and the recall at k on sequences that are not trained on.
        effort: the seed, patience and report; `epochs` stands for what it leaves open.
        rate: of AdamW at its highest.
        decay: of the weights that are matrices.

    Raises:
        MoertError: the loss is no longer a number.
    """
    total = max(1, epochs * steps)
    matrices = [weight for weight in network.parameters() if weight.dim() > 1]
    others = [weight for weight in network.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr=rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, total))
    rng = random.Random(effort.seed)
    first_loss, first_recall = validate()
    points = [Point(0, 0, None, first_loss, first_recall)]
    best, kept = points[0], _copy(network)
    n_tokens = done = 0
    for epoch in range(1, epochs + 1):
        network.train()
        summed, seen = 0.0, 0
        for batch in batches(rng):
            value, n = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            summed, seen, done = summed + float(value.detach()) * n, seen + n, done + 1
            if effort.report is not None:
                effort.report(min(done, total), total, f"recall {100 * best.validation_recall:.1f} %")
        network.eval()
        n_tokens += seen
        mean = summed / max(1, seen)
        if not math.isfinite(mean):
            raise MoertError(f"training diverged: the loss of epoch {epoch} is {mean}; lower the rate, {rate}")
        validation_loss, recall = validate()
        points.append(Point(epoch, n_tokens, mean, validation_loss, recall))
        if recall > best.validation_recall:
            best, kept = points[-1], _copy(network)
        elif epoch - best.epoch >= effort.patience:
            break
    network.load_state_dict(kept)
    network.eval()
    return points


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All that torch draws by chance within follows from `seed`, and what it draws afterwards is not changed by it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _share(step: int, total: int) -> float:
    """Of the highest rate."""
    warm = max(1, int(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return END + (1 - END) * max(0.0, 1 - (step - warm) / max(1, total - warm))


def _copy(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}
