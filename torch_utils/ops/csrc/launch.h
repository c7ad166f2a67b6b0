// Launch the kernels of the operators on a GPU; sizes of grids.
#pragma once
#include "dispatch.h"
#include "gpu.h"

namespace ops {

// Start one operator on a stream. Errors of the launch are CUDA's to ask for.
void launch_upfirdn2d(const Upfirdn2dCall& call, cudaStream_t stream);
void launch_bias_act(const BiasActCall& call, cudaStream_t stream);

// How many groups of `size` hold `count` things.
constexpr int64_t groups_of(int64_t size, int64_t count) { return (count + size - 1) / size; }

// Blocks of a grid: one a tile, as far as a grid reaches; kernels walk over the rest.
constexpr unsigned blocks_for(int64_t tiles) { return static_cast<unsigned>(tiles < (1LL << 30) ? tiles : 1LL << 30); }

}  // namespace ops
