"""Vectors of floats for numba: `LANES` numbers that are loaded, combined and stored by one instruction each.

A vector lives in a register; memory is named by an address (an int) and an index. Nothing here may be reordered by the
compiler: an expression over vectors is computed exactly as it is written, so that a result never depends on how much
other work there is. Addresses are not checked: whoever makes them keeps the memory alive and the indices inside.

Inside a compiled function, `y = x * weight` over `n` floats:

    for i in range(0, n, LANES):
        store(y, i, n, mul(load(x, i, n), load(weight, i, n)))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config as numba_config
from numba import float32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


def lanes_of(name: str, features: str) -> int:
    """Floats in the widest vector of a processor, from LLVM's feature string of it."""
    if "+avx512f" in features and "+avx512bw" in features and "+avx512vl" in features:
        return 16
    return 8 if "+avx2" in features else 4


def _features() -> str:
    # numba compiles for another processor where it is told to (its settings NUMBA_CPU_NAME, NUMBA_CPU_FEATURES).
    if numba_config.CPU_FEATURES is not None:
        return str(numba_config.CPU_FEATURES)
    return str(llvm.get_host_cpu_features().flatten()) if numba_config.CPU_NAME is None else ""


LANES = lanes_of(numba_config.CPU_NAME or llvm.get_host_cpu_name(), _features())
"""Floats in a vector of this machine."""

LINE = 64
"""Bytes of a cache line."""

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


VECTOR_TYPE = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, to: ir.Type) -> ir.Value:
    """Pointer to element `index` of numbers of type `to` at an address."""
    return builder.gep(builder.inttoptr(address, to.as_pointer()), [index])


def constant_vector(values: list[int] | list[float], of: ir.Type) -> ir.Constant:
    """A vector of constants."""
    return ir.Constant(ir.VectorType(of, len(values)), [ir.Constant(of, value) for value in values])


def spread(builder: ir.IRBuilder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector whose lanes are all one value."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT32, 0))
    zeros = ir.Constant(ir.VectorType(INT32, lanes), None)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """`a * b + c` over vectors, in one instruction where the processor has it."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def first_lanes(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """A mask of the first `count` (int64) lanes."""
    numbers = constant_vector(list(range(LANES)), INT64)
    return builder.icmp_signed("<", numbers, spread(builder, count))


def load_masked(builder: ir.IRBuilder, place: ir.Value, mask: ir.Value, kind: ir.Type, name: str) -> ir.Value:
    """Lanes of a vector that the mask names, zero elsewhere; memory under other lanes is not touched."""
    typed = builder.bitcast(place, kind.as_pointer())
    name = f"v{LANES}{name}"
    return call(builder, f"llvm.masked.load.{name}.p0{name}", kind, typed, ir.Constant(INT32, 1), mask, zero_of(kind))


def store_masked(builder: ir.IRBuilder, value: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
    """Write the lanes that a mask names (None: all of them)."""
    typed = builder.bitcast(place, VECTOR.as_pointer())
    if mask is None:
        builder.store(value, typed, align=4)
        return
    name = f"v{LANES}f32"
    call(builder, f"llvm.masked.store.{name}.p0{name}", ir.VoidType(), value, typed, ir.Constant(INT32, 4), mask)


def prefetch(builder: ir.IRBuilder, address: ir.Value, level: int) -> None:
    """Ask for the cache line of an address into a level of the cache (1 or 2); one that does not exist does no harm."""
    place = builder.inttoptr(address, ir.IntType(8).as_pointer())
    read, locality, data = (ir.Constant(INT32, value) for value in (0, 4 - level, 1))
    call(builder, "llvm.prefetch.p0i8", ir.VoidType(), place, read, locality, data)


def zero_of(kind: ir.Type) -> ir.Constant:
    """Zero of any type."""
    return ir.Constant(kind, None)


def load_vector(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
    """A whole vector of floats, aligned or not."""
    return builder.load(builder.bitcast(place, VECTOR.as_pointer()), align=4)


Body = Callable[[Any, ir.IRBuilder, Any, tuple[ir.Value, ...]], ir.Value]


@intrinsic
def load(typingctx, address, index, stop):  # type: ignore[no-untyped-def]
    """Floats `index .. index + LANES - 1` at an address; zero from `stop` on."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, stop = arguments
        place = pointer(builder, address, index, FLOAT)
        left = builder.sub(stop, index)
        result = cgutils.alloca_once(builder, VECTOR)
        with builder.if_else(builder.icmp_signed(">=", left, ir.Constant(INT64, LANES)), likely=True) as (whole, part):
            with whole:
                builder.store(load_vector(builder, place), result)
            with part:
                builder.store(load_masked(builder, place, first_lanes(builder, left), VECTOR, "f32"), result)
        return builder.load(result)

    return VECTOR_TYPE(types.int64, types.int64, types.int64), body


@intrinsic
def store(typingctx, address, index, stop, value):  # type: ignore[no-untyped-def]
    """Write a vector's lanes to elements `index ..` at an address, none from `stop` on."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, stop, value = arguments
        place = pointer(builder, address, index, FLOAT)
        left = builder.sub(stop, index)
        with builder.if_else(builder.icmp_signed(">=", left, ir.Constant(INT64, LANES)), likely=True) as (whole, part):
            with whole:
                store_masked(builder, value, place, None)
            with part:
                store_masked(builder, value, place, first_lanes(builder, left))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, VECTOR_TYPE), body


@intrinsic
def fetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line of an address (that may not exist)."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        prefetch(builder, arguments[0], 1)
        return context.get_dummy_value()

    return types.void(types.int64), body


@intrinsic
def splat(typingctx, value):  # type: ignore[no-untyped-def]
    """A vector whose lanes are all one float."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return spread(builder, arguments[0])

    return VECTOR_TYPE(types.float32), body


@intrinsic
def zeros(typingctx):  # type: ignore[no-untyped-def]
    """A vector of zeros."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return zero_of(VECTOR)

    return VECTOR_TYPE(), body


def _binary(name: str) -> Any:
    """An operation of LLVM over two vectors, by the name of the builder's method."""

    def operation(typingctx, a, b):  # type: ignore[no-untyped-def]
        def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return getattr(builder, name)(*arguments)

        return VECTOR_TYPE(VECTOR_TYPE, VECTOR_TYPE), body

    return intrinsic(operation)


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """`a * b + c`."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return multiply_add(builder, *arguments)

    return VECTOR_TYPE(VECTOR_TYPE, VECTOR_TYPE, VECTOR_TYPE), body


@intrinsic
def maximum(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The larger of each lane."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return VECTOR_TYPE(VECTOR_TYPE, VECTOR_TYPE), body


def _halves(builder: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
    half = vector.type.count // 2
    return [_pick(builder, vector, vector, [*range(first, first + half)]) for first in (0, half)]


@intrinsic
def total(typingctx, vector):  # type: ignore[no-untyped-def]
    """Sum of the lanes."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return sum_lanes(builder, arguments[0])

    return types.float32(VECTOR_TYPE), body


@intrinsic
def largest(typingctx, vector):  # type: ignore[no-untyped-def]
    """Largest lane."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector = arguments[0]
        while vector.type.count > 1:
            a, b = _halves(builder, vector)
            vector = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.extract_element(vector, ir.Constant(INT32, 0))

    return types.float32(VECTOR_TYPE), body


def sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Sums of the lanes of four vectors, `<4 x float>`; each is added up in the order of `sum_lanes`.

    Runs of four lanes are combined first: that needs no moves across a register, which are slow.
    """
    a, b, c, d = vectors
    pairs = [_fold(builder, x, y, [0, 0, 1, 1], [2, 2, 3, 3]) for x, y in ((a, b), (c, d))]
    return _add_runs(builder, _fold(builder, pairs[0], pairs[1], [0, 1, 0, 1], [2, 3, 2, 3]))


def _fold(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, low: list[int], high: list[int]) -> ir.Value:
    """In each run of four lanes: lanes `low` plus lanes `high`, of a and b in turn, or of a and then b."""
    order = [0, 1, 0, 1] if low[0] == low[1] else [0, 0, 1, 1]
    picks = []
    for lanes in (low, high):
        chosen = [run + lane + LANES * of for run in range(0, LANES, 4) for lane, of in zip(lanes, order, strict=True)]
        picks.append(_pick(builder, a, b, chosen))
    return builder.fadd(*picks)


def _add_runs(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The runs of four lanes added up: upper half to lower half, until one is left."""
    while vector.type.count > 4:
        vector = builder.fadd(*_halves(builder, vector))
    return vector


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Sum of the lanes of a vector: lanes two apart in each run of four, then neighbours, then runs."""
    for swapped in ([2, 3, 0, 1], [1, 0, 3, 2]):
        lanes = [run + lane for run in range(0, LANES, 4) for lane in swapped]
        vector = builder.fadd(vector, _pick(builder, vector, vector, lanes))
    return builder.extract_element(_add_runs(builder, vector), ir.Constant(INT32, 0))


def _pick(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, constant_vector(lanes, INT32))


@intrinsic
def store_totals(typingctx, address, index, a, b, c, d):  # type: ignore[no-untyped-def]
    """Write the sums of the lanes of four vectors to elements `index .. index + 3` at an address."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, *vectors = arguments
        sums = sum_four(builder, vectors)
        place = pointer(builder, address, index, FLOAT)
        builder.store(sums, builder.bitcast(place, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, *(VECTOR_TYPE,) * 4), body


@intrinsic
def power_of_two(typingctx, exponents):  # type: ignore[no-untyped-def]
    """`2 ** n` for whole numbers n of -126 .. 127, by writing the exponent's bits."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        whole = ir.VectorType(INT32, LANES)
        bits = builder.add(builder.fptosi(arguments[0], whole), constant_vector([127] * LANES, INT32))
        return builder.bitcast(builder.shl(bits, constant_vector([23] * LANES, INT32)), VECTOR)

    return VECTOR_TYPE(VECTOR_TYPE), body


@intrinsic
def nearest(typingctx, vector):  # type: ignore[no-untyped-def]
    """The nearest whole number of each lane."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return call(builder, f"llvm.nearbyint.v{LANES}f32", VECTOR, arguments[0])

    return VECTOR_TYPE(VECTOR_TYPE), body


@intrinsic
def keep_above(typingctx, vector, limit, test):  # type: ignore[no-untyped-def]
    """The vector where `test > limit` (a float), zero elsewhere."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector, limit, test = arguments
        return builder.select(builder.fcmp_ordered(">", test, spread(builder, limit)), vector, zero_of(VECTOR))

    return VECTOR_TYPE(VECTOR_TYPE, types.float32, VECTOR_TYPE), body


@intrinsic
def get(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The float at an address and index."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(pointer(builder, arguments[0], arguments[1], FLOAT), align=4)

    return types.float32(types.int64, types.int64), body


@intrinsic
def put(typingctx, address, index, value):  # type: ignore[no-untyped-def]
    """Write a float to an address and index."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, value = arguments
        builder.store(value, pointer(builder, address, index, FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), body


@intrinsic
def int8_at(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The int8 at an address and index, as a float."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.sitofp(builder.load(pointer(builder, arguments[0], arguments[1], ir.IntType(8))), FLOAT)

    return types.float32(types.int64, types.int64), body


@intrinsic
def bf16_at(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The bf16 at an address and index, as a float."""

    def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.load(pointer(builder, arguments[0], arguments[1], ir.IntType(16)), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16)), FLOAT)

    return types.float32(types.int64, types.int64), body


def _reader(of: ir.Type, kind: types.Type) -> Any:
    def operation(typingctx, address, index):  # type: ignore[no-untyped-def]
        def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            value = builder.load(pointer(builder, arguments[0], arguments[1], of), align=of.width // 8)
            return value if of is INT64 else builder.sext(value, INT64)

        return types.int64(types.int64, types.int64), body

    return intrinsic(operation)


get_int64, get_int32 = _reader(INT64, types.int64), _reader(INT32, types.int64)


def _writer(of: ir.Type) -> Any:
    def operation(typingctx, address, index, value):  # type: ignore[no-untyped-def]
        def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            address, index, value = arguments
            value = value if of is INT64 else builder.trunc(value, of)
            builder.store(value, pointer(builder, address, index, of), align=of.width // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), body

    return intrinsic(operation)


put_int64, put_int16 = _writer(INT64), _writer(ir.IntType(16))

kernel = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorator of functions that only compiled functions call."""
inlined = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always")
"""The same for functions that are called from one place: compiled as a part of their caller, which is quicker."""

LOG2_E = math.log2(math.e)
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
SMALLEST, LARGEST = -87.0, 88.0


@kernel
def exp(x):  # type: ignore[no-untyped-def]
    """`e^x` of each lane to about one unit in the last place; zero below -87, `e^88` above 88.

    Reduced by powers of two, then the polynomial of Cephes' `expf` (Moshier 1992).
    """
    small = float32(SMALLEST)
    reduced = maximum(splat(small), sub(zeros(), maximum(splat(float32(-LARGEST)), sub(zeros(), x))))
    whole = nearest(mul(reduced, splat(float32(LOG2_E))))
    rest = fma(whole, splat(float32(-LN2_HIGH)), reduced)
    rest = fma(whole, splat(float32(-LN2_LOW)), rest)
    y = splat(float32(1.9875691500e-4))
    y = fma(y, rest, splat(float32(1.3981999507e-3)))
    y = fma(y, rest, splat(float32(8.3334519073e-3)))
    y = fma(y, rest, splat(float32(4.1665795894e-2)))
    y = fma(y, rest, splat(float32(1.6666665459e-1)))
    y = fma(y, rest, splat(float32(5.0000001201e-1)))
    y = add(fma(y, mul(rest, rest), rest), splat(float32(1.0)))
    return keep_above(mul(y, power_of_two(whole)), small, x)


@kernel
def silu(x):  # type: ignore[no-untyped-def]
    """`x * sigmoid(x)` of each lane."""
    return div(x, add(splat(float32(1.0)), exp(sub(zeros(), x))))
