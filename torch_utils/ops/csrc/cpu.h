// List the entry points of the CPU kernels, which are compiled once for each level of instructions.
#pragma once
#include <cstdint>

#include "calls.h"

namespace ops {

// A tile of bias_act: its elements fit in the first cache several times over.
constexpr int64_t kBiasActTile = 4096;

// Bytes of a result from which on it is stored past the caches, where little of it would be when it is read.
constexpr int64_t kPastCaches = int64_t{1} << 25;

// Of the level that this is compiled for: whether results can be stored past the caches, and whether it is but what an
// x86-64 CPU without AVX2 falls back to, for which fewer bodies are compiled.
#ifdef __AVX2__
constexpr bool kPassesCaches = true;
#else
constexpr bool kPassesCaches = false;
#endif
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool kIsFallback = true;
#else
constexpr bool kIsFallback = false;
#endif

#define DECLARE_CPU_LEVEL(level)                                                                          \
  namespace level {                                                                                       \
  /* Make rows [begin, end) of the result, counted over all planes. */                                    \
  void upfirdn2d(const Upfirdn2dCall& call, int64_t begin, int64_t end);                                  \
  /* Make tiles [begin, end); sums: null, or one number for each row of each tile, see bias_act_cpu.cpp */ \
  void bias_act(const BiasActCall& call, int64_t begin, int64_t end, double* sums);                       \
  }
DECLARE_CPU_LEVEL(plain)
DECLARE_CPU_LEVEL(avx2)
#undef DECLARE_CPU_LEVEL

}  // namespace ops
