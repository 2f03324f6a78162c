// SPDX-License-Identifier: Apache-2.0
// The vendor tool's bench: runs recorded vectors (fpga/vectors.py) through the core and compares
// results and registers.
//   test_dpgemm FOLDER    a folder with index.txt; 0 if all are equal
#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "dpgemm/gemm.h"

namespace {

constexpr uint32_t kMagic = 0x31566744;
constexpr int kHeadWords = 11;
// The tool co-simulates a port with as many words as its pragma asks for.
constexpr size_t kPortWords = dp::kCosimWords;

struct Head {
  uint32_t magic, job_words, a_words, b_words, c_words, error, words_a, words_b, words_c,
      cycles_low, cycles_high;
};

template <typename T>
bool ReadArray(std::ifstream& file, size_t count, std::vector<T>& values) {
  values.assign(count > kPortWords ? count : kPortWords, T(0));
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(T)));
  return bool(file);
}

bool Check(const char* name, uint64_t got, uint64_t want) {
  if (got != want) std::cout << "  " << name << " is " << got << ", not " << want << "\n";
  return got == want;
}

bool RunVector(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Head head;
  static_assert(sizeof(head) == kHeadWords * sizeof(uint32_t), "the head is words");
  if (!file.read(reinterpret_cast<char*>(&head), sizeof(head)) || head.magic != kMagic) {
    std::cout << "  " << path << " is no vector file\n";
    return false;
  }
  std::vector<uint32_t> job, expected;
  std::vector<dp::Word_t> a, b;
  if (!ReadArray(file, head.job_words, job) || !ReadArray(file, head.a_words, a) ||
      !ReadArray(file, head.b_words, b) || !ReadArray(file, head.c_words, expected)) {
    std::cout << "  " << path << " is too short\n";
    return false;
  }
  std::vector<uint32_t> c(expected.size(), 0);
  uint32_t version = 0, capability = 0, words_a = 0, words_b = 0, words_c = 0, error = 0;
  uint64_t cycles = 0;
  dpgemm(job.data(), a.data(), b.data(), c.data(), &version, &capability, &cycles, &words_a,
         &words_b, &words_c, &error);

  bool is_equal = Check("version", version, dp::kLayoutVersion);
  is_equal &= Check("capability", capability, dp::kDigest);
  is_equal &= Check("error", error, head.error);
  is_equal &= Check("cycles", cycles, uint64_t(head.cycles_high) << 32 | head.cycles_low);
  is_equal &= Check("words_a", words_a, head.words_a);
  is_equal &= Check("words_b", words_b, head.words_b);
  is_equal &= Check("words_c", words_c, head.words_c);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (c[i] != expected[i]) {
      std::cout << "  result word " << i << " is " << c[i] << ", not " << expected[i] << "\n";
      return false;
    }
  }
  return is_equal;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "vectors";
  std::ifstream index(folder + "/index.txt");
  if (!index) {
    std::cout << "no " << folder << "/index.txt: give the folder of the recorded vectors\n";
    return 2;
  }
  int count = 0, wrong = 0;
  for (std::string line; std::getline(index, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    std::cout << line << std::endl;
    const bool is_equal = RunVector(folder + "/" + name);
    if (!is_equal) std::cout << "  WRONG\n";
    ++count;
    wrong += !is_equal;
  }
  std::cout << count - wrong << " of " << count << " vectors equal\n";
  return count > 0 && wrong == 0 ? 0 : 1;
}
