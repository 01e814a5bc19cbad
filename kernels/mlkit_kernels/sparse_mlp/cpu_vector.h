// Vectors of fp32 (GCC's and Clang's, for any CPU), bf16 in and out of them, and activations.
//
// -ffast-math is not used: it would drop the NaN rules. exp and tanh are Taylor polynomials after
// the usual reduction, with a relative error of some 1e-7; erf is formula 7.1.26 of Abramowitz and
// Stegun, with an absolute error of 1.5e-7.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kRegisters = 16;
#else
constexpr int64_t kLanes = 4, kRegisters = 32;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BF16 {
  uint16_t bits;
};

template <class To, class From>
inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

inline float widen(float v) { return v; }
inline float widen(BF16 v) { return as<float>(static_cast<uint32_t>(v.bits) << 16); }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BF16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)  // GCC 12 makes two halves and joins them
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return as<Vec>(__builtin_convertvector(h, Words) << 16);
#endif
}
inline Vec splat(float v) {
  return v - Vec{};  // adding zero would be an addition, as it changes -0
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(BF16* p, Vec v) {  // to the nearest, ties to even; NaN stays NaN
  const Words w = as<Words>(v);
  const Words near = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Halves h = __builtin_convertvector(v == v ? near : Words{} + 0x7fc0u, Halves);
  std::memcpy(p, &h, sizeof h);
}

// The first `count` elements, with zeros behind them.
template <class T>
inline Vec load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <class T>
inline void store(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  std::memcpy(p, part, count * sizeof(T));
}

inline float total(Vec v) {
  float part[kLanes], sum = 0.0f;
  std::memcpy(part, &v, sizeof v);
  for (int64_t l = 0; l < kLanes; ++l) sum += part[l];
  return sum;
}

#if defined(__AVX512BF16__)
constexpr bool kHasProducts = true;
// Adds the products of two vectors of bf16, two to a lane, in fp32.
inline Vec add_products(Vec sum, const BF16* a, const BF16* b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a),
                               (__m512bh)_mm512_loadu_si512(b));
}
#else
constexpr bool kHasProducts = false;
inline Vec add_products(Vec sum, const BF16*, const BF16*) { return sum; }
#endif

inline Vec exp(Vec x) {
  x = x > 88.0f ? splat(88.0f) : x;  // selects, so that NaN stays NaN
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec round = splat(12582912.0f);  // 1.5 x 2^23: adding it leaves an integer
  const Vec n = (x * 1.44269504f + round) - round;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline Vec tanh(Vec x) {
  const Vec s = x * x;
  Vec small = s * (62.0f / 2835) - 17.0f / 315;
  small = small * s + 2.0f / 15;
  small = small * s - 1.0f / 3;
  small = small * s * x + x;
  return s < 0.0625f ? small : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

inline Vec erf(Vec x) {
  const Vec z = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * z);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec y = 1.0f - p * t * exp(-z * z);
  return x < 0.0f ? -y : y;
}

// In the order of ACTIVATIONS in reference.py.
enum Activation : int64_t {
  kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kTanh, kSigmoid, kActivations
};

inline Vec activate(Vec a, int64_t kind) {
  switch (kind) {
    case kSilu:
      return a / (1.0f + exp(-a));
    case kGelu:
      return 0.5f * a * (1.0f + erf(a * 0.70710678f));
    case kGeluTanh:  // 1 + tanh(z) = 2 / (1 + exp(-2 z))
      return a / (1.0f + exp(-1.59576912f * (a + 0.044715f * a * a * a)));
    case kQuickGelu:
      return a / (1.0f + exp(-1.702f * a));
    case kRelu2:
      return a < 0.0f ? Vec{} : a * a;
    case kTanh:
      return tanh(a);
    case kSigmoid:
      return 1.0f / (1.0f + exp(-a));
    default:
      return a < 0.0f ? Vec{} : a;  // keeps NaN, as torch.relu does
  }
}

}  // namespace
