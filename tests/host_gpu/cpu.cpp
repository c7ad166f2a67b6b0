// Run calls with the CPU functions of one level (CPU_LEVEL), without threads, in several parts.
#include "cpu.h"

#include "bias_act.h"
#include "conversions.h"

namespace level = ops::CPU_LEVEL;

// Cut [0, count) into parts of 3, as threads would.
template <class Body>
static void in_parts(int64_t count, bool backwards, Body body) {
  const int64_t each = 3, parts = (count + each - 1) / each;
  for (int64_t i = 0; i < parts; i++) {
    const int64_t begin = (backwards ? parts - 1 - i : i) * each;
    body(begin, begin + each < count ? begin + each : count);
  }
}

void run(const ops::Upfirdn2dCall& call, const Manner& manner) {
  in_parts(call.planes * call.vertical.out, manner.backwards,
           [&](int64_t begin, int64_t end) { level::upfirdn2d(call, begin, end); });
}

void run(const ops::BiasActCall& call, const Manner& manner) {
  const ops::BiasRows grid(call);
  if (grid.rows == 0) return;
  const int64_t across = (grid.cols + ops::kBiasActTile - 1) / ops::kBiasActTile;
  const int64_t rows_each = across > 1 ? 1 : ops::kBiasActTile / grid.cols;
  in_parts((grid.rows + rows_each - 1) / rows_each * across, manner.backwards,
           [&](int64_t begin, int64_t end) { level::bias_act(call, begin, end, nullptr); });
}

void widen(ops::Scalar from, const void* x, float* y, int64_t count) { widen_by<8>(from, x, y, count); }
void narrow(ops::Scalar to, const float* x, void* y, int64_t count) { narrow_by<8>(to, x, y, count); }
