// Utilities of one byte, and the random numbers of their rounding (header.py).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

constexpr float kLargest = 3.4028234663852886e38f;  // of a utility

struct Codes {
  const float* value = nullptr;  // of each code
  float lowest = 1.0f;           // the value of code 1

  // code[k] = encode(decode(code[k]) + gain[k]); chunk k is identified by number + k.
  void add(uint8_t* code, const float* gain, int64_t chunks, uint32_t number, uint32_t seed) const {
    constexpr int kMost = 8;
    float sum[kMost] = {}, uniform[kMost], found[kMost];
    for (int64_t k = 0; k < chunks; ++k) sum[k] = value[code[k]] + gain[k];
    for (int k = 0; k < kMost; ++k) {
      sum[k] = std::min(sum[k], kLargest);
      uniform[k] = static_cast<float>(mix((number + k) ^ seed) >> 8) * 0x1p-24f;
      const float ratio = (sum[k] > lowest ? sum[k] : lowest) / lowest;
      found[k] = (sum[k] < lowest ? sum[k] / lowest : 1.0f + 8.0f * log2(ratio)) + uniform[k];
    }
    for (int64_t k = 0; k < chunks; ++k)
      code[k] = static_cast<uint8_t>(found[k] < 255.0f ? found[k] : 255.0f);
  }

 private:
  // Of x >= 1, within 2e-7: exponent, and atanh's series of the rest, which lies in
  // [sqrt(1/2), sqrt(2)).
  static float log2(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t shifted = bits - 0x3f3504f3u;
    const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
    bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
    float m;
    __builtin_memcpy(&m, &bits, sizeof m);
    const float z = (m - 1.0f) / (m + 1.0f), s = z * z;
    float p = 2.0f / 9;
    p = p * s + 2.0f / 7;
    p = p * s + 2.0f / 5;
    p = p * s + 2.0f / 3;
    p = p * s + 2.0f;
    return exponent + p * z * 1.44269504f;
  }
};

}  // namespace
