"""Finds stop strings in a text that comes piece by piece."""

from __future__ import annotations


class StopStrings:
    """Cuts a text at the first of some strings. Text that may still become one is held back.

    before: what came before the text; its end may begin a stop string, which then has all of the text before its end.
    """

    def __init__(self, stop: tuple[str, ...], before: str = "") -> None:
        self._stop = stop
        self._held = before[len(before) - max((_overlap(before, each) for each in stop), default=0) :]
        self._num_before = len(self._held)
        self.is_found = False

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if not self._stop:
            return text
        text = self._held + text
        # The one complete first wins, so that the cut does not depend on how tokens group characters.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._held = ""
            _, at = min(found)
            return self._own(text[:at])
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return self._own(text[:certain])

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return self._own(held)

    def _own(self, text: str) -> str:
        """Return `text` without what of it came before."""
        num_foreign = min(self._num_before, len(text))
        self._num_before -= num_foreign
        return text[num_foreign:]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
