// The convolutions of encoder and decoder, forward and backward, a tile of images at a time, so
// that a tile's activations stay in cache from layer to layer. Weight gradients are summed over
// fixed chunks of the batch and then over the chunks in their order: equal for every number of
// threads.
#pragma once

#include <vector>

#include "cpu/mlp.h"

namespace fastdreamer {

struct ImageSize {
  Index height, width, channels;
  Index count() const { return height * width * channels; }
};

// A layer as it is packed; which panels are there depends on what it was packed for.
struct Conv {
  ConvWeights weights;
  const void *shrink, *grow;  // fine to coarse, coarse to fine; or null
  const float* bias;          // as ConvArgs takes it
};

struct ConvGrad {
  float* weight;  // [coarse, kernel, kernel, fine]
  float* bias;
};

// --- encoder: convolutions with ReLU, then perhaps a linear layer
// ---------------------------------

struct EncodeArgs {
  const Kernels* kernels;  // for a call of N rows
  const Conv* convs;
  int depth;
  const Layer* linear;  // or null
  ImageSize image;
  Index N;
  const unsigned char* pixels;  // [N, image]
  Buffer embed;                 // [N, E], the caller's
};

// What the backward pass needs of the forward pass.
struct EncodeTape {
  EncodeArgs args;
  Buffer hidden[kMaxLayers];  // of every convolution, behind its ReLU
  Buffer flat;                // of the last one in the order [channels, height, width]
  Arena arena;
};

struct EncodeGrads {
  Buffer embed;  // the gradient that arrives
  const ConvGrad* convs;
  LayerGrad linear;
};

class Encode {
 public:
  Encode(const EncodeArgs& args, EncodeTape* tape, Arena& scratch, int threads);
  void run() const;

 private:
  void tile(Index begin, Index images, int thread) const;

  EncodeTape own_;
  EncodeTape* tape_;
  bool taped_;
  int threads_;
  Buffer pixels_;  // [threads, tile]
};

class EncodeBackward {
 public:
  EncodeBackward(const EncodeTape& tape, const EncodeGrads& grads, Arena& scratch, int threads);
  void run() const;

 private:
  void tile(Index begin, Index images, Index chunk, bool add, int thread) const;

  const EncodeTape& tape_;
  EncodeGrads grads_;
  int threads_;
  Buffer pixels_, deltas_[kMaxLayers];  // [threads, tile]
  Buffer flat_;                         // [N], gradient of tape.flat
  FloatBuffer line_;
  std::vector<void*> scratch_;  // of a thread
  float* parts_[kMaxLayers];    // [chunks, weights]
  double* sums_[kMaxLayers];    // [chunks, channels]
  WeightGradients weights_;
};

// --- decoder: a linear layer, then transposed convolutions with a ReLU between them
// ---------------

// What the transposed convolutions make of their first image.
ImageSize grown(ImageSize first, const Conv* convs, int depth);

struct DecodeArgs {
  const Kernels* kernels;  // for a call of N rows
  const Layer* linear;
  bool linear_relu;
  const Layer* first;  // the first transposed convolution, of one pixel: a matrix product
  ImageSize first_image;
  const Conv* convs;  // the others
  int depth;
  Index N;
  const float* feat;            // [N, F]
  float* pixels;                // [N, image], or null where there is a target
  const unsigned char* target;  // [N, image], or null
  double* error;                // the squared error's sum; with a target alone
};

// What the way back through the transposed convolutions leaves.
struct DecodeParts {
  Buffer first_delta;            // before the first convolution's ReLU
  float* parts[kMaxLayers];      // [chunks, weights]
  double* sums[kMaxLayers + 1];  // [chunks, channels]; the last is the first convolution's
};

// Complete when the forward pass ends: backward passes, several at once perhaps, only read it.
struct DecodeTape {
  DecodeArgs args;
  Buffer feat, linear, first;  // as Elem: inputs, and outputs behind their ReLU
  Buffer hidden[kMaxLayers];   // of every other convolution but the last, without a target
  DecodeParts done;            // with a target, for a gradient of 1
  Arena arena;
};

struct DecodeGrads {
  const float* pixels;      // the gradient that arrives, or null where there is a target, and
  float scale;              // that of the error
  float* feat;              // or null
  bool parameters;          // whether the rest is wanted
  LayerGrad linear, first;  // first: [in, kernel, kernel, out], its bias [out]
  const ConvGrad* convs;
};

// What both passes of the decoder go through: the transposed convolutions of a tile and back.
class DecodeTiles {
 public:
  // kept: whether the tape has what lies between the convolutions. parts: where backward() leaves
  // its own, null where it is not called.
  DecodeTiles(const DecodeTape& tape, bool kept, const DecodeParts* parts, Arena& scratch,
              int threads);

  void forward(Index begin, Index images, int thread, double* error) const;
  // From the gradient of the pixels that lies in scratch.
  void backward(Index begin, Index images, Index chunk, bool add, int thread) const;
  Rows last_delta(int thread) const;

 private:
  Rows hidden(int i, Index begin, int thread) const;

  const DecodeTape& tape_;
  bool kept_;
  const DecodeParts* parts_;
  Buffer hidden_[kMaxLayers], deltas_[kMaxLayers];  // [threads, tile]
  FloatBuffer line_, error_;
  std::vector<void*> scratch_;
};

class Decode {
 public:
  // With a tape and a target the gradients of the transposed convolutions are computed at once.
  Decode(const DecodeArgs& args, DecodeTape* tape, Arena& scratch, int threads);
  void run() const;

 private:
  DecodeTape own_;
  DecodeTape* tape_;
  bool taped_;
  int threads_;
  DecodeTiles tiles_;
  double* errors_;  // [chunks]
};

class DecodeBackward {
 public:
  DecodeBackward(const DecodeTape& tape, const DecodeGrads& grads, Arena& scratch, int threads);
  void run() const;

 private:
  const DecodeTape& tape_;
  DecodeGrads grads_;
  int threads_;
  DecodeParts parts_;  // with a target the tape's
  DecodeTiles tiles_;
  Buffer linear_delta_;
  float* scale_;  // [N], or null where the scale is 1
  WeightGradients weights_;
};

}  // namespace fastdreamer
