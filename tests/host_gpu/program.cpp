// Run the calls of one file and write their results to another.
//
// A file is a sequence of records: an Order, followed by its arrays, whose sizes the Order gives. Every array is a heap
// block of exactly its size (or one element more, if the order asks for addresses that are not a multiple of two
// elements), so that AddressSanitizer sees accesses beyond it. Results are filled with NaN at first, so that elements
// that were not written show.
#include "program.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

enum class Work : int64_t { upfirdn2d, bias_act, widen, narrow };
constexpr int kMostArrays = 5;

// Array sizes are in bytes, -1 if there is none. If `whole_x` or `whole_y` is larger than the size of x or the result,
// the array is that long, and all but its end is zeros that take no memory until they are touched.
struct Order {
  Work work;
  Manner manner;
  int64_t shift;  // bytes by which x and the result (for bias_act: all but the bias) are moved
  int64_t arrays[kMostArrays];
  int64_t result, whole_x, whole_y;
  int64_t numbers[16];
  double reals[3];
};

[[noreturn]] void fail(const char* what) {
  perror(what);
  exit(3);
}

class Array {
 public:
  Array(int64_t size, int64_t whole, int64_t shift) : size_(size), whole_(whole) {
    if (whole > size && size >= 0) {
      mapped_ = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped_ == MAP_FAILED) fail("mmap");
      start_ = static_cast<char*>(mapped_);
      end_ = start_ + whole - size;
    } else if (size >= 0) {
      memory_.reset(static_cast<char*>(malloc(size + shift)));
      start_ = end_ = memory_.get() + shift;
      memset(end_, 0xff, size);
    }
  }
  Array(const Array&) = delete;
  ~Array() {
    if (mapped_ != nullptr) munmap(mapped_, whole_);
  }
  char* data() const { return start_; }
  char* end_part() const { return end_; }  // of the size given

  void read(FILE* file) {
    if (size_ > 0 && fread(end_, 1, size_, file) != static_cast<size_t>(size_)) fail("read an array");
  }
  void write(FILE* file) {
    if (size_ > 0 && fwrite(end_, 1, size_, file) != static_cast<size_t>(size_)) fail("write a result");
  }

 private:
  struct Free {
    void operator()(char* memory) { free(memory); }
  };
  int64_t size_, whole_;
  void* mapped_ = nullptr;
  std::unique_ptr<char, Free> memory_;
  char *start_ = nullptr, *end_ = nullptr;
};

ops::Axis axis(const int64_t* numbers) {
  const auto at = [&](int i) { return static_cast<int32_t>(numbers[i]); };
  return {.in = at(0), .out = at(1), .up = at(2), .down = at(3), .pad = at(4), .taps = at(5)};
}

void run_upfirdn2d(const Order& order, const void* const* arrays, void* result) {
  const int64_t* n = order.numbers;
  ops::Upfirdn2dCall call{.scalar = static_cast<ops::Scalar>(n[0]),
                          .x = arrays[0],
                          .y = result,
                          .planes = n[1],
                          .channels = static_cast<int32_t>(n[2]),
                          .horizontal = axis(n + 4),
                          .vertical = axis(n + 10),
                          .taps_x = arrays[1],
                          .taps_y = arrays[2],
                          .taps_xy = arrays[3],
                          .reversed = n[3] != 0,
                          .gain = order.reals[0]};
  run(call, order.manner);
}

void run_bias_act(const Order& order, const void* const* arrays, void* result) {
  const int64_t* n = order.numbers;
  ops::BiasActCall call{.scalar = static_cast<ops::Scalar>(n[0]),
                        .order = static_cast<int32_t>(n[1]),
                        .act = static_cast<ops::Activation>(n[2]),
                        .x = arrays[0],
                        .b = arrays[1],
                        .out = arrays[2],
                        .dy = arrays[3],
                        .ddx = arrays[4],
                        .y = result,
                        .size = n[3],
                        .bias_size = n[4],
                        .step = n[5],
                        .alpha = order.reals[0],
                        .gain = order.reals[1],
                        .clamp = order.reals[2]};
  run(call, order.manner);
}

void obey(const Order& order, const void* const* arrays, void* result) {
  const auto scalar = static_cast<ops::Scalar>(order.numbers[0]);
  switch (order.work) {
    case Work::upfirdn2d: return run_upfirdn2d(order, arrays, result);
    case Work::bias_act: return run_bias_act(order, arrays, result);
    case Work::widen: return widen(scalar, arrays[0], static_cast<float*>(result), order.result / 4);
    case Work::narrow: return narrow(scalar, static_cast<const float*>(arrays[0]), result, order.result / 2);
  }
}

}  // namespace

int main(int count, char** words) {
  FILE* input = count == 3 ? fopen(words[1], "rb") : nullptr;
  FILE* output = count == 3 ? fopen(words[2], "wb") : nullptr;
  if (input == nullptr || output == nullptr) fail("open the files");
  Order order;
  for (int64_t number = 0; fread(&order, sizeof(order), 1, input) == 1; number++) {
    std::vector<std::unique_ptr<Array>> memory;
    const void* arrays[kMostArrays];
    for (int i = 0; i < kMostArrays; i++) {
      const bool is_bias = order.work == Work::bias_act ? i == 1 : i > 0;
      memory.emplace_back(new Array(order.arrays[i], i == 0 ? order.whole_x : 0, is_bias ? 0 : order.shift));
      memory.back()->read(input);
      arrays[i] = memory.back()->data();
    }
    Array result(order.result, order.whole_y, order.shift);
    // Printed before the run, so that a sanitizer's report follows the name of the call.
    fprintf(stderr, "call %lld\n", static_cast<long long>(number));
    obey(order, arrays, result.data());
    result.write(output);
  }
  if (fclose(output) != 0) fail("write the results");
  return 0;
}
