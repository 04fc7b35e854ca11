"""What a server takes on: options, keys, how many answers at once, how long a prompt and an answer may be.

More answers than fit run one after the other; more than may wait are refused with 429 and the seconds after which it
is worth asking again. Nothing here knows what is asked.

>>> gate = Gate(most=2)
>>> with gate.admit(2):
...     gate.open
2
>>> gate.open
0
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.serve.errors import ApiError
from turbos.text.tokenizer import Tokenizer

SHORTEST_KEY = 8
LONGEST_RETRY = 60
PIECE = 1 << 16
"""Characters of a text that are encoded at once where it may be far too long."""
MOST_BY_CUTS = 16
"""Tokens that cutting a text in two may add."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server.

    `api_keys` empty: whoever reaches the port may ask. `max_body` in bytes; `max_prompt_tokens` and
    `max_completion_tokens` (None: what memory holds) bound one answer, `default_completion_tokens` is what a request
    gets that names no number. `max_open` answers may run or wait at once. A client that takes nothing for
    `stall_seconds` is cut off; `grace_seconds` is what open answers get when the server stops. `allowed_hosts` are the
    names that a request may call this server by (empty: any). `log_prompts` writes messages into the log.
    """

    api_keys: tuple[str, ...] = ()
    max_body: int = 16 << 20
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    default_completion_tokens: int = 8192
    max_open: int = 512
    stall_seconds: float = 60.0
    grace_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] = ()
    sessions: Path | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body", "max_prompt_tokens", "max_completion_tokens", "default_completion_tokens", "max_open"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"serve: {name} must be at least 1, not {value}")
        if not (0 <= self.grace_seconds < 1e6 and 0 < self.stall_seconds < 1e6):
            raise UserError("serve: grace_seconds and stall_seconds are seconds: not negative, and finite")
        if any(len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise UserError(f"serve: an API key needs at least {SHORTEST_KEY} printable ASCII characters")


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and lines that begin with # are none. UserError without any."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read ({error})") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path}: holds no key; write one a line")
    return keys


class Keys:
    """Compares what a client sends with all keys, in a time that tells nothing of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests have one length, so that not even a key's length shows.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def wanted(self) -> bool:
        """Whether a request needs a key at all."""
        return bool(self._digests)

    def accept(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header carries one of the keys."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class Gate:
    """Counts answers that run or wait; used from one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.open, self.refused = most, 0, 0
        self._seconds = 1.0  # an answer's, as of late

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Let a request with so many answers in, for as long as the context lasts; ApiError 429 where it is full."""
        if count > self.most:
            raise ApiError(
                400, f"n: {count} answers are more than the {self.most} that this server runs at once", param="n"
            )
        if self.open + count > self.most:
            self.refused += 1
            raise ApiError(
                429,
                f"{self.open} answers are open already, of at most {self.most}: ask again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self.retry_after)},
            )
        began = time.monotonic()
        self.open += count
        try:
            yield
        finally:
            self.open -= count
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)

    @property
    def retry_after(self) -> int:
        """Seconds in which a place should become free."""
        return min(LONGEST_RETRY, max(1, math.ceil(self._seconds)))


def outgrows(tokenizer: Tokenizer, texts: Iterable[str], limit: int | None) -> bool:
    """Whether texts surely have more tokens than a limit; no more of them is encoded than it takes to know.

    Texts are cut into pieces for it, and a cut may add tokens, so texts near the limit are never said to outgrow it.
    """
    if limit is None:
        return False
    count = -limit
    for text in texts:
        for start in range(0, len(text), PIECE):
            (ids,) = tokenizer.encode_batch([text[start : start + PIECE]])
            count += len(ids) - MOST_BY_CUTS
            if count > 0:
                return True
    return False


def most_prompt_tokens(longest: int | None, options: ServeOptions) -> int | None:
    """The most tokens that a prompt may have: what memory holds beside one of the answer, and what the options say."""
    limits = [options.max_prompt_tokens, None if longest is None else longest - 1]
    return min((one for one in limits if one is not None), default=None)


def too_long(num_prompt: int | None, limit: int | None, param: str) -> ApiError:
    """The refusal of a prompt; `num_prompt` None where nobody counted to its end."""
    count = f"more than {limit}" if num_prompt is None else num_prompt
    what = f"the prompt has {count} tokens, this server takes at most {limit}"
    message = f"{what}: shorten it, or give the server more memory"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def completion_tokens(
    asked: int | None, num_prompt: int, longest: int | None, options: ServeOptions, param: str = "messages"
) -> int:
    """How many tokens an answer may have; ApiError 400 where prompt and answer cannot fit.

    `longest` is what memory holds of prompt and answer together, None where their number costs none.
    """
    limit = most_prompt_tokens(longest, options)
    if limit is not None and num_prompt > limit:
        raise too_long(num_prompt, limit, param)
    room = None if longest is None else longest - num_prompt
    most = min((one for one in (room, options.max_completion_tokens) if one is not None), default=None)
    if asked is None:
        return options.default_completion_tokens if most is None else min(most, options.default_completion_tokens)
    if most is not None and asked > most:
        what = f"max_tokens {asked} is more than the {most} tokens that are left after a prompt of {num_prompt}"
        if options.max_completion_tokens is not None and asked > options.max_completion_tokens:
            what = (
                f"max_tokens {asked} is more than the {options.max_completion_tokens} that this server writes at once"
            )
        raise ApiError(400, what, param="max_tokens", code="context_length_exceeded")
    return asked
