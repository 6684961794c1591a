"""Finding stop strings in text that arrives in pieces of any size."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Of all occurrences, the one that ends first counts (of those, the longest), however the text was cut.

    Invariant: `held` is the longest tail of the text seen that begins some stop string, so everything before it is
    safe to show. Knuth, Morris and Pratt's automaton, one per stop string: each character costs O(1), amortised.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text's tail equals

    @property
    def held(self) -> int:
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, str] | None:
        """(where in `text` a stop string ended, that string) or None. Not to be called again after a find."""
        for end, char in enumerate(text, 1):
            for i, stop in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != char:
                    matched = self._failures[i][matched - 1]
                matched += stop[matched] == char
                self._matched[i] = matched
                if matched == len(stop):
                    return end, stop
        return None


def _failure_table(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper suffix that is also its prefix."""
    table = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = table[length - 1]
        length += word[i] == word[length]
        table[i] = length
    return table
