// Products of rows of a weight matrix with a few tokens, the rows being read once for all of them.
//
// The sums of R rows and T tokens stay in registers. While rows are used, those at a distance of
// `ahead` elements are requested from memory: the caller says where it will be next.

#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu_vector.h"

namespace {

constexpr int64_t kBlock = 8;  // tokens that share one load of a weight

// Rows at a time, at most 8, for which the sums of `tokens` tokens stay in registers.
constexpr int rows_for(int tokens) {
  int rows = 8;
  while (rows > 1 && rows * tokens > kRegisters / 2) rows /= 2;
  return rows;
}

// out[r][t] = row[r] . x[t]
template <int R, int T, class W, class X>
inline void dots(const W* const* row, int64_t ahead, const X* const* x, int64_t n,
                 float (*out)[T]) {
  constexpr bool kProducts = std::is_same_v<X, BF16>;
  constexpr int64_t kStep = kProducts ? 2 * kLanes : kLanes;
  Vec acc[R][T] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + i + ahead, 0, 3);
    if constexpr (kProducts) {
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) acc[r][t] = add_products(acc[r][t], row[r] + i, x[t] + i);
    } else {
      Vec w[R];
      for (int r = 0; r < R; ++r) w[r] = load(row[r] + i);
      for (int t = 0; t < T; ++t) {
        const Vec v = load(x[t] + i);
        for (int r = 0; r < R; ++r) acc[r][t] += w[r] * v;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float sum = total(acc[r][t]);
      for (int64_t l = i; l < n; ++l) sum += widen(row[r][l]) * widen(x[t][l]);
      out[r][t] = sum;
    }
}

// y[t] += sum over k of h[k][t] * row[k]
template <int K, int T, class W>
inline void axpys(const float (*h)[T], const W* const* row, int64_t ahead, float* const* y,
                  int64_t n) {
  constexpr int V = std::is_same_v<W, BF16> ? 2 : 1;  // vectors that share a factor
  const W* from[K];  // copies that no store can change
  float* to[T];
  std::copy_n(row, K, from);
  std::copy_n(y, T, to);
  int64_t i = 0;
  for (; i + V * kLanes <= n; i += V * kLanes) {
    Vec w[K][V];
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(from[k] + i + v * kLanes + ahead, 0, 3);
        w[k][v] = load(from[k] + i + v * kLanes);
      }
    for (int t = 0; t < T; ++t) {
      Vec sum[V];
      for (int v = 0; v < V; ++v) sum[v] = load(to[t] + i + v * kLanes);
      for (int k = 0; k < K; ++k) {
        const Vec f = splat(h[k][t]);
        for (int v = 0; v < V; ++v) sum[v] += f * w[k][v];
      }
      for (int v = 0; v < V; ++v) store(to[t] + i + v * kLanes, sum[v]);
    }
  }
  for (; i < n; ++i)
    for (int t = 0; t < T; ++t)
      for (int k = 0; k < K; ++k) y[t][i] += h[k][t] * widen(row[k][i]);
}

// Calls f with a number of tokens as a constant.
template <class F>
inline void with_count(int64_t count, const F& f) {
  static_assert(kBlock == 8);
  switch (count) {
    case 1: f(std::integral_constant<int, 1>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    case 3: f(std::integral_constant<int, 3>()); break;
    case 4: f(std::integral_constant<int, 4>()); break;
    case 5: f(std::integral_constant<int, 5>()); break;
    case 6: f(std::integral_constant<int, 6>()); break;
    case 7: f(std::integral_constant<int, 7>()); break;
    default: f(std::integral_constant<int, 8>());
  }
}

}  // namespace
