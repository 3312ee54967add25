"""The interface of a predictor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]

NO_EXPERT = -1
"""Fills a pick's place where a token has no expert there, as in traces."""

MOST_LAYERS = 3
"""Farthest layers ahead that are asked for."""
MOST_TOKENS = 8
"""Farthest tokens ahead that are asked for."""

MARGIN = 1.5
"""`step` names so many times the picks of a token: those just below the choice are next in likelihood."""


class Need(Enum):
    """What a predictor cannot do without, besides picks. The value is what messages call it."""

    HIDDEN = "hidden states"
    """`step` and `enter` are given tensors."""
    ROUTERS = "the weights of the routers"
    """`Model.routers` has them."""
    TOKEN_IDS = "token ids"
    """`begin_pass` is given them."""
    FILE = "a file that `moert train-predictor` wrote"
    """The parameter `file` names it."""
    FUTURE = "the future"
    """`foresee` is called: a bound, for recordings only."""


class Prediction(NamedTuple):
    """The experts that a layer is expected to ask for at its next step, the likeliest first."""

    layer: int
    experts: list[int]
    ranks: list[int]
    """Of each expert: 0 if some token's first guess is this one, 1 if it is some token's second, and so on."""
    probabilities: list[float] | None = None
    """Of each expert, that the step needs it, where the predictor knows; it may be miscalibrated."""
    chances: list[float] | None = None
    """[E] as `probabilities`, of all of the layer's experts."""


class Router(NamedTuple):
    """What decides a layer's picks; tensors of the model, read only."""

    weight: torch.Tensor
    """[E, D], in the model's dtype or fp32."""
    bias: torch.Tensor | None = None
    """[E], added to the products."""
    correction: torch.Tensor | None = None
    """[E], added to the sigmoid of the logits, for the choice alone (DeepSeek-V3)."""
    num_experts: int = 0
    """Those that have weights; the ids after them are never predicted."""
    top_k: int = 1


class Model(NamedTuple):
    """What a predictor knows of the model, the same live and over a recording."""

    num_experts: tuple[int, ...]
    """Of each of the L layers: E."""
    top_k: tuple[int, ...]
    """Of each layer: picks per token."""
    routers: Sequence[Router | None] = ()
    """Of each layer, None where it is unknown; empty: none is at hand."""
    name: str = ""
    """The model's id, or the last part of its path; empty: unknown."""
    config_hash: str = ""
    """Of its configuration, as traces carry it; empty: unknown."""

    @property
    def num_layers(self) -> int:
        """L"""
        return len(self.num_experts)

    def router(self, layer: int) -> Router | None:
        """The router of `layer`; None where it is unknown, or beyond the last layer."""
        return self.routers[layer] if 0 <= layer < len(self.routers) else None

    @classmethod
    def of_routers(cls, routers: Sequence[Router | None], name: str = "", config_hash: str = "") -> Model:
        """A model of which only the routers are known; a layer without one has no experts to predict."""
        sizes = tuple(0 if router is None else router.num_experts for router in routers)
        picks = tuple(0 if router is None else router.top_k for router in routers)
        return cls(sizes, picks, tuple(routers), name, config_hash)


class Predictor:
    """Guesses at the experts that layers will need. It owns no weights, moves nothing and decides nothing.

    The same object runs live and over a recording, which drive it alike:

        begin_sequence()                          # where another sequence, or batch of them, begins
        begin_pass(T, token_ids); hint(...)       # each forward pass; ids and hints where they are known
        for each layer:
            enter(layer, residual)                # only with hidden states, may predict this layer
            observe(layer, experts, weights)      # what its router has chosen
            step(layer, hidden) or scores(later)  # what will be needed next?

    Calls may be missing: a layer may be left out of a pass, and `begin_pass` may never come where nobody knows. One
    thread at a time. Memory is bounded whatever it is told, `foresee` apart. Parameters of the constructor after
    `model` whose default is a number, a text or a truth value can be chosen by name, `"NAME,PARAMETER=VALUE"`; the
    constructor raises `ConfigError` for values that make no sense.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What must be at hand; `make_predictor` refuses with a `ConfigError` where it is not."""
    wants: ClassVar[frozenset[Need]] = frozenset()
    """What it makes use of where it is at hand."""
    gives_probabilities: ClassVar[bool] = False
    """Whether `scores` are meant as probabilities, to be held to it by their calibration; otherwise they only order."""

    ahead: int = 1
    """How many later layers `step` predicts, at most `MOST_LAYERS`."""

    def __init__(self, model: Model) -> None:
        """A predictor that has seen nothing of `model`. May block, to read its file or to compile its loops."""
        self.model = model

    def begin_sequence(self) -> None:
        """The passes from here on belong to another sequence, or batch of sequences. What was learned stays."""
        return

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        """A forward pass of T tokens begins: of `rows` sequences, one sequence's T / rows tokens after another's.

        Args:
            n_tokens: T, which may be 0.
            token_ids: [T], not kept; None: unknown.
            rows: sequences; T is a multiple of it.
        """
        return

    def hint(self, token_ids: Ints) -> None:
        """These tokens [n] are expected after those of the pass that has begun last: a draft, or the known prompt.

        For one sequence; replaces the hint before, and holds until the next `begin_pass`. Not kept.
        """
        return

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        """The tokens of the pass have chosen in `layer`. Called before `step` of that layer.

        Args:
            layer: the layer.
            experts: [T, K] ids, no id twice in a row; `NO_EXPERT` and ids from E on name no expert. Not kept.
            weights: [T, K] the router's weights of the picks; None: unknown. Not kept.
        """
        return

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        """The block that holds `layer` begins: what will its experts be? None: nothing to add to what `step` said.

        Not called for models whose blocks are not known.

        Args:
            layer: whose picks are made after this block's attention.
            residual: [T, D] what the block is given; not written to.
        """
        return None

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Sequence[Prediction]:
        """The experts of `layer` are to be computed: what will later layers need, nearest first? Blocks while it
        computes. By default the best of `scores` for the next `ahead` layers.

        Args:
            layer: whose picks have just been made.
            hidden: [T, D] what its experts are given; not written to. None: not at hand.
        """
        found = []
        for later in range(layer + 1, min(layer + 1 + self.ahead, self.model.num_layers)):
            scores = self.scores(later)
            if scores is not None:
                prediction = self.best(later, scores)
                if prediction.experts:
                    found.append(prediction)
        return found

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        """How likely each expert of `layer` is asked for, `tokens` forward passes from now. Asking changes nothing.

        Args:
            layer: any layer; with `tokens` 0 one after that of the latest `observe`, or the one just entered.
            tokens: 0 the pass that runs now, 1 the next one, and so on, at most `MOST_TOKENS`.

        Returns:
            [E] finite, higher is likelier; from 0 to 1 where `gives_probabilities`: that the step needs the expert.
            May be a buffer of the predictor's, good until its next call. None: it cannot say, or does not know yet.
        """
        return None

    def foresee(self, sequence: Ints) -> None:
        """The picks [T, L, K] of the whole sequence that has just begun; only called where `needs` has `FUTURE`."""
        return

    def close(self) -> None:
        """Free what is not plain memory. Idempotent."""
        return

    def best(self, layer: int, scores: Floats) -> Prediction:
        """The best of `scores` that are above 0."""
        n = min(len(scores), int(MARGIN * self.model.top_k[layer]))
        order = np.argpartition(-scores, n - 1)[:n] if 0 < n < len(scores) else np.arange(len(scores))
        order = order[np.lexsort((order, -scores[order]))]
        order = order[scores[order] > 0]
        experts: list[int] = order.tolist()
        if not self.gives_probabilities:
            return Prediction(layer, experts, list(range(len(experts))))
        return Prediction(layer, experts, list(range(len(experts))), scores[order].tolist(), scores.tolist())


def missing_needs(kind: type[Predictor], at_hand: Iterable[Need]) -> list[Need]:
    """What `kind` needs and is not `at_hand`, in the order of `Need`."""
    known = frozenset(at_hand)
    return [need for need in Need if need in kind.needs and need not in known]
