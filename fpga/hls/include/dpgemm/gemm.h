// SPDX-License-Identifier: Apache-2.0
// The top function and the processes that it wires.
#pragma once

#include "dpgemm/job.h"

namespace dp {

// Reads the blocks of one operand, step by step, in the order of its lines in memory. Corrupt
// memory gives zero blocks and an error.
void ReadOperand(const Job& job, Operand operand, const Word_t* memory, hls::stream<Block>& blocks,
                 hls::stream<ReadStatus>& status);

// Block products and their sums; the rows of each output tile, block by block, and the cycles of
// each.
void Compute(const Job& job, hls::stream<Block>& a_blocks, hls::stream<Block>& b_blocks,
             hls::stream<SumRow>& sums, hls::stream<uint64_t>& cycles);

// Rounds sums (or not) and writes them where they belong.
void WriteResult(const Job& job, const uint32_t* job_words, hls::stream<SumRow>& sums, uint32_t* c,
                 hls::stream<uint32_t>& written);

// What a run leaves in the registers.
struct Report {
  uint64_t cycles;
  uint32_t words_a;
  uint32_t words_b;
  uint32_t words_c;
  Error error;
};

// Checks and runs the job at `job_words`; if that is illegal, nothing but `error` is set.
void Execute(const uint32_t* job_words, const Word_t* a, const Word_t* b, uint32_t* c,
             Report& report);

}  // namespace dp

// The core. Registers and job words: docs/reference/core.md and registers.h.
void dpgemm(const uint32_t* job, const dp::Word_t* a, const dp::Word_t* b, uint32_t* c,
            uint32_t* version, uint32_t* capability, uint64_t* cycles, uint32_t* words_a,
            uint32_t* words_b, uint32_t* words_c, uint32_t* error);
