"""moert's own kernels as a contender of the CPU expert benchmark."""

from __future__ import annotations

import torch
from cpu_layers import Layer, Pages, Quantised, Shape, Step, page_bytes, quantise
from cpu_measure import Job

from moert import _C
from moert.kernels import cpu
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import Matrix, matrix
from moert.kernels.gate import Gate

CHOSEN = _C.isa()
"""What runs unless another instruction set is asked for; MOERT_ISA has been obeyed."""

BYTES_PER_NUMBER = {"bf16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}


def stored(layer: Layer, form: str) -> tuple[list[Quantised], list[Quantised]]:
    """All experts of a layer in a quantised format: their up and their down projections."""
    return [quantise(one, form) for one in layer.up], [quantise(one, form) for one in layer.down]


class Moert:
    """bf16 is read where it lies, as transformers lays it out; int8 and int4 are groups of 32 with fp16 scales."""

    def __init__(
        self,
        shape: Shape,
        layers: list[Layer],
        form: str,
        copies: int,
        quantised: tuple[list[Quantised], list[Quantised]] | None = None,
        isa: str | None = None,
    ) -> None:
        self.name = "moert" if isa is None else f"moert ({isa})"
        self.detail = f"{isa or CHOSEN}, 2 MiB pages, row-major as in the checkpoint"
        self.expert_bytes = shape.expert_numbers * BYTES_PER_NUMBER[form]
        self.copies = copies
        self._isa = isa
        self._shape = shape
        self._ffn = ExpertFfn(Gate(), hidden=shape.hidden, width=shape.width, dtype=torch.bfloat16)
        self._pages: Pages | None = None
        tensors = [{"up": layer.up, "down": layer.down} for layer in layers]
        if quantised is None:
            self.copies = len(layers)
        else:
            tensors = self._place(quantised, copies)
        kind = "plain" if form == "bf16" else form
        self._experts = []
        for held in tensors:
            of_expert = [{name: stack[number] for name, stack in held.items()} for number in range(shape.experts)]
            matrices = [[matrix(kind, one, name) for name in ("up", "down")] for one in of_expert]
            self._experts.append([self._ffn.expert(up, down) for up, down in matrices])

    def _place(self, quantised: tuple[list[Quantised], list[Quantised]], copies: int) -> list[dict[str, torch.Tensor]]:
        stacks = {}
        for name, weights in zip(("up", "down"), quantised, strict=True):
            stacks[name] = torch.stack([weight.codes for weight in weights])
            stacks[f"{name}_scales"] = torch.stack([weight.scales for weight in weights])
        self._pages = Pages(page_bytes(*(stack.nbytes for stack in stacks.values())) * copies)
        return [{name: self._pages.take_copy(stack) for name, stack in stacks.items()} for _ in range(copies)]

    def begin(self) -> None:
        cpu.use_isa(self._isa or CHOSEN)

    def decodes(self, tokens: int) -> bool:
        """Whether quantised weights are decoded to bf16, and activations taken in it, for that many tokens."""
        self.begin()
        up: Matrix = self._experts[0][0].tensors[0]
        return up.format != "plain" and up.kernel_name(tokens).startswith("amx")

    def prepare(self, step: Step, copy: int) -> Job:
        held = self._experts[copy]
        if len(step.x) == 1:
            return lambda: self._one_token(step, held)
        out = torch.empty(step.x.shape, dtype=torch.float32)

        def job() -> torch.Tensor:
            # Grouping by expert is part of the work: the others are given picks too.
            ids, tokens, weights = grouped(step, self._shape.experts)
            self._ffn.run(step.x, [held[expert] for expert in ids], tokens, weights, out.zero_())
            return out

        return job

    def _one_token(self, step: Step, held: list[Expert]) -> torch.Tensor:
        ids = step.ids[0].tolist()
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return self._ffn.run_token(step.x, [held[ids[place]] for place in order], order, step.weights)

    def close(self) -> None:
        self._experts = []
        if self._pages is not None:
            self._pages.arena.close()


def grouped(step: Step, experts: int) -> tuple[list[int], list[torch.Tensor | None], list[torch.Tensor]]:
    """The picked experts in ascending order, with the tokens that picked each and their weights."""
    picks = step.ids.shape[1]
    flat = step.weights.flatten()
    places = step.ids.flatten().argsort(stable=True)
    counts = step.ids.flatten().bincount(minlength=experts).tolist()
    tokens = (places // picks).split(counts)
    weights = flat[places].split(counts)
    hit = [expert for expert in range(experts) if counts[expert]]
    return hit, [tokens[expert] for expert in hit], [weights[expert] for expert in hit]
