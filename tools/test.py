"""Evaluate a checkpoint (.safetensors, or one of any trainer): `python tools/test.py CONFIG CHECKPOINT`."""

import json
import tempfile

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import load_config, task_of
from linzoo.tools.engine.data import prepare_data
from linzoo.tools.engine.runner import Runner
from linzoo.tools.engine.task import without_start
from linzoo.tools.engine.weights import load_weights, read_checkpoint


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `test`: prints the metrics as one line of JSON."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "checkpoint", help=".safetensors, a checkpoint of any trainer, or a model's name for its published weights"
    )
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.cfg_options)
    read_checkpoint(args.checkpoint, simulated=True)
    prepare_data(cfg)
    cfg.model = without_start(cfg.model)
    cfg.load_from, cfg.resume = None, False
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        cfg.experiment_name = cfg.work_dir  # runs with one name share loggers and histories in mmengine
        runner = Runner.from_cfg(cfg)
        task = task_of(cfg)
        load_weights(task.weights(runner.model), args.checkpoint, simulated=True)
        if task.tables:
            for handler in runner.logger.handlers:  # tables per class; training writes them only to its log file
                handler.filters.clear()
        metrics = runner.test()
    print(json.dumps(metrics, default=float))


if __name__ == "__main__":
    main()
