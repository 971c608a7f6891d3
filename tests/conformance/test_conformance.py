"""The comparison with other implementations: the emulator passes it, known wrong emulators do not."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import accel
from accel.formats import Format
from fpsim import conformance
from fpsim.conformance import ACCEL, Emulator, Outcome, Piece, Row
from fpsim.errors import FpsimError

Array = npt.NDArray[Any]


def outcome(pieces: list[Piece]) -> Outcome:
    with np.errstate(all="ignore"):
        return sum((piece.compare() for piece in pieces), Outcome())


def rows(full: bool) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in conformance.all_pieces(full):
        found.setdefault(" ".join(piece.row[:2]), []).append(piece)
    return found


SAMPLED, FULL = rows(full=False), rows(full=True)


@pytest.mark.parametrize("row", SAMPLED)
def test_sampled_inputs_give_the_bits_of_the_reference(row: str) -> None:
    """2^26 patterns a type of ml_dtypes and torch; for gfloat everything."""
    compared = outcome(SAMPLED[row])
    assert (compared.mismatches, compared.first) == (0, None)
    assert compared.pairs > 500_000


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", [row for row in FULL if not row.startswith("gfloat")])
def test_all_patterns_give_the_bits_of_the_reference(row: str) -> None:
    compared = outcome(FULL[row])
    assert (compared.mismatches, compared.first) == (0, None)
    assert compared.pairs > (1 << 30)


def test_every_type_of_ml_dtypes_and_torch_is_compared() -> None:
    ml_dtypes = conformance.needed("ml_dtypes")
    small = {name for name in dir(ml_dtypes) if name.startswith(("float8_", "float6_", "float4_"))}
    assert {type_name for type_name, _, _ in conformance.ML_DTYPES.values()} == small
    float8 = {name for name in dir(torch) if name.startswith("float8_")}
    assert {type_name for type_name, _ in conformance.TORCH.values()} >= float8


def test_the_full_form_takes_every_pattern_once() -> None:
    reference = replace(conformance.torch_reference("e5m2"), cast=lambda x: seen.append(x.copy()) or no_codes(x))
    for start, stop, stride in ((0, 1 << 17, 1), ((1 << 32) - 100_000, 1 << 32, 1), (7, 100_007, 64)):
        seen: list[Array] = []
        compared = conformance.compare_patterns(reference, start, stop, stride)
        patterns = np.concatenate(seen).view(np.uint32).astype(np.int64)
        assert compared.pairs == patterns.size
        assert patterns.min() >= start
        assert patterns.max() < stop
        assert np.array_equal((patterns - start) // stride, np.arange(-(-(stop - start) // stride))[: patterns.size])
        assert np.unique((patterns - start) % stride).size == stride


def no_codes(x: Array) -> Array:
    return np.zeros(x.shape, np.uint8)


# --- wrong emulators ------------------------------------------------------------------------------------------------


def ties_away(x: Array, fmt: Format, **options: Any) -> Array:
    mode = options.pop("rounding", "nearest_even")
    return accel.quantize(x, fmt, rounding="nearest_away" if mode == "nearest_even" else mode, **options)


def zero_on_overflow(x: Array, fmt: Format, **options: Any) -> Array:
    rounded = accel.quantize(x, fmt, **options)
    return np.where(np.abs(x) > fmt.max, x.dtype.type(0), rounded)


def no_nan(x: Array, fmt: Format, **options: Any) -> Array:
    return accel.quantize(np.where(np.isnan(x), x.dtype.type(0), x), fmt, **options)


def through_fp16(x: Array, fmt: Format, **options: Any) -> Array:
    return accel.quantize(accel.quantize(x, "fp16", overflow="ieee"), fmt, **options)


def flushing(x: Array, fmt: Format, **options: Any) -> Array:
    return accel.quantize(x, fmt, flush_subnormals="output", **options)


def positive_zero(x: Array, fmt: Format, **options: Any) -> Array:
    return accel.quantize(x, fmt, **options) + x.dtype.type(0)


def one_code_off(x: Array, fmt: Format, **options: Any) -> Array:
    codes = accel.encode(x, fmt, **options)
    return np.where(codes == fmt.max_code, codes - 1, codes).astype(codes.dtype)


def one_value_off(codes: Array, fmt: Format) -> Array:
    values = accel.decode(codes, fmt)
    return np.where(codes == fmt.max_code, np.float32(0), values)


WRONG = {
    wrong.__name__: Emulator(quantize=wrong)
    for wrong in (ties_away, zero_on_overflow, no_nan, through_fp16, flushing, positive_zero)
} | {"one_code_off": Emulator(encode=one_code_off), "one_value_off": Emulator(decode=one_value_off)}
REFERENCES: dict[str, Callable[[Emulator], Outcome]] = {
    "ml_dtypes": lambda emulator: conformance.compare_landmarks(conformance.ml_dtypes_reference("e4m3fn"), emulator),
    "torch": lambda emulator: conformance.compare_landmarks(conformance.torch_reference("e5m2"), emulator),
    "gfloat": lambda emulator: conformance.compare_with_gfloat(Format("e4m3fn", 4, 3, 7, "fn"), emulator),
    "a sample": lambda emulator: conformance.compare_patterns(
        conformance.ml_dtypes_reference("e4m3fn"), 0, 1 << 32, 1024, emulator
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_emulators_fail(wrong: str, reference: str) -> None:
    if reference == "a sample" and wrong == "one_value_off":
        pytest.skip("a sample of inputs is not decoded")
    compared = REFERENCES[reference](WRONG[wrong])
    assert compared.mismatches > 0
    assert compared.mismatches < compared.pairs
    assert compared.first is not None


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_right_emulator_passes_the_same(reference: str) -> None:
    with np.errstate(all="ignore"):
        assert REFERENCES[reference](ACCEL).mismatches == 0


def test_a_mismatch_says_where() -> None:
    with np.errstate(all="ignore"):
        compared = conformance.compare_landmarks(conformance.ml_dtypes_reference("e4m3fn"), WRONG["zero_on_overflow"])
        codes = conformance.compare_landmarks(conformance.ml_dtypes_reference("e4m3fn"), WRONG["one_code_off"])
    assert compared.first is not None
    assert codes.first is not None
    assert (compared.first.format, compared.first.operation) == ("e4m3fn", "quantize nearest_even ieee")
    assert abs(np.array(int(compared.first.input, 16), np.uint32).view(np.float32)) > 448
    assert compared.first.ours == "0x00000000"
    assert (codes.first.operation, codes.first.ours, codes.first.theirs) == (
        "encode nearest_even ieee", "0x7d", "0x7e"
    )  # fmt: skip


# --- running everything ---------------------------------------------------------------------------------------------


def few_pieces(full: bool, emulator: Emulator) -> list[Piece]:
    def compare() -> Outcome:
        return conformance.compare_landmarks(reference, emulator)

    reference = conformance.torch_reference("e5m2")
    return [Piece(("torch", "e5m2", "m"), compare), Piece(("b", "c", "m"), compare), Piece(("b", "c", "m"), compare)]


def test_run_adds_the_pieces_of_a_row_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "all_pieces", few_pieces)
    reports: list[tuple[int, int, str]] = []
    first, second = conformance.run(progress=lambda *report: reports.append(report))
    assert isinstance(first, Row)
    assert (first.reference, first.format, first.mismatches, second.mismatches) == ("torch", "e5m2", 0, 0)
    assert second.pairs == 2 * first.pairs > 0
    assert [report[:2] for report in reports] == [(1, 3), (2, 3), (3, 3)]
    assert {report[2] for report in reports} == {"torch e5m2", "b c"}
    wrong = conformance.run(emulator=WRONG["zero_on_overflow"])
    assert wrong[1].mismatches == 2 * wrong[0].mismatches > 0
    assert wrong[1].first == wrong[0].first


def test_an_error_in_a_piece_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> Array:
        raise RuntimeError("broken")

    monkeypatch.setattr(conformance, "all_pieces", few_pieces)
    with pytest.raises(RuntimeError, match="broken"):
        conformance.run(emulator=Emulator(quantize=failing))


@pytest.mark.parametrize("module", ["ml_dtypes", "gfloat"])
def test_a_missing_reference_is_one_clear_error(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        if name == module:
            raise ImportError(name)
        return builtins.__import__(name)

    monkeypatch.setattr(conformance, "import_module", without)
    with pytest.raises(FpsimError, match=rf"{module} is not installed.*pip install 'fpsim\[test\]'"):
        conformance.run()


# --- the parts of the comparison ------------------------------------------------------------------------------------


def test_differing_compares_bits_and_takes_all_nans_for_one() -> None:
    patterns = np.array([0x7FC00000, 0xFF800001, 0x0, 0x80000000, 0x3F800000, 0x7F800000], np.uint32)
    other = np.array([0x7F800001, 0x7FFFFFFF, 0x0, 0x0, 0x3F800001, 0x7FC00000], np.uint32)
    assert conformance.differing(patterns.view(np.float32), other.view(np.float32)).tolist() == [
        False, False, False, True, True, True
    ]  # fmt: skip
    assert conformance.differing(np.zeros(2, np.float64), np.zeros(2, np.float32)).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_landmarks_hold_values_midpoints_neighbours_and_specials(dtype: type) -> None:
    found = conformance.landmarks(np.array([0.0, 0.5, 1.0, 1.5]), dtype)
    assert found.dtype == dtype
    numbers = set(found.tolist())
    up = float(np.nextafter(dtype(1.25), dtype(2)))
    assert {0.0, 0.5, -1.5, 1.75, 0.25, 1.25, up, math.inf, -math.inf, 3.25} <= numbers
    assert bool(np.isnan(found).any())
    assert bool((np.signbit(found) & (found == 0)).any())


def test_words_are_those_of_the_kernels() -> None:
    from accel.kernels import cpu

    words = np.empty(1000, np.uint32)
    cpu.random_words.serial(0, 1000, words, 2**34 - 100, np.uint64(2**63 + 5), np.uint64(7), np.uint64(9))
    assert conformance.random_words(1000, 2**63 + 5, 7, 9, 2**34 - 100).tolist() == words.tolist()


def test_gfloat_families_hold_the_official_formats() -> None:
    formats = [fmt for family in conformance.gfloat_families().values() for fmt in family]
    keys = {(f.exponent_bits, f.mantissa_bits, f.bias, f.policy, f.subnormals, f.signed) for f in formats}
    assert len(keys) == len(formats)
    for f in accel.formats():
        if isinstance(f, Format) and f.bits <= 8:
            assert (f.exponent_bits, f.mantissa_bits, f.bias, f.policy, f.subnormals, f.signed) in keys, f.name
