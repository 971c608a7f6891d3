"""Fields of any width up to 32 bits, packed least significant bit first; and the checksum of a stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from accel.kernels.jit import kernel


def write_fields(fields: npt.NDArray[np.integer], bits: int) -> bytes:
    """The low `bits` bits of every field, one after another, padded with zeros to a whole byte."""
    if bits == 1:
        return np.packbits(fields, bitorder="little").tobytes()
    field_bytes = fields.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(field_bytes, axis=1, count=bits, bitorder="little"), bitorder="little").tobytes()


def read_fields(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint32]:
    """What write_fields wrote: uint32[count] from at least ceil(count * bits / 8) bytes."""
    unpacked = np.unpackbits(data, count=count * bits, bitorder="little")
    if bits == 1:
        return unpacked.astype(np.uint32)
    field_bytes = np.zeros((count, 4), np.uint8)
    field_bytes[:, : -(-bits // 8)] = np.packbits(unpacked.reshape(count, bits), axis=1, bitorder="little")
    return field_bytes.view("<u4").reshape(count).astype(np.uint32)


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of the bytes, as RFC 3720 (iSCSI), appendix B.4."""
    crc = np.array([0xFFFFFFFF], np.uint32)
    _crc32c.serial(0, len(data), np.frombuffer(data, np.uint8), _CRC_TABLE, crc)
    return int(~crc[0])


def _crc_table() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


_CRC_TABLE = _crc_table()


@kernel
def _crc32c(start, stop, data, table, crc):  # type: ignore[no-untyped-def]
    state = crc[0]
    for i in range(start, stop):
        state = table[(state ^ data[i]) & 0xFF] ^ (state >> np.uint32(8))
    crc[0] = state
