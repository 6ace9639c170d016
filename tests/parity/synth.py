"""Synthetic checkpoints and inputs: every value follows from a name and a shape.

Uses NumPy's frozen legacy `RandomState` stream, whose values are the same on every platform and in every version.
"""

import zlib

import numpy as np

SKIPS = ("d", "ds", "skip_scale", "skip_scale2", "d_b")
STEP_BIASES = ("dt_bias", "dt_projs_bias", "dt_proj.bias", "dt_proj_b.bias")


def _stream(text):
    return np.random.RandomState(zlib.crc32(text.encode()))


def tensor(key, shape):
    """The float32 value of the parameter or buffer `key`: of a size at which every part of a network matters."""
    stream = _stream(key)
    normal = stream.standard_normal(size=shape).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1].lower()
    if leaf == "running_mean":
        value = 0.1 * normal
    elif leaf == "running_var":
        value = np.exp(0.2 * normal)
    elif "a_log" in leaf:  # rates between 0.5 and 8
        value = np.log(0.5 + 7.5 * stream.uniform(size=shape))
    elif leaf in SKIPS:
        value = 1.0 + 0.1 * normal
    elif leaf in STEP_BIASES or key.endswith(STEP_BIASES[2:]):  # steps between 0.007 and 0.3
        value = stream.uniform(-5.0, -1.0, size=shape)
    elif len(shape) <= 1:
        value = 1.0 + 0.1 * normal if leaf == "weight" else 0.1 * normal
    else:
        value = normal / np.sqrt(max(float(np.prod(shape[1:])), 1.0))
    return np.asarray(value, np.float32)


def state_dict(case):
    """`{key: array}` under the authors' names.

    The last column of a row of `case["state_dict"]` says how it is filled: `synth`, `scaled:<factor>`, or `zero` for
    integer counters.
    """
    state = {}
    for key, shape, _, how in case["state_dict"]:
        kind, _, factor = how.partition(":")
        if kind == "zero":
            state[key] = np.zeros(shape, np.int64)
        elif kind in ("synth", "scaled"):
            state[key] = tensor(key, shape) * np.float32(factor or 1)
        else:
            raise ValueError(f"{case['name']}: unknown fill {how!r} for {key}")
    return state


def image(shape, seed):
    """Standard-normal float32 input of `shape` from `seed`, a string."""
    return _stream("input/" + seed).standard_normal(size=shape).astype(np.float32)
