"""The kernels that read every byte, beside slow truths in plain Python: words, lines, repetition, n-grams, blocks."""

from __future__ import annotations

import doctest
import importlib
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbos.data.curate.blocks import LONE_BYTES, MOST_UNITS, SPAN_BYTES, SPAN_UNITS, Blocks
from turbos.data.curate.contamination import COMMON_TEXTS, EvaluationTexts, held_out_questions
from turbos.data.curate.copies import BANDS, ROWS, NearCopies, digests, signatures
from turbos.data.curate.hashing import HashSet, document_ngrams
from turbos.data.curate.repetition import REPEATED_NGRAMS, TOP_NGRAMS, repetition
from turbos.data.curate.rules import RULES, Writing, broken_rules
from turbos.data.curate.words import STOP_WORDS, Count, Scan, hash_word, scan_texts

ALPHABET = "aBcdeT 012.,!?…#{}-*•\"')\n\n\t éßЖд中文的かナ。！？，（）」＃１Ａ😀"
CHINESE = re.compile("[\u3041-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
TERMINAL = ".!?。！？…"
CLOSING = "\"')]”’」』）】»"
WORDS = ["the", "of", "and", "be", "cat", "dog", "sat", "mat", "with", "have"]


WORD = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})[^\W_])+")


def folded(word: str) -> str:
    return "".join(letter.lower() if letter.isascii() else letter for letter in word)


def true_sentences(line: str) -> list[str]:
    """Sentences of a line: cut behind a terminal sign and what closes there."""
    found, sentence, terminal = [], "", ""
    for letter in line:
        if sentence and terminal and (letter.isspace() or (ord(terminal) > 127 and letter not in TERMINAL + CLOSING)):
            found.append(sentence)
            sentence, terminal = "", ""
        if letter.isspace():
            sentence += letter if sentence else ""
            continue
        sentence += letter
        terminal = letter if letter in TERMINAL else terminal if letter in CLOSING else ""
    return [one.strip() for one in (*found, sentence) if one.strip()]


def true_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


texts_of_all_kinds = st.lists(st.text(ALPHABET, max_size=120), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(texts_of_all_kinds)
def test_words_and_units_are_those_of_the_slow_reading(texts: list[str]) -> None:
    scan = scan_texts([text.encode() for text in texts])
    for number, text in enumerate(texts):
        spelt = WORD.findall(text)
        words = [folded(word) for word in spelt]
        first, last = scan.word_borders[number : number + 2]
        raw = [scan.text_B[scan.word_start_W[w] : scan.word_end_W[w]].tobytes() for w in range(first, last)]
        assert [one.decode() for one in raw] == spelt
        assert scan.word_hash_W[first:last].tolist() == [hash_word(word.encode()) for word in words]
        units = [scan.unit_text(unit).decode() for unit in range(*scan.unit_borders[number : number + 2])]
        assert units == [one for line in true_lines(text) for one in true_sentences(line)]
        counts = scan.counts_NK[number]
        expected = {
            Count.BYTES: len(text.encode()),
            Count.CHARACTERS: len(text),
            Count.WORDS: len(words),
            Count.WORD_CHARACTERS: sum(map(len, words)),
            Count.LETTER_WORDS: sum(any(letter.isalpha() for letter in word) for word in words),
            Count.CHINESE_WORDS: len(CHINESE.findall(text)),
            Count.STOP_WORDS: len({word.encode() for word in words} & set(STOP_WORDS)),
            Count.LINES: len(true_lines(text)),
            Count.SHORT_LINES: sum(len(line) < 30 for line in true_lines(text)),
            Count.BULLET_LINES: sum(line.strip()[0] in "-*•" for line in true_lines(text)),
            Count.ELLIPSIS_LINES: sum(line.rstrip().endswith(("...", "…")) for line in true_lines(text)),
            Count.PARAGRAPHS: len([part for part in re.split(r"\n\s*\n", text) if part.strip()]),
            Count.BRACES: text.count("{"),
        }
        assert {column: counts[column] for column in expected} == expected, text


def test_signs_and_sentences_are_counted() -> None:
    counts = scan_texts([b'# One... two? "Three." And four!\nlorem ipsum is filler.... the end\n']).counts_NK[0]
    assert counts[[Count.SYMBOLS, Count.SENTENCES, Count.LOREM_IPSUM]].tolist() == [3, 5, 1]
    assert counts[Count.TERMINAL_LINES] == 1


def test_different_texts_have_different_hashes_and_blanks_do_not_count() -> None:
    scan = scan_texts([b"a  b", b"a b", b"A B", b"a c"])
    assert len(set(scan.unit_hash_U.tolist())) == 2
    assert scan.unit_hash_U[0] == scan.unit_hash_U[2]


def random_document(generator: random.Random) -> str:
    """Lines of few different words, so that much repeats."""
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(2, 7))) for _ in range(generator.randint(1, 14))]
    return "".join(line + generator.choice(("\n", "\n\n")) for line in generator.choices(lines, k=len(lines)))


def spans_of(text: str) -> list[tuple[str, int, int]]:
    return [(found[0], *found.span()) for found in re.finditer(r"\w+", text)]


def true_top(text: str, n: int) -> float:
    """The most bytes that an n-gram of the highest count covers."""
    spans = spans_of(text)
    grams = [tuple(word for word, _, _ in spans[place : place + n]) for place in range(len(spans) - n + 1)]
    counts = Counter(grams)
    best = max(counts.values(), default=0)
    if best < 2:
        return 0.0
    covered = [
        counts[gram] * (spans[place + n - 1][2] - spans[place][1])
        for place, gram in enumerate(grams)
        if counts[gram] == best and place == max(index for index, other in enumerate(grams) if other == gram)
    ]
    return max(covered) / len(text)


def true_repeated(text: str, n: int) -> float:
    """Bytes of n-grams seen before, each found one stepped over (as `datatrove` counts Gopher's measure)."""
    spans, seen, covered, place = spans_of(text), set(), 0, 0
    while place < len(spans) - n + 1:
        gram = tuple(word for word, _, _ in spans[place : place + n])
        if gram in seen:
            covered += spans[place + n - 1][2] - spans[place][1]
            place += n
        else:
            seen.add(gram)
            place += 1
    return covered / len(text)


def true_shares(blocks: list[list[str]], size: int) -> tuple[float, float]:
    """Share of blocks that stood before, and the bytes of their lines."""
    seen: set[str] = set()
    again = []
    for block in blocks:
        key = "\n".join("".join(line.split()) for line in block)
        again += [block] if key in seen else []
        seen.add(key)
    return len(again) / max(1, len(blocks)), sum(len(line) for block in again for line in block) / size


def test_repetition_is_that_of_the_slow_count() -> None:
    generator = random.Random(0)
    texts = [random_document(generator) for _ in range(60)]
    found = repetition(scan_texts([text.encode() for text in texts]))
    for number, text in enumerate(texts):
        for column, n in enumerate(TOP_NGRAMS):
            assert math.isclose(found.top_NG[number, column], true_top(text, n)), (text, n)
        for column, n in enumerate(REPEATED_NGRAMS):
            assert math.isclose(found.repeated_NG[number, column], true_repeated(text, n)), (text, n)
        lines = [line.strip() for line in true_lines(text)]
        share, covered = true_shares([[line] for line in lines], len(text))
        assert math.isclose(found.lines_N[number], share) and math.isclose(found.line_bytes_N[number], covered)
        paragraphs = [[line.strip() for line in part.split("\n")] for part in text.strip().split("\n\n")]
        share, covered = true_shares(paragraphs, len(text))
        assert math.isclose(found.paragraphs_N[number], share) and math.isclose(
            found.paragraph_bytes_N[number], covered
        )


GOOD = (
    "The old house stood with its back to the hill, and nobody remembered who had built it. "
    "In winter the wind came down from the north and shook the shutters; in summer the swallows "
    "nested below the roof.\nChildren from the village would have liked to play there, but their "
    "parents told them to be careful of the well.\nOne evening a traveller asked for shelter. "
    "He carried a lamp, a map of rivers that no longer ran, and a letter that he would not open. "
)


def filler(count: int) -> str:
    """Different words, so that nothing repeats."""
    return " ".join(f"word{number:04d}x" for number in range(count))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The cat and the dog. They have a mat. It is with us.", "fewer than 50 or more than 100,000 words"),
        (GOOD + " x of y" * 200, "mean word length outside 3 to 10"),
        (GOOD + " # # # # # # # # # # # # # # # #", "too many # and ellipses for its words"),
        ("\n".join(f"- the {filler(9)} and number {number} of it." for number in range(9)), "most lines are bullets"),
        ("\n".join(f"the {filler(9)} and number {number}..." for number in range(9)), "many lines end in an ellipsis"),
        (GOOD + " " + " ".join(str(number * 977) for number in range(200)), "too few words with a letter"),
        (filler(80) + ". One. Two.", "fewer than two stop words"),
        (GOOD + "Lorem ipsum dolor sit amet.", "holds lorem ipsum"),
        (GOOD + "function() { return 0 }", "holds a curly bracket"),
        ("The word and the sentence that never ends " + filler(60), "fewer than 3 sentences"),
        (GOOD + "\n".join(f"{word} of that and this" for word in filler(60).split()), "few lines end a sentence"),
        (GOOD + "\n".join(f"{word} it is." for word in filler(60).split()), "most lines are short"),
        (GOOD + "\n" + "A line of some length that is here twice over.\n" * 3, "repeated lines are a tenth of it"),
        (GOOD + "\n" + "A line of some length that is here twice over.\n" * 9, "repeated lines"),
        ("\n\n".join([GOOD] * 3), "repeated paragraphs cover too much"),
        (GOOD + " spam ham" * 40, "top 2-gram covers too much"),
        (GOOD + " one two three four five six seven eight nine ten eleven" * 4, "repeated 10-grams cover too much"),
    ],
)  # fmt: skip
def test_every_rule_drops_what_it_names(text: str, rule: str) -> None:
    writing = np.array([Writing.ALPHABET])
    assert rule in [one.name for one in broken_rules(scan_texts([text.encode()]), writing, "web")[0]]
    assert broken_rules(scan_texts([GOOD.encode()]), writing, "web") == [[]]


def test_programs_and_short_texts_are_asked_less() -> None:
    code = "\n".join(f"    if condition_{number} and another_{number}:\n        pass" for number in range(40)).encode()
    assert broken_rules(scan_texts([code]), np.array([Writing.CODE]), "web") == [[]]
    assert broken_rules(scan_texts([b"go " * 30]), np.array([Writing.ALPHABET]), "books") == [[]]
    assert broken_rules(scan_texts([b"go " * 80]), np.array([Writing.ALPHABET]), "books") != [[]]
    assert set(RULES["books"]) < set(RULES["web"]) and len(RULES["web"]) >= 24


def test_chinese_runs_are_measured_in_characters() -> None:
    once = "".join(chr(0x4E00 + 7 * number) for number in range(200))
    again = once + once[:60]
    writing = np.array([Writing.CHINESE, Writing.CHINESE])
    first, second = broken_rules(scan_texts([once.encode(), again.encode()]), writing, "books")
    assert not first and "characters" not in second[0].name and "8-character runs" in second[0].name


def test_sets_remember_and_grow() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)
    keys[7] = 0
    seen = HashSet()
    assert seen.add_new(keys).sum() == len(set(keys.tolist())) == len(seen)
    assert not seen.add_new(keys).any() and seen.contains(keys).all()
    # 0 is kept as 1, so its neighbour is the one hash that is taken for another.
    assert not seen.contains(np.delete(keys, 7) + np.uint64(1)).any()
    assert sorted(HashSet(seen.keys()).keys().tolist()) == sorted(seen.keys().tolist())


def test_ngrams_differ_as_the_words_do() -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices("abc", k=size)) for size in (0, 1, 4, 5, 6, 80)]
    scan = scan_texts([text.encode() for text in texts])
    hashes, borders = document_ngrams(scan.word_hash_W, scan.word_borders, 5)
    grams = [
        tuple(text.split()[place : place + 5])
        for text in texts
        for place in range(max(len(text.split()) - 4, min(1, len(text))))
    ]
    assert np.diff(borders).tolist() == [0, 1, 1, 1, 2, 76]
    assert len(set(zip(hashes.tolist(), grams, strict=True))) == len(set(grams)) == len(set(hashes.tolist()))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[place : place + 5]) for place in range(len(words) - 4)}


def test_signatures_estimate_the_similarity_of_sets() -> None:
    generator = random.Random(0)
    base = [f"w{generator.randrange(5000)}" for _ in range(400)]
    changed = [base[:]]
    for rate in (0.0, 0.01, 0.03, 0.08):
        changed.append([f"n{generator.randrange(5000)}" if generator.random() < rate else word for word in base])
    found = signatures(scan_texts([" ".join(words).encode() for words in changed]))
    assert found.shape == (5, BANDS * ROWS)
    for row, words in zip(found[1:], changed[1:], strict=True):
        left, right = shingles(" ".join(base)), shingles(" ".join(words))
        truth = len(left & right) / len(left | right)
        # 112 functions: the standard deviation of the estimate is at most 0.047.
        assert abs(float((row == found[0]).mean()) - truth) < 0.15


def test_near_copies_come_back_from_their_arrays() -> None:
    generator = random.Random(0)
    texts = [" ".join(f"w{generator.randrange(900)}" for _ in range(60)).encode() for _ in range(3000)]
    near = NearCopies()
    assert (near.first_seen(scan_texts(texts[:2000]), np.ones(2000, np.bool_)) == -1).all()
    back = NearCopies.restored(near.arrays())
    for index in (near, back):
        found = index.first_seen(scan_texts(texts[1500:]), np.arange(1500) % 2 == 0)
        assert found[:500:2].tolist() == list(range(1500, 2000, 2))
        assert (found[1::2] == -1).all() and (found[500:] == -1).all()
    assert near.num_kept == back.num_kept == 2500


def test_digests_pass_over_outer_blanks() -> None:
    found = digests([b"a b\n", b" a b", b"a  b"])
    assert found[0] == found[1] != found[2]


def true_cut(scan: Scan) -> list[bool]:
    """Units that the slow pruning cuts, from the texts of the units."""
    seen: set[str] = set()
    cut: list[bool] = []
    for number in range(len(scan)):
        units = [
            "".join(scan.unit_text(unit).decode().split()) for unit in range(*scan.unit_borders[number : number + 2])
        ]
        sizes = [len(scan.unit_text(unit)) for unit in range(*scan.unit_borders[number : number + 2])]
        marks, new = [False] * len(units), set()
        for place, unit in enumerate(units):
            if sizes[place] >= LONE_BYTES:
                marks[place] |= unit in seen
                new.add(unit)
            for end in range(place + SPAN_UNITS, min(place + MOST_UNITS, len(units)) + 1):
                if sum(sizes[place:end]) >= SPAN_BYTES:
                    span = "\0".join(units[place:end])
                    if span in seen:
                        marks[place:end] = [True] * (end - place)
                    new.add(span)
                    break
        seen |= new
        cut += marks
    return cut


def test_blocks_are_cut_as_the_slow_pruning_cuts_them() -> None:
    generator = random.Random(0)
    lines = [
        " ".join(generator.choices(WORDS, k=generator.randint(1, 20))) + generator.choice(("", ".")) for _ in range(60)
    ]
    texts = []
    for _ in range(80):
        start = generator.randrange(50)
        texts.append("\n".join(lines[start : start + generator.randint(1, 9)] + generator.choices(lines, k=3)))
    scan = scan_texts([text.encode() for text in texts])
    pruned = Blocks().prune(scan, np.ones(len(texts), np.bool_))
    assert pruned.cut_U.tolist() == true_cut(scan) and 0.2 < pruned.cut_U.mean() < 0.98
    for number in range(len(texts)):
        kept = [
            scan.unit_text(unit) for unit in range(*scan.unit_borders[number : number + 2]) if not pruned.cut_U[unit]
        ]
        assert [part.strip() for part in re.split(rb"(?<=\.)\s|\n", pruned.text(number)) if part.strip()] == kept


def test_what_is_left_keeps_its_shape() -> None:
    block = b"A sentence that is long enough to be cut where it is seen once more. "
    text = b"First line.\n\n    indented " + b"x" * 20 + b"\n" + block + b"Behind it.\n\nLast."
    scan = scan_texts([block, text])
    pruned = Blocks().prune(scan, np.array([True, True]))
    assert pruned.text(1) == b"First line.\n\n    indented " + b"x" * 20 + b"\nBehind it.\n\nLast."
    assert pruned.cut_text(1) == block.strip()
    assert Blocks().prune(scan, np.array([True, False])).text(1) == text


def test_common_phrases_of_evaluations_are_no_evidence() -> None:
    phrase = "what is the sum of the numbers that stand in the list which is given below"
    exam = EvaluationTexts([f"{phrase} {number} {7 * number} {31 * number}" for number in range(COMMON_TEXTS + 1)])
    texts = [phrase.encode(), f"{phrase} 3 21 93".encode()]
    assert exam.found_in(scan_texts(texts)).tolist() == [False, True]


def test_short_evaluation_texts_are_found_as_whole_lines() -> None:
    exam = EvaluationTexts(["42 - 25 = ?", "yes", "天气很好吗？今天的天气真的很好，我们一起去公园散步，好不好呀"])
    texts = [
        "see:\n42 - 25  = ?\n",
        "42 + 25 = ?",
        "yes",
        "他说今天的天气真的很好，我们一起去公园散步，好不好呀。",
        "今天的天气真的很好，我们走",
    ]
    assert exam.found_in(scan_texts([text.encode() for text in texts])).tolist() == [True, False, False, True, False]


def test_training_problems_hold_no_held_out_question() -> None:
    from turbos.data.problems import families, levels, make_problem

    exam = EvaluationTexts(held_out_questions(seeds=20))
    cases = [(family, level) for family in families() for level in range(levels(family))]
    training = [make_problem(family, seed, level).question.encode() for family, level in cases for seed in range(20)]
    held_out = [text.encode() for text in held_out_questions(seeds=20)]
    assert exam.found_in(scan_texts(training)).mean() < 0.02
    assert exam.found_in(scan_texts(held_out)).mean() > 0.9


ROOMS = (
    *("hashing", "words", "repetition", "rules", "copies", "blocks", "contamination", "extraction"),
    *("classifier", "spoil", "semantic", "counts"),
)


@pytest.mark.parametrize("room", ROOMS)
def test_examples_in_docstrings_hold(room: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"turbos.data.curate.{room}"))
    assert outcome.attempted and not outcome.failed
