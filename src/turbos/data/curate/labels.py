"""Labels of documents: language, topic, quality, by three small classifiers that are trained once and kept in a file.

The file is a numpy archive (no pickle) beside the fetched packages. Training examples are gathered by `examples.py`.

    labels = read_labels(path)
    labels.judge(scan).language_N       # names, one for each document
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbos.common.errors import UserError
from turbos.data.curate.classifier import BUCKETS, Classifier
from turbos.data.curate.rules import Writing
from turbos.data.curate.words import Scan

FORMAT = 1
UNSURE = "unsure"
SUREST = 0.5
"""A topic or a language less probable than this is `unsure`."""

GOOD = "good"


@dataclass(frozen=True)
class Judged:
    """The labels of N documents: names of language and topic, and quality from 0 to 1 (probability of good text)."""

    language_N: list[str]
    topic_N: list[str]
    quality_N: np.ndarray


@dataclass(frozen=True)
class Labels:
    """The three classifiers, and what each was trained on and reached on texts it had not seen."""

    language: Classifier
    topic: Classifier
    quality: Classifier
    card: dict[str, str]

    def judge(self, scan: Scan) -> Judged:
        """Label every document of a scan."""
        quality = self.quality.scores(scan)[:, self.quality.names.index(GOOD)]
        return Judged(_named(self.language, scan), _named(self.topic, scan), quality)


def _named(classifier: Classifier, scan: Scan) -> list[str]:
    """The most probable class of every document, or `unsure`."""
    scores = classifier.scores(scan)
    best = scores.argmax(1)
    sure = scores[np.arange(len(best)), best] >= SUREST
    return [classifier.names[label] if is_sure else UNSURE for label, is_sure in zip(best, sure, strict=True)]


def writing_of(scan: Scan, language_N: list[str] | None) -> np.ndarray:
    """The `Writing` of every document, int64 `[N]`: by its language label, else by its characters."""
    writing = np.where(scan.is_chinese_N, int(Writing.CHINESE), int(Writing.ALPHABET))
    if language_N is not None:
        writing[[language == "code" for language in language_N]] = int(Writing.CODE)
    return writing


def write_labels(path: Path, labels: Labels) -> None:
    """Write the classifiers into one file that appears whole or not at all."""
    arrays: dict[str, np.ndarray] = {"format": np.array(FORMAT), "card": np.array(json.dumps(labels.card))}
    for name in ("language", "topic", "quality"):
        classifier: Classifier = getattr(labels, name)
        arrays[f"{name}.names"] = np.array(classifier.names)
        arrays[f"{name}.kind"] = np.array(classifier.kind)
        arrays[f"{name}.weight"] = classifier.weight_BC
        arrays[f"{name}.bias"] = classifier.bias_C
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_labels(path: Path) -> Labels:
    """The classifiers of a file; UserError where it is none of ours or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if int(arrays["format"]) != FORMAT:
                raise UserError(f"{path} holds classifiers of format {arrays['format']}, wanted {FORMAT}: delete it")
            parts = {name: _classifier(arrays, name) for name in ("language", "topic", "quality")}
            card = {str(key): str(value) for key, value in json.loads(str(arrays["card"])).items()}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{path} is no file of classifiers, or damaged ({error}): delete it to train them anew"
        ) from error
    except Exception as error:  # zipfile and zlib raise their own kinds for a cut file
        if type(error).__module__ not in ("zipfile", "zlib"):
            raise
        raise UserError(f"{path} is damaged ({error}): delete it to train the classifiers anew") from error
    return Labels(parts["language"], parts["topic"], parts["quality"], card)


def _classifier(arrays: np.lib.npyio.NpzFile, name: str) -> Classifier:
    """One classifier out of the archive; ValueError where its arrays do not fit together."""
    kind, names = str(arrays[f"{name}.kind"]), tuple(str(one) for one in arrays[f"{name}.names"])
    weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
    if kind not in BUCKETS or weight.shape != (BUCKETS[kind], len(names)) or bias.shape != (len(names),):
        raise ValueError(f"the {name} classifier has parts that do not fit")
    return Classifier(kind, names, np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32))
