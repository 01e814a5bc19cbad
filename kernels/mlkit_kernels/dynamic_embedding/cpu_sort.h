// The lookups of a batch ordered by row, then by position: LSD radix sorts of the tables, threads
// over tables.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_bags.h"

namespace {

constexpr int kDigitBits = 11, kMostPasses = 3;
constexpr int64_t kFew = 96;  // lookups of a table below which clearing the counts costs more

// A lookup: its row of the header in the upper 32 bits; below, the segment of its gradient, or,
// where there are weights, its position.
using Key = uint64_t;

inline int64_t row_of(Key key) { return static_cast<int64_t>(key >> 32); }

struct Order {
  std::unique_ptr<Key[]> keys;
  int64_t count = 0;       // of lookups that are no padding
  int64_t wrong = -1;      // first position with an index outside its table
  std::vector<uint32_t> segments;  // of each position, where there are weights
  std::vector<float> lengths;      // of each segment, for means

  // Where a share of the keys begins that splits no row.
  int64_t cut(int64_t share, int64_t shares) const {
    int64_t at = count * share / shares;
    while (at > 0 && at < count && row_of(keys[at]) == row_of(keys[at - 1])) ++at;
    return at;
  }
};

struct Digits {
  int passes, bits;
  explicit Digits(int64_t rows) {
    const int needed = rows > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(rows - 1)) : 1;
    passes = (needed + kDigitBits - 1) / kDigitBits;
    bits = (needed + passes - 1) / passes;
  }
  uint32_t digit(uint32_t row, int pass) const { return row >> (pass * bits) & ((1u << bits) - 1); }
};

// Sorts a table's lookups into `keys`, returns how many there are; `wrong` as in Order.
inline int64_t sort_table(const Bags& bags, int64_t t, bool by_position, Key* keys, Key* other,
                          int64_t& wrong) {
  const int64_t first = bags.table[3 * t], begin = bags.start(t * bags.batch);
  const int64_t end = bags.start((t + 1) * bags.batch);
  const Digits digits(bags.table[3 * t + 1]);
  const bool few = end - begin < kFew;
  const int passes = few ? 0 : digits.passes;
  static thread_local uint32_t counts[kMostPasses][1 << kDigitBits];
  for (int pass = 0; pass < passes; ++pass)
    std::memset(counts[pass], 0, sizeof(uint32_t) << digits.bits);

  Key* from = passes % 2 ? other : keys;  // each pass changes sides, the last ends in `keys`
  Key* to = passes % 2 ? keys : other;
  int64_t n = 0;
  for (int64_t bag = t * bags.batch; bag < (t + 1) * bags.batch && wrong < 0;) {
    // Bags of one size are taken at once: the inner loop should be long.
    const int64_t stop = bags.offsets || bags.size != 1 ? bag + 1 : (t + 1) * bags.batch;
    const int64_t start = bags.start(bag);
    const uint64_t segment = bags.segment(bag), step = bags.tables;
    const bool single = stop != bag + 1;
    wrong = bags.each_row(t, start, bags.start(stop), [&](int64_t p, int64_t row) {
      if (row < 0) return;
      const uint64_t tag = by_position ? p : single ? segment + (p - start) * step : segment;
      from[n++] = static_cast<uint64_t>(row) << 32 | tag;
      for (int pass = 0; pass < passes; ++pass)
        ++counts[pass][digits.digit(static_cast<uint32_t>(row - first), pass)];
    });
    bag = stop;
  }
  if (few) std::sort(keys, keys + n);
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t* count = counts[pass];
    uint32_t total = 0;
    for (int64_t d = 0; d < int64_t{1} << digits.bits; ++d) {
      const uint32_t here = count[d];
      count[d] = total;
      total += here;
    }
    for (int64_t i = 0; i < n; ++i) {
      const Key key = from[i];
      to[count[digits.digit(static_cast<uint32_t>(row_of(key) - first), pass)]++] = key;
    }
    std::swap(from, to);
  }
  return n;
}

inline Order order_lookups(const Bags& bags, bool weighted, bool mean) {
  const int64_t n = bags.positions();
  Order order;
  order.keys.reset(new Key[n]);
  const std::unique_ptr<Key[]> other(new Key[n]);
  if (weighted) order.segments.resize(n);
  if (mean) order.lengths.resize(bags.count);
  std::vector<int64_t> counts(bags.tables), wrong(bags.tables, -1);
  const int64_t threads = std::min(threads_for(n), bags.tables);
  run(threads, [&](int64_t thread) {
    for (int64_t t = bags.tables * thread / threads; t < bags.tables * (thread + 1) / threads; ++t) {
      const int64_t begin = bags.start(t * bags.batch);
      counts[t] = sort_table(bags, t, weighted, order.keys.get() + begin, other.get() + begin,
                             wrong[t]);
      if (!weighted && !mean) continue;
      const int64_t padding = bags.table[3 * t + 2];
      for (int64_t bag = t * bags.batch; bag < (t + 1) * bags.batch; ++bag) {
        const int64_t segment = bags.segment(bag);
        int64_t length = 0;
        for (int64_t p = bags.start(bag); p < bags.start(bag + 1); ++p) {
          length += bags.index[p] != padding;
          if (weighted) order.segments[p] = static_cast<uint32_t>(segment);
        }
        if (mean) order.lengths[segment] = static_cast<float>(std::max<int64_t>(length, 1));
      }
    }
  });
  for (int64_t t = 0; t < bags.tables; ++t) {  // close the gaps that padding leaves
    if (order.wrong < 0) order.wrong = wrong[t];
    const int64_t begin = bags.start(t * bags.batch);
    if (begin != order.count)
      std::memmove(order.keys.get() + order.count, order.keys.get() + begin,
                   counts[t] * sizeof(Key));
    order.count += counts[t];
  }
  return order;
}

}  // namespace
