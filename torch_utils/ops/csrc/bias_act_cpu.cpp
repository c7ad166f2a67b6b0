// Run the kernel bodies of bias_act on a CPU. Compiled once for each CPU level, which names the entry points.
#include "cpu.h"
#include "dispatch.h"

namespace ops::CPU_LEVEL {
namespace {

template <class T, bool PAST_CACHES>
using Block = SerialBlock<32 / sizeof(Sum<T>), 1, PAST_CACHES>;

// A tile is a part of one long row, or several short rows.
template <class K, bool CLAMPS, bool SUMS, bool PAST_CACHES, class T>
void tiles_into(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  const BiasRows grid(call);
  const int64_t across = grid.cols > kBiasActTile ? (grid.cols + kBiasActTile - 1) / kBiasActTile : 1;
  const int64_t rows_each = across > 1 ? 1 : kBiasActTile / grid.cols;
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t row = tile / across * rows_each, first = tile % across * kBiasActTile;
    const int64_t rows = grid.rows - row < rows_each ? grid.rows - row : rows_each;
    const int64_t cols = grid.cols - first < kBiasActTile ? grid.cols - first : kBiasActTile;
    Sum<T> row_sums[kBiasActTile];
    bias_act_tile<K::order, K::form, CLAMPS, SUMS, T>(Block<T, PAST_CACHES>(), call, grid.cols, grid.bias_per_row, row,
                                                      static_cast<int32_t>(rows), first, static_cast<int32_t>(cols),
                                                      row_sums);
    if constexpr (SUMS) {
      for (int64_t r = 0; r < rows; r++) sums[(row + r) * across + tile % across] = row_sums[r];
    }
  }
  if constexpr (PAST_CACHES) stores_done();
}

template <class K, bool CLAMPS, bool SUMS, class T>
void tiles_of(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  if constexpr (sizeof(T) == sizeof(float) && K::form != Form::smooth) {  // others are bound by arithmetic, or rare
    if (call.size * static_cast<int64_t>(sizeof(T)) >= kPastCaches) {
      return tiles_into<K, CLAMPS, SUMS, true, T>(call, begin, end, sums);
    }
  }
  tiles_into<K, CLAMPS, SUMS, false, T>(call, begin, end, sums);
}

}  // namespace

void bias_act(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  with_scalar(call.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    with_bias_act(call, [&](auto kind) {
      using K = decltype(kind);
      const bool clamps = call.clamp < HUGE_VAL;
      if constexpr (K::order == 1) {
        if (sums != nullptr) {
          return clamps ? tiles_of<K, true, true, T>(call, begin, end, sums)
                        : tiles_of<K, false, true, T>(call, begin, end, sums);
        }
      }
      clamps ? tiles_of<K, true, false, T>(call, begin, end, nullptr)
             : tiles_of<K, false, false, T>(call, begin, end, nullptr);
    });
  });
}

}  // namespace ops::CPU_LEVEL
