// Run the kernel bodies of upfirdn2d on a GPU.
#include "gpu.h"
#include "launch.h"

namespace ops {
namespace {

constexpr int kLanes = 4;
constexpr int kRowsPerThread = 4;

// Blocks per multiprocessor, at least: leaves enough registers to avoid spills.
template <class T>
constexpr int kBlocks = sizeof(Sum<T>) == 8 ? 1 : 2;
constexpr int kChunk = 32;   // channels of a tile
constexpr int kPixels = 16;  // columns of a tile of kChunk channels

// The rows of threads in a block of at most 256 threads, given the bytes of shared memory per row: a power of 2.
constexpr int rows_of_threads(int nx, int bytes) {
  int ny = 256 / nx;
  while (ny > 1 && ny * bytes > 40960) ny /= 2;
  return ny;
}

// A tile has NX * kLanes * up columns and NX * NY threads; each ty computes one row at a time.
template <class K, class T, int NX, int NY>
__global__ void __launch_bounds__(NX * NY, kBlocks<T>) upfirdn2d_kernel(Upfirdn2dCall call, int64_t rows, int64_t tiles,
                                                           int32_t tiles_across) {
  using A = Sum<T>;
  constexpr int columns = NX * kLanes * K::up, pitch = K::buffer_columns(columns, kLanes);
  SHARED(A, taps, K::tap_count);
  SHARED(A, buffer, NY * K::buffer_rows * pitch);
  const GpuBlock<NX, NY, kLanes> block;
  load_taps<K>(block, call, static_cast<A*>(taps));
  block.sync();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    constexpr int each = NY * kRowsPerThread;
    const int64_t row = tile / tiles_across * each;
    const int32_t first = static_cast<int32_t>(tile % tiles_across) * columns;
    upfirdn2d_tile<K, T>(block, call, row, static_cast<int32_t>(rows - row < each ? rows - row : each), first,
                         smaller(columns, call.horizontal.out - first), static_cast<const A*>(taps),
                         static_cast<A*>(buffer), pitch);
  }
}

template <class K, class T, int NX, int NY>
__global__ void __launch_bounds__(NX * NY, kBlocks<T>) upfirdn2d_channels_kernel(Upfirdn2dCall call, int64_t rows, int64_t tiles,
                                                                    int32_t tiles_across, int32_t chunks) {
  using A = Sum<T>;
  constexpr int columns = K::buffer_columns(kPixels, 1);
  SHARED(A, taps, K::tap_count);
  SHARED(A, buffer, NY * K::buffer_rows * columns * kChunk);
  const GpuBlock<NX, NY, kLanes> block;
  load_taps<K>(block, call, static_cast<A*>(taps));
  block.sync();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    constexpr int each = NY * kRowsPerThread;
    const int32_t from = static_cast<int32_t>(tile % chunks) * kChunk;
    const int32_t first = static_cast<int32_t>(tile / chunks % tiles_across) * kPixels;
    const int64_t row = tile / chunks / tiles_across * each;
    upfirdn2d_channels_tile<K, kChunk, T>(block, call, row,
                                          static_cast<int32_t>(rows - row < each ? rows - row : each), first,
                                          smaller(kPixels, call.horizontal.out - first), from,
                                          smaller(kChunk, call.channels - from), static_cast<const A*>(taps),
                                          static_cast<A*>(buffer), columns);
  }
}

template <bool FULL, class T>
__global__ void __launch_bounds__(256, kBlocks<T>) upfirdn2d_anything_kernel(Upfirdn2dCall call, int64_t size) {
  const int64_t each = 1024;
  for (int64_t begin = blockIdx.x * each; begin < size; begin += gridDim.x * each) {
    const int64_t end = begin + each < size ? begin + each : size;
    upfirdn2d_anything<FULL, T>(GpuBlock<32, 8, 1>(), call, begin, end);
  }
}

template <class K, class T, int NX>
void launch_rows(const Upfirdn2dCall& call, cudaStream_t stream) {
  constexpr int columns = NX * kLanes * K::up;
  constexpr int bytes = K::buffer_rows * K::buffer_columns(columns, kLanes) * static_cast<int>(sizeof(Sum<T>));
  constexpr int ny = rows_of_threads(NX, bytes);
  const int64_t rows = call.planes * call.vertical.out;
  const int32_t across = static_cast<int32_t>(groups_of(columns, call.horizontal.out));
  const int64_t tiles = groups_of(ny * kRowsPerThread, rows) * across;
  LAUNCH((upfirdn2d_kernel<K, T, NX, ny>), blocks_for(tiles), dim3(NX, ny), stream, call, rows, tiles, across);
}

template <class K, class T>
void launch_channels(const Upfirdn2dCall& call, cudaStream_t stream) {
  constexpr int nx = 32;
  constexpr int bytes = K::buffer_rows * K::buffer_columns(kPixels, 1) * kChunk * static_cast<int>(sizeof(Sum<T>));
  constexpr int ny = rows_of_threads(nx, bytes);
  const int64_t rows = call.planes * call.vertical.out;
  const int32_t across = static_cast<int32_t>(groups_of(kPixels, call.horizontal.out));
  const int32_t chunks = static_cast<int32_t>(groups_of(kChunk, call.channels));
  const int64_t tiles = groups_of(ny * kRowsPerThread, rows) * across * chunks;
  LAUNCH((upfirdn2d_channels_kernel<K, T, nx, ny>), blocks_for(tiles), dim3(nx, ny), stream, call, rows, tiles,
         across, chunks);
}

template <class T>
void launch(const Upfirdn2dCall& call, cudaStream_t stream) {
  const bool ran = with_kind(call, [&](auto kind) {
    using K = decltype(kind);
    if (call.channels > 1) return launch_channels<K, T>(call, stream);
    // In narrow images too, every thread of a row has work.
    if (call.horizontal.out <= 8 * kLanes * K::up) return launch_rows<K, T, 8>(call, stream);
    return launch_rows<K, T, 32>(call, stream);
  });
  if (ran) return;
  const int64_t size = call.planes * call.vertical.out * call.horizontal.out * call.channels;
  const int64_t blocks = blocks_for(groups_of(1024, size));
  if (call.taps_xy != nullptr) {
    LAUNCH((upfirdn2d_anything_kernel<true, T>), blocks, dim3(32, 8), stream, call, size);
  } else {
    LAUNCH((upfirdn2d_anything_kernel<false, T>), blocks, dim3(32, 8), stream, call, size);
  }
}

}  // namespace

void launch_upfirdn2d(const Upfirdn2dCall& call, cudaStream_t stream) {
  with_scalar(call.scalar, [&](auto scalar) { launch<decltype(scalar)>(call, stream); });
}

}  // namespace ops
