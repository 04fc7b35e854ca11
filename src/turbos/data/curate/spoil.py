"""Spoilt texts: what bad pages look like, made from good ones, so that a classifier can learn the difference.

Ten ways, each seen in crawls: shuffled words, sales talk, menus, misread letters, wrong encodings, tables of contents,
one sentence over and over, blobs of base64, numbers, and a text with half its words gone. Pure in text and generator.

>>> import random
>>> spoilt("A good text stands here, and it says something.", "menu", random.Random(0)).count("|") >= 3
True
"""

from __future__ import annotations

import base64
import random
import re

WAYS = ("shuffle", "sales", "menu", "misread", "encoding", "contents", "again", "blob", "numbers", "holes")
SALES = (
    *("buy now", "best price", "free shipping", "click here", "limited offer", "order online", "cheap"),
    *("discount code", "casino bonus", "100% guaranteed", "sign up today", "subscribe", "add to cart"),
    *("点击这里", "免费", "优惠", "立即购买"),
)
NAVIGATION = (
    *("Home", "Login", "Register", "About us", "Contact", "Privacy policy", "Terms of use", "Next", "Previous"),
    *("Share", "Copyright", "All rights reserved", "Read more", "Comments"),
    *("首页", "登录", "注册", "联系我们", "下一页", "版权所有"),
)
WORD = re.compile(r"[^\W\d_]+|\d+|[\u4e00-\u9fff]|[^\w\s]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789|!.,;~^"


def spoilt(text: str, way: str, generator: random.Random) -> str:
    """A bad text made from a good one in one of the `WAYS`; ValueError for another."""
    words = _pieces(text)
    if way == "shuffle":
        return _joined(generator.sample(words, len(words)), text)
    if way == "sales":
        return _joined(
            [one for word in words for one in ([generator.choice(SALES)] if generator.random() < 0.4 else [word])], text
        )
    if way == "menu":
        entries = [
            generator.choice(NAVIGATION) if generator.random() < 0.5 else word for word in words[::3] + words[:4]
        ]
        return generator.choice((" | ", "\n", " » ")).join([*entries, "|", "|", "|"])
    if way == "misread":
        return "".join(
            generator.choice(LETTERS) if letter.isalnum() and generator.random() < 0.25 else letter for letter in text
        )
    if way == "encoding":
        return _wrong_encoding(text, generator)
    if way == "contents":
        return "\n".join(
            f"{number}.{number % 7} {word} {'.' * generator.randint(4, 30)} {3 * number}"
            for number, word in enumerate(words[::4], 1)
        )
    if way == "again":
        few = _joined(words[: generator.randint(2, 12)], text)
        return "\n".join([few] * max(3, len(text) // (len(few) + 1)))
    if way == "blob":
        return base64.encodebytes(generator.randbytes(max(120, len(text) // 2))).decode()
    if way == "numbers":
        return "\n".join(
            "\t".join(f"{generator.uniform(0, 9999):.{generator.randint(0, 3)}f}" for _ in range(6))
            for _ in range(len(text) // 40 + 2)
        )
    if way == "holes":
        return _joined([word for word in words if generator.random() < 0.5], text)
    raise ValueError(f"no way to spoil a text is called {way!r}")


def _pieces(text: str) -> list[str]:
    return WORD.findall(text) or ["text"]


def _joined(words: list[str], like: str) -> str:
    """Words as running text: without blanks where the original is Chinese."""
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in like)
    return ("" if 3 * chinese > len(like) else " ").join(words)


def _wrong_encoding(text: str, generator: random.Random) -> str:
    """UTF-8 read as another encoding; an ASCII text, which survives that, gets replacement signs instead."""
    if text.isascii():
        return "".join("\ufffd" if generator.random() < 0.08 else letter for letter in text)
    return text.encode().decode(generator.choice(("latin-1", "gb18030", "cp437")), errors="replace")
