// SPDX-License-Identifier: Apache-2.0
// Included before everything else in simulation libraries. The stream model's only complaint about
// a misuse is text on std::cout; here it goes to a stream of the calling thread instead, so that
// calls side by side keep their own.
#pragma once

#include <iostream>
#include <sstream>

namespace std {
extern thread_local ostringstream dpgemm_cout;
}
#define cout dpgemm_cout
