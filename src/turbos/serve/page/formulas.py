"""Formulas as MathML: what `latex2mathml` makes of LaTeX, as far as its elements and attributes are harmless.

A formula is a model's text, so nothing of it is trusted: the tree is walked, anything not on the list makes it no
formula, and texts are escaped when it is written. How long a hostile one may take is `worker.py`'s matter.

>>> mathml("x^2", block=False)
'<math display="inline" alttext="x^2"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'
>>> mathml(r"\\href{javascript:alert(1)}{x}", block=False) is None
True
"""

from __future__ import annotations

import html
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element

LONGEST_FORMULA = 4000
"""Characters; a longer one is shown as it was written."""

_ELEMENTS = """
math mrow mi mn mo mtext mspace ms mfrac msqrt mroot mstyle merror mpadded mphantom msub msup msubsup munder mover
munderover mmultiscripts mprescripts none mtable mtr mlabeledtr mtd menclose mfenced
"""
_ATTRIBUTES = """
display displaystyle scriptlevel mathvariant mathsize mathcolor stretchy fence form separator largeop movablelimits
accent accentunder lspace rspace minsize maxsize symmetric linethickness columnalign rowalign columnlines rowlines
columnspacing rowspacing width height depth voffset open close separators notation
"""
ELEMENTS, ATTRIBUTES = frozenset(_ELEMENTS.split()), frozenset(_ATTRIBUTES.split())
"""What a formula is made of; none of it holds an address, a class or a style sheet."""

CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
"""With more or fewer it is broken LaTeX, of which a browser shows half."""


def mathml(source: str, block: bool) -> str | None:
    """A formula as a `math` element; None for LaTeX that cannot be read, or that asks for more than a formula."""
    if len(source) > LONGEST_FORMULA:
        return None
    try:
        tree = convert_to_element(source.strip(), display="block" if block else "inline")
    # The converter has no error of its own: broken LaTeX ends in a dozen kinds, deep nesting in a RecursionError.
    except Exception:
        return None
    if not _make_harmless(tree):
        return None
    tree.attrib = {"display": "block" if block else "inline", "alttext": source.strip()}
    return tostring(tree, encoding="unicode", short_empty_elements=False)


def _make_harmless(root: Element) -> bool:
    """Whether all of a tree is on the lists; texts lose the converter's own escapes."""
    for element in root.iter():
        if element.tag not in ELEMENTS or not element.attrib.keys() <= ATTRIBUTES | {"xmlns"}:
            return False
        if len(element) != CHILDREN.get(element.tag, len(element)):
            return False
        element.text = html.unescape(element.text) if element.text else None
        element.tail = None
        element.attrib.pop("xmlns", None)
    return True
