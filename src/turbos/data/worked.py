"""Worked steps: the arithmetic of a problem written out so that every step needs only a few nearby digits.

Pure functions from operands to text; the last number (or word) of the text is the answer. They know nothing of where
a problem comes from. A small model imitates them one digit at a time: columns from the right with carries, Euclid by
subtraction, halving, growing a string at its front.

>>> chain_sum((27, 45, -13))
'7+5=12 2+4+1=7 72 12-3=9 7-1-1=5 59'
>>> gcd((84, 36))
'84-36=48 48-36=12 36-12=24 24-12=12 12'
"""

from __future__ import annotations

from collections.abc import Sequence


def _digits(number: int) -> list[int]:
    """Decimal digits of a number >= 0, the last one first."""
    return [int(digit) for digit in reversed(str(number))]


def _column(parts: Sequence[int], result: int, sign: str = "+") -> str:
    """One column, such as `2+4+1=7`; zero carries are left out."""
    return f"{sign.join(str(part) for part in parts)}={result}"


def add_columns(a: int, b: int) -> str:
    """Column sums of a + b, both >= 0, from the right with carries, then the sum."""
    left, right = _digits(a), _digits(b)
    width = max(len(left), len(right))
    left += [0] * (width - len(left))
    right += [0] * (width - len(right))
    steps, carry = [], 0
    for x, y in zip(left, right, strict=True):
        total = x + y + carry
        steps.append(_column([x, y, carry] if carry else [x, y], total))
        carry = total // 10
    return " ".join([*steps, str(a + b)])


def subtract_columns(a: int, b: int) -> str:
    """Column differences of a - b for a >= b >= 0; a column that must borrow shows its top digit with the ten."""
    left, right = _digits(a), _digits(b)
    right += [0] * (len(left) - len(right))
    steps, borrow = [], 0
    for x, y in zip(left, right, strict=True):
        top = x + 10 if x - borrow < y else x
        steps.append(_column([top, y, borrow] if borrow else [top, y], top - y - borrow, "-"))
        borrow = int(top > x)
    return " ".join([*steps, str(a - b)])


def add_signed(total: int, term: int) -> str:
    """Steps of total + term for any signs, ending with the sum."""
    if (total < 0) == (term < 0) or total == 0:
        if total >= 0 and term >= 0:
            return add_columns(total, term)
        return f"{add_columns(-total, -term)} {total + term}"
    high, low = sorted((abs(total), abs(term)), reverse=True)
    steps = subtract_columns(high, low)
    return steps if total + term >= 0 else f"{steps} {total + term}"


def chain_sum(terms: Sequence[int]) -> str:
    """Running totals of signed terms (the first >= 0), each worked out in columns."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(add_signed(total, term))
        total += term
    return " ".join(steps)


def times_digit(number: int, digit: int) -> str:
    """Columns of number * digit from the right with carries, then the product."""
    steps, carry = [], 0
    for x in _digits(number):
        total = x * digit + carry
        steps.append(f"{x}*{digit}+{carry}={total}" if carry else f"{x}*{digit}={total}")
        carry = total // 10
    return " ".join([*steps, str(number * digit)]) if number >= 10 else steps[0]


def product(factors: Sequence[int]) -> str:
    """A product from left to right; a factor of several digits goes by partial products, last digit first."""
    steps, total = [], factors[0]
    for factor in factors[1:]:
        partial = 0
        for place, digit in enumerate(_digits(factor)):
            steps.append(times_digit(total, digit))
            shifted = total * digit * 10**place
            if place:
                steps.append(add_columns(partial, shifted))
            partial += shifted
        total *= factor
    return " ".join(steps)


def gcd(numbers: Sequence[int]) -> str:
    """Euclid by subtraction on two numbers >= 1: the smaller is taken from the larger until both are equal."""
    high, low = max(numbers), min(numbers)
    steps = []
    while high != low:
        steps.append(f"{high}-{low}={high - low}")
        high, low = max(low, high - low), min(low, high - low)
    return " ".join([*steps, str(low)])


def lcm(numbers: Sequence[int]) -> str:
    """Multiples of two numbers >= 1 side by side: the one that lags makes a step until they meet."""
    a, b = numbers
    x, y = a, b
    steps = [f"{x} {y}"]
    while x != y:
        x, y = (x + a, y) if x < y else (x, y + b)
        steps.append(f"{x} {y}")
    return ", ".join(steps)


def count_bits(number: int) -> str:
    """Halve until nothing is left; after the colon stands how many odd numbers were seen so far."""
    steps, ones = [], 0
    while number:
        ones += number & 1
        steps.append(f"{number}:{ones}")
        number //= 2
    return " ".join(steps)


def to_binary(number: int) -> str:
    """Halve until nothing is left; after the colon the binary digits found so far grow at the front."""
    steps, bits = [], ""
    while number:
        bits = f"{number & 1}{bits}"
        steps.append(f"{number}:{bits}")
        number //= 2
    return " ".join(steps)


def digit_root(number: int) -> str:
    """Digits added one after another, again until a single digit is left.

    >>> digit_root(5488)
    '5+4=9 9+8=17 17+8=25 2+5=7'
    """
    steps = []
    while number > 9:
        total, *rest = map(int, str(number))
        for digit in rest:
            steps.append(f"{total}+{digit}={total + digit}")
            total += digit
        number = total
    return " ".join(steps) or str(number)


def reverse(letters: str) -> str:
    """Letters in turn, each put before what is there.

    >>> reverse("sun")
    's, u s, n u s'
    """
    return ", ".join(" ".join(reversed(letters[: end + 1])) for end in range(len(letters)))


def count_letter(letter: str, letters: str) -> str:
    """Each letter in turn, followed by how often the wanted one was seen so far.

    >>> count_letter("c", "cab")
    'c1 a1 b1'
    """
    return " ".join(f"{seen}{letters[: place + 1].count(letter)}" for place, seen in enumerate(letters))


def sort_numbers(numbers: Sequence[int]) -> str:
    """Take out the smallest again and again: it stands before the colon, the rest behind it, then the sorted list.

    >>> sort_numbers((33, 95, 46))
    '33:95,46 46:95 95: 33,46,95'
    """
    rest, steps = list(numbers), []
    while rest:
        smallest = min(rest)
        rest.remove(smallest)
        steps.append(f"{smallest}:{','.join(map(str, rest))}")
    return " ".join([*steps, ",".join(map(str, sorted(numbers)))])
