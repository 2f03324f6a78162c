// SPDX-License-Identifier: Apache-2.0
// Calls the kernels' C functions with random arguments, legal and not, on buffers without an
// element to spare, to run under sanitizers.
//   fuzz SEED CASES    prints a digest of all results for each hundred cases, the same for every
//   lane form
//
// Half of the buffers end where a page that may not be touched begins: sanitizers do not see masked
// vector loads, the processor does.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "args.h"
#include "stream.h"

using namespace dynasty;

namespace {

std::mt19937_64 random_bits;

int64_t Draw(int64_t low, int64_t high) {
  return low + int64_t(random_bits() % uint64_t(high - low + 1));
}
bool Chance(double p) {
  return double(random_bits() >> 11) * 0x1p-53 < p;
}
template <typename T>
T OneOf(std::initializer_list<T> list) {
  return list.begin()[Draw(0, int64_t(list.size()) - 1)];
}

[[noreturn]] void Fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::fflush(stdout);
  std::exit(3);
}

// Exactly `count` elements, filled with rubbish.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : count_(count), bytes_(size_t(count) * sizeof(T)), guarded_(Chance(0.5)) {
    if (guarded_) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE));
      mapped_ = (bytes_ + page - 1) / page * page + page;
      base_ = static_cast<char*>(
          mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE)) Fail("mmap");
      data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes_);
    } else {
      data_ = static_cast<T*>(std::malloc(bytes_ ? bytes_ : 1));
    }
    std::memset(static_cast<void*>(data_), 0xA5, bytes_);
  }
  ~Buffer() { guarded_ ? void(munmap(base_, mapped_)) : std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t count() const { return count_; }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && !std::memcmp(data_, other.data_, bytes_);
  }

 private:
  int64_t count_;
  size_t bytes_, mapped_ = 0;
  bool guarded_;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

uint64_t digest = 0xCBF29CE484222325u;

template <typename T>
void Note(const Buffer<T>& buffer) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(buffer.get());
  for (size_t i = 0; i < size_t(buffer.count()) * sizeof(T); ++i)
    digest = (digest ^ bytes[i]) * 0x100000001B3u;
}

float RandomElement(int spread, int center, bool finite) {
  if (!finite && Chance(0.02))
    return OneOf({__builtin_inff(), -__builtin_inff(), __builtin_nanf("")});
  if (Chance(0.1)) return Chance(0.5) ? 0.0f : -0.0f;
  int exponent = center + int(Draw(-spread, spread));
  exponent = exponent < -149 ? -149 : exponent > 126 ? 126 : exponent;
  const float mantissa = Chance(0.3) ? float(Draw(-31, 31)) / 16.0f
                                     : float(Draw(-(1 << 24), 1 << 24)) / float(1 << 23);
  return __builtin_ldexpf(mantissa, exponent);
}

uint16_t Truncated(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);
}

float AsFloat(float x) {
  return x;
}

float AsFloat(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Extents {
  Extents() {
    rows = Draw(1, 20),
    positions = OneOf<int64_t>({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 65, 80, 130}),
    channels = Draw(1, 70);
    if (Chance(0.1)) positions = 1, channels = Draw(1, 2500), rows = Draw(1, 5);
    if (Chance(0.1)) channels = 8 * Draw(1, 20);
  }
  int64_t rows, positions, channels;
};

// An operand in one of the orders that the kernels read, and no element beyond its last.
template <typename T>
struct Operand {
  Operand(const Extents& e, bool finite, int center) {
    const int kind =
        int(Draw(0, 2));  // positions innermost, channels innermost, channels innermost with a gap
    row = kind == 2 ? e.positions * (e.channels + 3) + 5 : e.positions * e.channels;
    position = kind == 0 ? 1 : kind == 1 ? e.channels : e.channels + 3;
    channel = kind == 0 ? e.positions : 1;
    if (Chance(0.1)) row = 0;
    const int64_t last =
        (e.rows - 1) * row + (e.positions - 1) * position + (e.channels - 1) * channel;
    data.reset(new Buffer<T>(last + 1));
    const int spread = int(OneOf({0, 2, 8, 30}));
    const bool positive = Chance(0.3);
    for (int64_t i = 0; i <= last; ++i) {
      float x = RandomElement(spread, center, finite);
      if (positive) x = __builtin_fabsf(x);
      Set((*data)[i], x);
    }
  }
  static void Set(float& to, float x) { to = x; }
  static void Set(uint16_t& to, float x) { to = Truncated(x); }

  std::unique_ptr<Buffer<T>> data;
  int64_t row, position, channel;
};

int64_t Ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Results {
  Results(int64_t elements, int64_t blocks, int64_t scopes, bool with_values)
      : codes(elements),
        values(with_values ? elements : 0),
        relative(blocks),
        headers(blocks),
        largest(scopes) {}
  Buffer<uint8_t> codes;
  Buffer<uint16_t> values;
  Buffer<int8_t> relative;
  Buffer<uint8_t> headers;
  Buffer<int32_t> largest;
};

// Mantissas and widths agree block by block, and values are what the codes stand for.
void CheckResults(const QuantizeArgs& a, const Results& r, bool values_written) {
  const int64_t channel_blocks = Ceil(a.channels, a.block_channels),
                row_blocks = Ceil(a.rows, a.block_rows);
  for (int64_t rb = 0; rb < row_blocks; ++rb) {
    for (int64_t p = 0; p < a.positions; ++p) {
      for (int64_t cb = 0; cb < channel_blocks; ++cb) {
        const int64_t at = rb * channel_blocks * a.positions +
                           (a.grid_channels_last ? p * channel_blocks + cb : cb * a.positions + p);
        const int header = r.headers[at], bits = header & kBitsMask;
        const bool is_signed = header & kSignedFlag, negated = header & kNegatedFlag;
        if (header & ~(kBitsMask | kSignedFlag | kOccupiedFlag | kNegatedFlag) || bits == 1 ||
            bits > 8 || (negated && !(a.is_split && is_signed)))
          Fail("header");
        if (!bits && is_signed) Fail("a block of no bits has a sign");
        if (bits && !(header & kOccupiedFlag)) Fail("bits in a block that was all zero");
        const int64_t scope = a.scope == kTensor   ? 0
                              : a.scope == kSample ? rb
                                                   : rb * a.positions + p;
        const int limit = (1 << (bits - is_signed)) - 1, more = a.is_split && is_signed;
        const int relative = r.relative[at];
        if (!bits && relative) Fail("a block of no bits has an exponent");
        if (relative < (a.scale_bits ? -17 : -15) || relative > 17) Fail("relative exponent");
        const int64_t exponent = int64_t(r.largest[scope]) + relative;
        bool any = false;
        int divisors = a.scale_bits && bits <= kMaxScaledBits ? 0xF : 1;  // 1, 3, 5 and 7
        for (int64_t i = rb * a.block_rows; i < a.rows && i < (rb + 1) * a.block_rows; ++i) {
          for (int64_t c = cb * a.block_channels; c < a.channels && c < (cb + 1) * a.block_channels;
               ++c) {
            const int64_t e = (i * a.positions + p) * a.channels + c;
            const int code = is_signed ? int8_t(r.codes[e]) : r.codes[e],
                      q = negated ? -code : code;
            any |= q != 0;
            for (int d = 0; d < 4; ++d) {
              const int k = 2 * d + 1, own = code / k;
              if (code % k || own > limit || own < (is_signed ? -limit - more : 0))
                divisors &= ~(1 << d);
            }
            if (bits ? !divisors : code != 0) Fail("a mantissa does not fit its width");
            if (values_written &&
                r.values[e] != Truncated(q ? __builtin_ldexpf(float(q), int(exponent)) : 0.0f))
              Fail("value");
          }
        }
        if (any != (bits > 0)) Fail("bits without a mantissa");
      }
    }
  }
}

template <typename T>
void FuzzQuantize() {
  const Extents e;
  const bool finite = Chance(0.9);
  const int center = OneOf({0, 0, 0, -135, -149, 100, 120});
  const Operand<T> x(e, finite, center);
  QuantizeArgs a = {};
  a.x = x.data->get(), a.x_is_bfloat16 = sizeof(T) == 2;
  a.rows = e.rows, a.positions = e.positions, a.channels = e.channels;
  a.stride_row = x.row, a.stride_position = x.position, a.stride_channel = x.channel;
  a.block_rows = OneOf<int64_t>({1, 4, 8, 16, 32, 5}),
  a.block_channels = OneOf<int64_t>({1, 2, 4, 4, 8, 16, 32});
  a.scope = Chance(0.3) ? Draw(kSample, kRow) : kTensor;
  if (a.scope != kTensor) a.block_rows = 1;
  const bool fine = Chance(0.5);
  if (fine) {
    a.is_split = Chance(0.6), a.scale_bits = a.is_split && Chance(0.5) ? 0 : kStepBits;
    a.signed_slack = Draw(0, 12), a.unsigned_slack = Draw(0, 12);
  }
  a.group_rows = Chance(0.7) ? 1 : Draw(1, 4), a.group_channels = Chance(0.7) ? 1 : Draw(1, 4);
  a.grid_channels_last = Chance(0.5);
  a.logical_channels_last = Chance(0.5);
  a.role = Draw(kActivation, kError),
  a.stochastic = Chance(0.1) ? a.role != kError : a.role == kError, a.force_signed = Chance(0.2);
  a.is_threshold = Chance(0.5);
  a.least_bits = a.is_threshold ? OneOf<int64_t>({0, 0, 2, 4}) : 0,
  a.most_bits = OneOf<int64_t>({4, 8, 8});
  a.raised_widths = OneOf<int64_t>({kAllWidths, kAllWidths, 0x888844440, 0x888888220, 0x666666660});
  a.seed = Draw(0, UINT32_MAX), a.rank = Draw(0, 9), a.backward_count = Draw(0, UINT32_MAX),
  a.call_index = Draw(0, 99);
  a.layer = Draw(0, 65535);
  const int64_t row_blocks = Ceil(e.rows, a.block_rows),
                channel_blocks = Ceil(e.channels, a.block_channels);
  const int64_t blocks = row_blocks * e.positions * channel_blocks;
  // The request: each axis of the grid of its own, or shared.
  const bool by_row = Chance(0.5), by_position = Chance(0.5), by_channel = Chance(0.5);
  a.request_channel = by_channel ? 1 : 0;
  const int64_t per_position = by_channel ? channel_blocks : 1;
  a.request_position = by_position ? per_position : 0;
  const int64_t per_row = per_position * (by_position ? e.positions : 1);
  a.request_row = by_row ? per_row : 0;
  Buffer<int16_t> request(per_row * (by_row ? row_blocks : 1));
  const int far = Chance(0.05) ? OneOf({-32768, -500, 500, 5000, 32767}) : 0;
  for (int64_t i = 0; i < request.count(); ++i) {
    request[i] = int16_t(!a.is_threshold ? OneOf({0, 2, 3, 4, 5, 6, 7, 8})
                         : far           ? far
                                         : center + int(Draw(-8, 8)));
  }
  a.request = request.get();
  Buffer<int32_t> peaks(fine ? 2 * blocks : blocks), plans(blocks);
  a.peaks = peaks.get(), a.plans = plans.get();
  const int64_t scopes = a.scope == kTensor   ? 1
                         : a.scope == kSample ? row_blocks
                                              : row_blocks * e.positions;
  const bool with_values = Chance(0.7);
  const Results one(e.rows * e.positions * e.channels, blocks, scopes, with_values),
      two(one.codes.count(), blocks, scopes, with_values);
  int status[2];
  for (const Results* r : {&one, &two}) {
    a.codes = r->codes.get(), a.values = with_values ? r->values.get() : nullptr;
    a.relative_exponents = r->relative.get(), a.headers = r->headers.get(),
    a.largest_exponents = r->largest.get();
    a.threads = r == &one ? 1 : 2;
    status[r == &two] = dynasty_quantize(&a);
  }
  // Whether values could be written may depend on threads: what one has met of the tensor decides
  // what it tries to write.
  if ((status[0] ^ status[1]) & ~kValuesNotWritten) Fail("status depends on threads");
  if (status[0] & ~(kNonfinite | kValuesNotWritten)) Fail("legal arguments refused");
  if (finite && (status[0] & kNonfinite)) Fail("finite operand called not finite");
  if (status[0] & kNonfinite) return;
  const bool values_written = with_values && !(status[0] & kValuesNotWritten);
  if (!(one.codes == two.codes && one.headers == two.headers && one.relative == two.relative &&
        one.largest == two.largest)) {
    Fail("results depend on threads");
  }
  if (values_written && !(status[1] & kValuesNotWritten) && !(one.values == two.values))
    Fail("values depend on threads");
  CheckResults(a, one, values_written);
  Note(one.codes), Note(one.headers), Note(one.relative), Note(one.largest);
  if (!values_written) return;
  Note(one.values);
  const int32_t largest = one.largest[0];
  if (a.scope != kTensor || largest < -100 || largest > 100) return;
  const Buffer<uint16_t> again(one.codes.count());
  DequantizeArgs d = {};
  d.codes = one.codes.get(), d.relative_exponents = one.relative.get();
  d.headers = one.headers.get(), d.largest_exponent = largest;
  d.rows = a.rows, d.positions = a.positions, d.channels = a.channels;
  d.block_rows = a.block_rows, d.block_channels = a.block_channels;
  d.grid_channels_last = a.grid_channels_last, d.values = again.get(), d.threads = Draw(1, 2);
  if (dynasty_dequantize(&d) != kDone) Fail("legal codes refused");
  if (!(again == one.values)) Fail("values of codes");
  // And with something illegal in one place.
  for (int64_t* field :
       {&d.rows, &d.positions, &d.channels, &d.block_rows, &d.block_channels, &d.threads}) {
    const int64_t kept = *field;
    *field = OneOf<int64_t>({0, -1, INT64_MIN});
    if (dynasty_dequantize(&d) != kBadArguments) Fail("illegal extents of codes taken");
    *field = kept;
  }
  d.block_channels = OneOf<int64_t>({3, 5, 64, 1 << 20});
  if (dynasty_dequantize(&d) != kBadArguments) Fail("illegal block of codes taken");
}

void FuzzIllegalQuantize() {
  Buffer<float> x(64);
  for (int64_t i = 0; i < 64; ++i) x[i] = float(i);
  Buffer<int16_t> request(1);
  request[0] = 4;
  Buffer<int32_t> peaks(64), plans(64), largest(64);
  Buffer<uint16_t> values(64);
  Buffer<uint8_t> codes(64), headers(64);
  Buffer<int8_t> relative(64);
  QuantizeArgs a = {};
  a.x = x.get(), a.rows = 4, a.positions = 4, a.channels = 4, a.stride_row = 16,
  a.stride_position = 4, a.stride_channel = 1;
  a.block_rows = 1, a.block_channels = 4, a.group_rows = 1, a.group_channels = 1,
  a.request = request.get(), a.most_bits = 8, a.raised_widths = kAllWidths;
  a.is_threshold = 1, a.role = kError, a.stochastic = 1, a.scope = kRow, a.peaks = peaks.get(),
  a.plans = plans.get();
  a.largest_exponents = largest.get(), a.codes = codes.get(), a.values = values.get(),
  a.relative_exponents = relative.get();
  a.headers = headers.get(), a.threads = 1;
  if (dynasty_quantize(&a) & kBadArguments) Fail("legal arguments refused");
  const auto refused = [&](const char* what) {
    if (dynasty_quantize(&a) != kBadArguments) Fail(what);
  };
  if (dynasty_quantize(nullptr) != kBadArguments) Fail("no arguments taken");
  for (int64_t* field : {&a.rows, &a.positions, &a.channels, &a.block_rows, &a.block_channels,
                         &a.group_rows, &a.group_channels, &a.threads}) {
    const int64_t kept = *field;
    *field = OneOf<int64_t>({0, -1, INT64_MIN});
    refused("illegal extent taken");
    *field = kept;
  }
  struct Change {
    int64_t* field;
    int64_t value;
  };
  for (const Change& change : {Change{&a.block_channels, 3},
                               Change{&a.block_channels, 64},
                               Change{&a.block_rows, 2},
                               Change{&a.role, 3},
                               Change{&a.role, -1},
                               Change{&a.scope, 3},
                               Change{&a.scope, -1},
                               Change{&a.most_bits, 9},
                               Change{&a.most_bits, 1},
                               Change{&a.least_bits, -1},
                               Change{&a.least_bits, 1},
                               Change{&a.least_bits, 9},
                               Change{&a.stride_channel, 2},
                               Change{&a.raised_widths, 0},
                               Change{&a.raised_widths, kAllWidths | 1},
                               Change{&a.scale_bits, 1},
                               Change{&a.scale_bits, 4},
                               Change{&a.signed_slack, -1},
                               Change{&a.unsigned_slack, 1 << 11},
                               Change{&a.raised_widths, 0x976543220},
                               Change{&a.raised_widths, 0x876543210 ^ 0x200}}) {
    const int64_t kept = *change.field;
    *change.field = change.value;
    refused("illegal field taken");
    *change.field = kept;
  }
  void** pointers[] = {const_cast<void**>(&a.x),
                       reinterpret_cast<void**>(const_cast<int16_t**>(&a.request)),
                       reinterpret_cast<void**>(&a.peaks),
                       reinterpret_cast<void**>(&a.plans),
                       reinterpret_cast<void**>(&a.largest_exponents),
                       reinterpret_cast<void**>(&a.codes),
                       reinterpret_cast<void**>(&a.relative_exponents),
                       reinterpret_cast<void**>(&a.headers)};
  for (void** pointer : pointers) {
    void* kept;
    void* nothing = nullptr;
    std::memcpy(&kept, pointer, sizeof kept);
    std::memcpy(pointer, &nothing, sizeof nothing);
    refused("null pointer taken");
    std::memcpy(pointer, &kept, sizeof kept);
  }
}

// Codes that no quantizer wrote: any bytes, any header.
void FuzzDequantizeRubbish() {
  const Extents e;
  const int64_t block_rows = OneOf<int64_t>({1, 4, 16, 100}),
                block_channels = OneOf<int64_t>({1, 2, 4, 8, 16, 32});
  const int64_t blocks = Ceil(e.rows, block_rows) * e.positions * Ceil(e.channels, block_channels);
  Buffer<uint8_t> codes(e.rows * e.positions * e.channels), headers(blocks);
  Buffer<int8_t> relative(blocks);
  Buffer<uint16_t> values(codes.count());
  for (int64_t i = 0; i < codes.count(); ++i) codes[i] = uint8_t(random_bits());
  for (int64_t i = 0; i < blocks; ++i) headers[i] = uint8_t(random_bits());
  for (int64_t i = 0; i < blocks; ++i) relative[i] = int8_t(random_bits());
  const DequantizeArgs d = {
      codes.get(),    relative.get(), headers.get(), OneOf<int64_t>({-100, 0, 120}),
      e.rows,         e.positions,    e.channels,    block_rows,
      block_channels, Draw(0, 1),     values.get(),  Draw(1, 2)};
  if (dynasty_dequantize(&d) != kDone) Fail("legal codes refused");
  Note(values);
}

void FuzzWiden() {
  const Extents e;
  const Buffer<uint16_t> values(e.rows * e.positions * e.channels);
  const bool has_bias = Chance(0.5);
  const Buffer<float> bias(has_bias ? e.channels : 0), one(values.count()), two(values.count());
  for (int64_t i = 0; i < values.count(); ++i) values[i] = Truncated(RandomElement(20, 0, true));
  for (int64_t i = 0; i < bias.count(); ++i) bias[i] = RandomElement(20, 0, true);
  const bool channels_last = Chance(0.5);
  WidenArgs w = {values.get(), has_bias ? bias.get() : nullptr,
                 e.rows,       e.positions,
                 e.channels,   channels_last,
                 one.get(),    1};
  if (dynasty_widen(&w) != kDone) Fail("legal result refused");
  w.out = two.get(), w.threads = 2;
  if (dynasty_widen(&w) != kDone || !(one == two)) Fail("widen depends on threads");
  for (int64_t r = 0; r < e.rows; ++r) {
    for (int64_t p = 0; p < e.positions; ++p) {
      for (int64_t c = 0; c < e.channels; ++c) {
        float want = AsFloat(values[(r * e.positions + p) * e.channels + c]);
        if (has_bias) want = want + bias[c];
        const float got = one[channels_last ? (r * e.positions + p) * e.channels + c
                                            : (r * e.channels + c) * e.positions + p];
        if (std::memcmp(&want, &got, 4)) Fail("widened value");
      }
    }
  }
  Note(one);
  for (int64_t* field : {&w.rows, &w.positions, &w.channels, &w.threads}) {
    const int64_t kept = *field;
    *field = OneOf<int64_t>({0, -1, INT64_MIN});
    if (dynasty_widen(&w) != kBadArguments) Fail("illegal extents of a result taken");
    *field = kept;
  }
}

template <typename T>
void FuzzMeanSquares() {
  const Extents e;
  // Squares far beyond float32 at both ends, too.
  const Operand<T> x(e, Chance(0.9), OneOf({0, 0, -70, 60, -140, 110}));
  const int64_t group_rows = OneOf<int64_t>({1, 4, e.rows, e.rows + 2}),
                block_channels = OneOf<int64_t>({1, 2, 4, 8, 16, 32});
  const int64_t blocks = Ceil(e.rows, group_rows) * e.positions * Ceil(e.channels, block_channels);
  const Buffer<double> one(blocks), two(blocks);
  const bool channels_last = Chance(0.5);
  MeanSquaresArgs m = {x.data->get(), sizeof(T) == 2, e.rows,    e.positions, e.channels,
                       x.row,         x.position,     x.channel, group_rows,  block_channels,
                       channels_last, one.get(),      1};
  if (dynasty_mean_squares(&m) != kDone) Fail("legal operand of mean squares refused");
  m.out = two.get(), m.threads = 2;
  if (dynasty_mean_squares(&m) != kDone || !(one == two)) Fail("mean squares depend on threads");
  const int64_t channel_blocks = Ceil(e.channels, block_channels);
  for (int64_t g = 0; g < Ceil(e.rows, group_rows); ++g) {
    for (int64_t p = 0; p < e.positions; ++p) {
      for (int64_t b = 0; b < channel_blocks; ++b) {
        const int64_t last_row = std::min(e.rows, (g + 1) * group_rows),
                      last = std::min(e.channels, (b + 1) * block_channels);
        double total = 0.0;
        for (int64_t c = b * block_channels; c < last; ++c) {
          double sum = 0.0;
          for (int64_t r = g * group_rows; r < last_row; ++r) {
            const double value = AsFloat((*x.data)[r * x.row + p * x.position + c * x.channel]);
            sum += value * value;
          }
          total += sum;
        }
        const double want =
            total / double((last_row - g * group_rows) * (last - b * block_channels));
        const double got = one[channels_last ? (g * e.positions + p) * channel_blocks + b
                                             : (g * channel_blocks + b) * e.positions + p];
        if (want == want ? got != want : got == got) Fail("mean square");
      }
    }
  }
  // NaN has many encodings, and which one comes out is nobody's business.
  for (int64_t i = 0; i < blocks; ++i) {
    if (one[i] != one[i]) one[i] = -1.0;
  }
  Note(one);
  for (int64_t* field :
       {&m.rows, &m.positions, &m.channels, &m.group_rows, &m.block_channels, &m.threads}) {
    const int64_t kept = *field;
    *field = OneOf<int64_t>({0, -1, INT64_MIN});
    if (dynasty_mean_squares(&m) != kBadArguments) Fail("illegal extents of an operand taken");
    *field = kept;
  }
}

// One number as docs/reference/numerics.md has it, in the plainest words.
uint16_t NumberOf(const int64_t* words, uint64_t index) {
  const uint64_t g = index / 8;
  uint32_t c[4] = {uint32_t(g), uint32_t(words[2]), uint32_t(words[3]),
                   uint32_t(words[4]) << 16 | uint32_t(words[5]) << 12 | uint32_t(g >> 32)};
  uint32_t k[2] = {uint32_t(words[0]), uint32_t(words[1])};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1),
                              uint32_t(p0 >> 32) ^ c[3] ^ k[1], uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return uint16_t(c[index % 8 / 2] >> (index % 2 * 16));
}

void FuzzStream() {
  int64_t words[6] = {Draw(0, UINT32_MAX), Draw(0, UINT32_MAX), Draw(0, UINT32_MAX),
                      Draw(0, UINT32_MAX), Draw(0, 65535),      Draw(0, 15)};
  const int64_t count = OneOf<int64_t>({0, 1, 7, 8, 9, 63, 64, 65, 100, 1000});
  const Buffer<uint16_t> out(count);
  dynasty_stream_numbers(words, count, out.get());
  for (int64_t i = 0; i < count; i += 1 + count / 16) {
    if (out[i] != NumberOf(words, uint64_t(i))) Fail("random number");
  }
  Note(out);
  // Starts that no tensor in a test is large enough for: counters around and beyond 2**32, and
  // between two of them.
  const uint64_t first = OneOf<uint64_t>(
      {0, 3, 1u << 31, (1ull << 35) - 40, (1ull << 35) - 5, (1ull << 35) + 1, (1ull << 40) + 13});
  uint32_t w[6];
  for (int i = 0; i < 6; ++i) w[i] = uint32_t(words[i]);
  const Stream stream(w[0], w[1], w[2], w[3], w[4], w[5]);
  const int64_t length = Draw(1, 200);
  const Buffer<uint16_t> far(length + kNumbersSlack);
  const int64_t offset = stream.Numbers(first, length, far.get());
  for (int64_t i = 0; i < length; i += 7) {
    if (far[offset + i] != NumberOf(words, first + uint64_t(i)))
      Fail("random number of a large index");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const int64_t cases = argc > 2 ? std::atoll(argv[2]) : 1000;
  for (int64_t i = 0; i < cases; ++i) {
    random_bits.seed(seed + uint64_t(i));
    switch (i % 10) {
      case 0:
        FuzzWiden();
        break;
      case 1:
        Chance(0.5) ? FuzzMeanSquares<float>() : FuzzMeanSquares<uint16_t>();
        break;
      case 2:
        FuzzStream();
        break;
      case 3:
        Chance(0.3) ? FuzzIllegalQuantize() : FuzzDequantizeRubbish();
        break;
      case 4:
      case 5:
        FuzzQuantize<uint16_t>();
        break;
      default:
        FuzzQuantize<float>();
        break;
    }
    if (i % 100 == 99)
      std::printf("%lld %016llx\n", static_cast<long long>(i + 1),
                  static_cast<unsigned long long>(digest));
  }
  std::printf("done\n");
  return 0;
}
