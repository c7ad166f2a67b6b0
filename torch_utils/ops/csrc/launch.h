// Launch the operators' kernels on a GPU; grid sizes.
#pragma once
#include "dispatch.h"
#include "gpu.h"

namespace ops {

// Start one operator on a stream. Ask CUDA for launch errors.
void launch_upfirdn2d(const Upfirdn2dCall& call, cudaStream_t stream);
void launch_bias_act(const BiasActCall& call, cudaStream_t stream);

// The number of groups of `size` that hold `count` items.
constexpr int64_t groups_of(int64_t size, int64_t count) { return (count + size - 1) / size; }

// Blocks in a grid: one per tile, up to the largest grid; kernels loop over the rest.
constexpr unsigned blocks_for(int64_t tiles) { return static_cast<unsigned>(tiles < (1LL << 30) ? tiles : 1LL << 30); }

}  // namespace ops
