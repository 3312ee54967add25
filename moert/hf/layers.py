"""The layers of a model: which experts modules it has, and which of them share their experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moert.errors import UnsupportedModelError
from moert.formats import FormatChoice, TensorSpec
from moert.hf.adapters import ExpertsAdapter
from moert.hf.gates import search_gate
from moert.kernels.cpu_matrix import FORMATS
from moert.runtime.fused import FusedExperts
from moert.runtime.layer import LayerSpec
from moert.runtime.storage import Storage

# The names under which the configurations of transformers keep the number of picks per token.
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


@dataclass(frozen=True)
class Layers:
    """The layers in module order; modules whose experts are tied to another's have the other's layer."""

    specs: tuple[LayerSpec, ...]
    layer_of: dict[str, int]
    """Module path -> layer."""

    @property
    def paths_of(self) -> dict[int, list[str]]:
        """Layer -> paths of its modules, in module order."""
        paths: dict[int, list[str]] = {spec.index: [] for spec in self.specs}
        for path, layer in self.layer_of.items():
            paths[layer].append(path)
        return paths


def make_layers(
    adapters: Mapping[str, ExpertsAdapter],
    same_as: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
    stored_as: FormatChoice | None = None,
) -> Layers:
    """Number the layers.

    Args:
        adapters: module path -> adapter, in module order.
        same_as: path of a module whose experts are another module's -> that module's path.
        dtypes: full parameter name -> dtype in memory, where it is not the parameter's own.
        stored_as: the format of the experts in their slots; None: as they are.

    Raises:
        UnsupportedModelError: experts that this format cannot hold.
    """
    specs: list[LayerSpec] = []
    layer_of: dict[str, int] = {}
    for path, adapter in adapters.items():
        owner = same_as.get(path, path)
        if owner in layer_of:
            layer_of[path] = layer_of[owner]
            continue
        index = len(specs)
        tensors = tuple(
            TensorSpec(spec.name, spec.shape, (dtypes or {}).get(f"{path}.{spec.name}", spec.dtype))
            for spec in adapter.specs
        )
        storage = _storage(path, adapter, tensors, stored_as) if stored_as is not None else None
        fused, reason = fuse(adapter, tensors, stored_as)
        specs.append(
            LayerSpec(
                index,
                path,
                adapter.num_experts,
                tensors,
                top_k_of(adapter),
                adapter.num_identity,
                fused,
                reason,
                storage,
            )
        )
        layer_of[path] = index
    return Layers(tuple(specs), layer_of)


def _storage(path: str, adapter: ExpertsAdapter, tensors: tuple[TensorSpec, ...], stored_as: FormatChoice) -> Storage:
    layout = adapter.layout
    turned = (layout.up, layout.down) if layout is not None and layout.transposed else ()
    try:
        return Storage(stored_as, tensors, turned)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def fuse(
    adapter: ExpertsAdapter, tensors: tuple[TensorSpec, ...], stored_as: FormatChoice | None = None
) -> tuple[FusedExperts | None, str | None]:
    """The kernels that compute experts of these `tensors`, so stored, as the module does; or why there are none."""
    layout = adapter.layout
    if layout is None:
        return None, f"an expert of {type(adapter.module).__name__} is more than two products and a gate"
    if not FusedExperts.can_fuse(tensors):
        return None, f"its tensors are of different types: {', '.join(sorted({str(spec.dtype) for spec in tensors}))}"
    shape = next(spec.shape for spec in tensors if spec.name == layout.down)
    with torch.device("cpu"):  # a model being loaded is built on the meta device
        search = search_gate(adapter, shape[0] if layout.transposed else shape[1])
    if search.gate is None:
        return None, search.reason
    name = "plain" if stored_as is None else stored_as.name
    if name not in FORMATS:
        return None, f"moert's kernels do not read {name}: experts are decoded each time they are used"
    return FusedExperts(layout, search.gate, tensors, name), None


def top_k_of(adapter: ExpertsAdapter) -> int:
    """Experts that one token needs at once, by the module's configuration; 1 where it does not say."""
    config = getattr(adapter.module, "config", None)
    for name in _TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, adapter.num_experts)
    return 1


def tied_modules(adapters: Mapping[str, ExpertsAdapter], tied_keys: Mapping[str, str]) -> dict[str, str]:
    """Module path -> path of the module whose experts it shares, from parameter names that are tied."""
    names = {f"{path}.{name}": path for path, adapter in adapters.items() for name in adapter.names}
    same_as = {}
    for target, source in tied_keys.items():
        if target in names and source in names:
            first, second = sorted((names[target], names[source]), key=list(adapters).index)
            same_as[second] = first
    return same_as
