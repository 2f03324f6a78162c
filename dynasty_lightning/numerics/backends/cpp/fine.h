// SPDX-License-Identifier: Apache-2.0
// Second pass over blocks of split codes, or with a mantissa in their scale: planned from the peaks
// at both of their ends. Of their plans, bits 16-31 hold the LSB before the window in quarter
// steps: 4 * e + j stands for (1 + j / 4) * 2**e.
#pragma once

#include "plan.h"
#include "shape.h"

namespace dynasty {
namespace {

// How many levels an end has beyond 2**p - 1.
struct More {
  Int high, low;
};

class FineBlocks {
 public:
  // Bits below a plan's scale exponent, rounded down.
  static constexpr int kScaleShift = kExponentShift + kStepBits;

  // Largest magnitudes above and below zero, and of both.
  struct Found {
    Peak high, low, peak;
    Mask high_is_larger;
  };

  FineBlocks(const QuantizeArgs& args, const Shape& s)
      : planner_(args), a_(args), count_(s.row_blocks * s.BlocksOfRow(args)) {}

  Found Load(const Place& at) const {
    const Int high = dynasty::Load(a_.peaks + at.index, at.lanes()),
              low = dynasty::Load(a_.peaks + count_ + at.index, at.lanes());
    return {Peak(high), Peak(low), Peak(Greatest(high, low)), high > low};
  }
  static Mask Nonfinite(const Found& found) { return found.peak.nonfinite; }

  Int Widths(const Found& found, Int request, Int numbers) const {
    const Int sign = planner_.finds_sign ? Select(found.low.occupied, Ints(1), Ints(0)) : Ints(1);
    const Int negated = a_.is_split ? Select(found.high_is_larger, sign, Ints(0)) : Ints(0);
    const More more = MoreOf(sign, negated);
    const Int above = found.peak.exponent - request, lsb = ShiftLeft<kStepBits>(request);
    Int needed =
        above + Ints(1) + sign - Select(Fits(found, above, sign, more, lsb), Ints(1), Ints(0));
    if (a_.stochastic) {
      needed = needed + Select(Fits(found, above + Ints(1), sign, more, lsb), Ints(0), Ints(1));
    }
    return planner_.Widths(found.peak, sign, request, needed, numbers) |
           ShiftLeft<kNegatedShift>(negated) | Ints(a_.is_split ? 1 << kSplitShift : 0);
  }

  // Adds the LSB before the window; returns the exponent after drop scaling.
  Int Scale(const Found& found, Int request, const Place&, Int& plan) const {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<kSignedShift>(plan) & Ints(1),
              depth = ShiftRight<kDepthShift>(plan) & Ints(3),
              negated = ShiftRight<kNegatedShift>(plan) & Ints(1);
    const More more = MoreOf(sign, negated);
    const Int p = width - sign;
    // From a binade below the natural LSB, to that or where nothing may saturate a binade more:
    // what fits under one fits under each coarser one, so they are counted.
    const int binades = a_.stochastic ? 2 : 1;
    const Int coarsest = ShiftLeft<kStepBits>(found.peak.exponent - p + Ints(binades));
    const Mask by_step = a_.scale_bits ? Ints(kMaxScaledBits + 1) > width : Mask(0);
    Int finer = Ints(0);
    for (int by = 1; by <= kSteps * binades; ++by) {
      const int whole = by % kSteps ? 0 : kSteps;
      if (!whole && !a_.scale_bits) continue;
      const Mask fits = Fits(found, p, sign, more, coarsest - Ints(by));
      finer = finer + Select(fits, Select(by_step, Ints(1), Ints(whole)), Ints(0));
    }
    Int lsb = coarsest - finer;
    if (planner_.drops) {
      // What fits is no coarser: kept blocks are enlarged to a binade below their threshold.
      const Mask kept = (plan & Ints(kKeptFlag)) > Ints(0);
      lsb = Select(kept, ShiftLeft<kStepBits>(planner_.KeptLsb(request)), lsb);
    }
    plan = (plan & Ints((1 << kExponentShift) - 1)) | ShiftLeft<kExponentShift>(lsb);
    return Select(width > Ints(0), found.peak.exponent + depth, Ints(kNoExponent));
  }

  bool drops() const { return planner_.drops; }

 private:
  More MoreOf(Int sign, Int negated) const {
    return {negated, a_.is_split ? sign & (Ints(1) - negated) : Ints(0)};
  }

  // Whether an end is at most (2**p - 1 + more + slack / 4) LSBs; p at most 12.
  static Mask FitsEnd(const Peak& end, Int p, Int more, Int slack, Int lsb) {
    const Int limit = ShiftLeft(Ints(1), Least(Greatest(p, Ints(0)), Ints(12))) - Ints(1) + more;
    const Int quarters = ShiftLeft<2>(limit) + slack;
    // Times 4 + j.
    const Int sixteenths = ShiftLeft<2>(quarters) + (quarters & (Ints(0) - (lsb & Ints(1)))) +
                           (ShiftLeft<1>(quarters) & (Ints(0) - (ShiftRight<1>(lsb) & Ints(1))));
    // significand * 2**(exponent - 23) <= sixteenths * 2**(e - 4), the significand rounded up.
    const Int k = ShiftRight<kStepBits>(lsb) - end.exponent + Ints(19),
              by = Least(Greatest(k, Ints(0)), Ints(24));
    const Int whole = ShiftRight(end.significand + ShiftLeft(Ints(1), by) - Ints(1), by);
    // Where k < 0 the limit is below 2**18 and a significand, which is not shifted then, above it.
    return Mask(~((whole > sixteenths) & end.occupied));
  }

  Mask Fits(const Found& found, Int p, Int sign, const More& more, Int lsb) const {
    const Int slack = a_.stochastic ? Ints(0)
                                    : Select(sign > Ints(0), Ints(int32_t(a_.signed_slack)),
                                             Ints(int32_t(a_.unsigned_slack)));
    return Mask(FitsEnd(found.high, p, more.high, slack, lsb) &
                FitsEnd(found.low, p, more.low, slack, lsb));
  }

  Planner planner_;
  const QuantizeArgs& a_;
  const int64_t count_;
};

}  // namespace
}  // namespace dynasty
