#include "device_on_cpu.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "access_counts.h"

// Null in a program without AddressSanitizer.
#pragma weak __sanitizer_start_switch_fiber
#pragma weak __sanitizer_finish_switch_fiber
#pragma weak __sanitizer_print_stack_trace

namespace jax_dcn {
namespace cuda {
namespace on_cpu {

Settings settings;
std::mutex turn;
std::map<const void*, int> loaded[kDevices];
int loads = 0;
std::set<const void*> launched[kDevices];

namespace {

// ---------------------------------------------------------------------------------------------------- Fibers

constexpr size_t kStack = size_t{256} << 10;  // address space: pages that are not touched cost nothing
constexpr size_t kPage = 4096;

struct Fiber {
  void* bottom = nullptr;  // of the stack
  size_t size = 0;
  void* stack_pointer = nullptr;
};

// Saves the registers that a call preserves on the stack and goes on from another stack where they were so saved.
// Unlike swapcontext it makes no system call, and a stage of a kernel makes tens of thousands of switches.
extern "C" void jax_dcn_switch(void** from, void* to);
asm(R"(
.text
.globl jax_dcn_switch
.hidden jax_dcn_switch
.type jax_dcn_switch, @function
jax_dcn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size jax_dcn_switch, .-jax_dcn_switch
)");

void Switch(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber == nullptr) return jax_dcn_switch(&from.stack_pointer, to.stack_pointer);
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
  jax_dcn_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Prepare(Fiber& fiber, void (*entry)()) {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) Fail("no memory for the stack of a thread");
  fiber.bottom = static_cast<char*>(memory) + kPage;
  fiber.size = kStack - kPage;
  void** top = reinterpret_cast<void**>(static_cast<char*>(memory) + kStack);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;  // the registers, zero
}

// ----------------------------------------------------------------------------------------- Threads and blocks

struct Copy {
  ptrdiff_t to;
  Vector16 value;
  int group;
};

struct Thread : Fiber {
  bool done = true;
  const char* waits = nullptr;  // for what; null while it runs or may
  Site site{};
  void* operand = nullptr;
  std::vector<Copy> copies;
  int groups = 0;                           // committed
  int barriers = 0, waited = 0, loads = 0;  // calls so far, for faults
};

struct Warp {
  int arrived = 0;
  uint32_t time = 0;  // of the last synchronisation
};

// What is known of 2 bytes of shared memory, the smallest element. Times are those of the accessor's warp, and older
// than the block where there was no such access.
struct Cell {
  uint32_t written = 0, read = 0;
  int16_t writer = 0;
  int16_t reader = 0;  // or one of the two below
  bool copying = false;
};
constexpr int16_t kSeveralLanes = 2048;  // several threads of a warp: its number is added
constexpr int16_t kSeveralWarps = 4096;
constexpr int kCell = 2;

constexpr int kMaxThreads = 1024;

struct Device {
  Fiber scheduler;
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / kWarp};
  std::vector<Cell> cells{kMostSharedBytes / kCell};
  alignas(16) char shared[kMostSharedBytes];

  std::mt19937_64 random;
  const char* kernel = "(none)";
  const std::function<void()>* body = nullptr;
  BlockIndices block{};
  int size = 0;  // threads of a block
  int shared_bytes = 0;
  int arrived = 0;  // at the barrier
  std::vector<int> ready;
  int current = -1;
  uint32_t time = 0, block_start = 0, block_time = 0;  // now; the block's start; its last barrier
  AccessCounts counts;

  Thread& thread() { return threads[current]; }
  Warp& warp() { return warps[current / kWarp]; }
};
Device& device = *new Device;

bool Same(const Thread& thread, const char* what, Site site) {
  return thread.waits != nullptr && std::strcmp(thread.waits, what) == 0 && thread.site.line == site.line &&
         std::strcmp(thread.site.file, site.file) == 0;
}

const char* Described(int thread, std::string& text) {
  Thread& t = device.threads[thread];
  text = "thread " + std::to_string(thread) + (t.done ? " has ended" : t.waits == nullptr ? " runs" : "");
  if (t.waits != nullptr) {
    const char* name = std::strrchr(t.site.file, '/');
    text += std::string(" waits at ") + t.waits + ", " + (name ? name + 1 : t.site.file) + ":" +
            std::to_string(t.site.line);
  }
  return text.c_str();
}

bool Faulty(Fault fault, int call) { return settings.fault == fault && settings.fault_call == call; }

void Wait(const char* what, Site site) {
  Thread& thread = device.thread();
  thread.waits = what;
  thread.site = site;
  Switch(thread, device.scheduler);
}

void Wake(int thread) {
  device.threads[thread].waits = nullptr;
  device.ready.push_back(thread);
}

// Of all threads from `first` to `end`, which are whole warps but at the end of the block.
void CountSynchronization(int first, int end) {
  if (settings.access_counts == nullptr) return;
  for (int warp = first / kWarp; warp * kWarp < end; ++warp) device.counts.Synchronize(warp);
}

// The entry of every fiber, which lives as long as the process: a stack left for good would keep AddressSanitizer's
// marks of the frames on it.
void ThreadMain() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &device.scheduler.size);
    device.scheduler.bottom = const_cast<void*>(bottom);
  }
  for (;;) {
    (*device.body)();
    Thread& thread = device.thread();
    if (!thread.copies.empty()) Fail("the thread ends without a CopyWait for its CopyAsync16");
    thread.done = true;
    Switch(thread, device.scheduler);
  }
}

void RunBlock(BlockIndices block) {
  device.block = block;
  device.block_start = device.block_time = ++device.time;
  for (Warp& warp : device.warps) warp = {0, device.time};
  // All ones: NaN in every floating-point type.
  std::memset(device.shared, 0xff, device.shared_bytes);
  device.arrived = 0;
  for (int i = 0; i < device.size; ++i) {
    Thread& thread = device.threads[i];
    if (thread.bottom == nullptr) Prepare(thread, ThreadMain);
    thread.done = false;
    thread.groups = thread.barriers = thread.waited = thread.loads = 0;
    device.ready.push_back(i);
  }
  while (!device.ready.empty()) {
    int& chosen = device.ready[device.random() % device.ready.size()];
    device.current = chosen;
    chosen = device.ready.back();
    device.ready.pop_back();
    Switch(device.scheduler, device.thread());
  }
  std::string waiting, other;
  for (int i = 0; i < device.size; ++i) {
    if (device.threads[i].done) continue;
    device.current = i;
    int j = 0;  // one that does something else
    const Thread& thread = device.threads[i];
    while (j < device.size && Same(device.threads[j], thread.waits, thread.site)) ++j;
    if (j == device.size) j = i;
    Fail("not all threads come: %s, but %s", Described(i, waiting), Described(j, other));
  }
  device.current = -1;
  CountSynchronization(0, device.size);
}

// -------------------------------------------------------------------------------------------- Shared memory

// Whether an access at `time` by a thread, or by several lanes of a warp, may be at the same time as the current
// thread's.
bool Unordered(uint32_t time, int16_t by) {
  if (time < device.block_time) return false;
  if (by >= kSeveralWarps) return true;
  const bool several = by >= kSeveralLanes;
  if (!several && by == device.current) return false;
  const int warp = several ? by - kSeveralLanes : by / kWarp;
  return warp != device.current / kWarp || time >= device.warp().time;
}

Cell* Cells(ptrdiff_t offset, int bytes, int alignment) {
  if (offset < 0 || offset + bytes > device.shared_bytes) {
    Fail("%d bytes at %td are outside the %d bytes of shared memory", bytes, offset, device.shared_bytes);
  }
  if (offset % alignment != 0) Fail("%d bytes of shared memory at %td are not aligned", bytes, offset);
  return &device.cells[offset / kCell];
}

void CheckWrite(const Cell& cell, ptrdiff_t offset) {
  if (cell.copying) Fail("shared memory at %td is written while a CopyAsync16 writes it", offset);
  if (Unordered(cell.written, cell.writer)) {
    Fail("shared memory at %td is written, and by thread %d, without a barrier between", offset, cell.writer);
  }
  if (Unordered(cell.read, cell.reader)) {
    Fail("shared memory at %td is written, and read by %s, without a barrier between", offset,
         cell.reader < kSeveralLanes ? ("thread " + std::to_string(cell.reader)).c_str() : "several threads");
  }
}

void CheckRead(Cell& cell, ptrdiff_t offset) {
  if (cell.copying) Fail("shared memory at %td is read while a CopyAsync16 writes it", offset);
  if (cell.written < device.block_start) Fail("shared memory at %td is read but was never written", offset);
  if (Unordered(cell.written, cell.writer)) {
    Fail("shared memory at %td is read, and written by thread %d, without a barrier between", offset, cell.writer);
  }
  // All readers since the last barrier, summed up. Those of this warp before its last SyncWarp can be forgotten: they
  // conflict with the same writers of other warps as this read does.
  const int16_t warp = static_cast<int16_t>(device.current / kWarp);
  if (!Unordered(cell.read, cell.reader)) {
    cell.reader = static_cast<int16_t>(device.current);
  } else if (cell.reader < kSeveralWarps) {
    const bool same =
        cell.reader == kSeveralLanes + warp || (cell.reader < kSeveralLanes && cell.reader / kWarp == warp);
    cell.reader = same ? static_cast<int16_t>(kSeveralLanes + warp) : kSeveralWarps;
  }
  cell.read = device.warp().time;
}

}  // namespace

void Fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "CUDA on CPU, seed %llu: %s, block (%d, %d, %d), thread %d: ",
               static_cast<unsigned long long>(settings.seed), device.kernel, device.block.x, device.block.y,
               device.block.z, device.current);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  if (__sanitizer_print_stack_trace != nullptr) __sanitizer_print_stack_trace();
  std::fflush(stderr);
  std::_Exit(3);
}

namespace {

void CountShared(const std::string& kind, ptrdiff_t offset, int bytes) {
  device.counts.Add(Memory::kShared, kind, device.current, offset, bytes);
}

char* CheckedBytes(ptrdiff_t offset, int bytes, int alignment, bool write) {
  Cell* cells = Cells(offset, bytes, alignment);
  if (bytes % kCell != 0) Fail("an element of %d bytes of shared memory is not supported", bytes);
  for (int i = 0; i < bytes / kCell; ++i) {
    if (write) {
      CheckWrite(cells[i], offset);
      cells[i].written = device.warp().time;
      cells[i].writer = static_cast<int16_t>(device.current);
    } else {
      CheckRead(cells[i], offset);
    }
  }
  return device.shared + offset;
}

}  // namespace

char* SharedBytes(ptrdiff_t offset, int bytes, int alignment, bool write) {
  if (settings.access_counts != nullptr) CountShared((write ? "Write" : "Read") + std::to_string(bytes), offset, bytes);
  return CheckedBytes(offset, bytes, alignment, write);
}

void CopyAsync16(ptrdiff_t to, const Vector16& value) {
  if (settings.access_counts != nullptr) CountShared("CopyAsync16", to, 16);
  Cell* cells = Cells(to, 16, 16);
  Thread& thread = device.thread();
  thread.copies.push_back({to, value, thread.groups});
  for (int i = 0; i < 16 / kCell; ++i) {
    CheckWrite(cells[i], to);
    cells[i].copying = true;
  }
}

void CopyWait(int pending) {
  Thread& thread = device.thread();
  if (Faulty(Fault::kWait, thread.waited++)) return;
  const auto done = [&](const Copy& copy) { return copy.group < thread.groups - pending; };
  for (const Copy& copy : thread.copies) {
    if (!done(copy)) continue;
    for (int i = 0; i < 16 / kCell; ++i) device.cells[copy.to / kCell + i].copying = false;
    std::memcpy(CheckedBytes(copy.to, 16, 16, true), &copy.value, 16);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), done), thread.copies.end());
}

void CheckGlobal(const char* what, const void* address, int alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) Fail("%s at %p is not aligned", what, address);
}

void CountGlobal(const char* what, const void* address, int bytes) {
  if (settings.access_counts == nullptr) return;
  device.counts.Add(Memory::kGlobal, what, device.current, reinterpret_cast<uintptr_t>(address), bytes);
}

// ----------------------------------------------------------------------------------------- Warp collectives

void Collective(const char* what, Site site, void* operand, void (*all)(Operands&)) {
  Warp& warp = device.warp();
  const int first = device.current / kWarp * kWarp;
  if (first + kWarp > device.size) Fail("%s in a warp that is not full", what);
  Thread& thread = device.thread();
  thread.operand = operand;
  if (++warp.arrived < kWarp) return Wait(what, site);

  warp.arrived = 0;
  CountSynchronization(first, first + kWarp);
  Operands operands;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int i = first + lane;
    operands[lane] = device.threads[i].operand;
    if (i == device.current) continue;
    std::string text;
    if (!Same(device.threads[i], what, site)) {
      Fail("is at %s, %s:%d, but %s", what, site.file, site.line, Described(i, text));
    }
    Wake(i);
  }
  all(operands);
}

namespace {

// The indices of the fragments' elements are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and "for
// mma.m16n8k8": a lane's group is lane / 4, its place in it lane % 4.

float Element(uint32_t word, int half, MatrixType type) {
  uint32_t bits = word;
  if (type == MatrixType::kFloat16) {
    const uint16_t half_bits = static_cast<uint16_t>(word >> (16 * half));
    _Float16 value;
    std::memcpy(&value, &half_bits, sizeof(value));
    return static_cast<float>(value);
  }
  if (type == MatrixType::kBFloat16) bits = half ? word & 0xffff0000 : word << 16;
  if (type == MatrixType::kTF32) bits &= 0xffffe000;  // the hardware ignores the lower 13 bits
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Multiplication {
  float* c;
  const uint32_t *a, *b;
  MatrixType type;
};

// Products are exact, and the tensor cores truncate their sums.
float Truncated(double sum) {
  const float nearest = static_cast<float>(sum);
  if (!(std::abs(static_cast<double>(nearest)) > std::abs(sum)) || std::abs(sum) > std::numeric_limits<float>::max()) {
    return nearest;
  }
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  --bits;
  float smaller;
  std::memcpy(&smaller, &bits, sizeof(smaller));
  return smaller;
}

void MultiplyAll(Operands& operands) {
  const MatrixType type = static_cast<Multiplication*>(operands[0])->type;
  const int per_word = type == MatrixType::kTF32 ? 1 : 2;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<Multiplication*>(operands[lane]);
    const int group = lane / 4, place = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[group + 8 * (i % 2)][(place + 4 * (i / 2)) * per_word + half] = Element(own.a[i], half, type);
      }
      for (int i = 0; i < 2; ++i) b[(place + 4 * i) * per_word + half][group] = Element(own.b[i], half, type);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* c = static_cast<Multiplication*>(operands[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8 * per_word; ++k) sum += double{a[row][k]} * double{b[k][column]};
      c[i] = Truncated(sum);
    }
  }
}

}  // namespace

void MultiplyAccumulate(float* c, const uint32_t* a, const uint32_t* b, MatrixType type, Site site) {
  Multiplication operand{c, a, b, type};
  Collective("MultiplyAccumulate", site, &operand, MultiplyAll);
}

// Lane l gives the address of row l % 8 of matrix l / 8, and gets the elements 2 * (l % 4) and the next of row l / 4 of
// each matrix; transposed, of column l / 4. The rows of a matrix are read at once: their 8 x 16 bytes must be of
// different banks.
void LoadMatrix4(uint32_t* r, ptrdiff_t row, bool transposed, Site site) {
  uint16_t values[8];
  if (Faulty(Fault::kShared, device.thread().loads++)) row += device.shared_bytes;
  if (settings.access_counts != nullptr) CountShared(transposed ? "LoadMatrix4Transposed" : "LoadMatrix4", row, 16);
  std::memcpy(values, CheckedBytes(row, 16, 16, false), sizeof(values));
  struct Operand {
    ptrdiff_t row;
    const uint16_t* values;
    uint32_t* r;
    bool transposed;
  } operand{row, values, r, transposed};
  Collective("LoadMatrix4", site, &operand, [](Operands& operands) {
    const auto at = [&](int lane) -> Operand& { return *static_cast<Operand*>(operands[lane]); };
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int other = lane / 8 * 8; other < lane; ++other) {
        if ((at(lane).row - at(other).row) % 128 == 0) Fail("LoadMatrix4 of lanes %d, %d: bank conflict", other, lane);
      }
      const int major = lane / 4, minor = lane % 4 * 2;
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int rows = 8 * matrix;
        const bool across = at(lane).transposed;
        const uint32_t low = across ? at(rows + minor).values[major] : at(rows + major).values[minor];
        const uint32_t high = across ? at(rows + minor + 1).values[major] : at(rows + major).values[minor + 1];
        at(lane).r[matrix] = low | high << 16;
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------- Launches

// For Python: the mangled names of the kernels launched on a device, one a line.
extern "C" const char* jax_dcn_launched(int device) {
  static std::string names;
  names.clear();
  const std::lock_guard<std::mutex> lock(turn);
  for (const void* kernel : launched[device]) {
    Dl_info symbol{};
    const bool named = dladdr(kernel, &symbol) != 0 && symbol.dli_sname != nullptr;
    names += std::string(named ? symbol.dli_sname : "(unnamed)") + "\n";
  }
  return names.c_str();
}

cudaError_t Run(void (*kernel)(), dim3 grid, int block, int shared_bytes, const std::function<void()>& thread) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      block <= 0 || block > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes < 0 || shared_bytes > kMostSharedBytes) return cudaErrorInvalidValue;
  Dl_info symbol{};
  char* demangled = nullptr;
  if (dladdr(reinterpret_cast<void*>(kernel), &symbol) != 0 && symbol.dli_sname != nullptr) {
    demangled = abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, nullptr);
  }
  device.kernel = demangled != nullptr ? demangled : "(unnamed)";
  device.body = &thread;
  device.size = block;
  device.shared_bytes = shared_bytes;
  device.random.seed(settings.seed);

  std::vector<int64_t> blocks(int64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), device.random);
  for (const int64_t i : blocks) {
    const int64_t rows = i / grid.x;
    RunBlock({static_cast<int>(i % grid.x), static_cast<int>(rows % grid.y), static_cast<int>(rows / grid.y)});
  }
  if (settings.access_counts != nullptr) device.counts.Write(settings.access_counts, device.kernel);
  device.kernel = "(none)";
  std::free(demangled);
  return cudaSuccess;
}

}  // namespace on_cpu

int ThreadIndex() { return on_cpu::device.current; }
BlockIndices BlockIndex() { return on_cpu::device.block; }

void SyncThreads(on_cpu::Site site) {
  using namespace on_cpu;
  Thread& thread = device.thread();
  const int call = thread.barriers++;
  if (Faulty(Fault::kBarrier, call) || (device.current == 0 && Faulty(Fault::kBarrierOfOne, call))) return;
  if (++device.arrived < device.size) return Wait("SyncThreads", site);
  device.arrived = 0;
  CountSynchronization(0, device.size);
  device.block_time = ++device.time;
  for (Warp& warp : device.warps) warp.time = device.time;
  for (int i = 0; i < device.size; ++i) {
    if (i == device.current) continue;
    std::string text;
    if (!Same(device.threads[i], "SyncThreads", site)) {
      Fail("is at SyncThreads, %s:%d, but %s", site.file, site.line, Described(i, text));
    }
    Wake(i);
  }
}

void SyncWarp(on_cpu::Site site) {
  on_cpu::Collective("SyncWarp", site, nullptr,
                     [](on_cpu::Operands&) { on_cpu::device.warp().time = ++on_cpu::device.time; });
}

void CopyCommit() { ++on_cpu::device.thread().groups; }

}  // namespace cuda
}  // namespace jax_dcn
