"""Stop strings in streamed text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, up to the first stop string; holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None  # the stop string that ended the text
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to show after this piece."""
        self._held += text
        starts = [(start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            start, self.found = min(starts)
            shown, self._held = self._held[:start], ""
            return shown
        longest = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        safe = len(self._held) - longest
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
