"""The whole routing path of the next token, from the paths of those before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from moert.predictors._routing_path import PathState, read_network
from moert.predictors._trained import load_trained
from moert.predictors.base import Floats, Ints, Model, Need, Predictor

MOST_TOKENS = 512
"""Of a pass that are read, its last ones, which bounds memory."""


class ExpertFlowRouting(Predictor):
    """The decoder of ExpertFlow's routing-path predictor (He et al., arXiv 2410.17954), told routing in place of ids.

    For where token ids are not at hand, in a recording or live. A token is the sum of the embeddings of all experts
    that it has chosen, and the decoder says of every expert of every layer whether the *next* token will choose it: the
    answer for a whole token is there when the token before has left the last layer. As published: the decoder in T5's
    shape, a linear head a layer, the binary cross-entropy. Changed: what it reads, that there is no encoder, as a
    prompt's tokens are read like others, and what `expertflow` changes.

    Each forward pass costs one small pass of this network when the last layer's choice is known.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FILE})
    gives_probabilities: ClassVar[bool] = True

    def __init__(self, model: Model, file: str = "", ahead: int = 3) -> None:
        """
        Args:
            model: the model; the file must be for it.
            file: what `moert train-predictor` wrote.
            ahead: how many later layers `step` predicts.

        Raises:
            ConfigError: no file, one of another predictor or model.
            CorruptFileError: it is malformed.
            TransferError: it cannot be read.
        """
        super().__init__(model)
        self.ahead = ahead
        trained = load_trained(file, "expertflow_routing", model)
        outputs, picks = sum(trained.about.num_experts), sum(trained.about.top_k)
        self._network = read_network(trained, vocabulary=0, outputs=outputs, prompt=0, picks=picks)
        self._places = Places(trained.about.num_experts, trained.about.top_k)
        self._state: PathState | None = None
        self._rows = self._pass_rows = 1
        self._noted: dict[int, Ints] = {}
        """Of the pass that runs, until it is read: layer -> [n, K]."""
        self._layer = -1
        """The latest that was observed in this pass; -1: none yet."""
        self._next: Floats | None = None
        """[outputs] of the pass after those that were read."""
        self._now: Floats | None = None
        """[outputs] of the pass that runs."""

    def begin_sequence(self) -> None:
        self._state = self._next = self._now = None
        self._noted.clear()
        self._layer = -1
        self._pass_rows = 1

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._end_pass()
        self._pass_rows = max(1, rows)
        if self._state is None and n_tokens:
            self._start(self._pass_rows)
            self._now, self._next = self._next, None

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        if layer <= self._layer:
            self._end_pass()
        self._layer = layer
        self._noted[layer] = np.array(experts)
        if layer == self.model.num_layers - 1:
            self._read()

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if tokens > 1:
            return None
        found = self._next if tokens else self._now
        return None if found is None else self._places.of_layer(found, layer)

    def _end_pass(self) -> None:
        """What the pass chose is read, and what was expected of the next one is of the one that runs."""
        self._read()
        self._layer = -1
        self._now, self._next = self._next, None

    def _read(self) -> None:
        """Read the pass that runs, once."""
        if not self._noted:
            return
        n_tokens = max(len(picks) for picks in self._noted.values())
        paths = self._places.of(self._noted, n_tokens)
        self._noted.clear()
        if not n_tokens:
            return
        rows = self._pass_rows if n_tokens % self._pass_rows == 0 else 1
        if self._state is None or rows != self._rows:
            self._start(rows)
        self._decode(torch.from_numpy(paths).unflatten(0, (rows, -1))[:, -MOST_TOKENS:])

    def _start(self, rows: int) -> None:
        """Read what stands before the first token."""
        self._rows = rows
        none = torch.from_numpy(self._places.of({}, rows))[:, None]
        self._state = self._network.begin(none)
        self._decode(none)

    def _decode(self, paths: torch.Tensor) -> None:
        """Read paths [rows, n, picks]."""
        assert self._state is not None
        with torch.inference_mode():
            logits, self._state = self._network.decode(paths, self._state)
            self._next = 1 - (1 - logits[:, -1].sigmoid()).prod(dim=0).numpy()


class Places:
    """Where each expert of each layer stands among those of all layers."""

    def __init__(self, num_experts: tuple[int, ...], top_k: tuple[int, ...]) -> None:
        self._num_experts = num_experts
        self._top_k = top_k
        self._ends = np.cumsum(num_experts)
        self._first_picks = np.cumsum((0, *top_k))

    def of(self, noted: Mapping[int, Ints], n_tokens: int) -> npt.NDArray[np.int64]:
        """Layer -> ids [n, K]; gives places [T, picks], and that behind all experts where there is none."""
        found = np.full((n_tokens, int(self._first_picks[-1])), self._ends[-1], dtype=np.int64)
        for layer, picks in noted.items():
            n, kept = self._num_experts[layer], picks[:, : self._top_k[layer]]
            begin = self._first_picks[layer]
            places = np.where((kept >= 0) & (kept < n), kept + (self._ends[layer] - n), self._ends[-1])
            found[: len(kept), begin : begin + kept.shape[1]] = places
        return found

    def of_layer(self, scores: Floats, layer: int) -> Floats:
        """[outputs] -> [E]"""
        return scores[self._ends[layer] - self._num_experts[layer] : self._ends[layer]]
