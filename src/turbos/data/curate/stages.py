"""The stages of curation in their order: each drops or edits documents of a batch and says why.

Stages that only look at one text come before those that remember texts, so that what is dropped for itself never takes
a later copy with it; exact copies go first because they are cheap to see and would meet the same verdict anyway.

    readable -> exact -> extraction -> scan -> labels -> rules -> quality -> contamination -> near -> blocks -> semantic
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from turbos.data.curate.batch import Batch
from turbos.data.curate.blocks import Blocks
from turbos.data.curate.contamination import EvaluationTexts
from turbos.data.curate.copies import NearCopies, digests
from turbos.data.curate.extraction import extracted
from turbos.data.curate.hashing import HashSet
from turbos.data.curate.labels import UNSURE, Labels, writing_of
from turbos.data.curate.rules import RuleSet, broken_rules
from turbos.data.curate.semantic import SemanticCopies
from turbos.data.curate.words import Count

Arrays = dict[str, np.ndarray]
Drop = Callable[[int, str, str], None]
"""Drop the document at a place of the batch: reason, detail."""
Show = Callable[[int, str, bytes], None]
"""Show what was cut out of the document at a place: reason, the cut."""

CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\v") + b"\x7f"
MOST_CONTROLS, HARMLESS_CONTROLS = 0.001, 3
REPLACEMENT = "\ufffd".encode()
MOST_REPLACEMENTS = 0.005
"""Shares of bytes beyond which a text is binary, or was decoded wrongly; old texts end in a stray sign or two."""

FEWEST_BYTES_JUDGED = 200
"""Shorter texts are not asked for their quality: too few runs of bytes to tell."""

LEAST_LEFT, LEAST_BYTES_LEFT = 0.2, 80
"""A document that block pruning leaves less of goes altogether."""


class Stage(ABC):
    """A stage: `apply` drops and edits; a stage that remembers gives its memory as arrays and takes it back."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Drop documents of a batch (and say why), or edit them in place."""

    def arrays(self) -> Arrays:
        """What the stage remembers; nothing for most."""
        return {}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:  # noqa: B027 (most remember nothing)
        """Take back what `arrays` gave."""


class Readable(Stage):
    """Binary data and texts decoded with the wrong encoding go."""

    name, title = "readable", "Readable text"

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Count control characters and replacement characters."""
        for place in batch.living():
            text = batch.texts[place]
            controls = len(text) - len(text.translate(None, CONTROLS))
            if controls > max(HARMLESS_CONTROLS, MOST_CONTROLS * len(text)):
                drop(place, "binary data", f"{controls} control characters")
            elif (signs := text.count(REPLACEMENT)) * len(REPLACEMENT) > MOST_REPLACEMENTS * len(text):
                drop(place, "wrong encoding", f"{signs} replacement characters")
            elif not text.strip():
                drop(place, "empty", "")


class Exact(Stage):
    """The same text again goes."""

    name, title = "exact", "Exact copies"

    def __init__(self) -> None:
        self.seen = HashSet()

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Look a hash of every text up."""
        places = batch.living()
        is_new = self.seen.add_new(digests([batch.texts[place] for place in places]))
        for place, new in zip(places, is_new, strict=True):
            if not new:
                drop(place, "the same text came before", "")

    def arrays(self) -> Arrays:
        """The hashes."""
        return {"seen": self.seen.keys()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The hashes."""
        self.seen = HashSet(arrays["seen"])


class Extraction(Stage):
    """Markup becomes text."""

    name, title = "extraction", "Text out of markup"

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Replace documents that are markup by the text inside."""
        for place in batch.living():
            # Markup has one of these two; most texts have neither and need no decoding.
            if b"<" not in batch.texts[place] and b"[[" not in batch.texts[place]:
                continue
            text = extracted(batch.texts[place].decode())
            if text == "":
                drop(place, "markup without text", "")
            elif text is not None:
                show(place, "the markup of", batch.texts[place])
                # An entity can spell half a surrogate pair, which has no UTF-8.
                batch.texts[place] = text.encode(errors="ignore")


class Scanning(Stage):
    """Words, lines and their hashes are counted once, for all later stages."""

    name, title = "scan", "Words and lines counted"

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Scan, so that the time is this stage's."""
        assert len(batch.scan) == len(batch)


class Labelling(Stage):
    """Language, topic and quality; languages that are not wanted go."""

    name, title = "labels", "Language and topic labels"

    def __init__(self, labels: Labels, languages: tuple[str, ...] = ()) -> None:
        self.labels, self.languages = labels, languages

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Judge every document; without wanted languages none goes."""
        batch.judged = self.labels.judge(batch.scan)
        for place in batch.living() if self.languages else ():
            language = batch.judged.language_N[place]
            if language not in self.languages:
                drop(place, f"language {language}", "")


class Rules(Stage):
    """The published heuristics."""

    name, title = "rules", "Heuristic rules"

    def __init__(self, rule_set: RuleSet) -> None:
        self.rule_set = rule_set

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """A document goes for the first rule that it breaks; the sample names all."""
        writing_N = writing_of(batch.scan, batch.judged.language_N if batch.judged else None)
        broken = broken_rules(batch.scan, writing_N, self.rule_set)
        for place in batch.living():
            if broken[place]:
                first, *others = broken[place]
                drop(place, f"{first.name} ({first.paper})", "; ".join(rule.name for rule in others))


class Quality(Stage):
    """What reads like spoilt text goes, in languages that the classifier has learnt."""

    name, title = "quality", "Quality score"

    def __init__(self, least: float, languages: tuple[str, ...]) -> None:
        self.least, self.languages = least, languages

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Compare the score with the least one."""
        assert batch.judged is not None
        for place in batch.living():
            if len(batch.texts[place]) < FEWEST_BYTES_JUDGED:
                continue
            score = float(batch.judged.quality_N[place])
            # A text whose language is unsure may be no language at all.
            if score < self.least and batch.judged.language_N[place] in (*self.languages, UNSURE):
                drop(place, f"score below {self.least:g}", f"score {score:.3f}")


class Contamination(Stage):
    """What holds evaluation texts goes."""

    name, title = "contamination", "Evaluation texts"

    def __init__(self, evaluation: EvaluationTexts) -> None:
        self.evaluation = evaluation

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Look 13-grams and whole lines up."""
        found = self.evaluation.found_in(batch.scan)
        for place in np.flatnonzero(found & batch.alive):
            drop(int(place), "holds an evaluation text", "")


class Near(Stage):
    """Almost the same text again goes."""

    name, title = "near", "Near copies (MinHash)"

    def __init__(self) -> None:
        self.copies = NearCopies()

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Look MinHash bands up."""
        found = self.copies.first_seen(batch.scan, batch.alive)
        first = batch.documents[0].number
        for place in np.flatnonzero(found >= 0):
            drop(int(place), "almost the same text came before", f"like document {found[place]}")
        assert self.copies.num_asked == first + len(batch)

    def arrays(self) -> Arrays:
        """Bands and signatures."""
        return self.copies.arrays()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Bands and signatures."""
        self.copies = NearCopies.restored(dict(arrays))


class BlockPruning(Stage):
    """Lines and sentences that stood in an earlier document are cut; what little is left of a document goes too."""

    name, title = "blocks", "Repeated blocks"

    def __init__(self) -> None:
        self.blocks = Blocks()

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Programs are passed over: they repeat lines with right."""
        scan = batch.scan
        languages = batch.judged.language_N if batch.judged else [""] * len(batch)
        is_code = np.array([language == "code" for language in languages])
        pruned = self.blocks.prune(scan, batch.alive & ~is_code)
        sizes = scan.count(Count.BYTES)
        for place in np.flatnonzero(pruned.bytes_cut_N):
            left = sizes[place] - pruned.bytes_cut_N[place]
            if left < max(LEAST_LEFT * sizes[place], LEAST_BYTES_LEFT):
                drop(int(place), "most of it stood in earlier documents", f"{left} of {sizes[place]} bytes are left")
            else:
                show(int(place), "the cut of", pruned.cut_text(int(place)))
                batch.texts[place] = pruned.text(int(place))

    def arrays(self) -> Arrays:
        """The hashes of blocks."""
        return {"seen": self.blocks.seen.keys()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The hashes of blocks."""
        self.blocks = Blocks(HashSet(arrays["seen"]))


class Semantic(Stage):
    """The same said in other words goes."""

    name, title = "semantic", "Semantic copies"

    def __init__(self, copies: SemanticCopies) -> None:
        self.copies = copies

    def apply(self, batch: Batch, drop: Drop, show: Show) -> None:
        """Compare embeddings."""
        places = batch.living()
        found = self.copies.first_seen([batch.texts[place].decode() for place in places]) if places else ()
        for place, other in zip(places, found, strict=True):
            if other >= 0:
                drop(place, "says what an earlier one says", f"like kept document {other}")

    def arrays(self) -> Arrays:
        """The vectors."""
        return {"kept": self.copies.kept[: self.copies.num_kept]}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The vectors."""
        self.copies.kept, self.copies.num_kept = np.array(arrays["kept"]), len(arrays["kept"])
