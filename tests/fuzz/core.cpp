// Runs mutated jobs through the core, for a build with sanitizers: each buffer is as long as the job says, to the word.
//   core FOLDER SEED COUNT    a folder of recorded vectors (fpga/vectors.py); prints how often each error code came, -1 for jobs not run.
//                             Case n of a seed is the first case of seed + n. FOLDER/seed holds the seed of the case that runs.
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
constexpr uint32_t kFirstWords = dp::kJobWordsJob + 1;  // of a job: what the core reads before it knows how many there are
constexpr int kNotRun = -1;

uint64_t state;

uint64_t next() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d;
}

uint32_t below(uint64_t limit) { return uint32_t((next() >> 16) % limit); }

struct Vector {
  std::vector<uint32_t> job;
  std::vector<uint64_t> a, b;
};

template <typename T>
void read(std::ifstream& file, uint32_t count, std::vector<T>& values) {
  values.resize(count);
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(T)));
}

Vector read_vector(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<uint32_t> head;
  read(file, kHeadWords, head);
  Vector vector;
  read(file, head[1], vector.job);
  read(file, head[2], vector.a);
  read(file, head[3], vector.b);
  if (!file) {
    std::cerr << path << " is no vector file\n";
    std::exit(2);
  }
  return vector;
}

uint32_t odd_number() {
  static const uint32_t ends[] = {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 255, 0xffff, 0x10000, 0xffffff, 0x1000000, 0x1000001, 0x3fffffff,
                                  0x40000000, 0x55555556, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff};
  return below(4) ? ends[below(sizeof(ends) / sizeof(ends[0]))] : uint32_t(next());
}

void mutate_job(std::vector<uint32_t>& words) {
  // Flags are hit as often as all else together: most of what they ask for is memory.
  if (below(4) == 0) words[dp::kJobFlags] ^= 1u << below(3);
  if (below(8) == 0) words[dp::kJobGemm] = below(4);
  if (below(8) == 0) words[dp::kJobExponent] = odd_number();
  for (uint32_t n = below(4); n > 0; --n) {
    uint32_t& word = words[below(words.size())];
    switch (below(4)) {
      case 0: word ^= 1u << below(32); break;
      case 1: word += below(9) - 4; break;
      case 2: word = words[below(words.size())]; break;
      default: word = odd_number();
    }
  }
}

void mutate_operand(std::vector<uint64_t>& words) {
  for (uint32_t n = below(4); n > 0 && !words.empty(); --n) {
    // The front, with the directory and the first headers, is hit more often.
    uint64_t& word = words[below(2) ? below(words.size()) : below(words.size() < 64 ? words.size() : 64)];
    switch (below(5)) {
      case 0: word ^= uint64_t(1) << below(64); break;
      case 1: word = uint64_t(odd_number()) << 32 | odd_number(); break;
      case 2: word = (word & 0xffffffff) | uint64_t(odd_number()) << 32; break;
      case 3: word = words[below(words.size())]; break;
      default: word = next();
    }
  }
}

// Now and then a size is changed to less than there is; one that no buffer of a test has becomes one that a buffer has.
void change_size(uint32_t& words) {
  if (words > kMostWords) words = below(kMostWords);
  if (below(8) == 0) words = below(uint64_t(words) + 1);
}

// A copy as long as the job says: what lies behind it belongs to nobody.
template <typename T>
std::unique_ptr<T[]> as_long_as(const std::vector<T>& values, uint32_t count) {
  std::unique_ptr<T[]> copy(new T[count]());
  for (uint32_t i = 0; i < count && i < values.size(); ++i) copy[i] = values[i];
  return copy;
}

// The job's error code, or kNotRun if it asks for more work than a test may take.
int run(Vector vector) {
  mutate_job(vector.job);
  if (below(2)) mutate_operand(vector.a);
  if (below(2)) mutate_operand(vector.b);
  uint32_t* words = vector.job.data();
  for (int index : {dp::kJobWordsJob, dp::kJobWordsA, dp::kJobWordsB, dp::kJobWordsC}) change_size(words[index]);

  const uint32_t job_words = words[dp::kJobWordsJob];
  const auto job_memory = as_long_as(vector.job, job_words < kFirstWords ? kFirstWords : job_words);
  const auto a = as_long_as(vector.a, words[dp::kJobWordsA]);
  const auto b = as_long_as(vector.b, words[dp::kJobWordsB]);
  const auto c = as_long_as(std::vector<uint32_t>(), words[dp::kJobWordsC]);
  dp::Job job;
  if (dp::decode_job(job_memory.get(), job) == dp::Error::kNone && uint64_t(job.tile_count) * job.step_count > kMostSteps) return kNotRun;
  uint32_t version = 0, capability = 0, words_a = 0, words_b = 0, words_c = 0, error = 0;
  uint64_t cycles = 0;
  dpgemm(job_memory.get(), a.get(), b.get(), c.get(), &version, &capability, &cycles, &words_a, &words_b, &words_c, &error);
  return int(error);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string folder = argv[1];
  std::vector<Vector> vectors;
  std::ifstream index(folder + "/index.txt");
  for (std::string line; std::getline(index, line);) vectors.push_back(read_vector(folder + "/" + line.substr(0, line.find(' '))));
  if (vectors.empty()) return 2;
  std::ofstream current(folder + "/seed");
  const uint64_t first = std::strtoull(argv[2], nullptr, 10);
  const uint64_t count = std::strtoull(argv[3], nullptr, 10);
  std::map<int, uint64_t> counts;
  for (uint64_t n = 0; n < count; ++n) {
    current.seekp(0);
    current << first + n << std::endl;
    state = (first + n + 1) * 0x9e3779b97f4a7c15;
    ++counts[run(vectors[below(vectors.size())])];
  }
  for (const auto& found : counts) std::cout << found.first << " " << found.second << "\n";
  return 0;
}
