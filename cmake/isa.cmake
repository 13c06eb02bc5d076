# The list of instruction sets: one object library for each row that this architecture builds (the
# products, and the float work in an object of its own), and
# the header that csrc/kernels/dispatch.cc reads the list from.

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" TMAC_ARCHITECTURE)
if(TMAC_ARCHITECTURE MATCHES "^(amd64|x86_64)$")
  set(TMAC_ARCHITECTURE x86_64)
elseif(TMAC_ARCHITECTURE MATCHES "^(arm64|aarch64)$")
  set(TMAC_ARCHITECTURE aarch64)
endif()

set(TMAC_ISA_LIBRARIES "")
set(TMAC_BUILT_ISAS "")
set(TMAC_OTHER_ISAS "")

# The kernels are written in the order in which they should run: GCC must neither collect all sums at
# the end of an unrolled loop nor move loads to its top, where they need more registers than there are.
# GCC 12 takes the undefined pass-through operands in its own intrinsics for mistakes. Where it folds
# equal functions into one, that of a longer array of sums gets the bounds of a shorter one.
set(TMAC_GNU_FLAGS "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(TMAC_GNU_FLAGS -fno-tree-reassoc -fno-tree-ter -Wno-uninitialized -Wno-maybe-uninitialized)
  if(TMAC_ARCHITECTURE STREQUAL "aarch64")
    list(APPEND TMAC_GNU_FLAGS -fno-schedule-insns -fno-ipa-icf)
  endif()
endif()

function(tmac_isa name architecture header type flags needs)
  if(architecture STREQUAL "any" OR architecture STREQUAL TMAC_ARCHITECTURE)
    add_library(tmac_isa_${name} OBJECT
      csrc/kernels/isa.cc csrc/kernels/vector_isa.cc)
    target_include_directories(tmac_isa_${name} PRIVATE csrc)
    target_compile_options(tmac_isa_${name} PRIVATE ${flags} ${TMAC_GNU_FLAGS})
    target_compile_definitions(tmac_isa_${name} PRIVATE
      TMAC_ISA_NAME=${name} TMAC_ISA_HEADER="simd/${header}" TMAC_ISA_TYPE=${type})
    list(APPEND TMAC_ISA_LIBRARIES tmac_isa_${name})
    string(APPEND TMAC_BUILT_ISAS " X(${name}, \"${needs}\")")
  else()
    string(APPEND TMAC_OTHER_ISAS " X(${name}, \"${needs}\")")
  endif()
  set(TMAC_ISA_LIBRARIES "${TMAC_ISA_LIBRARIES}" PARENT_SCOPE)
  set(TMAC_BUILT_ISAS "${TMAC_BUILT_ISAS}" PARENT_SCOPE)
  set(TMAC_OTHER_ISAS "${TMAC_OTHER_ISAS}" PARENT_SCOPE)
endfunction()

function(tmac_write_isa_list)
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/generated/kernels/isa_list.h @ONLY CONTENT
"#pragma once
#define TMAC_BUILT_ISAS(X)@TMAC_BUILT_ISAS@
#define TMAC_OTHER_ISAS(X)@TMAC_OTHER_ISAS@
")
endfunction()
