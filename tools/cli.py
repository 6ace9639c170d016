"""The `linzoo` command. `linzoo doctor`, `linzoo train CONFIG`, ... call the `main` of the tool of that name."""

import importlib
import importlib.metadata
import sys

COMMANDS = {
    "doctor": "versions, which backend each operator uses and why, a self-check of the kernels",
    "models": "the zoo: measured parameters and MACs beside the published ones",
    "configs": "the shipped training configs",
    "finetune": "train a model on a folder of your own, and report what it does",
    "train": "train by a config",
    "test": "evaluate a checkpoint",
    "predict": "label, segment, restore or find objects in files",
    "sample": "make images of classes",
    "export": "write a model for ONNX Runtime or torch.export",
    "quantize": "round a classifier's weights and inputs to 8 or 4 bits, in simulation",
    "prune": "set a classifier's weights or channels to 0, in one shot",
    "outliers": "compare methods of quantisation on planted outliers",
    "look": "a model's heat maps, receptive field, features, scan orders, states, attention, dynamics",
    "benchmark": "time operators and models on this machine",
    "build": "compile the CPU kernels ahead of first use",
    "make_data": "write the data sets of the examples",
    "quickstart": "train on handwritten digits and label others",
    "scenes": "segment or find digits on photographs, from the quickstart's weights",
    "denoise": "remove noise from photographs",
    "state_tuning": "tune the states of a trained Vision-RWKV-6; compare with a probe and fine-tuning",
    "mixers": "compare token mixers in plain ViTs",
    "ptd": "compare S4D and perturb-then-diagonalise (PTD) layers with the systems they approximate",
}
MODULES = {"build": "linzoo.ops.compile_cpu", "sample": "linzoo.tools.predict"}  # names that differ from the command
COMPLETION = {
    "bash": 'complete -o default -W "{names}" linzoo',
    "zsh": "autoload -U +X bashcompinit && bashcompinit\ncomplete -o default -W '{names}' linzoo",
}


def main(argv: list[str] | None = None) -> int | None:
    """Runs the tool that the first argument names, with the remaining arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"linzoo {importlib.metadata.version('linzoo')}")
        return 0
    if argv[:1] == ["completion"] and argv[1:] and argv[1] in COMPLETION:
        print(COMPLETION[argv[1]].format(names=" ".join(COMMANDS)))
        return 0
    argv = [argv[0].replace("-", "_"), *argv[1:]] if argv and not argv[0].startswith("-") else argv  # make-data, too
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] not in ("-h", "--help")
        if asked:
            print(f"linzoo: unknown command {argv[0]!r}; usage: linzoo {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
            return 2
        print("usage: linzoo COMMAND ...; `linzoo COMMAND --help` says more\n")
        print("\n".join(f"  {name:13}{description}" for name, description in COMMANDS.items()))
        print('\nlinzoo --version; in a shell: eval "$(linzoo completion bash)" (or zsh)')
        return 0
    try:
        tool = importlib.import_module(MODULES.get(argv[0], f"linzoo.tools.{argv[0]}"))
    except ImportError as e:  # an optional part is missing or does not fit; the message says how to install it
        print(f"error: linzoo {argv[0]}: {e}", file=sys.stderr)
        return 2
    return tool.main(argv[1:])
