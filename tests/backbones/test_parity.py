"""Each model computes what its authors' code computes, given the authors' state dict (`tests/parity`)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import linzoo.backbones  # noqa: F401  registers the models

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402

CASES = sorted((PARITY / "cases").glob("*.json"))
MAP_TOLERANCE = 1e-3  # of a map's standard deviation

# Cases whose float32 outputs are no closer to the exact ones than this, whoever computes them: rounding errors grow a
# thousandfold from the first stage to the last. The first stage's map and the float64 run below still hold them.
ILL_CONDITIONED = {"vmamba_t_rootkeys": 0.03}

# Cases whose maps are near-constant over so few channels that LayerNorm amplifies rounding: the allowed error of maps.
NEAR_CONSTANT = {"hrvmamba_n": 0.02, "hrvmamba_n_192x256": 0.02}

# {case's model: outputs of the authors' code that no place of ours holds, and why}
NOT_OURS = {}


def error(ours, out):
    """max |ours - theirs| as a multiple of theirs' standard deviation; inf where the shapes differ."""
    if list(ours.shape) != out["shape"]:
        return float("inf")
    where = slice(None) if out["index"] == "all" else out["index"]
    got = ours.double().contiguous().flatten().numpy()[where]
    return float(np.abs(got - np.asarray(out["value"])).max() / out["std"])


def restored(case, images, folder):
    """What a restoration model makes of images, its weights read from a file as BasicSR saves them; by name the maps of
    its groups and of the first one's blocks.
    """
    file = folder / "reference.pth"
    torch.save({"params": {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    maps = {}
    for j, block in enumerate(model.stages[0].blocks):
        block.register_forward_hook(lambda m, args, y, j=j: maps.update({f"block{j}": y.permute(0, 3, 1, 2)}))
    with torch.inference_mode():
        y = model(*images)
        groups = model.forward_intermediates(*images, intermediates_only=True)
    return y, maps | {f"group{i}": y for i, y in enumerate(groups)}


def record_maps(model):
    """What stages, their blocks and parallel branches put out, or an isotropic model's blocks take in and put out."""
    maps = []

    def keep(module, args, y):
        streams = y if isinstance(y, list) else [y[0] if isinstance(y, tuple) else y]
        for x in streams:
            maps.extend([x, x.permute(0, 3, 1, 2)] if x.ndim == 4 else [args[0], x])

    for stage in model.stages if hasattr(model, "stages") else []:
        parallel = [block for m in stage.blocks for branch in getattr(m, "branches", ()) for block in branch]
        sorting = [m for block in stage.blocks for m in block.modules() if getattr(m, "importance", None)]
        sorting += [mixer.sort for mixer in sorting]
        for module in (stage, *stage.blocks, *parallel, *sorting):
            module.register_forward_hook(keep)
    for block in model.blocks if hasattr(model, "blocks") else []:
        for module in (block, *block.children()):
            module.register_forward_hook(keep)
    return maps


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_parity(path, tmp_path):
    case = json.loads(path.read_text())
    file = tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    model = timm.create_model(
        case["model"], pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **case["kwargs"]
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]

    inputs = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    maps = record_maps(model)
    with torch.inference_mode():
        logits = model(*inputs)
        hidden = model.forward_head(model.forward_features(*inputs), pre_logits=True)
        features = model.forward_features(*inputs)
        maps += [features, features.movedim(-1, 1)] if isinstance(features, torch.Tensor) else []
        for norm in (False, True):
            maps += model.forward_intermediates(*inputs, norm=norm, intermediates_only=True)

    limit = ILL_CONDITIONED.get(path.stem, 0)
    tolerance = max(case.get("tolerance", 2e-4), limit)
    for out in case["outputs"]:
        if out["name"] == "logits":
            assert error(logits, out) <= tolerance, "logits"
        elif out["name"] == "pre_logits":
            assert error(hidden, out) <= tolerance, "pre_logits"
        elif out["name"] not in NOT_OURS.get(case["model"], {}):
            worst = min((error(m, out) for m in maps), default=float("inf"))
            allowed = MAP_TOLERANCE if out["name"] == "stage0" else max(MAP_TOLERANCE, limit)
            allowed = out.get("tolerance", NEAR_CONSTANT.get(path.stem, allowed))
            assert worst <= allowed, f"{out['name']}: the nearest of our maps is off by {worst:.1e}"
    if limit:  # their distance from the exact logits is that of our own float32 run
        with torch.inference_mode():
            exact = model.double()(*(x.double() for x in inputs))
        assert error(exact, next(out for out in case["outputs"] if out["name"] == "logits")) <= limit
        assert (exact - logits).abs().max() / exact.std() <= limit


def test_synthetic_state_dict_fills_by_kind():
    rows = [["a.A_logs", [4], "float32", "synth"], ["n", [], "int64", "zero"], ["w", [2, 3], "float32", "scaled:4.0"]]
    state = synth.state_dict({"name": "case", "state_dict": rows})
    assert (np.exp(state["a.A_logs"]) >= 0.5).all() and (np.exp(state["a.A_logs"]) <= 8).all()
    assert state["n"] == 0
    np.testing.assert_array_equal(state["w"], 4 * synth.tensor("w", [2, 3]))
    with pytest.raises(ValueError, match="unknown fill"):
        synth.state_dict({"name": "case", "state_dict": [["w", [1], "float32", "ones"]]})
