// SPDX-License-Identifier: Apache-2.0
// The arguments of the C functions, mirrored field by field in numerics/backends/native.py. All sizes and strides count elements unless they say blocks.
#pragma once

#include <cstdint>

namespace dynasty {

constexpr int32_t kWindow = 8;  // R of docs/numerics.md
constexpr int32_t kMinBits = 2, kMaxDropDepth = 3;
constexpr int32_t kNoExponent = -(1 << 14);
constexpr int32_t kSignedFlag = 0x10, kOccupiedFlag = 0x20, kBitsMask = 0x0F;
constexpr int64_t kMaxBlockChannels = 32;

enum Role : int64_t { kActivation = 0, kWeight = 1, kError = 2 };
enum Scope : int64_t { kTensor = 0, kSample = 1, kRow = 2 };
enum Status : int { kDone = 0, kNonfinite = 1, kValuesNotWritten = 2, kBadArguments = 4 };

extern "C" {

// An operand as [rows, positions, channels]. Codes and values are written in just that order; x has stride_position == 1 or stride_channel == 1.
// The grid, [ceil(rows / block_rows), positions, ceil(channels / block_channels)] blocks, lies as [.., channels, positions] where
// grid_channels_last is 0, and so do relative_exponents and headers; request is read by strides of its own, 0 where it broadcasts.
struct QuantizeArgs {
  const void* x;
  int64_t x_is_bfloat16;
  int64_t rows, positions, channels;
  int64_t stride_row, stride_position, stride_channel;
  int64_t block_rows, block_channels;
  int64_t group_rows, group_channels;  // blocks that share a width; 1, 1 for none
  int64_t grid_channels_last;
  const int16_t* request;
  int64_t request_row, request_position, request_channel;
  int64_t is_threshold, least_bits, most_bits;
  int64_t role, stochastic, force_signed, scope;
  int64_t seed, rank, backward_count, call_index, layer;
  int64_t logical_channels_last;  // the stream counts elements and blocks as [rows, positions, channels], else as [rows, channels, positions]
  int32_t* peaks;                 // scratch, one a block
  int32_t* plans;                 // scratch, one a block
  int32_t* largest_exponents;     // one a scope
  uint8_t* codes;
  uint16_t* values;  // bfloat16; null for none
  int8_t* relative_exponents;  // scale exponent less the scope's largest exponent, in [-15, 17]; 0 where the block is zero
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

// bfloat16 [rows, positions, channels] -> float32 [rows, channels, positions] or the same order, plus a bias for each channel where there is one.
struct WidenArgs {
  const uint16_t* values;
  const float* bias;
  int64_t rows, positions, channels;
  int64_t channels_last;
  float* out;
  int64_t threads;
};

// Mean of squares over groups of rows and a block's channels at each position, in a fixed order: each channel over its rows, then the channels.
// out lies as the grid does, with a row for each group.
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

int dynasty_mean_squares(const MeanSquaresArgs* args);
int dynasty_quantize(const QuantizeArgs* args);
int dynasty_dequantize(const DequantizeArgs* args);
int dynasty_widen(const WidenArgs* args);
void dynasty_stream_numbers(const int64_t* position_and_code, int64_t count, uint16_t* out);
}

}  // namespace dynasty
