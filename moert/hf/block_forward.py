"""Blocks of experts whose single tokens go through router, experts and shared experts in one call of moert's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moert.hf.moe_block import MoeBlock, find_block
from moert.hf.own_forward import OwnForward, is_differentiated, is_recorded
from moert.hf.unchanged import Unchanged
from moert.kernels.moe_block import TokenBlock
from moert.runtime.runtime import OffloadRuntime


class KnownBlock:
    """A block that `find_block` knows, whose experts moert's kernels compute."""

    def __init__(self, parts: Unchanged, block: MoeBlock, kernel: TokenBlock, runtime: OffloadRuntime) -> None:
        self.parts, self.block, self.kernel, self.runtime = parts, block, kernel, runtime
        self.index = block.experts.layer

    @classmethod
    def of(cls, module: nn.Module) -> KnownBlock | None:
        """What `module` is, if it is one."""
        block = find_block(module)
        runtime = None if block is None else block.experts.runtime
        if block is None or runtime is None:
            return None
        fused = runtime.layers[block.experts.layer].spec.fused
        if fused is None:
            return None
        parts = Unchanged()
        block.note(parts, module)
        try:
            kernel = TokenBlock(block.router.router, fused.ffn, block.shared_expert(module), block.scale)
        except ValueError:
            return None
        return cls(parts, block, kernel, runtime)

    def is_free(self) -> bool:
        """Whether it is still so, and nobody has to be asked in between."""
        block = self.block
        experts = block.experts
        return (
            not block.gate.training
            and experts.runtime is self.runtime
            and experts.scores is None
            and self.parts.holds
            and block.are_told()
        )

    def note(self, parts: Unchanged) -> None:
        """All that `is_free` asks."""
        parts.join(self.parts)
        gate, experts = self.block.gate, self.block.experts
        parts.add_entry(vars(gate), "training")
        for name in ("runtime", "scores"):
            parts.add_entry(vars(experts), name)
        parts.add_hooks(gate)
        parts.add_hooks(experts)


class BlockForward(OwnForward):
    """Stands in a block's own `forward`."""

    def __init__(self, module: nn.Module, known: KnownBlock) -> None:
        super().__init__(module)
        self._forward = type(module).forward
        self.known: KnownBlock | None = known
        """None once the module is of other parts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        module = self.module()
        if len(args) == 1 and not kwargs and type(module).forward is self._forward:
            output = self._run(module, args[0])
            if output is not None:
                return output
        return type(module).forward(module, *args, **kwargs)

    def _run(self, module: nn.Module, x: Any) -> Any:
        """As for the block; None, and nothing has happened, if it is not a single token's."""
        known = self.known
        if known is None or type(x) is not torch.Tensor or x.dim() != 3 or x.shape[:2] != (1, 1):
            return None
        weight = known.block.router.router.weight
        if (
            module.training
            or is_recorded()
            or torch.is_autocast_enabled("cpu")
            or is_differentiated(x)
            or is_differentiated(weight)
        ):
            return None
        if not known.is_free():
            if known.parts.is_gone:
                self.known = None
            return None
        found = known.runtime.run_token(known.index, known.kernel, (x,), known.block.experts.adapter.compute)
        if found is None:
            return None
        known.block.tell(x[0], found.ids, found.weights, found.logits)
        others = known.block.others
        if others is None:
            return found.output
        outputs = known.block.router.outputs(found.ids, found.weights, found.logits)
        return (found.output, *(outputs[place] for place in others))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        mine = super().__deepcopy__(memo)
        if mine is not self:
            mine.known = None  # it reads the weights of this one's module
        return mine


def block_forward(module: nn.Module) -> BlockForward | None:
    """A forward for `module`, if it is a `KnownBlock`. The module is left as it is."""
    known = KnownBlock.of(module)
    return None if known is None else BlockForward(module, known)
