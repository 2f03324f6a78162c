// Runs mutated jobs through the core, for a build with sanitizers: each buffer is as long as the
// job says, to the word.
//   core FOLDER SEED COUNT    a folder of recorded vectors (fpga/vectors.py); prints how often each
//   error code came, -1 for jobs not run.
//                             Case n of a seed is the first case of seed + n. FOLDER/seed holds the
//                             seed of the case that runs.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dpgemm/gemm.h"

namespace {

constexpr int kHeadWords = 11;
constexpr uint64_t kMostSteps = 256;       // of all tiles, so that every job ends soon
constexpr uint32_t kMostWords = 1u << 16;  // of a buffer
constexpr uint32_t kFirstWords =
    dp::kJobWordsJob + 1;  // of a job: what the core reads before it knows how many there are
constexpr int kNotRun = -1;

uint64_t state;

uint64_t Next() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d;
}

uint32_t Below(uint64_t limit) {
  return uint32_t((Next() >> 16) % limit);
}

struct Vector {
  std::vector<uint32_t> job;
  std::vector<uint64_t> a, b;
};

template <typename T>
void Read(std::ifstream& file, uint32_t count, std::vector<T>& values) {
  values.resize(count);
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(T)));
}

Vector ReadVector(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<uint32_t> head;
  Read(file, kHeadWords, head);
  Vector vector;
  Read(file, head[1], vector.job);
  Read(file, head[2], vector.a);
  Read(file, head[3], vector.b);
  if (!file) {
    std::cerr << path << " is no vector file\n";
    std::exit(2);
  }
  return vector;
}

uint32_t OddNumber() {
  static const uint32_t ends[] = {
      0,          1,          2,          3,          4,          5,          15,        16,
      17,         63,         255,        0xffff,     0x10000,    0xffffff,   0x1000000, 0x1000001,
      0x3fffffff, 0x40000000, 0x55555556, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff};
  return Below(4) ? ends[Below(sizeof(ends) / sizeof(ends[0]))] : uint32_t(Next());
}

void MutateJob(std::vector<uint32_t>& words) {
  // Flags are hit as often as all else together: most of what they ask for is memory.
  if (Below(4) == 0) words[dp::kJobFlags] ^= 1u << Below(3);
  if (Below(8) == 0) words[dp::kJobGemm] = Below(4);
  if (Below(8) == 0) words[dp::kJobExponent] = OddNumber();
  for (uint32_t n = Below(4); n > 0; --n) {
    uint32_t& word = words[Below(words.size())];
    switch (Below(4)) {
      case 0:
        word ^= 1u << Below(32);
        break;
      case 1:
        word += Below(9) - 4;
        break;
      case 2:
        word = words[Below(words.size())];
        break;
      default:
        word = OddNumber();
    }
  }
}

void MutateOperand(std::vector<uint64_t>& words) {
  for (uint32_t n = Below(4); n > 0 && !words.empty(); --n) {
    // The front, with the directory and the first headers, is hit more often.
    uint64_t& word =
        words[Below(2) ? Below(words.size()) : Below(words.size() < 64 ? words.size() : 64)];
    switch (Below(5)) {
      case 0:
        word ^= uint64_t(1) << Below(64);
        break;
      case 1:
        word = uint64_t(OddNumber()) << 32 | OddNumber();
        break;
      case 2:
        word = (word & 0xffffffff) | uint64_t(OddNumber()) << 32;
        break;
      case 3:
        word = words[Below(words.size())];
        break;
      default:
        word = Next();
    }
  }
}

// Now and then a size is changed to less than there is; one that no buffer of a test has becomes
// one that a buffer has.
void ChangeSize(uint32_t& words) {
  if (words > kMostWords) words = Below(kMostWords);
  if (Below(8) == 0) words = Below(uint64_t(words) + 1);
}

// A copy as long as the job says: what lies behind it belongs to nobody.
template <typename T>
std::unique_ptr<T[]> AsLongAs(const std::vector<T>& values, uint32_t count) {
  std::unique_ptr<T[]> copy(new T[count]());
  for (uint32_t i = 0; i < count && i < values.size(); ++i) copy[i] = values[i];
  return copy;
}

// The job's error code, or kNotRun if it asks for more work than a test may take.
int Run(Vector vector) {
  MutateJob(vector.job);
  if (Below(2)) MutateOperand(vector.a);
  if (Below(2)) MutateOperand(vector.b);
  uint32_t* words = vector.job.data();
  for (int index : {dp::kJobWordsJob, dp::kJobWordsA, dp::kJobWordsB, dp::kJobWordsC})
    ChangeSize(words[index]);

  const uint32_t job_words = words[dp::kJobWordsJob];
  const auto job_memory = AsLongAs(vector.job, job_words < kFirstWords ? kFirstWords : job_words);
  const auto a = AsLongAs(vector.a, words[dp::kJobWordsA]);
  const auto b = AsLongAs(vector.b, words[dp::kJobWordsB]);
  const auto c = AsLongAs(std::vector<uint32_t>(), words[dp::kJobWordsC]);
  dp::Job job;
  if (dp::DecodeJob(job_memory.get(), job) == dp::Error::kNone &&
      uint64_t(job.tile_count) * job.step_count > kMostSteps)
    return kNotRun;
  uint32_t version = 0, capability = 0, words_a = 0, words_b = 0, words_c = 0, error = 0;
  uint64_t cycles = 0;
  dpgemm(job_memory.get(), a.get(), b.get(), c.get(), &version, &capability, &cycles, &words_a,
         &words_b, &words_c, &error);
  return int(error);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string folder = argv[1];
  std::vector<Vector> vectors;
  std::ifstream index(folder + "/index.txt");
  for (std::string line; std::getline(index, line);)
    vectors.push_back(ReadVector(folder + "/" + line.substr(0, line.find(' '))));
  if (vectors.empty()) return 2;
  std::ofstream current(folder + "/seed");
  const uint64_t first = std::strtoull(argv[2], nullptr, 10);
  const uint64_t count = std::strtoull(argv[3], nullptr, 10);
  std::map<int, uint64_t> counts;
  for (uint64_t n = 0; n < count; ++n) {
    current.seekp(0);
    current << first + n << std::endl;
    state = (first + n + 1) * 0x9e3779b97f4a7c15;
    ++counts[Run(vectors[Below(vectors.size())])];
  }
  for (const auto& found : counts) std::cout << found.first << " " << found.second << "\n";
  return 0;
}
