#pragma once

// For the two sources that are compiled once for each row of the ISA list in CMakeLists.txt, with
// that row's compiler flags and
//   TMAC_ISA_NAME    the row's name (an identifier)
//   TMAC_ISA_HEADER  its header in csrc/simd
//   TMAC_ISA_TYPE    the struct of operations in it
// No standard containers or inline std functions there: compiled with ISA flags they would become
// weak symbols that the linker may pick for code that runs on any CPU.

#include TMAC_ISA_HEADER

#define TMAC_STRING_(x) #x
#define TMAC_STRING(x) TMAC_STRING_(x)
#define TMAC_JOIN_(a, b) a##b
#define TMAC_JOIN(a, b) TMAC_JOIN_(a, b)
