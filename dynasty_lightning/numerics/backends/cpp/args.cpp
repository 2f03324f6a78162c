// SPDX-License-Identifier: Apache-2.0
// What the loader compares with its own structs before it calls anything.
#include "args.h"

namespace dynasty {

extern "C" int64_t dynasty_args_size(int64_t place) {
  constexpr int64_t count = sizeof(kArgsSizes) / sizeof(kArgsSizes[0]);
  return place >= 0 && place < count ? kArgsSizes[place] : -1;
}

}  // namespace dynasty
