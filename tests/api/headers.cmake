# SPDX-License-Identifier: Apache-2.0
# headers.cmake: the installed headers and every header of common/ compile alone, and twice, without a warning.
#   cmake -DROOT=<the repository> -DWORK=<a folder to write in> -DLANGUAGE=C11|C++17|CUDA -P tests/api/headers.cmake
cmake_minimum_required(VERSION 3.25)

set(warnings -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror -fsyntax-only)
if(LANGUAGE STREQUAL C11)
  set(compilers gcc clang)
  set(flags -std=c11 ${warnings} -x c)
elseif(LANGUAGE STREQUAL C++17)
  set(compilers g++ clang++)
  set(flags -std=c++17 ${warnings} -x c++)
elseif(LANGUAGE STREQUAL CUDA)
  set(compilers nvcc)
  set(flags -std=c++17 -arch=sm_90 -Werror all-warnings -x cu -c -o ${WORK}/${LANGUAGE}.o)
else()
  message(FATAL_ERROR "headers: LANGUAGE=${LANGUAGE}")
endif()

file(GLOB headers RELATIVE ${ROOT} ${ROOT}/sparge*.h ${ROOT}/tools/sparge_params.h ${ROOT}/common/*.h)
if(NOT headers)
  message(FATAL_ERROR "headers: none under ROOT=${ROOT}")
endif()
# What follows the header: C has no empty programs, and hd.h declares nothing but works on both sides.
set(use [[
extern int alone;
#if defined(SPARGE_HD) && defined(__CUDACC__)
SPARGE_HD int called(void) { return 1; }
__global__ void kernel(int *x) { *x = called(); }
int host(void) { return called(); }
#endif
]])

set(compiled 0)
set(failed)
foreach(name IN LISTS compilers)
  find_program(compiler_${name} ${name} PATHS /usr/local/cuda/bin)
  if(NOT compiler_${name})
    continue()
  endif()
  foreach(header IN LISTS headers)
    file(WRITE ${WORK}/${LANGUAGE}.txt "#include \"${header}\"\n#include \"${header}\"\n${use}")
    execute_process(COMMAND ${compiler_${name}} ${flags} -I${ROOT} ${WORK}/${LANGUAGE}.txt
      RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    math(EXPR compiled "${compiled} + 1")
    if(NOT result EQUAL 0)
      list(APPEND failed "${header} (${name})")
      message("${output}")
    endif()
  endforeach()
endforeach()

if(failed)
  message(FATAL_ERROR "headers: do not compile alone as ${LANGUAGE}: ${failed}")
elseif(compiled EQUAL 0)
  message("headers: a compiler for ${LANGUAGE} is not on this machine")
else()
  message("headers: ${compiled} compilations as ${LANGUAGE}")
endif()
