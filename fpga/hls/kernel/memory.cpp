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
  uint32_t first;  // first line's number: of the GEMM's lines, or the first row block of W (kTaps)
  uint32_t count;  // lines
  uint32_t segment;   // segment of each line
  uint32_t blocks;    // blocks of that segment
  uint32_t segments;  // segments of a line
  bool contracts_rows;
};

struct Span {
  uint32_t begin;
  uint32_t count;
};

// Of a step's blocks: their lines, their channel blocks, and the operand's channel blocks in all.
Fetch MakeFetch(Fetch::Lines lines, Span span, Span channels, uint32_t blocks,
                bool contracts_rows) {
#pragma HLS INLINE
  Fetch fetch;
  fetch.lines = lines;
  fetch.first = span.begin;
  fetch.count = span.count;
  fetch.segment = channels.begin / kTile;
  fetch.blocks = channels.count;
  fetch.segments = (blocks + kTile - 1) / kTile;
  fetch.contracts_rows = contracts_rows;
  return fetch;
}

Fetch FetchA(const Job& job, const Tile& tile, const Step& step) {
#pragma HLS INLINE
  const Span m = {tile.m_begin, tile.m_count};
  const Span k = {step.k_begin, step.k_count};
  if (job.gemm == Gemm::kWgrad) return MakeFetch(Fetch::kSame, k, m, job.out_blocks, true);
  const bool is_forward = job.gemm == Gemm::kForward;
  return MakeFetch(is_forward ? Fetch::kInput : Fetch::kOutput, m, k, job.k_blocks, false);
}

Fetch FetchB(const Job& job, const Tile& tile, const Step& step) {
#pragma HLS INLINE
  const Span n = {tile.n_begin, tile.n_count};
  const Span k = {step.k_begin, step.k_count};
  if (job.gemm == Gemm::kForward) return MakeFetch(Fetch::kTaps, n, k, job.in_blocks, false);
  const bool is_dgrad = job.gemm == Gemm::kDgrad;
  return MakeFetch(is_dgrad ? Fetch::kTaps : Fetch::kInput, k, n, job.in_blocks, true);
}

// Swaps rows and columns: wires.
Plane Transposed(const Plane& plane) {
#pragma HLS INLINE
  constexpr int kWordBits = kPlaneBits / kPlaneWords;
  Plane result;
CLEAR:
  for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS UNROLL
    result.words[w] = 0;
  }
ROWS:
  for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
  COLUMNS:
    for (int column = 0; column < kEdge; ++column) {
#pragma HLS UNROLL
      const int from = row * kEdge + column;
      const int to = column * kEdge + row;
      const PlaneWord_t bit = (plane.words[from / kWordBits] >> (from % kWordBits)) & 1;
      result.words[to / kWordBits] =
          PlaneWord_t(result.words[to / kWordBits] | (bit << (to % kWordBits)));
    }
  }
  return result;
}

Block ZeroBlock() {
#pragma HLS INLINE
  Block block;
PLANES:
  for (int p = 0; p < kMaxBits; ++p) {
#pragma HLS UNROLL
  WORDS:
    for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS UNROLL
      block.planes[p].words[w] = 0;
    }
  }
  block.bits = 0;
  block.is_signed = 0;
  block.is_negated = 0;
SHIFTS:
  for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
    block.shift[row] = 0;
    block.steps[row] = 0;
  }
  return block;
}

// Bits, sign and shift of one block from its headers; false if one is illegal. A header of 0 is a
// zero block or row.
bool ReadHeaders(const Word_t* segment, uint32_t block_index, bool has_row_exponents,
                 Block& block) {
#pragma HLS INLINE
  const int count = has_row_exponents ? kEdge : 1;
  bool is_legal = true;
  uint32_t most_bits = 0;
HEADERS:
  for (int row = 0; row < kEdge; ++row) {
    const uint32_t index = block_index * count + (has_row_exponents ? row : 0);
    const int at = index % kHeadersPerWord * kHeaderBits;
    const Word_t header = FieldAt(segment[index / kHeadersPerWord], at, kHeaderBits);
    const uint32_t bits = FieldAt(header, kHeaderWidthAt, kHeaderWidthBits);
    const uint32_t reserved = FieldAt(header, kHeaderReservedAt, kHeaderReservedBits);
    is_legal &=
        reserved == 0 && bits <= uint32_t(kMaxBits) && (bits >= uint32_t(kMinBits) || header == 0);
    most_bits = bits > most_bits ? bits : most_bits;
    const bool is_signed = FieldAt(header, kHeaderSignedAt, kHeaderSignedBits);
    const bool is_negated = FieldAt(header, kHeaderNegatedAt, kHeaderNegatedBits);
    const uint32_t steps = FieldAt(header, kHeaderStepsAt, kHeaderStepsBits);
    is_legal &= (is_signed || !is_negated) && (steps == 0 || bits <= uint32_t(kMaxScaledBits));
    block.is_signed[row] = is_signed;
    block.is_negated[row] = is_negated;
    block.steps[row] = Steps_t(steps);
    block.shift[row] = Shift_t(FieldAt(header, kHeaderShiftAt, kHeaderShiftBits));
  }
  block.bits = Bits_t(most_bits);
  return is_legal;
}

// Plane `index` of those that begin at word `first`.
Plane ReadPlane(const Word_t* segment, uint32_t first, uint32_t index) {
#pragma HLS INLINE
  Plane plane;
  if (kPlanesPerWord > 1) {
    plane.words[0] = PlaneWord_t(segment[first + index / kPlanesPerWord] >>
                                 (index % kPlanesPerWord * (64 / kPlanesPerWord)));
  } else {
  WORDS:
    for (int w = 0; w < kPlaneWords; ++w) {
#pragma HLS PIPELINE II = 1
      plane.words[w] = PlaneWord_t(segment[first + index * kPlaneWords + w]);
    }
  }
  return plane;
}

struct SegmentErrors {
  Error header;
  Error length;
};

// An exponent within what float32 can tell apart, of any sum: beyond, all results are zero or
// infinite, and adding to it could overflow.
int32_t Clamped(int32_t exponent) {
#pragma HLS INLINE
  constexpr int32_t kMostExponent = 1024;
  return exponent > kMostExponent    ? kMostExponent
         : exponent < -kMostExponent ? -kMostExponent
                                     : exponent;
}

// What a segment's words are checked against, and read by.
struct Segment {
  uint32_t blocks;
  uint32_t length;  // words
  uint32_t header_words;
  bool has_row_exponents;
  bool contracts_rows;
};

// Keeps the first error.
void Note(Error found, Error& error) {
#pragma HLS INLINE
  if (error == Error::kNone) error = found;
}

// Whether a segment's headers are legal and its length is what they ask for.
bool CheckSegment(const Word_t* words, const Segment& segment, const SegmentErrors& errors,
                  Error& error) {
#pragma HLS INLINE
  if (segment.length < segment.header_words) {
    Note(errors.length, error);
    return false;
  }
  bool is_legal = true;
  uint32_t planes = 0;
CHECK:
  for (uint32_t b = 0; b < segment.blocks; ++b) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
    Block block;
    is_legal &= ReadHeaders(words, b, segment.has_row_exponents, block);
    planes += uint32_t(block.bits);
  }
  const uint32_t plane_words = (planes * kPlaneWords + kPlanesPerWord - 1) / kPlanesPerWord;
  const bool has_length = segment.length == segment.header_words + plane_words;
  if (!is_legal) Note(errors.header, error);
  if (!has_length) Note(errors.length, error);
  return is_legal && has_length;
}

// Turns a segment's words into blocks. If anything in it is illegal, all of its blocks are zero and
// `error` names the reason.
void DecodeSegment(const Word_t* words, const Segment& segment, const SegmentErrors& errors,
                   hls::stream<Block>& stream, Error& error) {
  const bool is_usable = CheckSegment(words, segment, errors, error);
  uint32_t plane = 0;
BLOCKS:
  for (uint32_t b = 0; b < segment.blocks; ++b) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
    Block block = ZeroBlock();
    if (is_usable) {
      ReadHeaders(words, b, segment.has_row_exponents, block);
    PLANES:
      for (int p = 0; p < int(block.bits); ++p) {
#pragma HLS LOOP_TRIPCOUNT min = 0 max = kMaxBits
        const Plane stored = ReadPlane(words, segment.header_words, plane++);
        block.planes[p] = segment.contracts_rows ? Transposed(stored) : stored;
      }
    }
    stream.write(block);
  }
}

// Line of the operand that a step reads for line `index` of the GEMM, which lies at `place`; false
// if that lies in the padding.
bool LineOf(const Job& job, const Fetch& fetch, const Place& place, const Place& tap,
            uint32_t tap_index, uint32_t index, uint32_t& line) {
#pragma HLS INLINE
  uint32_t position[kAxes];
  bool is_inside = true;
  line = index;
  if (fetch.lines == Fetch::kTaps) {
    line = index * job.tap_count + tap_index;
  } else if (fetch.lines == Fetch::kInput) {
    is_inside = InputPosition(job, place.position, tap.position, position);
    line = place.row_block * job.input_size + FlatPosition(position, job.input);
  } else if (fetch.lines == Fetch::kOutput) {
    is_inside = OutputPosition(job, place.position, tap.position, position);
    line = place.row_block * job.output_size + FlatPosition(position, job.output);
  }
  return is_inside;
}

// What a reader knows of its operand's memory.
struct Source {
  uint32_t words;  // behind them is nothing of the operand's
  bool has_row_exponents;
  SegmentErrors errors;
};

// A directory word; 0, as of an empty segment, where there is none.
Word_t ReadEntry(const Word_t* memory, const Source& source, uint64_t index, ReadStatus& status) {
#pragma HLS INLINE
  if (index >= source.words) {
    Note(source.errors.length, status.error);
    return 0;
  }
  ++status.words;
  return memory[index];
}

// Sends the blocks of the segment that a directory word names; zero blocks if it is empty, or not
// within the memory.
void ReadSegment(const Word_t* memory, const Source& source, Word_t entry, uint32_t blocks,
                 bool contracts_rows, hls::stream<Block>& stream, ReadStatus& status) {
#pragma HLS INLINE
  const uint32_t offset = FieldAt(entry, kDirectoryOffsetAt, kDirectoryOffsetBits);
  uint32_t length = uint32_t(entry >> kDirectoryLengthAt);
  if (length > uint32_t(kMaxSegmentWords) || uint64_t(offset) + length > source.words ||
      (length == 0 && offset != 0)) {
    Note(source.errors.length, status.error);
    length = 0;
  }
  if (length == 0) {
  NONE:
    for (uint32_t b = 0; b < blocks; ++b) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
      stream.write(ZeroBlock());
    }
    return;
  }
  Word_t words[kMaxSegmentWords];
BURST:
  for (uint32_t w = 0; w < length; ++w) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kMaxSegmentWords
    words[w] = memory[offset + w];
  }
  status.words += length;
  const uint32_t headers = blocks * (source.has_row_exponents ? kEdge : 1);
  const uint32_t header_words = (headers + kHeadersPerWord - 1) / kHeadersPerWord;
  const Segment segment = {blocks, length, header_words, source.has_row_exponents, contracts_rows};
  DecodeSegment(words, segment, source.errors, stream, status.error);
}

// Reads what one step needs of one operand.
void ReadStep(const Job& job, const Fetch& fetch, uint32_t tap_index, const Word_t* memory,
              const Source& source, hls::stream<Block>& stream, ReadStatus& status) {
  const Place tap = PlaceOf(tap_index, job.taps);
  // kInput: the GEMM's lines are positions of E or Y; kOutput: positions of dX.
  const Extent extent = fetch.lines == Fetch::kOutput ? job.input : job.output;
  Place place = PlaceOf(fetch.first, extent);
LINES:
  for (uint32_t l = 0; l < fetch.count; ++l) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
    uint32_t line;
    Word_t entry = 0;
    if (LineOf(job, fetch, place, tap, tap_index, fetch.first + l, line)) {
      entry = ReadEntry(memory, source, uint64_t(line) * fetch.segments + fetch.segment, status);
    }
    Advance(place, extent);
    ReadSegment(memory, source, entry, fetch.blocks, fetch.contracts_rows, stream, status);
  }
}

// The result's extents, and the form of its elements.
struct Result {
  uint32_t rows;
  uint32_t positions;
  uint32_t channels;
  bool is_raw;
};

Result ResultOf(const Job& job) {
#pragma HLS INLINE
  Result result;
  result.rows = job.gemm == Gemm::kWgrad ? job.out_channels : job.rows;
  result.positions = job.gemm == Gemm::kForward ? job.output_size
                     : job.gemm == Gemm::kDgrad ? job.input_size
                                                : job.tap_count;
  result.channels = job.gemm == Gemm::kForward ? job.out_channels : job.in_channels;
  result.is_raw = job.is_raw;
  return result;
}

// Writes one row of a block's sums, as far as it is within the result; returns the words.
uint32_t WriteRow(const Result& result, const SumRow& sums, uint32_t row, uint32_t position,
                  uint32_t first_channel, int32_t exponent, uint32_t* c) {
#pragma HLS INLINE
  const uint64_t base =
      (uint64_t(row) * result.positions + position) * result.channels + first_channel;
  uint32_t words = 0;
COLUMNS:
  for (int column = 0; column < kEdge; ++column) {
#pragma HLS PIPELINE II = 1
    if (row < result.rows && first_channel + column < result.channels) {
      const Acc_t sum = sums.sums[column];
      if (result.is_raw) {
        const uint64_t raw = uint64_t(int64_t(sum));
        c[2 * (base + column)] = uint32_t(raw);
        c[2 * (base + column) + 1] = uint32_t(raw >> 32);
        words += 2;
      } else {
        c[base + column] = ToFloat32(sum, exponent);
        ++words;
      }
    }
  }
  return words;
}

}  // namespace

void ReadOperand(const Job& job, Operand operand, const Word_t* memory, hls::stream<Block>& blocks,
                 hls::stream<ReadStatus>& status) {
#pragma HLS FUNCTION_INSTANTIATE variable = operand
  const bool is_a = operand == Operand::kA;
  ReadStatus done = {0, Error::kNone};
  const SegmentErrors errors = {is_a ? Error::kHeaderA : Error::kHeaderB,
                                is_a ? Error::kSegmentA : Error::kSegmentB};
  const Source source = {is_a ? job.words_a : job.words_b, is_a && job.has_row_exponents, errors};
TILES:
  for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = TileAt(job, job.tile_begin + t);
  STEPS:
    for (uint32_t s = 0; s < job.step_count; ++s) {
      const Step step = StepAt(job, tile, job.step_begin + s);
      const Fetch fetch = is_a ? FetchA(job, tile, step) : FetchB(job, tile, step);
      ReadStep(job, fetch, step.tap, memory, source, blocks, done);
    }
  }
  status.write(done);
}

void WriteResult(const Job& job, const uint32_t* job_words, hls::stream<SumRow>& sums, uint32_t* c,
                 hls::stream<uint32_t>& written) {
  const bool is_wgrad = job.gemm == Gemm::kWgrad;
  const Extent extent = job.gemm == Gemm::kForward ? job.output : job.input;
  const Result result = ResultOf(job);
  uint32_t words = 0;
TILES:
  for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = TileAt(job, job.tile_begin + t);
    Place place = PlaceOf(tile.m_begin, extent);
  BLOCK_ROWS:
    for (uint32_t i = 0; i < tile.m_count; ++i) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
      const uint32_t first_row = (is_wgrad ? tile.m_begin + i : place.row_block) * kEdge;
      const uint32_t position = is_wgrad ? tile.tap : FlatPosition(place.position, extent);
      Advance(place, extent);
    ROWS:
      for (int row = 0; row < kEdge; ++row) {
        const uint32_t of_row = kJobWords + first_row + row;
        const int32_t exponent =
            Clamped(job.has_row_exponents ? int32_t(job_words[of_row]) : job.exponent);
      BLOCK_COLUMNS:
        for (uint32_t j = 0; j < tile.n_count; ++j) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
          const SumRow sum_row = sums.read();
          words += WriteRow(result, sum_row, first_row + row, position, (tile.n_begin + j) * kEdge,
                            exponent, c);
        }
      }
    }
  }
  written.write(words);
}

}  // namespace dp
