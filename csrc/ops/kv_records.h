// Keys and values in few bits: records of the vectors in the last axis (csrc/cpu/kv_records.h).
#pragma once

#include "ops/matmul.h"

#include <mlx/primitives.h>
#include <mlx/utils.h>

namespace optiq {

// Throws std::invalid_argument("[op] name...") where vectors of `dim` have no records of this
// format.
void check_kv_format(const char* op, const std::string& name, int dim, AffineFormat format);

/** Records uint32 [..., words] of x [..., dim], rounded by the range of each group. */
mx::array quantize_kv(const mx::array& x, int group_size, int bits, mx::StreamOrDevice s = {});

/** The vectors [..., dim] of records, in `dtype`. */
mx::array dequantize_kv(const mx::array& records, int dim, int group_size, int bits,
    mx::Dtype dtype, mx::StreamOrDevice s = {});

// One primitive for both directions.
class KvRecords : public mx::UnaryPrimitive {
 public:
  KvRecords(mx::Stream stream, bool quantize, int dim, AffineFormat format)
      : UnaryPrimitive(stream), quantize_(quantize), dim_(dim), format_(format) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  DEFINE_NAME(OptiqKvRecords)
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  bool quantize_;
  int dim_;
  AffineFormat format_;
};

} // namespace optiq
