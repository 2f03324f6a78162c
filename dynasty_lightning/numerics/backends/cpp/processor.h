// SPDX-License-Identifier: Apache-2.0
// The processor's float settings: nearest-even with subnormals inside our kernels, whatever the
// program has set.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace dynasty {

class DefaultRounding {
 public:
#if defined(__SSE2__)
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  unsigned saved_;
#else
  DefaultRounding() {}
  ~DefaultRounding() {}
#endif
};

}  // namespace dynasty
