// Dynamic embeddings on CPUs; reference.py and selection.py are the definition.
//
// A lookup reads the row's header, one line or two, and learns from it where the row's chunks are,
// which lie side by side in layout `slab`. Both are misses to memory, one after the other, so that
// both are prefetched, in bursts (cpu_row.h): chunks when their headers have come. Backward
// sorts the lookups by row (cpu_sort.h), and for each row sums its gradient into a buffer of the
// first-level cache, from where it goes into utilities, optimizer and chunks (cpu_update.h). All
// indices are looked at before anything is written. The result does not depend on the number of
// threads.

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_select.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_type(const Tensor& t, const char* name, ScalarType type, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == dims && t.is_contiguous(),
                  "dynamic_embedding_cpu: ", name, " must be a contiguous CPU tensor of its type and ",
                  dims, " dimensions");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

Tensor make(std::initializer_list<int64_t> shape, int32_t type) {
  int64_t strides[2] = {1, 1};
  if (shape.size() == 2) strides[0] = std::max<int64_t>(shape.begin()[1], 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                         shape.begin(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Layout layout_of(const Tensor& header, bool slab, bool wide, bool row_state, int64_t utility_bytes,
                 int64_t chunks, int64_t width) {
  check_type(header, "header", ScalarType::Int, 2);
  STD_TORCH_CHECK(chunks >= 1 && chunks <= kMaxChunks,
                  "dynamic_embedding_cpu: chunks must be 1 to ", kMaxChunks, ", got ", chunks);
  STD_TORCH_CHECK(utility_bytes == 1 || utility_bytes == 4,
                  "dynamic_embedding_cpu: utilities have 1 byte or 4");
  const int64_t addresses = (slab ? 1 : chunks) * (wide ? 2 : 1);
  const Layout l{slab, wide, chunks, width, header.size(1), row_state ? addresses : -1,
                 addresses + row_state, utility_bytes == 1};
  const int64_t utilities = l.coded ? (chunks + 3) / 4 : chunks;
  STD_TORCH_CHECK(l.words >= l.utility + utilities,
                  "dynamic_embedding_cpu: header has ", l.words, " words, needs ",
                  l.utility + utilities);
  return l;
}

void check_tables(const Tensor& tables, int64_t rows) {
  check_type(tables, "tables", ScalarType::Long, 2);
  STD_TORCH_CHECK(tables.size(1) == 3, "dynamic_embedding_cpu: tables must have 3 columns");
  const int64_t* table = data<int64_t>(tables);
  for (int64_t t = 0; t < tables.size(0); ++t)
    STD_TORCH_CHECK(table[3 * t] >= 0 && table[3 * t + 1] >= 0 &&
                        table[3 * t] + table[3 * t + 1] <= rows,
                    "dynamic_embedding_cpu: table ", t, " does not lie in the header");
}

Bags bags_of(const Tensor& tables, const Tensor& indices, const std::optional<Tensor>& offsets,
             int64_t size) {
  check_type(indices, "indices", ScalarType::Long, 1);
  const int64_t n = indices.numel(), count = tables.size(0);
  Bags bags{count, 0, 0, data<int64_t>(tables), data<int64_t>(indices), nullptr, size};
  if (offsets) {
    check_type(*offsets, "offsets", ScalarType::Long, 1);
    bags.offsets = data<int64_t>(*offsets);
    bags.count = offsets->numel() - 1;
    bool fits = bags.count >= 0 && bags.offsets[0] == 0 && bags.offsets[bags.count] == n;
    for (int64_t b = 0; fits && b < bags.count; ++b) fits = bags.offsets[b] <= bags.offsets[b + 1];
    STD_TORCH_CHECK(fits, "dynamic_embedding_cpu: offsets must begin with 0, must not fall, and must "
                          "end with the number of indices");
  } else {
    STD_TORCH_CHECK(size >= 1 && n % size == 0,
                    "dynamic_embedding_cpu: the number of indices must be a multiple of bag_size");
    bags.count = n / size;
  }
  STD_TORCH_CHECK(count > 0 && bags.count % count == 0,
                  "dynamic_embedding_cpu: ", bags.count, " bags are not as many for each of ", count,
                  " tables");
  bags.batch = bags.count / count;
  return bags;
}

void check_weights(const std::optional<Tensor>& weights, int64_t n) {
  if (!weights) return;
  check_type(*weights, "weights", ScalarType::Float, 1);
  STD_TORCH_CHECK(weights->numel() == n, "dynamic_embedding_cpu: one weight for each index");
}

// op.py looks for "index" and says which table and index it is.
void check_position(int64_t wrong) {
  STD_TORCH_CHECK(wrong < 0, "dynamic_embedding_cpu: index out of range at position ", wrong);
}

bool is_half(const Tensor& pool) {
  const bool half = pool.scalar_type() == ScalarType::BFloat16;
  check_type(pool, "pool", half ? ScalarType::BFloat16 : ScalarType::Float, 2);
  return half;
}

// f(slab, W, type of the pool), as types.
template <class F>
void with_kind(const Layout& l, bool half, const F& f) {
  const auto typed = [&](auto slab, auto width) {
    if (half)
      f(slab, width, BF16{});
    else
      f(slab, width, 0.0f);
  };
  if (!l.slab)
    typed(std::false_type{}, std::integral_constant<int, 0>{});
  else if (l.width == 4)
    typed(std::true_type{}, std::integral_constant<int, 4>{});
  else if (l.width == 8)
    typed(std::true_type{}, std::integral_constant<int, 8>{});
  else if (l.width == 16)
    typed(std::true_type{}, std::integral_constant<int, 16>{});
  else
    typed(std::true_type{}, std::integral_constant<int, 0>{});
}

Tensor forward_cpu(Tensor header, Tensor pool, Tensor tables, bool slab, bool wide, bool row_state,
                   int64_t utility_bytes, int64_t chunks, Tensor indices,
                   std::optional<Tensor> offsets, int64_t bag_size, std::optional<Tensor> weights,
                   bool mean) {
  const bool half = is_half(pool);
  const Layout l = layout_of(header, slab, wide, row_state, utility_bytes, chunks, pool.size(1));
  check_tables(tables, header.size(0));
  const Bags bags = bags_of(tables, indices, offsets, bag_size);
  check_weights(weights, indices.numel());
  Tensor out = make({bags.batch, bags.tables * chunks * l.width}, aoti_torch_dtype_float32());
  int64_t wrong = -1;
  with_kind(l, half, [&](auto slabs, auto width, auto type) {
    using T = decltype(type);
    const Lookup<T> lookup{data<int32_t>(header), data<T>(pool), l, bags, data<float>(weights), mean,
                           data<float>(out)};
    wrong = forward<decltype(slabs)::value, decltype(width)::value>(lookup);
  });
  check_position(wrong);
  return out;
}

Order ordered(const Bags& bags, int64_t rows, bool weighted, bool mean) {
  STD_TORCH_CHECK(rows <= int64_t{1} << 32 && bags.positions() < int64_t{1} << 32 &&
                      bags.count < int64_t{1} << 32,
                  "dynamic_embedding_cpu: more than 2^32 rows or indices");
  Order order = order_lookups(bags, weighted, mean);
  check_position(order.wrong);
  return order;
}

Gradient gradient_of(const Tensor& grad, const Bags& bags, const std::optional<Tensor>& weights,
                     bool mean) {
  check_type(grad, "grad", ScalarType::Float, 2);
  STD_TORCH_CHECK(grad.size(0) == bags.batch && grad.size(1) % bags.tables == 0,
                  "dynamic_embedding_cpu: grad must be [batch, tables * D]");
  check_weights(weights, bags.positions());
  return {data<float>(grad), grad.size(1) / bags.tables, data<float>(weights), mean};
}

std::tuple<Tensor, Tensor, Tensor> reduce_cpu(Tensor tables, Tensor indices,
                                              std::optional<Tensor> offsets, int64_t bag_size,
                                              std::optional<Tensor> weights, Tensor grad, bool mean) {
  check_tables(tables, int64_t{1} << 32);
  const Bags bags = bags_of(tables, indices, offsets, bag_size);
  const Gradient gradient = gradient_of(grad, bags, weights, mean);
  const Order order = ordered(bags, 0, weights.has_value(), mean);
  const int64_t shares = threads_for(order.count);
  std::vector<int64_t> start(shares + 1);
  for (int64_t s = 0; s < shares; ++s)
    start[s + 1] = start[s] + distinct(order, order.cut(s, shares), order.cut(s + 1, shares));
  const int64_t n = start[shares], D = gradient.dim;
  Tensor rows = make({n}, aoti_torch_dtype_int64()), counts = make({n}, aoti_torch_dtype_int64());
  Tensor sums = make({n, D}, aoti_torch_dtype_float32());
  run(shares, [&](int64_t share) {
    int64_t at = start[share];
    each_sum(order, gradient, order.cut(share, shares), order.cut(share + 1, shares),
             [](int64_t) {}, [](int64_t) {},
             [&](int64_t row, int64_t count, const float* g) {
               data<int64_t>(rows)[at] = row;
               data<int64_t>(counts)[at] = count;
               std::copy_n(g, D, data<float>(sums) + at++ * D);
             });
  });
  return {rows, counts, sums};
}

Update update_of(int64_t optimizer, int64_t utility, double lr, double eps, double beta1,
                 double beta2, double scale, int64_t exponent, int64_t seed, bool keep_new,
                 const std::optional<Tensor>& values, const Layout& l) {
  STD_TORCH_CHECK(optimizer >= 0 && optimizer < kOptimizers && utility >= 0 && utility < kUtilities,
                  "dynamic_embedding_cpu: no such optimizer or utility");
  STD_TORCH_CHECK(optimizer != kRowwiseAdagrad || l.state >= 0,
                  "dynamic_embedding_cpu: the header has no row-wise state");
  STD_TORCH_CHECK(!l.coded || (values && values->numel() == 256),
                  "dynamic_embedding_cpu: one-byte utilities need the values of their 256 codes");
  const Codes codes{data<float>(values), std::ldexp(1.0f, static_cast<int>(exponent))};
  return {optimizer, utility, static_cast<float>(lr), static_cast<float>(eps), beta1, beta2,
          static_cast<float>(scale), codes, mix(static_cast<uint32_t>(seed)), keep_new};
}

void check_state(const std::optional<Tensor>& state, bool needed, const char* name, int64_t dims,
                 int64_t numbers) {
  STD_TORCH_CHECK(state.has_value() >= needed, "dynamic_embedding_cpu: the optimizer needs ", name);
  if (!needed) return;
  check_type(*state, name, ScalarType::Float, dims);
  STD_TORCH_CHECK(state->numel() == numbers, "dynamic_embedding_cpu: ", name, " does not fit the pool");
}

template <class T>
std::vector<Rows<T>> rows_of(const Tensor& header, const Tensor& pool,
                             const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                             const std::optional<Tensor>& steps, const Layout& l,
                             const Update& update, int64_t threads) {
  return std::vector<Rows<T>>(
      threads, Rows<T>(data<int32_t>(header), data<T>(pool), data<float>(first),
                       data<float>(second), data<float>(steps), l, update));
}

using Outcome = std::tuple<Tensor, Tensor, Tensor, int64_t>;

template <class T>
Outcome collect(const std::vector<Rows<T>>& threads, int64_t dim) {
  int64_t n = 0, nonfinite = 0;
  for (const Rows<T>& t : threads) {
    n += t.kept.rows.size();
    nonfinite += t.nonfinite;
  }
  Tensor rows = make({n}, aoti_torch_dtype_int64()), counts = make({n}, aoti_torch_dtype_int64());
  Tensor grads = make({n, dim}, aoti_torch_dtype_float32());
  int64_t at = 0;
  for (const Rows<T>& t : threads) {
    std::copy(t.kept.rows.begin(), t.kept.rows.end(), data<int64_t>(rows) + at);
    std::copy(t.kept.counts.begin(), t.kept.counts.end(), data<int64_t>(counts) + at);
    std::copy(t.kept.grads.begin(), t.kept.grads.end(), data<float>(grads) + at * dim);
    at += t.kept.rows.size();
  }
  return {rows, counts, grads, nonfinite};
}

void check_states(const Tensor& pool, const std::optional<Tensor>& first,
                  const std::optional<Tensor>& second, const std::optional<Tensor>& steps,
                  int64_t optimizer) {
  check_state(first, optimizer >= kAdagrad, "its first state", 2, pool.numel());
  check_state(second, optimizer == kAdam, "its second state", 2, pool.numel());
  check_state(steps, optimizer == kAdam, "steps", 1, pool.size(0));
}

Outcome backward_cpu(Tensor header, Tensor pool, std::optional<Tensor> first,
                     std::optional<Tensor> second, std::optional<Tensor> steps, Tensor tables,
                     bool slab, bool wide, bool row_state, int64_t utility_bytes, int64_t chunks,
                     Tensor indices, std::optional<Tensor> offsets, int64_t bag_size,
                     std::optional<Tensor> weights, Tensor grad, bool mean, int64_t optimizer,
                     int64_t utility, double lr, double eps, double beta1, double beta2,
                     double scale, int64_t exponent, int64_t seed, bool keep_new,
                     std::optional<Tensor> values) {
  const bool half = is_half(pool);
  const Layout l = layout_of(header, slab, wide, row_state, utility_bytes, chunks, pool.size(1));
  const Update update = update_of(optimizer, utility, lr, eps, beta1, beta2, scale, exponent, seed,
                                  keep_new, values, l);
  check_states(pool, first, second, steps, optimizer);
  check_tables(tables, header.size(0));
  const Bags bags = bags_of(tables, indices, offsets, bag_size);
  const Gradient gradient = gradient_of(grad, bags, weights, mean);
  STD_TORCH_CHECK(gradient.dim == chunks * l.width,
                  "dynamic_embedding_cpu: grad must be [batch, tables * D]");
  const Order order = ordered(bags, header.size(0), weights.has_value(), mean);
  std::optional<Outcome> outcome;
  with_kind(l, half, [&](auto slabs, auto width, auto type) {
    auto threads = rows_of<decltype(type)>(header, pool, first, second, steps, l, update,
                                           threads_for(order.count));
    backward<decltype(slabs)::value, decltype(width)::value>(order, gradient, threads);
    outcome = collect(threads, gradient.dim);
  });
  return *outcome;
}

Outcome apply_cpu(Tensor header, Tensor pool, std::optional<Tensor> first,
                  std::optional<Tensor> second, std::optional<Tensor> steps, bool slab, bool wide,
                  bool row_state, int64_t utility_bytes, int64_t chunks, Tensor rows, Tensor counts,
                  Tensor grads, int64_t optimizer, int64_t utility, double lr, double eps,
                  double beta1, double beta2, double scale, int64_t exponent, int64_t seed,
                  bool keep_new, std::optional<Tensor> values) {
  const bool half = is_half(pool);
  const Layout l = layout_of(header, slab, wide, row_state, utility_bytes, chunks, pool.size(1));
  const Update update = update_of(optimizer, utility, lr, eps, beta1, beta2, scale, exponent, seed,
                                  keep_new, values, l);
  check_states(pool, first, second, steps, optimizer);
  check_type(rows, "rows", ScalarType::Long, 1);
  check_type(counts, "counts", ScalarType::Long, 1);
  check_type(grads, "grads", ScalarType::Float, 2);
  const int64_t n = rows.numel(), dim = chunks * l.width;
  STD_TORCH_CHECK(counts.numel() == n && grads.size(0) == n && grads.size(1) == dim,
                  "dynamic_embedding_cpu: rows, counts and grads do not fit");
  const int64_t* row = data<int64_t>(rows);
  bool fits = true;
  for (int64_t i = 0; i < n; ++i)
    fits &= row[i] >= 0 && row[i] < header.size(0) && (i == 0 || row[i] > row[i - 1]);
  STD_TORCH_CHECK(fits, "dynamic_embedding_cpu: rows must ascend and lie in the header");
  std::optional<Outcome> outcome;
  with_kind(l, half, [&](auto slabs, auto width, auto type) {
    auto threads = rows_of<decltype(type)>(header, pool, first, second, steps, l, update,
                                           threads_for(n));
    apply<decltype(slabs)::value, decltype(width)::value>(row, data<int64_t>(counts),
                                                          data<float>(grads), n, dim, threads);
    outcome = collect(threads, dim);
  });
  return *outcome;
}

Scan scan_of(const Tensor& header, const Tensor& tables, const Layout& l, const Tensor& inverse,
             const std::optional<Tensor>& values, bool prefix) {
  check_tables(tables, header.size(0));
  check_type(inverse, "inverse", ScalarType::Float, 1);
  STD_TORCH_CHECK(inverse.numel() == tables.size(0),
                  "dynamic_embedding_cpu: inverse must have one factor for each table");
  STD_TORCH_CHECK(!l.coded || (values && values->numel() == 256),
                  "dynamic_embedding_cpu: one-byte utilities need the values of their 256 codes");
  return {data<int32_t>(header), l,      data<int64_t>(tables), tables.size(0),
          data<float>(inverse),  data<float>(values), prefix};
}

Tensor histogram_cpu(Tensor header, Tensor tables, bool slab, bool wide, bool row_state,
                     int64_t utility_bytes, int64_t chunks, Tensor inverse, bool prefix,
                     bool resident_only, int64_t within, std::optional<Tensor> values) {
  const Layout l = layout_of(header, slab, wide, row_state, utility_bytes, chunks, 1);
  const Scan scan = scan_of(header, tables, l, inverse, values, prefix);
  Tensor out = make({scan.tables, kBins}, aoti_torch_dtype_int64());
  std::fill_n(data<int64_t>(out), scan.tables * kBins, int64_t{0});
  histogram(scan, resident_only, within, data<int64_t>(out));
  return out;
}

std::tuple<Tensor, Tensor> joined(const std::vector<Sides>& sides, Found Sides::* side) {
  int64_t n = 0, at = 0;
  for (const Sides& s : sides) n += (s.*side).number.size();
  Tensor numbers = make({n}, aoti_torch_dtype_int64()), scores = make({n}, aoti_torch_dtype_float32());
  for (const Sides& s : sides) {
    const Found& found = s.*side;
    std::copy(found.number.begin(), found.number.end(), data<int64_t>(numbers) + at);
    std::copy(found.score.begin(), found.score.end(), data<float>(scores) + at);
    at += found.number.size();
  }
  return {numbers, scores};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> candidates_cpu(
    Tensor header, Tensor tables, bool slab, bool wide, bool row_state, int64_t utility_bytes,
    int64_t chunks, Tensor inverse, double low, double high, bool prefix,
    std::optional<Tensor> values) {
  const Layout l = layout_of(header, slab, wide, row_state, utility_bytes, chunks, 1);
  const Scan scan = scan_of(header, tables, l, inverse, values, prefix);
  const std::vector<Sides> sides =
      find_candidates(scan, static_cast<float>(low), static_cast<float>(high));
  return std::tuple_cat(joined(sides, &Sides::evict), joined(sides, &Sides::admit));
}

}  // namespace

#define LAYOUT "bool slab, bool wide, bool row_state, int utility_bytes, int chunks"
#define STATES "Tensor(c!)? first, Tensor(d!)? second, Tensor(e!)? steps"
#define BATCH "Tensor indices, Tensor? offsets, int bag_size, Tensor? weights"
#define UPDATE                                                                                     \
  "int optimizer, int utility, float lr, float eps, float beta1, float beta2, float scale, "       \
  "int exponent, int seed, bool keep_new, Tensor? values"

STABLE_TORCH_LIBRARY_FRAGMENT(mlkit, m) {
  m.def("dynamic_embedding_forward_cpu(Tensor header, Tensor pool, Tensor tables, " LAYOUT ", " BATCH
        ", bool mean) -> Tensor");
  m.def("dynamic_embedding_backward_cpu(Tensor(a!) header, Tensor(b!) pool, " STATES
        ", Tensor tables, " LAYOUT ", " BATCH ", Tensor grad, bool mean, " UPDATE
        ") -> (Tensor, Tensor, Tensor, int)");
  m.def("dynamic_embedding_reduce_cpu(Tensor tables, " BATCH
        ", Tensor grad, bool mean) -> (Tensor, Tensor, Tensor)");
  m.def("dynamic_embedding_apply_cpu(Tensor(a!) header, Tensor(b!) pool, " STATES ", " LAYOUT
        ", Tensor rows, Tensor counts, Tensor grads, " UPDATE ") -> (Tensor, Tensor, Tensor, int)");
  m.def("dynamic_embedding_histogram_cpu(Tensor header, Tensor tables, " LAYOUT
        ", Tensor inverse, bool prefix, bool resident_only, int within, Tensor? values) -> Tensor");
  m.def("dynamic_embedding_candidates_cpu(Tensor header, Tensor tables, " LAYOUT
        ", Tensor inverse, float low, float high, bool prefix, Tensor? values) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlkit, CPU, m) {
  m.impl("dynamic_embedding_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("dynamic_embedding_backward_cpu", TORCH_BOX(&backward_cpu));
  m.impl("dynamic_embedding_reduce_cpu", TORCH_BOX(&reduce_cpu));
  m.impl("dynamic_embedding_apply_cpu", TORCH_BOX(&apply_cpu));
  m.impl("dynamic_embedding_histogram_cpu", TORCH_BOX(&histogram_cpu));
  m.impl("dynamic_embedding_candidates_cpu", TORCH_BOX(&candidates_cpu));
}
