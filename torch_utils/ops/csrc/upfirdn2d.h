// The kernel bodies of upfirdn2d, for any block context: resample and filter rows of images.
//
// A tile is a few rows of the result, or of a column range of it. Each row is computed in two stages. First the image
// rows that its vertical taps meet are gathered into a buffer (and filtered, if the filter is an outer product), with
// zeros outside the image. Then the buffer is filtered horizontally. Inserted zeros are not multiplied: of each phase,
// only the taps that fall on samples are read.
#pragma once
#include "block.h"
#include "calls.h"

namespace ops {

constexpr int kMostTaps = 32;  // in filters whose size is known only at run time; larger ones take upfirdn2d_anything

constexpr int kAhead = 4096;   // bytes that a CPU prefetches

// What a fast body is compiled for: the same factors and number of taps along both axes.
// TAPS: 0 means up to kMostTaps.  FULL: the filter is not an outer product.
template <int UP, int DOWN, int TAPS, bool FULL>
struct Kind {
  static constexpr int up = UP, down = DOWN, taps = TAPS, most_taps = TAPS ? TAPS : kMostTaps;
  static constexpr bool full = FULL;
  static constexpr int buffer_rows = FULL ? most_taps : 1;
  static constexpr int tap_count = FULL ? most_taps * most_taps : 2 * most_taps;

  // Columns that a buffer needs for a number of result columns: a multiple of `down`.
  static constexpr int buffer_columns(int columns, int lanes) {
    return ((columns * DOWN + most_taps + UP - 1) / UP + 2 * DOWN * lanes + 2 + DOWN - 1) / DOWN * DOWN;
  }

  // Where a buffer row of `pitch` columns keeps a column: those that outputs read with one tap stand side by side.
  static KERNEL_FN int32_t place(int32_t column, int32_t pitch) {
    return DOWN == 1 ? column : column / DOWN + column % DOWN * (pitch / DOWN);
  }
};

KERNEL_FN int32_t floor_div(int32_t a, int32_t b) { return a / b - (a % b < 0); }
KERNEL_FN int32_t ceil_div(int32_t a, int32_t b) { return floor_div(a + b - 1, b); }
KERNEL_FN int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
KERNEL_FN int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The samples that one output reads: `count` of them from `first` on, with the taps `tap`, tap + up, ...
struct Reach {
  int32_t first, tap, count;
};

// UP: the factor, or 0 if it is known only at run time
template <int UP>
KERNEL_FN Reach reach_of(Axis axis, int32_t j) {
  const int32_t up = UP ? UP : axis.up;
  const int32_t start = j * axis.down - axis.pad;
  Reach reach;
  reach.first = larger(ceil_div(start, up), 0);
  reach.tap = reach.first * up - start;
  reach.count = larger(smaller(floor_div(axis.taps - reach.tap + up - 1, up), axis.in - reach.first), 0);
  return reach;
}

// Copy the taps in the order in which they meet the image, with the gain in one of the factors. A sync must follow.
template <class K, class A, class Block>
KERNEL_FN void load_taps(Block b, Upfirdn2dCall c, A* taps) {
  const int32_t kx = c.horizontal.taps, ky = c.vertical.taps;
  const A gain = static_cast<A>(c.gain);
  const int32_t at = b.ty() * b.nx + b.tx(), step = b.nx * b.ny;
  if constexpr (K::full) {
    const A* from = static_cast<const A*>(c.taps_xy);
    for (int32_t i = at; i < kx * ky; i += step) taps[i] = from[c.reversed ? kx * ky - 1 - i : i] * gain;
  } else {
    const A *from_x = static_cast<const A*>(c.taps_x), *from_y = static_cast<const A*>(c.taps_y);
    for (int32_t i = at; i < kx; i += step) taps[i] = from_x[c.reversed ? kx - 1 - i : i];
    for (int32_t i = at; i < ky; i += step) taps[K::most_taps + i] = from_y[c.reversed ? ky - 1 - i : i] * gain;
  }
}

// Filter LANES neighbors along the other axis. N: number of rows, or 0 if only `count` gives it.
template <int N, int LANES, int STEP, class T, class A>
KERNEL_FN Pack<A, LANES> weighted(const T* from, int64_t pitch, const A* taps, int32_t count, bool aligned) {
  Pack<A, LANES> sum = filled<A, LANES>(0);
  if constexpr (N > 0) {
    UNROLL for (int q = 0; q < N; q++) sum = added(sum, load<LANES>(from + q * pitch, aligned), taps[q * STEP]);
  } else {
    for (int32_t q = 0; q < count; q++) sum = added(sum, load<LANES>(from + q * pitch, aligned), taps[q * STEP]);
  }
  return sum;
}

// First stage: the columns [lo, hi) of the image into a buffer row that begins at column `origin`.
template <class K, int N, int STEP, class T, class A, class Block>
KERNEL_FN void gather(Block b, const T* rows, int64_t width, const A* taps, int32_t count, int32_t lo, int32_t hi,
                      int32_t origin, bool aligned, A* buffer, int32_t pitch) {
  constexpr int lanes = Block::lanes, block = lanes * K::down;
  const int32_t whole = lo + (hi - lo) / block * block;
  A own[N ? N : 1];  // which the stores cannot alias
  for (int q = 0; q < N; q++) own[q] = taps[q * STEP];
  const auto sum_at = [&](int32_t col) {
    if constexpr (N > 0) return weighted<N, lanes, 1>(rows + col, width, own, count, aligned);
    if constexpr (N == 0) return weighted<0, lanes, STEP>(rows + col, width, taps, count, aligned);
  };
  for (int32_t col = lo + b.tx() * block; col < whole; col += b.nx * block) {
    // `down` image rows are new for each row of the result; a CPU's own prefetching does not go on to the next row.
    for (int q = 1; q <= K::down; q++) fetch_ahead(rows + (count - q) * width + col, kAhead);
    if constexpr (K::down == 1) {
      store(buffer + (col - origin), sum_at(col));
    } else {
      static_assert(K::down == 2);
      Pack<A, lanes> even, odd;
      deinterleave(sum_at(col), sum_at(col + lanes), even, odd);
      store(buffer + (col - origin) / 2, even);  // lo - origin is a multiple of 2
      store(buffer + (col - origin) / 2 + pitch / 2, odd);
    }
  }
  for (int32_t col = whole + b.tx(); col < hi; col += b.nx) {
    store(buffer + K::place(col - origin, pitch), weighted<N, 1, STEP>(rows + col, width, taps, count, false));
  }
}

// First stage of one row of the result: filter its image rows into one buffer row, or copy each into its own (FULL).
template <class K, class T, class A, class Block>
KERNEL_FN void gather_row(Block b, Upfirdn2dCall c, const T* x, RowWalk walk, const A* taps, int32_t lo, int32_t hi,
                          int32_t origin, bool aligned, A* buffer, int32_t pitch) {
  const int64_t width = c.horizontal.in;
  const Reach reach = reach_of<K::up>(c.vertical, walk.row);
  const T* rows = x + (walk.plane * c.vertical.in + reach.first) * width;
  if constexpr (K::full) {
    const A one = 1;
    for (int32_t q = 0; q < reach.count; q++) {
      gather<K, 1, 1>(b, rows + q * width, width, &one, 1, lo, hi, origin, aligned, buffer + q * pitch, pitch);
    }
  } else {
    constexpr int usual = K::taps % K::up ? 0 : K::taps / K::up;
    const A* taps_y = taps + K::most_taps + reach.tap;
    if (usual > 0 && reach.count == usual) {
      gather<K, usual, K::up>(b, rows, width, taps_y, usual, lo, hi, origin, aligned, buffer, pitch);
    } else {
      gather<K, 0, K::up>(b, rows, width, taps_y, reach.count, lo, hi, origin, aligned, buffer, pitch);
    }
  }
}

// Second stage, for one output; `at` is the output's first sample in the buffer row, `tap` the tap that meets it.
template <class K, class A>
KERNEL_FN A filtered_at(const A* buffer, int32_t pitch, const A* taps, int32_t num_taps, int32_t at, int32_t tap) {
  A sum = 0;
  for (int32_t m = tap; m < num_taps; m += K::up) sum += buffer[K::place(at + (m - tap) / K::up, pitch)] * taps[m];
  return sum;
}

// `up` = 1: LANES outputs, of which the first reads the columns from `at` on
template <class K, class A, int LANES>
KERNEL_FN Pack<A, LANES> filtered(const A* buffer, int32_t pitch, int32_t at, const A* taps, int32_t num_taps,
                                  Pack<A, LANES> sum) {
  const int32_t n = K::taps ? K::taps : num_taps;
  UNROLL for (int32_t m = 0; m < n; m++) sum = added(sum, load<LANES>(buffer + K::place(at + m, pitch)), taps[m]);
  return sum;
}

// The phase of `up` = 2 whose first tap is `tap`
template <class K, class A, int LANES>
KERNEL_FN Pack<A, LANES> filtered_phase(const A* buffer, const A* taps, int32_t num_taps, int32_t tap,
                                        Pack<A, LANES> sum) {
  const int32_t n = K::taps ? (K::taps + 1) / 2 : (num_taps - tap + 1) / 2;
  UNROLL for (int32_t q = 0; q < n; q++) {
    if (K::taps % 2 && tap + 2 * q >= K::taps) break;
    sum = added(sum, load<LANES>(buffer + q), taps[tap + 2 * q]);
  }
  return sum;
}

// Second stage of one row: outputs [first, first + cols) from the buffer rows of `count` image rows.
template <class K, class T, class A, class Block>
KERNEL_FN void scatter(Block b, Axis axis, const A* buffer, int32_t pitch, int32_t origin, const A* taps,
                       int32_t count, int32_t tap_step, int32_t first, int32_t cols, bool aligned, T* to) {
  constexpr int lanes = Block::lanes;
  constexpr int block = lanes * K::up;  // outputs of one step
  const int32_t whole = cols / block * block;
  const int32_t start = first * K::down - axis.pad;
  const int32_t at0 = ceil_div(start, K::up) - origin, tap0 = ceil_div(start, K::up) * K::up - start;
  [[maybe_unused]] const auto sum_at = [&](int32_t o) {  // of LANES outputs; buffers are longer than a row by that
    Pack<A, lanes> sum = filled<A, lanes>(0);
    for (int32_t q = 0; q < count; q++) {
      sum = filtered<K>(buffer + q * pitch + o, pitch, at0, taps + q * tap_step, axis.taps, sum);
    }
    return sum;
  };
  if constexpr (K::up == 1 && Block::past_caches) {
    return store_row(to + first, cols, sum_at);
  }
  for (int32_t o = b.tx() * block; o < whole; o += b.nx * block) {
    if constexpr (K::up == 1) {
      store(to + first + o, sum_at(o), aligned);
    } else {
      static_assert(K::up == 2 && K::down == 1);
      // Outputs alternate between two phases; the second begins a sample later where the first one's tap is 0.
      Pack<A, lanes> one = filled<A, lanes>(0), two = one, low, high;
      for (int32_t q = 0; q < count; q++) {
        const A* from = buffer + q * pitch + at0 + o / 2;
        const A* row_taps = taps + q * tap_step;
        one = filtered_phase<K>(from, row_taps, axis.taps, tap0, one);
        two = filtered_phase<K>(from + 1 - tap0, row_taps, axis.taps, 1 - tap0, two);
      }
      interleave(one, two, low, high);
      store_result<Block::past_caches>(to + first + o, low, aligned);
      store_result<Block::past_caches>(to + first + o + lanes, high, aligned);
    }
  }
  if constexpr (K::up == 1 && Block::nx == 1) {  // a pack takes no longer than a number
    if (cols < lanes) {
      store_some(to + first, sum_at(0), cols);
    } else if (whole < cols) {
      store(to + first + cols - lanes, sum_at(cols - lanes));  // some of them again
    }
    return;
  }
  for (int32_t o = whole + b.tx(); o < cols; o += b.nx) {
    const int32_t begin = start + o * K::down, sample = ceil_div(begin, K::up);
    A sum = 0;
    for (int32_t q = 0; q < count; q++) {
      sum += filtered_at<K>(buffer + q * pitch, pitch, taps + q * tap_step, axis.taps, sample - origin,
                            sample * K::up - begin);
    }
    to[first + o] = narrow<T>(sum);
  }
}

// NCHW: rows [first_row, first_row + rows) over all planes, columns [first, first + cols). `first` is a multiple of the
// up factor. Shared by the block: taps [K::tap_count], after load_taps and a sync; buffer [ny, Block::rows,
// K::buffer_rows, pitch], where pitch is K::buffer_columns(most columns, lanes).
template <class K, class T, class Block>
KERNEL_FN void upfirdn2d_tile(Block b, Upfirdn2dCall c, int64_t first_row, int32_t rows, int32_t first, int32_t cols,
                              const Sum<T>* taps, Sum<T>* buffer, int32_t pitch) {
  using A = Sum<T>;
  constexpr int lanes = Block::lanes, together = Block::rows;
  const Axis h = c.horizontal, v = c.vertical;
  const int32_t start = first * K::down - h.pad;
  const int32_t begin = ceil_div(start, K::up);
  const int32_t end = floor_div(start + (cols - 1) * K::down + h.taps - 1, K::up) + 1;
  const int32_t origin = floor_div(begin, lanes) * lanes;  // so that accesses can be aligned; even
  const int32_t lo = larger(origin, 0), hi = larger(smaller(end, h.in), lo);
  const bool aligned_in = h.in % lanes == 0 && reinterpret_cast<uintptr_t>(c.x) % (lanes * sizeof(T)) == 0;
  const bool aligned_out = h.out % lanes == 0 && first % lanes == 0 &&
                           reinterpret_cast<uintptr_t>(c.y) % (lanes * sizeof(T)) == 0;
  A* mine = buffer + b.ty() * together * K::buffer_rows * pitch;
  // Margins outside the image stay zero for all rows.
  for (int32_t row = 0; row < together * K::buffer_rows; row++) {
    A* own = mine + row * pitch;
    for (int32_t col = origin + b.tx(); col < smaller(lo, end); col += b.nx) own[K::place(col - origin, pitch)] = 0;
    for (int32_t col = hi + b.tx(); col < end; col += b.nx) own[K::place(col - origin, pitch)] = 0;
  }

  for (int32_t group = 0; group < rows; group += b.ny * together) {
    const int32_t r = group + b.ty() * together;
    const int32_t here = larger(smaller(together, rows - r), 0);
    const RowWalk at(first_row + r, v.out);
    RowWalk walk = at;
    for (int32_t i = 0; i < here; i++, walk.advance(v.out)) {
      gather_row<K>(b, c, static_cast<const T*>(c.x), walk, taps, lo, hi, origin, aligned_in,
                    mine + i * K::buffer_rows * pitch, pitch);
    }
    b.sync();
    walk = at;
    for (int32_t i = 0; i < here; i++, walk.advance(v.out)) {
      const Reach reach = reach_of<K::up>(v, walk.row);
      scatter<K>(b, h, mine + i * K::buffer_rows * pitch, pitch, origin, K::full ? taps + reach.tap * h.taps : taps,
                 K::full ? reach.count : 1, K::up * h.taps, first, cols, aligned_out,
                 static_cast<T*>(c.y) + (walk.plane * v.out + walk.row) * h.out);
    }
    b.sync();
  }
}

// channels_last: columns [first, first + cols) of rows [first_row, first_row + rows), channels [from, from + channels).
// The buffer is [ny, K::buffer_rows, K::buffer_columns(most columns, 1), CHUNK]; channels is at most CHUNK.
template <class K, int CHUNK, class T, class Block>
KERNEL_FN void upfirdn2d_channels_tile(Block b, Upfirdn2dCall c, int64_t first_row, int32_t rows, int32_t first,
                                       int32_t cols, int32_t from, int32_t channels, const Sum<T>* taps,
                                       Sum<T>* buffer, int32_t buffer_cols) {
  using A = Sum<T>;
  constexpr int lanes = Block::lanes;
  constexpr int across = CHUNK / lanes < Block::nx ? CHUNK / lanes : Block::nx;  // threads along the channels
  constexpr int along = Block::nx / across;
  const Axis h = c.horizontal, v = c.vertical;
  const int32_t start = first * K::down - h.pad;
  const int32_t origin = ceil_div(start, K::up);
  const int32_t end = floor_div(start + (cols - 1) * K::down + h.taps - 1, K::up) + 1;
  const int32_t whole = channels / lanes * lanes;
  const bool aligned_in = c.channels % lanes == 0 && from % lanes == 0 &&
                          reinterpret_cast<uintptr_t>(c.x) % (lanes * sizeof(T)) == 0;
  const bool aligned_out = c.channels % lanes == 0 && from % lanes == 0 &&
                           reinterpret_cast<uintptr_t>(c.y) % (lanes * sizeof(T)) == 0;
  const int32_t tx = b.tx() % across, column = b.tx() / across;
  const int64_t pitch = static_cast<int64_t>(h.in) * c.channels;
  A* mine = buffer + b.ty() * K::buffer_rows * buffer_cols * CHUNK;

  for (int32_t r = b.ty(); r - b.ty() < rows; r += b.ny) {
    const RowWalk walk(first_row + r, v.out);
    const Reach reach = reach_of<K::up>(v, walk.row);
    if (r < rows) {
      const T* image = static_cast<const T*>(c.x) + (walk.plane * v.in + reach.first) * pitch + from;
      const int32_t gathered = K::full ? reach.count : 1;
      for (int32_t q = 0; q < gathered; q++) {
        const T* row = image + q * pitch;
        const A one = 1;
        const A* taps_y = K::full ? &one : taps + K::most_taps + reach.tap;
        const int32_t count = K::full ? 1 : reach.count;
        for (int32_t col = origin + column; col < end; col += along) {
          A* to = mine + (q * buffer_cols + col - origin) * CHUNK;
          const bool outside = col < 0 || col >= h.in;
          const T* pixel = row + static_cast<int64_t>(outside ? 0 : col) * c.channels;
          const int32_t rows_here = outside ? 0 : count;
          constexpr int usual = K::full ? 1 : K::taps % K::up ? 0 : K::taps / K::up;
          if (usual > 0 && rows_here == usual) {
            for (int32_t i = tx * lanes; i < whole; i += across * lanes) {
              store(to + i, weighted<usual, lanes, K::up>(pixel + i, pitch, taps_y, usual, aligned_in));
            }
          } else {
            for (int32_t i = tx * lanes; i < whole; i += across * lanes) {
              store(to + i, weighted<0, lanes, K::up>(pixel + i, pitch, taps_y, rows_here, aligned_in));
            }
          }
          for (int32_t i = whole + tx; i < channels; i += across) {
            store(to + i, weighted<0, 1, K::up>(pixel + i, pitch, taps_y, rows_here, false));
          }
        }
      }
    }
    b.sync();
    if (r < rows) {
      T* to = static_cast<T*>(c.y) + (walk.plane * v.out + walk.row) * h.out * c.channels + from;
      const int32_t gathered = K::full ? reach.count : 1;
      for (int32_t o = column; o < cols; o += along) {
        const int32_t begin = start + o * K::down, sample = ceil_div(begin, K::up);
        const int32_t tap = sample * K::up - begin;
        const A* pixels = mine + (sample - origin) * CHUNK;
        T* pixel = to + static_cast<int64_t>(first + o) * c.channels;
        const A* row_taps = (K::full ? taps + reach.tap * h.taps : taps) + tap;
        const int32_t n = (h.taps - tap + K::up - 1) / K::up;
        constexpr int usual = K::taps % K::up ? 0 : K::taps / K::up;
        for (int32_t i = tx * lanes; i < whole; i += across * lanes) {
          Pack<A, lanes> sum = filled<A, lanes>(0);
          for (int32_t q = 0; q < gathered; q++) {
            const A* at = pixels + q * buffer_cols * CHUNK + i;
            const A* t = row_taps + q * K::up * h.taps;
            if constexpr (usual > 0) {
              UNROLL for (int m = 0; m < usual; m++) sum = added(sum, load<lanes>(at + m * CHUNK), t[m * K::up]);
            } else {
              for (int32_t m = 0; m < n; m++) sum = added(sum, load<lanes>(at + m * CHUNK), t[m * K::up]);
            }
          }
          store(pixel + i, sum, aligned_out);
        }
        for (int32_t i = whole + tx; i < channels; i += across) {
          A sum = 0;
          for (int32_t q = 0; q < gathered; q++) {
            for (int32_t m = 0; m < n; m++) {
              sum += pixels[(q * buffer_cols + m) * CHUNK + i] * row_taps[(q * h.taps + m) * K::up];
            }
          }
          pixel[i] = narrow<T>(sum);
        }
      }
    }
    b.sync();
  }
}

// Any factors and any number of taps: outputs [begin, end) of the dense result, one after the other. FULL as in Kind.
template <bool FULL, class T, class Block>
KERNEL_FN void upfirdn2d_anything(Block b, Upfirdn2dCall c, int64_t begin, int64_t end) {
  using A = Sum<T>;
  const Axis h = c.horizontal, v = c.vertical;
  const A *taps_x = static_cast<const A*>(FULL ? c.taps_xy : c.taps_x), *taps_y = static_cast<const A*>(c.taps_y);
  const int32_t turn_x = c.reversed ? h.taps - 1 : 0, turn_y = c.reversed ? v.taps - 1 : 0;
  const int32_t sign = c.reversed ? -1 : 1;
  for (int64_t i = begin + b.ty() * b.nx + b.tx(); i < end; i += b.nx * b.ny) {
    const int64_t channel = i % c.channels, pixel = i / c.channels;
    const int64_t row = pixel / h.out, plane = row / v.out;
    const Reach across = reach_of<0>(h, static_cast<int32_t>(pixel % h.out));
    const Reach down = reach_of<0>(v, static_cast<int32_t>(row % v.out));
    A total = 0;
    for (int32_t q = 0; q < down.count; q++) {
      const int32_t tap_y = turn_y + sign * (down.tap + q * v.up);
      const T* image = static_cast<const T*>(c.x) +
                       ((plane * v.in + down.first + q) * h.in + across.first) * c.channels + channel;
      A sum = 0;
      for (int32_t p = 0; p < across.count; p++) {
        const int32_t tap_x = turn_x + sign * (across.tap + p * h.up);
        sum += widen(image[static_cast<int64_t>(p) * c.channels]) * taps_x[FULL ? tap_y * h.taps + tap_x : tap_x];
      }
      total += FULL ? sum : sum * taps_y[tap_y];
    }
    static_cast<T*>(c.y)[i] = narrow<T>(total * static_cast<A>(c.gain));
  }
}

}  // namespace ops
