"""Which experts a token's id has led to before."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moert.errors import CorruptFileError
from moert.predictors._trained import Trained, load_trained
from moert.predictors.base import Floats, Ints, Model, Need, Predictor

_NONE: Ints = np.zeros(0, dtype=np.int64)


class TokenTable(Predictor):
    """Looks up what `moert train-predictor --predictor token_table` has counted: token id -> experts, layer by layer.

    The simplest trained predictor. An expert's probability for a token seen n times is (count + m * p) / (n + m), where
    p is how often any token chooses it and m what training found best: rare tokens are drawn to p, and unseen ones have
    p itself. Of each token and layer only the experts counted most are kept; the others stand at m * p / (n + m).

    Memory: 4 bytes for each kept expert of each token and layer.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FILE})
    wants: ClassVar[frozenset[Need]] = frozenset({Need.TOKEN_IDS})
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
        self.table = Table(load_trained(file, "token_table", model))
        self._rows: Ints | None = None
        self._hinted: Ints = _NONE

    def begin_sequence(self) -> None:
        self._rows, self._hinted = None, _NONE

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._rows = None if token_ids is None else np.unique(self.table.rows_of(token_ids))
        self._hinted = _NONE

    def hint(self, token_ids: Ints) -> None:
        self._hinted = self.table.rows_of(token_ids)

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        rows = self._hinted[tokens - 1 : tokens] if tokens else self._rows
        if rows is None or not len(rows):
            return self.table.prior(layer)
        found = self.table.rows(layer, rows)
        return found[0] if len(found) == 1 else 1 - (1 - found).prod(axis=0)


class Table:
    """The counts in a file."""

    def __init__(self, trained: Trained) -> None:
        """
        Raises:
            CorruptFileError: it is malformed.
        """
        self._num_experts = trained.about.num_experts
        layers, most = len(self._num_experts), max(self._num_experts)
        self._ids = trained.tensor("token_ids", np.int64, (None,))
        """[V] ascending."""
        self._prior = trained.tensor("prior", np.float32, (layers, most))
        self._seen = trained.tensor("seen", np.uint16, (len(self._ids), layers))
        self._experts = trained.tensor("experts", np.uint16, (len(self._ids), layers, None))
        """[V, L, M] the ids counted most."""
        self._counts = trained.tensor("counts", np.uint16, self._experts.shape)
        self._weight = np.float32(trained.tensor("prior_weight", np.float32, (1,))[0])
        if self._experts.size and self._experts.max() >= most:
            raise CorruptFileError(f"{trained.path}: expert {self._experts.max()} of {most}; train the predictor again")
        if (np.diff(self._ids) <= 0).any() or self._weight <= 0 or (self._prior < 0).any():
            raise CorruptFileError(f"{trained.path}: its counts make no sense; train the predictor again")

    def rows_of(self, token_ids: Ints) -> Ints:
        """The places [T] of ids [T] in the table, -1 for those that were never seen."""
        if not len(self._ids):
            return np.full(len(token_ids), -1)
        places = np.searchsorted(self._ids, token_ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[places] == token_ids, places, -1)

    def prior(self, layer: int) -> Floats:
        """[E] how often any token chooses each expert; read only."""
        return self._prior[layer, : self._num_experts[layer]]

    def rows(self, layer: int, rows: Ints) -> Floats:
        """[R, E] how likely the tokens at `rows` [R] choose each expert; -1: one that was never seen."""
        n = np.where(rows < 0, 0, self._seen[rows, layer]).astype(np.float32)[:, None]
        total = n + self._weight
        known: Floats = self._prior[layer] * (self._weight / total)
        counts = np.where(n > 0, self._counts[rows, layer], 0) / total
        # With a count of 0 an id may stand twice, or be one that this layer does not have.
        np.add.at(known, (np.arange(len(rows))[:, None], self._experts[rows, layer]), counts)
        return known[:, : self._num_experts[layer]]
