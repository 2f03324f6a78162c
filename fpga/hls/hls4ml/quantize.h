// SPDX-License-Identifier: Apache-2.0
// Quantizes one row of activations (one sample, all positions) and packs it for the core, with
// integers only: the numbers of fpga/quantizer.py, for fixed-point input.
#pragma once

#include "dpgemm/types.h"

namespace dp {

constexpr int kMaxValueBits =
    24;  // what a float32 holds, so that the host's quantizer sees the same numbers
constexpr int kNoBlock = -(1 << 14);  // below every exponent

// One block of one row: kEdge channels at a position.
struct Group {
  int16_t exponent;  // floor(log2(largest magnitude))
  int16_t scale;     // exponent of the unit of which the codes' LSB is `2 * steps + 1`
  uint8_t steps;
  uint8_t width;  // bits of a mantissa, sign included; 0: a zero block
  bool is_signed;
  bool is_negated;     // its planes are those of the negatives
  uint32_t high, low;  // largest magnitudes above and below zero, in units of the values' last bit
};

inline int TopBit(uint32_t value) {
#pragma HLS INLINE
  int top = 0;
BITS:
  for (int bit = 0; bit < 32; ++bit) {
#pragma HLS UNROLL
    if ((value >> bit) & 1) top = bit;
  }
  return top;
}

// magnitude / (odd * 2**shift), rounded to nearest-even.
inline uint32_t ScaleDown(uint32_t magnitude, int shift, uint32_t odd) {
#pragma HLS INLINE
  if (shift > kMaxValueBits + 1) return 0;
  const uint64_t dividend = uint64_t(magnitude) << (shift < 0 ? -shift : 0);
  const uint64_t divisor = uint64_t(odd) << (shift > 0 ? shift : 0);
  const uint64_t kept = dividend / divisor;
  const uint64_t twice = 2 * (dividend - kept * divisor);
  return uint32_t(kept + (twice > divisor || (twice == divisor && (kept & 1)) ? 1 : 0));
}

// C gives what is known when the layer is built:
//   positions, channels, fraction (bits of a value below the point), request_positions,
//   request_blocks (1 or whole), is_threshold, least_bits, most_bits, raised_widths (nine digits of
//   four bits: what a width is raised to), is_split (codes have a level more at one end),
//   scale_bits (0, or 2 for LSBs in quarter steps: 4 * e + j is (1 + j / 4) * 2**e), signed_slack,
//   unsigned_slack (quarters of an LSB by which an element may exceed the largest), group_blocks
//   (channel blocks that share a width; 0: none)
template <class C>
struct RowQuantizer {
  static constexpr int kBlocks = (C::channels + kEdge - 1) / kEdge;
  static constexpr int kSegments = (kBlocks + kTile - 1) / kTile;
  static constexpr int kMaxWords = C::positions * kSegments * (1 + kMaxSegmentWords);
  static constexpr bool kIsFine = C::is_split || C::scale_bits != 0;
  static constexpr int kSteps = 4;  // from an LSB that is a power of two to the next
  static constexpr int kStepBits = 2;

  // x: [position][channel]; request: [position or 0][channel block or 0]; words: at least
  // kMaxWords. Returns the words written.
  template <class Request>
  static uint32_t Pack(const int32_t* x, const Request* request, Word_t* words, int32_t& base) {
    static Group groups[C::positions * kBlocks];
    static int16_t mantissas[C::positions * kBlocks * kEdge];
    const int ceiling = Choose(x, request, groups);
    base = Round(x, ceiling, groups, mantissas);
    return Write(groups, mantissas, base, words);
  }

 private:
  static int32_t ValueAt(const int32_t* x, int position, int channel) {
#pragma HLS INLINE
    return channel < C::channels ? x[position * C::channels + channel] : 0;
  }

  // The next width on offer, within the limits.
  static int Offer(int bits) {
#pragma HLS INLINE
    const int least = C::least_bits > kMinBits ? C::least_bits : kMinBits;
    const int wanted = bits < least ? least : bits > kMaxBits ? kMaxBits : bits;
    const int raised = int(C::raised_widths >> (4 * wanted) & 0xF);
    return raised > C::most_bits ? C::most_bits : raised;
  }

  // Largest magnitude that codes of so many magnitude bits have above or below zero.
  static uint32_t LimitOf(const Group& group, int magnitude_bits, bool is_below) {
#pragma HLS INLINE
    const int bits = magnitude_bits < 0               ? 0
                     : magnitude_bits > kMaxValueBits ? kMaxValueBits
                                                      : magnitude_bits;
    const bool has_more = C::is_split && group.is_signed && (group.high > group.low) != is_below;
    return (1u << bits) - 1 + (has_more ? 1 : 0);
  }

  // Whether `largest` exceeds the limit under an LSB, in quarter steps, by no more than the slack.
  static bool FitsEnd(uint32_t largest, uint32_t limit, bool is_signed, int lsb) {
#pragma HLS INLINE
    // Of the LSB's power of two in units of the values' last bit.
    const int shift = (lsb >> kStepBits) + C::fraction;
    const uint64_t sixteenths = 16ull * largest;
    const uint64_t quarters = 4ull * limit + (is_signed ? C::signed_slack : C::unsigned_slack);
    const uint64_t most = quarters * uint64_t(kSteps + (lsb & (kSteps - 1)));
    if (shift > kMaxValueBits + 4) return true;
    if (shift < -(kMaxValueBits + 6)) return largest == 0;
    return shift < 0 ? sixteenths << -shift <= most : sixteenths <= most << shift;
  }
  static bool Fits(const Group& group, int magnitude_bits, int lsb) {
#pragma HLS INLINE
    return FitsEnd(group.high, LimitOf(group, magnitude_bits, false), group.is_signed, lsb) &&
           FitsEnd(group.low, LimitOf(group, magnitude_bits, true), group.is_signed, lsb);
  }

  // Width that a threshold of `asked` gives a block.
  static int WidthOf(const Group& group, int asked) {
#pragma HLS INLINE
    const int above = int(group.exponent) - asked;
    if (above < 0) return C::least_bits ? Offer(C::least_bits) : 0;
    const int needed = above + 1 + (group.is_signed ? 1 : 0);
    const bool fits = kIsFine && Fits(group, above, asked * kSteps);
    return Offer(fits ? needed - 1 : needed);
  }

  // Exponent, sign and width of a block of values.
  static Group GroupOf(const int32_t* x, int position, int block, int asked) {
#pragma HLS INLINE
    uint32_t high = 0;
    uint32_t low = 0;
  CHANNELS:
    for (int c = 0; c < kEdge; ++c) {
      const int32_t value = ValueAt(x, position, block * kEdge + c);
      const uint32_t magnitude = uint32_t(value < 0 ? -value : value);
      if (value < 0) {
        low = magnitude > low ? magnitude : low;
      } else {
        high = magnitude > high ? magnitude : high;
      }
    }
    const uint32_t peak = high > low ? high : low;
    Group group = {int16_t(TopBit(peak) - C::fraction), 0, 0, 0, low > 0, false, high, low};
    const int width = C::is_threshold ? WidthOf(group, asked) : asked;
    group.width = uint8_t(peak ? width : 0);
    return group;
  }

  // Exponent, sign and width of each group; returns the largest exponent among those with a width.
  template <class Request>
  static int Choose(const int32_t* x, const Request* request, Group* groups) {
    int ceiling = kNoBlock;
  POSITIONS:
    for (int p = 0; p < C::positions; ++p) {
    BLOCKS:
      for (int b = 0; b < kBlocks; ++b) {
        const int row = (C::request_positions > 1 ? p : 0) * C::request_blocks;
        const Group group = GroupOf(x, p, b, int(request[row + (C::request_blocks > 1 ? b : 0)]));
        groups[p * kBlocks + b] = group;
        if (group.width && group.exponent > ceiling) ceiling = group.exponent;
      }
      if (C::group_blocks > 0) Share(groups + p * kBlocks);
    }
    return ceiling;
  }

  // Each non-zero block of a run takes the run's largest width.
  static void Share(Group* groups) {
    constexpr int kRun = C::group_blocks > 0 ? C::group_blocks : 1;
  RUNS:
    for (int first = 0; first < kBlocks; first += kRun) {
      const int end = first + kRun < kBlocks ? first + kRun : kBlocks;
      uint8_t most = 0;
    MOST:
      for (int b = first; b < end; ++b) most = groups[b].width > most ? groups[b].width : most;
    SET:
      for (int b = first; b < end; ++b) {
        if (groups[b].width) groups[b].width = most;
      }
    }
  }

  static int MagnitudeBits(const Group& group) {
#pragma HLS INLINE
    return int(group.width) - (group.is_signed ? 1 : 0);
  }

  // LSB of a group's codes in quarter steps, not below what the window of `ceiling` keeps: the
  // finest that fits, of which those of wide blocks are powers of two.
  static int LsbOf(const Group& group, int ceiling) {
#pragma HLS INLINE
    const bool by_step = C::scale_bits != 0 && group.width <= kMaxScaledBits;
    const int natural = (group.exponent + 1 - MagnitudeBits(group)) * kSteps;
    int lsb = natural;
  STEPS:
    for (int finer = 1; finer <= kSteps; ++finer) {
#pragma HLS UNROLL
      if (kIsFine && (by_step || finer == kSteps) &&
          Fits(group, MagnitudeBits(group), natural - finer)) {
        lsb = natural - finer;
      }
    }
    const int least = (ceiling - (kWindow + 7) + (group.is_signed ? 1 : 0)) * kSteps;
    return lsb < least ? least : lsb;
  }

  // An LSB as an odd number, 2 * steps + 1, of units of 2**scale.
  static void SetLsb(Group& group, int lsb) {
#pragma HLS INLINE
    const int quarter = lsb & (kSteps - 1);
    const int trailing = quarter == 0 ? 2 : quarter == 2 ? 1 : 0;
    group.steps = uint8_t((kSteps + quarter) >> trailing >> 1);
    group.scale = int16_t((lsb >> kStepBits) - 2 + trailing);
  }

  // Codes of one block before they are negated; whether any is other than zero.
  static bool RoundBlock(const int32_t* x, int position, int block, Group& group,
                         int16_t* mantissas) {
#pragma HLS INLINE
    const int bits = group.width ? MagnitudeBits(group) : 0;
    bool is_live = false;
    group.is_negated = false;
  CHANNELS:
    for (int c = 0; c < kEdge; ++c) {
      const int32_t value = ValueAt(x, position, block * kEdge + c);
      const uint32_t whole = uint32_t(value < 0 ? -value : value);
      uint32_t magnitude =
          group.width ? ScaleDown(whole, group.scale + C::fraction, 2u * group.steps + 1) : 0;
      const uint32_t limit = LimitOf(group, bits, value < 0);
      magnitude = magnitude > limit ? limit : magnitude;
      group.is_negated |= group.is_signed && value > 0 && magnitude == 1u << bits;
      mantissas[c] = int16_t(value < 0 ? -int32_t(magnitude) : int32_t(magnitude));
      is_live |= magnitude != 0;
    }
    return is_live;
  }

  // Mantissas; groups without any other than zero become zero blocks. Returns the smallest scale, 0
  // if there is none.
  static int Round(const int32_t* x, int ceiling, Group* groups, int16_t* mantissas) {
    int base = -kNoBlock;
  POSITIONS:
    for (int p = 0; p < C::positions; ++p) {
    BLOCKS:
      for (int b = 0; b < kBlocks; ++b) {
        const int index = p * kBlocks + b;
        Group& group = groups[index];
        SetLsb(group, LsbOf(group, ceiling));
        const bool is_live = RoundBlock(x, p, b, group, mantissas + index * kEdge);
        if (!is_live) group.width = 0;
        if (is_live && group.scale < base) base = group.scale;
      }
    }
    return base == -kNoBlock ? 0 : base;
  }

  // A block's planes, of which `planes` lie before it, from word `first` on.
  static void WritePlanes(const Group& group, const int16_t* mantissas, uint32_t first,
                          uint32_t planes, Word_t* words) {
#pragma HLS INLINE
  PLANES:
    for (int plane = 0; plane < int(group.width); ++plane) {
      const uint32_t index = planes + uint32_t(plane);
      Word_t bits = 0;
    CHANNELS:
      for (int c = 0; c < kEdge; ++c) {
        const int code = group.is_negated ? -int(mantissas[c]) : int(mantissas[c]);
        bits |= Word_t((code >> plane) & 1) << c;
      }
      if (kPlanesPerWord > 1) {
        const uint32_t word = first + index / kPlanesPerWord;
        const int at = index % kPlanesPerWord * (64 / kPlanesPerWord);
        words[word] = (at ? words[word] : 0) | bits << at;
      } else {
      FIRST_ROW:
        for (int w = 0; w < kPlaneWords; ++w) words[first + index * kPlaneWords + w] = w ? 0 : bits;
      }
    }
  }

  // Headers and planes of `count` blocks from word `start` on; returns the words, 0 if all are
  // zero.
  static uint32_t WriteSegment(const Group* groups, const int16_t* mantissas, int count, int base,
                               uint32_t start, Word_t* words) {
    const uint32_t header_words = uint32_t(count * kEdge + kHeadersPerWord - 1) / kHeadersPerWord;
  HEADER_ZEROS:
    for (uint32_t w = 0; w < header_words; ++w) words[start + w] = 0;
    uint32_t planes = 0;
  BLOCKS:
    for (int n = 0; n < count; ++n) {
      const Group& group = groups[n];
      if (group.width == 0) continue;
      const uint32_t header = MakeHeader(group.width, group.is_signed, uint32_t(group.scale - base),
                                         group.is_negated, group.steps);
      const int quarter = n * kEdge;
      words[start + quarter / kHeadersPerWord] |= Word_t(header)
                                                  << (quarter % kHeadersPerWord * kHeaderBits);
      WritePlanes(group, mantissas + n * kEdge, start + header_words, planes, words);
      planes += group.width;
    }
    return planes ? header_words + (planes * kPlaneWords + kPlanesPerWord - 1) / kPlanesPerWord : 0;
  }

  // The packed form (docs/reference/core.md) of a row block whose other rows are zero.
  static uint32_t Write(const Group* groups, const int16_t* mantissas, int base, Word_t* words) {
    uint32_t end = C::positions * kSegments;
  LINES:
    for (int p = 0; p < C::positions; ++p) {
    SEGMENTS:
      for (int s = 0; s < kSegments; ++s) {
        const int index = p * kBlocks + s * kTile;
        const int left = kBlocks - s * kTile;
        const int count = left < kTile ? left : kTile;
        const uint32_t length =
            WriteSegment(groups + index, mantissas + index * kEdge, count, base, end, words);
        words[p * kSegments + s] = length ? Word_t(length) << kDirectoryLengthAt | end : 0;
        end += length;
      }
    }
    return end;
  }
};

}  // namespace dp
