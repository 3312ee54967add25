"""How one layer's experts are stored: their own tensors on one side, those of a record in some format on the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from moert.formats import FormatChoice, TensorSpec


class Storage:
    """Encodes and decodes one layer's experts. Immutable; any thread may use it."""

    def __init__(self, choice: FormatChoice, own: Sequence[TensorSpec], turned: Collection[str] = ()) -> None:
        """
        Args:
            choice: the format.
            own: the tensors of one expert, as its module has them.
            turned: the matrices among them that lie as [K, N]; other formats than plain want rows, [N, K].

        Raises:
            UnsupportedModelError: the format cannot hold such tensors.
        """
        self.choice = choice
        self.own = tuple(own)
        self._turned = frozenset() if choice.is_plain else frozenset(turned)
        self._format = choice.make()
        rows = [
            TensorSpec(spec.name, spec.shape[::-1] if spec.name in self._turned else spec.shape, spec.dtype)
            for spec in own
        ]
        self.stored = tuple(self._format.stored(rows))
        """The tensors of a record."""

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An expert's own tensors -> those of its record; the latter may be the former.

        Raises:
            UnsupportedModelError: a number that the format cannot hold.
        """
        return self._format.encode(
            {name: tensor.T.contiguous() if name in self._turned else tensor for name, tensor in tensors.items()}
        )

    def decode(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a record -> the expert's own, in their dtypes; they may be the same."""
        found = self._format.decode(stored)
        return {
            spec.name: (found[spec.name].T if spec.name in self._turned else found[spec.name])
            .to(spec.dtype)
            .contiguous()
            for spec in self.own
        }
