// Counts of the accesses of warps to shared and global memory.
//
// Of shared memory: instructions; the wavefronts that serve them; and the least wavefronts that can serve as many
// words. Shared memory has 32 banks of 4 bytes each, and a wavefront reads or writes one word of every bank. Lanes that
// access the same word share it; different words of a bank are one wavefront each. Accesses of 16 bytes go by quarters
// of the warp, of 8 bytes by halves, others by the whole, and their parts do not share wavefronts. LoadMatrix4 is four
// parts of eight rows, and CopyAsync16 a write of 16 bytes.
//
// Of global memory: instructions, and the distinct lines of 128 bytes and sectors of 32 bytes that each one touches.
// Only what goes by a function of device.h is counted, not plain loads and stores.
//
// The counts are of the source's accesses: a compiler may join neighbouring ones into wider ones, or leave some out.
//
// A lane runs on its own between two synchronisations of its warp, so an instruction is put together afterwards: it is
// the n-th access since the last synchronisation from the same place, that is from the same return addresses up to the
// thread's first function, of all lanes that have an n-th one there. That is so on a GPU unless lanes that skip a round
// of a loop go on with others before the next synchronisation: their later rounds then count with others' earlier ones.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace jax_dcn {
namespace cuda {
namespace on_cpu {

enum class Memory { kShared, kGlobal };

class AccessCounts {
 public:
  // An access of the current function's caller, with frame pointers all the way up.
  void Add(Memory memory, const std::string& kind, int thread, uintptr_t address, int bytes);

  // All lanes of a warp have come to the same place.
  void Synchronize(int warp);

  // Appends to a file a line for each kind of access, of words separated by tabs: the kernel, the memory, the kind and
  // its three counts. What follows is counted from 0 on.
  void Write(const char* file, const char* kernel);

 private:
  static constexpr int kLanes = 32;

  struct Instruction {
    uint32_t lanes = 0;  // bits of those that take part
    uintptr_t address[kLanes];
  };
  struct Place {
    Memory memory;
    std::string kind;
    int bytes;
    std::array<size_t, kLanes> done{};  // by each lane
    std::vector<Instruction> instructions;
  };
  using Counts = std::array<int64_t, 3>;

  static void Count(const Place& place, const Instruction& instruction, Counts& counts);

  std::map<int, std::unordered_map<uint64_t, Place>> warps_;  // since the last synchronisation, by return addresses
  std::map<std::pair<Memory, std::string>, Counts> counts_;
};

}  // namespace on_cpu
}  // namespace cuda
}  // namespace jax_dcn
