"""Train a model: `python tools/train.py configs/cls/groupmamba_t_digits.py`.

To start from weights: `--cfg-options model.pretrained=FILE` for a timm model, `model.backbone.pretrained=FILE` for the
backbone of a segmenter or detector, `load_from=FILE` for a whole model of any task. FILE may come from another trainer.
If its classifier has another number of classes, the classifier starts from random weights.
"""

import os
from pathlib import Path

import torch

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import check_start, load_config
from linzoo.tools.engine.data import prepare_data
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.runner import Runner


def _check_launcher(launcher: str) -> None:
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise InputError("--launcher 'pytorch' without RANK in the environment; expected a start by torchrun")
    if launcher == "slurm" and ("SLURM_PROCID" not in os.environ or not torch.cuda.is_available()):
        raise InputError("--launcher 'slurm' needs srun and CUDA; expected 'pytorch' (by torchrun) elsewhere")


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `train`. Wrong input ends with one line on stderr and status 2, before anything is written."""
    parser = config_parser(__doc__)
    parser.add_argument("--work-dir", help="where logs and checkpoints go; default: work_dirs/CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue the run in the work dir, if there is one")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm"], default="none")
    parser.add_argument("--seed", type=int, help="instead of the config's randomness.seed")
    args = parser.parse_args(argv)

    _check_launcher(args.launcher)
    cfg = load_config(args.config, args.cfg_options)
    before = cfg.get("work_dir")  # if the config is what another run wrote, it names that run
    cfg.work_dir = args.work_dir or before or f"work_dirs/{Path(args.config).stem}"
    if cfg.get("experiment_name", before) == before:  # runs with one name share loggers and histories in mmengine
        cfg.experiment_name = cfg.work_dir
    cfg.resume = args.resume
    cfg.launcher = args.launcher
    if args.seed is not None:
        cfg.randomness = dict(cfg.get("randomness", {}), seed=args.seed)
    if args.amp:
        cfg.optim_wrapper.type = "AutocastOptimWrapper"
    check_start(cfg)
    prepare_data(cfg)
    Runner.from_cfg(cfg).train()
    if torch.distributed.is_initialized():  # else gloo's threads may outlive the interpreter and abort it
        torch.distributed.barrier()  # until the first process has exported
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
