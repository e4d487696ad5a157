#include "cpu/cpuid.h"

#include <cstring>

#if FD_X86
#  include <cpuid.h>
#endif
#if defined(__linux__)
#  include <sys/syscall.h>
#  include <unistd.h>

#  include <cerrno>
#endif

namespace fastdreamer {
namespace {

bool bits(std::uint64_t word, std::uint64_t mask) { return (word & mask) == mask; }
constexpr std::uint64_t bit(int n) { return std::uint64_t{1} << n; }

// The same without permission, which is asked for only where this finds nothing.
std::string why_no_tiles(const CpuFacts& f) {
  const std::string below = why_not(Isa::avx512bf16, f);
  if (!below.empty()) return below;
  if (!bits(f.leaf_7_edx, bit(24))) return "the CPU has no AMX-TILE";
  if (!bits(f.leaf_7_edx, bit(22))) return "the CPU has no AMX-BF16";
  if (!bits(f.xcr0, bit(17) | bit(18))) {
    return "the operating system does not save tile registers (bits 17 and 18 of XCR0)";
  }
  if (f.leaf_1d_eax < 1) {
    return "the CPU claims AMX but has no palette of tiles (CPUID 0x1D), as some virtual machines";
  }
  const std::uint32_t tiles = f.leaf_1d_1_ebx >> 16, row = f.leaf_1d_1_ebx & 0xffff,
                      tile = f.leaf_1d_1_eax >> 16, rows = f.leaf_1d_1_ecx & 0xffff;
  if (tiles < 8 || row != 64 || rows != 16 || tile != 1024) {
    return "palette 1 (CPUID 0x1D) has " + std::to_string(tiles) + " tiles of " +
           std::to_string(rows) + " rows of " + std::to_string(row) + " bytes, not 8 of 16 of 64";
  }
  return "";
}

#if FD_X86
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{0, 0, 0, 0};
  // returns 0 and leaves r alone where the CPU has no such leaf
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

std::uint64_t xgetbv() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Once asked, for all threads of the process and its forks.
int ask_for_tiles() {
#  if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
#  else
  return kNoRequest;
#  endif
}

CpuFacts read_facts() {
  CpuFacts f{};
  f.leaf_1_ecx = cpuid(1, 0).c;
  if (bits(f.leaf_1_ecx, bit(27))) f.xcr0 = xgetbv();  // OSXSAVE
  const Registers seven = cpuid(7, 0);
  f.leaf_7_ebx = seven.b, f.leaf_7_edx = seven.d;
  if (seven.a >= 1) f.leaf_7_1_eax = cpuid(7, 1).a;
  f.leaf_1d_eax = cpuid(0x1d, 0).a;
  if (f.leaf_1d_eax >= 1) {
    const Registers palette = cpuid(0x1d, 1);
    f.leaf_1d_1_eax = palette.a, f.leaf_1d_1_ebx = palette.b, f.leaf_1d_1_ecx = palette.c;
  }
  f.tile_permission = why_no_tiles(f).empty() ? ask_for_tiles() : kNotAsked;
  return f;
}
#else
CpuFacts read_facts() { return {}; }
#endif

}  // namespace

const CpuFacts& host_facts() {
  static const CpuFacts facts = read_facts();
  return facts;
}

std::string why_not(Isa isa, const CpuFacts& f) {
  switch (isa) {
    case Isa::scalar:
      return "";
    case Isa::avx2:
      if (!bits(f.leaf_1_ecx, bit(28) | bit(12) | bit(29)) ||
          !bits(f.leaf_7_ebx, bit(5) | bit(8))) {
        return "the CPU has no AVX2 with FMA, F16C and BMI2";
      }
      return bits(f.xcr0, 0x6) ? "" : "the operating system does not save AVX registers";
    case Isa::avx512: {
      const std::string below = why_not(Isa::avx2, f);
      if (!below.empty()) return below;
      if (!bits(f.leaf_7_ebx, bit(16) | bit(17) | bit(30) | bit(31))) {
        return "the CPU has no AVX-512 F, DQ, BW and VL";
      }
      return bits(f.xcr0, 0xe0) ? "" : "the operating system does not save AVX-512 registers";
    }
    case Isa::avx512bf16:
    case Isa::amx_emulated: {
      const std::string below = why_not(Isa::avx512, f);
      if (!below.empty()) return below;
      return bits(f.leaf_7_1_eax, bit(5)) ? "" : "the CPU has no AVX-512 BF16";
    }
    case Isa::amx: {
      const std::string below = why_no_tiles(f);
      if (!below.empty()) return below;
      if (f.tile_permission == 0) return "";
      if (f.tile_permission < 0) return "only Linux gives permission to use tile registers";
      return std::string("Linux refused permission to use tile registers: ") +
             std::strerror(f.tile_permission);
    }
  }
  return "";
}

Isa best_isa(const CpuFacts& facts) {
  Isa best = Isa::scalar;
  for (Isa isa : kIsas) {
    if (!is_emulated(isa) && why_not(isa, facts).empty()) best = isa;
  }
  return best;
}

}  // namespace fastdreamer
