#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#include "common/check.h"

#if FD_X86
#  include <cpuid.h>
#endif

namespace fastdreamer {
namespace {

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

// Which register files the operating system saves. Only called when OSXSAVE is set.
std::uint64_t xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

bool bit(unsigned word, int n) { return (word >> n) & 1; }

Isa detect() {
  const Registers one = cpuid(1, 0);
  const Registers seven = cpuid(7, 0);
  const bool osxsave = bit(one.c, 27);
  if (!osxsave || (xcr0() & 0x6) != 0x6) return Isa::scalar;  // XMM and YMM state
  const bool avx = bit(one.c, 28), fma = bit(one.c, 12), f16c = bit(one.c, 29);
  const bool avx2 = bit(seven.b, 5), bmi2 = bit(seven.b, 8);
  if (!(avx && fma && f16c && avx2 && bmi2)) return Isa::scalar;
  if ((xcr0() & 0xe0) != 0xe0) return Isa::avx2;  // opmask, upper ZMM, ZMM 16-31 state
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30),
             vl = bit(seven.b, 31);
  if (!(f && dq && bw && vl)) return Isa::avx2;
  if (seven.a < 1 || !bit(cpuid(7, 1).a, 5)) return Isa::avx512;
  return Isa::avx512bf16;
}
#else
Isa detect() { return Isa::scalar; }
#endif

Isa host_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa choose() {
  const char* forced = std::getenv("FASTDREAMER_ISA");
  if (forced == nullptr || *forced == '\0') return host_isa();
  std::string all, host;
  for (Isa isa : kIsas) {
    if (std::string(forced) == isa_name(isa) && host_has(isa)) return isa;
    all += std::string(all.empty() ? "" : ", ") + isa_name(isa);
    if (host_has(isa)) host += std::string(host.empty() ? "" : ", ") + isa_name(isa);
  }
  fail("FASTDREAMER_ISA is '" + std::string(forced) + "'; this machine has " + host +
       " (the names are " + all + ")");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
  }
  return "";
}

bool host_has(Isa isa) { return isa <= host_isa(); }

Isa active_isa() {
  static const Isa isa = choose();  // a throw leaves it unset: the next call throws again
  return isa;
}

}  // namespace fastdreamer
