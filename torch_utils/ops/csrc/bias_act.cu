// Run the kernel bodies of bias_act on a GPU.
#include "gpu.h"
#include "launch.h"

namespace ops {
namespace {

constexpr int kTileCols = 1024;  // of one row, at most
constexpr int kRowsPerThread = 4;
constexpr int kBlocks = 2;  // per multiprocessor, at least: leaves enough registers to avoid spills

template <class K, bool CLAMPS, class T, int NX, int NY>
__global__ void __launch_bounds__(NX * NY, kBlocks) bias_act_kernel(BiasActCall call, int64_t rows, int64_t cols,
                                                          bool bias_per_row, int64_t tiles, int64_t tiles_across) {
  constexpr int lanes = 16 / sizeof(T);
  constexpr int each = NY * kRowsPerThread;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / tiles_across * each, first = tile % tiles_across * kTileCols;
    bias_act_tile<K::order, K::form, CLAMPS, false, T>(
        GpuBlock<NX, NY, lanes>(), call, cols, bias_per_row, row,
        static_cast<int32_t>(rows - row < each ? rows - row : each), first,
        static_cast<int32_t>(cols - first < kTileCols ? cols - first : kTileCols), nullptr);
  }
}

template <class K, bool CLAMPS, class T, int NX>
void launch_rows(const BiasActCall& call, cudaStream_t stream) {
  constexpr int ny = 256 / NX;
  const BiasRows grid(call);
  const int64_t across = groups_of(kTileCols, grid.cols);
  const int64_t tiles = groups_of(ny * kRowsPerThread, grid.rows) * across;
  LAUNCH((bias_act_kernel<K, CLAMPS, T, NX, ny>), blocks_for(tiles), dim3(NX, ny), stream, call, grid.rows, grid.cols,
         grid.bias_per_row, tiles, across);
}

template <class K, bool CLAMPS, class T>
void launch(const BiasActCall& call, cudaStream_t stream) {
  const BiasRows grid(call);
  if (grid.cols <= 512) return launch_rows<K, CLAMPS, T, 8>(call, stream);
  launch_rows<K, CLAMPS, T, 128>(call, stream);
}

}  // namespace

void launch_bias_act(const BiasActCall& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto scalar) {
    with_bias_act(call, [&](auto kind) {
      using K = decltype(kind);
      using T = decltype(scalar);
      if constexpr (K::form != Form::smooth) {
        if (call.clamp == HUGE_VAL) return launch<K, false, T>(call, stream);
      }
      launch<K, true, T>(call, stream);  // an infinite limit changes nothing
    });
  });
}

}  // namespace ops
