// The kernel bodies of bias_act: add a bias, activate, scale and clamp rows of numbers; and the derivatives.
#pragma once
#include "block.h"
#include "calls.h"

namespace ops {

// How the elements are grouped in rows: all of one bias value, or, where neighbors have different biases, one of each.
struct BiasRows {
  int64_t rows, cols;
  bool bias_per_row;

  ALWAYS_INLINE explicit BiasRows(const BiasActCall& call) : bias_per_row(call.step > 1 || call.bias_size == 1) {
    const bool matters = call.b != nullptr || call.sums_bias;
    cols = !matters ? call.size : bias_per_row ? call.step : call.bias_size;
    rows = cols > 0 ? call.size / cols : 0;
  }
};

// The families with bodies of their own; the other activations are `smooth`, and chosen at run time.
enum class Form { linear, relu, lrelu, smooth };

KERNEL_FN float exponential(float v) { return expf(v); }
KERNEL_FN double exponential(double v) { return exp(v); }
KERNEL_FN float exponential_minus_1(float v) { return expm1f(v); }
KERNEL_FN double exponential_minus_1(double v) { return expm1(v); }
KERNEL_FN float logarithm_of_1_plus(float v) { return log1pf(v); }
KERNEL_FN double logarithm_of_1_plus(double v) { return log1p(v); }
KERNEL_FN float hyperbolic_tangent(float v) { return tanhf(v); }
KERNEL_FN double hyperbolic_tangent(double v) { return tanh(v); }

// 1 / (1 + exp(-v)); exp never overflows
template <class A>
KERNEL_FN A logistic(A v) {
  const A e = exponential(v > 0 ? -v : v);
  return (v > 0 ? 1 : e) / (1 + e);
}

// selu's constants: Klambauer et al. 2017
template <class A>
constexpr A kSeluScale = A(1.0507009873554804934193349852946);
template <class A>
constexpr A kSeluAlpha = A(1.6732632423543772848170429916717);

// The activation (ORDER 0), its first or its second derivative.
template <int ORDER, class A>
KERNEL_FN A smooth_value(Activation act, A v) {
  switch (act) {
    case Activation::tanh: {
      const A t = hyperbolic_tangent(v), slope = 1 - t * t;
      return ORDER == 0 ? t : ORDER == 1 ? slope : -2 * t * slope;
    }
    case Activation::sigmoid: {
      const A s = logistic(v), slope = s * (1 - s);
      return ORDER == 0 ? s : ORDER == 1 ? slope : slope * (1 - 2 * s);
    }
    case Activation::elu:
      if (v > 0) return ORDER == 0 ? v : ORDER == 1 ? 1 : 0;
      return ORDER == 0 ? exponential_minus_1(v) : exponential(v);
    case Activation::selu:
      if (v > 0) return ORDER == 0 ? kSeluScale<A> * v : ORDER == 1 ? kSeluScale<A> : 0;
      return kSeluScale<A> * kSeluAlpha<A> * (ORDER == 0 ? exponential_minus_1(v) : exponential(v));
    case Activation::softplus: {
      const A s = logistic(v);
      if (ORDER == 0) return (v > 0 ? v : 0) + logarithm_of_1_plus(exponential(v > 0 ? -v : v));
      return ORDER == 1 ? s : s * (1 - s);
    }
    case Activation::swish: {
      const A s = logistic(v), slope = s * (1 - s);
      return ORDER == 0 ? v * s : ORDER == 1 ? s + v * slope : slope * (2 + v * (1 - 2 * s));
    }
    default:
      return v;
  }
}

// LANES results from element `at` on, with their biases.
template <int ORDER, Form FORM, bool CLAMPS, int LANES, class T>
KERNEL_FN Pack<Sum<T>, LANES> bias_act_at(const BiasActCall& c, int64_t at, Pack<Sum<T>, LANES> bias, bool aligned) {
  using A = Sum<T>;
  using P = Pack<A, LANES>;
  const A gain = static_cast<A>(c.gain), alpha = static_cast<A>(c.alpha), limit = static_cast<A>(c.clamp);
  P result;
  if constexpr (ORDER == 0 && FORM != Form::smooth) {
    const P v = plus(load<LANES>(static_cast<const T*>(c.x) + at, aligned), bias);
    // A negated test, so that NaN stays NaN.
    if constexpr (FORM == Form::relu) result = scaled(where_positive(scaled(v, A(-1)), filled<A, LANES>(0), v), gain);
    if constexpr (FORM == Form::lrelu) result = where_positive(v, scaled(v, gain), scaled(v, gain * alpha));
    if constexpr (FORM == Form::linear) result = scaled(v, gain);
    return CLAMPS ? clamped(result, limit) : result;
  }
  if constexpr (ORDER == 1 && FORM != Form::smooth) {
    const P dy = load<LANES>(static_cast<const T*>(c.dy) + at, aligned);
    if constexpr (FORM == Form::linear && !CLAMPS) return scaled(dy, gain);
    const P out = load<LANES>(static_cast<const T*>(c.out) + at, aligned);
    const P sign = scaled(out, A(gain < 0 ? -1 : 1));  // of x + b
    if constexpr (FORM == Form::relu) result = where_positive(sign, scaled(dy, gain), filled<A, LANES>(0));
    if constexpr (FORM == Form::lrelu) result = where_positive(sign, scaled(dy, gain), scaled(dy, gain * alpha));
    if constexpr (FORM == Form::linear) result = scaled(dy, gain);
    // The limit, rounded as results are
    return CLAMPS ? where_within(out, static_cast<A>(widen(narrow<T>(limit))), result) : result;
  }
  if constexpr (FORM == Form::smooth) {
    const P v = plus(load<LANES>(static_cast<const T*>(c.x) + at, aligned), bias);
    P weight = filled<A, LANES>(gain);
    if constexpr (ORDER >= 1) weight = times(weight, load<LANES>(static_cast<const T*>(c.dy) + at, aligned));
    if constexpr (ORDER >= 2) weight = times(weight, load<LANES>(static_cast<const T*>(c.ddx) + at, aligned));
    for (int i = 0; i < LANES; i++) result.lane[i] = smooth_value<ORDER, A>(c.act, v.lane[i]);
    result = times(result, weight);
    if constexpr (ORDER == 0) return CLAMPS ? clamped(result, limit) : result;
    if constexpr (CLAMPS) {
      for (int i = 0; i < LANES; i++) {
        const A value = gain * smooth_value<0, A>(c.act, v.lane[i]);
        if (value > limit || value < -limit) result.lane[i] = 0;
      }
    }
    return result;
  }
}

// What `bias_act_tile` does, either for arrays that are always accessed at aligned addresses or for any. Two loops and
// not a choice at each access, because compilers would split that into single accesses.
template <int ORDER, Form FORM, bool CLAMPS, bool SUMS, bool ALIGNED, class T, class Block>
KERNEL_FN void bias_act_rows(Block b, const BiasActCall& c, int64_t row_length, bool bias_per_row, int64_t first_row,
                             int32_t rows, int64_t first, int32_t cols, Sum<T>* sums) {
  using A = Sum<T>;
  constexpr int lanes = Block::lanes;
  const T* biases = static_cast<const T*>(c.b);
  const bool varies = biases != nullptr && !bias_per_row;
  const int32_t whole = cols / lanes * lanes;
  for (int32_t r = b.ty(); r < rows; r += b.ny) {
    const int64_t row = first_row + r, base = row * row_length + first;
    Pack<A, lanes> bias = filled<A, lanes>(0), sum = bias;
    A tail_sum = 0;
    if (biases != nullptr && bias_per_row) bias = filled<A, lanes>(widen(biases[row % c.bias_size]));
    for (int32_t i = b.tx() * lanes; i < whole; i += b.nx * lanes) {
      if (varies) bias = load<lanes>(biases + first + i);
      const Pack<A, lanes> result = bias_act_at<ORDER, FORM, CLAMPS, lanes, T>(c, base + i, bias, ALIGNED);
      store_result<Block::past_caches>(static_cast<T*>(c.y) + base + i, result, ALIGNED);
      if constexpr (SUMS) sum = plus(sum, result);
    }
    for (int32_t i = whole + b.tx(); i < cols; i += b.nx) {
      const A own = varies ? widen(biases[first + i]) : bias.lane[0];
      const Pack<A, 1> result = bias_act_at<ORDER, FORM, CLAMPS, 1, T>(c, base + i, filled<A, 1>(own), false);
      store(static_cast<T*>(c.y) + base + i, result);
      if constexpr (SUMS) tail_sum += result.lane[0];
    }
    if constexpr (SUMS) {
      for (int i = 0; i < lanes; i++) tail_sum += sum.lane[i];
      sums[r * b.nx + b.tx()] = tail_sum;
    }
  }
}

// Rows [first_row, first_row + rows), columns [first, first + cols) of each. SUMS: write each row's sum, unrounded, to
// sums, one number for each of the nx threads of a row.
template <int ORDER, Form FORM, bool CLAMPS, bool SUMS, class T, class Block>
KERNEL_FN void bias_act_tile(Block b, BiasActCall c, int64_t row_length, bool bias_per_row, int64_t first_row,
                             int32_t rows, int64_t first, int32_t cols, Sum<T>* sums) {
#ifdef PACKS_ARE_VECTORS
  constexpr bool matters = Block::past_caches;
#else
  constexpr bool matters = true;
#endif
  constexpr int lanes = Block::lanes;
  const bool aligned = row_length % lanes == 0 && first % lanes == 0 &&
                       (reinterpret_cast<uintptr_t>(c.x) | reinterpret_cast<uintptr_t>(c.y) |
                        reinterpret_cast<uintptr_t>(c.dy) | reinterpret_cast<uintptr_t>(c.ddx) |
                        reinterpret_cast<uintptr_t>(c.out)) % (lanes * sizeof(T)) == 0;
  if constexpr (matters) {
    if (aligned) {
      return bias_act_rows<ORDER, FORM, CLAMPS, SUMS, true, T>(b, c, row_length, bias_per_row, first_row, rows, first,
                                                               cols, sums);
    }
  }
  bias_act_rows<ORDER, FORM, CLAMPS, SUMS, false, T>(b, c, row_length, bias_per_row, first_row, rows, first, cols,
                                                     sums);
}

}  // namespace ops
