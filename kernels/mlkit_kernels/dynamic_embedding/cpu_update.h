// What a row's gradient does to its utilities and to its resident chunks (reference.py).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_codes.h"
#include "cpu_row.h"

namespace {

enum Optimizer : int64_t { kNone, kSgd, kRowwiseAdagrad, kAdagrad, kAdam, kOptimizers };
enum Utility : int64_t { kFreqGrad, kFreq, kGrad, kNoUtility, kUtilities };

struct Update {
  int64_t optimizer, utility;
  float lr, eps;
  double beta1, beta2;
  float scale;
  Codes codes;
  uint32_t seed;  // mixed
  bool keep_new;
};

// Rows that were never touched before, and what they got.
struct NewRows {
  std::vector<int64_t> rows, counts;
  std::vector<float> grads;
};

inline bool all_finite(const float* g, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::isfinite(g[i]);
  return finite;
}

// Rounds up or down with the probability of the fraction; `number` identifies the element.
inline BF16 round_randomly(float value, uint32_t number, uint32_t seed) {
  const uint32_t bits = as<uint32_t>(value);
  const uint32_t kept = (bits & 0x7f800000u) == 0x7f800000u
                            ? (bits & 0x007fffffu ? 0x7fc00000u : bits)  // NaN, infinity
                            : bits + (mix(number ^ seed) >> 16);
  return BF16{static_cast<uint16_t>(kept >> 16)};
}

template <class T>
class Rows {
 public:
  Rows(int32_t* header, T* pool, float* first, float* second, float* steps, const Layout& layout,
       const Update& update)
      : header_(header), pool_(pool), first_(first), second_(second), steps_(steps),
        layout_(layout), update_(update), sink_(layout.width) {}

  void prefetch_header_of(int64_t row) const {
    prefetch_header<true>(header_ + row * layout_.words, layout_);
  }

  template <bool Slab>
  void prefetch_chunks_of(int64_t row) const {
    const int32_t* words = header_ + row * layout_.words;
    if (update_.optimizer == kNone) return;
    prefetch_chunks<true, Slab>(words, pool_, layout_);
    if (update_.optimizer < kAdagrad) return;
    prefetch_chunks<true, Slab>(words, first_, layout_);
    if (update_.optimizer == kAdam) prefetch_chunks<true, Slab>(words, second_, layout_);
  }

  // Takes the sum of the row's gradients, and how many there were.
  template <bool Slab, int W>
  void apply(int64_t row, int64_t count, const float* g) {
    const Layout& l = layout_;
    const int64_t C = W ? W : l.width, K = l.chunks;
    int32_t* words = header_ + row * l.words;
    const Places found = find<Slab>(words, l);
    float squares[kMaxChunks] = {}, total = 0.0f;
    for (int64_t k = 0; k < K; ++k) {
      squares[k] = square_sum<W>(g + k * C, C);
      total += squares[k];
    }
    if (update_.keep_new && found.mask == 0 && never_used(words)) keep(row, count, g);
    if (std::isfinite(total) || all_finite(g, K * C))
      add_utility(words, row, count, squares);
    else
      ++nonfinite;
    if (update_.optimizer != kNone) optimize<Slab, W>(words, found, total, g);
  }

  NewRows kept;
  int64_t nonfinite = 0;

 private:
  bool never_used(const int32_t* words) const {
    const Layout& l = layout_;
    uint32_t any = 0;
    if (l.coded) {
      const uint8_t* code = reinterpret_cast<const uint8_t*>(words + l.utility);
      for (int64_t k = 0; k < l.chunks; ++k) any |= code[k];
    } else {
      for (int64_t k = 0; k < l.chunks; ++k) any |= static_cast<uint32_t>(words[l.utility + k]) << 1;
    }
    return any == 0;
  }

  void keep(int64_t row, int64_t count, const float* g) {
    kept.rows.push_back(row);
    kept.counts.push_back(count);
    kept.grads.insert(kept.grads.end(), g, g + layout_.chunks * layout_.width);
  }

  void add_utility(int32_t* words, int64_t row, int64_t count, const float* squares) {
    if (update_.utility == kNoUtility) return;
    float gain[kMaxChunks];
    const float often = update_.utility == kGrad ? 1.0f : static_cast<float>(count);
    for (int k = 0; k < kMaxChunks; ++k)
      gain[k] = (update_.utility == kFreq ? often : often * std::sqrt(squares[k])) * update_.scale;
    const int64_t K = layout_.chunks;
    if (layout_.coded) {
      update_.codes.add(reinterpret_cast<uint8_t*>(words + layout_.utility), gain, K,
                        static_cast<uint32_t>(row * K), update_.seed);
    } else {
      float* u = reinterpret_cast<float*>(words + layout_.utility);
      for (int64_t k = 0; k < K; ++k) u[k] = std::min(u[k] + gain[k], kLargest);
    }
  }

  template <bool Slab, int W>
  void optimize(int32_t* words, const Places& found, float total, const float* g) {
    const Layout& l = layout_;
    const int64_t C = W ? W : l.width, K = l.chunks;
    if (update_.optimizer <= kRowwiseAdagrad) {
      float rate = update_.lr;
      if (update_.optimizer == kRowwiseAdagrad) {
        float* state = reinterpret_cast<float*>(words + l.state);
        *state += total / static_cast<float>(K * C);
        rate /= std::sqrt(*state) + update_.eps;
      }
      if constexpr (std::is_same_v<T, float>) {
        if (Slab && found.mask == (1u << K) - 1)
          return combine<0, true>(pool_ + found.slot[0] * C, g, -rate, K * C);
        for (int64_t k = 0; k < K; ++k) {  // absent chunks go to a sink: no branch to guess
          float* chunk = found.mask >> k & 1 ? pool_ + found.slot[k] * C : sink_.data();
          combine<W, true>(chunk, g + k * C, -rate, C);
        }
      } else {
        for (int64_t k = 0; k < K; ++k)
          if (found.mask >> k & 1)
            subtract(found.slot[k], C, [&](int64_t i) { return rate * g[k * C + i]; });
      }
      return;
    }
    for (int64_t k = 0; k < K; ++k) {
      if (!(found.mask >> k & 1)) continue;
      if (update_.optimizer == kAdagrad)
        adagrad(found.slot[k], g + k * C, C);
      else
        adam(found.slot[k], g + k * C, C);
    }
  }

  void adagrad(int64_t slot, const float* g, int64_t C) {
    float* sum = first_ + slot * C;
    for (int64_t i = 0; i < C; ++i) sum[i] += g[i] * g[i];
    subtract(slot, C, [&](int64_t i) {
      return update_.lr * g[i] / (std::sqrt(sum[i]) + update_.eps);
    });
  }

  void adam(int64_t slot, const float* g, int64_t C) {
    float *m = first_ + slot * C, *v = second_ + slot * C;
    const float beta1 = static_cast<float>(update_.beta1), new1 = static_cast<float>(1 - update_.beta1);
    const float beta2 = static_cast<float>(update_.beta2), new2 = static_cast<float>(1 - update_.beta2);
    const float step = ++steps_[slot];
    if (step != step_) {  // most chunks of a row are as old as the last one
      step_ = step;
      // Little is left after the subtraction: in float32 it would have four digits.
      left1_ = static_cast<float>(1.0 - std::pow(update_.beta1, static_cast<double>(step)));
      left2_ = static_cast<float>(1.0 - std::pow(update_.beta2, static_cast<double>(step)));
    }
    for (int64_t i = 0; i < C; ++i) {
      m[i] = beta1 * m[i] + new1 * g[i];
      v[i] = beta2 * v[i] + new2 * (g[i] * g[i]);
    }
    const float left1 = left1_, left2 = left2_;
    subtract(slot, C, [&](int64_t i) {
      return update_.lr * (m[i] / left1) / (std::sqrt(v[i] / left2) + update_.eps);
    });
  }

  template <class Step>
  void subtract(int64_t slot, int64_t C, const Step& step) {
    T* chunk = pool_ + slot * C;
    for (int64_t i = 0; i < C; ++i) {
      const float value = widen(chunk[i]) - step(i);
      if constexpr (std::is_same_v<T, float>)
        chunk[i] = value;
      else
        chunk[i] = round_randomly(value, static_cast<uint32_t>(slot * C + i), update_.seed);
    }
  }

  int32_t* header_;
  T* pool_;
  float *first_, *second_, *steps_;
  Layout layout_;
  Update update_;
  std::vector<float> sink_;
  float step_ = -1.0f, left1_ = 0.0f, left2_ = 0.0f;
};

}  // namespace
