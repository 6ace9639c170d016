"""AOTInductor packages that hold our CPU kernels: they run where LinZoo is not installed.

Under ``use_backend("aoti")`` an operator is traced down to its kernel, ``torch.ops.linzoo_cpu.*``. A package of
`torch._inductor.aoti_compile_and_package` would look such a kernel up by name where it runs. Here each becomes a C
function of a static library that the package links, so nothing has to be registered or imported. The packages also
refuse inputs of another size or dtype.
"""

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._ops import OpOverload

from . import compile_cpu
from .kernel_cache import stored

_TYPES = {"Tensor": "AtenTensorHandle", "Optional[Tensor]": "AtenTensorHandle*"}  # as AOTInductor passes them
_TYPES |= {"bool": "int32_t", "int": "int64_t", "float": "double"}


@contextmanager
def linked(program: torch.export.ExportedProgram) -> Iterator[dict]:
    """Links the kernels of a program, traced under ``use_backend("aoti")``, into packages made inside the block.

    Yields:
        The `inductor_configs` to make them with.

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [node.target for graph in graphs for node in graph.nodes if isinstance(node.target, OpOverload)]
    names = {kernel._opname for kernel in called if kernel.namespace == "linzoo_cpu"}
    shims, libraries = {torch.ops.aten.alias.default: [_CHECKED]}, []
    with tempfile.TemporaryDirectory() as folder:
        for op in compile_cpu.sources():
            if names.isdisjoint(kernels := compile_cpu.kernels(op)):
                continue
            declared = {getattr(torch.ops.linzoo_cpu, name).default: _declaration(name) for name in kernels}
            shims |= {kernel: [f"{text} = nullptr)"] for kernel, text in declared.items()}
            name = compile_cpu.library_name(op, _SHIMS.read_text(), ending="a")
            Path(folder, f"liblinzoo_{op}.a").symlink_to(stored(name, functools.partial(_archive, op, declared)))
            libraries.append(f"linzoo_{op}")
        searched = os.pathsep.join(filter(None, (folder, os.environ.get("LIBRARY_PATH"))))
        with mock.patch.dict(os.environ, LIBRARY_PATH=searched):
            yield {
                "aot_inductor.custom_ops_to_c_shims": shims,
                "aot_inductor.custom_op_libs": libraries,
                "aot_inductor.check_lowerbound": False,  # the trace assumes two images or more; one is right, too
            }


# Declarations come before the code that compares inputs with the sizes of the trace. PyTorch runs it only if an
# environment variable asks for it, and else reads an image of another size as if it had the right one.
_CHECKED = 'int linzoo_begin;\n#define getenv(name) "1"\nextern int linzoo_end'
_SHIMS = compile_cpu.OPS / "aoti.cpp"


def _declaration(kernel):
    """The C function that AOTInductor calls for ``linzoo_cpu::<kernel>``, up to its last argument."""
    schema = getattr(torch.ops.linzoo_cpu, kernel).default._schema
    arguments = ", ".join(f"{_TYPES[str(a.type)]} {a.name}" for a in schema.arguments)
    return f"AOTITorchError aoti_torch_cpu_{kernel}({arguments}, void*"  # the result, which there is none of


def _archive(op, declared, target):
    """Compiles operator `op`'s kernels as the C functions `declared` into the static library `target`."""
    text = f'#include "aoti.cpp"\n#include "{op}/cpu.cpp"\n'
    for kernel, declaration in declared.items():
        passed = "".join(f", {a.name}" for a in kernel._schema.arguments)
        text += f'extern "C" {declaration}) {{ return linzoo::call("{kernel._opname}"{passed}); }}\n'
    made = target.with_suffix(".o")
    try:
        compile_cpu.compile_object(op, text, made)
        subprocess.run(["ar", "rcs", str(target), str(made)], check=True, capture_output=True)
    finally:
        made.unlink(missing_ok=True)
