// Provide number formats and packs of numbers that compile for a host and for a GPU, without headers of either.
//
// gpu.h sets KERNELS_ON_GPU for a CUDA compiler. Packs are compiler vectors on a CPU, so each operation becomes one
// instruction regardless of the optimizer, and arrays on a GPU, where a thread computes a few neighbors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef KERNELS_ON_GPU
#define KERNEL_FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#elif defined(KERNELS_ON_HOST)
#define KERNEL_FN inline  // tests compile many variants, quickly
#define UNROLL
#else
#define KERNEL_FN inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif

#if !defined(KERNELS_ON_GPU) && !defined(KERNELS_ON_HOST)
#define PACKS_ARE_VECTORS
#endif

#if defined(__AVX2__) && defined(PACKS_ARE_VECTORS)
#define STORES_PASS_CACHES
#endif

#if (defined(__F16C__) && defined(PACKS_ARE_VECTORS)) || defined(STORES_PASS_CACHES)
#include <immintrin.h>
#endif

// For functions that code of every CPU level calls: a shared copy could be of a level that the CPU does not have.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace ops {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

KERNEL_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

KERNEL_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// widen: from the storage format to the format of sums
KERNEL_FN float widen(float value) { return value; }
KERNEL_FN double widen(double value) { return value; }
KERNEL_FN float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

KERNEL_FN float widen(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Place the exponent and mantissa in a float, which is then 2^-112 of the value, subnormal numbers included.
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u | (magnitude & 0x007fffffu) : 0;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);  // 2^112
  return float_of(sign | (special ? special : bits_of(scaled)));
#endif
}

// narrow: back to the storage format, to the nearest number, ties to even
template <class T>
KERNEL_FN T narrow(float value);
template <class T>
KERNEL_FN T narrow(double value);

template <>
KERNEL_FN float narrow<float>(float value) { return value; }
template <>
KERNEL_FN double narrow<double>(double value) { return value; }

template <>
KERNEL_FN BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u | (bits >> 16) : rounded >> 16)};
}

template <>
KERNEL_FN Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Half{static_cast<uint16_t>(sign | 0x7e00u)};  // NaN
  if (magnitude >= 0x477ff000u) return Half{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the lowest bits
    return Half{static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return Half{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// The format of sums for a storage format.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

// N numbers that are processed together.
template <class A, int N>
struct Pack {
#ifdef PACKS_ARE_VECTORS
  typedef A Lanes __attribute__((vector_size(N * sizeof(A))));
#else
  typedef A Lanes[N];
#endif
  Lanes lane;
};

template <class T, int N>
struct alignas(N * sizeof(T)) Aligned {
  T value[N];
};

template <class A, int N>
KERNEL_FN Pack<A, N> filled(A value) {
  Pack<A, N> result;
  UNROLL for (int i = 0; i < N; i++) result.lane[i] = value;
  return result;
}

// acc + p * w
template <class A, int N>
KERNEL_FN Pack<A, N> added(Pack<A, N> acc, Pack<A, N> p, A w) {
#ifdef PACKS_ARE_VECTORS
  acc.lane += p.lane * w;
#else
  for (int i = 0; i < N; i++) acc.lane[i] += p.lane[i] * w;
#endif
  return acc;
}

template <int N, class T>
KERNEL_FN Pack<Sum<T>, N> load(const T* from) {
  Pack<Sum<T>, N> result;
  for (int i = 0; i < N; i++) result.lane[i] = widen(from[i]);
  return result;
}

template <class A, int N, class T>
KERNEL_FN void store(T* to, Pack<A, N> p) {
  for (int i = 0; i < N; i++) to[i] = narrow<T>(A(p.lane[i]));
}

#ifdef PACKS_ARE_VECTORS
template <int N>
KERNEL_FN Pack<float, N> load(const float* from) {
  Pack<float, N> result;
  memcpy(&result, from, sizeof(result));
  return result;
}
template <int N>
KERNEL_FN Pack<double, N> load(const double* from) {
  Pack<double, N> result;
  memcpy(&result, from, sizeof(result));
  return result;
}
template <int N>
KERNEL_FN void store(float* to, Pack<float, N> p) { memcpy(to, &p, sizeof(p)); }
template <int N>
KERNEL_FN void store(double* to, Pack<double, N> p) { memcpy(to, &p, sizeof(p)); }
#endif

#if defined(__F16C__) && defined(PACKS_ARE_VECTORS)
template <>
KERNEL_FN Pack<float, 8> load<8, Half>(const Half* from) {
  __m128i bits;
  memcpy(&bits, from, sizeof(bits));
  const __m256 values = _mm256_cvtph_ps(bits);
  Pack<float, 8> result;
  memcpy(&result, &values, sizeof(result));
  return result;
}
template <>
KERNEL_FN void store<float, 8, Half>(Half* to, Pack<float, 8> p) {
  __m256 values;
  memcpy(&values, &p, sizeof(values));
  const __m128i bits = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &bits, sizeof(bits));
}
#endif

// Load or store in one access if the address is a multiple of its size. On a CPU, unaligned accesses cost the same.
template <int N, class T>
KERNEL_FN Pack<Sum<T>, N> load(const T* from, [[maybe_unused]] bool aligned) {
#ifndef PACKS_ARE_VECTORS
  if (aligned) {
    const Aligned<T, N> chunk = *reinterpret_cast<const Aligned<T, N>*>(from);
    return load<N>(chunk.value);
  }
#endif
  return load<N>(from);
}

template <class A, int N, class T>
KERNEL_FN void store(T* to, Pack<A, N> p, [[maybe_unused]] bool aligned) {
#ifndef PACKS_ARE_VECTORS
  if (aligned) {
    Aligned<T, N> chunk;
    store(chunk.value, p);
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(chunk) == 16) {  // some kernels would turn the assignment below into single stores
      uint32_t word[4];
      memcpy(word, &chunk, sizeof(word));
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]),
                   "r"(word[1]), "r"(word[2]), "r"(word[3])
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Aligned<T, N>*>(to) = chunk;
    return;
  }
#endif
  store(to, p);
}

// Store a result that is not read before much else has been written. PAST_CACHES: a CPU sends aligned packs straight to
// memory, which it would otherwise read before overwriting it; call `stores_done` afterwards.
template <bool PAST_CACHES, class A, int N, class T>
KERNEL_FN void store_result(T* to, Pack<A, N> p, bool aligned) {
#ifdef STORES_PASS_CACHES
  if constexpr (PAST_CACHES && sizeof(T) == sizeof(float) && N * sizeof(T) == sizeof(__m256)) {
    if (aligned) {
      __m256 values;
      memcpy(&values, &p, sizeof(values));
      return _mm256_stream_ps(to, values);
    }
  }
#endif
  store(to, p, aligned);
}

// Store the first numbers of a pack.
template <class A, int N, class T>
KERNEL_FN void store_some(T* to, Pack<A, N> p, int32_t count) {
  for (int32_t i = 0; i < count; i++) to[i] = narrow<T>(A(p.lane[i]));
}

// Store a row past the caches, except for parts that share a cache line with other rows.
// pack_at(i): the pack that begins at column i
template <class T, class PackAt>
KERNEL_FN void store_row(T* to, int32_t columns, PackAt pack_at) {
  constexpr int32_t line = 64 / sizeof(T), lanes = sizeof(pack_at(0).lane) / sizeof(pack_at(0).lane[0]);
  const int32_t misplaced = static_cast<int32_t>(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  const int32_t before = (line - misplaced) % line, begin = before < columns ? before : columns;
  const int32_t end = begin + (columns - begin) / line * line;
  const auto store_part = [&](int32_t i, int32_t limit) {
    for (; i + lanes <= limit; i += lanes) store(to + i, pack_at(i));
    if (i < limit) store_some(to + i, pack_at(i), limit - i);
  };
  store_part(0, begin);
  for (int32_t i = begin; i < end; i += lanes) store_result<true>(to + i, pack_at(i), true);
  store_part(end, columns);
}

// Make what `store_result` has stored past the caches visible to other threads.
ALWAYS_INLINE void stores_done() {
#ifdef STORES_PASS_CACHES
  _mm_sfence();
#endif
}

// Element by element: a + b, a * b, a * factor
template <class A, int N>
KERNEL_FN Pack<A, N> plus(Pack<A, N> a, Pack<A, N> b) {
#ifdef PACKS_ARE_VECTORS
  a.lane += b.lane;
#else
  for (int i = 0; i < N; i++) a.lane[i] += b.lane[i];
#endif
  return a;
}

template <class A, int N>
KERNEL_FN Pack<A, N> times(Pack<A, N> a, Pack<A, N> b) {
#ifdef PACKS_ARE_VECTORS
  a.lane *= b.lane;
#else
  for (int i = 0; i < N; i++) a.lane[i] *= b.lane[i];
#endif
  return a;
}

template <class A, int N>
KERNEL_FN Pack<A, N> scaled(Pack<A, N> a, A factor) {
#ifdef PACKS_ARE_VECTORS
  a.lane *= factor;
#else
  for (int i = 0; i < N; i++) a.lane[i] *= factor;
#endif
  return a;
}

// yes where test > 0, else no
template <class A, int N>
KERNEL_FN Pack<A, N> where_positive(Pack<A, N> test, Pack<A, N> yes, Pack<A, N> no) {
#ifdef PACKS_ARE_VECTORS
  yes.lane = test.lane > 0 ? yes.lane : no.lane;
#else
  for (int i = 0; i < N; i++) yes.lane[i] = test.lane[i] > 0 ? yes.lane[i] : no.lane[i];
#endif
  return yes;
}

// yes where -limit < test < limit, else 0
template <class A, int N>
KERNEL_FN Pack<A, N> where_within(Pack<A, N> test, A limit, Pack<A, N> yes) {
#ifdef PACKS_ARE_VECTORS
  const Pack<A, N> zero = filled<A, N>(0);
  yes.lane = (test.lane < limit) & (test.lane > -limit) ? yes.lane : zero.lane;
#else
  for (int i = 0; i < N; i++) yes.lane[i] = test.lane[i] < limit && test.lane[i] > -limit ? yes.lane[i] : 0;
#endif
  return yes;
}

// Limit to [-limit, limit]; NaN stays NaN.
template <class A, int N>
KERNEL_FN Pack<A, N> clamped(Pack<A, N> p, A limit) {
#ifdef PACKS_ARE_VECTORS
  const Pack<A, N> most = filled<A, N>(limit), least = filled<A, N>(-limit);
  p.lane = p.lane > most.lane ? most.lane : p.lane < least.lane ? least.lane : p.lane;
#else
  for (int i = 0; i < N; i++) p.lane[i] = p.lane[i] > limit ? limit : p.lane[i] < -limit ? -limit : p.lane[i];
#endif
  return p;
}

// Prefetch memory some bytes after an address into the L2 cache, which can have more requests under way than L1.
// Nothing is read, so the memory may lie outside an array.
KERNEL_FN void fetch_ahead([[maybe_unused]] const void* address, [[maybe_unused]] uintptr_t bytes) {
#ifdef PACKS_ARE_VECTORS
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + bytes), 0, 2);
#endif
}

// Every second number of (low, high): from the first on (even) and from the second on (odd)
template <class A, int N>
KERNEL_FN void deinterleave(Pack<A, N> low, Pack<A, N> high, Pack<A, N>& even, Pack<A, N>& odd) {
#ifdef PACKS_ARE_VECTORS
  if constexpr (N == 8) {
    even.lane = __builtin_shufflevector(low.lane, high.lane, 0, 2, 4, 6, 8, 10, 12, 14);
    odd.lane = __builtin_shufflevector(low.lane, high.lane, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    static_assert(N == 4);
    even.lane = __builtin_shufflevector(low.lane, high.lane, 0, 2, 4, 6);
    odd.lane = __builtin_shufflevector(low.lane, high.lane, 1, 3, 5, 7);
  }
#else
  for (int i = 0; i < N; i++) {
    even.lane[i] = (2 * i < N ? low : high).lane[2 * i % N];
    odd.lane[i] = (2 * i < N ? low : high).lane[2 * i % N + 1];
  }
#endif
}

// first[0], second[0], first[1], ... as two packs
template <class A, int N>
KERNEL_FN void interleave(Pack<A, N> first, Pack<A, N> second, Pack<A, N>& low, Pack<A, N>& high) {
#ifdef PACKS_ARE_VECTORS
  if constexpr (N == 8) {
    low.lane = __builtin_shufflevector(first.lane, second.lane, 0, 8, 1, 9, 2, 10, 3, 11);
    high.lane = __builtin_shufflevector(first.lane, second.lane, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(N == 4);
    low.lane = __builtin_shufflevector(first.lane, second.lane, 0, 4, 1, 5);
    high.lane = __builtin_shufflevector(first.lane, second.lane, 2, 6, 3, 7);
  }
#else
  for (int i = 0; i < N; i++) {
    (2 * i < N ? low : high).lane[2 * i % N] = first.lane[i];
    (2 * i < N ? low : high).lane[2 * i % N + 1] = second.lane[i];
  }
#endif
}

}  // namespace ops
