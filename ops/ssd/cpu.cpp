// Causal state-space duality on the CPU.

#include "../matrix_scan.h"

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "ssd_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, Tensor(a!) packed, "
      "Tensor(b!) states) -> ()");
  m.def(
      "ssd_backward(Tensor dpacked, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, "
      "Tensor states, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dg, Tensor(e!) dbeta, "
      "Tensor(f!)? dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("ssd_forward", TORCH_BOX(&linzoo::forward<false>));
  m.impl("ssd_backward", TORCH_BOX(&linzoo::backward<false>));
}
