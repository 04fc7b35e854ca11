"""Constrained output: a grammar compiled for a tokenizer, and one answer's way through it. The work is llguidance's.

A constraint says which tokens may come next; ends of an answer are not its tokens, so it says apart whether the answer
may end. No special token is inside but those that a grammar names. Grammars come from strangers: one that cannot be
compiled or met is a UserError, and one that fails later ends its own answer only.

>>> tokenizer = Tokenizer.train(["yes no maybe"] * 3, vocab_size=320)
>>> constraint = GrammarCompiler(tokenizer).constraint(Grammar.choice(["yes", "no"]))
>>> [constraint.accept(token) for token in tokenizer.encode("yes")][-1], constraint.may_end, constraint.complete
(True, True, True)
>>> GrammarCompiler(tokenizer).constraint(Grammar("regex", "[0-9"))
Traceback (most recent call last):
turbos.common.errors.UserError: grammar (regex) cannot be compiled: invalid regex "[0-9" (in regex): regex parse error:
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbos.common.errors import UserError
from turbos.engine.sampling_params import Grammar
from turbos.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_GRAMMARS = 64
"""Compiled grammars that are kept, the latest used ones."""

JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{1,16}"}
"""JSON may be laid out, but a model that writes nothing but blanks would never end."""

LONGEST_REASON = 200


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps them by their text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        # Compiling may take seconds: whoever wants a grammar that is there need not wait for it.
        self._lock, self._compiling = threading.Lock(), threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """The beginning of an answer; UserError for a grammar that cannot be compiled or met. From any thread."""
        matcher = self._copy(grammar)
        if matcher is None:
            with self._compiling:
                matcher = self._copy(grammar) or self._keep(grammar, self._compile(grammar))
        return Constraint(matcher, self._tokenizer, grammar.special_ids)

    def _copy(self, grammar: Grammar) -> LLMatcher | None:
        """A matcher at the beginning of a grammar that is kept."""
        with self._lock:
            if grammar not in self._compiled:
                return None
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].deep_copy()

    def _keep(self, grammar: Grammar, matcher: LLMatcher) -> LLMatcher:
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        if self._backend is None:
            self._backend = _backend(self._tokenizer)
        matcher = LLMatcher(self._backend, _source(grammar), log_level=0)
        if matcher.is_error():
            raise UserError(f"grammar ({grammar.kind}) cannot be compiled: {_first_line(matcher.get_error())}")
        first = Constraint(matcher.deep_copy(), self._tokenizer, grammar.special_ids)
        if not first.allowed().any():
            raise UserError(f"grammar ({grammar.kind}) cannot be met: no token may begin it")
        return matcher


class Constraint:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer, special_ids: frozenset[int] = frozenset()) -> None:
        """`special_ids` are the special tokens that may stand inside; no other may."""
        self._matcher, self._vocabulary = matcher, tokenizer.vocab_size
        self._special = np.array(sorted(tokenizer.special_ids - special_ids), np.int64)
        # One bit for each token and one for the end, in whole words of 32.
        self._bits = np.zeros(-(-(self._vocabulary + 1) // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the tokenizer may come next, bool `[tokens]`; none after an error."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little").view(np.bool_)
        bits[self._special] = False
        return bits

    def accept(self, token: int) -> bool:
        """Go on by one token of the answer; False, for good, where the grammar has no such token here."""
        return token < self._vocabulary and self._matcher.consume_token(token)

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole as it stands."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self.may_end and self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar goes no further, in one line; empty if it does."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else ""


class _Vocabulary:
    """What llguidance wants to know of a tokenizer; a special token is its name behind a byte that no text has.

    The end is an id of its own behind the vocabulary: which tokens end an answer is each request's choice.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special_ids
        ids = range(tokenizer.vocab_size)
        self.tokens = [(b"\xff" if id in special else b"") + tokenizer.token_bytes(id) for id in ids]
        self.special_token_ids = sorted(special)
        self.eos_token_id, self.bos_token_id = tokenizer.vocab_size, None
        self.tokens.append(b"\xff<end>")
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _backend(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    vocabulary = _Vocabulary(tokenizer)
    return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=len(vocabulary.tokens), eos_token=vocabulary.eos_token_id)


def _source(grammar: Grammar) -> str:
    """A grammar as llguidance reads it. JSON is read here first: it would be pasted into more JSON as it is."""
    from llguidance import LLMatcher

    if grammar.kind in ("regex", "lark", "choice"):
        text = _alternatives(grammar) if grammar.kind == "choice" else grammar.text
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"grammar ({grammar.kind}) holds half a surrogate pair: it is no text")
        return LLMatcher.grammar_from_regex(text) if grammar.kind == "regex" else LLMatcher.grammar_from_lark(text)
    schema = {"type": "object"} if grammar.kind == "json" else _read_json(grammar)
    if not isinstance(schema, dict):
        raise UserError(f"grammar ({grammar.kind}) must be a JSON object, not {grammar.text[:LONGEST_REASON]}")
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)
    except ValueError as error:  # what Python's reader takes for JSON and llguidance does not: NaN, half surrogates
        raise UserError(f"grammar ({grammar.kind}) cannot be compiled: {_first_line(str(error))}") from error


def _alternatives(grammar: Grammar) -> str:
    choices = _read_json(grammar)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise UserError("grammar (choice) must be a JSON list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _read_json(grammar: Grammar) -> object:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"grammar ({grammar.kind}) is not JSON: {_first_line(str(error))}") from error


def _first_line(message: str) -> str:
    """What a message of llguidance says, without the place and the drawing of it."""
    lines = [line for line in message.splitlines() if line.strip()]
    return re.sub(r"^at \d+\(\d+\): ", "", lines[0])[:LONGEST_REASON] if lines else "no reason given"
