"""Text of tokens as they come: whole characters only, and nothing that may yet turn out to begin a stop string.

The pieces add up to `Tokenizer.decode` of all tokens, or to what stands before the stop string that is complete first.
How the text is cut into tokens makes no difference. Token ids that stop are not seen here.

>>> text = StopText(("end",))
>>> text.feed(b"the e"), text.feed(b"nough e"), text.feed(b"nding")
('the ', 'enough ', '')
>>> text.stopped, text.finish()
(True, '')
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopText:
    """Decodes UTF-8 piece by piece and looks for stop strings; `stopped` once one is complete."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, content: bytes) -> str:
        """The text that is certain now; nothing once stopped."""
        return "" if self.stopped else self._add(self._decoder.decode(content))

    def finish(self) -> str:
        """What was held back: the text ends here. Bytes that make no character become the replacement character."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            # The stop that is complete first, whatever piece it came in; of two that end together, the longer one.
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - self._beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
