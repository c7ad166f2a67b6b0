// Choose the kernel body for a call at run time.
#pragma once
#include "bias_act.h"
#include "calls.h"
#include "upfirdn2d.h"

namespace ops {

// Call body(T()) with the storage format of a scalar type.
template <class Body>
void with_scalar(Scalar scalar, Body body) {
  switch (scalar) {
    case Scalar::f16: return body(Half());
    case Scalar::bf16: return body(BFloat16());
    case Scalar::f32: return body(float());
    case Scalar::f64: return body(double());
  }
}

// Call body(Kind()) if there is one for these factors and filters; return whether there was.
template <class Body>
bool with_kind(const Upfirdn2dCall& call, Body body) {
  const Axis &h = call.horizontal, &v = call.vertical;
  if (h.up != v.up || h.down != v.down) return false;
  const bool is_4 = h.taps == 4 && v.taps == 4;
  const bool full = call.taps_xy != nullptr;
  if ((full && !is_4) || h.taps > kMostTaps || v.taps > kMostTaps) return false;
  const auto with_rate = [&](auto with_4, auto with_some, auto with_full) {
    if (full) {
      body(with_full);
    } else if (is_4) {
      body(with_4);
    } else {
      body(with_some);
    }
    return true;
  };
  if (h.up == 1 && h.down == 1) {
    return with_rate(Kind<1, 1, 4, false>(), Kind<1, 1, 0, false>(), Kind<1, 1, 4, true>());
  }
  if (h.up == 2 && h.down == 1) {
    return with_rate(Kind<2, 1, 4, false>(), Kind<2, 1, 0, false>(), Kind<2, 1, 4, true>());
  }
  if (h.up == 1 && h.down == 2) {
    return with_rate(Kind<1, 2, 4, false>(), Kind<1, 2, 0, false>(), Kind<1, 2, 4, true>());
  }
  return false;
}

template <int ORDER, Form FORM>
struct BiasActKind {
  static constexpr int order = ORDER;
  static constexpr Form form = FORM;
};

// Call body(BiasActKind()) with the order and the family of the activation.
template <class Body>
void with_bias_act(const BiasActCall& call, Body body) {
  const auto with_form = [&](auto linear, auto relu, auto lrelu, auto smooth) {
    switch (call.act) {
      case Activation::linear: return body(linear);
      case Activation::relu: return body(relu);
      case Activation::lrelu: return body(lrelu);
      default: return body(smooth);
    }
  };
  if (call.order == 0) {
    with_form(BiasActKind<0, Form::linear>(), BiasActKind<0, Form::relu>(), BiasActKind<0, Form::lrelu>(),
              BiasActKind<0, Form::smooth>());
  } else if (call.order == 1) {
    with_form(BiasActKind<1, Form::linear>(), BiasActKind<1, Form::relu>(), BiasActKind<1, Form::lrelu>(),
              BiasActKind<1, Form::smooth>());
  } else {
    body(BiasActKind<2, Form::smooth>());
  }
}

}  // namespace ops
