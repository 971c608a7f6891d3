"""Datapaths: what a multiply-accumulate array computes, sum by sum."""

from accel.datapath.convolution import Convolution, conv_dgrad, conv_forward, conv_wgrad
from accel.datapath.products import matmul
from accel.datapath.units import Mac, mac, macs

__all__ = ["Convolution", "Mac", "conv_dgrad", "conv_forward", "conv_wgrad", "mac", "macs", "matmul"]
