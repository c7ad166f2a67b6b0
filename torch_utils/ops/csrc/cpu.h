// The entry points of the CPU kernels, which are compiled once for each instruction set level.
#pragma once
#include <cstdint>

#include "calls.h"

namespace ops {

// Elements in a tile of bias_act: the L1 cache holds several tiles.
constexpr int64_t kBiasActTile = 4096;

// Results of at least this many bytes bypass the caches, which would hold little of them when they are read.
constexpr int64_t kPastCaches = int64_t{1} << 25;

// Of the level that this is compiled for: whether stores can bypass the caches, and whether it is only the fallback for
// x86-64 CPUs without AVX2, for which fewer bodies are compiled.
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
  /* Compute rows [begin, end) of the result, counted over all planes. */                                 \
  void upfirdn2d(const Upfirdn2dCall& call, int64_t begin, int64_t end);                                  \
  /* Compute tiles [begin, end); sums: null, or a number per row of each tile, see bias_act_cpu.cpp */    \
  void bias_act(const BiasActCall& call, int64_t begin, int64_t end, double* sums);                       \
  }
DECLARE_CPU_LEVEL(plain)
DECLARE_CPU_LEVEL(avx2)
#undef DECLARE_CPU_LEVEL

}  // namespace ops
