"""Arguments and grids of the kernels in cuda.cu. Called like the CPU kernels."""

from .. import compile_cuda as cuda

NAME = "ssm_kernel"
AT_ONCE = 16  # steps per thread: kAtOnce of cuda.cu


def _launch(kernel, threads, like, **named):
    cuda.launch(NAME, cuda.template(kernel, like.dtype), -(-threads // cuda.MAX_THREADS), cuda.MAX_THREADS, **named)


def vandermonde_forward(c, x, k):
    """Writes k ``(H, L)``."""
    (H, N, _), L = c.shape, k.shape[1]
    _launch("vandermonde", H * -(-L // AT_ONCE), c, c=c, x=x, H=H, N=N, L=L, k=k)


def vandermonde_backward(dk, c, x, dc, dx):
    """Writes dc and dx ``(H, N, 2)``."""
    H, N, _ = c.shape
    _launch("vandermonde_backward", 32 * H * N, c, dk=dk, c=c, x=x, H=H, N=N, L=dk.shape[1], dc=dc, dx=dx)


def cauchy_forward(v, w, nodes, r):
    """Writes r ``(H, V, 2, K)``."""
    (H, V, N, _), K = v.shape, nodes.shape[0]
    _launch("cauchy", H * V * K, v, v=v, w=w, nodes=nodes, H=H, V=V, N=N, K=K, r=r)


def cauchy_backward(dr, v, w, nodes, dv, dw):
    """Writes dv ``(H, V, N, 2)`` and dw ``(H, N, 2)``."""
    (H, V, N, _), K = v.shape, nodes.shape[0]
    _launch("cauchy_backward", 32 * H * N, v, dr=dr, v=v, w=w, nodes=nodes, H=H, V=V, N=N, K=K, dv=dv, dw=dw)
