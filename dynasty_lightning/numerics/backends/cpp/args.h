// SPDX-License-Identifier: Apache-2.0
// Rendered by numerics/backends/cpp_args.py. Do not edit.
// All sizes and strides count elements unless they are of blocks.
// clang-format off
#pragma once

#include <cstdint>

namespace dynasty {

constexpr int32_t kWindow = 8;  // R of docs/reference/numerics.md
constexpr int32_t kMinBits = 2;
constexpr int32_t kMaxBits = 8;
constexpr int64_t kAllWidths = 36344967712;  // no width is raised
constexpr int32_t kMaxDropDepth = 3;
constexpr int32_t kNoExponent = -16384;  // below every exponent
constexpr int32_t kLeastThreshold = -300;  // beyond these two, all ask the same
constexpr int32_t kMostThreshold = 200;
constexpr int32_t kDropCode = 8;  // added to the role for the numbers that decide drops
constexpr int64_t kMaxBlockChannels = 32;
constexpr int32_t kBitsMask = 15;  // a block's header
constexpr int kSignedShift = 4;
constexpr int kDepthShift = 6;  // in a plan, which begins as a header does
constexpr int32_t kSignedFlag = 16;
constexpr int32_t kOccupiedFlag = 32;
constexpr int32_t kNegatedFlag = 64;  // of a header
constexpr int kSteps = 4;  // of an LSB to twice that, where scales have mantissas
constexpr int kStepBits = 2;
constexpr int32_t kMaxScaledBits = 5;  // widest block that has them

enum Role : int64_t { kActivation = 0, kWeight = 1, kError = 2 };
enum Scope : int64_t { kTensor = 0, kSample = 1, kRow = 2 };
enum Status : int { kDone = 0, kNonfinite = 1, kValuesNotWritten = 2, kBadArguments = 4 };

extern "C" {

// An operand as [rows, positions, channels]. Codes and values are written in just that order; x has
// stride_position == 1 or stride_channel == 1. The grid, [ceil(rows / block_rows), positions,
// ceil(channels / block_channels)] blocks, lies as [.., channels, positions] where
// grid_channels_last is 0, and so do relative_exponents and headers; request is read by strides of
// its own, 0 where it broadcasts.
struct QuantizeArgs {
  const void* x;
  int64_t x_is_bfloat16;
  int64_t rows, positions, channels;
  int64_t stride_row, stride_position, stride_channel;
  int64_t block_rows, block_channels;
  int64_t is_split, scale_bits;  // both 0: plain blocks
  // of blocks that are not plain, in quarters of an LSB; read where rounding is to nearest
  int64_t signed_slack, unsigned_slack;
  int64_t group_rows, group_channels;  // blocks that share a width; 1, 1 for none
  int64_t grid_channels_last;
  const int16_t* request;
  int64_t request_row, request_position, request_channel;
  int64_t is_threshold, least_bits, most_bits;
  int64_t raised_widths;  // nine digits of four bits: what a width is raised to
  int64_t role, stochastic, force_signed, scope;
  int64_t seed, rank, backward_count, call_index, layer;
  // the stream counts [rows, positions, channels], else channels before positions
  int64_t logical_channels_last;
  int32_t* peaks;  // scratch, one a block; two where it is not plain
  int32_t* plans;  // scratch, one a block
  int32_t* largest_exponents;  // one a scope
  uint8_t* codes;
  uint16_t* values;  // bfloat16; null for none
  // scale less the scope's largest exponent, in [-17, 17]; 0 in a block of zeros
  int8_t* relative_exponents;
  uint8_t* headers;
  int64_t threads;
};

// One scope.
struct DequantizeArgs {
  const uint8_t* codes;
  const int8_t* relative_exponents;
  const uint8_t* headers;
  int64_t largest_exponent;
  int64_t rows, positions, channels;
  int64_t block_rows, block_channels;
  int64_t grid_channels_last;
  uint16_t* values;  // bfloat16
  int64_t threads;
};

// bfloat16 [rows, positions, channels] -> float32 [rows, channels, positions] or the same order,
// plus a bias for each channel where there is one.
struct WidenArgs {
  const uint16_t* values;
  const float* bias;
  int64_t rows, positions, channels;
  int64_t channels_last;
  float* out;
  int64_t threads;
};

// Mean of squares over groups of rows and a block's channels at each position, in a fixed order:
// each channel over its rows, then the channels. out lies as the grid does, with a row for each
// group.
struct MeanSquaresArgs {
  const void* x;
  int64_t x_is_bfloat16;
  int64_t rows, positions, channels;
  int64_t stride_row, stride_position, stride_channel;
  int64_t group_rows, block_channels;
  int64_t grid_channels_last;
  double* out;
  int64_t threads;
};

int dynasty_quantize(const QuantizeArgs* args);
int dynasty_dequantize(const DequantizeArgs* args);
int dynasty_widen(const WidenArgs* args);
int dynasty_mean_squares(const MeanSquaresArgs* args);
void dynasty_stream_numbers(const int64_t* position_and_code, int64_t count, uint16_t* out);
// Bytes of a struct of this table, by its place; -1 for none.
int64_t dynasty_args_size(int64_t place);
}

constexpr int64_t kArgsSizes[] = {
    sizeof(QuantizeArgs), sizeof(DequantizeArgs), sizeof(WidenArgs), sizeof(MeanSquaresArgs)};

}  // namespace dynasty
