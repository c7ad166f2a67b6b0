// Turn the arguments of an operator into a call: checks, layouts, results.
#pragma once
#include <ATen/ATen.h>

#include <limits>

#include "calls.h"

namespace ops {

inline Scalar scalar_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return Scalar::f16;
    case at::kBFloat16: return Scalar::bf16;
    case at::kFloat: return Scalar::f32;
    case at::kDouble: return Scalar::f64;
    default: TORCH_CHECK(false, "dtype is ", x.scalar_type(), "; expected a floating point type");
  }
}

inline at::ScalarType sum_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The layout of results: channels_last only if x is just that, else contiguous.
inline at::MemoryFormat layout_of(const at::Tensor& x) {
  const bool is_channels_last = x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return is_channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Make one axis of a call; checks that 32 bits hold every position on the spread axis.
inline Axis axis_of(const char* name, int64_t in, int64_t taps, int64_t up, int64_t down, int64_t before,
                    int64_t after) {
  TORCH_CHECK(up >= 1 && down >= 1, "upfirdn2d: ", name, " factors are ", up, " and ", down, "; expected at least 1");
  const int64_t padded = in * up + before + after;
  TORCH_CHECK(padded >= taps, "upfirdn2d: padded ", name, " is ", padded, "; expected at least the ", taps,
              " taps of the filter");
  const int64_t out = (padded - taps) / down + 1;
  const int64_t most = std::numeric_limits<int32_t>::max() / 4;
  for (int64_t size : {in * up, padded, out * down, std::abs(before), std::abs(after), taps}) {
    TORCH_CHECK(size < most, "upfirdn2d: ", name, " comes to ", size, "; expected less than ", most);
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  return {narrow(in), narrow(out), narrow(up), narrow(down), narrow(before), narrow(taps)};
}

// A call of upfirdn2d with the tensors it reads and writes; the implementation adds the taps.
struct Upfirdn2dWork {
  Upfirdn2dCall call{};
  at::Tensor x, y;
};

inline Upfirdn2dWork upfirdn2d_work(const at::Tensor& x, const at::Tensor& f, at::IntArrayRef up, at::IntArrayRef down,
                                    at::IntArrayRef padding, bool flip_filter, double gain) {
  TORCH_CHECK(x.dim() == 4, "upfirdn2d: x has ", x.dim(), " dimensions; expected [N, C, H, W]");
  TORCH_CHECK((f.dim() == 1 || f.dim() == 2) && f.numel() > 0, "upfirdn2d: filter is ", f.sizes(),
              "; expected [k] or [kh, kw]");
  TORCH_CHECK(f.device() == x.device(), "upfirdn2d: filter is on ", f.device(), " and x on ", x.device());
  TORCH_CHECK(up.size() == 2 && down.size() == 2 && padding.size() == 4, "upfirdn2d: expected 2 factors and 4 sides");
  Upfirdn2dWork work;
  Upfirdn2dCall& call = work.call;
  call.scalar = scalar_of(x);
  call.horizontal = axis_of("width", x.size(3), f.size(-1), up[0], down[0], padding[0], padding[1]);
  call.vertical = axis_of("height", x.size(2), f.size(0), up[1], down[1], padding[2], padding[3]);
  const auto layout = layout_of(x);
  const bool channels_last = layout == at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(x.size(1) < std::numeric_limits<int32_t>::max() / 4, "upfirdn2d: x has ", x.size(1), " channels");
  call.channels = channels_last ? static_cast<int32_t>(x.size(1)) : 1;
  call.planes = channels_last ? x.size(0) : x.size(0) * x.size(1);
  call.reversed = !flip_filter;
  call.gain = gain;
  work.x = x.contiguous(layout);
  work.y = at::empty({x.size(0), x.size(1), call.vertical.out, call.horizontal.out}, x.options().memory_format(layout));
  call.x = work.x.const_data_ptr();
  call.y = work.y.mutable_data_ptr();
  return work;
}

// A call of bias_act with the tensors it reads and writes. All have the dense layout of `like`.
struct BiasActWork {
  BiasActCall call{};
  at::Tensor x, b, out, dy, ddx, y;
};

inline BiasActWork bias_act_work(int32_t order, const at::Tensor& like, const std::optional<at::Tensor>& x,
                                 const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& out,
                                 const std::optional<at::Tensor>& dy, const std::optional<at::Tensor>& ddx, int64_t dim,
                                 int64_t act, double alpha, double gain, std::optional<double> clamp) {
  TORCH_CHECK(act >= 0 && act <= static_cast<int64_t>(Activation::swish), "bias_act: there is no activation ", act);
  BiasActWork work;
  BiasActCall& call = work.call;
  call.scalar = scalar_of(like);
  call.order = order;
  call.act = static_cast<Activation>(act);
  call.alpha = alpha;
  call.gain = gain;
  call.clamp = clamp.value_or(std::numeric_limits<double>::infinity());
  const auto layout = layout_of(like);
  const auto dense = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.sizes() == like.sizes() && tensor.scalar_type() == like.scalar_type() &&
                    tensor.device() == like.device(),
                "bias_act: got ", tensor.scalar_type(), tensor.sizes(), " beside ", like.scalar_type(), like.sizes());
    return tensor.contiguous(layout);
  };
  const auto take = [&](const std::optional<at::Tensor>& tensor, at::Tensor& kept) -> const void* {
    if (!tensor.has_value()) return nullptr;
    kept = dense(*tensor);
    return kept.const_data_ptr();
  };
  call.x = take(x, work.x);
  call.out = take(out, work.out);
  call.dy = take(dy, work.dy);
  call.ddx = take(ddx, work.ddx);
  work.y = at::empty(like.sizes(), like.options().memory_format(layout));
  call.y = work.y.mutable_data_ptr();
  call.size = like.numel();
  call.bias_size = call.step = 1;
  if (like.dim() > 0) {
    TORCH_CHECK(dim >= 0 && dim < like.dim(), "bias_act: dimension ", dim, " of ", like.sizes());
    call.bias_size = like.size(dim);
    call.step = work.y.stride(dim);
  }
  if (b.has_value()) {
    TORCH_CHECK(b->dim() == 1 && like.dim() > 0 && b->numel() == call.bias_size &&
                    b->scalar_type() == like.scalar_type() && b->device() == like.device(),
                "bias_act: bias is ", b->scalar_type(), b->sizes(), " along dimension ", dim, " of ", like.sizes());
    work.b = b->contiguous();
    call.b = work.b.const_data_ptr();
  }
  return work;
}

}  // namespace ops
