// What CPU and operating system say of instruction sets, and which can be used by that.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace fastdreamer {

// All zero where the CPU is no x86-64.
struct CpuFacts {
  std::uint32_t leaf_1_ecx;  // CPUID's words; 0: it has no such leaf
  std::uint32_t leaf_7_ebx, leaf_7_edx, leaf_7_1_eax;
  std::uint32_t leaf_1d_eax;                                  // the last palette of tiles
  std::uint32_t leaf_1d_1_eax, leaf_1d_1_ebx, leaf_1d_1_ecx;  // palette 1
  std::uint64_t xcr0;   // registers that the system saves; 0 without OSXSAVE
  int tile_permission;  // what asking for it returned, as the constants below
};
constexpr int kNotAsked = -1;   // nothing to ask for
constexpr int kNoRequest = -2;  // a system that has no such request
// else 0 (given) or errno

// This machine's, read once per process; asks Linux for permission to use tiles where it has them.
const CpuFacts& host_facts();

// Why an instruction set cannot be used; empty where it can.
std::string why_not(Isa isa, const CpuFacts& facts);

// The last one that can and is not emulated.
Isa best_isa(const CpuFacts& facts);

}  // namespace fastdreamer
