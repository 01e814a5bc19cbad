// The passes of a pruning round over the headers (selection.py): histograms of the scores, and the
// chunks that may change sides. Threads over rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu_bags.h"
#include "cpu_row.h"

namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kScanGrain = 1 << 14;  // rows below which another thread does not pay

struct Scan {
  const int32_t* header;
  Layout layout;
  const int64_t* table;  // first row, rows, padding for each
  int64_t tables;
  const float* inverse;
  const float* value;  // of the codes of one-byte utilities
  bool prefix;
};

// The scores of a row.
template <int K, bool Coded>
struct Scores {
  const Layout& layout;
  float inverse;
  const float* value;
  bool prefix;

  int64_t chunks() const { return K ? K : layout.chunks; }
  void read(const int32_t* words, float* score) const {
    const int64_t n = chunks();
    if constexpr (Coded) {
      const uint8_t* code = reinterpret_cast<const uint8_t*>(words + layout.utility);
      for (int64_t k = 0; k < n; ++k) score[k] = value[code[k]] * inverse;
    } else {
      float u[kMaxChunks];
      std::memcpy(u, words + layout.utility, n * sizeof(float));
      for (int64_t k = 0; k < n; ++k) score[k] = u[k] * inverse;
    }
    if (prefix)
      for (int64_t k = 1; k < n; ++k) score[k] = std::min(score[k - 1], score[k]);
  }
};

inline uint32_t resident(const int32_t* words, const Layout& l) {
  if (l.slab) return static_cast<uint32_t>(words[0]) & ((1u << l.chunks) - 1);
  return find<false>(words, l).mask;
}

// f(thread, table, first row, last row) for an equal share of all tables' rows to each thread.
template <class F>
void share_rows(const Scan& s, int64_t threads, const F& f) {
  int64_t total = 0;
  for (int64_t t = 0; t < s.tables; ++t) total += s.table[3 * t + 1];
  run(threads, [&](int64_t thread) {
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    int64_t before = 0;
    for (int64_t t = 0; t < s.tables; ++t) {
      const int64_t first = s.table[3 * t], size = s.table[3 * t + 1];
      const int64_t from = std::max(begin - before, int64_t{0}), to = std::min(end - before, size);
      if (from < to) f(thread, t, first + from, first + to);
      before += size;
    }
  });
}

inline int64_t scan_threads(const Scan& s) {
  int64_t total = 0;
  for (int64_t t = 0; t < s.tables; ++t) total += s.table[3 * t + 1];
  const int64_t most = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(most, total / kScanGrain));
}

// f with a Scores<K, Coded>: the usual K is known to the compiler.
template <class F>
void with_scores(const Scan& s, int64_t t, const F& f) {
  const Layout& l = s.layout;
  if (l.coded)
    f(Scores<0, true>{l, s.inverse[t], s.value, s.prefix});
  else if (l.chunks == 4)
    f(Scores<4, false>{l, s.inverse[t], s.value, s.prefix});
  else
    f(Scores<0, false>{l, s.inverse[t], s.value, s.prefix});
}

inline void count_scores(const Scan& s, int64_t t, int64_t first, int64_t last, bool resident_only,
                         int64_t within, int64_t* bins) {
  with_scores(s, t, [&](const auto& scores) {
    const int64_t K = scores.chunks();
    const int32_t* words = s.header + first * s.layout.words;
    for (int64_t row = first; row < last; ++row, words += s.layout.words) {
      float score[kMaxChunks];
      scores.read(words, score);
      const uint32_t counted = resident_only ? resident(words, s.layout) : ~0u;
      for (int64_t k = 0; k < K; ++k) {
        if (!(score[k] > 0.0f) || !(counted >> k & 1)) continue;
        const uint32_t bits = as<uint32_t>(score[k]);
        if (within < 0)
          ++bins[bits >> 16];
        else if (bits >> 16 == static_cast<uint32_t>(within))
          ++bins[bits & 0xffff];
      }
    }
  });
}

// Adds to out [tables, kBins].
inline void histogram(const Scan& s, bool resident_only, int64_t within, int64_t* out) {
  std::mutex lock;
  share_rows(s, scan_threads(s), [&](int64_t, int64_t t, int64_t first, int64_t last) {
    int64_t* bins = out + t * kBins;
    if (last - first == s.table[3 * t + 1])
      return count_scores(s, t, first, last, resident_only, within, bins);
    std::vector<int64_t> part(kBins);  // a table that threads share
    count_scores(s, t, first, last, resident_only, within, part.data());
    const std::lock_guard<std::mutex> guard(lock);
    for (int64_t i = 0; i < kBins; ++i) bins[i] += part[i];
  });
}

struct Found {
  std::vector<int64_t> number;  // row * K + chunk
  std::vector<float> score;
};

struct Sides {
  Found evict, admit;
};

// Resident chunks with a score below `low`, others with one above `high`, for each thread.
inline std::vector<Sides> find_candidates(const Scan& s, float low, float high) {
  const int64_t threads = scan_threads(s);
  std::vector<Sides> sides(threads);
  share_rows(s, threads, [&](int64_t thread, int64_t t, int64_t first, int64_t last) {
    Sides& mine = sides[thread];
    with_scores(s, t, [&](const auto& scores) {
      const int64_t K = scores.chunks();
      const int32_t* words = s.header + first * s.layout.words;
      for (int64_t row = first; row < last; ++row, words += s.layout.words) {
        float score[kMaxChunks];
        scores.read(words, score);
        const uint32_t has = resident(words, s.layout);
        uint32_t below = 0, above = 0;
        for (int64_t k = 0; k < K; ++k) {
          below |= static_cast<uint32_t>(score[k] < low) << k;
          above |= static_cast<uint32_t>(score[k] > high) << k;
        }
        below &= has;
        above &= ~has;
        if ((below | above) == 0) continue;
        for (int64_t k = 0; k < K; ++k) {
          if (!((below | above) >> k & 1)) continue;
          Found& found = below >> k & 1 ? mine.evict : mine.admit;
          found.number.push_back(row * K + k);
          found.score.push_back(score[k]);
        }
      }
    });
  });
  return sides;
}

}  // namespace
