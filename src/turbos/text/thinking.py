"""Who decides on thinking, as a field of data: `auto`, `on`, `off` or `budget N`.

`auto` renders nothing, so that the model's first token is the decision; `on` opens the tag in the prompt, `off` closes
it at once, and `budget N` opens it and asks whoever generates to close it after N tokens of thinking. The switches of
other systems are read by one pure function; no text is ever cut or changed for it. Nothing is rendered here.

>>> Thinking.parse("budget 64"), str(Thinking("off"))
(Thinking(mode='budget', budget=64), 'off')
>>> requested_thinking("what is 2 plus 2? /no_think").mode
'off'
>>> requested_thinking("what is 2 plus 2? /no_think", reasoning_effort="high").mode
'on'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turbos.common.errors import UserError

EFFORTS = {
    "none": "off",
    "minimal": "budget 256",
    "low": "budget 1024",
    "medium": "budget 4096",
    "high": "on",
    "xhigh": "on",
    "max": "on",
}
"""What `reasoning_effort` of the OpenAI interface asks for."""

SWITCHES = {"/think": "on", "/no_think": "off"}
"""Qwen3's soft switches: the last word of a user's or the system's message."""

OPENED = {"auto": (), "on": ("<think>",), "budget": ("<think>",), "off": ("<think>", "</think>")}
"""Tags that a prompt ends in after `<|assistant|>`."""


@dataclass(frozen=True)
class Thinking:
    """A mode; `budget` is the most tokens of thinking, set with mode "budget" only."""

    mode: Literal["auto", "on", "off", "budget"] = "auto"
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in OPENED or (self.mode == "budget") != (self.budget is not None):
            raise UserError(f"thinking must be auto, on or off, or budget N, not {self.mode!r} {self.budget or ''}")
        if self.budget is not None and self.budget < 1:
            raise UserError(f"thinking: a budget of {self.budget} tokens is none, write 'off'")

    def __str__(self) -> str:
        return self.mode if self.budget is None else f"{self.mode} {self.budget}"

    @classmethod
    def parse(cls, text: str) -> Thinking:
        """The mode that `str` writes; UserError for any other text."""
        if text in ("auto", "on", "off"):
            return cls(text)  # type: ignore[arg-type]
        word, _, number = text.partition(" ")
        if word == "budget" and number.isascii() and number.isdecimal() and not number.startswith("0"):
            return cls("budget", int(number))
        raise UserError(f"thinking must be auto, on or off, or budget N, not {text!r}")


def requested_thinking(
    *instructions: str,
    thinking: str | bool | None = None,
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> Thinking:
    """The mode that a request asks for; `instructions` are the texts of its system and user turns, oldest first.

    What says more wins: `thinking` (our field, or a boolean), then `reasoning_effort`, then `enable_thinking` false,
    then the newest soft switch, then `enable_thinking` true. Nothing said is "auto". UserError for unknown words.
    """
    if isinstance(thinking, bool):
        return Thinking("on" if thinking else "off")
    if thinking is not None:
        return Thinking.parse(thinking)
    if reasoning_effort is not None:
        if reasoning_effort not in EFFORTS:
            raise UserError(f"reasoning_effort {reasoning_effort!r} is none of {', '.join(EFFORTS)}")
        return Thinking.parse(EFFORTS[reasoning_effort])
    if enable_thinking is False:
        return Thinking("off")
    switches = [mode for text in instructions if (mode := soft_switch(text)) is not None]
    if switches:
        return switches[-1]
    return Thinking("on") if enable_thinking else Thinking()


def soft_switch(text: str) -> Thinking | None:
    """The mode that a text's last word switches to, if it does: `/think` or `/no_think` after a blank."""
    words = text.strip(" \n")
    for switch, mode in SWITCHES.items():
        if words == switch or words.endswith((" " + switch, "\n" + switch)):
            return Thinking.parse(mode)
    return None
