"""The whole routing path of a token, from token ids alone."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from moert.predictors._routing_path import PathState, RoutingPath, read_network
from moert.predictors._trained import Trained, load_trained
from moert.predictors.base import Floats, Ints, Model, Need, Predictor

_IDS = "token_ids"

MOST_TOKENS = 512
"""Of a pass that are read at once, which bounds memory."""


class ExpertFlow(Predictor):
    """ExpertFlow's routing-path predictor (He et al., arXiv 2410.17954), trained by `moert train-predictor`.

    An encoder reads the prompt's ids, a decoder the ids from there on, and one linear head a layer says of every expert
    whether the token will choose it: all layers are known when the token's id is, before the first layer runs. As
    published: the encoder-decoder in T5's shape, the heads, the binary cross-entropy against what was chosen. Changed:

    - Trained from nothing on one trace, at a higher rate, and small enough for minutes on a CPU: width 96 and 2 + 2
      layers. Published are width 32, 6 + 6 layers, inner sizes of 512 and 2048; training can be told them.
    - Ids that the trace does not have share one embedding, so a file has no larger a vocabulary than its trace.
    - The decoder sees the last 128 tokens and the encoder the prompt's last 256, which bounds memory and time; in
      training, texts without a prompt are cut in two anywhere.
    - The decoder reads the prompt too, and answers for its tokens as for others.

    Each forward pass costs one small pass of this network when it begins, before the model's first layer. Hinted tokens
    are tried in the same way when they are first asked for.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FILE, Need.TOKEN_IDS})
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
        trained = load_trained(file, "expertflow", model)
        self._ids: Ints = trained.tensor(_IDS, np.int64, (None,))
        self._network = load_network(trained)
        self._ends = np.cumsum(trained.about.num_experts)
        self._state: PathState | None = None
        self._rows = 1
        self._now: Floats | None = None
        """[outputs] of the pass that runs."""
        self._hint: Ints | None = None
        self._later: Floats | None = None
        """[n, outputs] of the hinted tokens."""

    def begin_sequence(self) -> None:
        self._state = self._now = self._hint = self._later = None

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._now = self._hint = self._later = None
        if token_ids is None:
            self._state = None  # what comes next does not follow what was read
            return
        if not n_tokens:
            return
        tokens = torch.from_numpy(places_of(token_ids, self._ids)).reshape(rows, -1)
        none = np.ones(int(self._ends[-1]), dtype=np.float32)
        with torch.inference_mode():
            if self._state is None or rows != self._rows:
                self._state = self._network.begin(tokens)
            self._rows = rows
            for piece in tokens.split(MOST_TOKENS, dim=1):
                logits, self._state = self._network.decode(piece, self._state)
                none *= (1 - logits.flatten(0, 1).sigmoid()).prod(dim=0).numpy()
        self._now = 1 - none

    def hint(self, token_ids: Ints) -> None:
        self._hint, self._later = np.array(token_ids), None

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if not tokens:
            return None if self._now is None else self._of_layer(self._now, layer)
        if self._hint is None or self._state is None or self._rows != 1 or tokens > len(self._hint):
            return None
        if self._later is None:
            with torch.inference_mode():
                hinted = torch.from_numpy(places_of(self._hint, self._ids))[None]
                self._later = self._network.decode(hinted, self._state)[0][0].sigmoid().numpy()
        return self._of_layer(self._later[tokens - 1], layer)

    def _of_layer(self, scores: Floats, layer: int) -> Floats:
        return scores[self._ends[layer] - self.model.num_experts[layer] : self._ends[layer]]


def places_of(token_ids: Ints, known: Ints) -> npt.NDArray[np.int64]:
    """The places [T] int64 of ids [T] in `known` [V], ascending, from 1 on; 0 for one that is not there."""
    if not len(known):
        return np.zeros(len(token_ids), dtype=np.int64)
    places = np.searchsorted(known, token_ids).clip(max=len(known) - 1)
    return np.where(known[places] == token_ids, places + 1, 0).astype(np.int64)


def load_network(trained: Trained) -> RoutingPath:
    """The network in a file, ready to be asked.

    Raises:
        CorruptFileError: the file is malformed.
    """
    vocabulary = len(trained.tensor(_IDS, np.int64, (None,)))
    return read_network(trained, vocabulary=vocabulary, outputs=sum(trained.about.num_experts))
