"""LinFusion: generalised linear attention instead of a diffusion UNet's self-attention.

Paper: LinFusion: 1 GPU, 1 Minute, 16K Image - https://arxiv.org/abs/2409.02097

It plugs into a diffusers UNet as attention processors of its `attn1` modules. Cross-attention, LoRA on it, ControlNets
and IP-Adapters stay as they are. Time and memory grow linearly with the number of tokens. Only these layers are
trained, by distillation from the UNet that they are installed in::

    unet = UNet2DConditionModel.from_pretrained(...)
    install(unet, "LinFusion-1-5")           # a folder with the authors' weights
    student = student_of(unet)               # or your own, to train with `distillation_losses`
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = [
    "LinearAttention",
    "distillation_losses",
    "freeze_all_else",
    "install",
    "linear_attention",
    "save",
    "self_attentions",
    "state_of",
    "student_of",
    "training_target",
]

EPS = 1e-4  # in the denominator, a mean over tokens: its weight does not depend on their number
CHUNK = 4096  # tokens at once: intermediate memory does not grow with the sequence
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
FILE = "diffusion_pytorch_model.safetensors"


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised attention without softmax (section 3.2), in time linear in L.

    ``y_i = q_i^T (1/L sum_j k_j v_j^T) / (q_i . (1/L sum_j k_j) + 1e-4)``, with L the number of queries. Half of the
    factor 1/L goes to k and half to v, which keeps the sums in float16's range.

    Args:
        q: Queries ``(..., L, E)``, positive.
        k: Keys ``(..., M, E)``, positive.
        v: Values ``(..., M, P)``.

    Returns:
        ``(..., L, P)``.
    """
    return _answer(q, _state(k, v, q.shape[-2]))


def _state(k: Tensor, v: Tensor, length: int) -> Tensor:
    """``1 / length sum_j k_j [v_j, 1]^T``, ``(..., E, P + 1)``."""
    k, half = k * length**-0.5, length**-0.5
    return torch.cat([k.mT @ (v * half), half * k.sum(-2).unsqueeze(-1)], -1)


def _answer(q: Tensor, state: Tensor) -> Tensor:
    y, weight = (q @ state).split([state.shape[-1] - 1, 1], -1)
    return y / (weight + EPS)


def _branch(dim: int, mid: int | None) -> nn.Module:
    if mid is None:
        return nn.Identity()
    return nn.Sequential(nn.Linear(dim, mid), nn.LayerNorm(mid), nn.LeakyReLU(), nn.Linear(mid, dim))


class LinearAttention(nn.Module):
    """An attention processor for diffusers: `linear_attention` with feature maps that depend on the token.

    ``q = phi(W_q (x + f_q(x)));  k = phi(W_k (x + f_k(x)));  v = W_v x;  W_o y`` with ``phi = 1 + elu`` and
    ``f(x) = W_2 LeakyReLU(LN(W_1 x))``. W_q, W_k, W_v and W_o belong to the attention module. Its masks, group norms,
    residuals and scales are ignored; there is no factor ``1 / sqrt(E)``.

    Args:
        dim: Channels.
        mid: Hidden width of f; None for ``f(x) = x``.
    """

    def __init__(self, dim: int, mid: int | None = None):
        super().__init__()
        self.to_q_, self.to_k_ = _branch(dim, mid), _branch(dim, mid)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Tokens ``(B, L, dim)`` to the same shape and dtype; `attn` is the attention module of diffusers."""
        x, source = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        length = x.shape[1]

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def state(part: Tensor) -> Tensor:
            k, v = attn.to_k(part + self.to_k_(part)), attn.to_v(part)
            return _state(heads(1 + F.elu(k)), heads(v), length)

        def answer(part: Tensor, state: Tensor) -> Tensor:
            q = attn.to_q(part + self.to_q_(part))
            y = _answer(heads(1 + F.elu(q)), state).transpose(1, 2).flatten(2)
            for layer in attn.to_out:  # the projection and a dropout
                y = layer(y)
            return y.to(x.dtype)

        written = sum(state(part) for part in source.split(CHUNK, 1))
        return torch.cat([answer(part, written) for part in x.split(CHUNK, 1)], 1)


def self_attentions(unet: nn.Module) -> dict[str, Any]:
    """The self-attentions of a UNet by name, in the order in which the authors number them.

    ValueError if `unet` is not a diffusers UNet, or has none.
    """
    if not hasattr(unet, "set_attn_processor"):
        raise ValueError(f"unet: expected a UNet of diffusers, got {type(unet).__name__}")
    found = {name: m for name, m in unet.named_modules() if "attn1" in name and hasattr(m, "set_processor")}
    if not found:
        raise ValueError(f"unet: {type(unet).__name__} has no self-attention (attn1); expected one with transformers")
    return found


def install(
    unet: nn.Module, weights: str | Path | dict[str, Tensor] | None = None, *, reduction: int | None = 1, fresh=False
) -> nn.Module:
    """Puts `LinearAttention` into every self-attention of a UNet.

    Args:
        unet: A diffusers UNet, changed in place.
        weights: A folder with ``diffusion_pytorch_model.safetensors``, as published; such a file, or a PyTorch file; or
            a state dict. None for new feature maps. Names, where i counts `self_attentions`:
            ``{i}.to_{q,k,v}.weight``, ``{i}.to_out.0.{weight,bias}``, ``{i}.to_{q,k}_.{0,1,3}.{weight,bias}``.
        reduction: Channels of a layer over the hidden width of its feature maps, without `weights`: 1 for Stable
            Diffusion 1.5 and 2.1, 16 for SDXL; None for no feature map, ``f(x) = x``.
        fresh: Whether projections, too, start from random weights, as in the authors' training, instead of the UNet's.
            `weights` replace them in any case.

    Returns:
        `unet`.

    Raises:
        ValueError: `unet` is not a diffusers UNet, `reduction` is not positive, or the weights are another model's;
            `unet` is unchanged.
        FileNotFoundError: there is no such weights file.
    """
    attentions = self_attentions(unet)
    if reduction is not None and not (isinstance(reduction, int) and reduction > 0):
        raise ValueError(f"reduction: expected a positive integer or None, got {reduction!r}")
    state, source = (None, "") if weights is None else _read(weights)
    if state is not None:
        _check(state, attentions, source)
    processors = dict(unet.attn_processors)
    for i, (name, attn) in enumerate(attentions.items()):
        dim = attn.to_q.weight.shape[1]
        mid = None if reduction is None else max(dim // reduction, 1)
        if state is not None:
            first = state.get(f"{i}.to_q_.0.weight")
            mid = None if first is None else len(first)
        processors[f"{name}.processor"] = LinearAttention(dim, mid).to(attn.to_q.weight)
        if fresh:
            for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
                layer.reset_parameters()
    unet.set_attn_processor(processors)
    if state is not None:
        _copy(state, attentions)
    return unet


def state_of(unet: nn.Module) -> dict[str, Tensor]:
    """The trained parameters under the authors' names; ValueError if `install` was not called on `unet`."""
    state = {}
    for i, (name, attn) in enumerate(self_attentions(unet).items()):
        if not isinstance(attn.processor, LinearAttention):
            raise ValueError(f"unet: {name!r} has {type(attn.processor).__name__}; expected LinearAttention (install)")
        parts = {key: value for key, value in attn.state_dict().items() if key.startswith(PROJECTIONS)}
        state |= {f"{i}.{key}": value for key, value in (parts | attn.processor.state_dict()).items()}
    return state


def save(unet: nn.Module, folder: str | Path) -> None:
    """Writes the trained parameters as the authors do: ``config.json`` and a safetensors file."""
    state, folder = state_of(unet), Path(folder)
    modules = [
        dict(module_name=name, dim_n=attn.to_q.weight.shape[1], heads=attn.heads, projection_mid_dim=_mid(attn, -1))
        for name, attn in self_attentions(unet).items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": modules}, indent=2))


def _mid(attn: Any, none: int) -> int:
    branch = attn.processor.to_q_
    return len(branch[0].weight) if isinstance(branch, nn.Sequential) else none


def _read(weights: str | Path | dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    if isinstance(weights, dict):
        return weights, "weights"
    path, source = Path(weights), f"weights {str(weights)!r}"
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected a folder with {FILE}, or a file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as e:  # a damaged file may raise anything
        raise ValueError(f"{source}: cannot be read ({type(e).__name__}); expected safetensors or tensors alone") from e
    return state, source


def _check(state: dict[str, Tensor], attentions: dict[str, Any], source: str) -> None:
    """ValueError if the number of modules, a projection or a branch differs in a state dict."""
    numbers = {key.partition(".")[0] for key in state}
    if numbers != {str(i) for i in range(len(attentions))}:
        raise ValueError(
            f"{source}: {len(numbers)} modules, such as {min(numbers, default='')!r}; expected 0 to "
            f"{len(attentions) - 1}, one for each self-attention of the UNet"
        )
    for i, attn in enumerate(attentions.values()):
        parts = {key: x for key, x in attn.state_dict().items() if key.startswith(PROJECTIONS)}
        first = state.get(f"{i}.to_q_.0.weight")
        parts |= LinearAttention(attn.to_q.weight.shape[1], None if first is None else len(first)).state_dict()
        for key, value in parts.items():
            if f"{i}.{key}" not in state or state[f"{i}.{key}"].shape != value.shape:
                raise ValueError(_differs(source, f"{i}.{key}", state, tuple(value.shape)))
        known = {f"{i}.{key}" for key in parts}
        for key in state:
            if key.startswith(f"{i}.") and key not in known:
                raise ValueError(_differs(source, key, state, "absent"))


def _differs(source: str, key: str, state: dict[str, Tensor], expected: Any) -> str:
    return f"{source}: {key}: expected {expected}, got {tuple(state[key].shape) if key in state else 'absent'}"


def _copy(state: dict[str, Tensor], attentions: dict[str, Any]) -> None:
    for i, attn in enumerate(attentions.values()):
        part = {key.removeprefix(f"{i}."): value for key, value in state.items() if key.startswith(f"{i}.")}
        attn.processor.load_state_dict({key: x for key, x in part.items() if key.startswith(("to_q_.", "to_k_."))})
        attn.load_state_dict({key: x for key, x in part.items() if not key.startswith(("to_q_.", "to_k_."))}, False)


def student_of(teacher: nn.Module, **kwargs: Any) -> nn.Module:
    """A copy of a UNet after `install` (which gets `kwargs`), to train beside it.

    Parameters outside self-attentions are shared with the teacher, and get no gradient in either.
    """
    shared = {id(p): p for name, p in teacher.named_parameters() if ".attn1." not in name}
    return freeze_all_else(install(copy.deepcopy(teacher, shared), **kwargs))


def freeze_all_else(unet: nn.Module) -> nn.Module:
    """Keeps gradients only for self-attentions, which is what LinFusion trains."""
    unet.requires_grad_(False)
    for attn in self_attentions(unet).values():
        attn.requires_grad_(True)
    return unet


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a UNet must predict: the noise, or the velocity ``sqrt(a) noise - sqrt(1 - a) latents``.

    Args:
        scheduler: A diffusers DDPM scheduler, whose `prediction_type` says which.
        latents, noise: ``(B, C, H, W)``.
        timesteps: ``(B,)``.

    Raises:
        ValueError: the scheduler predicts something else.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"scheduler: prediction_type {kind!r}; expected 'epsilon' or 'v_prediction'")
    return noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)


@contextmanager
def _attention_outputs(unet: nn.Module) -> Iterator[list[Tensor]]:
    outputs, hooks = [], []
    for attn in self_attentions(unet).values():
        hooks.append(attn.register_forward_hook(lambda module, args, y: outputs.append(y)))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def distillation_losses(
    student: nn.Module,
    teacher: nn.Module,
    sample: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    target: Tensor,
    weights: tuple[float, float] = (0.5, 0.5),
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The losses of LinFusion's training (section 3.3), means of squares in float32.

    Args:
        student: A UNet with linear attention.
        teacher: The UNet with softmax attention to learn from; it gets no gradient.
        sample: Noisy latents ``(B, C, H, W)``.
        timesteps: ``(B,)``.
        encoder_hidden_states: The text's, ``(B, T, E)``.
        target: See `training_target`.
        weights: Of the two losses against the teacher.
        kwargs: Further arguments of both UNets, such as SDXL's `added_cond_kwargs`.

    Returns:
        "noise", the student's error; "output", its distance to the teacher; "attention", the mean distance of the
        self-attentions' outputs, each computed from its own model's inputs; and "loss", their weighted sum.
    """
    given = (sample, timesteps, encoder_hidden_states)
    with torch.no_grad(), _attention_outputs(teacher) as theirs:
        expected = teacher(*given, return_dict=False, **kwargs)[0]
    with _attention_outputs(student) as ours:
        found = student(*given, return_dict=False, **kwargs)[0]
    between = [F.mse_loss(x.float(), y.float()) for x, y in zip(ours, theirs, strict=True)]
    losses = {
        "noise": F.mse_loss(found.float(), target.float()),
        "output": F.mse_loss(found.float(), expected.float()),
        "attention": torch.stack(between).mean(),
    }
    return losses | {"loss": losses["noise"] + weights[0] * losses["output"] + weights[1] * losses["attention"]}
