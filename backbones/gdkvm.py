"""GDKVM.

Paper: GDKVM: Echocardiography Video Segmentation via Spatiotemporal Key-Value Memory with Gated Delta Rule (ICCV 2025)
- https://arxiv.org/abs/2512.10252

It takes clips and returns a mask per frame. Each object has a memory of 64 keys and 256 values. Once per frame, a gated
delta rule updates it with all pixels of the frame; then the frame's keys read it. The cost is linear in pixels and in
frames, and only the state is carried along. The other parts come from Cutie (https://arxiv.org/abs/2310.12982): a mask
encoder, a sensory memory, object queries and a decoder.

Maps are (B, C, H, W); with N objects, these are folded into the batch, (B N, C, H, W).
"""

import math
from typing import Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers.checkpoint import rename, unwrap_state_dict
from .layers.script import refuse_script

__all__ = ["GDKVM", "ClipState", "delta_memory"]

Decay = Literal["published", "grouped", "exp"]
KEYS, HEADS, QUERIES = 64, 8, 16


class ClipState(NamedTuple):
    """The state carried from frame to frame, of constant size.

    Attributes:
        memory: Values under keys ``(B, N, 64, 256)``.
        sensory: Sensory memory ``(B N, 256, H / 16, W / 16)``.
        objects: Sums of the objects' features, and of their weights ``(B N, 16, 257)``.
        mask: Masks of the last frame ``(B, N, H, W)``, in [0, 1].
        pixels: Features of the last frame ``(B, 256, H / 16, W / 16)``.
    """

    memory: Tensor
    sensory: Tensor
    objects: Tensor
    mask: Tensor
    pixels: Tensor


def delta_memory(memory: Tensor, keys: Tensor, values: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule with all pixels of a frame at once (section 3.2)::

        S' = decay (S - beta (sum_p k_p k_p^T) S) + beta sum_p k_p v_p^T

    elementwise in decay and beta. `linzoo.ops.gated_delta` is the rule for one token after the other.

    Args:
        memory: S ``(B, N, K, V)``.
        keys: ``(B, P, K)`` for P pixels.
        values: ``(B, N, P, V)``.
        decay, beta: ``(B, N, K, V)``.

    Returns:
        S' ``(B, N, K, V)``.
    """
    keys = keys.unsqueeze(1)
    held = keys.mT @ (keys @ memory)
    return decay * (memory - beta * held) + beta * (keys.mT @ values)


class CARes(nn.Module):
    """``x + y sigmoid(gate(mean y))`` with ``y = conv(ReLU(conv(ReLU(x))))``; the gate convolves along channels."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.gate = nn.Conv1d(1, 1, 5, padding=2, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + y * self.gate(y.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[..., None, None]


class Fuser(nn.Module):
    """Features of the frame ``(B, C, h, w)`` and of its N objects ``(B N, C, h, w)``, to ``(B N, C, h, w)``."""

    def __init__(self, dim: int, dim_objects: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.pixels = nn.Conv2d(dim, dim, 1, **dd)
        self.objects = nn.Conv2d(dim_objects, dim, 1, **dd)
        self.layers = nn.Sequential(CARes(dim, **dd), CARes(dim, **dd))

    def forward(self, pixels: Tensor, objects: Tensor) -> Tensor:
        count = len(objects) // len(pixels)
        return self.layers(self.pixels(pixels).repeat_interleave(count, 0) + self.objects(objects))


class SensoryGRU(nn.Conv2d):
    """``[f, u, n] = conv([x, h]);  sigmoid(f) h (1 - sigmoid(u)) + sigmoid(u) tanh(n)`` of maps x and states h."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(2 * dim, 3 * dim, 3, padding=1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f, u, n = super().forward(torch.cat([x, h], 1)).chunk(3, 1)
        return f.sigmoid() * h * (1 - u.sigmoid()) + u.sigmoid() * n.tanh()


def _resnet(name: str, in_chans: int, levels: tuple[int, ...], device, dtype) -> nn.Module:
    """A timm ResNet up to its third stage, with the maps of `levels`."""
    options = dict(in_chans=in_chans, features_only=True, out_indices=levels)
    return timm.create_model(name, **options, device=device, dtype=dtype)


class MaskEncoder(nn.Module):
    """Images and masks of N objects to their values ``(B N, 256, h, w)``, fused with the frame's features."""

    def __init__(self, dim: int, trunk: str, device=None, dtype=None):
        super().__init__()
        self.trunk = _resnet(trunk, 3, (3,), device, dtype)
        self.fuser = Fuser(dim, self.trunk.feature_info.channels()[0], device=device, dtype=dtype)
        self.gru = SensoryGRU(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor, pixels: Tensor, mask: Tensor, sensory: Tensor) -> tuple[Tensor, Tensor]:
        planes = torch.stack([image.expand_as(mask), mask, others(mask)], 2).flatten(0, 1)
        values = self.fuser(pixels, self.trunk(planes)[0])
        return values, self.gru(values, sensory)


def others(mask: Tensor) -> Tensor:
    """For each object's mask ``(B, N, H, W)``, the mask of all other objects."""
    return (mask.sum(1, keepdim=True) - mask).clamp(0, 1)


def aggregate(p: Tensor) -> Tensor:
    """Probabilities of N objects ``(B, N, ...)`` to logits of background and objects ``(B, 1 + N, ...)``."""
    p = torch.cat([(1 - p).prod(1, keepdim=True), p], 1).clamp(1e-7, 1 - 1e-7)
    return torch.log(p / (1 - p))


def positions(h: int, w: int, dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of columns, then of rows ``(h w, dim)``, as wide as `dim`."""
    half = dim // 2
    rates = 128.0 ** (-torch.arange(0, half, 2, device=like.device, dtype=like.dtype) / half)

    def encode(n: int) -> Tensor:
        at = torch.arange(n, device=like.device, dtype=like.dtype)
        angles = (at / (n - 1 + 1e-6) * 32)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    columns, rows = encode(w).expand(h, w, half), encode(h)[:, None].expand(h, w, half)
    return torch.cat([columns, rows], -1).flatten(0, 1)


def _mlp(dim: int, out: int, **dd) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, out, **dd))


class Summariser(nn.Module):
    """Values and a mask to sums ``(B N, 16, C + 1)``: half of the 16 over the object, half over the rest."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.input_proj = nn.Linear(dim, dim, **dd)
        self.features = _mlp(dim, dim, **dd)
        self.weights = _mlp(dim, QUERIES, **dd)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        h, w = values.shape[2:]
        inside = F.interpolate(mask, (h, w), mode="area").flatten(0, 1).flatten(1).unsqueeze(-1)
        inside = torch.cat([inside, 1 - inside], -1).repeat_interleave(QUERIES // 2, -1)  # (B N, h w, 16)
        x = self.input_proj(values.flatten(2).mT) + positions(h, w, values.shape[1], values)
        weights = self.weights(x).sigmoid() * inside
        return torch.cat([weights.mT @ self.features(x), weights.sum(1).unsqueeze(-1)], -1)


class QueryBlock(nn.Module):
    """Queries read the pixels that their masks allow, then each other; then the pixels read the queries."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, **dd) for _ in range(3))
        self.read_pixels, self.self_attn, self.read_queries = (
            nn.MultiheadAttention(dim, HEADS, batch_first=True, **dd) for _ in range(3)
        )
        self.ffn = nn.Sequential(nn.Linear(dim, 8 * dim, **dd), nn.ReLU(), nn.Linear(8 * dim, dim, **dd))
        self.pixel_ffn = CARes(dim, **dd)

    def forward(self, x: Tensor, at: Tensor, pixels: Tensor, where: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries x at ``(B N, 16, C)`` and pixels where ``(B N, C, h, w)``; `hidden` marks pixels not to be read."""
        flat, where = pixels.flatten(2).mT, where.flatten(2).mT
        x = self.norm1(x)
        x = x + self.read_pixels(x + at, flat + where, flat, attn_mask=hidden, need_weights=False)[0]
        x = self.norm2(x)
        x = x + self.self_attn(x + at, x + at, x, need_weights=False)[0]
        x = x + self.ffn(self.norm3(x))
        flat = flat + self.read_queries(flat + where, x + at, x, need_weights=False)[0]
        return x, self.pixel_ffn(flat.mT.unflatten(2, pixels.shape[2:]))


class QueryTransformer(nn.Module):
    """Object queries, initialised from the sums of the object's features, refine the map read from memory."""

    def __init__(self, dim: int, depth: int = 3, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.query_init, self.query_emb = (nn.Embedding(QUERIES, dim, **dd) for _ in range(2))
        self.summary_init, self.summary_emb = (nn.Linear(dim, dim, **dd) for _ in range(2))
        self.pixel_init, self.pixel_emb = (nn.Conv2d(dim, dim, 1, **dd) for _ in range(2))
        self.blocks = nn.ModuleList(QueryBlock(dim, **dd) for _ in range(depth))
        self.mask_pred = nn.ModuleList(nn.Conv2d(dim, 1, 1, **dd) for _ in range(depth + 1))

    def hidden(self, logits: Tensor) -> Tensor:
        """From logits ``(B, 1 + N, h, w)``, the pixels that queries may not read ``(B N heads, 16, h w)``."""
        foreground = (logits[:, 1:] == logits.amax(1, keepdim=True)).flatten(0, 1).flatten(1)
        hidden = torch.stack([~foreground, foreground], 1)
        hidden = hidden & ~hidden.all(2, keepdim=True)  # a query that would see nothing sees all
        return hidden.repeat_interleave(QUERIES // 2, 1).repeat_interleave(HEADS, 0)

    def forward(self, readout: Tensor, objects: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Map ``(B N, C, h, w)`` and sums ``(B N, 16, C + 1)`` to the map and logits ``(B, 1 + N, levels, h, w)``."""
        h, w = readout.shape[2:]
        summary = objects[..., :-1] / (objects[..., -1:] + 1e-4)
        x, at = self.query_init.weight + self.summary_init(summary), self.query_emb.weight + self.summary_emb(summary)
        pixels = self.pixel_init(readout)
        where = positions(h, w, readout.shape[1], readout).mT.unflatten(1, (h, w)) + self.pixel_emb(readout)
        levels = []
        for i, predict in enumerate(self.mask_pred):
            found = predict(F.relu(pixels)).sigmoid().unflatten(0, (-1, count)).squeeze(2)
            levels.append(aggregate(found))
            if i < len(self.blocks):
                x, pixels = self.blocks[i](x, at, pixels, where, self.hidden(levels[-1]))
        return pixels, torch.stack(levels, 2)


class UpBlock(nn.Module):
    """Twice the size, a skip added, and ``proj(x) + GELU(conv(GELU(conv(x))))``."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, **dd)
        self.proj = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1, **dd)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        large = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = large + skip.repeat_interleave(len(x) // len(skip), 0)
        return self.proj(x) + F.gelu(self.conv2(F.gelu(self.conv1(x))))


class Decoder(nn.Module):
    """A map at 1/16 of the size and skips at 1/8 and 1/4, to logits at 1/4 and the sensory memory."""

    def __init__(self, skips: tuple[int, int], dims: tuple[int, int, int], device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.skip8 = nn.Conv2d(skips[1], dims[0], 1, **dd)
        self.skip4 = nn.Conv2d(skips[0], dims[1], 1, **dd)
        self.up8 = UpBlock(dims[0], dims[1], **dd)
        self.up4 = UpBlock(dims[1], dims[2], **dd)
        self.pred = nn.Conv2d(dims[2], 1, 1, **dd)
        self.gather16 = nn.Conv2d(dims[0], dims[0], 1, **dd)
        self.gather8 = nn.Conv2d(dims[1], dims[0], 1, **dd)
        self.gather4 = nn.Conv2d(dims[2] + 1, dims[0], 1, **dd)
        self.gru = SensoryGRU(dims[0], **dd)

    def forward(self, x: Tensor, f8: Tensor, f4: Tensor, sensory: Tensor) -> tuple[Tensor, Tensor]:
        v8 = self.up8(x, self.skip8(f8))
        v4 = self.up4(v8, self.skip4(f4))
        logit = self.pred(v4)
        gathered = self.gather16(x) + self.gather8(F.avg_pool2d(v8, 2))
        gathered = gathered + self.gather4(F.avg_pool2d(torch.cat([v4, logit], 1), 4))
        return logit, self.gru(gathered, sensory)


class GDKVM(nn.Module):
    """GDKVM (arXiv 2512.10252), for clips of any length.

    Args:
        encoder, mask_encoder: timm names of the ResNets that read frames, and frames with masks.
        decoder_dims: Channels of the decoder at 1/16, 1/8 and 1/4 of the size. The first number is also that of the
            values, a multiple of 32.
        decay: How the memory decays, with ``a = -exp(A_log) softplus(W_a S + dt_bias)``. "published", as in the first
            release: by a itself, which is negative, and the heads of a and of beta are spread over the channels in
            different ways. "grouped": by a, both spread alike. "exp", as in the paper and the authors' last release:
            by ``exp(a)`` in (0, 1).
        in_chans: Channels of the frames.

    Raises:
        ValueError: unknown decay, or numbers of channels that do not fit.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        encoder: str = "resnet50",
        mask_encoder: str = "resnet18",
        decoder_dims: tuple[int, int, int] = (256, 128, 128),
        decay: Decay = "published",
        in_chans: int = 1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if decay not in ("published", "grouped", "exp"):
            raise ValueError(f"decay: expected 'published', 'grouped' or 'exp', got {decay!r}")
        dim = decoder_dims[0]
        if dim % (4 * HEADS):
            raise ValueError(f"decoder_dims: expected a multiple of {4 * HEADS} first, got {decoder_dims}")
        self.decay, self.in_chans, self.num_classes, self.reduction = decay, in_chans, 1, 16
        self.image_encoder = _resnet(encoder, in_chans, (1, 2, 3), device, dtype)
        f4, f8, f16 = self.image_encoder.feature_info.channels()
        self.num_features = self.head_hidden_size = f16
        self.feature_info = [dict(num_chs=n, reduction=r, module="") for n, r in ((f4, 4), (f8, 8), (f16, 16))]
        self.pixel_proj = nn.Conv2d(f16, dim, 1, **dd)
        self.key_proj = nn.Sequential(nn.Conv2d(f16, 256, 1, **dd), nn.Conv2d(256, KEYS, 3, padding=1, **dd))
        self.key_pixels = nn.Sequential(
            nn.Conv2d(dim, dim, 1, **dd), nn.ReLU(), nn.Conv2d(dim, KEYS, 3, padding=1, **dd)
        )
        self.key_gate = nn.Conv2d(KEYS, 1, 1, **dd)
        self.mask_encoder = MaskEncoder(dim, mask_encoder, **dd)
        self.summariser = Summariser(dim, **dd)
        self.A_log = nn.Parameter(torch.empty(HEADS, **dd))
        self.dt_bias = nn.Parameter(torch.empty(HEADS, **dd))
        self.a_proj = nn.Linear(dim, HEADS, bias=False, **dd)
        self.b_proj = nn.Linear(dim, HEADS, bias=False, **dd)
        self.fuse_proj = nn.Conv2d(dim + 2, dim, 1, **dd)
        self.fuser = Fuser(dim, dim, **dd)
        self.transformer = QueryTransformer(dim, **dd)
        self.decoder = Decoder((f4, f8), decoder_dims, **dd)
        self.sensory_pred = nn.Conv2d(dim, dim + 1, 1, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        if needs_reset:
            for module in self.modules():
                if module is not self and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif isinstance(module, nn.MultiheadAttention):
                    module._reset_parameters()
        with torch.no_grad():
            self.A_log.uniform_(0, 16).clamp_(min=1e-6).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings and the decays' parameters."""
        return {"A_log", "dt_bias", "transformer.query_init.weight", "transformer.query_emb.weight"}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The convolution that outputs the logits."""
        return self.decoder.pred

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames ``(B, C, H, W)``, white at 1, to skips at 1/4 and 1/8, features, and keys before their softmax."""
        f4, f8, f16 = self.image_encoder((frames - 0.5) / 0.5)
        pixels, key = self.pixel_proj(f16), self.key_proj(f16)
        key = key + key.mean((2, 3), keepdim=True)
        gate = self.key_gate(key).sigmoid()
        return f4, f8, pixels, key * gate + self.key_pixels(pixels) * (1 - gate)

    def gates(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and beta of a memory ``(B, N, 64, 256)``, in its shape."""
        width = memory.shape[-1] // HEADS
        beta = self.b_proj(memory).sigmoid().repeat_interleave(width, -1)
        a = -self.A_log.exp() * F.softplus(self.a_proj(memory) + self.dt_bias)
        if self.decay == "published":
            return a.repeat(1, 1, 1, width), beta
        return (a.exp() if self.decay == "exp" else a).repeat_interleave(width, -1), beta

    def step(
        self, frame: Tensor, encoded: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor, state: ClipState | None
    ) -> tuple[ClipState, dict[str, Tensor]]:
        """Processes one frame.

        Args:
            frame: ``(B, C, H, W)``, white at 1.
            encoded: The output of `encode` for it.
            mask: The masks before it ``(B, N, H, W)``. For a first frame, its own masks if they are known, else 0.
            state: The state before it; None for a first frame.

        Returns:
            The state after it, "logits" ``(B, 1 + N, H, W)`` of background and objects, and the logits of auxiliary
            losses at 1/16 of the size, "sensory_logits" ``(B, 1 + N, h, w)`` and "q_logits" ``(B, 1 + N, 4, h, w)``.
        """
        f4, f8, pixels, key = encoded
        (B, N), (h, w) = mask.shape[:2], pixels.shape[2:]
        first = state is None
        sensory = torch.zeros_like(pixels).repeat_interleave(N, 0) if first else state.sensory
        grey = (frame.mean(1, keepdim=True) - 0.5) / 0.5
        values, sensory = self.mask_encoder(grey, pixels if first else state.pixels, mask, sensory)
        seen = self.summariser(values, mask)
        keys = key.flatten(2).mT.softmax(-1)  # (B, h w, 64)
        values = values.flatten(2).mT.unflatten(0, (B, N))
        if first:
            memory = keys.mT.unsqueeze(1) @ values
            objects = seen
        else:
            memory = delta_memory(state.memory, keys, values, *self.gates(state.memory))
            objects = state.objects
        readout = (keys.unsqueeze(1) @ memory).mT.flatten(0, 1).unflatten(2, (h, w))

        small = F.interpolate(mask, (h, w), mode="area")
        planes = torch.stack([small, others(small)], 2).flatten(0, 1)
        fused = self.fuser(pixels, readout + self.fuse_proj(torch.cat([sensory, planes], 1)))
        fused, q_logits = self.transformer(fused, objects, N)
        logit, sensory = self.decoder(fused, f8, f4, sensory)
        weights = self.sensory_pred(sensory).unflatten(0, (B, N))
        by_sensory = (pixels.unsqueeze(1) * weights[:, :, :-1]).sum(2) + weights[:, :, -1]

        logits = aggregate(logit.sigmoid().unflatten(0, (B, N)).squeeze(2))
        logits = F.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False)
        objects = seen if first else objects + seen
        state = ClipState(memory, sensory, objects, logits.softmax(1)[:, 1:], pixels)
        found = {"logits": logits, "sensory_logits": aggregate(by_sensory.sigmoid()), "q_logits": q_logits}
        return state, found

    def run(
        self, frames: Tensor, mask: Tensor | None = None, state: ClipState | None = None
    ) -> tuple[list[dict[str, Tensor]], ClipState]:
        """As `forward`, with all outputs of `step` for each frame.

        Raises:
            ValueError: the number of axes or channels is wrong, sides are not multiples of 16, or masks do not fit.
        """
        if frames.dim() != 5 or frames.shape[2] != self.in_chans or frames.shape[1] == 0:
            raise ValueError(f"frames: expected (B, T, {self.in_chans}, H, W), got {tuple(frames.shape)}")
        B, T, _, H, W = frames.shape
        if H % 16 or W % 16:
            raise ValueError(f"frames: expected sides that are multiples of 16, got {H} x {W}")
        if mask is not None and (mask.dim() != 4 or (len(mask), *mask.shape[2:]) != (B, H, W)):
            raise ValueError(f"mask: expected (B, N, H, W) = ({B}, N, {H}, {W}), got {tuple(mask.shape)}")
        encoded = [part.unflatten(0, (B, T)) for part in self.encode(frames.flatten(0, 1))]
        results = []
        for t in range(T):
            before = state.mask if state is not None else frames.new_zeros(B, 1, H, W) if mask is None else mask
            state, found = self.step(frames[:, t], tuple(part[:, t] for part in encoded), before, state)
            results.append(found)
        assert state is not None
        return results, state

    def forward(
        self, frames: Tensor, mask: Tensor | None = None, state: ClipState | None = None
    ) -> tuple[Tensor, ClipState]:
        """Clips to masks.

        Args:
            frames: ``(B, T, C, H, W)``, white at 1; sides are multiples of 16.
            mask: Masks of the first frame ``(B, N, H, W)`` in [0, 1]; None if they are not known. The authors' models,
                with one object, never see one.
            state: The state from an earlier call with the frames before these; `mask` is then ignored.

        Returns:
            Logits of background and objects ``(B, T, 1 + N, H, W)``, and the state.

        Raises:
            ValueError: see `run`.
        """
        results, state = self.run(frames, mask, state)
        return torch.stack([found["logits"] for found in results], 1), state


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^(?:module|model)\.", ""),
    (r"^mask_encoder\.(conv1|bn1|layer\d)\.", r"mask_encoder.trunk.\1."),
    (r"\.x_transform\.", ".pixels."),
    (r"\.y_transform\.", ".objects."),
    (r"fuser\.layer1\.", "fuser.layers.0."),
    (r"fuser\.layer2\.", "fuser.layers.1."),
    (r"^(.*fuser\.layers\.\d|.*pixel_ffn\.conv)\.conv\.", r"\1.gate."),
    (r"\.sensory_updater\.transform\.", ".gru."),
    (r"^key_projector\.layer1\.", "key_proj.0."),
    (r"^key_projector\.layer2\.", "key_proj.1."),
    (r"^pix_projector\.layer\.", "pixel_proj."),
    (r"^KPFF\.layer1\.", "key_pixels.0."),
    (r"^KPFF\.layer2\.", "key_pixels.2."),
    (r"^KPFF\.gate_layer\.", "key_gate."),
    (r"^pixel_fuser\.conv\.", "fuse_proj."),
    (r"^pixel_fuser\.fuser\.", "fuser."),
    (r"^object_summarizer\.feature_pred\.", "summariser.features."),
    (r"^object_summarizer\.weights_pred\.", "summariser.weights."),
    (r"^object_summarizer\.", "summariser."),
    (r"^object_transformer\.", "transformer."),
    (r"\.summary_to_query_(init|emb)\.", r".summary_\1."),
    (r"\.pixel_(init|emb)_proj\.", r".pixel_\1."),
    (r"\.mask_pred\.(\d)\.1\.", r".mask_pred.\1."),
    (r"\.read_from_pixel\.cross_attn\.", ".read_pixels."),
    (r"\.read_from_pixel\.norm\.", ".norm1."),
    (r"\.read_from_query\.cross_attn\.", ".read_queries."),
    (r"\.self_attn\.norm\.", ".norm2."),
    (r"\.self_attn\.self_attn\.", ".self_attn."),
    (r"\.ffn\.linear1\.", ".ffn.0."),
    (r"\.ffn\.linear2\.", ".ffn.2."),
    (r"\.ffn\.norm\.", ".norm3."),
    (r"\.pixel_ffn\.conv\.", ".pixel_ffn."),
    (r"^mask_decoder\.linear_proj_f(\d)\.", r"decoder.skip\1."),
    (r"^mask_decoder\.upsample_16_to_8\.", "decoder.up8."),
    (r"^mask_decoder\.upsample_8_to_4\.", "decoder.up4."),
    (r"\.linear_proj\.", ".proj."),
    (r"^mask_decoder\.sensory_updater\.g(\d+)_conv\.", r"decoder.gather\1."),
    (r"^mask_decoder\.", "decoder."),
    (r"^aux_computer\.sensory_aux\.projection\.", "sensory_pred."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: GDKVM) -> dict[str, Tensor]:
    """Converts the published state dict, bare or from the trainer, to ours; positions are computed."""
    state_dict = state_dict.get("weights", state_dict)  # pyright: ignore[reportAssignmentType]
    state_dict = unwrap_state_dict(state_dict)
    if "pixel_proj.weight" in state_dict:
        return state_dict
    return {rename(key, _RENAMES): x for key, x in state_dict.items() if not key.endswith(".inv_freq")}


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1,
        "input_size": (1, 256, 256),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": ("image_encoder.conv1",),
        "classifier": "decoder.pred",
        "paper_ids": "arXiv:2512.10252",
        "origin_url": "https://github.com/wangrui2025/GDKVM",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"gdkvm": _cfg(), "gdkvm_small_r18": _cfg()})


def _create_gdkvm(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        GDKVM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # the masks give the number of objects
        **kwargs,
    )


@register_model
def gdkvm(pretrained: bool = False, **kwargs) -> GDKVM:
    """GDKVM as published: a ResNet-50 reads the frames."""
    return _create_gdkvm("gdkvm", pretrained, **kwargs)


@register_model
def gdkvm_small_r18(pretrained: bool = False, **kwargs) -> GDKVM:
    """GDKVM with ResNet-18 and a narrower decoder."""
    small = dict(encoder="resnet18", decoder_dims=(256, 128, 64))
    return _create_gdkvm("gdkvm_small_r18", pretrained, **dict(small, **kwargs))
