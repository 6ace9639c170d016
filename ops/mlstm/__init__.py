"""mLSTM: the matrix memory of xLSTM, with exponential input gates and a normaliser."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import forced_backend
from ..operator import CHUNK, Operator
from ..tensors import check, dense_rows, promote, state_dtype
from . import cuda, reference

__all__ = ["mlstm"]

EPS = 1e-6


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, chunk_size: int = 64) -> Tensor:
    """mLSTM (xLSTM, arXiv 2405.04517, section 2.3): a matrix memory per head, with gates in the log domain.

    For each batch item and head, with the key k_t / sqrt(P), and m_0 = -inf, C_0 = 0, n_0 = 0::

        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
        C_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T,     in R^(P x P)
        n_t = the same, with k_t in the place of k_t v_t^T
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)

    On the CPU a kernel goes step by step. Elsewhere it is computed chunk by chunk, as matrix products: masked
    attention within a chunk, states between chunks. On CUDA kernels do so for any P, on tensor cores, 64 steps at a
    time; in float64, or before sm_80, PyTorch's products take their place, with a warning.

    Args:
        q, k, v: ``(B, L, H, P)``: H heads of P channels. float64, float32, bfloat16 or float16.
        i, f: Gates before exp and sigmoid ``(B, L, H)``.
        chunk_size: Steps in a chunk of PyTorch's products. It does not change the result.

    Returns:
        ``(B, L, H, P)`` in the widest dtype of `q`, `k` and `v`; states and sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, L is 0, `chunk_size` is not positive, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(q=(q, "BLHP"), k=(k, "BLHP"), v=(v, "BLHP"), i=(i, "BLH"), f=(f, "BLH"))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = promote(q, k, v)
    q, k, v, i, f = (x.to(state_dtype(dtype)) for x in (q, k, v, i, f))
    if forced_backend() == "reference":
        return reference.mlstm(q, k, v, i, f, EPS).to(dtype)
    return _operator(q, k, v, i, f, chunk_size).to(dtype)


# The CPU's scan has one column more than there are values: n is the state of a value that is always 1. Besides h the
# operator keeps m, n . q and, on the CPU, the states before each chunk of CHUNK steps; on CUDA they are P / 64 times as
# large as v, and computed anew. PyTorch's matrix products need none of them.

STORED_ON = ("cpu",)


def _kept(q, save):
    """Where kernels store states ``(B, H, chunks, P, P + 1)``, m and n . q ``(B, L, H)``; empty if none is kept."""
    batch, length, heads, width = q.shape
    if not (save and q.device.type in ("cpu", "cuda")):
        return tuple(q.new_empty(0) for _ in range(3))
    chunks = (length + CHUNK["cpu"] - 1) // CHUNK["cpu"]
    states = q.new_empty((batch, heads, chunks, width, width + 1) if q.device.type in STORED_ON else (0,))
    return states, *(q.new_empty(q.shape[:3]) for _ in range(2))


def _chunked(q, k, v, i, f, chunk_size, save, use_scan=False):
    with torch.autocast(q.device.type, enabled=False):  # the states stay in float32
        return reference.chunked(q, k, v, i, f, EPS, chunk_size, use_scan), *_kept(q, save)


def _export(q, k, v, i, f, chunk_size, save):
    return reference.mlstm(q, k, v, i, f, EPS, use_scan=True), *_kept(q, save)


def _scan_inputs(q, k, v, i, log_f, m):
    """Decays and weights of the steps, keys divided by sqrt(P), and the values with a 1 appended."""
    before = F.pad(m[:, :-1], (0, 0, 1, 0), value=-torch.inf)
    weight = (i - m).exp() / q.shape[3] ** 0.5
    rows = dict(q=dense_rows(q), k=dense_rows(k), v=torch.cat([v, torch.ones_like(v[..., :1])], 3))
    return rows | dict(g=(log_f + before - m).contiguous(), beta=weight.contiguous())


def _forward(backend, q, k, v, i, f, chunk_size, save):
    states, m, denominator = _kept(q, save)
    i = i.contiguous()
    m = torch.empty_like(i) if m.dim() == 1 else m
    if backend == "cuda":
        rows = dict(q=dense_rows(q), k=dense_rows(k), v=dense_rows(v))
        kept = denominator if save else None
        h = cuda.forward(**rows, i=i, f=f.contiguous(), eps=EPS, m=m, denominator=kept)
        return h, *((states, m, denominator) if save else _kept(q, False))
    log_f = F.logsigmoid(f).contiguous()
    torch.ops.linzoo_cpu.mlstm_maximum_forward(i, log_f, m)
    packed = q.new_empty(q.shape[0], q.shape[1] + q.shape[3], q.shape[2], q.shape[3] + 1)  # last state at the end
    torch.ops.linzoo_cpu.mlstm_forward(**_scan_inputs(q, k, v, i, log_f, m), initial=None, packed=packed, states=states)
    y = packed[:, : q.shape[1]]
    h = reference.read(y[..., :-1], y[..., -1], m, EPS)
    return (h, states, m, denominator.copy_(y[..., -1])) if save else (h, *_kept(q, False))


def _backward(backend, dh, q, k, v, i, f, chunk_size, h, states, m, denominator):
    """`mlstm` scales everything by exp(-m), so a gradient passes through m only by `EPS` in the quotient."""
    if m.dim() == 1:
        h, states, m, denominator = _forward(backend, q, k, v, i, f, chunk_size, True)
    if backend == "cuda":
        rows = {name: dense_rows(x) for name, x in dict(dh=dh, q=q, k=k, v=v).items()}
        kept = dict(h=h.contiguous(), m=m, denominator=denominator)
        return cuda.backward(**rows, i=i.contiguous(), f=f.contiguous(), eps=EPS, **kept)
    i, log_f = i.contiguous(), F.logsigmoid(f).contiguous()
    floor = reference.floor(m)
    divisor = torch.maximum(denominator.abs(), floor) + EPS
    read = (dh * h).sum(3) / divisor
    dm = -read * EPS

    dpacked = q.new_empty(q.shape[0], q.shape[1] + q.shape[3], q.shape[2], q.shape[3] + 1)
    dpacked[:, q.shape[1] :] = 0  # of the last state
    torch.div(dh, divisor.unsqueeze(3), out=dpacked[:, : q.shape[1], :, :-1])
    dpacked[:, : q.shape[1], :, -1] = torch.where(denominator.abs() > floor, -read * denominator.sign(), 0)
    inputs = _scan_inputs(q, k, v, i, log_f, m)
    dq, dk, dv, dlog_f, dweight = (inputs[name].new_empty(inputs[name].shape) for name in ("q", "k", "v", "g", "beta"))
    grads = dict(dq=dq, dk=dk, dv=dv, dg=dlog_f, dbeta=dweight, dinitial=None)
    torch.ops.linzoo_cpu.mlstm_backward(dpacked=dpacked, **inputs, initial=None, states=states, **grads)
    di = dweight * inputs["beta"]
    torch.ops.linzoo_cpu.mlstm_maximum_backward(dm.contiguous(), i, log_f, m, di, dlog_f)
    return [dq, dk, dv[..., :-1].contiguous(), di, dlog_f * torch.sigmoid(-f)]


def _flops(q, chunk_size, **_):
    """A multiply-add per product: with all steps of a chunk, and with the state when it is written and read."""
    batch, length, heads, width = q
    chunk = min(chunk_size, length)
    return batch * length * heads * (chunk * (2 * width + 1) + 2 * width * (width + 1))


_operator = Operator(
    "mlstm",
    "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, int chunk_size, bool save) "
    "-> (Tensor h, Tensor states, Tensor m, Tensor denominator)",
    kernel="mlstm",
    reference=_chunked,
    export=_export,
    chunked=functools.partial(_chunked, use_scan=True),
    forward=_forward,
    backward=_backward,
    fake=lambda q, k, v, i, f, chunk_size, save: (q.new_empty(q.shape), *_kept(q, save)),
    flops=_flops,
    keep_first=True,
    limit=lambda backend, q, *_: cuda.unsupported(q) if backend == "cuda" else None,
)
