"""Ids to text as they come: no character in halves, no beginning of a stop text shown."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tokenformer.data.tokenizers import Tokenizer

BROKEN = "\ufffd"
"""what decoders put for bytes that are no UTF-8, and so at the end of bytes that are not yet a character"""


class TextStream:
    """The text that follows a prompt, given id by id.

    A decoder may treat the first id of a text in its own way (SentencePiece drops its space), so new ids are
    decoded together with the last before them, and what those gave alone is left out.

    Args:
        prompt: ids before the text.
        stops: texts at which it ends, and which are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._before, self._new = list(prompt[-4:]), list[int]()
        self._held = ""
        self.stopped = False
        """whether a stop text came; what comes after it is dropped"""

    def push(self, token: int) -> str:
        """One more id; the text that is certain now and was not before, often none."""
        self._new.append(token)
        text = self._decoded()
        return "" if text.endswith(BROKEN) else self._settle(text)

    def end(self) -> str:
        """No id comes any more; the text that was held back."""
        text = self._settle(self._decoded()) + self._held
        self._held = ""
        return text

    def _decoded(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._new)[len(known) :]

    def _settle(self, text: str) -> str:
        """Take the characters of the new ids; hold back what a stop text may begin with."""
        if self._new:
            self._before, self._new = self._new, []
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
