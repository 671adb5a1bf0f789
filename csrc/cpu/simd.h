// Vectors of the accumulation type, in the instruction set of this translation unit. Everything has internal linkage:
// the linker must not use code from here for a smaller instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../ms_deform_attn.h"

namespace msda::MSDA_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class A>
using Vector = typename VectorOf<A, kLanes<A>>::type;
template <class E, class A>
using Lanes = typename VectorOf<E, kLanes<A>>::type;  // with as many elements as Vector<A>
template <class A>
using Integers = Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, A>;  // as wide as A, like its comparisons

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  float result;
  if (magnitude < 0x0400) {  // zero or subnormal: units of 2^-24
    result = static_cast<float>(magnitude) * 0x1p-24f;
    uint32_t bits;
    std::memcpy(&bits, &result, sizeof(bits));
    bits |= sign;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x7f800000 - (0x7c00 << 13) : (127 - 15) << 23;
  const uint32_t bits = sign | ((magnitude << 13) + exponent);
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Round to nearest, ties to even.
inline BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}

inline Half to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint32_t result;
  if (bits > 0x7f800000) {
    result = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 2^16 or more
    result = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves the units of 2^-24 in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&result, &magnitude, sizeof(result));
    result -= 0x3f000000;
  } else {
    result = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

// Loads a vector from unaligned memory of any storage type.
inline Vector<float> load(const float* source) {
  Vector<float> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}
inline Vector<double> load(const double* source) {
  Vector<double> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}
inline Vector<float> load(const BFloat16* source) {
  Lanes<uint16_t, float> bits;
  std::memcpy(&bits, source, sizeof(bits));
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits, Lanes<uint32_t, float>) << 16);
}
inline Vector<float> load(const Half* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  return Vector<float>{to_float(source[0]), to_float(source[1]), to_float(source[2]), to_float(source[3])};
#endif
}

template <class A>
inline void store(A* target, Vector<A> x) {
  std::memcpy(target, &x, sizeof(x));
}

template <class A>
inline Integers<A> load_integers(const int32_t* source) {
  Lanes<int32_t, A> result;
  std::memcpy(&result, source, sizeof(result));
  return __builtin_convertvector(result, Integers<A>);
}

template <class A>
inline void store_integers(int32_t* target, Integers<A> x) {
  const Lanes<int32_t, A> result = __builtin_convertvector(x, Lanes<int32_t, A>);
  std::memcpy(target, &result, sizeof(result));
}

template <class A>
inline A lane_sum(Vector<A> x) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == sizeof(float)) return _mm512_reduce_add_ps(x);
#endif
  A sum = x[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) sum += x[lane];
  return sum;
}
template <class A>
inline A lane_max(Vector<A> x) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == sizeof(float)) return _mm512_reduce_max_ps(x);
#endif
  A largest = x[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

// Interleaves a and b: first their lower halves, then their upper halves.
template <class V>
inline void zip(V a, V b, V* target) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
#ifdef __clang__  // has no __builtin_shuffle, but compiles this to shuffles
  for (int i = 0; i < kCount; ++i) {
    target[0][i] = i % 2 ? b[i / 2] : a[i / 2];
    target[1][i] = i % 2 ? b[(kCount + i) / 2] : a[(kCount + i) / 2];
  }
#else
  decltype(a < b) low, high;
  for (int i = 0; i < kCount; ++i) {
    low[i] = i / 2 + i % 2 * kCount;
    high[i] = low[i] + kCount / 2;
  }
  target[0] = __builtin_shuffle(a, b, low);
  target[1] = __builtin_shuffle(a, b, high);
#endif
}

// Two vectors whose elements alternate in memory.
template <class A>
inline void load_interleaved(const A* source, Vector<A> (&target)[2]) {
  const Vector<A> a = load(source), b = load(source + kLanes<A>);
#ifdef __clang__
  for (int i = 0; i < 2 * kLanes<A>; ++i) target[i % 2][i / 2] = i < kLanes<A> ? a[i] : b[i - kLanes<A>];
#else
  Integers<A> even;
  for (int i = 0; i < kLanes<A>; ++i) even[i] = 2 * i;
  target[0] = __builtin_shuffle(a, b, even);
  target[1] = __builtin_shuffle(a, b, even + 1);
#endif
}

// Interleaves all vectors: their first elements, then their second ones, and so on.
template <class V, int N>
inline void interleave(const V (&x)[N], V (&target)[N]) {
  static_assert(N == 2 || N == 4);
  if constexpr (N == 2) {
    zip(x[0], x[1], target);
  } else {
    V even[2], odd[2];
    zip(x[0], x[2], even);
    zip(x[1], x[3], odd);
    zip(even[0], odd[0], target);
    zip(even[1], odd[1], target + 2);
  }
}

template <class A, int N>
inline void store_interleaved(A* target, const Vector<A> (&x)[N]) {
  Vector<A> result[N];
  interleave(x, result);
  for (int i = 0; i < N; ++i) store<A>(target + i * kLanes<A>, result[i]);
}
template <class A, int N>
inline void store_interleaved(int32_t* target, const Integers<A> (&x)[N]) {
  Integers<A> result[N];
  interleave(x, result);
  for (int i = 0; i < N; ++i) store_integers<A>(target + i * kLanes<A>, result[i]);
}

template <class A>
inline A largest(const A* x, int64_t count) {
  int64_t i = 0;
  A result = -__builtin_inff();
  if (count >= kLanes<A>) {
    Vector<A> each = load(x);
    for (i = kLanes<A>; i + kLanes<A> <= count; i += kLanes<A>) each = load(x + i) > each ? load(x + i) : each;
    result = lane_max<A>(each);
  }
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}
template <class A>
inline A sum(const A* x, int64_t count) {
  int64_t i = 0;
  A result = 0;
  if (count >= kLanes<A>) {
    Vector<A> each = load(x);
    for (i = kLanes<A>; i + kLanes<A> <= count; i += kLanes<A>) each += load(x + i);
    result = lane_sum<A>(each);
  }
  for (; i < count; ++i) result += x[i];
  return result;
}

// The sum of the products of two arrays.
template <class A>
inline A dot_product(const A* a, const A* b, int64_t count) {
  Vector<A> sum = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum += load(a + i) * load(b + i);
  A result = lane_sum<A>(sum);
  for (; i < count; ++i) result += a[i] * b[i];
  return result;
}

// The four sums over lanes.
template <class A>
inline void reduce4(const Vector<A> (&x)[4], A* target) {
#ifdef __AVX2__
  if constexpr (sizeof(A) == sizeof(float)) {
#ifdef __AVX512F__
    const __m512 ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
#else
    const __m256 ab = _mm256_unpacklo_ps(x[0], x[1]) + _mm256_unpackhi_ps(x[0], x[1]);
    const __m256 cd = _mm256_unpacklo_ps(x[2], x[3]) + _mm256_unpackhi_ps(x[2], x[3]);
    const __m256 half = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
#endif
    _mm_storeu_ps(target, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    A sum = x[i][0];
    for (int lane = 1; lane < kLanes<A>; ++lane) sum += x[i][lane];
    target[i] = sum;
  }
}

// Conversions of arrays between storage and accumulation types.
inline void widen(const float* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i];
}
inline void widen(const double* source, double* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i];
}
inline void widen(const BFloat16* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
}
inline void widen(const Half* source, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store<float>(target + i, load(source + i));
  for (; i < count; ++i) target[i] = to_float(source[i]);
}

inline void narrow(const float* source, float* target, int64_t count) { widen(source, target, count); }
inline void narrow(const double* source, double* target, int64_t count) { widen(source, target, count); }
inline void narrow(const float* source, BFloat16* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(source[i]);
}
inline void narrow(const float* source, Half* target, int64_t count) {
  int64_t i = 0;
#ifdef __AVX2__
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) target[i] = to_half(source[i]);
}

// Copies whole vectors between aligned addresses, bypassing the caches: the target's lines are not read first and evict
// nothing. Other threads may read the target after end_of_stream().
#ifdef __AVX2__
constexpr bool kStreams = true;
inline void stream(const void* source, void* target, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVectorBytes) {
    const auto* from = reinterpret_cast<const __m256i*>(static_cast<const char*>(source) + i);
    auto* to = reinterpret_cast<__m256i*>(static_cast<char*>(target) + i);
#ifdef __AVX512F__
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
#else
    _mm256_stream_si256(to, _mm256_load_si256(from));
#endif
  }
}
inline void end_of_stream() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void stream(const void*, void*, int64_t) {}
inline void end_of_stream() {}
#endif

// e^x for x <= 0 within 2 units in the last place; 0 below the smallest normal result. NaN stays NaN.
inline Vector<float> exp_of_nonpositive(Vector<float> x) {
  const Vector<float> clamped = x > -87.0f ? x : Vector<float>{} - 87.0f;
  const Integers<float> n = floor_to_int<Integers<float>>(clamped * 1.44269504f + 0.5f);
  const Vector<float> m = convert<Vector<float>>(n);
  const Vector<float> r = (clamped - m * 0.693359375f) + m * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vector<float> result = p * reinterpret_cast<Vector<float>>((n + 127) << 23);
  return x != x ? x : x < -87.0f ? Vector<float>{} : result;
}
inline Vector<double> exp_of_nonpositive(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace msda::MSDA_ISA

namespace msda {
template <>
struct ScalarOf<MSDA_ISA::Vector<float>> {
  using type = float;
};
template <>
struct ScalarOf<MSDA_ISA::Vector<double>> {
  using type = double;
};
}  // namespace msda
