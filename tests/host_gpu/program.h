// What the main program of these tests asks of the code under test, which kernels.cpp and cpu.cpp answer.
#pragma once
#include <cstdint>

#include "calls.h"

// How to run a call.
struct Manner {
  int64_t backwards;    // kernels: the order of threads and blocks;  CPU: of the parts that a call is cut into
  int64_t most_blocks;  // kernels: cut grids to so many blocks
  int64_t last_blocks;  // kernels: run only so many at the end of the grid; -1 for all
};

void run(const ops::Upfirdn2dCall& call, const Manner& manner);
void run(const ops::BiasActCall& call, const Manner& manner);

// Convert numbers between a storage format and float.
void widen(ops::Scalar from, const void* x, float* y, int64_t count);
void narrow(ops::Scalar to, const float* x, void* y, int64_t count);
