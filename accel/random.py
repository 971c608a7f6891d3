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

MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
WEYL_0 = np.uint64(0x9E3779B9)
WEYL_1 = np.uint64(0xBB67AE85)
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def stream_id(name: str) -> int:
    """The 32-bit stream number of a tensor's operation, a stable hash of its name (`layer3.0.conv1/gradient/prune`)."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


@scalar
def philox_round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """One round. The high halves of the words hold anything; masking the factors is free in a vector multiplication."""
    product_0 = MULTIPLIER_0 * (c0 & LOW_WORD)
    product_1 = MULTIPLIER_1 * (c2 & LOW_WORD)
    return (product_1 >> WORD_BITS) ^ c1 ^ k0, product_1, (product_0 >> WORD_BITS) ^ c3 ^ k1, product_0


@scalar
def philox4x32(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds of Philox4x32 on 32-bit words held in uint64: four words of output, in the low halves.

    The rounds are written out because an inner loop would keep the caller's loop from vectorising.
    """
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + WEYL_0) & LOW_WORD, (k1 + WEYL_1) & LOW_WORD
    return philox_round(c0, c1, c2, c3, k0, k1)
