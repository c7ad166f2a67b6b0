// What kernels.cpp and cpu.cpp implement for the main program of these tests.
#pragma once
#include <cstdint>

#include "calls.h"

// How to run a call.
struct Manner {
  int64_t backwards;    // kernels: reverse the order of threads and blocks;  CPU: of the parts of a call
  int64_t most_blocks;  // kernels: the largest grid
  int64_t last_blocks;  // kernels: run only this many at the end of the grid; -1: all
};

void run(const ops::Upfirdn2dCall& call, const Manner& manner);
void run(const ops::BiasActCall& call, const Manner& manner);

// Convert numbers between a storage format and float.
void widen(ops::Scalar from, const void* x, float* y, int64_t count);
void narrow(ops::Scalar to, const float* x, void* y, int64_t count);
