#include "ops/key_values.h"

#include <mlx/ops.h>

#include "ops/fail.h"

namespace optiq {
namespace {

// `tokens` < 0: any number but none.
void check_vectors(const char* op, const char* name, const array& x, const AttentionShape& shape,
    int dim, AffineFormat format, int tokens = -1) {
  bool records = !format.dense();
  if (records) {
    check_kv_format(op, std::string(name) + ": ", dim, format);
  }
  int last = records ? cpu::record_words(dim, format) : dim;
  bool fits = x.ndim() == 4 && x.shape(0) == shape.batch && x.shape(1) == shape.kv_heads &&
              x.shape(3) == last && (tokens < 0 ? x.shape(2) > 0 : x.shape(2) == tokens);
  if (!fits || (records && x.dtype() != mx::uint32)) {
    fail(op, name, " ", x.shape(), " ", x.dtype(), " do not fit a batch of ", shape.batch, " and ",
        shape.kv_heads, " key heads of ", dim,
        records ? " in records of " + std::to_string(last) + " words" : "");
  }
  if (!records) {
    require_floating(op, name, x);
  }
}

cpu::Masking masking_of(const char* op, const std::string& name, const std::optional<array>& mask,
    const AttentionShape& shape, int keys) {
  if (!mask) {
    if (name != "" && name != "causal") {
      fail(op, "masking is '", name, "'; it must be '' or 'causal' without a mask");
    }
    return name == "causal" ? cpu::Masking::causal : cpu::Masking::none;
  }
  const int full[4] = {shape.batch, shape.heads, shape.rows, keys};
  bool fits = mask->ndim() <= 4 && mask->ndim() > 0;
  for (int axis = 0; fits && axis < int(mask->ndim()); axis++) {
    int n = mask->shape(axis);
    fits = n == 1 || n == full[4 - int(mask->ndim()) + axis];
  }
  if (!fits) {
    fail(op, "mask ", mask->shape(), " does not broadcast to [", shape.batch, ", ", shape.heads,
        ", ", shape.rows, ", ", keys, "]");
  }
  if (mask->dtype() == mx::bool_) {
    return cpu::Masking::boolean;
  }
  require_floating(op, "mask", *mask);
  return cpu::Masking::additive;
}

void set_mask(cpu::Attention& a, const array& mask) {
  a.mask = mask.data<char>();
  a.mask_type = mask.dtype() == mx::bool_ ? cpu::Float::f32 : float_type(mask.dtype());
  for (int axis = 0; axis < 4; axis++) {
    int own = axis - 4 + int(mask.ndim());
    a.mask_strides[axis] = own < 0 || mask.shape(own) == 1 ? 0 : mask.strides()[own];
  }
}

cpu::Vectors vectors(const array& x, AffineFormat format) {
  return {x.data<char>(), format.dense() ? float_type(x.dtype()) : cpu::Float::f32, format,
      size_t(x.strides()[0]), size_t(x.strides()[1]), size_t(x.strides()[2])};
}

// Only the last axis has to be dense.
cpu::Vectors vectors(const array& x, AffineFormat format, mx::Stream stream) {
  return vectors(x.strides().back() == 1 ? x : row_contiguous(x, stream), format);
}

} // namespace

KeyValueLayout KeyValues::check(const char* op, const AttentionShape& shape, const array& k,
    const array& v, std::optional<int> keys) const {
  check_vectors(op, "keys", k, shape, shape.dim, k_format);
  check_vectors(op, "values", v, shape, shape.value_dim, v_format, k.shape(2));
  return check(op, shape, keys.value_or(k.shape(2)));
}

KeyValueLayout KeyValues::check(const char* op, const AttentionShape& shape, int keys) const {
  KeyValueLayout layout{k_format, v_format, masking_of(op, masking, mask, shape, keys), window,
      mask.has_value(), starts.has_value(), first.has_value(), recent.has_value()};
  if (window < 0 || (window > 0 && layout.masking != cpu::Masking::causal)) {
    fail(op, "window is ", window, "; it must be positive, and the masking causal");
  }
  if (starts && (starts->ndim() != 1 || starts->shape(0) != shape.batch)) {
    fail(op, "starts are ", starts->shape(), "; there must be one for each of ", shape.batch,
        " rows");
  }
  for (const auto* exact : {&first, &recent}) {
    if (*exact) {
      const auto& [own_k, own_v] = **exact;
      check_vectors(op, "exact keys", own_k, shape, shape.dim, {});
      check_vectors(op, "exact values", own_v, shape, shape.value_dim, {}, own_k.shape(2));
    }
  }
  return layout;
}

void KeyValues::append(std::vector<array>& inputs, mx::StreamOrDevice s) const {
  if (mask) {
    inputs.push_back(*mask);
  }
  if (starts) {
    inputs.push_back(mx::astype(*starts, mx::int32, s));
  }
  for (const auto* exact : {&first, &recent}) {
    if (*exact) {
      inputs.push_back((*exact)->first);
      inputs.push_back((*exact)->second);
    }
  }
}

void KeyValueLayout::set(
    cpu::Attention& a, const array* k, const array* v, const array* in, mx::Stream stream) const {
  if (k && v) {
    a.k = vectors(*k, k_format, stream);
    a.v = vectors(*v, v_format, stream);
  }
  a.masking = masking;
  a.window = window;
  if (mask) {
    set_mask(a, *in++);
  }
  if (starts) {
    a.starts = row_contiguous(*in++, stream).data<int32_t>();
  }
  auto exact = [&](cpu::Vectors& own_k, cpu::Vectors& own_v, int& count) {
    count = in->shape(2);
    own_k = vectors(*in++, {}, stream);
    own_v = vectors(*in++, {}, stream);
  };
  if (first) {
    exact(a.first_k, a.first_v, a.first);
  }
  if (recent) {
    exact(a.recent_k, a.recent_v, a.recent);
  }
}

} // namespace optiq
