// SPDX-License-Identifier: Apache-2.0
// Wiring: ports, registers, and four processes side by side.
#include "dpgemm/gemm.h"

namespace dp {

namespace {

void Collect(hls::stream<ReadStatus>& status_a, hls::stream<ReadStatus>& status_b,
             hls::stream<uint64_t>& cycles, hls::stream<uint32_t>& written, Report& report) {
  const ReadStatus a = status_a.read();
  const ReadStatus b = status_b.read();
  report.cycles = cycles.read();
  report.words_a = a.words;
  report.words_b = b.words;
  report.words_c = written.read();
  report.error = a.error != Error::kNone ? a.error : b.error;
}

// Each process has a job of its own: in a dataflow region an array (an extent) has one reader.
void Run(const Job& job_of_a, const Job& job_of_b, const Job& job_of_lanes, const Job& job_of_c,
         const uint32_t* job_words, const Word_t* a, const Word_t* b, uint32_t* c, Report& report) {
#pragma HLS DATAFLOW
  hls::stream<Block> a_blocks("a_blocks");
  hls::stream<Block> b_blocks("b_blocks");
  hls::stream<SumRow> sums("sums");
  hls::stream<ReadStatus> status_a("status_a");
  hls::stream<ReadStatus> status_b("status_b");
  hls::stream<uint64_t> cycles("cycles");
  hls::stream<uint32_t> written("written");
#pragma HLS STREAM variable = a_blocks depth = kStreamDepth
#pragma HLS STREAM variable = b_blocks depth = kStreamDepth
#pragma HLS STREAM variable = sums depth = kStreamDepth
#pragma HLS STREAM variable = status_a depth = 2
#pragma HLS STREAM variable = status_b depth = 2
#pragma HLS STREAM variable = cycles depth = 2
#pragma HLS STREAM variable = written depth = 2
  ReadOperand(job_of_a, Operand::kA, a, a_blocks, status_a);
  ReadOperand(job_of_b, Operand::kB, b, b_blocks, status_b);
  Compute(job_of_lanes, a_blocks, b_blocks, sums, cycles);
  WriteResult(job_of_c, job_words, sums, c, written);
  Collect(status_a, status_b, cycles, written, report);
}

}  // namespace

void Execute(const uint32_t* job_words, const Word_t* a, const Word_t* b, uint32_t* c,
             Report& report) {
  Job decoded;
  report = {0, 0, 0, 0, Error::kNone};
  report.error = DecodeJob(job_words, decoded);
  if (report.error == Error::kNone) {
    const Job job_of_a = decoded, job_of_b = decoded, job_of_lanes = decoded, job_of_c = decoded;
    Run(job_of_a, job_of_b, job_of_lanes, job_of_c, job_words, a, b, c, report);
  }
}

}  // namespace dp

void dpgemm(const uint32_t* job, const dp::Word_t* a, const dp::Word_t* b, uint32_t* c,
            uint32_t* version, uint32_t* capability, uint64_t* cycles, uint32_t* words_a,
            uint32_t* words_b, uint32_t* words_c, uint32_t* error) {
#pragma HLS INTERFACE m_axi port = job bundle = gmem_job offset = slave depth = \
    kCosimWords max_read_burst_length = kBurstWords
#pragma HLS INTERFACE m_axi port = a bundle = gmem_a offset = slave depth = \
    kCosimWords max_read_burst_length = kBurstWords
#pragma HLS INTERFACE m_axi port = b bundle = gmem_b offset = slave depth = \
    kCosimWords max_read_burst_length = kBurstWords
#pragma HLS INTERFACE m_axi port = c bundle = gmem_c offset = slave depth = \
    kCosimWords max_write_burst_length = kBurstWords
#pragma HLS INTERFACE s_axilite port = job bundle = control
#pragma HLS INTERFACE s_axilite port = a bundle = control
#pragma HLS INTERFACE s_axilite port = b bundle = control
#pragma HLS INTERFACE s_axilite port = c bundle = control
#pragma HLS INTERFACE s_axilite port = version bundle = control
#pragma HLS INTERFACE s_axilite port = capability bundle = control
#pragma HLS INTERFACE s_axilite port = cycles bundle = control
#pragma HLS INTERFACE s_axilite port = words_a bundle = control
#pragma HLS INTERFACE s_axilite port = words_b bundle = control
#pragma HLS INTERFACE s_axilite port = words_c bundle = control
#pragma HLS INTERFACE s_axilite port = error bundle = control
#pragma HLS INTERFACE s_axilite port = return bundle = control
  dp::Report report;
  dp::Execute(job, a, b, c, report);

  *version = dp::kLayoutVersion;
  *capability = dp::kDigest;
  *cycles = report.cycles;
  *words_a = report.words_a;
  *words_b = report.words_b;
  *words_c = report.words_c;
  *error = uint32_t(report.error);
}
