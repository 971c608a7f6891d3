"""Values to codes and back, exactly, for every format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from accel import launch
from accel.formats import Format
from accel.rounding import needs_wide, parameters

NO_ALPHA = np.float32(0)


def encode_values(
    x: npt.NDArray[np.float32], fmt: Format, scale: np.float32, alpha: np.float32 = NO_ALPHA
) -> npt.NDArray[np.uint32]:
    """The code whose value times scale is nearest to each x: uint32 of x's shape.

    `decode_values` of the code is x itself, or x is not a value of scale * grid(fmt). +-alpha (0 for none) has the
    alpha codes of a format that has them.
    """
    quotients = torch.from_numpy(x.astype(np.float64) / np.float64(scale))
    codes = torch.empty(quotients.shape, dtype=torch.uint32)
    method = launch.method_of(fmt, "nearest_even", "ieee", 32, False, torch.float64)
    launch.round_into("encode", quotients, codes, method, None, launch.NO_KEY)
    result = codes.numpy()
    if fmt.alpha_code is not None and alpha > 0:
        result[x == alpha], result[x == -alpha] = fmt.alpha_code, fmt.alpha_code | fmt.sign_code
    return result


def decode_values(
    codes: npt.NDArray[np.uint32], fmt: Format, scale: np.float32, alpha: np.float32 = NO_ALPHA
) -> npt.NDArray[np.float32]:
    """The value of each code times scale, one float32 product, alpha codes apart: float32 of codes' shape."""
    flat = torch.from_numpy(np.ascontiguousarray(codes).reshape(-1))
    values = torch.empty(flat.shape, dtype=torch.float32)
    launch.decode_into(flat, values, None, parameters(fmt, wide=needs_wide(fmt)))
    with np.errstate(over="ignore", under="ignore"):
        result = values.numpy().reshape(codes.shape) * scale
    if fmt.alpha_code is not None and alpha > 0:
        result[codes == fmt.alpha_code], result[codes == fmt.alpha_code | fmt.sign_code] = alpha, -alpha
    return result
