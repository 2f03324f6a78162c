// SPDX-License-Identifier: Apache-2.0
// A convolution or linear layer on the dynamic-precision core, as a layer of hls4ml: fixed point
// in, quantized block by block, computed by the core, biased in float32, and out in the layer's
// result type.
#ifndef NNET_DYNAMIC_GEMM_H_
#define NNET_DYNAMIC_GEMM_H_

#include <cstring>

#include "hls_stream.h"
#include "nnet_common.h"
#include "nnet_dpgemm.h"

namespace nnet {

struct dynamic_gemm_config {
  static constexpr int positions = 1;
  static constexpr int channels = 1;
  static constexpr int out_positions = 1;
  static constexpr int out_channels = 1;
  static constexpr int weight_words = 1;  // 64-bit
  static constexpr int weight_exponent = 0;
  static constexpr int request_positions = 1;
  static constexpr int request_blocks = 1;
  static constexpr bool is_threshold = false;
  static constexpr int least_bits = 0;
  static constexpr int most_bits = 8;
  static constexpr int group_blocks = 0;
};

// What dp::RowQuantizer asks for: the layer's constants and the input type's binary point.
template <class data_T, typename CONFIG_T>
struct DynamicGemmRow : CONFIG_T {
  static constexpr int fraction = data_T::width - data_T::iwidth;
};

// hls4ml simulates on the caller's stack, 8 MiB as a rule.
static_assert(2 * sizeof(dp::Lane) * dp::kLanes + sizeof(dp::LaneSums) * dp::kLanes < (4u << 20),
              "this core's memories do not fit the stack that hls4ml simulates on: choose a "
              "smaller tile or block edge");

// The value in units of its last place.
template <class data_T>
int32_t LastPlaces(const data_T& value) {
#pragma HLS INLINE
  static_assert(data_T::width <= dp::kMaxValueBits,
                "activations of more than 24 bits do not fit the float32 of the host's quantizer");
  const ap_fixed<data_T::width + 1, data_T::iwidth + 1> wide = value;
  ap_int<data_T::width + 1> bits;
  bits.range(data_T::width, 0) = wide.range(data_T::width, 0);
  return int32_t(bits.to_int());
}

inline float FloatOf(uint32_t bits) {
#pragma HLS INLINE
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class data_T, class res_T, typename CONFIG_T, class words_T, class request_T>
void ComputeRow(const int32_t* x, res_T* res, const words_T* job, const words_T* weights,
                const request_T* request, const words_T* bias) {
  typedef dp::RowQuantizer<DynamicGemmRow<data_T, CONFIG_T>> Quantizer;
  static dp::Word_t a[Quantizer::kMaxWords];
  static dp::Word_t b[CONFIG_T::weight_words];
  static uint32_t words[dp::kJobWords + dp::kEdge];
  static uint32_t c[CONFIG_T::out_positions * CONFIG_T::out_channels];

  int32_t base = 0;
  const uint32_t words_a = Quantizer::Pack(x, request, a, base);
JOB_WORDS:
  for (int w = 0; w < dp::kJobWords; ++w) words[w] = uint32_t(job[w].to_uint());
  // What there is, whatever the job's file holds.
  words[dp::kJobWordsJob] = dp::kJobWords + dp::kEdge;
  words[dp::kJobWordsA] = words_a;
  words[dp::kJobWordsB] = CONFIG_T::weight_words;
  words[dp::kJobWordsC] = CONFIG_T::out_positions * CONFIG_T::out_channels;
ROW_EXPONENTS:
  for (int row = 0; row < dp::kEdge; ++row)
    words[dp::kJobWords + row] = row ? 0 : uint32_t(base + CONFIG_T::weight_exponent);
WEIGHTS:
  for (int w = 0; w < CONFIG_T::weight_words; ++w) {
    b[w] = dp::Word_t(weights[2 * w].to_uint()) | dp::Word_t(weights[2 * w + 1].to_uint()) << 32;
  }

  dp::Report report;
  dp::Execute(words, a, b, c, report);
#ifndef __SYNTHESIS__
  if (report.error != dp::Error::kNone)
    std::cerr << "dynamic_gemm: the core reports error " << uint32_t(report.error) << std::endl;
#endif
RESULTS:
  for (int n = 0; n < CONFIG_T::out_positions * CONFIG_T::out_channels; ++n) {
    const float value =
        FloatOf(c[n]) + FloatOf(uint32_t(bias[n % CONFIG_T::out_channels].to_uint()));
    res[n] = res_T(value);
  }
}

// io_parallel
template <class data_T, class res_T, typename CONFIG_T, class words_T, class request_T>
void dynamic_gemm(data_T data[CONFIG_T::positions * CONFIG_T::channels],
                  res_T res[CONFIG_T::out_positions * CONFIG_T::out_channels], const words_T* job,
                  const words_T* weights, const request_T* request, const words_T* bias) {
  static int32_t x[CONFIG_T::positions * CONFIG_T::channels];
VALUES:
  for (int n = 0; n < CONFIG_T::positions * CONFIG_T::channels; ++n) x[n] = LastPlaces(data[n]);
  ComputeRow<data_T, res_T, CONFIG_T>(x, res, job, weights, request, bias);
}

// io_stream
template <class data_T, class res_T, typename CONFIG_T, class words_T, class request_T>
void dynamic_gemm(hls::stream<data_T>& data, hls::stream<res_T>& res, const words_T* job,
                  const words_T* weights, const request_T* request, const words_T* bias) {
  typedef typename res_T::value_type value_T;
  static int32_t x[CONFIG_T::positions * CONFIG_T::channels];
  static value_T results[CONFIG_T::out_positions * CONFIG_T::out_channels];
PACKETS:
  for (int n = 0; n < CONFIG_T::positions * CONFIG_T::channels; n += data_T::size) {
    const data_T packet = data.read();
  VALUES:
    for (unsigned i = 0; i < data_T::size; ++i) x[n + i] = LastPlaces(packet[i]);
  }
  ComputeRow<typename data_T::value_type, value_T, CONFIG_T>(x, results, job, weights, request,
                                                             bias);
RESULTS:
  for (int n = 0; n < CONFIG_T::out_positions * CONFIG_T::out_channels; n += res_T::size) {
    res_T packet;
  FILL:
    for (unsigned i = 0; i < res_T::size; ++i) packet[i] = results[n + i];
    res.write(packet);
  }
}

}  // namespace nnet

#endif
