"""All pairs of texts whose character 5-grams overlap by at least a Jaccard similarity. Exact, not sampled.

Prefix filtering: with all grams in one order, rarest first, two sets of similarity t must share a gram among
the first |x| - ceil(t|x|) + 1 of each, so only those are indexed (Bayardo, Ma and Srikant, "Scaling up all
pairs similarity search", WWW 2007; Xiao et al., "Efficient similarity joins for near duplicate detection",
WWW 2008).
"""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

GRAM = 5


def normalise(text: str) -> str:
    """Compatibility form, case folded, white space collapsed: what counts as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str) -> frozenset[str]:
    """The set of character 5-grams; a shorter text is one gram."""
    return frozenset(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))


def pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Yield `(i, j, similarity)` for each pair of different positions at or above `threshold` (0 to 1].

    Texts are taken as they are: normalise them, and drop equal ones, before.
    """
    sets = [grams(text) for text in texts]
    frequency = Counter(gram for each in sets for gram in each)
    rank = {gram: i for i, gram in enumerate(sorted(frequency, key=lambda gram: (frequency[gram], gram)))}
    index: defaultdict[int, list[int]] = defaultdict(list)
    # Smallest first, so that a candidate is never larger than the text it is looked up for.
    for i in sorted(range(len(texts)), key=lambda i: (len(sets[i]), i)):
        size = len(sets[i])
        least = threshold * size - 1e-9  # an overlap or a size below this cannot reach the threshold
        prefix = sorted(rank[gram] for gram in sets[i])[: size - math.ceil(least) + 1]
        for j in sorted({j for gram in prefix for j in index[gram] if len(sets[j]) >= least}):
            common = len(sets[i] & sets[j])
            similarity = common / (size + len(sets[j]) - common)
            if similarity >= threshold - 1e-9:
                yield min(i, j), max(i, j), similarity
        for gram in prefix:
            index[gram].append(i)
