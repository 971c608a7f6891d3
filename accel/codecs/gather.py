"""Elements picked by flags, and put back: with one vector instruction for sixteen where the processor has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from accel.kernels.jit import config, scalar

LANES = 16
HAS_VECTORS = "+avx512f" in (config.CPU_FEATURES or get_host_cpu_features())
NUMBER, BYTE, COUNT = ir.IntType(32), ir.IntType(8), ir.IntType(64)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _mask(context: Any, builder: Any, kind: Any, flags: Any, index: Any) -> Any:
    """The sixteen flags from an index on, as a vector of bits, and how many are set."""
    vector = ir.VectorType(BYTE, LANES)
    place = builder.bitcast(_place(context, builder, kind, flags, index), vector.as_pointer())
    mask = builder.icmp_unsigned("!=", builder.load(place, align=1), ir.Constant(vector, None))
    return mask, builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(LANES))), COUNT)


@intrinsic
def _compress(typing_context, values, flags, index, kept, found):  # type: ignore[no-untyped-def]
    """The flagged ones of 16 values of 32 bits to kept[found] and after; returns how many."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values, flags, index, kept, found = arguments
        kinds = signature.args
        vector = ir.VectorType(NUMBER, LANES)
        source = builder.bitcast(_place(context, builder, kinds[0], values, index), vector.as_pointer())
        mask, count = _mask(context, builder, kinds[1], flags, index)
        target = builder.bitcast(_place(context, builder, kinds[3], kept, found), vector.as_pointer())
        kind = ir.FunctionType(vector, [vector, vector, mask.type])
        compress = get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.compress.v{LANES}i32")
        packed = builder.call(compress, [builder.load(source, align=4), ir.Constant(vector, None), mask])
        builder.store(packed, target, align=4)
        return count

    return types.uint64(values, flags, index, kept, found), emit


@intrinsic
def _expand(typing_context, kept, found, flags, index, values):  # type: ignore[no-untyped-def]
    """kept[found] and after to the flagged ones of 16 values of 32 bits, 0 to the others; returns how many."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kept, found, flags, index, values = arguments
        kinds = signature.args
        vector = ir.VectorType(NUMBER, LANES)
        source = builder.bitcast(_place(context, builder, kinds[0], kept, found), vector.as_pointer())
        mask, count = _mask(context, builder, kinds[2], flags, index)
        kind = ir.FunctionType(vector, [vector, vector, mask.type])
        expand = get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.expand.v{LANES}i32")
        spread = builder.call(expand, [builder.load(source, align=4), ir.Constant(vector, None), mask])
        target = builder.bitcast(_place(context, builder, kinds[4], values, index), vector.as_pointer())
        builder.store(spread, target, align=4)
        return count

    return types.uint64(kept, found, flags, index, values), emit


@scalar
def compact(values, flags, count, kept):  # type: ignore[no-untyped-def]
    """The values of 32 bits whose flag is 1, one after another; returns how many. kept: one longer than they may be."""
    found, begin = np.uint64(0), 0
    if HAS_VECTORS:
        begin = count // LANES * LANES
        for i in range(0, begin, LANES):
            found += _compress(values, flags, i, kept, found)
    for i in range(begin, count):
        kept[found] = values[i]
        found += np.uint64(flags[i])
    return np.int64(found)


@scalar
def scatter(kept, flags, count, values):  # type: ignore[no-untyped-def]
    """The reverse: each flagged value is the next of those kept, the others are 0."""
    found, begin = np.uint64(0), 0
    if HAS_VECTORS:
        begin = count // LANES * LANES
        for i in range(0, begin, LANES):
            found += _expand(kept, found, flags, i, values)
    for i in range(begin, count):
        values[i] = kept[found] if flags[i] else kept.dtype.type(0)
        found += np.uint64(flags[i])
