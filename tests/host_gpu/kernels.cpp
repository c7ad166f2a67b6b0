// Run calls with the GPU's kernels.
#include "conversions.h"
#include "launch.h"

static void choose(const Manner& manner) {
  host_gpu::options.backwards = manner.backwards;
  host_gpu::options.most_blocks = manner.most_blocks;
  host_gpu::options.last_blocks = manner.last_blocks;
}

void run(const ops::Upfirdn2dCall& call, const Manner& manner) {
  choose(manner);
  ops::launch_upfirdn2d(call, nullptr);
}

void run(const ops::BiasActCall& call, const Manner& manner) {
  choose(manner);
  ops::launch_bias_act(call, nullptr);
}

void widen(ops::Scalar from, const void* x, float* y, int64_t count) { widen_by<1>(from, x, y, count); }
void narrow(ops::Scalar to, const float* x, void* y, int64_t count) { narrow_by<1>(to, x, y, count); }
