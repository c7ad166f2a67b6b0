// Run the kernel bodies of upfirdn2d on a CPU. Compiled once for each CPU level, which names the entry points.
#include "cpu.h"
#include "dispatch.h"

namespace ops::CPU_LEVEL {
namespace {

constexpr int kColumns = 512;    // of a tile: its buffer and a few image rows fit in the L1 cache
constexpr int kChunk = 64;       // channels of a tile
constexpr int kPixels = 16;      // columns of a tile of kChunk channels

constexpr int kLongRow = 256;    // columns

constexpr int kRows = 8;         // gathered before they are filtered, because what was just stored is slow to load

template <class T, bool PAST_CACHES = false>
using Block = SerialBlock<32 / sizeof(Sum<T>), kRows, PAST_CACHES>;

// Whether a format has a body of its own for a kind: those that training uses do. All others are rare and take
// upfirdn2d_anything, because each body takes a part of a second to compile.
template <class K, class T>
constexpr bool has_body() {
  const bool is_float = sizeof(T) == sizeof(float);
  if (K::full || sizeof(T) == sizeof(double)) return false;
  return K::taps == 4 ? is_float || !kIsFallback : is_float && !kIsFallback;
}

template <class K, bool PAST_CACHES, class T>
void rows_into(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
  using A = Sum<T>;
  constexpr int pitch = K::buffer_columns(kColumns, Block<T>::lanes);
  const Block<T, PAST_CACHES> block;
  alignas(64) A taps[K::tap_count];
  alignas(64) A buffer[kRows * K::buffer_rows * pitch];
  load_taps<K>(block, call, taps);
  const int32_t out = call.horizontal.out, rows = static_cast<int32_t>(end - begin);
  for (int32_t first = 0; first < out; first += kColumns) {
    upfirdn2d_tile<K, T>(block, call, begin, rows, first, smaller(kColumns, out - first), taps, buffer, pitch);
  }
  if constexpr (PAST_CACHES) stores_done();
}

template <class K, class T>
void rows_of(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
  if constexpr (kPassesCaches && sizeof(T) == sizeof(float) && K::taps == 4) {
    const int64_t width = call.horizontal.out, pixels = width * call.vertical.out;
    // Short rows are written too slowly for memory to be the limit, and rows of odd length share cache lines.
    if (width >= kLongRow && call.planes * pixels * static_cast<int64_t>(sizeof(T)) >= kPastCaches) {
      return rows_into<K, true, T>(call, begin, end);
    }
  }
  rows_into<K, false, T>(call, begin, end);
}

template <class K, class T>
void channel_rows_of(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
  using A = Sum<T>;
  constexpr int columns = K::buffer_columns(kPixels, 1);
  const Block<T> block;
  alignas(64) A taps[K::tap_count];
  alignas(64) A buffer[K::buffer_rows * columns * kChunk];
  load_taps<K>(block, call, taps);
  const int32_t out = call.horizontal.out, rows = static_cast<int32_t>(end - begin);
  for (int32_t first = 0; first < out; first += kPixels) {
    for (int32_t from = 0; from < call.channels; from += kChunk) {
      upfirdn2d_channels_tile<K, kChunk, T>(block, call, begin, rows, first, smaller(kPixels, out - first), from,
                                            smaller(kChunk, call.channels - from), taps, buffer, columns);
    }
  }
}

template <class T>
void run(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
  bool ran = false;
  with_kind(call, [&](auto kind) {
    using K = decltype(kind);
    if constexpr (has_body<K, T>()) {
      ran = true;
      if (call.channels == 1) return rows_of<K, T>(call, begin, end);
      channel_rows_of<K, T>(call, begin, end);
    }
  });
  if (ran) return;
  const int64_t row = static_cast<int64_t>(call.horizontal.out) * call.channels;
  if (call.taps_xy != nullptr) {
    upfirdn2d_anything<true, T>(SerialBlock<1>(), call, begin * row, end * row);
  } else {
    upfirdn2d_anything<false, T>(SerialBlock<1>(), call, begin * row, end * row);
  }
}

}  // namespace

void upfirdn2d(const Upfirdn2dCall& call, int64_t begin, int64_t end) {
  with_scalar(call.scalar, [&](auto scalar) { run<decltype(scalar)>(call, begin, end); });
}

}  // namespace ops::CPU_LEVEL
