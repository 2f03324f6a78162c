// SPDX-License-Identifier: Apache-2.0
// C entry of the simulation library; calls may run side by side. Not synthesized.
#include <algorithm>
#include <cstring>
#include <string>

#include "dpgemm/gemm.h"

thread_local std::ostringstream std::dpgemm_cout;

// What the core's registers read after a run; the order is fpga/csim.py's.
struct DpgemmStatus {
  uint64_t cycles;
  uint32_t version, capability, words_a, words_b, words_c, error;
};

extern "C" {

// Runs one job. `text` gets what the simulation printed, cut to `text_size` with its end; empty
// means that all went well.
void dpgemm_run(const uint32_t* job, const uint64_t* a, const uint64_t* b, uint32_t* c,
                DpgemmStatus* status, char* text, size_t text_size) {
  std::cout.str("");
  dpgemm(job, a, b, c, &status->version, &status->capability, &status->cycles, &status->words_a,
         &status->words_b, &status->words_c, &status->error);
  const std::string printed = std::cout.str();
  const size_t length = std::min(printed.size(), text_size - 1);
  std::memcpy(text, printed.data(), length);
  text[length] = 0;
}

}  // extern "C"
