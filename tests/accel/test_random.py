from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pytest

import accel
from accel.kernels import cpu
from accel.random import philox4x32

WORD = 0xFFFFFFFF

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: (counter, key, output).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@numba.njit
def philox(counter, key):  # type: ignore[no-untyped-def]
    return philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


def textbook_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & WORD, (left >> 32) ^ d ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


def word_of(index: int, seed: int, stream: int, step: int) -> int:
    """The documented map from an element to its word."""
    group, lane = (index // 64) * 16 + index % 16, (index // 16) % 4
    return textbook_philox((group & WORD, group >> 32, stream, step), (seed & WORD, seed >> 32))[lane]


def words(count: int, offset: int = 0, seed: int = 0, stream: int = 0, step: int = 0) -> npt.NDArray[np.uint32]:
    out = np.empty(count, np.uint32)
    cpu.random_words.serial(0, count, out, offset, np.uint64(seed), np.uint64(stream), np.uint64(step))
    return out


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    assert textbook_philox(counter, key) == output
    found = philox(tuple(map(np.uint64, counter)), tuple(map(np.uint64, key)))
    assert tuple(int(word) & WORD for word in found) == output


@pytest.mark.parametrize(
    ("offset", "seed", "stream", "step"),
    [
        (0, 0, 0, 0),
        (0, 0x299F31D0A4093822, 7, 3),
        (63, 1 << 63, WORD, 0),
        (4095, 2**64 - 1, 0, WORD),
        (2**34 - 100, 5, 6, 7),  # the group number leaves 32 bits
        (2**62 - 200, 2**64 - 1, WORD, WORD),
    ],
)
def test_words_follow_the_documented_map(offset: int, seed: int, stream: int, step: int) -> None:
    expected = [word_of(offset + i, seed, stream, step) for i in range(200)]
    np.testing.assert_array_equal(words(200, offset, seed, stream, step), np.array(expected, np.uint32))


def test_words_do_not_depend_on_the_piece() -> None:
    whole = words(10_000, 0, seed=1)
    for start in (0, 1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 8191):
        np.testing.assert_array_equal(words(1500, start, seed=1), whole[start : start + 1500])


def test_words_of_different_seeds_streams_and_steps_differ() -> None:
    sequences = {words(64, 0, *key).tobytes() for key in ((0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(sequences) == 5


def test_words_are_uniform() -> None:
    high_bytes = np.bincount(words(1 << 18, seed=42) >> 24, minlength=256)
    expected = (1 << 18) / 256
    chi_squared = float(((high_bytes - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)


def test_stream_ids_are_stable() -> None:
    """A hash that changed would change every recorded run."""
    assert accel.stream_id("layer3.0.conv1/gradient/prune") == 0x8556E017
    assert accel.stream_id("a") != accel.stream_id("b")
