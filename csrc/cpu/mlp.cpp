#include "cpu/mlp.h"

#include <algorithm>

#include "cpu/task.h"

namespace fastdreamer {

Rows columns(const Kernels& k, Rows rows, Index begin) {
  if (rows.data == nullptr) return rows;
  return {static_cast<char*>(rows.data) + begin * k.elem_size, rows.stride};
}

void add_rows(const Kernels& k, Floats from, Index cols, Index rows, Floats to) {
  if (from.data != nullptr) k.copy({from, nullptr, cols, rows, kNoRows, to, true});
}

Buffer take_rows(Arena& arena, const Kernels& k, Index rows, Index width) {
  return {static_cast<char*>(arena.bytes(rows * width * k.elem_size)), width, k.elem_size};
}

FloatBuffer take_floats(Arena& arena, Index rows, Index width) {
  return {arena.take<float>(rows * width), width};
}

MlpBuffers take_mlp(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows, bool keep) {
  MlpBuffers buffers;
  const int count = mlp.depth - (mlp.act_last ? 0 : 1);
  Index widest = 1;
  for (int i = 0; i < count; ++i) widest = std::max(widest, mlp.layers[i].out);
  for (int i = 0; i < count; ++i) {
    if (keep || i < 2) {
      buffers.hidden[i] = take_rows(arena, k, rows, keep ? mlp.layers[i].out : widest);
    } else {
      buffers.hidden[i] = buffers.hidden[i - 2];
    }
    if (keep && saves_slope(mlp.act)) {
      buffers.slope[i] = take_rows(arena, k, rows, mlp.layers[i].out);
    }
    if (keep && mlp.layers[i].norm) {
      buffers.normed[i] = take_rows(arena, k, rows, mlp.layers[i].out);
      buffers.inverse[i] = take_floats(arena, rows, 1);
    }
  }
  return buffers;
}

MlpBuffers take_deltas(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows) {
  MlpBuffers deltas;
  for (int i = 0; i < mlp.depth; ++i) {
    deltas.hidden[i] = take_rows(arena, k, rows, mlp.layers[i].out);
    if (mlp.layers[i].norm) deltas.normed[i] = take_rows(arena, k, rows, mlp.layers[i].out);
  }
  return deltas;
}

MlpBuffers take_unit_deltas(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows) {
  MlpBuffers deltas = take_deltas(arena, k, mlp, rows);
  Buffer& last = deltas.hidden[mlp.depth - 1];
  if (mlp.depth > 1) {
    last = Buffer{};
  } else {
    std::vector<float> ones(static_cast<std::size_t>(rows), 1.0f);
    k.copy({{ones.data(), 1}, nullptr, 1, rows, last.at(0), kNoFloats, false});
  }
  return deltas;
}

void forward(const Kernels& k, const Mlp& mlp, Rows in, Index rows, const MlpBuffers& buffers,
             Index row, Floats out, Floats add, const Ones& ones) {
  for (int i = 0; i < mlp.depth; ++i) {
    const Layer& layer = mlp.layers[i];
    const bool raw = i == mlp.depth - 1 && !mlp.act_last;
    if (raw && layer.row != nullptr && add.data == nullptr && out.stride == 1) {
      k.dot({in, layer.in, rows, layer.row, layer.bias == nullptr ? 0.0f : *layer.bias, out.data});
    } else if (raw) {
      k.linear({layer.forward, in, rows, layer.bias, i == 0 ? add : kNoFloats, Activation::none,
                kNoRows, kNoRows, out, kNoRows, i == 0 ? ones : Ones{}});
    } else {
      const Rows hidden = buffers.hidden[i].at(row), slope = buffers.slope[i].at(row);
      const Rows normed = buffers.normed[i].at(row);
      const Rows sums = normed.data == nullptr ? hidden : normed;
      k.linear({layer.forward, in, rows, layer.bias, i == 0 ? add : kNoFloats,
                layer.norm ? Activation::none : mlp.act, kNoRows, sums, kNoFloats,
                layer.norm ? kNoRows : slope, i == 0 ? ones : Ones{}});
      if (layer.norm) {  // the rows are still near
        k.normalise({layer.norm, layer.out, rows, mlp.act, sums, normed, buffers.inverse[i].at(row),
                     hidden, slope});
      }
      in = hidden;
    }
  }
}

bool plain(const Mlp& mlp, const Readout& as) {
  return mlp.out() == 1 && as.bins == nullptr && !as.squashed;
}

void read_forward(const Kernels& k, const Mlp& mlp, const Readout& as, Rows in, Index rows,
                  const MlpBuffers& buffers, Index row, Floats raw, float* out, Rows slope,
                  const Ones& ones) {
  if (mlp.out() == 1) raw = {out, 1};
  forward(k, mlp, in, rows, buffers, row, raw, kNoFloats, ones);
  if (!plain(mlp, as)) k.read_out({mlp.out(), rows, as, raw, out, slope});
}

Rows behind_norm(const Mlp& mlp, const MlpBuffers& deltas, int i, Index row) {
  return (mlp.layers[i].norm ? deltas.normed : deltas.hidden)[i].at(row);
}

void through_norm(const Kernels& k, const Mlp& mlp, int i, const MlpBuffers& saved, Index saved_row,
                  const MlpBuffers& deltas, Index delta_row, Index rows) {
  const Layer& layer = mlp.layers[i];
  if (!layer.norm) return;
  k.norm_backward({layer.norm, layer.out, rows, deltas.normed[i].at(delta_row),
                   saved.normed[i].at(saved_row), saved.inverse[i].at(saved_row),
                   deltas.hidden[i].at(delta_row)});
}

Rows slope_of(const Mlp& mlp, const MlpBuffers& saved, int i, Index row) {
  return (saves_slope(mlp.act) ? saved.slope : saved.hidden)[i].at(row);
}

void backward_through(const Kernels& k, const Mlp& mlp, const Panels& w, Rows deltas_behind,
                      const MlpBuffers& saved, Index saved_row, const MlpBuffers& deltas,
                      Index delta_row, Index rows) {
  const int last = mlp.depth - 1;
  k.linear({w, deltas_behind, rows, nullptr, kNoFloats, mlp.act,
            slope_of(mlp, saved, last, saved_row), behind_norm(mlp, deltas, last, delta_row),
            kNoFloats, kNoRows});
  through_norm(k, mlp, last, saved, saved_row, deltas, delta_row, rows);
}

void backward(const Kernels& k, const Mlp& mlp, const MlpBuffers& saved, Index saved_row,
              const MlpBuffers& deltas, Index delta_row, Index rows, Floats in_grad, bool add,
              Rows in_grad_elem) {
  for (int i = mlp.depth - 1; i > 0; --i) {
    const Layer& layer = mlp.layers[i];
    const Rows before = behind_norm(mlp, deltas, i - 1, delta_row);
    const Rows slope = slope_of(mlp, saved, i - 1, saved_row);
    if (i == mlp.depth - 1 && deltas.hidden[i].data == nullptr) {
      k.dot_backward({slope, layer.in, rows, mlp.act, layer.row, before});
    } else {
      k.linear({layer.backward, deltas.hidden[i].at(delta_row), rows, nullptr, kNoFloats, mlp.act,
                slope, before, kNoFloats, kNoRows});
    }
    through_norm(k, mlp, i - 1, saved, saved_row, deltas, delta_row, rows);
  }
  if (in_grad.data == nullptr && in_grad_elem.data == nullptr) return;
  k.linear({mlp.layers[0].backward, deltas.hidden[0].at(delta_row), rows, nullptr,
            add ? in_grad : kNoFloats, Activation::none, kNoRows, in_grad_elem, in_grad, kNoRows});
}

namespace {

// Outputs of a layer that are one task: enough to make interleaving the layer's inputs cheap, few
// enough that the threads of a small machine end together.
constexpr Index kChunk = 200;

}  // namespace

void WeightGradients::add(Rows x, Index in, Rows delta, Index out, Index rows, const float* scale,
                          LayerGrad grad, Index rotate) {
  const Index chunks = (out + kChunk - 1) / kChunk, size = (out + chunks - 1) / chunks;
  for (Index begin = 0; begin < out; begin += size) {
    const Index count = std::min(size, out - begin);
    float* weight = grad.weight + begin * grad.stride;
    float* bias = grad.bias == nullptr ? nullptr : grad.bias + begin;
    const Rows d = columns(kernels_, delta, begin);
    // columns [0, in - rotate) go behind the first `rotate` of the gradient, the rest before
    const Index head = in - rotate;
    jobs_.push_back(
        {x, d, head, count, rows, scale, {weight + rotate, grad.stride}, bias, nullptr});
    if (rotate > 0) {
      jobs_.push_back({columns(kernels_, x, head),
                       d,
                       rotate,
                       count,
                       rows,
                       scale,
                       {weight, grad.stride},
                       nullptr,
                       nullptr});
    }
  }
}

void WeightGradients::add(const Mlp& mlp, Rows in, const MlpBuffers& saved,
                          const MlpBuffers& deltas, Index rows, const float* scale,
                          const LayerGrad* grads, Index rotate) {
  for (int i = 0; i < mlp.depth; ++i) {
    add(i == 0 ? in : saved.hidden[i - 1].at(0), mlp.layers[i].in, deltas.hidden[i].at(0),
        mlp.layers[i].out, rows, scale, grads[i], i == 0 ? rotate : 0);
    add_norm(deltas.normed[i].at(0), saved.normed[i].at(0), mlp.layers[i].out, rows, scale,
             grads[i]);
  }
}

void WeightGradients::add_norm(Rows delta, Rows normed, Index N, Index rows, const float* scale,
                               const LayerGrad& grad) {
  if (grad.norm_weight == nullptr && grad.norm_bias == nullptr) return;
  const auto from = [](float* all, Index begin) { return all == nullptr ? all : all + begin; };
  for (Index begin = 0; begin < N; begin += kNormColumns) {
    norms_.push_back({columns(kernels_, delta, begin), columns(kernels_, normed, begin),
                      std::min(kNormColumns, N - begin), rows, scale, from(grad.norm_weight, begin),
                      from(grad.norm_bias, begin)});
  }
}

void WeightGradients::add_sums(Rows delta, Index N, Index rows, float* to) {
  add_norm(delta, delta, N, rows, nullptr, {nullptr, 0, nullptr, nullptr, to});
}

void WeightGradients::prepare(Arena& arena, int threads) {
  Index size = 0;
  for (const auto& job : jobs_) {
    size = std::max(size, kernels_.weight_gradient_scratch(job.in, job.out));
  }
  threads_ = usable_threads(threads);
  scratch_.clear();
  for (int i = 0; i < threads_; ++i) scratch_.push_back(arena.bytes(size));
}

void WeightGradients::run() const {
  const auto products = static_cast<Index>(jobs_.size()), norms = static_cast<Index>(norms_.size());
  parallel_tasks(products + norms, threads_, [&](Index i, int thread) {
    if (i >= products)
      return kernels_.norm_gradient(norms_[static_cast<std::size_t>(i - products)]);
    WeightGradientArgs job = jobs_[static_cast<std::size_t>(i)];
    job.scratch = scratch_[static_cast<std::size_t>(thread)];
    const Task task(kernels_, job.rows, job.out);
    task.kernels.weight_gradient(job);
  });
}

}  // namespace fastdreamer
