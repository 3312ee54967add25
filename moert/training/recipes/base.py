"""The interface of a recipe."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.plugins import available, load_plugin, read_choice
from moert.predictors._trained import Array
from moert.predictors.base import Model, Need
from moert.training.examples import Example, Examples, TrainingSet
from moert.training.loop import Effort, Point

PACKAGE = "moert.training.recipes"


@dataclass(frozen=True)
class Fitted:
    """What training made."""

    tensors: dict[str, Array]
    """What the predictor's file holds."""
    points: list[Point]
    """The learning curve."""


class Recipe(ABC):
    """How one predictor is trained, and what it says of a whole sequence at once.

    Its name, that of its file, is the predictor's. Parameters of the constructor that have a default can be chosen by
    name, `"NAME,PARAMETER=VALUE"`; they go into the predictor's file.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """`TOKEN_IDS` or `HIDDEN`, where the sequences must have them."""
    least_tokens: ClassVar[int] = 1000
    """To train on; fewer are refused."""
    epochs: ClassVar[int] = 20
    """At most, if nobody says otherwise; 0: it goes through the sequences once."""

    @abstractmethod
    def train(self, model: Model, train: Examples, validation: Examples, effort: Effort) -> Fitted:
        """Train on `train`, and choose by `validation`. Blocks.

        Raises:
            ConfigError: a parameter that makes no sense here.
            MoertError: training failed, or the sequences cannot be read.
        """

    @abstractmethod
    def scores(self, model: Model, tensors: Mapping[str, Array], example: Example) -> npt.NDArray[np.float32]:
        """What the trained predictor gives for each token, layer and expert of a sequence: [T, L, E] probabilities,
        below 0 for experts that a layer does not have. The same as the live predictor's, told token by token.
        """

    def check(self, data: TrainingSet) -> None:
        """See to it that the sequences have what is needed.

        Raises:
            ConfigError: they have not; the traces are named.
        """
        if Need.TOKEN_IDS in self.needs and data.without_ids:
            name, count = data.without_ids[0]
            raise ConfigError(
                f"{recipe_name(type(self))} learns from token ids, and {count:,} sequences of {name} have none; record "
                "the trace with `moert trace record`, which notes them"
            )
        if Need.HIDDEN in self.needs and any(source.hidden is None for source in data.sources):
            raise ConfigError(
                f"{recipe_name(type(self))} is trained on hidden states, which a trace does not have; train it from a "
                "model, `moert train-predictor MODEL --prompts FILE`, or give what `--keep` has kept as --hidden"
            )

    @property
    def options(self) -> dict[str, bool | int | float | str]:
        """The constructor's parameters, by name; a recipe keeps each as an attribute of that name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


def recipe_names() -> list[str]:
    """The predictors that can be trained, sorted."""
    return available(PACKAGE)


def recipe_name(kind: type[Recipe]) -> str:
    """Under which a recipe is chosen."""
    return kind.__module__.rpartition(".")[2]


def make_recipe(text: str) -> Recipe:
    """The recipe that `"NAME,PARAMETER=VALUE,..."` stands for.

    Raises:
        ConfigError: no such predictor or parameter, one that is not trained, or a value that makes no sense.
    """
    name = text.partition(",")[0].strip()
    if ":" not in name and name not in recipe_names():
        known = name in available("moert.predictors")
        what = f"{name!r} is not trained: use it as it is" if known else f"no predictor named {name!r}"
        raise ConfigError(f"{what}; trained are {', '.join(recipe_names())}")
    _, parameters = read_choice(PACKAGE, text, Recipe)  # type: ignore[type-abstract]  # only looked up
    return load_plugin(PACKAGE, name, Recipe)(**parameters)  # type: ignore[type-abstract]


def check_from_to(predictor: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise ConfigError(f"predictor {predictor}: {name}={value} must be from {low} to {high}")
