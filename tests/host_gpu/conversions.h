// Convert arrays between storage formats and float with the code that kernels use.
#pragma once
#include "portable.h"
#include "program.h"

template <class T, int N>
void widen_all(const T* x, float* y, int64_t count) {
  for (int64_t i = 0; i + N <= count; i += N) ops::store(y + i, ops::load<N>(x + i));
  for (int64_t i = count / N * N; i < count; i++) y[i] = ops::widen(x[i]);
}

template <class T, int N>
void narrow_all(const float* x, T* y, int64_t count) {
  for (int64_t i = 0; i + N <= count; i += N) ops::store(y + i, ops::load<N>(x + i));
  for (int64_t i = count / N * N; i < count; i++) y[i] = ops::narrow<T>(x[i]);
}

template <int N>
void widen_by(ops::Scalar from, const void* x, float* y, int64_t count) {
  if (from == ops::Scalar::f16) widen_all<ops::Half, N>(static_cast<const ops::Half*>(x), y, count);
  if (from == ops::Scalar::bf16) widen_all<ops::BFloat16, N>(static_cast<const ops::BFloat16*>(x), y, count);
}

template <int N>
void narrow_by(ops::Scalar to, const float* x, void* y, int64_t count) {
  if (to == ops::Scalar::f16) narrow_all<ops::Half, N>(x, static_cast<ops::Half*>(y), count);
  if (to == ops::Scalar::bf16) narrow_all<ops::BFloat16, N>(x, static_cast<ops::BFloat16*>(y), count);
}
