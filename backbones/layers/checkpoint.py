"""Published checkpoint files."""

import re

import torch

# What VMamba's first files call things, and what its training code calls them; many families forked either.
VMAMBA_EARLY_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
]
# The training code's names of SS2D's parts, and ours.
SS2D_NAMES = [
    (r"\.op\.conv2d\.", ".mixer.conv."),
    (r"\.op\.x_proj_weight$", ".mixer.s6.x_proj"),
    (r"\.op\.dt_projs_weight$", ".mixer.s6.dt_weight"),
    (r"\.op\.dt_projs_bias$", ".mixer.s6.dt_bias"),
    (r"\.op\.A_logs$", ".mixer.s6.A_log"),
    (r"\.op\.Ds$", ".mixer.s6.D"),
    (r"\.op\.", ".mixer."),
]

# Mamba's own names of what runs along one direction, and ours.
MAMBA_NAMES = {
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "x_proj.weight": "s6.x_proj",
    "dt_proj.weight": "s6.dt_weight",
    "dt_proj.bias": "s6.dt_bias",
    "A_log": "s6.A_log",
    "D": "s6.D",
}


def stack_directions(state_dict):
    """Vim's published names as ours: the parameters of the backward direction (`_b`) stacked with the forward one's.

    A state dict in our names stays as it is.
    """
    if "norm_f.weight" not in state_dict:
        return dict(state_dict)
    out, directions = {}, {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", key)
        if match is None:
            out[key.replace("patch_embed.proj.", "patch_embed.").replace("norm_f.", "norm.")] = value
            continue
        block, name = f"blocks.{match[1]}.", match[2].removeprefix("mixer.").replace("A_b_log", "A_log_b")
        forward = re.sub(r"_b(?=\.|$)", "", name)
        if forward in MAMBA_NAMES:
            key = f"{block}mixer.{MAMBA_NAMES[forward]}"
            value = value.squeeze(1) if forward == "conv1d.weight" else value
            directions.setdefault(key, {})[name != forward] = value
        else:
            out[block + match[2]] = value
    return out | {key: torch.stack([both[False], both[True]]) for key, both in directions.items()}


def unwrap_state_dict(checkpoint) -> dict:
    """The state dict in a published training checkpoint: its averaged (EMA) weights where it has them."""
    for name in ("model_ema", "ema_model", "model", "state_dict"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name]
    return checkpoint


def rename(key, renames):
    """`key` after every (pattern, replacement) of `renames` in turn."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def reshape_as(state_dict, model):
    """Gives tensors the shape of `model`'s of that name if only that differs: flattened groups, 1x1 convolutions."""
    ours = model.state_dict()

    def fit(key, value):
        fits = key in ours and value.numel() == ours[key].numel()
        return value.reshape(ours[key].shape) if fits else value

    return {key: fit(key, value) for key, value in state_dict.items()}
