// Which kernels compute: chosen by measured speed, once a process.
//
// Flags do not tell what is fast: an AVX-512 CPU's bfloat16 instruction has twice the multiply-adds
// of its fp32 one, or half.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace fastdreamer {

// What the kernels of an instruction set reach: GFLOP/s of one thread, by Precision.
struct Rates {
  Isa isa;
  double gflops[2];
};

struct Choice {
  Isa isa[2];          // whose kernels compute in each precision, by Precision
  Precision for_bf16;  // what a call computes in that asks for bfloat16
};

bool operator==(const Choice& a, const Choice& b);

// The rule. `rates` goes from the least instruction set to the most capable; that one is taken in
// each precision unless another is more than a tenth faster, and so is bfloat16 where it was asked
// for: it takes half of the memory. `isa` (or null) is taken instead, with the arithmetic that is
// asked for; `arithmetic` (or null) replaces that of calls that ask for bfloat16. Throws
// invalid_argument where `rates` is empty or lacks `isa`.
Choice choose(const std::vector<Rates>& rates, const Isa* isa, const Precision* arithmetic);

// What is faster under such a choice: fp32 unless bfloat16 wins by more than a tenth.
Precision faster(const std::vector<Rates>& rates, const Choice& made);

// Those of the host, measured once, in a few milliseconds; an emulated instruction set is among
// them only where FASTDREAMER_ISA names it. Throws invalid_argument as choice() does.
const std::vector<Rates>& rates();

// The choice in force: of the rates, FASTDREAMER_ISA and FASTDREAMER_ARITHMETIC (fp32 or bf16) at
// the first call. Throws invalid_argument, at every call, where one of the two is no name, or one
// that the host lacks.
const Choice& choice();

// Makes `made`, another process's, the choice in force. Throws invalid_argument where the host
// lacks its instruction sets or another is in force already.
void settle(const Choice& made);

}  // namespace fastdreamer
