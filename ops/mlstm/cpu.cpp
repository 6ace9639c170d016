// The mLSTM on the CPU: the running maximum of its gates' logarithms, and its scan, whose decays are numbers.

#include "../matrix_scan.h"

namespace linzoo {
namespace {

// m_t = max(log_f_t + m_{t-1}, i_t), m_0 = i_0, of (B, L, H).
void maximum_forward(Tensor i_, Tensor log_f_, Tensor m_) {
  dispatch_states(i_, [&](auto type) {
    using T = decltype(type);
    const int64_t B = i_.size(0), L = i_.size(1), H = i_.size(2);
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t t = 0; t < L; ++t)
          for (int64_t h = 0; h < H; ++h) {
            const int64_t at = (b * L + t) * H + h;
            const T i = data<T>(i_)[at];
            data<T>(m_)[at] = t ? std::max(data<T>(log_f_)[at] + data<T>(m_)[at - H], i) : i;
          }
    });
  });
}

// Adds what the gradient of m is worth to those of i and log_f; each m is one of the two.
void maximum_backward(Tensor dm_, Tensor i_, Tensor log_f_, Tensor m_, Tensor di_, Tensor dlog_f_) {
  dispatch_states(i_, [&](auto type) {
    using T = decltype(type);
    const int64_t B = i_.size(0), L = i_.size(1), H = i_.size(2);
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> carried(H);
      for (int64_t b = begin; b < end; ++b) {
        std::fill(carried.begin(), carried.end(), T(0));
        for (int64_t t = L - 1; t >= 0; --t)
          for (int64_t h = 0; h < H; ++h) {
            const int64_t at = (b * L + t) * H + h;
            carried[h] += data<T>(dm_)[at];
            if (t && data<T>(log_f_)[at] + data<T>(m_)[at - H] > data<T>(i_)[at]) {
              data<T>(dlog_f_)[at] += carried[h];
            } else {
              data<T>(di_)[at] += carried[h];
              carried[h] = 0;
            }
          }
      }
    });
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def("mlstm_maximum_forward(Tensor i, Tensor log_f, Tensor(a!) m) -> ()");
  m.def("mlstm_maximum_backward(Tensor dm, Tensor i, Tensor log_f, Tensor m, Tensor(a!) di, Tensor(b!) dlog_f) -> ()");
  m.def(
      "mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, Tensor(a!) packed, "
      "Tensor(b!) states) -> ()");
  m.def(
      "mlstm_backward(Tensor dpacked, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, "
      "Tensor states, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dg, Tensor(e!) dbeta, "
      "Tensor(f!)? dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("mlstm_maximum_forward", TORCH_BOX(&linzoo::maximum_forward));
  m.impl("mlstm_maximum_backward", TORCH_BOX(&linzoo::maximum_backward));
  m.impl("mlstm_forward", TORCH_BOX(&linzoo::forward<false>));
  m.impl("mlstm_backward", TORCH_BOX(&linzoo::backward<false>));
}
