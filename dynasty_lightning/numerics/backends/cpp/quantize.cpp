// SPDX-License-Identifier: Apache-2.0
// Block quantization of one operand in three passes: peaks of blocks, a plan for each block,
// elements. docs/reference/numerics.md is the specification.
//
// Two memory orders are read natively: positions innermost (a Conv's N, C, H, W), where a lane is a
// position, and channels innermost (Linear, channels_last), where sixteen consecutive blocks are
// planned in the lanes of a vector and each plan is spread over its block's channels.
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "args.h"
#include "elements.h"
#include "fine.h"
#include "peaks.h"
#include "plan.h"
#include "processor.h"
#include "stream.h"

namespace dynasty {
namespace {

template <typename T, bool kFine>
int Quantize(const QuantizeArgs& a) {
  const Shape s(a);
  const T* x = static_cast<const T*>(a.x);
  if (a.scope != kTensor) {
    const int64_t scopes = s.row_blocks * (a.scope == kRow ? a.positions : 1);
    std::fill(a.largest_exponents, a.largest_exponents + scopes, kNoExponent);
  }
  const int64_t units = (s.row_blocks + a.group_rows - 1) / a.group_rows;
  const auto unit_at = [&](int64_t u) {
    return Unit{u * a.group_rows, std::min(s.row_blocks, (u + 1) * a.group_rows)};
  };
  bool nonfinite = false, extreme = false;
  int32_t largest = kNoExponent;
  // The window needs the largest exponent of the tensor, which is known only after all of it was
  // read. Each unit is finished at once, while it is in the cache, with the largest exponent that
  // its thread has met; the few whose blocks the true one changes are done again.
  std::vector<int32_t> used(units), finest(units);
#pragma omp parallel num_threads(int(a.threads)) reduction(|| : nonfinite, extreme) \
    reduction(max : largest)
  {
    const DefaultRounding rounding;
    int32_t met = kNoExponent;
#pragma omp for schedule(static)
    for (int64_t u = 0; u < units; ++u) {
      const Unit unit = unit_at(u);
      kFine ? FindEnds(a, s, unit, x) : FindPeaks(a, s, unit, x);
      const Planned planned =
          MakePlans<std::conditional_t<kFine, FineBlocks, PlainBlocks>>(a, s, unit);
      met = std::max(met, planned.largest);
      used[u] = met;
      finest[u] = planned.finest;
      nonfinite = nonfinite || planned.nonfinite;
      if (!nonfinite) WriteElements<T, kFine>(a, s, unit, met, x, &extreme);
    }
    largest = std::max(largest, met);
  }
  if (nonfinite) return kNonfinite;
  if (a.scope == kTensor) {
    a.largest_exponents[0] = largest;
#pragma omp parallel for num_threads(int(a.threads)) schedule(static) reduction(|| : extreme)
    for (int64_t u = 0; u < units; ++u) {
      const DefaultRounding rounding;
      if (used[u] == largest) continue;
      if (finest[u] < largest - (kWindow + 7)) {
        WriteElements<T, kFine>(a, s, unit_at(u), largest, x, &extreme);
      } else {
        Rebase(a, s, unit_at(u), used[u], largest);
      }
    }
  }
  return extreme ? kValuesNotWritten : kDone;
}

bool SoundFormat(const QuantizeArgs& a) {
  constexpr int64_t kMostSlack = 1 << 10;
  return (a.scale_bits == 0 || a.scale_bits == kStepBits) && a.signed_slack >= 0 &&
         a.signed_slack <= kMostSlack && a.unsigned_slack >= 0 && a.unsigned_slack <= kMostSlack;
}

bool SoundWidths(const QuantizeArgs& a) {
  for (int64_t bits = kMinBits; bits <= kMaxBits; ++bits) {
    const int64_t raised = a.raised_widths >> (4 * bits) & 0xF;
    if (raised < kMinBits || raised > kMaxBits) return false;
  }
  return a.most_bits >= kMinBits && a.most_bits <= kMaxBits &&
         (a.least_bits == 0 || a.least_bits >= kMinBits) && a.least_bits <= a.most_bits &&
         !(a.raised_widths & 0xF);
}

bool Sound(const QuantizeArgs& a) {
  const bool blocks = a.block_rows >= 1 &&
                      (a.block_channels == 1 || a.block_channels == 2 || a.block_channels == 4 ||
                       a.block_channels == 8 || a.block_channels == 16 || a.block_channels == 32);
  const bool pointers = a.x && a.request && a.peaks && a.plans && a.largest_exponents && a.codes &&
                        a.relative_exponents && a.headers;
  const bool strides = a.stride_position == 1 || a.stride_channel == 1;
  return blocks && pointers && strides && a.rows >= 1 && a.positions >= 1 && a.channels >= 1 &&
         a.group_rows >= 1 && a.group_channels >= 1 && a.threads >= 1 && a.role >= kActivation &&
         a.role <= kError && a.scope >= kTensor && a.scope <= kRow &&
         (a.scope == kTensor || a.block_rows == 1) && SoundFormat(a) && SoundWidths(a);
}

}  // namespace

extern "C" int dynasty_quantize(const QuantizeArgs* args) {
  if (!args || !Sound(*args)) return kBadArguments;
  if (args->is_split || args->scale_bits) {
    return args->x_is_bfloat16 ? Quantize<Bf16_t, true>(*args) : Quantize<float, true>(*args);
  }
  return args->x_is_bfloat16 ? Quantize<Bf16_t, false>(*args) : Quantize<float, false>(*args);
}

extern "C" void dynasty_stream_numbers(const int64_t* position_and_code, int64_t count,
                                       uint16_t* out) {
  uint32_t word[6];
  for (int i = 0; i < 6; ++i) word[i] = uint32_t(position_and_code[i]);
  const Stream stream(word[0], word[1], word[2], word[3], word[4], word[5]);
  uint16_t buffer[kNumbersPerCall + kNumbersSlack];
  for (int64_t first = 0; first < count; first += kNumbersPerCall) {
    stream.Numbers(uint64_t(first), std::min<int64_t>(kNumbersPerCall, count - first), buffer);
    std::copy(buffer, buffer + std::min<int64_t>(kNumbersPerCall, count - first), out + first);
  }
}

}  // namespace dynasty
