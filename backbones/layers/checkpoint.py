"""Published checkpoint files."""


def unwrap_state_dict(checkpoint):
    """The state dict in a published training checkpoint: its averaged (EMA) weights where it has them."""
    for name in ("model_ema", "ema_model", "model", "state_dict"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name]
    return checkpoint
