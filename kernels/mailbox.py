"""Messages from a device that runs by itself to the CPU, and the thread that answers them: see `post` and `collect`."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moert import _C
from moert.kernels.cpu_ffn import ExpertFfn
from moert.kernels.moe_block import ExpertTable

atexit.register(_C.stop_mailboxes)  # before the threads that compute are stopped: this was imported after them

UNANSWERED, NOT_COMPUTED = 1, 2
"""What is in `Letters.failed`: the device has waited in vain, or an answer is none."""

MOST_POLLS = 1 << 24
"""How often a device looks for an answer before it gives up; at a microsecond for each look over the link, 17 s."""

_APART = 128
"""Bytes between what one side and the other write."""


@dataclass(frozen=True, eq=False)
class Letters:
    """Where messages and answers are: memory that the device and the host read and write; made by `new_letters`.

    One message at a time: a layer's answer is there before the next layer asks. Numbers of messages follow each other
    and are never set back. The device finds everything by address, so that a graph that is captured or undone changes
    nothing of it.
    """

    addresses: torch.Tensor
    """int64 [9] on the device: of the number of the device's latest message, which is its own, and of `posted`,
    `answered`, `failed`, `header`, `ids`, `weights`, `hidden` and `sums`."""
    number: torch.Tensor
    """int32 [1], on the device."""
    posted: torch.Tensor
    """int32 [1]: the number of the latest message, written last."""
    answered: torch.Tensor
    """int32 [1]: the number of the message that `sums` answer, written last; -1: nobody answers any more."""
    failed: torch.Tensor
    """int32 [1]: 0, or what went wrong."""
    header: torch.Tensor
    """int32 [2]: the layer, and how many experts."""
    ids: torch.Tensor
    """int32 [M], of those experts, ascending."""
    weights: torch.Tensor
    """fp32 [M], of the router."""
    hidden: torch.Tensor
    """[D], the token."""
    sums: torch.Tensor
    """fp32 [D]: what the experts give, each times its weight, added up in their order."""


def new_letters(
    hidden: int,
    most: int,
    dtype: torch.dtype,
    device: torch.device | str,
    allocate_pinned: Callable[[int], torch.Tensor] | None = None,
) -> Letters:
    """No message so far. Waits for the device.

    Args:
        hidden: D.
        most: experts of a message.
        dtype: of the token.
        allocate_pinned: bytes -> uint8 memory that both sides read at its address; None: for tests without a device.
    """
    device = torch.device(device)
    parts: dict[str, tuple[int, torch.dtype]] = {
        "posted": (1, torch.int32),
        "answered": (1, torch.int32),
        "failed": (1, torch.int32),
        "header": (2, torch.int32),
        "ids": (most, torch.int32),
        "weights": (most, torch.float32),
        "hidden": (hidden, dtype),
        "sums": (hidden, torch.float32),
    }
    sizes = [-(-n * kind.itemsize // _APART) * _APART for n, kind in parts.values()]
    with torch.inference_mode(False):
        if allocate_pinned is None:
            memory = torch.zeros(sum(sizes), dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
        else:
            memory = allocate_pinned(sum(sizes)).zero_()
        number = torch.zeros(1, dtype=torch.int32, device=device)
        tensors = {
            name: block[: n * kind.itemsize].view(kind)
            for (name, (n, kind)), block in zip(parts.items(), memory.split(sizes), strict=True)
        }
        addresses = [0] * 9 if device.type == "meta" else [one.data_ptr() for one in (number, *tensors.values())]
        return Letters(torch.tensor(addresses, dtype=torch.int64).to(device), number, **tensors)


class Mailbox:
    """Answers the messages of one device on a thread of its own, which no Python runs on.

    It looks for messages without a pause for some milliseconds after `arm` and after each of them, then ever more
    rarely. In a fork of its process it refuses.
    """

    def __init__(self, letters: Letters) -> None:
        self._letters = letters
        """Memory that the thread uses."""
        self._layers: dict[int, ExpertTable] = {}
        self._box = _C.mailbox_open(
            letters.posted.data_ptr(),
            letters.answered.data_ptr(),
            letters.failed.data_ptr(),
            letters.header.data_ptr(),
            letters.ids.data_ptr(),
            letters.weights.data_ptr(),
            letters.hidden.data_ptr(),
            letters.sums.data_ptr(),
            letters.ids.numel(),
        )

    def set_layer(self, layer: int, ffn: ExpertFfn, table: ExpertTable) -> None:
        """What a message of this layer may name from now on; while it is paused. Layers are numbered from 0 on.

        Raises:
            ValueError: the layer is not the next one, or its hidden states are not those of the messages.
        """
        letters = self._letters
        if ffn.dtype != letters.hidden.dtype or ffn.hidden != letters.hidden.numel():
            raise ValueError(
                f"layer {layer} takes [{ffn.hidden}] in {ffn.dtype}, messages are of [{letters.hidden.numel()}] in "
                f"{letters.hidden.dtype}"
            )
        _C.mailbox_layer(self._box, layer, ffn.arguments, ffn.number, table.capsule)
        self._layers[layer] = table

    def arm(self) -> None:
        """Messages are to be expected: they are answered from now on. Returns at once.

        Raises:
            RuntimeError: this is a fork, it is closed, or there is no thread to be had.
        """
        _C.mailbox_arm(self._box)

    def pause(self) -> None:
        """Block until no message is being answered; none will be until `arm`, and none that is there by now."""
        _C.mailbox_pause(self._box)

    def __del__(self) -> None:
        box = vars(self).get("_box")
        if box is not None:
            _C.mailbox_close(box)  # before the memory that it uses may go

    def close(self) -> None:
        """For good: who waits for an answer is told that there will be none. Idempotent."""
        _C.mailbox_close(self._box)

    @property
    def messages(self) -> int:
        """Answered so far."""
        return _C.mailbox_state(self._box)[0]

    @property
    def failure(self) -> str | None:
        """Why there is no right answer to a message; None: there is one to each, as far as is known."""
        failed = int(self._letters.failed[0])
        if not failed:
            return None
        why = _C.mailbox_state(self._box)[1]
        return why or "the device has looked in vain for the answer to a message"
