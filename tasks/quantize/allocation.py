"""Bits where they count: a type for each tensor, with the least loss in all within a number of bytes. Pure."""

import heapq
from collections.abc import Mapping


def allocate(
    losses: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, float]], budget: float
) -> dict[str, str]:
    """The type of each tensor. `losses` and `sizes`: tensor -> type -> what it loses, and its bytes; they add up.

    Starting with the fewest bytes of each tensor, the step that saves the most loss for its bytes is made as long as it fits:
    along the lower convex hulls that is the best there is but for the last step (Shoham and Gersho, Efficient Bit
    Allocation for an Arbitrary Set of Quantizers, 1988).

    Raises:
        ValueError: the budget is below the fewest bytes.
    """
    hulls = {name: _hull(losses[name], sizes[name]) for name in losses}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(sizes[name][hull[0]] for name, hull in hulls.items())
    if left < 0:
        raise ValueError(f"{budget:.0f} bytes are {-left:.0f} too few")

    def step(name: str) -> tuple[float, str] | None:
        hull, at = hulls[name], chosen[name]
        if at + 1 == len(hull):
            return None
        now, then = hull[at], hull[at + 1]
        saved = losses[name][now] - losses[name][then]
        return -saved / (sizes[name][then] - sizes[name][now]), name

    waiting = [each for name in hulls if (each := step(name))]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        hull, at = hulls[name], chosen[name]
        more = sizes[name][hull[at + 1]] - sizes[name][hull[at]]
        if more > left:
            continue  # a smaller tensor may still have a step that fits
        left -= more
        chosen[name] = at + 1
        if following := step(name):
            heapq.heappush(waiting, following)
    return {name: hull[chosen[name]] for name, hull in hulls.items()}


def _hull(losses: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    """The types on the lower convex hull of loss over bytes, fewest bytes first: each step saves less a byte than the one before."""
    hull: list[str] = []
    for kind in sorted(losses, key=lambda each: (sizes[each], losses[each], each)):
        if hull and losses[kind] >= losses[hull[-1]]:
            continue  # no fewer bytes, and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1], losses, sizes) <= _slope(hull[-1], kind, losses, sizes):
            hull.pop()
        hull.append(kind)
    return hull


def _slope(less: str, more: str, losses: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    """Loss saved a byte."""
    return (losses[less] - losses[more]) / (sizes[more] - sizes[less])
