"""Fields of any width up to 32 bits, packed least significant bit first, as compiled loops write and read them.

Writers return the position after what they wrote. Readers take the end of the block and return the position after what
they read, or -TOO_SHORT where the block is too short; they pass on a position below zero.
"""

from __future__ import annotations

import numpy as np

from accel.codecs.codec import TOO_SHORT
from accel.kernels.jit import scalar

ZERO_64, ONE_64, EIGHT = np.uint64(0), np.uint64(1), np.uint64(8)
GATHER = np.uint64(0x0102040810204080)  # times eight bytes of 0 or 1: their bits in the top byte
TOP_BYTE = np.uint64(56)
REPEAT = np.uint64(0x0101010101010101)  # times a byte: eight of it
PICK = np.uint64(0x8040201008040201)  # bit i of byte i
CARRY = np.uint64(0x7F7F7F7F7F7F7F7F)  # added to what is left, it sets the top bit of the bytes that are not zero
SEVEN = np.uint64(7)
PAIRS_4, PAIRS_8, PAIRS_16 = np.uint64(0x000F000F000F000F), np.uint64(0x000000FF000000FF), np.uint64(0xFFFF)
STEP_2, STEP_4, STEP_8 = np.uint64(6), np.uint64(12), np.uint64(24)
PAIR = np.uint64(0x0303030303030303)
WORD = np.uint64(32)


@scalar
def bytes_of(count, bits):  # type: ignore[no-untyped-def]
    return (count * bits + 7) // 8


@scalar
def put_flags(flags_8, flags, count, out, position):  # type: ignore[no-untyped-def]
    """Bytes of 0 or 1, a bit each. What lies behind them, up to a multiple of eight, is set to 0."""
    length = bytes_of(count, 1)
    for i in range(count, length * 8):
        flags[i] = 0
    target = out[position : position + length]
    for i in range(length):
        target[i] = np.uint8((flags_8[i] * GATHER) >> TOP_BYTE)
    return position + length


@scalar
def put_pairs(bytes_8, values, count, out, position):  # type: ignore[no-untyped-def]
    """Bytes of 0 to 3, two bits each."""
    length = bytes_of(count, 2)
    for i in range(count, -(-count // 8) * 8):
        values[i] = 0
    for i in range(-(-count // 8)):
        word = bytes_8[i]
        word = (word | word >> STEP_2) & PAIRS_4
        word = (word | word >> STEP_4) & PAIRS_8
        word = (word | word >> STEP_8) & PAIRS_16
        out[position + 2 * i] = np.uint8(word)
        if 2 * i + 1 < length:
            out[position + 2 * i + 1] = np.uint8(word >> EIGHT)
    return position + length


@scalar
def put_fields(fields, count, bits, out, position):  # type: ignore[no-untyped-def]
    """The low `bits` bits of each field."""
    length = bytes_of(count, bits)
    if bits == 8:
        target = out[position : position + count]
        for i in range(count):
            target[i] = np.uint8(fields[i])
    else:
        mask = (ONE_64 << np.uint64(bits)) - ONE_64
        held, used, place = ZERO_64, 0, position
        for i in range(count):
            held |= (np.uint64(fields[i]) & mask) << np.uint64(used)
            used += bits
            if used >= 32:
                for k in range(4):  # which become one store
                    out[place + k] = np.uint8(held >> np.uint64(8 * k))
                held >>= WORD
                used -= 32
                place += 4
        while used > 0:
            out[place] = np.uint8(held)
            held >>= EIGHT
            used -= 8
            place += 1
    return position + length


@scalar
def put_number(number, bits, out, position):  # type: ignore[no-untyped-def]
    """One field."""
    held = np.uint64(number)
    length = bytes_of(1, bits)
    for i in range(length):
        out[position + i] = np.uint8(held)
        held >>= EIGHT
    return position + length


@scalar
def after(position, end, count, bits):  # type: ignore[no-untyped-def]
    """The position after `count` fields."""
    if position < 0:
        return position
    place = position + bytes_of(count, bits)
    return place if place <= end else -TOO_SHORT


@scalar
def get_flags(data, position, end, count, flags_8):  # type: ignore[no-untyped-def]
    """A bit each, as bytes of 0 or 1; bytes behind them, up to a multiple of eight, are overwritten."""
    place = after(position, end, count, 1)
    if place >= 0:
        source = data[position:place]
        for i in range(source.size):
            word = (np.uint64(source[i]) * REPEAT) & PICK
            flags_8[i] = ((word + CARRY) >> SEVEN) & REPEAT
    return place


@scalar
def get_pairs(data, position, end, count, bytes_8):  # type: ignore[no-untyped-def]
    """Two bits each, as bytes."""
    place = after(position, end, count, 2)
    if place >= 0:
        for i in range(-(-count // 8)):
            word = np.uint64(data[position + 2 * i])
            if position + 2 * i + 1 < place:
                word |= np.uint64(data[position + 2 * i + 1]) << EIGHT
            word = (word | word << STEP_8) & PAIRS_8
            word = (word | word << STEP_4) & PAIRS_4
            bytes_8[i] = (word | word << STEP_2) & PAIR
    return place


@scalar
def get_fields(data, position, end, count, bits, fields):  # type: ignore[no-untyped-def]
    place = after(position, end, count, bits)
    if place >= 0:
        source = data[position:place]
        if bits == 8:
            for i in range(count):
                fields[i] = source[i]
        else:
            mask = (ONE_64 << np.uint64(bits)) - ONE_64
            held, used, at = ZERO_64, 0, 0
            for i in range(count):
                if used < bits and at + 4 <= source.size:
                    word = ZERO_64
                    for k in range(4):  # which become one load
                        word |= np.uint64(source[at + k]) << np.uint64(8 * k)
                    held |= word << np.uint64(used)
                    at += 4
                    used += 32
                while used < bits:
                    held |= np.uint64(source[at]) << np.uint64(used)
                    at += 1
                    used += 8
                fields[i] = np.uint32(held & mask)
                held >>= np.uint64(bits)
                used -= bits
    return place


@scalar
def get_number(data, position, end, bits):  # type: ignore[no-untyped-def]
    """(number, position after it)"""
    place = after(position, end, 1, bits)
    held = ZERO_64
    if place >= 0:
        for i in range(place - position):
            held |= np.uint64(data[position + i]) << np.uint64(8 * i)
        held &= (ONE_64 << np.uint64(bits)) - ONE_64
    return np.int64(held), place


@scalar
def count_flags(flags, count):  # type: ignore[no-untyped-def]
    found = np.int64(0)
    for i in range(count):
        found += np.int64(flags[i])
    return found


@scalar
def width_of(number):  # type: ignore[no-untyped-def]
    """Bits that count up to a number."""
    bits = 0
    while number >> bits:
        bits += 1
    return bits
