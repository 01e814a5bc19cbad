// Backward: sums of the gradient by row, straight out of the gradient of the output, into an
// update or a tensor. Threads over rows, each summed by one thread in the order of its lookups, so
// that the result does not depend on their number.

#pragma once

#include "cpu_sort.h"
#include "cpu_update.h"

namespace {

struct Gradient {
  const float* data;     // [batch, tables * D]
  int64_t dim;           // D
  const float* weights;  // null: ones
  bool mean;
};

// f(row, count, its gradient) for the rows of keys[begin, end); the others prefetch what it needs.
template <class Header, class Chunks, class F>
void each_sum(const Order& order, const Gradient& grad, int64_t begin, int64_t end,
              const Header& header, const Chunks& chunks, const F& f) {
  const int64_t D = grad.dim;
  std::vector<float> buffer(D + kLine / 4);
  float* sum = reinterpret_cast<float*>(
      (reinterpret_cast<uintptr_t>(buffer.data()) + kLine - 1) / kLine * kLine);
  const Key* keys = order.keys.get();
  const bool plain = !grad.weights && !grad.mean;
  const auto segment = [&](Key key) -> int64_t {
    const uint32_t tag = static_cast<uint32_t>(key);
    return grad.weights ? order.segments[tag] : tag;
  };
  const auto ask_header = [&](int64_t at) { header(row_of(keys[at])); };
  const auto ask_chunks = [&](int64_t at) {
    chunks(row_of(keys[at]));
    const char* line = reinterpret_cast<const char*>(grad.data + segment(keys[at]) * D);
    for (int64_t i = 0; i < D * 4; i += kLine) prefetch(line + i, false);
  };
  Bursts bursts(begin, end, ask_header, ask_chunks);
  for (int64_t at = begin; at < end;) {
    const int64_t row = row_of(keys[at]), start = at;
    do {
      bursts.reach(at);
      const int64_t place = segment(keys[at]);
      float factor = 1.0f;
      if (!plain) {
        if (grad.weights) factor = grad.weights[static_cast<uint32_t>(keys[at])];
        if (grad.mean) factor /= order.lengths[place];
      }
      if (at == start)
        combine<0, false>(sum, grad.data + place * D, factor, D);
      else
        combine<0, true>(sum, grad.data + place * D, factor, D);
      ++at;
    } while (at < end && row_of(keys[at]) == row);
    f(row, at - start, sum);
  }
}

template <bool Slab, int W, class T>
void backward(const Order& order, const Gradient& grad, std::vector<Rows<T>>& threads) {
  const int64_t shares = threads.size();
  run(shares, [&](int64_t share) {
    Rows<T>& rows = threads[share];
    each_sum(
        order, grad, order.cut(share, shares), order.cut(share + 1, shares),
        [&](int64_t row) { rows.prefetch_header_of(row); },
        [&](int64_t row) { rows.template prefetch_chunks_of<Slab>(row); },
        [&](int64_t row, int64_t count, const float* g) {
          rows.template apply<Slab, W>(row, count, g);
        });
  });
}

// The same for sums that are at hand.
template <bool Slab, int W, class T>
void apply(const int64_t* row, const int64_t* counts, const float* grads, int64_t n, int64_t dim,
           std::vector<Rows<T>>& threads) {
  const int64_t shares = threads.size();
  run(shares, [&](int64_t share) {
    Rows<T>& rows = threads[share];
    const int64_t begin = n * share / shares, end = n * (share + 1) / shares;
    const auto ask_header = [&](int64_t i) { rows.prefetch_header_of(row[i]); };
    const auto ask_chunks = [&](int64_t i) { rows.template prefetch_chunks_of<Slab>(row[i]); };
    Bursts bursts(begin, end, ask_header, ask_chunks);
    for (int64_t i = begin; i < end; ++i) {
      bursts.reach(i);
      rows.template apply<Slab, W>(row[i], counts[i], grads + i * dim);
    }
  });
}

// How many distinct rows lie in keys[begin, end).
inline int64_t distinct(const Order& order, int64_t begin, int64_t end) {
  int64_t found = end > begin;
  for (int64_t i = begin + 1; i < end; ++i)
    found += row_of(order.keys[i]) != row_of(order.keys[i - 1]);
  return found;
}

}  // namespace
