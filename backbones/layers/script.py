"""TorchScript."""


def refuse_script(model):
    """Refuses `torch.jit.script`: a model sets it as ``__prepare_scriptable__``.

    Raises:
        NotImplementedError: always; the message says what to use instead.
    """
    raise NotImplementedError(
        f"torch.jit.script({type(model).__name__}): TorchScript is deprecated and cannot compile the scans; "
        "use torch.export.export(model, (images,)), or torch.jit.trace"
    )
