#include "access_counts.h"

#include <algorithm>
#include <cstdio>
#include <set>

namespace jax_dcn {
namespace cuda {
namespace on_cpu {

namespace {

constexpr int kWord = 4, kBanks = 32, kSector = 32, kLine = 128;

// The units of `unit` bytes that an access lies in.
void Insert(std::set<uintptr_t>& units, uintptr_t address, int bytes, int unit) {
  for (uintptr_t i = address / unit; i <= (address + bytes - 1) / unit; ++i) units.insert(i);
}

}  // namespace

void AccessCounts::Add(Memory memory, const std::string& kind, int thread, uintptr_t address, int bytes) {
  // The first frame of a thread has no frame before it.
  uint64_t from = 0;
  for (void** frame = static_cast<void**>(__builtin_frame_address(0)); frame != nullptr;
       frame = static_cast<void**>(*frame)) {
    from = (from ^ reinterpret_cast<uintptr_t>(frame[1])) * 0x9e3779b97f4a7c15;
    from ^= from >> 32;
  }
  const int lane = thread % kLanes;
  Place& place = warps_[thread / kLanes].try_emplace(from, Place{memory, kind, bytes, {}, {}}).first->second;
  const size_t i = place.done[lane]++;
  if (i == place.instructions.size()) place.instructions.emplace_back();
  place.instructions[i].lanes |= uint32_t{1} << lane;
  place.instructions[i].address[lane] = address;
}

void AccessCounts::Synchronize(int warp) {
  for (const auto& [from, place] : warps_[warp]) {
    Counts& counts = counts_[{place.memory, place.kind}];
    for (const Instruction& instruction : place.instructions) Count(place, instruction, counts);
  }
  warps_[warp].clear();
}

void AccessCounts::Count(const Place& place, const Instruction& instruction, Counts& counts) {
  ++counts[0];
  const bool shared = place.memory == Memory::kShared;
  const int part = !shared ? kLanes : place.bytes == 16 ? kLanes / 4 : place.bytes == 8 ? kLanes / 2 : kLanes;
  for (int first = 0; first < kLanes; first += part) {
    std::set<uintptr_t> small, large;
    for (int lane = first; lane < first + part; ++lane) {
      if ((instruction.lanes >> lane & 1) == 0) continue;
      Insert(small, instruction.address[lane], place.bytes, shared ? kWord : kSector);
      if (!shared) Insert(large, instruction.address[lane], place.bytes, kLine);
    }
    if (shared) {
      std::array<int, kBanks> words{};
      for (const uintptr_t word : small) ++words[word % kBanks];
      counts[1] += *std::max_element(words.begin(), words.end());
      counts[2] += (static_cast<int>(small.size()) + kBanks - 1) / kBanks;
    } else {
      counts[1] += static_cast<int>(large.size());
      counts[2] += static_cast<int>(small.size());
    }
  }
}

void AccessCounts::Write(const char* file, const char* kernel) {
  std::FILE* out = std::fopen(file, "a");
  if (out == nullptr) return;
  for (const auto& [access, counts] : counts_) {
    std::fprintf(out, "%s\t%s\t%s\t%lld\t%lld\t%lld\n", kernel, access.first == Memory::kShared ? "shared" : "global",
                 access.second.c_str(), static_cast<long long>(counts[0]), static_cast<long long>(counts[1]),
                 static_cast<long long>(counts[2]));
  }
  std::fclose(out);
  counts_.clear();
}

}  // namespace on_cpu
}  // namespace cuda
}  // namespace jax_dcn
