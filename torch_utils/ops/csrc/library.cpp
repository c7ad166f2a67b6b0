// Register the operators, and run them on CPUs. The only file of this library that reads PyTorch's headers.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "bias_act.h"
#include "cpu.h"
#include "tensors.h"

namespace {

using at::Tensor;
using ops::BiasActCall;
using ops::Upfirdn2dCall;

// Whether the bodies compiled for AVX2 run here; the build compiles them for x86-64.
bool has_avx2() {
#ifdef __x86_64__
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

std::string cpu_level() { return has_avx2() ? "AVX2" : "no AVX2"; }

void upfirdn2d_rows(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
#ifdef __x86_64__
  if (has_avx2()) return ops::avx2::upfirdn2d(call, begin, end);
#endif
  ops::plain::upfirdn2d(call, begin, end);
}

void bias_act_tiles(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
#ifdef __x86_64__
  if (has_avx2()) return ops::avx2::bias_act(call, begin, end, sums);
#endif
  ops::plain::bias_act(call, begin, end, sums);
}

constexpr int64_t kElementsPerTask = 32768;  // less does not pay for a thread

void run(const Upfirdn2dCall& call) {
  const int64_t row = std::max<int64_t>(int64_t{call.horizontal.out} * call.channels, 1);
  at::parallel_for(0, call.planes * call.vertical.out, std::max<int64_t>(kElementsPerTask / row, 1),
                   [&](int64_t begin, int64_t end) { upfirdn2d_rows(call, begin, end); });
}

// Factor a filter that is an outer product; results are equal up to rounding of the sums. Return whether it is one.
template <class A>
bool factored(const A* taps, int64_t ky, int64_t kx, A* taps_y, A* taps_x) {
  const int64_t largest = std::max_element(taps, taps + ky * kx, [](A a, A b) { return std::abs(a) < std::abs(b); }) -
                          taps;
  const A pivot = taps[largest];
  if (pivot == 0 || !std::isfinite(pivot)) return false;
  const int64_t py = largest / kx, px = largest % kx;
  for (int64_t x = 0; x < kx; x++) taps_x[x] = taps[py * kx + x];
  for (int64_t y = 0; y < ky; y++) taps_y[y] = taps[y * kx + px] / pivot;
  const A tolerance = 4 * std::numeric_limits<A>::epsilon();
  for (int64_t y = 0; y < ky; y++) {
    for (int64_t x = 0; x < kx; x++) {
      const A tap = taps[y * kx + x];
      if (!(std::abs(taps_y[y] * taps_x[x] - tap) <= tolerance * std::abs(tap))) return false;
    }
  }
  return true;
}

template <class A>
void run_full(Upfirdn2dCall call, const Tensor& taps) {
  const int64_t ky = taps.size(0), kx = taps.size(1);
  std::vector<A> taps_y(ky), taps_x(kx);
  if (factored(taps.const_data_ptr<A>(), ky, kx, taps_y.data(), taps_x.data())) {
    call.taps_x = taps_x.data();
    call.taps_y = taps_y.data();
  } else {
    call.taps_xy = taps.const_data_ptr();
  }
  run(call);
}

Tensor upfirdn2d(const Tensor& x, const Tensor& f, at::IntArrayRef up, at::IntArrayRef down, at::IntArrayRef padding,
                 bool flip_filter, double gain) {
  auto work = ops::upfirdn2d_work(x, f, up, down, padding, flip_filter, gain);
  if (work.y.numel() == 0) return work.y;
  const Tensor taps = f.to(ops::sum_type(x)).contiguous();
  if (taps.dim() == 1) {
    work.call.taps_x = work.call.taps_y = taps.const_data_ptr();
    run(work.call);
  } else if (ops::sum_type(x) == at::kDouble) {
    run_full<double>(work.call, taps);
  } else {
    run_full<float>(work.call, taps);
  }
  return work.y;
}

// The tiles of bias_act: see bias_act_cpu.cpp.
struct Tiles {
  int64_t rows, across, count;

  explicit Tiles(const BiasActCall& call) {
    const ops::BiasRows grid(call);
    across = grid.cols > ops::kBiasActTile ? (grid.cols + ops::kBiasActTile - 1) / ops::kBiasActTile : 1;
    const int64_t rows_each = across > 1 ? 1 : ops::kBiasActTile / std::max<int64_t>(grid.cols, 1);
    rows = grid.rows;
    count = (rows + rows_each - 1) / rows_each * across;
  }
};

void run(const BiasActCall& call, double* sums) {
  if (call.size == 0) return;
  at::parallel_for(0, Tiles(call).count, std::max<int64_t>(kElementsPerTask / ops::kBiasActTile, 1),
                   [&](int64_t begin, int64_t end) { bias_act_tiles(call, begin, end, sums); });
}

Tensor bias_act(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, int64_t act, double alpha, double gain,
                std::optional<double> clamp) {
  auto work = ops::bias_act_work(0, x, x, b, {}, {}, {}, dim, act, alpha, gain, clamp);
  run(work.call, nullptr);
  return work.y;
}

// Sum over all but the bias dimension, in the order of the elements for any number of threads.
Tensor bias_sums(const BiasActCall& call, const std::vector<double>& sums, const Tensor& like) {
  const int64_t across = Tiles(call).across, rows = Tiles(call).rows;
  std::vector<double> totals(call.bias_size, 0.0);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < across; i++) totals[row % call.bias_size] += sums[row * across + i];
  }
  return at::tensor(totals, like.options().dtype(at::kDouble)).to(like.scalar_type());
}

std::tuple<Tensor, Tensor> bias_act_grad(const Tensor& dy, const std::optional<Tensor>& x,
                                         const std::optional<Tensor>& b, const std::optional<Tensor>& out, int64_t dim,
                                         int64_t act, double alpha, double gain, std::optional<double> clamp,
                                         bool sum_bias) {
  auto work = ops::bias_act_work(1, dy, x, b, out, dy, {}, dim, act, alpha, gain, clamp);
  BiasActCall& call = work.call;
  if (!sum_bias) {
    run(call, nullptr);
    return {work.y, dy.new_empty({0})};
  }
  if (call.size == 0) return {work.y, dy.new_zeros({dy.dim() > 0 ? dy.size(dim) : 1})};
  call.sums_bias = true;
  if (!ops::BiasRows(call).bias_per_row) {
    run(call, nullptr);
    std::vector<int64_t> others;
    for (int64_t d = 0; d < dy.dim(); d++) {
      if (d != dim) others.push_back(d);
    }
    return {work.y, others.empty() ? work.y.clone() : work.y.sum(others)};
  }
  std::vector<double> sums(Tiles(call).rows * Tiles(call).across);
  run(call, sums.data());
  return {work.y, bias_sums(call, sums, dy)};
}

Tensor bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                      int64_t act, double alpha, double gain, std::optional<double> clamp) {
  TORCH_CHECK(ops::uses_input(static_cast<ops::Activation>(act)), "bias_act_grad2: activation ", act,
              " has no second derivative");
  auto work = ops::bias_act_work(2, x, x, b, {}, dy, ddx, dim, act, alpha, gain, clamp);
  run(work.call, nullptr);
  return work.y;
}

}  // namespace

TORCH_LIBRARY(lesion_ops, library) {
  library.def("cpu_level() -> str", cpu_level);
  library.def(
      "upfirdn2d(Tensor x, Tensor f, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip_filter, float gain) -> "
      "Tensor");
  library.def(
      "bias_act(Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float? clamp) -> Tensor");
  library.def(
      "bias_act_grad(Tensor dy, Tensor? x, Tensor? b, Tensor? out, int dim, int act, float alpha, float gain, "
      "float? clamp, bool sum_bias) -> (Tensor, Tensor)");
  library.def(
      "bias_act_grad2(Tensor ddx, Tensor dy, Tensor x, Tensor? b, int dim, int act, float alpha, float gain, "
      "float? clamp) -> Tensor");
}

TORCH_LIBRARY_IMPL(lesion_ops, CPU, library) {
  library.impl("upfirdn2d", upfirdn2d);
  library.impl("bias_act", bias_act);
  library.impl("bias_act_grad", bias_act_grad);
  library.impl("bias_act_grad2", bias_act_grad2);
}
