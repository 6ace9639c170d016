"""Published checkpoint files."""

import re

import torch

# Names in VMamba's first files, and in its training code; many families forked one or the other.
VMAMBA_EARLY_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
]
# The training code's names for parts of SS2D, and ours.
SS2D_NAMES = [
    (r"\.op\.conv2d\.", ".mixer.conv."),
    (r"\.op\.x_proj_weight$", ".mixer.s6.x_proj"),
    (r"\.op\.dt_projs_weight$", ".mixer.s6.dt_weight"),
    (r"\.op\.dt_projs_bias$", ".mixer.s6.dt_bias"),
    (r"\.op\.A_logs$", ".mixer.s6.A_log"),
    (r"\.op\.Ds$", ".mixer.s6.D"),
    (r"\.op\.", ".mixer."),
]

# Mamba's own names for what runs along one direction, and ours.
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
    """Vim's published names to ours: parameters of the backward direction (`_b`) are stacked with the forward ones.

    A state dict in our names is left unchanged.
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
    """The state dict in a published training checkpoint: its averaged (EMA) weights if it has them."""
    for name in ("model_ema", "ema_model", "model", "state_dict"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name]
    return checkpoint


def rename(key, renames):
    """`key` after each (pattern, replacement) of `renames` in turn."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def reshape_as(state_dict, model):
    """Reshapes tensors to `model`'s shapes if nothing else differs: flattened groups, 1x1 convolutions."""
    ours = model.state_dict()

    def fit(key, value):
        fits = key in ours and value.numel() == ours[key].numel()
        return value.reshape(ours[key].shape) if fits else value

    return {key: fit(key, value) for key, value in state_dict.items()}
