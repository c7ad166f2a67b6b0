// What one call of an operator needs: plain numbers and pointers, without types of PyTorch or CUDA.
#pragma once
#include <cstdint>

namespace ops {

enum class Scalar : int32_t { f16, bf16, f32, f64 };

// How one image axis is resampled. Output j starts at spread sample down * j - pad. Spread sample s is input s / up if
// up divides s, and zero otherwise and outside the image.
struct Axis {
  int32_t in, out;
  int32_t up, down;
  int32_t pad;   // zeros in front; negative crops
  int32_t taps;
};

// y = gain * downsample(filter(pad(spread(x)))). Images are dense [planes, height, width, channels]: channels is 1 for
// NCHW tensors, whose planes are N * C, and C for channels_last ones.
struct Upfirdn2dCall {
  Scalar scalar;        // of x and y; taps are double for f64, float otherwise
  const void* x;
  void* y;
  int64_t planes;
  int32_t channels;
  Axis horizontal, vertical;
  const void* taps_x;   // [kx], correlated with the image (already reversed for a convolution), or null
  const void* taps_y;   // [ky], or null
  const void* taps_xy;  // [ky, kx] if the filter is not an outer product, else null
  bool reversed;        // read the taps from last to first
  double gain;
};

enum class Activation : int32_t { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };

// order 0: y = clamp(gain * act(x + b))
// order 1: y = dy * dact, where dact is the derivative of order 0 in x
// order 2: y = ddx * dy * d2act, where d2act is the derivative of dact in x
// All arrays have one dense layout of `size` elements; element i has bias (i / step) % bias_size.
struct BiasActCall {
  Scalar scalar;
  int32_t order;
  Activation act;
  const void* x;        // order 0, and where the derivative needs it (uses_input)
  const void* b;        // null: no bias
  const void* out;      // result of order 0, for derivatives of linear, relu and lrelu
  const void* dy;       // orders 1 and 2
  const void* ddx;      // order 2
  void* y;
  int64_t size, bias_size, step;
  bool sums_bias;       // group rows by bias although b is null, because sums over them are needed
  double alpha, gain;
  double clamp;         // infinity: no limit
};

// Whether derivatives are computed from x and b, not from the result.
constexpr bool uses_input(Activation act) {
  return act != Activation::linear && act != Activation::relu && act != Activation::lrelu;
}

}  // namespace ops
