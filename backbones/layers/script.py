"""TorchScript."""


def refuse_script(model):
    """What `torch.jit.script` meets: a model sets it as ``__prepare_scriptable__``.

    Raises:
        NotImplementedError: always, with what to use instead.
    """
    raise NotImplementedError(
        f"torch.jit.script({type(model).__name__}): TorchScript is deprecated and cannot compile the scans; "
        "use torch.export.export(model, (images,)), or torch.jit.trace"
    )
