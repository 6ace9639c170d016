"""What no operator takes: one ValueError or TypeError that names the argument, on every backend alike."""

import pytest
import torch

from linzoo.ops import causal_conv1d, fft_conv, gated_delta, mlstm, nc_ssd, self_check, ssd, use_backend, wkv6, wkv7


def normal(*shape):
    return torch.randn(shape)


def both(*shape):
    return dict(B=normal(*shape), C=normal(*shape))


def wkv_inputs(*names):
    return {name: normal(2, 5, 2, 3) for name in names}


CASES = {
    name: lambda example=example: example(normal) for name, example in self_check.EXAMPLES.items() if name != "wkv"
}
CASES |= {
    "wkv6": lambda: (wkv6, wkv_inputs("r", "k", "v", "w") | dict(u=normal(2, 3))),
    "wkv7": lambda: (wkv7, wkv_inputs("r", "w", "k", "v", "a", "b")),
    "fft_conv": lambda: (fft_conv, dict(u=normal(2, 5, 3), kernels=normal(3, 4))),
    "gated_delta": lambda: (
        gated_delta,
        wkv_inputs("q", "k", "v") | dict(g=normal(2, 5, 2), beta=normal(2, 5, 2), initial=normal(2, 2, 3, 3)),
    ),
    "mlstm": lambda: (mlstm, wkv_inputs("q", "k", "v") | dict(i=normal(2, 5, 2), f=normal(2, 5, 2))),
    "ssd": lambda: (
        ssd,
        dict(x=normal(2, 5, 2, 3), dt=normal(2, 5, 2), A=normal(2), B=normal(2, 5, 1, 4), C=normal(2, 5, 1, 4)),
    ),
    "nc_ssd": lambda: (
        nc_ssd,
        dict(x=normal(2, 5, 2, 3), weight=normal(2, 5, 2), B=normal(2, 5, 4), C=normal(2, 5, 4)),
    ),
}
NO_TENSOR = {
    "integer": (lambda x: x.long(), TypeError, "int64"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, "complex64"),
    "bool": (lambda x: x > 0, TypeError, "bool"),
    "list": (lambda x: x.tolist(), TypeError, "list"),
    "device": (lambda x: x.to("meta"), ValueError, "cpu.*meta|meta.*cpu"),
    "rank": (lambda x: x.unsqueeze(0).unsqueeze(0).unsqueeze(0), ValueError, r"got \("),
}
# Any rank will do; or the example itself asks the argument for its device.
NOT_BAD = {("rational", "x", "rank"), ("selective_scan", "u", "list"), ("causal_conv1d", "x", "list")}


@pytest.mark.parametrize("backend", (None, "reference", "export"))
@pytest.mark.parametrize("kind", NO_TENSOR)
@pytest.mark.parametrize("name", CASES)
def test_is_refused(name, kind, backend):
    change, error, said = NO_TENSOR[kind]
    run, inputs = CASES[name]()
    for argument, x in inputs.items():
        if (name, argument, kind) in NOT_BAD:
            continue
        with use_backend(backend), pytest.raises(error, match=said) as raised:
            run(**{**inputs, argument: change(x)})
        message = str(raised.value)
        # where the first tensor alone is elsewhere, the next one is named
        assert message.startswith(f"{argument}:") or kind in ("device", "rank"), message
        assert "\n" not in message


def test_order_must_be_integers():
    with pytest.raises(TypeError, match="order: expected int32 or int64, got torch.float32"):
        causal_conv1d(normal(1, 4, 1, 3), normal(1, 3, 2), order=torch.zeros(1, 4))
