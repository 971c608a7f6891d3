"""Counter-based random words: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The word of an element is a pure function of (seed, stream, step, element index):

    key     = the 64-bit seed (low word first)
    counter = (group low, group high, stream, step)
    group   = (index // 64) * 16 + index % 16,    lane = (index // 16) % 4

so that one call of the generator serves four contiguous vectors of 16 elements without a shuffle.
"""

from __future__ import annotations

import hashlib

import numpy as np

from accel.kernels.jit import scalar
from accel.words import LOW_WORD, WORD_BITS, product

MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
WEYL_0 = np.uint64(0x9E3779B9)
WEYL_1 = np.uint64(0xBB67AE85)


def stream_id(name: str) -> int:
    """The 32-bit stream number of a tensor's operation, a stable hash of its name (`layer3.0.conv1/gradient/prune`)."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


@scalar
def philox_round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """One round."""
    word = type(c0)
    high_0, low_0 = product(c0, MULTIPLIER_0)
    high_1, low_1 = product(c2, MULTIPLIER_1)
    return word(high_1 ^ c1 ^ word(k0)), low_1, word(high_0 ^ c3 ^ word(k1)), low_0


@scalar
def round_keys(k0, k1):  # type: ignore[no-untyped-def]
    """The two words of the key in each of ten rounds, one after another."""
    a, b = k0, k1
    c, d = (a + WEYL_0) & LOW_WORD, (b + WEYL_1) & LOW_WORD
    e, f = (c + WEYL_0) & LOW_WORD, (d + WEYL_1) & LOW_WORD
    g, h = (e + WEYL_0) & LOW_WORD, (f + WEYL_1) & LOW_WORD
    i, j = (g + WEYL_0) & LOW_WORD, (h + WEYL_1) & LOW_WORD
    k, m = (i + WEYL_0) & LOW_WORD, (j + WEYL_1) & LOW_WORD
    n, o = (k + WEYL_0) & LOW_WORD, (m + WEYL_1) & LOW_WORD
    p, q = (n + WEYL_0) & LOW_WORD, (o + WEYL_1) & LOW_WORD
    r, s = (p + WEYL_0) & LOW_WORD, (q + WEYL_1) & LOW_WORD
    t, u = (r + WEYL_0) & LOW_WORD, (s + WEYL_1) & LOW_WORD
    return a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q, r, s, t, u


@scalar
def philox_rounds(c0, c1, c2, c3, keys):  # type: ignore[no-untyped-def]
    """Philox4x32 under `round_keys`: four words of output. Words are uint32, or uint64 of which the low halves count.

    Vector units multiply the low halves of 64-bit lanes; elsewhere words of 32 bits take fewer steps. The rounds are
    written out because an inner loop would keep the caller's loop from vectorising.
    """
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[0], keys[1])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[2], keys[3])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[4], keys[5])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[6], keys[7])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[8], keys[9])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[10], keys[11])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[12], keys[13])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[14], keys[15])
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, keys[16], keys[17])
    return philox_round(c0, c1, c2, c3, keys[18], keys[19])


@scalar
def philox4x32(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds of Philox4x32 under a key of two words."""
    return philox_rounds(c0, c1, c2, c3, round_keys(k0, k1))


@scalar
def draw_four(call, stream, step, keys):  # type: ignore[no-untyped-def]
    """The random words of the four elements that a call of the generator serves."""
    number = np.uint64(call)
    return philox_rounds(np.uint32(number), np.uint32(number >> WORD_BITS), np.uint32(stream), np.uint32(step), keys)


@scalar
def draw_one(number, stream, step, keys):  # type: ignore[no-untyped-def]
    """The random word of one element."""
    number = np.uint64(number)
    call = (number >> np.uint64(6) << np.uint64(4)) + (number & np.uint64(15))
    w0, w1, w2, w3 = draw_four(call, stream, step, keys)
    low, high = (w1, w3) if number & np.uint64(16) else (w0, w2)
    return high if number & np.uint64(32) else low
