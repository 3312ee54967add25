"""Something of each layer that a device has, by the number that the layer has in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from moert.runtime.device_cache import DeviceCache

T = TypeVar("T")


class ByLayer(Generic[T]):
    """Indexed by the model's numbers, of which a device may have some only; iterates over what is there, ascending."""

    def __init__(self, items: Mapping[int, T]) -> None:
        self._items = {layer: items[layer] for layer in sorted(items)}

    def __getitem__(self, layer: int) -> T:
        return self._items[layer]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers."""
        return tuple(self._items)


def caches_by_layer(caches: Iterable[DeviceCache]) -> ByLayer[DeviceCache]:
    """Each by the layer that it is of."""
    return ByLayer({cache.spec.index: cache for cache in caches})
