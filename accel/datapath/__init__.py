"""Emulated datapaths: what a described multiply-accumulate unit makes of a matrix product."""

from accel.datapath.products import matmul
from accel.datapath.units import Mac, mac, macs

__all__ = ["Mac", "mac", "macs", "matmul"]
