// Run the kernel bodies of bias_act on a CPU. Compiled once for each CPU level, which names the entry points.
#include "cpu.h"
#include "dispatch.h"

namespace ops::CPU_LEVEL {
namespace {

// Smooth activations call library functions for each number, and double is used to check derivatives; float sums are
// more accurate the more lanes share them.
template <class K, class T>
constexpr int kLanes = sizeof(T) == sizeof(double) || (K::form == Form::smooth && K::order != 1) ? 1 : 8;

template <class K, class T, bool PAST_CACHES>
using Block = SerialBlock<kLanes<K, T>, 1, PAST_CACHES>;

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
    bias_act_tile<K::order, K::form, CLAMPS, SUMS, T>(Block<K, T, PAST_CACHES>(), call, grid.cols, grid.bias_per_row,
                                                      row, static_cast<int32_t>(rows), first,
                                                      static_cast<int32_t>(cols), row_sums);
    if (SUMS && sums != nullptr) {
      for (int64_t r = 0; r < rows; r++) sums[(row + r) * across + tile % across] = row_sums[r];
    }
  }
  if constexpr (PAST_CACHES) stores_done();
}

// Bodies that training uses are compiled for each case. The others are compiled once for all cases: an infinite limit
// changes no result of order 0, and unused sums do no harm.
template <class K, class T>
constexpr bool kIsUsual = K::form == Form::lrelu && sizeof(T) == sizeof(float) && !kIsFallback;

template <class K, bool CLAMPS, bool SUMS, class T>
void tiles_of(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  if constexpr (kPassesCaches && kIsUsual<K, T>) {
    if (call.size * static_cast<int64_t>(sizeof(T)) >= kPastCaches) {
      return tiles_into<K, CLAMPS, SUMS, true, T>(call, begin, end, sums);
    }
  }
  tiles_into<K, CLAMPS, SUMS, false, T>(call, begin, end, sums);
}

template <class K, bool CLAMPS, class T>
void tiles_with_sums_or_not(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  if constexpr (K::order == 1 && kIsUsual<K, T>) {
    if (sums == nullptr) return tiles_of<K, CLAMPS, false, T>(call, begin, end, sums);
  }
  tiles_of<K, CLAMPS, K::order == 1, T>(call, begin, end, sums);
}

}  // namespace

void bias_act(const BiasActCall& call, int64_t begin, int64_t end, double* sums) {
  with_scalar(call.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    with_bias_act(call, [&](auto kind) {
      using K = decltype(kind);
      if constexpr (kIsUsual<K, T> || (K::order == 1 && K::form != Form::smooth)) {
        if (call.clamp == HUGE_VAL) return tiles_with_sums_or_not<K, false, T>(call, begin, end, sums);
      }
      tiles_with_sums_or_not<K, true, T>(call, begin, end, sums);
    });
  });
}

}  // namespace ops::CPU_LEVEL
