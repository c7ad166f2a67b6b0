// Provide threads, shared memory and launches: CUDA's, or stand-ins that run kernels on a host (KERNELS_ON_HOST).
#pragma once

#ifdef KERNELS_ON_HOST
#include "host_gpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KERNELS_ON_GPU
// LAUNCH(kernel, blocks, threads, stream, arguments...); a kernel name with commas goes in parentheses.
#define LAUNCH(kernel, blocks, threads, stream, ...) (kernel)<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
// SHARED(type, name, count) declares memory that the threads of a block share; its content is undefined at first.
#define SHARED(type, name, count) __shared__ type name[count]
#endif

#include "block.h"

namespace ops {

template <int NX, int NY, int LANES, int ROWS = 1>
struct GpuBlock {
  static constexpr int nx = NX, ny = NY, lanes = LANES, rows = ROWS;
  static constexpr bool past_caches = false;
  __device__ int tx() const { return static_cast<int>(threadIdx.x); }
  __device__ int ty() const { return static_cast<int>(threadIdx.y); }
  __device__ void sync() const { __syncthreads(); }
};

}  // namespace ops
