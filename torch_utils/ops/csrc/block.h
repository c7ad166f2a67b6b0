// The block contexts that kernel bodies are templated on: which threads run a body together.
//
// A context has nx * ny threads; this one is at (tx, ty). A thread computes `lanes` neighbors at a time. After sync,
// shared memory is complete. The threads of one ty work together on `rows` rows between two syncs.
// `past_caches`: whether results bypass the caches.
#pragma once
#include "portable.h"

namespace ops {

// One CPU thread is a whole block: loops over threads become loops over data, and sync does nothing.
template <int LANES, int ROWS = 1, bool PAST_CACHES = false>
struct SerialBlock {
  static constexpr int nx = 1, ny = 1, lanes = LANES, rows = ROWS;
  static constexpr bool past_caches = PAST_CACHES;
  KERNEL_FN int tx() const { return 0; }
  KERNEL_FN int ty() const { return 0; }
  KERNEL_FN void sync() const {}
};

// Steps over the rows of images: gives plane and row without a division for each.
struct RowWalk {
  int64_t plane;
  int32_t row;

  KERNEL_FN RowWalk(int64_t index, int32_t rows_per_plane)
      : plane(index / rows_per_plane), row(static_cast<int32_t>(index % rows_per_plane)) {}

  KERNEL_FN void advance(int32_t rows_per_plane) {
    if (++row == rows_per_plane) {
      row = 0;
      plane++;
    }
  }
};

}  // namespace ops
