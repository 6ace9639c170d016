"""Long convolution, causal or bidirectional: by Fourier transforms, or along several axes by matrix products."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import check, state_dtype


def fft_conv(
    u: Tensor,
    kernels: Tensor | Sequence[Tensor],
    backward_kernels: Tensor | Sequence[Tensor] | None = None,
    *,
    out_channels: int | None = None,
) -> Tensor:
    """Depthwise convolution of channel-last `u` with one kernel per axis, of any length up to the whole sequence.

    It is causal along every axis, with zeros in front. Along one axis ``y_t = sum_j k_j u_{t-j}``. With
    `backward_kernels` it also looks ahead, from the next position on (S4's bidirectional layers):
    ``+ sum_j k'_j u_{t+1+j}``. Along several axes the kernel is the outer product of the axes' kernels (S4ND,
    arXiv 2210.06583, section 3).

    Args:
        u: ``(B, L, H)``, ``(B, L_1, L_2, H)``, ...: one axis per kernel.
        kernels: A list with one kernel ``(H, l)`` or ``(R, H, l)`` per axis. The R outer products are summed. For one
            axis a single tensor will do.
        backward_kernels: As `kernels`, with the same shapes.
        out_channels: O, for a full convolution. The kernels then have O H rows, those of the first output first.

    Returns:
        The shape and dtype of `u`, with O channels if given. Computed in float32, or float64 for float64.

    Raises:
        ValueError: the kernels do not fit `u` or each other, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    kernels = [kernels] if isinstance(kernels, Tensor) else list(kernels)
    backward = backward_kernels
    backward = [backward] if isinstance(backward, Tensor) else None if backward is None else list(backward)
    check(u=(u, "B*H"))
    rows = u.shape[-1] * (out_channels or 1)
    for name, group in (("kernels", kernels), ("backward_kernels", backward or ())):
        for k in group:
            ranked = isinstance(k, Tensor) and k.dim() == 3
            check(**{"u": (u, "B*H"), name: (k, "RKl" if ranked else "Kl")})
            if k.shape[-2] != rows:
                raise ValueError(f"{name}: expected (H, l) or (R, H, l) with H = {rows}, got {tuple(k.shape)}")
    check(u=(u, f"B{'XYZVW'[: len(kernels)]}H"))
    if backward is not None and [k.shape for k in backward] != [k.shape for k in kernels]:
        raise ValueError("backward_kernels: expected the shapes of kernels")
    dtype = state_dtype(u.dtype)
    kernels = [_ranked(k, dtype) for k in kernels]
    backward = None if backward is None else [_ranked(k, dtype) for k in backward]
    if len(kernels) > 1 and out_channels is None:
        y = _by_matrices(u.to(dtype), kernels, backward)
    else:
        y = _by_spectra(u.to(dtype), kernels, backward, out_channels)
    return y.to(u.dtype)


def _by_matrices(u, kernels, backward):
    """``y = sum_r T_r1 ... T_rD u``, where T_ra[t, s] along axis a is k_ra[t - s], or k'_ra[s - t - 1] where s > t.

    The sides of a map are short: products with these Toeplitz matrices take less time than transforms.
    """
    y = u.movedim(-1, 0).unsqueeze(0).contiguous()  # (R, H, B, L_1, ..., L_D)
    with nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False):
        for axis in reversed(range(len(kernels))):
            length, k = u.shape[1 + axis], kernels[axis]
            ahead = torch.zeros_like(k) if backward is None else backward[axis]
            taps = torch.cat([k[..., :1], _fit(ahead, length), _fit(k, length)[..., 1:].flip(-1)], -1)
            # Row t holds taps[(s - t) mod 2 L]: copies one behind the other, read with a period that is one less.
            rows = taps.unsqueeze(-2).expand(*taps.shape[:-1], length, -1).flatten(-2)[..., : length * (2 * length - 1)]
            matrix = rows.unflatten(-1, (length, 2 * length - 1))[..., :length]  # (R, H, L, L)
            # The finished axis moves to the front, so that the next one is last.
            y = (matrix @ y.flatten(2, -2).mT).unflatten(-1, y.shape[2:-1])
        return y.sum(0).movedim((0, -1), (-1, 0)).contiguous()


def _fit(k, length):
    """`k` cut off, or with zeros, to `length`."""
    return F.pad(k, (0, length))[..., :length]


def _by_spectra(u, kernels, backward, out_channels):
    """By the convolution theorem; both zero-padded, so that nothing comes round the end."""
    if u.shape[0] == 0:  # PyTorch's transforms reject an empty batch
        return _by_spectra(torch.cat([u, u.new_zeros(1, *u.shape[1:])]), kernels, backward, out_channels)[:0]
    axes = tuple(range(-len(kernels), 0))
    sizes = [length + k.shape[-1] for length, k in zip(u.shape[1:-1], kernels, strict=True)]
    spectra = []
    for i, (k, size) in enumerate(zip(kernels, sizes, strict=True)):
        zeros = size - k.shape[-1]
        k = F.pad(k, (0, zeros))
        if backward is not None:
            k = k + F.pad(backward[i].flip(-1), (zeros, 0))
        f = torch.fft.rfft(k) if axes[i] == -1 else torch.fft.fft(k)  # the last axis has the real transform
        spectra.append(f.view(*f.shape[:2], *(-1 if axis == axes[i] else 1 for axis in axes)))
    # Channels go in front: transforms then run along contiguous memory, and compiled programs expect that.
    transformed = torch.fft.rfftn(u.movedim(-1, 1).contiguous(), s=sizes, dim=axes)
    spectrum = functools.reduce(torch.mul, spectra).sum(0)
    if out_channels is None:
        transformed = transformed * spectrum
    else:
        # Channels are mixed frequency by frequency. ONNX has products of complex matrices, but no einsum of them.
        frequencies = transformed.shape[2:]
        mixing = spectrum.unflatten(0, (out_channels, -1)).flatten(2).permute(2, 1, 0)
        mixed = transformed.flatten(2).permute(2, 0, 1) @ mixing
        transformed = mixed.permute(1, 2, 0).unflatten(2, frequencies)
    y = torch.fft.irfftn(transformed, s=sizes, dim=axes)
    for axis in axes:
        y = y.narrow(axis, 0, u.shape[axis - 1])
    return y.movedim(1, -1).contiguous()


def _ranked(k, dtype):
    """``(R, H, l)`` of a kernel ``(H, l)`` or ``(R, H, l)``."""
    return (k if k.dim() == 3 else k.unsqueeze(0)).to(dtype)
