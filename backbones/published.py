"""The authors' published figures for each variant; `tools/models.py` shows our measurements beside them."""

from typing import NamedTuple


class Published(NamedTuple):
    """Figures as printed by the authors, rounded as they round them.

    Attributes:
        params_m: Parameters in millions.
        gmacs: Multiply-accumulates of one image at `size`, in 10^9; papers mostly call them FLOPs.
        top1: ImageNet-1K top-1 accuracy in percent.
        source: Where the figures were published.
        size: Side of the square image that `gmacs` and `top1` refer to.
        note: Why a figure differs by more than 3 % from our measurement; empty if none does.
    """

    params_m: float | None
    gmacs: float | None
    top1: float | None
    source: str
    size: int = 224
    note: str = ""


_DIMSUM = "authors' README"
_MVAR = "arXiv 2411.10433, quoted second-hand"
_EFFICIENTVIM = "README of github.com/mlvlab/EfficientViM, 300 epochs"
_EFFICIENTVMAMBA = "README of github.com/TerryPei/EfficientVMamba"
_GROUPMAMBA = "README and project page of github.com/Amshaker/GroupMamba"
_HRVMAMBA = "README of github.com/zhanghao5201/HRVMamba"
_LOCALMAMBA = "README of github.com/hunto/LocalMamba"
_LOCALVIM_NOTE = "beside the matrix products, the published FLOPs leave a third of 9 L D N or less for the scans"
_KAT = "README of github.com/Adamdad/kat"
_KAT_NOTE = "the README leaves out the two matrix products of attention"
_S4ND = "arXiv 2210.06583"
_S4ND_NOTE = "the Fourier transforms of the long convolutions are not in our count"
_MAMBAVISION = "README of github.com/NVlabs/MambaVision"
_MILA = "README of github.com/LeapLabTHU/MLLA, with MESA"
_PLAINMAMBA = "README of github.com/ChenhongyiYang/PlainMamba; GFLOPs quoted second-hand"
_RESTORE_RWKV = "arXiv 2407.11087, tables of v1; of the light variant, the abstract of v3"
_RGT = "README of github.com/zhengchen1999/RGT; FLOPs of an output of 512"
_SPATIALMAMBA = "README of github.com/EdwardChasel/Spatial-Mamba"
_SWIN_UMAMBA = "arXiv 2402.03302, quoted second-hand and unverified"
_VSSD = "README of github.com/YuHengsss/VSSD, without MESA"
_VSSD_NOTE = "our count has every convolution and matrix product; what the README's leaves out is not said"
_VIDEOMAMBA = "README of github.com/OpenGVLab/VideoMamba"
_VIDEOMAMBA_NOTE = "beside the matrix products, the README's FLOPs leave less than half of 9 L D N for the scans"
_VIL = "README of github.com/NX-AI/vision-lstm, version 2"
_VIM = "README of github.com/hustvl/Vim; FLOPs as quoted in the README of github.com/hunto/LocalMamba"
_VIM_NOTE = "beside the matrix products, the quoted FLOPs leave less than half of 9 L D N for the scans"
_VIM2 = "arXiv 2403.19888v1, quoted second-hand and unverified"
_VIM2_NOTE = "a table gives widths and numbers of mixers; the rest, and so a part of the size, is ours"
_VRWKV = "README of github.com/OpenGVLab/Vision-RWKV"
_VRWKV_NOTE = "the README rounds to one decimal"
_VMAMBA = "README and assets/performance.md of github.com/MzeroMiko/VMamba"

PUBLISHED = {
    "efficientvim_m1": Published(6.7, 0.239, 72.9, _EFFICIENTVIM),
    "efficientvim_m1_dist": Published(None, None, 74.6, _EFFICIENTVIM),
    "efficientvim_m2": Published(13.9, 0.355, 75.4, _EFFICIENTVIM),
    "efficientvim_m2_dist": Published(None, None, 76.7, _EFFICIENTVIM),
    "efficientvim_m3": Published(16.6, 0.656, 77.6, _EFFICIENTVIM),
    "efficientvim_m3_dist": Published(None, None, 79.1, _EFFICIENTVIM),
    "efficientvim_m4": Published(19.6, 1.111, 79.4, _EFFICIENTVIM, 256),
    "efficientvim_m4_dist": Published(None, None, 80.7, _EFFICIENTVIM, 256),
    "dimsum_l_2": Published(460, None, None, _DIMSUM, 32),
    "efficientvmamba_t": Published(
        6, 0.8, 76.5, _EFFICIENTVMAMBA, note="the authors round down: their training log prints 6,493,660 parameters"
    ),
    "efficientvmamba_s": Published(11, 1.3, 78.7, _EFFICIENTVMAMBA),
    "efficientvmamba_b": Published(33, 4.0, 81.8, _EFFICIENTVMAMBA),
    "groupmamba_t": Published(23, 4.6, 83.3, _GROUPMAMBA),
    "groupmamba_s": Published(
        34, 7.0, 83.9, _GROUPMAMBA, note="the authors' own code, counted by our rules, has 7.23 GMACs"
    ),
    "groupmamba_b": Published(57, 14, 84.5, _GROUPMAMBA),
    "hrvmamba_n": Published(12, 1.9, 74.8, _HRVMAMBA, 256),
    "hrvmamba_t": Published(14, 2.8, 78.6, _HRVMAMBA, 256),
    "hrvmamba_s": Published(20, 5.8, 81.3, _HRVMAMBA, 256),
    "hrvmamba_b": Published(61, 15.8, 84.2, _HRVMAMBA),
    "kat_tiny_patch16_224": Published(5.7, 1.13, 74.6, _KAT, note=_KAT_NOTE),
    "kat_small_patch16_224": Published(22.1, 4.35, 81.2, _KAT, note=_KAT_NOTE),
    "kat_base_patch16_224": Published(86.6, 17.06, 82.3, _KAT, note=_KAT_NOTE),
    "s4nd_convnext_tiny": Published(30, 5.2, 82.2, _S4ND, note=_S4ND_NOTE),
    "mambavision_t": Published(
        31.8, 4.4, 82.3, _MAMBAVISION, note="our count has every convolution and matrix product, attention's, too"
    ),
    "mambavision_t2": Published(35.1, 5.1, 82.7, _MAMBAVISION),
    "mambavision_s": Published(50.1, 7.5, 83.3, _MAMBAVISION),
    "mambavision_b": Published(97.7, 15.0, 84.2, _MAMBAVISION),
    "mambavision_l": Published(227.9, 34.9, 85.0, _MAMBAVISION),
    "mambavision_l2": Published(241.5, 37.5, 85.3, _MAMBAVISION),
    "mila_t": Published(25, 4.2, 83.5, _MILA),
    "mila_s": Published(43, 7.3, 84.4, _MILA),
    "mila_b": Published(96, 16.2, 85.3, _MILA),
    "mvar_d16": Published(464, None, None, _MVAR, 256),
    "mvar_d20": Published(900, None, None, _MVAR, 256),
    "plainmamba_l1": Published(
        7.3, 3.0, 77.9, _PLAINMAMBA, note="the published module has 7,551,656 parameters with its classifier"
    ),
    "plainmamba_l2": Published(25.7, 8.1, 81.6, _PLAINMAMBA),
    "plainmamba_l3": Published(
        50.5,
        14.4,
        82.3,
        _PLAINMAMBA,
        note="our count has the four scans with 9 L D N each; a quoted figure's is not said",
    ),
    "restore_rwkv": Published(27.914, 37.4585, None, _RESTORE_RWKV, 128),
    "restore_rwkv_light": Published(
        1.16, None, None, _RESTORE_RWKV, 128, "1.157 M with one kernel per token shift; here are all of its branches"
    ),
    "rgt_x4": Published(13.37, 251.07, None, _RGT, 128),
    "rgt_s_x4": Published(10.20, 193.08, None, _RGT, 128),
    "spatialmamba_t": Published(27, 4.5, 83.5, _SPATIALMAMBA),
    "spatialmamba_s": Published(43, 7.1, 84.6, _SPATIALMAMBA),
    "spatialmamba_b": Published(96, 15.8, 85.3, _SPATIALMAMBA),
    "swin_umamba": Published(60, 68.0, None, _SWIN_UMAMBA, 320),
    "swin_umamba_d": Published(28, 18.9, None, _SWIN_UMAMBA, 320),
    "vssd_m": Published(14, 2.3, 82.5, _VSSD, note=_VSSD_NOTE),
    "vssd_t": Published(24, 4.5, 83.6, _VSSD, note=_VSSD_NOTE),
    "vssd_s": Published(40, 7.4, 84.1, _VSSD, note=_VSSD_NOTE),
    "vssd_b": Published(89, 16.1, 84.7, _VSSD, note=_VSSD_NOTE),
    "vim2_t": Published(20, None, 82.7, _VIM2, note=_VIM2_NOTE),
    "vim2_s": Published(43, None, 83.7, _VIM2),
    "vim2_b": Published(74, None, 83.9, _VIM2),
    "localvim_t": Published(8, 1.5, 76.2, _LOCALMAMBA, note=_LOCALVIM_NOTE),
    "localvim_t_midcls": Published(8, 1.5, 77.8, _LOCALMAMBA, note=_LOCALVIM_NOTE),
    "localvim_s": Published(28, 4.8, 81.1, _LOCALMAMBA, note=_LOCALVIM_NOTE),
    "local_vssm_t": Published(26, 5.7, 82.7, _LOCALMAMBA),
    "local_vssm_s": Published(50, 11.4, 83.7, _LOCALMAMBA),
    "videomamba_t": Published(7, 1.1, 76.9, _VIDEOMAMBA, note=_VIDEOMAMBA_NOTE),
    "videomamba_s": Published(26, 4.3, 81.2, _VIDEOMAMBA, note=_VIDEOMAMBA_NOTE),
    "videomamba_m": Published(74, 12.7, 82.8, _VIDEOMAMBA, note=_VIDEOMAMBA_NOTE),
    "vil_t": Published(6.4, None, 78.3, _VIL),
    "vil_s": Published(23.4, None, 81.5, _VIL),
    "vil_b": Published(89.3, None, 82.4, _VIL),
    "vim_t": Published(7, 1.5, 76.1, _VIM, note=_VIM_NOTE),
    "vim_t_stride8": Published(None, None, 78.3, _VIM),
    "vim_s": Published(26, 5.1, 80.5, _VIM, note=_VIM_NOTE),
    "vim_s_stride8": Published(None, None, 81.6, _VIM),
    "vim_b": Published(98, None, 81.9, _VIM),
    "vmamba_t": Published(30, 4.9, 82.6, _VMAMBA),
    "vmamba_s": Published(50, 8.7, 83.6, _VMAMBA),
    "vmamba_b": Published(89, 15.4, 83.9, _VMAMBA),
    "vmamba_t_s2l5": Published(31, 4.9, 82.5, _VMAMBA),
    "vmamba_s_s1l20": Published(49, 8.6, 83.3, _VMAMBA),
    "vmamba_b_s1l20": Published(87, 15.2, 83.8, _VMAMBA),
    "vmamba_t_v0": Published(23, 5.6, 82.2, _VMAMBA),
    "vmamba_s_v0": Published(44, 11.2, 83.5, _VMAMBA),
    "vmamba_b_v0": Published(76, 18.0, 83.7, _VMAMBA),
    "vrwkv_t": Published(6.2, 1.2, 75.1, _VRWKV, note=_VRWKV_NOTE),
    "vrwkv_s": Published(23.8, 4.6, 80.1, _VRWKV),
    "vrwkv_b": Published(93.7, 18.2, 82.0, _VRWKV),
    "vrwkv_l": Published(334.9, 189.5, 86.0, _VRWKV, size=384),
    "vrwkv6_t": Published(7.6, 1.6, 76.6, _VRWKV, note=_VRWKV_NOTE),
    "vrwkv6_s": Published(27.7, 5.6, 81.1, _VRWKV),
    "vrwkv6_b": Published(104.9, 20.9, 82.6, _VRWKV),
}
