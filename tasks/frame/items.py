"""What a stage is done once for each of: a variant, a seed, or one of each kind. A stage names its axes in its row."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any

from tasks.params import Params

AXES = {
    "variant": "quantize.variants",
    "seed": "select.seeds",
    "profile": "measure.profiles",
}  # the list of params.yaml with the values of each


class Item(Mapping[str, Any]):
    """A value of each of a stage's axes, in their order; empty where the stage is done once."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __getitem__(self, axis: str) -> Any:
        return self._values[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Item({', '.join(f'{axis}={value!r}' for axis, value in self._values.items())})"

    @property
    def words(self) -> tuple[str, ...]:
        """As commands take it, and folders and names show it."""
        return tuple(map(str, self._values.values()))

    def only(self, axes: Sequence[str]) -> "Item":
        """Its part on these axes."""
        return Item(**{axis: value for axis, value in self._values.items() if axis in axes})


def every(axes: Sequence[str], params: Params) -> tuple[Item, ...]:
    """All items of a stage with these axes; of one without any, the empty one."""
    values = (reduce(getattr, AXES[axis].split("."), params) for axis in axes)
    return tuple(Item(**dict(zip(axes, each, strict=True))) for each in product(*values))
