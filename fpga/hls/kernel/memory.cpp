// SPDX-License-Identifier: Apache-2.0
// Readers and writers: lines, segments and headers of packed operands in, rows of results out.
#include "dpgemm/address.h"
#include "dpgemm/float32.h"
#include "dpgemm/gemm.h"

namespace dp {

namespace {

// Which lines of an operand a step reads, and in what order of their blocks.
struct Fetch {
  enum Lines { kSame, kInput, kOutput, kTaps } lines;
  uint32_t first;     // first line's number: of the GEMM's lines, or the first row block of W (kTaps)
  uint32_t count;     // lines
  uint32_t segment;   // segment of each line
  uint32_t blocks;    // blocks of that segment
  uint32_t segments;  // segments of a line
  bool contracts_rows;
};

uint32_t segments_of(uint32_t blocks) {
#pragma HLS INLINE
  return (blocks + kTile - 1) / kTile;
}

Fetch fetch_a(const Job& job, const Tile& tile, const Step& step) {
#pragma HLS INLINE
  Fetch fetch;
  if (job.gemm == Gemm::kWgrad) {
    fetch = {Fetch::kSame, step.k_begin, step.k_count, tile.m_begin / kTile, tile.m_count, segments_of(job.out_blocks), true};
  } else {
    fetch = {job.gemm == Gemm::kForward ? Fetch::kInput : Fetch::kOutput, tile.m_begin, tile.m_count, step.k_begin / kTile, step.k_count,
             segments_of(job.k_blocks), false};
  }
  return fetch;
}

Fetch fetch_b(const Job& job, const Tile& tile, const Step& step) {
#pragma HLS INLINE
  Fetch fetch;
  if (job.gemm == Gemm::kForward) {
    fetch = {Fetch::kTaps, tile.n_begin, tile.n_count, step.k_begin / kTile, step.k_count, segments_of(job.in_blocks), false};
  } else if (job.gemm == Gemm::kDgrad) {
    fetch = {Fetch::kTaps, step.k_begin, step.k_count, tile.n_begin / kTile, tile.n_count, segments_of(job.in_blocks), true};
  } else {
    fetch = {Fetch::kInput, step.k_begin, step.k_count, tile.n_begin / kTile, tile.n_count, segments_of(job.in_blocks), true};
  }
  return fetch;
}

// Swaps rows and columns: wires.
Plane transposed(const Plane& plane) {
#pragma HLS INLINE
  constexpr int kWordBits = kPlaneBits / kPlaneWords;
  Plane result;
  CLEAR: for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS UNROLL
    result.words[w] = 0;
  }
  ROWS: for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
    COLUMNS: for (int column = 0; column < kEdge; ++column) {
#pragma HLS UNROLL
      const int from = row * kEdge + column;
      const int to = column * kEdge + row;
      const PlaneWord_t bit = (plane.words[from / kWordBits] >> (from % kWordBits)) & 1;
      result.words[to / kWordBits] = PlaneWord_t(result.words[to / kWordBits] | (bit << (to % kWordBits)));
    }
  }
  return result;
}

Block zero_block() {
#pragma HLS INLINE
  Block block;
  PLANES: for (int p = 0; p < kMaxBits; ++p) {
#pragma HLS UNROLL
    WORDS: for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS UNROLL
      block.planes[p].words[w] = 0;
    }
  }
  block.bits = 0;
  block.is_signed = 0;
  SHIFTS: for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
    block.shift[row] = 0;
  }
  return block;
}

// Bits, sign and shift of one block from its headers; false if one is illegal. A header of 0 is a zero block or row.
bool read_headers(const Word_t* segment, uint32_t block_index, bool has_row_exponents, Block& block) {
#pragma HLS INLINE
  const int count = has_row_exponents ? kEdge : 1;
  bool is_legal = true;
  uint32_t most_bits = 0;
  HEADERS: for (int row = 0; row < kEdge; ++row) {
    const uint32_t index = block_index * count + (has_row_exponents ? row : 0);
    const uint32_t header = uint32_t(segment[index / kHeadersPerWord] >> (index % kHeadersPerWord * kHeaderBits)) & 0xffff;
    const uint32_t bits = header & 15;
    const uint32_t rest = header >> (5 + kShiftBits);
    is_legal &= rest == 0 && bits <= uint32_t(kMaxBits) && (bits >= uint32_t(kMinBits) || header == 0);
    most_bits = bits > most_bits ? bits : most_bits;
    block.is_signed[row] = (header >> 4) & 1;
    block.shift[row] = Shift_t((header >> 5) & kMaxShift);
  }
  block.bits = Bits_t(most_bits);
  return is_legal;
}

// Plane `index` of those that begin at word `first`.
Plane read_plane(const Word_t* segment, uint32_t first, uint32_t index) {
#pragma HLS INLINE
  Plane plane;
  if (kPlanesPerWord > 1) {
    plane.words[0] = PlaneWord_t(segment[first + index / kPlanesPerWord] >> (index % kPlanesPerWord * (64 / kPlanesPerWord)));
  } else {
    WORDS: for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS PIPELINE II=1
      plane.words[w] = PlaneWord_t(segment[first + index * kPlaneWords + w]);
    }
  }
  return plane;
}

struct SegmentErrors {
  Error header;
  Error length;
};

// An exponent within what float32 can tell apart, of any sum: beyond, all results are zero or infinite, and adding to it could overflow.
int32_t clamped(int32_t exponent) {
#pragma HLS INLINE
  constexpr int32_t kMostExponent = 1024;
  return exponent > kMostExponent ? kMostExponent : exponent < -kMostExponent ? -kMostExponent : exponent;
}

// Turns a segment's words into blocks. If anything in it is illegal, all of its blocks are zero and `error` says why.
void decode_segment(const Word_t* segment, uint32_t length, uint32_t blocks, bool has_row_exponents, bool contracts_rows,
                    const SegmentErrors& errors, hls::stream<Block>& stream, Error& error) {
  const uint32_t headers = blocks * (has_row_exponents ? kEdge : 1);
  const uint32_t header_words = (headers + kHeadersPerWord - 1) / kHeadersPerWord;
  bool is_legal = length >= header_words;
  bool has_length = is_legal;
  uint32_t planes = 0;
  if (is_legal) {
    CHECK: for (uint32_t b = 0; b < blocks; ++b) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
      Block block;
      is_legal &= read_headers(segment, b, has_row_exponents, block);
      planes += uint32_t(block.bits);
    }
    const uint32_t plane_words = (planes * kPlaneWords + kPlanesPerWord - 1) / kPlanesPerWord;
    has_length = !is_legal || length == header_words + plane_words;
  }
  if (!is_legal && error == Error::kNone) error = has_length ? errors.header : errors.length;
  if (!has_length && error == Error::kNone) error = errors.length;
  const bool is_usable = is_legal && has_length;

  uint32_t plane = 0;
  BLOCKS: for (uint32_t b = 0; b < blocks; ++b) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
    Block block = zero_block();
    if (is_usable) {
      read_headers(segment, b, has_row_exponents, block);
      PLANES: for (int p = 0; p < int(block.bits); ++p) {
#pragma HLS LOOP_TRIPCOUNT min=0 max=kMaxBits
        const Plane stored = read_plane(segment, header_words, plane++);
        block.planes[p] = contracts_rows ? transposed(stored) : stored;
      }
    }
    stream.write(block);
  }
}

// Reads what one step needs of one operand.
void read_step(const Job& job, const Fetch& fetch, uint32_t tap_index, const Word_t* memory, uint32_t memory_words,
               bool has_row_exponents, const SegmentErrors& errors, hls::stream<Block>& stream, ReadStatus& status) {
  const Place tap = place_of(tap_index, job.taps);
  // kInput: the GEMM's lines are positions of E or Y; kOutput: positions of dX.
  const Extent extent = fetch.lines == Fetch::kOutput ? job.input : job.output;
  Place place = place_of(fetch.first, extent);

  LINES: for (uint32_t l = 0; l < fetch.count; ++l) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
    uint32_t position[kAxes];
    bool is_inside = true;
    uint32_t line = fetch.first + l;
    if (fetch.lines == Fetch::kTaps) {
      line = (fetch.first + l) * job.tap_count + tap_index;
    } else if (fetch.lines == Fetch::kInput) {
      is_inside = input_position(job, place.position, tap.position, position);
      line = place.row_block * job.input_size + flat(position, job.input);
    } else if (fetch.lines == Fetch::kOutput) {
      is_inside = output_position(job, place.position, tap.position, position);
      line = place.row_block * job.output_size + flat(position, job.output);
    }
    advance(place, extent);

    Word_t entry = 0;
    if (is_inside) {
      const uint64_t index = uint64_t(line) * fetch.segments + fetch.segment;
      if (index < memory_words) {
        entry = memory[index];
        ++status.words;
      } else if (status.error == Error::kNone) {
        status.error = errors.length;
      }
    }
    const uint32_t offset = uint32_t(entry);
    uint32_t length = uint32_t(entry >> 32);
    if (length > uint32_t(kMaxSegmentWords) || uint64_t(offset) + length > memory_words || (length == 0 && offset != 0)) {
      if (status.error == Error::kNone) status.error = errors.length;
      length = 0;
    }
    if (length == 0) {
      NONE: for (uint32_t b = 0; b < fetch.blocks; ++b) {
#pragma HLS PIPELINE II=1
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
        stream.write(zero_block());
      }
      continue;
    }
    Word_t segment[kMaxSegmentWords];
    BURST: for (uint32_t w = 0; w < length; ++w) {
#pragma HLS PIPELINE II=1
#pragma HLS LOOP_TRIPCOUNT min=1 max=kMaxSegmentWords
      segment[w] = memory[offset + w];
    }
    status.words += length;
    decode_segment(segment, length, fetch.blocks, has_row_exponents, fetch.contracts_rows, errors, stream, status.error);
  }
}

}  // namespace

void read_operand(const Job& job, Operand operand, const Word_t* memory, hls::stream<Block>& blocks, hls::stream<ReadStatus>& status) {
#pragma HLS FUNCTION_INSTANTIATE variable=operand
  const bool is_a = operand == Operand::kA;
  ReadStatus done = {0, Error::kNone};
  SegmentErrors errors;
  errors.header = is_a ? Error::kHeaderA : Error::kHeaderB;
  errors.length = is_a ? Error::kSegmentA : Error::kSegmentB;
  TILES: for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = tile_at(job, job.tile_begin + t);
    STEPS: for (uint32_t s = 0; s < job.step_count; ++s) {
      const Step step = step_at(job, tile, job.step_begin + s);
      read_step(job, is_a ? fetch_a(job, tile, step) : fetch_b(job, tile, step), step.tap, memory, is_a ? job.words_a : job.words_b,
                is_a && job.has_row_exponents, errors, blocks, done);
    }
  }
  status.write(done);
}

void write_result(const Job& job, const uint32_t* job_words, hls::stream<SumRow>& sums, uint32_t* c, hls::stream<uint32_t>& written) {
  const bool is_wgrad = job.gemm == Gemm::kWgrad;
  const Extent extent = job.gemm == Gemm::kForward ? job.output : job.input;
  const uint32_t rows = is_wgrad ? job.out_channels : job.rows;
  const uint32_t channels = job.gemm == Gemm::kForward ? job.out_channels : job.in_channels;
  const uint32_t positions = is_wgrad ? job.tap_count : job.gemm == Gemm::kForward ? job.output_size : job.input_size;
  uint32_t words = 0;

  TILES: for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = tile_at(job, job.tile_begin + t);
    Place place = place_of(tile.m_begin, extent);
    BLOCK_ROWS: for (uint32_t i = 0; i < tile.m_count; ++i) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
      const uint32_t first_row = (is_wgrad ? tile.m_begin + i : place.row_block) * kEdge;
      const uint32_t position = is_wgrad ? tile.tap : flat(place.position, extent);
      advance(place, extent);
      ROWS: for (int row = 0; row < kEdge; ++row) {
        const int32_t exponent =
            clamped(job.has_row_exponents ? int32_t(job_words[kJobWords + first_row + row]) : job.exponent);
        BLOCK_COLUMNS: for (uint32_t j = 0; j < tile.n_count; ++j) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
          const SumRow sum_row = sums.read();
          const uint32_t first_column = (tile.n_begin + j) * kEdge;
          const uint64_t base = (uint64_t(first_row + row) * positions + position) * channels + first_column;
          COLUMNS: for (int column = 0; column < kEdge; ++column) {
#pragma HLS PIPELINE II=1
            if (first_row + row < rows && first_column + column < channels) {
              const Acc_t sum = sum_row.sums[column];
              if (job.is_raw) {
                const uint64_t raw = uint64_t(int64_t(sum));
                c[2 * (base + column)] = uint32_t(raw);
                c[2 * (base + column) + 1] = uint32_t(raw >> 32);
                words += 2;
              } else {
                c[base + column] = to_float32(sum, exponent);
                ++words;
              }
            }
          }
        }
      }
    }
  }
  written.write(words);
}

}  // namespace dp
