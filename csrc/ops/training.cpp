#include "ops/training.h"

#include <cmath>
#include <functional>
#include <utility>

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include "ops/fail.h"

namespace optiq {

using mx::array;

namespace {

using Arrays = std::vector<array>;
using cpu::kernels;

// A primitive on the CPU. `run` takes contiguous inputs and room for the outputs, and returns the
// work to do. `gradient` returns the gradients at the first inputs.
class Kernel : public mx::Primitive {
 public:
  using Run = std::function<std::function<void()>(const Arrays& in, Arrays& out)>;
  using Gradient = std::function<Arrays(const Arrays& in, const array& d_out, const Arrays& out)>;

  Kernel(mx::Stream stream, const char* name, Run run, Gradient gradient = nullptr)
      : Primitive(stream), name_(name), run_(std::move(run)), gradient_(std::move(gradient)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outs) override {
    Arrays in = prepare(inputs, outs, stream());
    mx::cpu::get_command_encoder(stream()).dispatch(run_(in, outs));
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string("[") + name_ + "] has no GPU kernel; use mx.* there");
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
      const Arrays& outputs) override {
    Arrays all = gradient_ ? gradient_(primals, cotangents[0], outputs) : Arrays{}, asked;
    for (int i : argnums) {
      if (i >= int(all.size())) {
        fail(name_, "has no gradient at input ", i);
      }
      asked.push_back(all[i]);
    }
    return asked;
  }

  const char* name() const override {
    return name_;
  }

 private:
  const char* name_;
  Run run_;
  Gradient gradient_;
};

// Of the shapes, in float32.
Arrays made(const mx::Stream& s, const char* name, const std::vector<mx::Shape>& shapes,
    Arrays inputs, Kernel::Run run, Kernel::Gradient gradient = nullptr) {
  return array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
      std::make_shared<Kernel>(s, name, std::move(run), std::move(gradient)), std::move(inputs));
}

array floats(const array& a, mx::Stream s) {
  return mx::astype(a, mx::float32, s);
}

} // namespace

cpu::Activation activation_of(const char* op, const std::string& name) {
  if (name != "silu" && name != "gelu_tanh") {
    fail(op, "activation is '", name, "'; it must be 'silu' or 'gelu_tanh'");
  }
  return name == "silu" ? cpu::Activation::silu : cpu::Activation::gelu_tanh;
}

array gated(
    const array& gate, const array& up, const std::string& activation, mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  auto kind = activation_of("gated", activation);
  require_floating("gated", "gate", gate);
  require_floating("gated", "up", up);
  if (gate.shape() != up.shape()) {
    fail("gated", "gate is ", gate.shape(), " and up ", up.shape(), "; they must be alike");
  }
  auto shape = gate.shape();
  auto run = [kind](const Arrays& in, Arrays& out) {
    size_t width = in[0].ndim() == 0 ? 1 : in[0].shape(-1);
    cpu::Gate work{};
    work.gate = in[0].data<float>(), work.up = in[1].data<float>(), work.y = out[0].data<float>();
    work.stride = work.width = width, work.rows = width ? in[0].size() / width : 0;
    work.activation = kind;
    return [work]() { kernels().gate(work); };
  };
  auto back = [kind](const Arrays& in, Arrays& out) {
    cpu::GateGradient work{in[0].data<float>(), in[1].data<float>(), in[2].data<float>(),
        out[0].data<float>(), out[1].data<float>(), in[0].size(), kind};
    return [work]() { kernels().gate_gradient(work); };
  };
  auto gradient = [s, shape, back](const Arrays& in, const array& d_out, const Arrays&) {
    return made(s, "gated_gradient", {shape, shape}, {in[0], in[1], d_out}, back);
  };
  return made(s, "gated", {shape}, {floats(gate, s), floats(up, s)}, run, gradient)[0];
}

array cross_entropy(const array& logits, const array& labels, mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  require_floating("cross_entropy", "logits", logits);
  auto shape = logits.shape(), rows = shape;
  if (shape.empty() || shape.back() == 0 || (rows.pop_back(), rows != labels.shape()) ||
      !mx::issubdtype(labels.dtype(), mx::integer)) {
    fail("cross_entropy", "logits are ", shape, " and labels ", labels.shape(), " ", labels.dtype(),
        "; they must be [..., vocab] and integers [...]");
  }
  auto run = [](const Arrays& in, Arrays& out) {
    cpu::CrossEntropy work{in[0].data<float>(), in[1].data<int32_t>(), out[0].data<float>(),
        out[1].data<float>(), out[0].size(), size_t(in[0].shape(-1))};
    return [work]() { kernels().cross_entropy(work); };
  };
  auto back = [](const Arrays& in, Arrays& out) {
    cpu::CrossEntropyGradient work{in[0].data<float>(), in[1].data<int32_t>(), in[2].data<float>(),
        in[3].data<float>(), out[0].data<float>(), in[1].size(), size_t(in[0].shape(-1))};
    return [work]() { kernels().cross_entropy_gradient(work); };
  };
  auto gradient = [s, shape, back](const Arrays& in, const array& d_loss, const Arrays& out) {
    return made(s, "cross_entropy_gradient", {shape}, {in[0], in[1], out[1], d_loss}, back);
  };
  Arrays inputs = {floats(logits, s), mx::astype(labels, mx::int32, s)};
  return made(s, "cross_entropy", {rows, rows}, inputs, run, gradient)[0];
}

array causal_softmax(
    const array& scores, float scale, int queries, int window, mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  require_floating("causal_softmax", "scores", scores);
  auto shape = scores.shape();
  if (shape.size() < 2 || queries < 1 || shape.back() < queries ||
      shape[shape.size() - 2] % queries != 0) {
    fail("causal_softmax", "scores are ", shape, " of ", queries,
        " queries; they must be [..., rows, keys], rows a multiple of the queries, and as many "
        "keys at least");
  }
  if (!(scale > 0) || window < 0) {
    fail("causal_softmax", "scale is ", scale, " and window ", window,
        "; they must be positive, or the window 0 for none");
  }
  auto work = [=](const array& x, array& y) {
    size_t keys = x.shape(-1);
    return cpu::CausalSoftmax{x.data<float>(), y.data<float>(), x.size() / keys, size_t(queries),
        keys, size_t(window), scale};
  };
  auto run = [work](const Arrays& in, Arrays& out) {
    return [work = work(in[0], out[0])]() { kernels().causal_softmax(work); };
  };
  auto back = [work](const Arrays& in, Arrays& out) {
    return [work = work(in[0], out[0]), d = in[1].data<float>()]() {
      kernels().causal_softmax_gradient(work, d);
    };
  };
  auto gradient = [s, shape, back](const Arrays&, const array& d_out, const Arrays& out) {
    return made(s, "causal_softmax_gradient", {shape}, {out[0], d_out}, back);
  };
  return made(s, "causal_softmax", {shape}, {floats(scores, s)}, run, gradient)[0];
}

array rms_norm(const array& x, const array& weight, float eps, mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  if (x.ndim() < 1 || x.size() == 0 || weight.shape() != mx::Shape{x.shape(-1)} ||
      x.dtype() != mx::float32) {
    fail("rms_norm", "x is ", x.shape(), " ", x.dtype(), " and the weight ", weight.shape(),
        "; they must be [..., dims] float32, not empty, and [dims]");
  }
  auto run = [eps](const Arrays& in, Arrays& out) {
    size_t dims = in[1].size();
    cpu::RmsNorm work{in[0].data<float>(), nullptr, in[1].data<float>(), out[0].data<float>(),
        in[0].size() / dims, int(dims), eps, 1, true};
    return [work]() { kernels().rms_norm(work); };
  };
  // Two nodes, of which only those are evaluated that are asked for.
  auto back = [eps](bool of_weight) {
    return [eps, of_weight](const Arrays& in, Arrays& out) {
      size_t dims = in[1].size();
      float* d = out[0].data<float>();
      cpu::RmsNormGradient work{in[0].data<float>(), in[1].data<float>(), in[2].data<float>(),
          of_weight ? nullptr : d, of_weight ? d : nullptr, in[0].size() / dims, int(dims), eps};
      return [work]() { kernels().rms_norm_gradient(work); };
    };
  };
  auto gradient = [s, back](const Arrays& in, const array& d_out, const Arrays&) {
    Arrays all = {in[0], in[1], d_out};
    return Arrays{made(s, "rms_norm_gradient", {in[0].shape()}, all, back(false))[0],
        made(s, "rms_norm_weight_gradient", {in[1].shape()}, all, back(true))[0]};
  };
  return made(s, "rms_norm", {x.shape()}, {x, floats(weight, s)}, run, gradient)[0];
}

array add_low_rank(const array& y, const array& x, const array& a, const array& b, float scale,
    mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  for (auto [name, array] : {std::pair("y", &y), {"x", &x}, {"a", &a}, {"b", &b}}) {
    require_floating("add_low_rank", name, *array);
  }
  auto shape = x.shape();
  bool fits = x.ndim() > 0 && a.ndim() == 2 && b.ndim() == 2 && x.shape(-1) == a.shape(0) &&
              a.shape(1) == b.shape(0) && x.shape(-1) > 0;
  if (!fits || (shape.back() = b.shape(1), shape != y.shape())) {
    fail("add_low_rank", "y is ", y.shape(), ", x ", x.shape(), ", a ", a.shape(), " and b ",
        b.shape(), "; they must be [..., out], [..., in], [in, rank] and [rank, out]");
  }
  auto run = [scale](const Arrays& in, Arrays& out) {
    int width = in[1].shape(0);
    cpu::LowRankTerm work{in[0].data<float>(), in[1].data<float>(), in[2].data<float>(),
        in[3].data<float>(), out[0].data<float>(), int(in[0].size() / width), width, in[1].shape(1),
        in[2].shape(1), scale};
    return [work]() { kernels().low_rank_term(work); };
  };
  auto back = [scale](const Arrays& in, Arrays& out) {
    int width = in[1].shape(0);
    cpu::LowRankTermGradient work{in[0].data<float>(), in[1].data<float>(), in[2].data<float>(),
        in[3].data<float>(), out[0].data<float>(), out[1].data<float>(), out[2].data<float>(),
        int(in[0].size() / width), width, in[1].shape(1), in[2].shape(1), scale};
    return [work]() { kernels().low_rank_term_gradient(work); };
  };
  auto gradient = [s, back](const Arrays& in, const array& d_out, const Arrays&) {
    Arrays found = made(s, "add_low_rank_gradient", {in[0].shape(), in[1].shape(), in[2].shape()},
        {in[0], in[1], in[2], d_out}, back);
    found.push_back(d_out);
    return found;
  };
  Arrays inputs = {floats(x, s), floats(a, s), floats(b, s), floats(y, s)};
  return made(s, "add_low_rank", {shape}, inputs, run, gradient)[0];
}

Arrays adamw(const array& parameter, const array& gradient, const array& m, const array& v,
    int step, double by, double rate, double decay, double b1, double b2, double eps,
    mx::StreamOrDevice where) {
  auto s = mx::to_stream(where);
  Arrays inputs = {parameter, gradient, m, v};
  for (const auto& a : inputs) {
    if (a.ndim() != 1 || a.dtype() != mx::float32 || a.size() != parameter.size()) {
      fail("adamw", "there is ", a.shape(), " ", a.dtype(), " beside a parameter ",
          parameter.shape(), "; they must be float32 vectors of one length");
    }
  }
  if (step < 1) {
    fail("adamw", "the step is ", step, "; steps are counted from 1");
  }
  cpu::AdamW values{};
  values.by = by, values.eps = eps;
  values.old_m = b1, values.new_m = 1 - b1, values.old_v = b2, values.new_v = 1 - b2;
  values.keep = 1 - rate * decay;
  values.rate = rate / (1 - std::pow(b1, step));
  values.root = 1 / std::sqrt(1 - std::pow(b2, step));
  auto run = [values](const Arrays& in, Arrays& out) {
    cpu::AdamW work = values;
    work.parameter = in[0].data<float>(), work.gradient = in[1].data<float>();
    work.m = in[2].data<float>(), work.v = in[3].data<float>(), work.n = in[0].size();
    work.next_parameter = out[0].data<float>();
    work.next_m = out[1].data<float>(), work.next_v = out[2].data<float>();
    return [work]() { kernels().adamw(work); };
  };
  return made(s, "adamw", std::vector<mx::Shape>(3, parameter.shape()), inputs, run);
}

} // namespace optiq
