// SPDX-License-Identifier: Apache-2.0
// C entry of the simulation library. Not synthesized.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <mutex>
#include <sstream>
#include <string>

#include "dpgemm/gemm.h"

namespace {

// The streams' only complaint about a misuse is text on std::cout.
class CaptureCout {
 public:
  CaptureCout() : previous_(std::cout.rdbuf(text_.rdbuf())) {}
  ~CaptureCout() { std::cout.rdbuf(previous_); }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
  std::streambuf* previous_;
};

std::mutex one_call_at_a_time;  // std::cout is everybody's

}  // namespace

// What the core's registers read after a run; the order is fpga/csim.py's.
struct DpgemmStatus {
  uint64_t cycles;
  uint32_t version, capability, words_a, words_b, words_c, error;
};

extern "C" {

// Runs one job. `text` gets what the simulation printed, cut to `text_size` with its end; empty means that all went well.
void dpgemm_run(const uint32_t* job, const uint64_t* a, const uint64_t* b, uint32_t* c, DpgemmStatus* status, char* text,
                size_t text_size) {
  const std::lock_guard<std::mutex> lock(one_call_at_a_time);
  const CaptureCout capture;
  dpgemm(job, a, b, c, &status->version, &status->capability, &status->cycles, &status->words_a, &status->words_b, &status->words_c,
         &status->error);
  const std::string printed = capture.text();
  const size_t length = std::min(printed.size(), text_size - 1);
  std::memcpy(text, printed.data(), length);
  text[length] = 0;
}

}  // extern "C"
