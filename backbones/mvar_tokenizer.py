"""The multi-scale VQ-VAE of VAR, as used by M-VAR.

Paper: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction -
https://arxiv.org/abs/2404.02905

Images (B, 3, H, W) in [-1, 1] become features f (B, C, H / 16, W / 16), then K maps of codes, coarse to fine::

    r = f;   i_k = the code nearest to r at side p_k;   h = refine_k(code at full size);   r = r - h;   f_hat += h

A decoder makes the image from f_hat.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers.checkpoint import rename, unwrap_state_dict
from .layers.script import refuse_script
from .mvar import SIDES, check_sides

__all__ = ["MVARTokenizer"]

MULTIPLIERS = (1, 1, 2, 2, 4)
REFINERS = 4
COMMITMENT = 0.25


def norm(dim: int, **dd) -> nn.GroupNorm:
    """Groups of 32."""
    return nn.GroupNorm(32, dim, eps=1e-6, **dd)


class ResBlock(nn.Module):
    """``x + conv(SiLU(norm(conv(SiLU(norm(x))))))``; x passes a 1 x 1 convolution if the widths differ."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1, self.conv1 = norm(dim, **dd), nn.Conv2d(dim, dim_out, 3, padding=1, **dd)
        self.norm2, self.conv2 = norm(dim_out, **dd), nn.Conv2d(dim_out, dim_out, 3, padding=1, **dd)
        self.shortcut = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """``x + W softmax(q k / sqrt(C)) v`` over the pixels of a map."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm, self.qkv, self.proj = norm(dim, **dd), nn.Conv2d(dim, 3 * dim, 1, **dd), nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.mT.unflatten(2, x.shape[2:]))


def middle(dim: int, **dd) -> nn.Sequential:
    """The layers at the lowest resolution."""
    return nn.Sequential(ResBlock(dim, dim, **dd), AttnBlock(dim, **dd), ResBlock(dim, dim, **dd))


class Level(nn.Module):
    """Residual blocks of one resolution, all followed by attention or none."""

    def __init__(self, dim: int, dim_out: int, count: int, attention: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(dim_out if i else dim, dim_out, **dd) for i in range(count))
        self.attn = nn.ModuleList(AttnBlock(dim_out, **dd) for _ in range(count if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class Encoder(nn.Module):
    """Images ``(B, in_chans, H, W)`` to ``(B, out, H / 16, W / 16)``; levels of `ch` times `multipliers` channels."""

    def __init__(
        self, ch: int, out: int, in_chans: int = 3, multipliers: Sequence[int] = MULTIPLIERS, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        dims = [ch * m for m in (1, *multipliers)]
        last = len(multipliers) - 1
        self.stem = nn.Conv2d(in_chans, ch, 3, padding=1, **dd)
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.levels = nn.ModuleList(Level(a, b, 2, i == last, **dd) for i, (a, b) in enumerate(pairs))
        self.down = nn.ModuleList(nn.Conv2d(b, b, 3, 2, **dd) for _, b in pairs[:-1])
        self.middle = middle(dims[-1], **dd)
        self.norm, self.head = norm(dims[-1], **dd), nn.Conv2d(dims[-1], out, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            x = self.down[i](F.pad(x, (0, 1, 0, 1))) if i < len(self.down) else x
        return self.head(F.silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """Features ``(B, C, h, w)`` to images ``(B, in_chans, 16 h, 16 w)``; `levels` are in the order of execution."""

    def __init__(
        self, ch: int, dim: int, in_chans: int = 3, multipliers: Sequence[int] = MULTIPLIERS, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        dims = [ch * m for m in reversed((*multipliers, multipliers[-1]))]
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.stem = nn.Conv2d(dim, dims[0], 3, padding=1, **dd)
        self.middle = middle(dims[0], **dd)
        self.levels = nn.ModuleList(Level(a, b, 3, i == 0, **dd) for i, (a, b) in enumerate(pairs))
        self.up = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1, **dd) for _, b in pairs[:-1])
        self.norm, self.head = norm(dims[-1], **dd), nn.Conv2d(dims[-1], in_chans, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        for i, level in enumerate(self.levels):
            x = level(x)
            x = self.up[i](F.interpolate(x, scale_factor=2.0)) if i < len(self.up) else x
        return self.head(F.silu(self.norm(x)))


class Quantized(NamedTuple):
    """The result of `MVARTokenizer.quantize`.

    Attributes:
        indices: codes of each map ``(B, p_k^2)``.
        f_hat: their sum ``(B, C, p_K, p_K)``.
    """

    indices: list[Tensor]
    f_hat: Tensor


class Quantizer(nn.Module):
    """The codes, and the convolutions that refine them at full size."""

    def __init__(self, V: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.codes = nn.Embedding(V, dim, **dd)
        self.refine = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, **dd) for _ in range(REFINERS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codes.weight, -1 / len(self.codes.weight), 1 / len(self.codes.weight))

    def nearest(self, z: Tensor) -> Tensor:
        """Vectors ``(..., C)`` to their nearest codes, the first of equals."""
        flat, codes = z.reshape(-1, z.shape[-1]), self.codes.weight
        square = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.addmm(square, flat, codes.t(), alpha=-2).argmin(1).view(z.shape[:-1])


class MVARTokenizer(nn.Module):
    """VAR's tokenizer: images to K maps of codes, and back. A token of the last map covers ``2^(levels - 1)`` (16) px.

    Args:
        V: Number of codes.
        Cvae: Channels C of a code.
        Cvae: Channels C of a code.
        ch: Width of the first level of encoder and decoder, a multiple of 32.
        patch_nums: Sides p_k of the maps.
        in_chans: Channels of the images.
        ch_mult: Width of each level over `ch`.

    Raises:
        ValueError: the sides do not grow; a width is not a multiple of 32.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        V: int = 4096,
        Cvae: int = 32,
        ch: int = 160,
        patch_nums: Sequence[int] = SIDES,
        in_chans: int = 3,
        ch_mult: Sequence[int] = MULTIPLIERS,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if ch < 32 or ch % 32:
            raise ValueError(f"ch: expected a multiple of 32, got {ch}")
        if V < 1 or Cvae < 1:
            raise ValueError(f"V, Cvae: expected 1 at least, got {V} and {Cvae}")
        self.patch_nums, self.V, self.Cvae, self.in_chans = check_sides(patch_nums), V, Cvae, in_chans
        stride = 2 ** (len(ch_mult) - 1)
        self.img_size, self.num_classes, self.num_features = stride * self.patch_nums[-1], 0, Cvae
        self.head_hidden_size = Cvae
        self.feature_info = [dict(num_chs=Cvae, reduction=stride, module="encoder")]
        self.encoder, self.decoder = (
            Encoder(ch, Cvae, in_chans, ch_mult, **dd),
            Decoder(ch, Cvae, in_chans, ch_mult, **dd),
        )
        self.quantizer = Quantizer(V, Cvae, **dd)
        self.pre, self.post = (nn.Conv2d(Cvae, Cvae, 3, padding=1, **dd) for _ in range(2))
        self.refiners = refiners(len(self.patch_nums))

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters after `to_empty`."""
        for module in self.modules() if needs_reset else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @property
    def dummy_inputs(self) -> tuple[Tensor]:
        """Arguments of `forward` for one image, of zeros."""
        return (self.quantizer.codes.weight.new_zeros(1, self.in_chans, self.img_size, self.img_size),)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The codes."""
        return {"quantizer.codes.weight"}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that outputs the image."""
        return self.decoder.head

    def encode(self, image: Tensor) -> Tensor:
        """Images ``(B, in_chans, S, S)`` to features ``(B, Cvae, p_K, p_K)``.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        expected = (self.in_chans, self.img_size, self.img_size)
        if image.dim() != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(f"image: expected (B, {', '.join(map(str, expected))}), got {tuple(image.shape)}")
        return self.pre(self.encoder(image))

    def enlarge(self, k: int, codes: Tensor) -> Tensor:
        """What map k adds to the sum ``(B, Cvae, p_K, p_K)``: codes ``(B, p_k^2)``, or vectors ``(B, p_k^2, Cvae)``."""
        codes = self.quantizer.codes(codes) if codes.dim() == 2 else codes
        side, full = self.patch_nums[k], self.patch_nums[-1]
        h = codes.mT.unflatten(2, (side, side))
        h = h if side == full else F.interpolate(h, (full, full), mode="bicubic")
        return 0.5 * h + 0.5 * self.quantizer.refine[self.refiners[k]](h)

    def shrink(self, x: Tensor, k: int) -> Tensor:
        """A map ``(B, Cvae, p_K, p_K)`` resized to map k, as tokens ``(B, p_k^2, Cvae)``."""
        side = self.patch_nums[k]
        x = x if side == x.shape[2] else F.interpolate(x, (side, side), mode="area")
        return x.flatten(2).mT

    def walk(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each map, its codes for features `f`, and the sum after it."""
        f_hat, rest = torch.zeros_like(f), f
        for k in range(len(self.patch_nums)):
            indices = self.quantizer.nearest(self.shrink(rest, k))
            h = self.enlarge(k, indices)
            f_hat, rest = f_hat + h, (rest - h).detach()
            yield indices, f_hat

    def quantize(self, f: Tensor) -> Quantized:
        """Features to codes."""
        indices, sums = zip(*self.walk(f), strict=True)
        return Quantized(list(indices), sums[-1])

    def to_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """Codes of all maps to the inputs of a transformer ``(B, L - p_1^2, Cvae)``: the sums so far, resized."""
        f_hat, found = 0.0, [self.quantizer.codes.weight.new_zeros(len(indices[0]), 0, self.Cvae)]
        for k, codes in enumerate(indices[:-1]):
            f_hat = f_hat + self.enlarge(k, codes)
            found.append(self.shrink(f_hat, k + 1))
        return torch.cat(found, 1)

    def decode(self, f_hat: Tensor) -> Tensor:
        """Sums of codes to images, in [-1, 1]."""
        return self.decoder(self.post(f_hat)).clamp(-1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Images to their reconstructions from codes, in [-1, 1]."""
        return self.decode(self.quantize(self.encode(image)).f_hat)

    def losses(self, image: Tensor) -> dict[str, Tensor]:
        """The training losses: the squared error of the image, and the distance between sums and features.

        The gradient passes from f_hat to f as if nothing were quantised (straight through). Each scale's distance draws
        the codes to the features; with weight 0.25 it draws the features to the codes.
        """
        f = self.encode(image)
        apart, f_hat = f.new_zeros(()), f
        for _, f_hat in self.walk(f.detach()):  # noqa: B007
            apart = apart + F.mse_loss(f_hat, f.detach()) + COMMITMENT * F.mse_loss(f, f_hat.detach())
        found = self.decoder(self.post(f + (f_hat - f).detach()))
        return {"loss_image": F.mse_loss(found, image), "loss_codes": apart / len(self.patch_nums)}


def refiners(K: int) -> list[int]:
    """Which of the four convolutions refines each of K maps: the one whose tick is nearest to ``k / (K - 1)``.

    The ticks go from 1/12 to 11/12. Ties are resolved as in float64, because published weights depend on it.
    """
    first, last = 1 / 3 / REFINERS, 1 - 1 / 3 / REFINERS
    ticks = torch.linspace(first, last, REFINERS, dtype=torch.float64, device="cpu")
    at = [k / (K - 1) if K > 1 else 0.0 for k in range(K)]
    return [int((ticks - x).abs().argmin()) for x in at]


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^quant_conv\.", "pre."),
    (r"^post_quant_conv\.", "post."),
    (r"^quantize\.embedding\.", "quantizer.codes."),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.refine."),
    (r"\.conv_in\.", ".stem."),
    (r"\.norm_out\.", ".norm."),
    (r"\.conv_out\.", ".head."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.down\.(\d)\.downsample\.conv\.", r".down.\1."),
    (r"\.up\.(\d)\.upsample\.conv\.", r".up.\1."),
    (r"\.down\.(\d)\.(block|attn)\.", r".levels.\1.\2."),
    (r"\.up\.(\d)\.(block|attn)\.", r".levels.\1.\2."),
    (r"\.block\.", ".blocks."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".proj."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MVARTokenizer) -> dict[str, Tensor]:
    """Converts the authors' state dict to ours, without the counts of how often codes are used."""
    top = len(model.decoder.levels) - 1  # their top level runs first
    state_dict, out = unwrap_state_dict(state_dict), {}
    if "quantize.embedding.weight" not in state_dict:
        return state_dict
    for key, x in state_dict.items():
        if not key.endswith("ema_vocab_hit_SV"):
            key = re.sub(r"^decoder\.up\.(\d)", lambda m: f"decoder.up.{top - int(m[1])}", key)
            out[rename(key, _RENAMES)] = x
    return out


default_cfgs = generate_default_cfgs(
    {
        "mvar_tokenizer": {
            "num_classes": 0,
            "input_size": (3, 256, 256),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "lanczos",
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "first_conv": "encoder.stem",
            "classifier": (),
            "paper_ids": "arXiv:2404.02905",
            "origin_url": "https://github.com/FoundationVision/VAR",
            "license": "mit",
        }
    }
)


@register_model
def mvar_tokenizer(pretrained: bool = False, **kwargs) -> MVARTokenizer:
    """VAR's tokenizer of 4,096 codes (`vae_ch160v4096z32`)."""
    return build_model_with_cfg(
        MVARTokenizer,
        "mvar_tokenizer",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("img_size", "num_classes"),
        **kwargs,
    )
