#include "ops/kv_records.h"

#include <mlx/backend/cpu/encoder.h>

#include "cpu/affine_format.h"
#include "launch/attention.h"
#include "metal/encoder.h"
#include "ops/fail.h"

namespace optiq {

using cpu::record_words;

void check_kv_format(const char* op, const std::string& name, int dim, AffineFormat format) {
  check_format(op, name, format, Holds::keys_and_values);
  if (dim < 8 || dim % 8 != 0) {
    fail(op, name, "vectors of ", dim, " elements cannot be quantized; use a multiple of 8");
  }
}

array quantize_kv(const array& x, int group_size, int bits, mx::StreamOrDevice s) {
  require_floating("quantize_kv", "x", x);
  if (x.ndim() == 0) {
    fail("quantize_kv", "x has no axes; it must be [..., dim]");
  }
  int dim = x.shape(-1);
  AffineFormat format{.bits = bits, .group_size = group_size};
  check_kv_format("quantize_kv", "", dim, format);
  auto shape = x.shape();
  shape.back() = record_words(dim, format);
  return array(std::move(shape), mx::uint32,
      std::make_shared<KvRecords>(mx::to_stream(s), true, dim, format), {x});
}

array dequantize_kv(const array& records, int dim, int group_size, int bits, mx::Dtype dtype,
    mx::StreamOrDevice s) {
  AffineFormat format{.bits = bits, .group_size = group_size};
  check_kv_format("dequantize_kv", "", dim, format);
  int words = record_words(dim, format);
  if (records.dtype() != mx::uint32 || records.ndim() == 0 || records.shape(-1) != words) {
    fail("dequantize_kv", "records ", records.shape(), " ", records.dtype(), " are not those of ",
        dim, " values in ", bits, "g", group_size, ", which are uint32 and end in ", words);
  }
  if (dtype != mx::float32 && dtype != mx::float16 && dtype != mx::bfloat16) {
    fail("dequantize_kv", "dtype is ", dtype, "; it must be float32, float16 or bfloat16");
  }
  auto shape = records.shape();
  shape.back() = dim;
  return array(std::move(shape), dtype,
      std::make_shared<KvRecords>(mx::to_stream(s), false, dim, format), {records});
}

void KvRecords::eval_cpu(const std::vector<array>& inputs, array& out) {
  std::vector<array> outs = {out};
  array in = prepare(inputs, outs, stream())[0];
  const array& floats = quantize_ ? in : out;
  cpu::Records work{floats.data<char>(), float_type(floats.dtype()),
      const_cast<uint32_t*>((quantize_ ? out : in).data<uint32_t>()), floats.size() / dim_, dim_,
      format_};
  mx::cpu::get_command_encoder(stream()).dispatch([work, quantize = quantize_]() {
    quantize ? cpu::kernels().quantize_kv(work) : cpu::kernels().dequantize_kv(work);
  });
}

void KvRecords::eval_gpu(const std::vector<array>& inputs, array& out) {
  if (!quantize_) {
    throw std::runtime_error("[dequantize_kv] has no GPU kernel; use the mx.* formula there");
  }
  const array& x = inputs[0];
  metal::run(launch::plan_quantize_kv({x.size() / dim_, dim_, format_, float_type(x.dtype())}),
      inputs, {out}, stream());
}

bool KvRecords::is_equivalent(const mx::Primitive& other) const {
  auto& o = static_cast<const KvRecords&>(other);
  return quantize_ == o.quantize_ && dim_ == o.dim_ && format_ == o.format_;
}

} // namespace optiq
