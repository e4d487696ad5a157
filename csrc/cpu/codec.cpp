#include "cpu/codec.h"

#include <algorithm>
#include <cstdint>

#include "cpu/task.h"

namespace fastdreamer {
namespace {

// Chunks of a batch at most, each with weight gradients of its own.
constexpr Index kChunks = 20;

// A batch cut into chunks of whole tiles; a function of the batch and the kernels alone.
struct Chunks {
  Index images, tile, size, count;

  Chunks(const Kernels& k, Index images) : images(images), tile(k.conv_images) {
    const Index tiles = (images + tile - 1) / tile;
    size = (tiles + kChunks - 1) / kChunks * tile;
    count = (images + size - 1) / size;
  }

  // Calls body(begin, images of the tile, whether it is the chunk's first).
  template <class Body>
  void tiles(Index chunk, const Body& body) const {
    const Index begin = chunk * size, end = std::min(images, begin + size);
    for (Index i = begin; i < end; i += tile) body(i, std::min(tile, end - i), i == begin);
  }
};

// The threads that a loop over the chunks uses at most.
int threads_of(const Kernels& k, Index N, int threads) {
  return static_cast<int>(std::clamp<Index>(Chunks(k, N).count, 1, usable_threads(threads)));
}

// Room for images, an odd number of cache lines apart: the rows of a product are all at the same
// place of their images, and would otherwise share a few sets of the cache.
Buffer take_images(Arena& arena, const Kernels& k, Index count, const ImageSize& size) {
  const Index lines = (size.count() * k.elem_size + 63) / 64 | 1;
  return take_rows(arena, k, count, lines * 64 / k.elem_size);
}

// The sizes of one layer's images.
ConvArgs sizes(const Conv& conv, const ImageSize& fine, const ImageSize& coarse, Index images) {
  ConvArgs x{};
  x.weights = conv.weights;
  x.images = images;
  x.fine_height = fine.height, x.fine_width = fine.width;
  x.coarse_height = coarse.height, x.coarse_width = coarse.width;
  return x;
}

ImageSize shrunk(const ImageSize& fine, const ConvWeights& w) {
  return {(fine.height - w.kernel) / 2 + 1, (fine.width - w.kernel) / 2 + 1, w.coarse};
}

ImageSize grown(const ImageSize& coarse, const ConvWeights& w) {
  return {2 * (coarse.height - 1) + w.kernel, 2 * (coarse.width - 1) + w.kernel, w.fine};
}

// [channels, height, width] from [height, width, channels], or back.
template <class Elem>
void permute(const ImageSize& size, Rows image, Rows flat, Index rows, bool back) {
  const Index pixels = size.height * size.width;
  for (Index r = 0; r < rows; ++r) {
    Elem* one = static_cast<Elem*>(image.data) + r * image.stride;
    Elem* other = static_cast<Elem*>(flat.data) + r * flat.stride;
    for (Index c = 0; c < size.channels; ++c) {
      for (Index p = 0; p < pixels; ++p) {
        if (back) {
          one[p * size.channels + c] = other[c * pixels + p];
        } else {
          other[c * pixels + p] = one[p * size.channels + c];
        }
      }
    }
  }
}

void permute(const Kernels& k, const ImageSize& size, Rows image, Rows flat, Index rows,
             bool back) {
  if (k.elem_size == 2) {
    permute<std::uint16_t>(size, image, flat, rows, back);
  } else {
    permute<std::uint32_t>(size, image, flat, rows, back);
  }
}

// What one layer's gradients take from an arena.
void take_parts(Arena& arena, const Kernels& k, const Conv& conv, Index chunks, Index channels,
                float*& parts, double*& sums) {
  parts = arena.take<float>(chunks * k.conv_gradient_size(conv.weights));
  sums = arena.take<double>(chunks * channels);
}

void sum_bias(const double* sums, Index chunks, Index channels, float scale, float* bias) {
  for (Index c = 0; c < channels; ++c) {
    double total = 0;
    for (Index chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * channels + c];
    bias[c] = static_cast<float>(total * static_cast<double>(scale));
  }
}

// The sums of the chunks' gradients of some layers.
void sum_parts(const Kernels& k, const Conv* convs, int depth, float* const* parts, Index chunks,
               float scale, const ConvGrad* grads, int threads) {
  constexpr Index kElements = 64;  // of a task
  struct Task {
    int layer;
    Index begin;
  };
  std::vector<Task> tasks;
  for (int i = 0; i < depth; ++i) {
    const ConvWeights& w = convs[i].weights;
    for (Index e = 0; e < w.kernel * w.kernel * w.fine; e += kElements) tasks.push_back({i, e});
  }
  parallel_tasks(static_cast<Index>(tasks.size()), threads, [&](Index t, int) {
    const Task& task = tasks[static_cast<std::size_t>(t)];
    const ConvWeights& w = convs[task.layer].weights;
    k.conv_sum(
        {w, parts[task.layer], chunks, k.conv_gradient_size(w), scale, grads[task.layer].weight},
        task.begin, std::min(task.begin + kElements, w.kernel * w.kernel * w.fine));
  });
}

}  // namespace

// --- encoder -------------------------------------------------------------------------------------

Encode::Encode(const EncodeArgs& args, EncodeTape* tape, Arena& scratch, int threads)
    : tape_(tape != nullptr ? tape : &own_),
      taped_(tape != nullptr),
      threads_(threads_of(*args.kernels, args.N, threads)) {
  const Kernels& k = *args.kernels;
  EncodeTape& t = *tape_;
  t.args = args;
  Arena& arena = taped_ ? tape->arena : scratch;
  const Index tiles = threads_ * k.conv_images;
  pixels_ = take_images(scratch, k, tiles, args.image);
  ImageSize size = args.image;
  for (int i = 0; i < args.depth; ++i) {
    size = shrunk(size, args.convs[i].weights);
    t.hidden[i] = take_images(arena, k, taped_ ? args.N : tiles, size);
  }
  if (args.linear != nullptr) t.flat = take_rows(arena, k, args.N, size.count());
}

void Encode::run() const {
  const EncodeArgs& x = tape_->args;
  const Chunks chunks(*x.kernels, x.N);
  parallel_tasks(chunks.count, threads_, [&](Index chunk, int thread) {
    chunks.tiles(chunk, [&](Index begin, Index images, bool) { tile(begin, images, thread); });
  });
  if (x.linear == nullptr) return;
  parallel_tiles(tiling_for(*x.kernels, x.N, threads_), [&](Index begin, Index rows, int) {
    const Task task(*x.kernels, x.N, rows);
    task.kernels.linear({x.linear->forward, tape_->flat.at(begin), rows, x.linear->bias, kNoFloats,
                         Activation::none, kNoRows, x.embed.at(begin), kNoFloats, kNoRows});
  });
}

void Encode::tile(Index begin, Index images, int thread) const {
  const EncodeTape& t = *tape_;
  const EncodeArgs& x = t.args;
  const Kernels& k = *x.kernels;
  const Index scratch = thread * k.conv_images;
  ImageSize size = x.image;
  Rows in = pixels_.at(scratch);
  k.conv_pixels(x.pixels + begin * size.count(), size.count(), images, in);
  for (int i = 0; i < x.depth; ++i) {
    const ImageSize next = shrunk(size, x.convs[i].weights);
    ConvArgs conv = sizes(x.convs[i], size, next, images);
    conv.panels = x.convs[i].shrink;
    conv.in = in;
    conv.bias = x.convs[i].bias;
    conv.relu = true;
    conv.out = t.hidden[i].at(taped_ ? begin : scratch);
    k.conv_shrink(conv);
    in = conv.out, size = next;
  }
  permute(k, size, in, (x.linear != nullptr ? t.flat : x.embed).at(begin), images, false);
}

EncodeBackward::EncodeBackward(const EncodeTape& tape, const EncodeGrads& grads, Arena& scratch,
                               int threads)
    : tape_(tape),
      grads_(grads),
      threads_(threads_of(*tape.args.kernels, tape.args.N, threads)),
      weights_(*tape.args.kernels) {
  const EncodeArgs& x = tape.args;
  const Kernels& k = *x.kernels;
  const Index tiles = threads_ * k.conv_images, chunks = Chunks(k, x.N).count;
  pixels_ = take_images(scratch, k, tiles, x.image);
  ImageSize size = x.image;
  Index need = 1, widest = 1;
  for (int i = 0; i < x.depth; ++i) {
    const ImageSize next = shrunk(size, x.convs[i].weights);
    deltas_[i] = take_images(scratch, k, tiles, next);
    take_parts(scratch, k, x.convs[i], chunks, next.channels, parts_[i], sums_[i]);
    need = std::max(need, k.conv_gradient_scratch(sizes(x.convs[i], size, next, k.conv_images)));
    widest = std::max(widest, next.width * next.channels);
    size = next;
  }
  for (int i = 0; i < threads_; ++i) scratch_.push_back(scratch.bytes(need));
  line_ = take_floats(scratch, threads_, widest);
  if (x.linear != nullptr) {
    flat_ = take_rows(scratch, k, x.N, size.count());
    weights_.add(tape.flat.at(0), x.linear->in, grads.embed.at(0), x.linear->out, x.N, nullptr,
                 grads.linear);
    weights_.prepare(scratch, threads_);
  } else {
    flat_ = grads.embed;
  }
}

void EncodeBackward::run() const {
  const EncodeArgs& x = tape_.args;
  const Kernels& k = *x.kernels;
  if (x.linear != nullptr) {
    parallel_tiles(tiling_for(k, x.N, threads_), [&](Index begin, Index rows, int) {
      const Task task(k, x.N, rows);
      task.kernels.linear({x.linear->backward, grads_.embed.at(begin), rows, nullptr, kNoFloats,
                           Activation::none, kNoRows, flat_.at(begin), kNoFloats, kNoRows});
    });
  }
  const Chunks chunks(k, x.N);
  parallel_tasks(chunks.count, threads_, [&](Index chunk, int thread) {
    chunks.tiles(chunk, [&](Index begin, Index images, bool first) {
      tile(begin, images, chunk, !first, thread);
    });
  });
  sum_parts(k, x.convs, x.depth, parts_, chunks.count, 1.0f, grads_.convs, threads_);
  for (int i = 0; i < x.depth; ++i) {
    sum_bias(sums_[i], chunks.count, x.convs[i].weights.coarse, 1.0f, grads_.convs[i].bias);
  }
  if (x.linear != nullptr) weights_.run();
}

void EncodeBackward::tile(Index begin, Index images, Index chunk, bool add, int thread) const {
  const EncodeArgs& x = tape_.args;
  const Kernels& k = *x.kernels;
  const Index scratch = thread * k.conv_images;
  ImageSize fine[kMaxLayers + 1] = {x.image};
  for (int i = 0; i < x.depth; ++i) fine[i + 1] = shrunk(fine[i], x.convs[i].weights);
  const int last = x.depth - 1;
  const Rows pixels = pixels_.at(scratch), top = deltas_[last].at(scratch);
  k.conv_pixels(x.pixels + begin * x.image.count(), x.image.count(), images, pixels);
  permute(k, fine[x.depth], top, flat_.at(begin), images, true);
  k.conv_relu_backward(top, tape_.hidden[last].at(begin), fine[x.depth].count(), images);
  for (int i = last; i >= 0; --i) {
    const Conv& conv = x.convs[i];
    const ImageSize& coarse = fine[i + 1];
    const Rows delta = deltas_[i].at(scratch);
    const Rows in = i == 0 ? pixels : tape_.hidden[i - 1].at(begin);
    double* sums = sums_[i] + chunk * coarse.channels;
    if (!add) std::fill_n(sums, coarse.channels, 0.0);
    k.conv_channel_sums(delta, images, coarse.height, coarse.width, coarse.channels,
                        line_.at(thread).data, sums);
    ConvArgs args = sizes(conv, fine[i], coarse, images);
    k.conv_gradient(args, in, delta, parts_[i] + chunk * k.conv_gradient_size(conv.weights), add,
                    scratch_[static_cast<std::size_t>(thread)]);
    if (i == 0) continue;
    args.panels = conv.grow;
    args.in = delta;
    args.slope_of = in;
    args.out = deltas_[i - 1].at(scratch);
    k.conv_grow(args);
  }
}

ImageSize grown(ImageSize first, const Conv* convs, int depth) {
  for (int i = 0; i < depth; ++i) first = grown(first, convs[i].weights);
  return first;
}

// --- decoder -------------------------------------------------------------------------------------

DecodeTiles::DecodeTiles(const DecodeTape& tape, bool kept, const DecodeParts* parts,
                         Arena& scratch, int threads)
    : tape_(tape),
      kept_(kept),
      parts_(parts) {
  const DecodeArgs& x = tape.args;
  const Kernels& k = *x.kernels;
  const Index tiles = threads * k.conv_images;
  ImageSize size = x.first_image;
  Index need = 1, widest = size.width * size.channels;
  for (int i = 0; i < x.depth; ++i) {
    const ImageSize next = grown(size, x.convs[i].weights);
    if (i < x.depth - 1 && !kept) hidden_[i] = take_images(scratch, k, tiles, next);
    if (parts != nullptr) {
      deltas_[i] = take_images(scratch, k, tiles, next);
      need = std::max(need, k.conv_gradient_scratch(sizes(x.convs[i], next, size, k.conv_images)));
      widest = std::max(widest, next.width * next.channels);
    }
    size = next;
  }
  if (parts != nullptr) {
    for (int i = 0; i < threads; ++i) scratch_.push_back(scratch.bytes(need));
    line_ = take_floats(scratch, threads, widest);
  }
  if (x.target != nullptr) error_ = take_floats(scratch, tiles, kErrorSums);
}

Rows DecodeTiles::hidden(int i, Index begin, int thread) const {
  if (i < 0) return tape_.first.at(begin);
  return kept_ ? tape_.hidden[i].at(begin)
               : hidden_[i].at(thread * tape_.args.kernels->conv_images);
}

Rows DecodeTiles::last_delta(int thread) const {
  return deltas_[tape_.args.depth - 1].at(thread * tape_.args.kernels->conv_images);
}

void DecodeTiles::forward(Index begin, Index images, int thread, double* error) const {
  const DecodeArgs& x = tape_.args;
  const Kernels& k = *x.kernels;
  ImageSize size = x.first_image;
  for (int i = 0; i < x.depth; ++i) {
    const ImageSize next = grown(size, x.convs[i].weights);
    ConvArgs conv = sizes(x.convs[i], next, size, images);
    conv.panels = x.convs[i].grow;
    conv.in = hidden(i - 1, begin, thread);
    conv.bias = x.convs[i].bias;
    if (i < x.depth - 1) {
      conv.relu = true;
      conv.out = hidden(i, begin, thread);
    } else {
      const Index count = next.count();
      if (x.pixels != nullptr) conv.out32 = {x.pixels + begin * count, count};
      if (x.target != nullptr) {
        conv.target = x.target + begin * count;
        conv.target_stride = count;
        conv.error = error_.at(thread * k.conv_images).data;
        std::fill_n(conv.error, images * kErrorSums, 0.0f);
        if (parts_ != nullptr) conv.out = last_delta(thread);
      }
    }
    k.conv_grow(conv);
    if (conv.target != nullptr) {
      for (Index j = 0; j < images * kErrorSums; ++j) *error += static_cast<double>(conv.error[j]);
    }
    size = next;
  }
}

void DecodeTiles::backward(Index begin, Index images, Index chunk, bool add, int thread) const {
  const DecodeArgs& x = tape_.args;
  const Kernels& k = *x.kernels;
  ImageSize coarse[kMaxLayers + 1] = {x.first_image};
  for (int i = 0; i < x.depth; ++i) coarse[i + 1] = grown(coarse[i], x.convs[i].weights);
  const auto sum = [&](const ImageSize& size, Rows delta, double* all) {
    double* sums = all + chunk * size.channels;
    if (!add) std::fill_n(sums, size.channels, 0.0);
    k.conv_channel_sums(delta, images, size.height, size.width, size.channels,
                        line_.at(thread).data, sums);
  };
  for (int i = x.depth - 1; i >= 0; --i) {
    const Conv& conv = x.convs[i];
    const Rows delta = deltas_[i].at(thread * k.conv_images), in = hidden(i - 1, begin, thread);
    sum(coarse[i + 1], delta, parts_->sums[i]);
    ConvArgs args = sizes(conv, coarse[i + 1], coarse[i], images);
    k.conv_gradient(args, delta, in, parts_->parts[i] + chunk * k.conv_gradient_size(conv.weights),
                    add, scratch_[static_cast<std::size_t>(thread)]);
    args.panels = conv.shrink;
    args.in = delta;
    args.slope_of = in;
    args.out = i == 0 ? parts_->first_delta.at(begin) : deltas_[i - 1].at(thread * k.conv_images);
    k.conv_shrink(args);
  }
  sum(x.first_image, parts_->first_delta.at(begin), parts_->sums[x.depth]);
}

namespace {

DecodeParts take_parts(Arena& arena, const DecodeArgs& x) {
  const Kernels& k = *x.kernels;
  const Index chunks = Chunks(k, x.N).count;
  DecodeParts p{};
  p.first_delta = take_images(arena, k, x.N, x.first_image);
  ImageSize size = x.first_image;
  p.sums[x.depth] = arena.take<double>(chunks * size.channels);
  for (int i = 0; i < x.depth; ++i) {
    size = grown(size, x.convs[i].weights);
    take_parts(arena, k, x.convs[i], chunks, size.channels, p.parts[i], p.sums[i]);
  }
  return p;
}

// Takes what forward and backward pass hand over; complete before the tiles are made.
DecodeTape& take_tape(const DecodeArgs& x, DecodeTape* taped, DecodeTape& own, Arena& scratch) {
  DecodeTape& t = taped != nullptr ? *taped : own;
  Arena& arena = taped != nullptr ? taped->arena : scratch;
  const Kernels& k = *x.kernels;
  t.args = x;
  t.feat = take_rows(arena, k, x.N, x.linear->in);
  t.linear = take_rows(arena, k, x.N, x.linear->out);
  t.first = take_images(arena, k, x.N, x.first_image);
  if (taped == nullptr) return t;
  if (x.target != nullptr) {
    t.done = take_parts(arena, x);
    return t;
  }
  ImageSize size = x.first_image;
  for (int i = 0; i < x.depth - 1; ++i) {
    size = grown(size, x.convs[i].weights);
    t.hidden[i] = take_images(arena, k, x.N, size);
  }
  return t;
}

}  // namespace

Decode::Decode(const DecodeArgs& args, DecodeTape* tape, Arena& scratch, int threads)
    : tape_(&take_tape(args, tape, own_, scratch)),
      taped_(tape != nullptr),
      threads_(threads_of(*args.kernels, args.N, threads)),
      tiles_(*tape_, taped_ && args.target == nullptr,
             taped_ && args.target != nullptr ? &tape_->done : nullptr, scratch, threads_),
      errors_(scratch.take<double>(Chunks(*args.kernels, args.N).count)) {}

void Decode::run() const {
  const DecodeTape& t = *tape_;
  const DecodeArgs& x = t.args;
  const Kernels& k = *x.kernels;
  parallel_tiles(tiling_for(k, x.N, threads_), [&](Index begin, Index rows, int) {
    const Task task(k, x.N, rows);
    const Index F = x.linear->in;
    k.copy({rows_of(x.feat, F).at(begin), nullptr, F, rows, t.feat.at(begin), kNoFloats, false});
    const Activation act = x.linear_relu ? Activation::relu : Activation::none;
    task.kernels.linear({x.linear->forward, t.feat.at(begin), rows, x.linear->bias, kNoFloats, act,
                         kNoRows, t.linear.at(begin), kNoFloats, kNoRows});
    task.kernels.linear({x.first->forward, t.linear.at(begin), rows, x.first->bias, kNoFloats,
                         Activation::relu, kNoRows, t.first.at(begin), kNoFloats, kNoRows});
  });
  const Chunks chunks(k, x.N);
  parallel_tasks(chunks.count, threads_, [&](Index chunk, int thread) {
    errors_[chunk] = 0;
    chunks.tiles(chunk, [&](Index begin, Index images, bool first) {
      tiles_.forward(begin, images, thread, errors_ + chunk);
      if (taped_ && x.target != nullptr) tiles_.backward(begin, images, chunk, !first, thread);
    });
  });
  if (x.target == nullptr) return;
  *x.error = 0;
  for (Index chunk = 0; chunk < chunks.count; ++chunk) *x.error += errors_[chunk];
}

DecodeBackward::DecodeBackward(const DecodeTape& tape, const DecodeGrads& grads, Arena& scratch,
                               int threads)
    : tape_(tape),
      grads_(grads),
      threads_(threads_of(*tape.args.kernels, tape.args.N, threads)),
      parts_(tape.args.target != nullptr ? tape.done : take_parts(scratch, tape.args)),
      tiles_(tape, true, tape.args.target != nullptr ? nullptr : &parts_, scratch, threads_),
      linear_delta_(take_rows(scratch, *tape.args.kernels, tape.args.N, tape.args.linear->out)),
      scale_(nullptr),
      weights_(*tape.args.kernels) {
  const DecodeArgs& x = tape.args;
  if (!grads.parameters) return;
  if (grads.scale != 1.0f) {
    scale_ = scratch.take<float>(x.N);
    std::fill_n(scale_, x.N, grads.scale);
  }
  // the first convolution's weights stand as [in, out]: inputs and deltas change places
  weights_.add(parts_.first_delta.at(0), x.first->out, tape.linear.at(0), x.first->in, x.N, scale_,
               {grads.first.weight, x.first->out, nullptr});
  weights_.add(tape.feat.at(0), x.linear->in, linear_delta_.at(0), x.linear->out, x.N, scale_,
               grads.linear);
  weights_.prepare(scratch, threads_);
}

void DecodeBackward::run() const {
  const DecodeArgs& x = tape_.args;
  const Kernels& k = *x.kernels;
  const Chunks chunks(k, x.N);
  if (x.target == nullptr) {
    const ImageSize size = grown(x.first_image, x.convs, x.depth);
    parallel_tasks(chunks.count, threads_, [&](Index chunk, int thread) {
      chunks.tiles(chunk, [&](Index begin, Index images, bool first) {
        k.copy({rows_of(grads_.pixels, size.count()).at(begin), nullptr, size.count(), images,
                tiles_.last_delta(thread), kNoFloats, false});
        tiles_.backward(begin, images, chunk, !first, thread);
      });
    });
  }
  parallel_tiles(tiling_for(k, x.N, threads_), [&](Index begin, Index rows, int) {
    const Task task(k, x.N, rows);
    const Rows slope = x.linear_relu ? tape_.linear.at(begin) : kNoRows;
    task.kernels.linear({x.first->backward, parts_.first_delta.at(begin), rows, nullptr, kNoFloats,
                         x.linear_relu ? Activation::relu : Activation::none, slope,
                         linear_delta_.at(begin), kNoFloats, kNoRows});
    if (grads_.feat == nullptr) return;
    const Floats feat = rows_of(grads_.feat, x.linear->in).at(begin);
    task.kernels.linear({x.linear->backward, linear_delta_.at(begin), rows, nullptr, kNoFloats,
                         Activation::none, kNoRows, kNoRows, feat, kNoRows});
    if (grads_.scale == 1.0f) return;
    for (Index i = 0; i < rows * x.linear->in; ++i) feat.data[i] *= grads_.scale;
  });
  if (!grads_.parameters) return;
  weights_.run();
  sum_parts(k, x.convs, x.depth, parts_.parts, chunks.count, grads_.scale, grads_.convs, threads_);
  for (int i = 0; i < x.depth; ++i) {
    sum_bias(parts_.sums[i], chunks.count, x.convs[i].weights.fine, grads_.scale,
             grads_.convs[i].bias);
  }
  sum_bias(parts_.sums[x.depth], chunks.count, x.first_image.channels, grads_.scale,
           grads_.first.bias);
}

}  // namespace fastdreamer
