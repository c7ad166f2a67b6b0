// Run the operators on GPUs. The CPU library, which is loaded first, registers their schemas.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "tensors.h"

namespace ops {
// Also declared in launch.h, beside kernels.
void launch_upfirdn2d(const Upfirdn2dCall& call, cudaStream_t stream);
void launch_bias_act(const BiasActCall& call, cudaStream_t stream);
}  // namespace ops

namespace {

using at::Tensor;

Tensor upfirdn2d(const Tensor& x, const Tensor& f, at::IntArrayRef up, at::IntArrayRef down, at::IntArrayRef padding,
                 bool flip_filter, double gain) {
  const c10::cuda::CUDAGuard guard(x.device());
  auto work = ops::upfirdn2d_work(x, f, up, down, padding, flip_filter, gain);
  if (work.y.numel() == 0) return work.y;
  // The filter's values stay on the GPU: to check whether it is an outer product, the host would have to wait.
  const Tensor taps = f.to(ops::sum_type(x)).contiguous();
  if (taps.dim() == 1) {
    work.call.taps_x = work.call.taps_y = taps.const_data_ptr();
  } else {
    work.call.taps_xy = taps.const_data_ptr();
  }
  ops::launch_upfirdn2d(work.call, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return work.y;
}

Tensor run(const ops::BiasActWork& work) {
  if (work.call.size > 0) {
    ops::launch_bias_act(work.call, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return work.y;
}

Tensor bias_act(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, int64_t act, double alpha, double gain,
                std::optional<double> clamp) {
  const c10::cuda::CUDAGuard guard(x.device());
  return run(ops::bias_act_work(0, x, x, b, {}, {}, {}, dim, act, alpha, gain, clamp));
}

std::tuple<Tensor, Tensor> bias_act_grad(const Tensor& dy, const std::optional<Tensor>& x,
                                         const std::optional<Tensor>& b, const std::optional<Tensor>& out, int64_t dim,
                                         int64_t act, double alpha, double gain, std::optional<double> clamp,
                                         bool sum_bias) {
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor dx = run(ops::bias_act_work(1, dy, x, b, out, dy, {}, dim, act, alpha, gain, clamp));
  if (!sum_bias) return {dx, dy.new_empty({0})};
  std::vector<int64_t> others;
  for (int64_t d = 0; d < dx.dim(); d++) {
    if (d != dim) others.push_back(d);
  }
  return {dx, others.empty() ? dx.clone() : dx.sum(others)};
}

Tensor bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& b, int64_t dim,
                      int64_t act, double alpha, double gain, std::optional<double> clamp) {
  const c10::cuda::CUDAGuard guard(x.device());
  return run(ops::bias_act_work(2, x, x, b, {}, dy, ddx, dim, act, alpha, gain, clamp));
}

}  // namespace

TORCH_LIBRARY_IMPL(lesion_ops, CUDA, library) {
  library.impl("upfirdn2d", upfirdn2d);
  library.impl("bias_act", bias_act);
  library.impl("bias_act_grad", bias_act_grad);
  library.impl("bias_act_grad2", bias_act_grad2);
}
