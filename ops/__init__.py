"""Operators of linear-complexity token mixers, on CPU, CUDA and in plain PyTorch."""

import sys

from . import scan_order
from .backend import backend_info, use_backend
from .causal_conv1d import causal_conv1d
from .deform_conv import deform_conv
from .depthwise_conv2d import depthwise_conv2d
from .diagonal_scan import diagonal_scan
from .fft_conv import fft_conv
from .gated_delta import gated_delta
from .mlstm import mlstm
from .onednn import use_onednn
from .rational import rational
from .selective_scan import selective_scan, selective_scan_state, selective_states
from .ssd import nc_ssd, ssd, ssd_state
from .ssm_kernel import ssm_kernel
from .wkv import bi_wkv, wkv6, wkv6_state, wkv7, wkv7_state

__all__ = [
    "backend_info",
    "bi_wkv",
    "causal_conv1d",
    "deform_conv",
    "depthwise_conv2d",
    "diagonal_scan",
    "fft_conv",
    "gated_delta",
    "mlstm",
    "nc_ssd",
    "rational",
    "scan_order",
    "selective_scan",
    "selective_scan_state",
    "selective_states",
    "ssd",
    "ssd_state",
    "ssm_kernel",
    "use_backend",
    "use_onednn",
    "wkv6",
    "wkv6_state",
    "wkv7",
    "wkv7_state",
]

# A function hides the package of its name; `import linzoo.ops.ssd.reference` finds the module through the function.
for _function in (
    causal_conv1d,
    deform_conv,
    depthwise_conv2d,
    diagonal_scan,
    gated_delta,
    mlstm,
    rational,
    selective_scan,
    ssd,
    ssm_kernel,
):
    vars(_function)["reference"] = sys.modules[f"{__name__}.{_function.__name__}.reference"]
