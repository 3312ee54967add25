"""From recorded routing to the file of a trained predictor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.predict.recorded import model_of
from moert.predictors._trained import About, Array, save_trained
from moert.predictors.base import Model
from moert.training.baselines import Popularity, SetTransition
from moert.training.examples import Examples, Shares, Source, TrainingSet
from moert.training.loop import Effort, Point
from moert.training.measures import Measures, Tally
from moert.training.recipes.base import Recipe, make_recipe, recipe_name


@dataclass(frozen=True)
class Training:
    """What became of a training."""

    about: About
    tensors: dict[str, Array]
    points: list[Point]
    """The learning curve."""
    parts: dict[str, tuple[int, int]]
    """Sequences and tokens of `train`, `validation` and `test`."""
    test: Measures
    baselines: dict[str, Measures]
    """On the same sequences, counted on the same ones: `popularity` and `set_transition`."""
    seconds: float

    def save(self, path: str | Path) -> None:
        """Write the predictor's file, whole. Blocks.

        Raises:
            TransferError: it cannot be written; what was there before still is.
        """
        save_trained(Path(path), self.about, self.tensors)


def train(
    sources: list[Source],
    predictor: str | Recipe,
    *,
    effort: Effort | None = None,
    shares: Shares | None = None,
    moert_version: str = "",
) -> Training:
    """Train a predictor on the sequences of traces of one model, and judge it by those that were kept from it.

    Blocks: minutes on a CPU for traces of some 100,000 tokens. The same seed gives the same split, and on a CPU with as
    many threads the same predictor.

    Args:
        sources: the traces.
        predictor: `"NAME"` or `"NAME,PARAMETER=VALUE,..."`, or a recipe.
        effort: how long and on what; by default the recipe's epochs, on a GPU if there is one.
        shares: what is kept from training.
        moert_version: for the file.

    Raises:
        ConfigError: an unknown predictor or parameter, traces of different models, too few tokens or sequences, or no
            token ids or hidden states where they are needed.
        MoertError: the traces cannot be read, or training failed.
    """
    began = perf_counter()
    recipe = make_recipe(predictor) if isinstance(predictor, str) else predictor
    effort = effort or Effort()
    if not recipe.epochs and effort.epochs is not None:
        raise ConfigError(f"{recipe_name(type(recipe))} is counted in one pass and has no epochs: leave them out")
    data = TrainingSet(sources)
    recipe.check(data)
    training, validation, test = data.split(shares or Shares(), effort.seed)
    if training.n_tokens < recipe.least_tokens:
        names = ", ".join(source.name for source in sources)
        raise ConfigError(
            f"{names}: too short to train on: {data.n_sequences:,} sequences of {data.n_tokens:,} tokens in all, and "
            f"the split leaves {training.n_tokens:,} to train on; {recipe_name(type(recipe))} takes at least "
            f"{recipe.least_tokens:,}: record more prompts"
        )
    model = model_of(data.header)
    fitted = recipe.train(model, training, validation, effort)
    tally = Tally(model.top_k)
    for example in test:
        tally.add(recipe.scores(model, fitted.tensors, example), example.experts)
    measures = tally.result()
    parts = {
        name: (len(part), part.n_tokens)
        for name, part in (("train", training), ("validation", validation), ("test", test))
    }
    baselines = _baselines(model, training, test)
    about = About(
        recipe_name(type(recipe)),
        model.num_experts,
        model.top_k,
        model.name,
        model.config_hash,
        data.trace_hash,
        recipe.options,
        {"recall": measures.recall[1.0], "exact": measures.exact, "tokens": measures.n_tokens, "seed": effort.seed},
        moert_version,
    )
    return Training(about, fitted.tensors, fitted.points, parts, measures, baselines, perf_counter() - began)


def describe(training: Training) -> dict[str, Any]:
    """What became of it, as one document."""
    return {
        "predictor": training.about.predictor,
        "options": training.about.options,
        "model": training.about.model,
        "config_hash": training.about.config_hash,
        "trace_hash": training.about.trace_hash,
        "num_layers": len(training.about.num_experts),
        "num_experts": max(training.about.num_experts),
        "top_k": max(training.about.top_k),
        "sequences": {name: sequences for name, (sequences, _) in training.parts.items()},
        "tokens": {name: tokens for name, (_, tokens) in training.parts.items()},
        "bytes": sum(array.nbytes for array in training.tensors.values()),
        "curve": [asdict(point) for point in training.points],
        "best_epoch": max(training.points, key=lambda point: point.validation_recall).epoch,
        "test": _document(training.test),
        "baselines": {name: _document(measures) for name, measures in training.baselines.items()},
        "train_s": training.seconds,
    }


def _document(measures: Measures) -> dict[str, Any]:
    found = asdict(measures)
    for name in ("recall", "precision"):
        found[name] = {f"{width:g}k": value for width, value in found[name].items()}
    return found


def _baselines(model: Model, training: Examples, test: Examples) -> dict[str, Measures]:
    known = {"popularity": Popularity(model), "set_transition": SetTransition(model)}
    for example in training.without_hidden():
        for baseline in known.values():
            baseline.learn(example.experts)
    found = {}
    for name, baseline in known.items():
        tally = Tally(model.top_k)
        for example in test.without_hidden():
            tally.add(_masked(model, baseline.scores(example.experts)), example.experts)
        found[name] = tally.result()
    return found


def _masked(model: Model, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    for layer, n in enumerate(model.num_experts):
        scores[:, layer, n:] = -1
    return scores
