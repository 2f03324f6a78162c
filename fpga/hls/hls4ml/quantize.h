// SPDX-License-Identifier: Apache-2.0
// Quantizes one row of activations (one sample, all positions) and packs it for the core, with integers only: the numbers of
// fpga/quantizer.py, for fixed-point input.
#pragma once

#include "dpgemm/types.h"

namespace dp {

constexpr int kWindow = 8;            // binades between the row's largest block and the smallest that counts (docs/numerics.md)
constexpr int kMaxValueBits = 24;     // what a float32 holds, so that the host's quantizer sees the same numbers
constexpr int kNoBlock = -(1 << 14);  // below every exponent

// One block of one row: kEdge channels at a position.
struct Group {
  int16_t exponent;  // floor(log2(largest magnitude))
  int16_t scale;     // exponent of the mantissas' LSB
  uint8_t width;     // bits of a mantissa, sign included; 0: a zero block
  bool is_signed;
};

inline int top_bit(uint32_t value) {
#pragma HLS INLINE
  int top = 0;
  BITS: for (int bit = 0; bit < 32; ++bit) {
#pragma HLS UNROLL
    if ((value >> bit) & 1) top = bit;
  }
  return top;
}

// magnitude / 2**shift, rounded to nearest-even.
inline uint32_t scale_down(uint32_t magnitude, int shift) {
#pragma HLS INLINE
  if (shift <= 0) return magnitude << -shift;
  if (shift > kMaxValueBits + 1) return 0;
  const uint32_t kept = magnitude >> shift;
  const uint32_t rest = magnitude & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return kept + (rest > half || (rest == half && (kept & 1)) ? 1 : 0);
}

// C gives what is known when the layer is built:
//   positions, channels, fraction (bits of a value below the point), request_positions, request_blocks (1 or whole), is_threshold,
//   least_bits, most_bits, group_blocks (channel blocks that share a width; 0: none)
template <class C>
struct RowQuantizer {
  static constexpr int kBlocks = (C::channels + kEdge - 1) / kEdge;
  static constexpr int kSegments = (kBlocks + kTile - 1) / kTile;
  static constexpr int kMaxWords = C::positions * kSegments * (1 + kMaxSegmentWords);

  // x: [position][channel]; request: [position or 0][channel block or 0]; words: at least kMaxWords. Returns the words written.
  template <class Request>
  static uint32_t pack(const int32_t* x, const Request* request, Word_t* words, int32_t& base) {
    static Group groups[C::positions * kBlocks];
    static int16_t mantissas[C::positions * kBlocks * kEdge];
    const int ceiling = choose(x, request, groups);
    base = round(x, ceiling, groups, mantissas);
    return write(groups, mantissas, base, words);
  }

 private:
  static int32_t value_at(const int32_t* x, int position, int channel) {
#pragma HLS INLINE
    return channel < C::channels ? x[position * C::channels + channel] : 0;
  }

  // Exponent, sign and width of each group; returns the largest exponent among those with a width.
  template <class Request>
  static int choose(const int32_t* x, const Request* request, Group* groups) {
    int ceiling = kNoBlock;
    POSITIONS: for (int p = 0; p < C::positions; ++p) {
      BLOCKS: for (int b = 0; b < kBlocks; ++b) {
        uint32_t peak = 0;
        bool is_signed = false;
        CHANNELS: for (int c = 0; c < kEdge; ++c) {
          const int32_t value = value_at(x, p, b * kEdge + c);
          const uint32_t magnitude = uint32_t(value < 0 ? -value : value);
          peak = magnitude > peak ? magnitude : peak;
          is_signed |= value < 0;
        }
        const int exponent = top_bit(peak) - C::fraction;
        const int asked = int(request[(C::request_positions > 1 ? p : 0) * C::request_blocks + (C::request_blocks > 1 ? b : 0)]);
        int width = asked;
        if (C::is_threshold) {
          const int above = exponent - asked;
          const int least = C::least_bits > kMinBits ? C::least_bits : kMinBits;
          width = above + 1 + (is_signed ? 1 : 0);
          width = width < least ? least : width > C::most_bits ? C::most_bits : width;
          if (above < 0) width = C::least_bits;
        }
        Group& group = groups[p * kBlocks + b];
        group.exponent = int16_t(exponent);
        group.scale = 0;
        group.width = uint8_t(peak ? width : 0);
        group.is_signed = is_signed;
        if (group.width && exponent > ceiling) ceiling = exponent;
      }
      if (C::group_blocks > 0) share(groups + p * kBlocks);
    }
    return ceiling;
  }

  // Each non-zero block of a run takes the run's largest width.
  static void share(Group* groups) {
    constexpr int kRun = C::group_blocks > 0 ? C::group_blocks : 1;
    RUNS: for (int first = 0; first < kBlocks; first += kRun) {
      const int end = first + kRun < kBlocks ? first + kRun : kBlocks;
      uint8_t most = 0;
      MOST: for (int b = first; b < end; ++b) most = groups[b].width > most ? groups[b].width : most;
      SET: for (int b = first; b < end; ++b) {
        if (groups[b].width) groups[b].width = most;
      }
    }
  }

  // Mantissas; groups without any other than zero become zero blocks. Returns the smallest scale, 0 if there is none.
  static int round(const int32_t* x, int ceiling, Group* groups, int16_t* mantissas) {
    int base = -kNoBlock;
    POSITIONS: for (int p = 0; p < C::positions; ++p) {
      BLOCKS: for (int b = 0; b < kBlocks; ++b) {
        Group& group = groups[p * kBlocks + b];
        const int sign = group.is_signed ? 1 : 0;
        const int magnitude_bits = int(group.width) - sign;
        int scale = group.exponent + 1 - magnitude_bits;
        const int least = ceiling - (kWindow + 7) + sign;
        scale = scale < least ? least : scale;
        const uint32_t limit = (1u << (group.width ? magnitude_bits : 0)) - 1;
        bool is_live = false;
        CHANNELS: for (int c = 0; c < kEdge; ++c) {
          const int32_t value = value_at(x, p, b * kEdge + c);
          uint32_t magnitude = group.width ? scale_down(uint32_t(value < 0 ? -value : value), scale + C::fraction) : 0;
          magnitude = magnitude > limit ? limit : magnitude;
          mantissas[(p * kBlocks + b) * kEdge + c] = int16_t(value < 0 ? -int32_t(magnitude) : int32_t(magnitude));
          is_live |= magnitude != 0;
        }
        group.scale = int16_t(scale);
        if (!is_live) group.width = 0;
        if (is_live && scale < base) base = scale;
      }
    }
    return base == -kNoBlock ? 0 : base;
  }

  // The packed form (docs/core.md) of a row block whose other rows are zero.
  static uint32_t write(const Group* groups, const int16_t* mantissas, int base, Word_t* words) {
    uint32_t end = C::positions * kSegments;
    LINES: for (int p = 0; p < C::positions; ++p) {
      SEGMENTS: for (int s = 0; s < kSegments; ++s) {
        const int first = s * kTile;
        const int count = kBlocks - first < kTile ? kBlocks - first : kTile;
        const uint32_t header_words = uint32_t(count * kEdge + kHeadersPerWord - 1) / kHeadersPerWord;
        const uint32_t start = end;
        const uint32_t plane_start = start + header_words;
        HEADER_ZEROS: for (uint32_t w = 0; w < header_words; ++w) words[start + w] = 0;
        uint32_t planes = 0;
        BLOCKS: for (int n = 0; n < count; ++n) {
          const int index = p * kBlocks + first + n;
          const Group& group = groups[index];
          if (group.width == 0) continue;
          const uint32_t header = group.width | uint32_t(group.is_signed) << 4 | uint32_t(group.scale - base) << 5;
          const int quarter = n * kEdge;
          words[start + quarter / kHeadersPerWord] |= Word_t(header) << (quarter % kHeadersPerWord * kHeaderBits);
          PLANES: for (int plane = 0; plane < int(group.width); ++plane) {
            Word_t bits = 0;
            CHANNELS: for (int c = 0; c < kEdge; ++c) bits |= Word_t((mantissas[index * kEdge + c] >> plane) & 1) << c;
            if (kPlanesPerWord > 1) {
              const uint32_t word = plane_start + planes / kPlanesPerWord;
              const int at = planes % kPlanesPerWord * (64 / kPlanesPerWord);
              words[word] = (at ? words[word] : 0) | bits << at;
            } else {
              FIRST_ROW: for (int w = 0; w < kPlaneWords; ++w) words[plane_start + planes * kPlaneWords + w] = w ? 0 : bits;
            }
            ++planes;
          }
        }
        const uint32_t length = planes ? header_words + (planes * kPlaneWords + kPlanesPerWord - 1) / kPlanesPerWord : 0;
        words[p * kSegments + s] = length ? Word_t(length) << 32 | start : 0;
        end = start + length;
      }
    }
    return end;
  }
};

}  // namespace dp
