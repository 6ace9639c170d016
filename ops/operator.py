"""Turns functions of tensors into a PyTorch operator: schema, shapes, derivatives of any order, FLOP formula.

First derivatives have kernels. Second derivatives and forward mode differentiate the operator's reference: correct but
slow, with one warning. Under `torch.func` transforms an `autograd.Function` replaces the operator, because gradients
registered with PyTorch's own operator API do not take part in them.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import compile_cpu, compile_cuda
from .backend import fall_back, forced_backend, resolve
from .tensors import check_entries

CHUNK = {"cpu": compile_cpu.CHUNK, "cuda": compile_cuda.CHUNK}  # steps between two stored states, by device


class Operator:
    """An operator ``linzoo::name`` and its backward pass, ``linzoo::name_backward``.

    Args:
        name: The operator's name.
        schema: Arguments and results, ``"(Tensor u, Tensor? order, bool save) -> (Tensor y, Tensor states)"``. The
            first result is the operator's output; the others are kept for the backward pass. An argument ``save`` says
            whether they are needed; `Operator` passes it.
        kernel: The folder of its kernels, ``ops/<kernel>``; None if `reference` is fast and runs on every device.
        reference: The operator in plain PyTorch, with the same arguments and results.
        devices: Device types that have kernels. On others `reference` runs without a warning.
        forward: ``forward(backend, *arguments)``: the results of the kernels of "cpu" or "cuda", if there are any.
        backward: ``backward(backend, dy, *arguments, *results)``, without `save`, the first result and the arguments
            in `drop`: the gradients, in order, of every differentiated tensor that is not None.
        fake: The results' shapes, as empty tensors.
        flops: ``flops(**shapes)``: the number of operations, from shapes by argument name; backward counts twice that.
        constants: Tensors that are not differentiated.
        keep_first: Whether the backward pass also takes the first result.
        drop: Arguments that the backward pass does not take, because the others and the results restore them:
            ``{"b": restore}`` with ``restore(**arguments)``.
        export: The reference in a form for `torch.onnx.export`, if it needs one.
        chunked: Another such form, for a fixed length.
        limit: ``limit(backend, *arguments)``: why the kernels cannot take these arguments, or None.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        kernel: str | None,
        devices: Sequence[str] = ("cpu", "cuda"),
        reference: Callable,
        forward: Callable | None = None,
        backward: Callable | None = None,
        fake: Callable,
        flops: Callable[..., int],
        constants: Sequence[str] = ("order",),
        keep_first: bool = False,
        drop: dict[str, Callable] | None = None,
        export: Callable | None = None,
        chunked: Callable | None = None,
        limit: Callable[..., str | None] | None = None,
    ):
        parsed = torch._C.parse_schema(f"linzoo::{name}{schema}")
        types = {a.name: str(a.type) for a in parsed.arguments}
        self.name, self.kernel, self.reference, self.drop, self.limit = name, kernel, reference, drop or {}, limit
        self.devices = devices
        self.arguments = list(types)
        self.saves = "save" in types
        export = export or reference
        self._exports = {"export": export, "export_chunked": chunked or export, "aoti": self._run}
        tensors = [n for n, kind in types.items() if "Tensor" in kind]
        self.differentiable = [n for n in tensors if n not in constants]
        results = [r.name for r in parsed.returns]
        self.kept = results[0 if keep_first else 1 :]
        inputs = [n for n in self.arguments if n != "save" and n not in self.drop]
        self.backward_arguments = ["dy", *inputs, *self.kept]
        # What the backward pass depends on; its other tensors follow from these.
        self.active = ["dy", *(n for n in self.differentiable if n in inputs), *(self.kept if self.drop else ())]

        self._forward, self._backward = forward, backward
        texts = [part.strip() for part in schema[1 : schema.index(")")].split(",")]
        texts = [t for t in texts if t.split()[-1] in inputs]
        texts = ["Tensor dy", *texts, *(f"Tensor {n}" for n in self.kept)]
        torch.library.define(f"linzoo::{name}", schema)
        torch.library.define(f"linzoo::{name}_backward", f"({', '.join(texts)}) -> Tensor[]")
        self.packet, packet = getattr(torch.ops.linzoo, name), getattr(torch.ops.linzoo, f"{name}_backward")
        self.op, self.backward_op = self.packet.default, packet.default
        for op, run, shapes in ((name, self._run, fake), (f"{name}_backward", self._run_backward, self._fake_backward)):
            torch.library.impl(f"linzoo::{op}", "default", run)
            torch.library.register_fake(f"linzoo::{op}", shapes)
        context, first = self._context, self._first_derivative
        torch.library.register_autograd(f"linzoo::{name}", first, setup_context=context)
        torch.library.register_autograd(
            f"linzoo::{name}_backward",
            lambda ctx, grads: self._second_derivative(ctx, *grads),
            setup_context=self._backward_context,
        )

        def count(names, factor, *shapes, out_shape=None, **kwargs):
            return factor * flops(**dict(zip(names, shapes, strict=True)))

        register_flop_formula(self.packet)(functools.partial(count, self.arguments, 1))
        register_flop_formula(packet)(functools.partial(count, self.backward_arguments, 2))
        self._function = _function(name, self.op, context, first)
        self._backward_function = _function(
            f"{name}_backward", self._backward_tuple, self._backward_context, self._second_derivative
        )

    def __call__(self, *inputs: Any) -> Tensor:
        """The first result; `inputs` are the arguments before `save`."""
        if run := self._exports.get(forced_backend() or ""):
            return _first(run(*inputs, *([False] if self.saves else [])))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.compiler.is_compiling():
            transformed = False
        else:
            transformed = torch._C._are_functorch_transforms_active()
            if _has_tangents(tensors, transformed):
                self._say("forward-mode derivatives have no kernel")
                return _first(self.reference(*inputs, *([False] if self.saves else [])))
        if self.saves:  # an exported program takes any length: do not fix its number of chunks
            save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            inputs = (*inputs, save and not torch.compiler.is_exporting())
        return _first(self._function.apply(*inputs) if transformed else self.op(*inputs))

    def _say(self, reason):
        """Warns that the reference runs, and why; silent if the operator has no kernel anyway."""
        if self.kernel is not None:
            fall_back(self.name, reason)

    def _resolve(self, *inputs):
        if self.kernel is None:
            return "reference"
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if tensors[0].device.type not in self.devices:
            return "reference"
        backend, reason = resolve(self.kernel, tensors[0].device), None
        if backend == "cuda":
            reason = compile_cuda.unsupported(tensors[0].device, *tensors)
        if self.limit and backend != "reference":
            reason = reason or self.limit(backend, *inputs)
        return backend if reason is None else fall_back(self.kernel, reason)

    def _run(self, *inputs):
        if "order" in self.arguments:
            check_entries(inputs[self.arguments.index("order")], inputs[0].shape[1])
        backend = self._resolve(*inputs)
        if backend != "reference" and self._forward:
            return self._forward(backend, *inputs)
        results = self.reference(*inputs)
        return tuple(x.contiguous() for x in results) if isinstance(results, tuple) else results.contiguous()

    def _run_backward(self, dy, *inputs):
        backend = self._resolve(*inputs)
        if backend != "reference" and self._backward:
            return self._backward(backend, dy, *inputs)
        run, tensors = self._differentiated(dict(zip(self.backward_arguments[1:], inputs, strict=True)))
        with _recording():
            leaves = [x.detach().requires_grad_() for x in tensors]
            grads = torch.autograd.grad(run(*leaves), leaves, dy, materialize_grads=True)
        return [g.contiguous() for g in grads]

    def _fake_backward(self, *inputs):
        named = dict(zip(self.backward_arguments, inputs, strict=True))
        like = {n: named[self.kept[0]] if n in self.drop else named[n] for n in self.differentiable}
        return [x.new_empty(x.shape) for x in like.values() if x is not None]

    def _differentiated(self, named):
        """The reference as a function of the differentiated tensors that are not None, and these tensors."""
        for name, restore in self.drop.items():
            named = named | {name: restore(**named)}
        named = named | ({"save": False} if self.saves else {})
        names = [n for n in self.differentiable if named[n] is not None]

        def run(*tensors):
            all_named = named | dict(zip(names, tensors, strict=True))
            return _first(self.reference(*(all_named[n] for n in self.arguments)))

        return run, [named[n] for n in names]

    def _adjoint(self, named):
        """The backward pass as a function that every PyTorch transform can differentiate."""
        run, tensors = self._differentiated({n: x for n, x in named.items() if n != "dy"})
        return torch.func.vjp(run, *tensors)[1](named["dy"])

    def _context(self, ctx, inputs, output):
        named = dict(zip(self.arguments, inputs, strict=True))
        results = output if isinstance(output, tuple) else (output,)
        named |= dict(zip(self.kept, results[len(results) - len(self.kept) :], strict=True))
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # no zeros for results that only the backward pass uses
        _save(ctx, [named[n] for n in self.backward_arguments[1:]])

    def _first_derivative(self, ctx, dy, *_):
        if dy is None:
            return (None,) * len(self.arguments)
        inputs = (dy, *_saved(ctx))
        active = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        grads = iter(self._backward_function.apply(*inputs) if active else self.backward_op(*inputs))
        named = dict(zip(self.backward_arguments, inputs, strict=True))
        present = [n for n in self.differentiable if n in self.drop or named[n] is not None]
        return tuple(next(grads) if n in present else None for n in self.arguments)

    def _backward_tuple(self, *inputs):
        return tuple(self.backward_op(*inputs))

    def _backward_context(self, ctx, inputs, output):
        _save(ctx, inputs)

    def _second_derivative(self, ctx, *grads):
        self._say("second derivatives have no kernel")
        named = dict(zip(self.backward_arguments, _saved(ctx), strict=True))
        names = [n for n in self.active if named[n] is not None]

        def run(*tensors):
            return self._adjoint(named | dict(zip(names, tensors, strict=True)))

        second = dict(zip(names, torch.func.vjp(run, *(named[n] for n in names))[1](grads), strict=True))
        return tuple(second.get(n) for n in self.backward_arguments)


def _first(results):
    return results[0] if isinstance(results, tuple) else results


def _save(ctx, inputs):
    """Keeps `inputs` for the backward pass; tensors through autograd's `save_for_backward`."""
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _saved(ctx):
    inputs = list(ctx.rest)
    for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
        inputs[i] = x
    return inputs


def _has_tangents(tensors, transformed):
    """Whether a forward-mode derivative is being taken."""
    if transformed:
        return any(level.key().name == "Jvp" for level in pyfunctorch.retrieve_all_functorch_interpreters())
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


@contextlib.contextmanager
def _recording():
    """Enables autograd inside an operator's implementation, where PyTorch's dispatcher has already passed it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _function(name, run, context, derivative):
    """`run` as an `autograd.Function` that takes part in `torch.func` transforms; `vmap` runs it sample by sample."""

    def vmap(info, in_dims, *inputs):
        samples = [
            function.apply(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    members = dict(forward=run, setup_context=context, backward=derivative, vmap=vmap)
    function = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})
    return function
