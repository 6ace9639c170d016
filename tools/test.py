"""Evaluate a checkpoint (.pth of train.py, or .safetensors): `python tools/test.py CONFIG CHECKPOINT`."""

import json
import tempfile

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import load_config, without_start
from linzoo.tools.engine.data import prepare_data
from linzoo.tools.engine.errors import existing_file
from linzoo.tools.engine.runner import Runner
from linzoo.tools.engine.weights import load_parts, load_weights


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `test`: prints the metrics as one line of JSON."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", help=".pth of train.py, or .safetensors")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.cfg_options)
    existing_file("checkpoint", args.checkpoint)
    prepare_data(cfg)
    cfg.model = without_start(cfg.model)
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        cfg.experiment_name = cfg.work_dir  # mmengine shares loggers and histories between runs of one name
        runner = Runner.from_cfg(cfg)
        if hasattr(runner.model, "backbone"):
            load_parts(runner.model, args.checkpoint)
            for handler in runner.logger.handlers:  # the tables of the classes, which training keeps to its log file
                handler.filters.clear()
        else:
            load_weights(runner.model.model, args.checkpoint)
        metrics = runner.test()
    print(json.dumps(metrics, default=float))


if __name__ == "__main__":
    main()
