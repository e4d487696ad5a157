#include "bindings/codec.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "bindings/weights.h"
#include "cpu/codec.h"
#include "cpu/parallel.h"
#include "cpu/task.h"

namespace fastdreamer {
namespace {

// A tensor's memory of the precision's elements: float32, or int16 that are the bits of bfloat16.
char format_of(Precision precision) { return precision == Precision::bf16 ? 'h' : 'f'; }

Buffer buffer_of(const Kernels& k, const void* data, Index width) {
  return {static_cast<char*>(const_cast<void*>(data)), width, k.elem_size};
}

// Convolutions of stride 2: weights [coarse, kernel, kernel, fine] each.
class PackedConvs {
 public:
  // transposed: from coarse to fine. `all`: panels for both directions; else for the layers'
  // own, and `first_backward` for the first layer's other, too.
  PackedConvs(const char* op, const py::list& weights, const py::list& biases, bool transposed,
              bool bf16, bool gradients, bool first_backward, int threads)
      : transposed_(transposed) {
    const Kernels& k = kernels(bf16 ? Precision::bf16 : Precision::fp32);
    if (weights.empty() || weights.size() > kMaxLayers || biases.size() != weights.size()) {
      fail(std::string(op) + ": there must be 1 to " + std::to_string(kMaxLayers) +
           " convolutions with a bias each, got " + std::to_string(weights.size()) +
           " weights and " + std::to_string(biases.size()) + " biases");
    }
    struct Task {
      ConvPackArgs args;
      bool grow;
    };
    std::vector<Task> tasks;
    Arrays arrays(op);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Array shape(op, "weight", weights[i]);
      if (shape.ndim() != 4 || shape.size(1) != shape.size(2) || shape.size(0) < 1 ||
          shape.size(3) < 1 || shape.size(1) < 1 || shape.size(1) > kMaxKernel) {
        fail(std::string(op) + ": a weight must be [coarse, kernel, kernel, fine] with a kernel " +
             "of 1 to " + std::to_string(kMaxKernel));
      }
      const ConvWeights w{shape.size(1), shape.size(3), shape.size(0)};
      const Index out = transposed ? w.fine : w.coarse;
      if (i > 0 && (transposed ? w.coarse != convs_.back().weights.fine
                               : w.fine != convs_.back().weights.coarse)) {
        fail(std::string(op) + ": a convolution's channels do not fit the one before");
      }
      const float* source = arrays.in("weight", weights[i], {w.coarse, w.kernel, w.kernel, w.fine});
      const float* given = arrays.in("bias", biases[i], {out});
      const Index copies = transposed ? 4 : 1;
      float* bias = arena_.take<float>(copies * out);
      for (Index c = 0; c < copies; ++c) std::copy_n(given, out, bias + c * out);
      Conv conv{w, nullptr, nullptr, bias};
      const bool backward = gradients && (i > 0 || first_backward);
      if (!transposed || backward) {
        void* panels = arena_.bytes(k.conv_shrink_size(w));
        tasks.push_back({{w, source, panels}, false});
        conv.shrink = panels;
      }
      if (transposed || backward) {
        void* panels = arena_.bytes(k.conv_grow_size(w));
        tasks.push_back({{w, source, panels}, true});
        conv.grow = panels;
      }
      convs_.push_back(conv);
    }
    const WithoutGil released;
    parallel_tasks(static_cast<Index>(tasks.size()), threads, [&](Index i, int) {
      const Task& task = tasks[static_cast<std::size_t>(i)];
      (task.grow ? k.conv_pack_grow : k.conv_pack_shrink)(task.args);
    });
  }

  const std::vector<Conv>& convs() const { return convs_; }
  int depth() const { return static_cast<int>(convs_.size()); }

  // Destinations of the gradients: lists of arrays like the weights and biases.
  std::vector<ConvGrad> grads(Arrays& arrays, const py::list& weights,
                              const py::list& biases) const {
    if (weights.size() != convs_.size() || biases.size() != convs_.size()) {
      fail("PackedConvs: one gradient a convolution");
    }
    std::vector<ConvGrad> list;
    for (std::size_t i = 0; i < convs_.size(); ++i) {
      const ConvWeights& w = convs_[i].weights;
      list.push_back(
          {arrays.out("weight gradient", weights[i], {w.coarse, w.kernel, w.kernel, w.fine}),
           arrays.out("bias gradient", biases[i], {transposed_ ? w.fine : w.coarse})});
    }
    return list;
  }

 private:
  bool transposed_;
  std::vector<Conv> convs_;
  Arena arena_;
};

LayerGrad layer_grad(Arrays& arrays, py::handle weight, py::handle bias, Index out, Index in) {
  return {arrays.out("weight gradient", weight, {out, in}), in,
          arrays.out("bias gradient", bias, {out})};
}

// --- encoder -------------------------------------------------------------------------------------

class PackedEncoder {
 public:
  PackedEncoder(py::list weights, py::list biases, py::object linear, py::object linear_bias,
                bool bf16, bool gradients, int threads)
      : precision_(bf16 ? Precision::bf16 : Precision::fp32),
        gradients_(gradients),
        convs_("PackedEncoder", weights, biases, false, bf16, gradients, false, threads) {
    if (linear.is_none()) return;
    py::list one, bias;
    one.append(linear);
    bias.append(linear_bias);
    linear_ = std::make_unique<PackedMlp>(one, bias, py::list(), "relu", false, bf16, gradients, 0,
                                          0, 0, threads);
  }

  Precision precision() const { return precision_; }
  bool gradients() const { return gradients_; }
  const PackedConvs& convs() const { return convs_; }
  const Layer* linear() const { return linear_ == nullptr ? nullptr : linear_->mlp().layers; }

 private:
  Precision precision_;
  bool gradients_;
  PackedConvs convs_;
  std::unique_ptr<PackedMlp> linear_;
};

// What Python holds between forward and backward: the tape, and all that it points into.
struct EncodeRun {
  py::object pack;
  Arrays arrays{"encode"};
  EncodeTape tape;
};

// pixels: [N, height, width, channels] uint8. embed: [N, E] float32, or int16 (the bits of
// bfloat16) with bfloat16 weights.
std::unique_ptr<EncodeRun> encode_forward(py::object pack, py::handle pixels, py::handle embed,
                                          bool keep, int threads) {
  const char* op = "encode";
  if (threads < 1) fail("encode: threads must be at least 1");
  auto run = std::make_unique<EncodeRun>();
  run->pack = pack;
  const PackedEncoder& encoder = pack.cast<const PackedEncoder&>();
  if (keep && !encoder.gradients()) fail("encode: the weights were not packed for gradients");
  const std::vector<Conv>& convs = encoder.convs().convs();
  const Array shape(op, "pixels", pixels);
  if (shape.ndim() != 4 || shape.size(0) < 1) {
    fail("encode: pixels must be [N, height, width, channels], N not 0");
  }
  const Kernels& k = kernels_for(kernels(encoder.precision()), shape.size(0));
  EncodeArgs x{};
  x.kernels = &k;
  x.convs = convs.data();
  x.depth = encoder.convs().depth();
  x.linear = encoder.linear();
  x.N = shape.size(0);
  x.image = {shape.size(1), shape.size(2), convs[0].weights.fine};
  Index height = x.image.height, width = x.image.width;
  for (const Conv& conv : convs) {
    if (height < conv.weights.kernel || width < conv.weights.kernel) {
      fail("encode: pixels are too small for the convolutions");
    }
    height = (height - conv.weights.kernel) / 2 + 1, width = (width - conv.weights.kernel) / 2 + 1;
  }
  const Index flat = height * width * convs.back().weights.coarse;
  if (x.linear != nullptr && x.linear->in != flat) {
    fail("encode: the linear layer takes " + std::to_string(x.linear->in) +
         " inputs, the convolutions have " + std::to_string(flat) + " outputs");
  }
  const Index E = x.linear == nullptr ? flat : x.linear->out;
  x.pixels = static_cast<const unsigned char*>(run->arrays.in_format(
      "pixels", pixels, {x.N, x.image.height, x.image.width, x.image.channels}, 'B'));
  x.embed = buffer_of(
      k, run->arrays.out_format("embed", embed, {x.N, E}, format_of(encoder.precision())), E);
  run->arrays.check_overlap();
  Arena scratch;
  const Encode pass(x, keep ? &run->tape : nullptr, scratch, threads);
  {
    const WithoutGil released;
    pass.run();
  }
  if (!keep) return nullptr;
  return run;
}

// grad: of embed, in its format. weights, biases: where the convolutions' gradients go; linear,
// linear_bias: the linear layer's, or None.
void encode_backward(EncodeRun& run, py::handle grad, py::list weights, py::list biases,
                     py::object linear, py::object linear_bias, int threads) {
  const char* op = "encode";
  if (threads < 1) fail("encode: threads must be at least 1");
  const PackedEncoder& encoder = run.pack.cast<const PackedEncoder&>();
  const EncodeArgs& x = run.tape.args;
  const Kernels& k = *x.kernels;
  Arrays arrays(op);
  EncodeGrads g{};
  const Index E = x.embed.stride;
  g.embed =
      buffer_of(k, arrays.in_format("grad", grad, {x.N, E}, format_of(encoder.precision())), E);
  const std::vector<ConvGrad> convs = encoder.convs().grads(arrays, weights, biases);
  g.convs = convs.data();
  if (x.linear != nullptr) {
    g.linear = layer_grad(arrays, linear, linear_bias, x.linear->out, x.linear->in);
  }
  arrays.check_overlap();
  Arena scratch;
  const EncodeBackward pass(run.tape, g, scratch, threads);
  const WithoutGil released;
  pass.run();
}

// --- decoder -------------------------------------------------------------------------------------

class PackedDecoder {
 public:
  // weights: [in, kernel, kernel, out] of every transposed convolution; the first sees one pixel.
  PackedDecoder(py::list weights, py::list biases, py::object linear, py::object linear_bias,
                bool linear_relu, bool bf16, bool gradients, int threads)
      : precision_(bf16 ? Precision::bf16 : Precision::fp32),
        gradients_(gradients),
        linear_relu_(linear_relu),
        linear_(list_of(linear), list_of(linear_bias), py::list(), "relu", false, bf16, gradients,
                0, 0, 0, threads) {
    const char* op = "PackedDecoder";
    if (weights.size() < 2 || biases.size() != weights.size()) {
      fail("PackedDecoder: there must be at least 2 convolutions with a bias each");
    }
    const Kernels& k = kernels(precision_);
    const Array shape(op, "weight", weights[0]);
    if (shape.ndim() != 4 || shape.size(1) != shape.size(2) || shape.size(1) < 1 ||
        shape.size(3) < 1 || shape.size(0) != linear_.mlp().out()) {
      fail("PackedDecoder: the first weight must be [linear, kernel, kernel, out]");
    }
    const Index in = shape.size(0), kernel = shape.size(1), channels = shape.size(3);
    const Index out = kernel * kernel * channels;
    first_image_ = {kernel, kernel, channels};
    Arrays arrays(op);
    const float* weight = arrays.in("weight", weights[0], {in, kernel, kernel, channels});
    const float* given = arrays.in("bias", biases[0], {channels});
    float* bias = arena_.take<float>(out);
    for (Index i = 0; i < out; ++i) bias[i] = given[i % channels];
    const auto panels = [&](Index K, Index N) {
      return Panels{arena_.bytes(k.panels_size(K, N)), K, N};
    };
    first_ = {in, out, panels(in, out), {nullptr, out, in}, bias, nullptr};
    std::vector<PackArgs> jobs = {{weight, out, false, 0, 0, first_.forward}};
    if (gradients) {
      first_.backward = panels(out, in);
      jobs.push_back({weight, out, true, 0, 0, first_.backward});
    }
    pack_all(k, jobs, nullptr, threads);
    py::list rest_weights, rest_biases;
    for (std::size_t i = 1; i < weights.size(); ++i) {
      rest_weights.append(weights[i]);
      rest_biases.append(biases[i]);
    }
    convs_ = std::make_unique<PackedConvs>(op, rest_weights, rest_biases, true, bf16, gradients,
                                           true, threads);
    if (convs_->convs()[0].weights.coarse != channels) {
      fail("PackedDecoder: a convolution's channels do not fit the one before");
    }
  }

  Precision precision() const { return precision_; }
  bool gradients() const { return gradients_; }
  bool linear_relu() const { return linear_relu_; }
  const Layer* linear() const { return linear_.mlp().layers; }
  const Layer* first() const { return &first_; }
  const ImageSize& first_image() const { return first_image_; }
  const PackedConvs& convs() const { return *convs_; }

 private:
  static py::list list_of(const py::object& one) {
    py::list list;
    list.append(one);
    return list;
  }

  Precision precision_;
  bool gradients_, linear_relu_;
  PackedMlp linear_;
  Layer first_;
  ImageSize first_image_;
  std::unique_ptr<PackedConvs> convs_;
  Arena arena_;
};

struct DecodeRun {
  py::object pack;
  Arrays arrays{"decode"};
  DecodeTape tape;
};

// feat: [N, F]. pixels: where [N, height, width, channels] go, or None with a target, uint8 of that
// shape; then the sum of the squared errors is returned. Returns (tape or None, error).
py::tuple decode_forward(py::object pack, py::handle feat, py::object pixels, py::object target,
                         bool keep, int threads) {
  if (threads < 1) fail("decode: threads must be at least 1");
  if (pixels.is_none() == target.is_none()) fail("decode: either pixels or a target");
  auto run = std::make_unique<DecodeRun>();
  run->pack = pack;
  const PackedDecoder& decoder = pack.cast<const PackedDecoder&>();
  if (keep && !decoder.gradients()) fail("decode: the weights were not packed for gradients");
  DecodeArgs x{};
  x.linear = decoder.linear();
  x.linear_relu = decoder.linear_relu();
  x.first = decoder.first();
  x.first_image = decoder.first_image();
  x.convs = decoder.convs().convs().data();
  x.depth = decoder.convs().depth();
  const Array shape("decode", "feat", feat);
  if (shape.ndim() != 2 || shape.size(0) < 1) fail("decode: feat must be [N, F], N not 0");
  x.N = shape.size(0);
  x.kernels = &kernels_for(kernels(decoder.precision()), x.N);
  x.feat = run->arrays.in("feat", feat, {x.N, x.linear->in});
  const ImageSize image = grown(x.first_image, x.convs, x.depth);
  x.pixels =
      run->arrays.maybe_out("pixels", pixels, {x.N, image.height, image.width, image.channels});
  if (!target.is_none()) {
    x.target = static_cast<const unsigned char*>(run->arrays.in_format(
        "target", target, {x.N, image.height, image.width, image.channels}, 'B'));
  }
  run->arrays.check_overlap();
  double error = 0;
  x.error = &error;
  Arena scratch;
  const Decode pass(x, keep ? &run->tape : nullptr, scratch, threads);
  {
    const WithoutGil released;
    pass.run();
  }
  run->tape.args.error = nullptr;
  if (!keep) return py::make_tuple(py::none(), error);
  return py::make_tuple(std::move(run), error);
}

// grad: of the pixels, or None where there was a target, and then scale, that of the error. feat:
// where its gradient goes, or None. weights, biases, linear, linear_bias: likewise; None: weights.
void decode_backward(DecodeRun& run, py::object grad, double scale, py::object feat,
                     py::object weights, py::object biases, py::object linear,
                     py::object linear_bias, int threads) {
  const char* op = "decode";
  if (threads < 1) fail("decode: threads must be at least 1");
  const PackedDecoder& decoder = run.pack.cast<const PackedDecoder&>();
  const DecodeArgs& x = run.tape.args;
  if (grad.is_none() != (x.target != nullptr)) fail("decode: a gradient of what was computed");
  Arrays arrays(op);
  DecodeGrads g{};
  const ImageSize image = grown(x.first_image, x.convs, x.depth);
  g.pixels =
      arrays.maybe_in("grad of pixels", grad, {x.N, image.height, image.width, image.channels});
  g.scale = static_cast<float>(scale);
  g.feat = arrays.maybe_out("grad of feat", feat, {x.N, x.linear->in});
  g.parameters = !weights.is_none();
  std::vector<ConvGrad> convs;
  if (g.parameters) {
    const py::list all_weights = weights, all_biases = biases;
    py::list rest_weights, rest_biases;
    for (std::size_t i = 1; i < all_weights.size(); ++i) {
      rest_weights.append(all_weights[i]);
      rest_biases.append(all_biases[i]);
    }
    const ImageSize& first = x.first_image;
    g.first = {arrays.out("weight gradient", all_weights[0],
                          {x.first->in, first.height, first.width, first.channels}),
               x.first->out, arrays.out("bias gradient", all_biases[0], {first.channels})};
    convs = decoder.convs().grads(arrays, rest_weights, rest_biases);
    g.convs = convs.data();
    g.linear = layer_grad(arrays, linear, linear_bias, x.linear->out, x.linear->in);
  }
  arrays.check_overlap();
  Arena scratch;
  const DecodeBackward pass(run.tape, g, scratch, threads);
  const WithoutGil released;
  pass.run();
}

}  // namespace

void bind_codec(py::module_& m) {
  m.attr("MAX_KERNEL") = kMaxKernel;  // side of a convolution's
  py::class_<PackedEncoder, std::shared_ptr<PackedEncoder>>(m, "PackedEncoder",
                                                            "A packed encoder stack.")
      .def(py::init<py::list, py::list, py::object, py::object, bool, bool, int>(),
           py::arg("weights"), py::arg("biases"), py::arg("linear"), py::arg("linear_bias"),
           py::arg("bf16"), py::arg("gradients"), py::arg("threads"))
      .def_property_readonly("gradients", &PackedEncoder::gradients);
  py::class_<PackedDecoder, std::shared_ptr<PackedDecoder>>(m, "PackedDecoder",
                                                            "A packed decoder stack.")
      .def(py::init<py::list, py::list, py::object, py::object, bool, bool, bool, int>(),
           py::arg("weights"), py::arg("biases"), py::arg("linear"), py::arg("linear_bias"),
           py::arg("linear_relu"), py::arg("bf16"), py::arg("gradients"), py::arg("threads"))
      .def_property_readonly("gradients", &PackedDecoder::gradients);
  py::class_<EncodeRun>(m, "EncodeRun", "The tape of encode_forward.");
  py::class_<DecodeRun>(m, "DecodeRun", "The tape of decode_forward.");
  m.def("encode_forward", &encode_forward, py::arg("pack"), py::arg("pixels"), py::arg("embed"),
        py::arg("keep"), py::arg("threads"), "See csrc/bindings/codec.cpp.");
  m.def("encode_backward", &encode_backward, py::arg("tape"), py::arg("grad"), py::arg("weights"),
        py::arg("biases"), py::arg("linear"), py::arg("linear_bias"), py::arg("threads"),
        "See csrc/bindings/codec.cpp.");
  m.def("decode_forward", &decode_forward, py::arg("pack"), py::arg("feat"), py::arg("pixels"),
        py::arg("target"), py::arg("keep"), py::arg("threads"), "See csrc/bindings/codec.cpp.");
  m.def("decode_backward", &decode_backward, py::arg("tape"), py::arg("grad"), py::arg("scale"),
        py::arg("feat"), py::arg("weights"), py::arg("biases"), py::arg("linear"),
        py::arg("linear_bias"), py::arg("threads"), "See csrc/bindings/codec.cpp.");
}

}  // namespace fastdreamer
