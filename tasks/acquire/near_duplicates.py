"""All pairs of texts whose character 5-grams overlap by at least a Jaccard similarity.

MinHash in bands finds candidates (Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", 2014, chapter 3): two texts of similarity s agree in a band of r rows with
chance s**r, so with enough bands a pair at the threshold is overlooked once in 10**12. Each candidate is then compared
by its grams themselves, so no pair is told that is not one.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

GRAM = 5
MISSED = 1e-12  # the chance of a pair at the threshold to be overlooked
PERMUTATIONS = 128  # 4 bytes of memory a text each; more of them only where the threshold is low
TEMPLATE = 20  # texts from which on a beginning that all share counts as their template


def normalise(text: str) -> str:
    """Compatibility form, case folded, white space collapsed: what counts as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str) -> frozenset[str]:
    """The set of character 5-grams; a shorter text is one gram."""
    return frozenset(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))


def without_template(texts: Sequence[str]) -> list[str]:
    """The texts without the whole words with which all of many begin or end: instructions and examples that every prompt
    repeats say nothing about whether two are alike.
    """
    if len(set(texts)) < TEMPLATE:
        return list(texts)
    start = _beginning(texts).rfind(" ") + 1
    rest = [text[start:] for text in texts]
    end = _beginning([text[::-1] for text in rest]).rfind(" ") + 1
    return [text[: len(text) - end] for text in rest]


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def pairs(
    texts: Sequence[str], threshold: float, skip: Callable[[int, int], bool] = lambda i, j: False
) -> Iterator[tuple[int, int, float]]:
    """Yield `(i, j, similarity)`, i < j, for each pair of positions at or above `threshold` (0 to 1] but those to skip,
    which are asked for one by one, so that what was yielded before may decide.

    Texts are taken as they are: normalise them, and drop equal ones, before.
    """
    from rensa import RMinHash, RMinHashLSH

    rows, bands = banding(threshold)
    index = RMinHashLSH(threshold, rows * bands, bands)
    compared = lru_cache(maxsize=1024)(lambda i: grams(texts[i]))
    for j, text in enumerate(texts):
        own = grams(text)
        sketch = RMinHash(num_perm=rows * bands, seed=0)
        sketch.update(sorted(own))
        for i in sorted(index.query(sketch)):
            if skip(i, j):
                continue
            other = compared(i)
            common = len(own & other)
            similarity = common / (len(own) + len(other) - common)
            if similarity >= threshold - 1e-9:
                yield i, j, similarity
        index.insert(j, sketch)


def banding(threshold: float) -> tuple[int, int]:
    """Rows of a band and bands: as many rows as leave a pair at the threshold a chance of at most MISSED to be overlooked,
    so that few pairs below it are compared.
    """
    for rows in range(PERMUTATIONS, 0, -1):
        equal = threshold**rows  # the chance that a band of the two is
        bands = 1 if equal == 1 else max(1, math.ceil(math.log(MISSED) / math.log1p(-equal))) if equal > 1e-12 else 0
        if bands and (rows * bands <= PERMUTATIONS or rows == 1):
            return rows, bands
    raise AssertionError("one row a band is always possible")
