// Make the operators differentiable to any order: each derivative is composed of operators.
//
// Only library.cpp includes it: PyTorch's headers take longer to compile than this file, and library.cpp reads them
// anyway.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "bias_act.h"

namespace differentiable {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using ops::Activation;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

// Whether a derivative is needed; no autograd node is made otherwise.
bool asks(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* tensor : tensors) {
    if (tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

MaybeTensor given(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }
Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// upfirdn2d: its own derivative, constant in the filter

Tensor call_upfirdn2d(const Tensor& x, const Tensor& f, SymIntArrayRef up, SymIntArrayRef down, SymIntArrayRef padding,
                      bool flip_filter, double gain) {
  static const auto op = find<decltype(call_upfirdn2d)>("lesion_ops::upfirdn2d");
  return op.call(x, f, up, down, padding, flip_filter, gain);
}

struct Upfirdn2d : Function<Upfirdn2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& f, SymIntArrayRef up, SymIntArrayRef down,
                        SymIntArrayRef padding, bool flip_filter, double gain) {
    ctx->saved_data["size"] = x.sym_sizes();
    ctx->saved_data["up"] = up;
    ctx->saved_data["down"] = down;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["flip_filter"] = flip_filter;
    ctx->saved_data["gain"] = gain;
    ctx->save_for_backward({f});
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_upfirdn2d(x, f, up, down, padding, flip_filter, gain);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto& saved = ctx->saved_data;
    const auto numbers = [&](const char* name) { return saved[name].toSymIntVector(); };
    const std::vector<SymInt> size = numbers("size"), up = numbers("up"), down = numbers("down");
    const std::vector<SymInt> padding = numbers("padding");
    const Tensor f = ctx->get_saved_variables()[0];
    variable_list result(7);
    if (size[2] == 0 || size[3] == 0) {  // the formula needs a first sample
      result[0] = grads[0].new_zeros_symint(size);
      return result;
    }
    // With taps f and the front padding p, output j is the sum of x[i] * f[down * j + taps - 1 - p - up * i]. The
    // derivative is the same formula with i and j exchanged and the taps reversed.
    std::vector<SymInt> sides;
    for (int axis = 0; axis < 2; axis++) {  // x, y
      const SymInt in = size[3 - axis], taps = f.sym_size(axis == 0 ? -1 : 0);
      const SymInt before = padding[2 * axis], after = padding[2 * axis + 1];
      const SymInt out = (in * up[axis] + before + after - taps) / down[axis] + 1;
      const SymInt front = taps - 1 - before;
      sides.insert(sides.end(), {front, (in - 1) * up[axis] + taps - out * down[axis] - front});
    }
    result[0] = call_upfirdn2d(grads[0], f, down, up, sides, !saved["flip_filter"].toBool(), saved["gain"].toDouble());
    return result;
  }
};

Tensor upfirdn2d(const Tensor& x, const Tensor& f, SymIntArrayRef up, SymIntArrayRef down, SymIntArrayRef padding,
                 bool flip_filter, double gain) {
  if (asks({&x})) return Upfirdn2d::apply(x, f, up, down, padding, flip_filter, gain);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_upfirdn2d(x, f, up, down, padding, flip_filter, gain);
}

// bias_act

struct Numbers {
  int64_t dim, act;
  double alpha, gain;
  std::optional<double> clamp;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["act"] = act;
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["gain"] = gain;
    ctx->saved_data["clamp"] = clamp;
  }

  static Numbers of(AutogradContext* ctx) {
    auto& saved = ctx->saved_data;
    return {saved["dim"].toInt(), saved["act"].toInt(), saved["alpha"].toDouble(), saved["gain"].toDouble(),
            saved["clamp"].toOptional<double>()};
  }

  Activation activation() const { return static_cast<Activation>(act); }
};

Tensor call_bias_act(const Tensor& x, const MaybeTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                     std::optional<double> clamp) {
  static const auto op = find<decltype(call_bias_act)>("lesion_ops::bias_act");
  return op.call(x, b, dim, act, alpha, gain, clamp);
}

std::tuple<Tensor, Tensor> call_bias_act_grad(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& b,
                                              const MaybeTensor& out, int64_t dim, int64_t act, double alpha,
                                              double gain, std::optional<double> clamp, bool sum_bias) {
  static const auto op = find<decltype(call_bias_act_grad)>("lesion_ops::bias_act_grad");
  return op.call(dy, x, b, out, dim, act, alpha, gain, clamp, sum_bias);
}

Tensor call_bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const MaybeTensor& b, int64_t dim,
                           int64_t act, double alpha, double gain, std::optional<double> clamp) {
  static const auto op = find<decltype(call_bias_act_grad2)>("lesion_ops::bias_act_grad2");
  return op.call(ddx, dy, x, b, dim, act, alpha, gain, clamp);
}

// Reshape a bias to lie along dimension `dim` of `dims`.
Tensor along_dimension(const Tensor& b, int64_t dim, int64_t dims) {
  std::vector<SymInt> sizes(dims, 1);
  if (dims > 0) sizes[dim] = -1;
  return b.reshape_symint(sizes);
}

Tensor bias_sum(const Tensor& grad, int64_t dim) {
  std::vector<int64_t> others;
  for (int64_t d = 0; d < grad.dim(); d++) {
    if (d != dim) others.push_back(d);
  }
  return others.empty() ? grad : grad.sum(others);
}

// The third derivative of the activation at x + b; 0 where the result is clamped.
Tensor third_derivative(const Tensor& x, const Tensor& b, const Numbers& n) {
  const Tensor v = b.defined() ? x + along_dimension(b, n.dim, x.dim()) : x;
  const auto below_zero = [&](double scale) {
    return at::where(v > 0, at::zeros_like(v), v.clamp_max(0).exp() * scale);
  };
  const auto of_logistic = [&](int order) {
    const Tensor s = at::sigmoid(v), slope = s * (1 - s);
    return order == 2 ? slope * (1 - 2 * s) : slope * (1 - 6 * slope);
  };
  Tensor third;
  switch (n.activation()) {
    case Activation::tanh: {
      const Tensor square = at::tanh(v).square();
      third = (1 - square) * (6 * square - 2);
      break;
    }
    case Activation::sigmoid: third = of_logistic(3); break;
    case Activation::elu: third = below_zero(1); break;
    case Activation::selu: third = below_zero(ops::kSeluScale<double> * ops::kSeluAlpha<double>); break;
    case Activation::softplus: third = of_logistic(2); break;
    case Activation::swish: third = 3 * of_logistic(2) + v * of_logistic(3); break;
    default: TORCH_CHECK(false, "bias_act: activation ", n.act, " has no third derivative");
  }
  if (!n.clamp.has_value()) return third;
  const Tensor value = call_bias_act(v.detach(), {}, n.dim, n.act, n.alpha, n.gain, {});
  return at::where(value.abs() <= *n.clamp, third, at::zeros_like(third));
}

struct BiasActGrad2 : Function<BiasActGrad2> {
  static Tensor forward(AutogradContext* ctx, const Tensor& ddx, const Tensor& dy, const Tensor& x,
                        const MaybeTensor& b, Numbers n) {
    n.save(ctx);
    ctx->save_for_backward({ddx, dy, x, or_undefined(b)});
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_bias_act_grad2(ddx, dy, x, b, n.dim, n.act, n.alpha, n.gain, n.clamp);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Numbers n = Numbers::of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &ddx = saved[0], &dy = saved[1], &x = saved[2], &b = saved[3], &grad = grads[0];
    const auto weighted = [&](const Tensor& other) {
      return call_bias_act_grad2(grad, other, x, given(b), n.dim, n.act, n.alpha, n.gain, n.clamp);
    };
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = weighted(dy);
    if (ctx->needs_input_grad(1)) result[1] = weighted(ddx);
    if (ctx->needs_input_grad(2) || (b.defined() && ctx->needs_input_grad(3))) {
      result[2] = grad * ddx * dy * n.gain * third_derivative(x, b, n);
      if (b.defined()) result[3] = bias_sum(result[2], n.dim);
    }
    return result;
  }
};

Tensor bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const MaybeTensor& b, int64_t dim,
                      int64_t act, double alpha, double gain, std::optional<double> clamp) {
  const Tensor bias = or_undefined(b);
  if (asks({&ddx, &dy, &x, &bias})) return BiasActGrad2::apply(ddx, dy, x, b, Numbers{dim, act, alpha, gain, clamp});
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_bias_act_grad2(ddx, dy, x, b, dim, act, alpha, gain, clamp);
}

struct BiasActGrad : Function<BiasActGrad> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const MaybeTensor& x, const MaybeTensor& b,
                               const MaybeTensor& out, Numbers n, bool sum_bias) {
    n.save(ctx);
    ctx->saved_data["sum_bias"] = sum_bias;
    if (sum_bias) ctx->saved_data["size"] = dy.sym_sizes();
    ctx->set_materialize_grads(false);
    // The derivative depends on dy only if the slope varies with x.
    ctx->save_for_backward({x.has_value() ? dy : Tensor(), or_undefined(x), or_undefined(b), or_undefined(out)});
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [dx, db] = call_bias_act_grad(dy, x, b, out, n.dim, n.act, n.alpha, n.gain, n.clamp, sum_bias);
    if (!sum_bias) ctx->mark_non_differentiable({db});
    return {dx, db};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Numbers n = Numbers::of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1], &b = saved[2], &out = saved[3];
    Tensor total = grads[0];
    if (ctx->saved_data["sum_bias"].toBool() && grads[1].defined()) {  // db is the sum of dx
      const std::vector<SymInt> size = ctx->saved_data["size"].toSymIntVector();
      const Tensor along = along_dimension(grads[1], n.dim, static_cast<int64_t>(size.size()));
      total = total.defined() ? total + along : along.expand_symint(size);
    }
    variable_list result(6);
    if (!total.defined()) return result;
    if (ctx->needs_input_grad(0)) {
      result[0] = std::get<0>(call_bias_act_grad(total, given(x), given(b), given(out), n.dim, n.act, n.alpha, n.gain,
                                                 n.clamp, false));
    }
    // Undefined tensors do not count in the numbering.
    if (x.defined() && (ctx->needs_input_grad(1) || (b.defined() && ctx->needs_input_grad(2)))) {
      result[1] = call_bias_act_grad2(total, dy, x, given(b), n.dim, n.act, n.alpha, n.gain, n.clamp);
      if (b.defined()) result[2] = bias_sum(result[1], n.dim);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> bias_act_grad(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& b,
                                         const MaybeTensor& out, int64_t dim, int64_t act, double alpha, double gain,
                                         std::optional<double> clamp, bool sum_bias) {
  const Tensor input = or_undefined(x), bias = or_undefined(b);
  if (asks({&dy, &input, &bias})) {
    variable_list results = BiasActGrad::apply(dy, x, b, out, Numbers{dim, act, alpha, gain, clamp}, sum_bias);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_bias_act_grad(dy, x, b, out, dim, act, alpha, gain, clamp, sum_bias);
}

struct BiasAct : Function<BiasAct> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& b, Numbers n) {
    n.save(ctx);
    ctx->saved_data["biased"] = b.has_value();
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = call_bias_act(x, b, n.dim, n.act, n.alpha, n.gain, n.clamp);
    }
    if (ops::uses_input(n.activation())) {
      ctx->save_for_backward({x, or_undefined(b), Tensor()});
    } else {
      // The result only tells which slope applies, so no derivative goes through it: it is kept as a constant.
      const bool is_constant = n.activation() == Activation::linear && !n.clamp.has_value();
      ctx->save_for_backward({Tensor(), Tensor(), is_constant ? Tensor() : y.detach()});
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Numbers n = Numbers::of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const bool sum_bias = ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(1);
    auto [dx, db] = call_bias_act_grad(grads[0], given(saved[0]), given(saved[1]), given(saved[2]), n.dim, n.act,
                                       n.alpha, n.gain, n.clamp, sum_bias);
    return {dx, sum_bias ? db : Tensor(), Tensor()};
  }
};

Tensor bias_act(const Tensor& x, const MaybeTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                std::optional<double> clamp) {
  const Tensor bias = or_undefined(b);
  if (asks({&x, &bias})) return BiasAct::apply(x, b, Numbers{dim, act, alpha, gain, clamp});
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_bias_act(x, b, dim, act, alpha, gain, clamp);
}

}  // namespace
}  // namespace differentiable

TORCH_LIBRARY_IMPL(lesion_ops, Autograd, library) {
  library.impl("upfirdn2d", differentiable::upfirdn2d);
  library.impl("bias_act", differentiable::bias_act);
  library.impl("bias_act_grad", differentiable::bias_act_grad);
  library.impl("bias_act_grad2", differentiable::bias_act_grad2);
}
