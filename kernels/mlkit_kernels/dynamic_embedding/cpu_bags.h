// The bags of a call, and its threads.

#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace {

constexpr int64_t kGrain = 512;  // lookups below which another thread does not pay

inline int64_t threads_for(int64_t lookups) {
  const int64_t most = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(most, lookups / kGrain));
}

template <class F>
void run(int64_t threads, const F& f) {
  if (threads == 1) {
    f(0);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// Bag b of table t is number t * batch + b.
struct Bags {
  int64_t tables, batch, count;
  const int64_t* table;    // first row, rows, padding for each
  const int64_t* index;
  const int64_t* offsets;  // null: `size` indices in each bag
  int64_t size;

  int64_t start(int64_t bag) const { return offsets ? offsets[bag] : bag * size; }
  int64_t positions() const { return start(count); }
  // The bag's place among the vectors of D numbers in [batch, tables * D].
  int64_t segment(int64_t bag) const { return bag % batch * tables + bag / batch; }

  // f(position, row of the header or -1 for padding) in order; the first wrong position, or -1.
  template <class F>
  int64_t each_row(int64_t t, int64_t begin, int64_t end, const F& f) const {
    const int64_t first = table[3 * t], padding = table[3 * t + 2];
    const uint64_t rows = static_cast<uint64_t>(table[3 * t + 1]);
    for (int64_t p = begin; p < end; ++p) {
      if (static_cast<uint64_t>(index[p]) >= rows) return p;
      f(p, index[p] == padding ? -1 : first + index[p]);
    }
    return -1;
  }

  // Writes the rows of some bags; returns the first wrong position, or -1.
  int64_t rows(int64_t first, int64_t last, int64_t* out) const {
    const int64_t begin = start(first);
    for (int64_t bag = first; bag < last;) {
      const int64_t t = bag / batch, stop = std::min(last, (t + 1) * batch);
      const int64_t wrong = each_row(t, start(bag), start(stop),
                                     [&](int64_t p, int64_t row) { out[p - begin] = row; });
      if (wrong >= 0) return wrong;
      bag = stop;
    }
    return -1;
  }
};

}  // namespace
