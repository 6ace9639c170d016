"""Terminator (HyperZ.Z.W).

Paper: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction - https://arxiv.org/abs/2401.17948

Five blocks at the image's own resolution, without residual connections, pooling or down-sampling. Small networks of
coordinates ("slow" networks) make kernels as large as the map. The elementwise product of a kernel and the activations
gives weights that depend on the image. These are multiplied with other activations as matrices. A global branch of C
channels of an S x S map costs C S^3.

Every standardisation uses the statistics of the current image or **batch**, also in evaluation, and local kernels
depend on the mean over the batch. So an image's output depends on the other images in its batch. Images are square and
of one size. Maps are (B, C, S, S).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.script import refuse_script

__all__ = ["HyperKernel", "Terminator"]

SHARE = 0.1  # weight of the normalised half of a local kernel; only this half passes a gradient


def instance_norm(x: Tensor) -> Tensor:
    """Standardises each map of each image; no parameters."""
    return F.instance_norm(x)


def batch_norm(x: Tensor) -> Tensor:
    """Standardises each channel over the current batch; no parameters, no running statistics."""
    return F.batch_norm(x, None, None, training=True)


def mixed_norm(x: Tensor, groups: int = 12) -> Tensor:
    """Alternates `batch_norm` and `instance_norm` over `groups` groups of channels."""
    both = zip(batch_norm(x).chunk(groups, 1), instance_norm(x).chunk(groups, 1), strict=True)
    return torch.cat([parts[i % 2] for i, parts in enumerate(both)], 1)


class HyperKernel(nn.Module):
    """A slow network: coordinates to a kernel (a multiplicative network with sine filters; section 3.1)::

        f_i = sin(W_i c);   h = f_0;   h = f_i (U_i h) + b, i = 1 ... layers;   W h

    over coordinates c from -1 to 1 along each axis. With `context`, every h is mixed with the batch's content before
    the next step: ``h = (sg(h) + 0.1 h / ||h||) V_i v``. Here v comes from the batch mean of the context's
    map, pooled to the kernel's size, and no gradient passes sg.

    Args:
        axes: 1 or 2.
        size: Positions n along an axis.
        hidden: Inner width.
        layers: Steps.
        dim: Channels of the kernel.
        context: Channels of the context; None for none.
        omega: Initial scale of the filters' frequencies; the authors' value is not known.

    Shape:
        ``(B, context, H, W)`` or nothing to ``(dim, n)`` or ``(dim, n, n)``.
    """

    def __init__(
        self,
        axes: int,
        size: int,
        hidden: int,
        layers: int,
        dim: int,
        context: int | None = None,
        omega: float = 1.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.axes, self.size, self.omega = axes, size, omega
        self.filters = nn.ModuleList(nn.Linear(axes, hidden, **dd) for _ in range(layers + 1))
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers))
        self.output = nn.Linear(hidden, dim, **dd)
        self.bias = nn.Parameter(torch.empty(size**axes, 1, **dd))
        self.reduce = None if context is None else nn.Linear(context, hidden, **dd)
        self.fc = None if context is None else nn.Linear(hidden, hidden, **dd)
        self.mix = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers if context else 0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        layers = len(self.linears)
        with torch.no_grad():
            for layer in self.filters:
                layer.reset_parameters()
                shape = torch.full(layer.weight.shape, 6 / (layers + 1), device="cpu")
                gamma = torch.distributions.Gamma(shape, torch.ones_like(shape)).sample()
                layer.weight.mul_(2 * math.pi * self.omega * gamma.to(layer.weight))
                nn.init.zeros_(layer.bias)
            for layer in (*self.linears, *self.mix, *(m for m in (self.reduce, self.fc) if m is not None)):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
                nn.init.ones_(layer.bias)
            nn.init.kaiming_uniform_(self.output.weight, nonlinearity="linear")
            self.output.weight.mul_(self.bias.shape[0] ** -0.5)
            nn.init.zeros_(self.output.bias)
            nn.init.zeros_(self.bias)

    def forward(self, context: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        at = torch.linspace(-1, 1, self.size, device=weight.device, dtype=weight.dtype)
        at = torch.cartesian_prod(*[at] * self.axes).view(-1, self.axes)
        v = None
        if context is not None and self.reduce is not None and self.fc is not None:
            pooled = F.adaptive_avg_pool2d(context, self.size).mean(0).flatten(1).mT  # linear: the mean comes first
            v = F.gelu(self.fc(self.reduce(pooled)))
        h = self.filters[0](at).sin()
        for i, linear in enumerate(self.linears):
            h = self.filters[i + 1](at).sin() * linear(h) + self.bias
            if v is not None:
                h = (h.detach() + SHARE * F.normalize(h, dim=0, eps=1e-12)) * self.mix[i](v)
        return self.output(h).mT.unflatten(1, (self.size,) * self.axes)


class GatedUnit(nn.Module):
    """``W_y (GELU(IN(W_k x * W_q W_v x)) + b)`` with one map b for all channels."""

    def __init__(self, dim: int, size: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Conv2d(dim, dim, 1, **dd) for _ in range(4))
        self.bias = nn.Parameter(torch.empty(size, size, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.y(F.gelu(instance_norm(self.k(x) * self.q(self.v(x)))) + self.bias)


class LocalBranch(nn.Module):
    """``GELU(BN(conv_1x1(depthwise(u)))) + b``; a slow network makes the kernel of `size` from the context c."""

    def __init__(self, dim: int, size: int, omega: float, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.kernel = HyperKernel(2, size, 32, 2, dim, context=dim, omega=omega, **dd)
        self.mixer = nn.Conv2d(dim, dim, 1, **dd)
        self.bias = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _mixer(self.mixer)
        nn.init.zeros_(self.bias)

    def forward(self, c: Tensor, u: Tensor) -> Tensor:
        kernel = self.kernel(c).unsqueeze(1)
        y = F.conv2d(u, kernel.to(u.dtype), padding=kernel.shape[-1] // 2, groups=len(kernel))
        return F.gelu(batch_norm(self.mixer(y))) + self.bias


def _mixer(layer: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]


def tile(x: Tensor, channels: int) -> Tensor:
    """Repeats the channels of a map until there are `channels` of them."""
    return x.repeat(1, channels // x.shape[1], 1, 1)


class Block(nn.Module):
    """Slow-fast neural encoding (section 3): ten branches of a map ``(B, C, S, S)`` and up to two earlier maps, joined.

    ``P = x * kernel`` is multiplied as a matrix, channel by channel, with three other activations. In parallel there
    are four local branches, a gated unit and an interaction of space and channels.
    """

    def __init__(
        self, dim: int, dim_out: int, size: int, layers: int, earlier: int, drop: float, omega: float, device=None,
        dtype=None,
    ):  # fmt: skip
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.kernel = HyperKernel(2, size, 64, layers, dim, omega=omega, **dd)
        self.unit_x, self.unit_p = GatedUnit(dim, size, **dd), GatedUnit(dim, size, **dd)
        self.mixer = nn.Conv2d(dim, dim, 1, **dd)
        self.channel_kernel = HyperKernel(1, dim, 32, 2, 1, omega=omega, **dd)
        self.hyper_channels = HyperKernel(1, dim, 16, 2, 1, omega=omega, **dd)
        self.hyper_space = HyperKernel(2, size, 64, 2, 1, omega=omega, **dd)
        self.local = nn.ModuleList(LocalBranch(dim, k, omega, **dd) for k in (3, 9, 5, 7))
        self.bottleneck = nn.Conv2d((10 + earlier) * dim, dim_out, 1, **dd)
        self.bias = nn.Parameter(torch.empty(1, **dd))
        self.drop = nn.Dropout2d(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _mixer(self.mixer)
        _mixer(self.bottleneck)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        P = x * self.kernel()
        fast = instance_norm(self.unit_p(P) + self.unit_x(x))
        mix = instance_norm(self.mixer(x))
        g = x.mean((2, 3), keepdim=True)
        hci = instance_norm(x * (g * self.channel_kernel().view(-1, 1, 1) * g).sigmoid())
        o, ox, oh = P @ fast, P @ mix, P @ hci
        glu = o.sigmoid() * o
        s, q = o.mean(1, keepdim=True), o.mean((2, 3), keepdim=True)
        hyper = x * ((s * self.hyper_space() * s) * (q * self.hyper_channels().view(-1, 1, 1) * q)).sigmoid()
        l1, l2, l3, l4 = (
            branch(c, u) for branch, c, u in zip(self.local, (x, hci, mix, x), (hci, x, x, mix), strict=True)
        )
        before = [tile(y, x.shape[1]) for y in earlier]
        y = torch.cat([o, l2, *before[:1], fast, ox, l1, glu, l3, oh, l4, *before[1:], hyper], 1)
        return self.drop(F.gelu(mixed_norm(self.bottleneck(y))) + self.bias)


class Terminator(nn.Module):
    """Terminator (arXiv 2401.17948): a classifier of square images of one size.

    Args:
        img_size: Side S of the images.
        in_chans: Channels of the images; the later maps have multiples of this number.
        num_classes: Classes.
        drop_rate: Dropout of whole maps after every block except the first.
        omega: Initial scale of the filters' frequencies; the authors' value is not known.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        drop_rate: float = 0.05,
        omega: float = 1.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
            raise ValueError(f"img_size: expected one side of square images, got {img_size!r}")
        self.img_size, self.in_chans, self.num_classes = sides[0], in_chans, num_classes
        dims = [in_chans * factor for factor in (1, 4, 12, 24, 48, 96)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [dict(num_chs=dim, reduction=1, module=f"blocks.{i}") for i, dim in enumerate(dims[1:])]
        self.blocks = nn.ModuleList(
            Block(dim, dim_out, sides[0], 2 + (i == 0), earlier, drop_rate * (i > 0), omega, **dd)
            for i, ((dim, dim_out), earlier) in enumerate(zip(pairwise(dims), (0, 0, 1, 1, 2), strict=True))
        )
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in self.modules():  # a layer is reset before the module that contains it
            if needs_reset and isinstance(module, (HyperKernel, GatedUnit, LocalBranch, Block)):
                module.reset_parameters()
        if isinstance(self.head, nn.Linear):
            nn.init.kaiming_normal_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay."""
        return dict(stem=r"^blocks\.0", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier with `num_classes` classes; 0 for none."""
        self.num_classes = num_classes
        weight = self.blocks[0].bias
        settings: dict = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **settings) if num_classes else nn.Identity()

    def slow_loss(self, tiled: bool = False) -> Tensor:
        """How much the blocks' global kernels differ (section 3.3): a term of the training loss.

        The sum over pairs of blocks of the mean squared difference of their kernels, each summed over its channels.

        Args:
            tiled: the paper's form: kernels with fewer channels are repeated to as many, instead of the sums.
        """
        kernels = [block.kernel() for block in self.blocks]
        loss = kernels[0].new_zeros(())
        for i, large in enumerate(kernels):
            for small in kernels[:i]:
                repeated = small.repeat(len(large) // len(small), 1, 1) if tiled else small.sum(0)
                loss = loss + (repeated - (large if tiled else large.sum(0))).square().mean()
        return loss

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Terms that training adds to the classification loss: `slow_loss`, and lengths that should stay small.

        "norms" is the sum of the lengths of the mixers' and bottlenecks' parameters, plus 1e-6 times that of the
        weights of all 2-D slow networks.
        """
        fast, slow = [], []
        for block in self.blocks:
            mixers = (block.mixer, block.bottleneck, *(branch.mixer for branch in block.local))
            fast += [p for layer in mixers for p in layer.parameters()] + [branch.bias for branch in block.local]
        for module in self.modules():
            if isinstance(module, HyperKernel) and module.axes == 2:
                slow += [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
        lengths = [torch.stack([p.norm() for p in parameters]).sum() for parameters in (fast, slow)]
        return {"slow": self.slow_loss(), "norms": lengths[0] + 1e-6 * lengths[1]}

    def forward_blocks(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, in_chans, S, S)`` to every block's map.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            sides = f"{self.in_chans}, {self.img_size}, {self.img_size}"
            raise ValueError(f"x: expected (B, {sides}), got {tuple(x.shape)}")
        maps = [x]
        for block, earlier in zip(self.blocks, ((), (), (1,), (2,), (3, 2)), strict=True):
            maps.append(block(maps[-1], [maps[i] for i in earlier]))
        return maps[1:]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last block's map ``(B, C, S, S)``."""
        return self.forward_blocks(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map to logits, or with `pre_logits` to its mean."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``, which depend on the whole batch."""
        return self.forward_head(self.forward_features(x))


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^out_layer\.", "head."),
    (r"\.fast_multi_branch\.", "."),
    (r"\.Fast_Kernel_rgu_2\.", ".unit_p."),
    (r"\.Fast_Kernel_rgu\.", ".unit_x."),
    (r"\.fast_linear_([kvqy])\.", r".\1."),
    (r"\.channel_mixer_mlp\.", ".mixer."),
    (r"\.bottleneck_layer\.", ".bottleneck."),
    (r"\.slow_net_g\.", ".kernel."),
    (r"\.channel_mixer_hci\.slow_net_gc\.", ".channel_kernel."),
    (r"\.hyper_interact\.slow_net_gc_hi\.", ".hyper_channels."),
    (r"\.hyper_interact\.slow_net_gs_hi\.", ".hyper_space."),
    *((rf"\.slow_net_l{i + 1}\.", f".local.{i}.kernel.") for i in range(4)),
    *((rf"\.local_interact_conv_{i + 1}\.channel_mixer\.", f".local.{i}.mixer.") for i in range(4)),
    *((rf"\.bias{i + 1}$", f".local.{i}.bias") for i in range(4)),
    (r"\.Kernel\.", "."),
    (r"\.(?:fast_)?bias_pk?$", ".bias"),
    (r"\.output_linear\.", ".output."),
    (r"\.filters\.(\d)\.linear\.", r".filters.\1."),
    (r"\.fast_reduce\.", ".reduce."),
    (r"\.fast_fc1\.", ".fc."),
    (r"\.fast_linears_x\.", ".mix."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Terminator) -> dict[str, Tensor]:
    """Converts the authors' state dict to ours, without their counters.

    Weights are taken unchanged. The authors' code scales them again at the first forward pass after loading.
    """
    state_dict = unwrap_state_dict(state_dict)
    found = {rename(key, _RENAMES): x for key, x in state_dict.items() if not key.endswith("train_length")}
    return reshape_as(found, model)


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": (),
        "classifier": "head",
        "paper_ids": "arXiv:2401.17948",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"terminator": _cfg()})


@register_model
def terminator(pretrained: bool = False, **kwargs) -> Terminator:
    """Terminator with the CIFAR-10 configuration."""
    return build_model_with_cfg(
        Terminator, "terminator", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )
