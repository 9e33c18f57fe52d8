# The choice of GPU architectures that the CUDA kernels are built for.

# oprd_choose_architectures(GPU_CODE RESULT): sets RESULT to a list of numbers such as "80;90".
# GPU_CODE is the output of nvcc --list-gpu-code; all numbers are in it.
#
# The request is the first of -DOPRD_CUDA_ARCHITECTURES, -DCMAKE_CUDA_ARCHITECTURES and the
# environment variables of these names. It is a list of:
# - "90", "9.0", "sm_90", "90-real" or "90a". The kernels use no feature of 90a or 100f, so "90a"
#   means 90.
# - "native": the GPUs of this machine.
# - "all" or "all-major": those of sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) that nvcc
#   knows. This is also the default.
#
# An architecture that can't be built is an error. From the environment variable
# CMAKE_CUDA_ARCHITECTURES, which may be set for other software, it is a warning, and the variable
# is ignored.
function(oprd_choose_architectures GPU_CODE RESULT)
  set(CHOSEN)
  set(ASKED)
  set(KIND FATAL_ERROR)
  foreach(CANDIDATE "${OPRD_CUDA_ARCHITECTURES}" "${CMAKE_CUDA_ARCHITECTURES}"
      "$ENV{OPRD_CUDA_ARCHITECTURES}")
    if(CANDIDATE AND NOT ASKED)
      set(ASKED "${CANDIDATE}")
    endif()
  endforeach()
  if(NOT ASKED)
    set(ASKED "$ENV{CMAKE_CUDA_ARCHITECTURES}")
    set(KIND WARNING)
  endif()
  if(ASKED)
    oprd_read_architectures("${ASKED}" "${GPU_CODE}" CHOSEN PROBLEM)
    if(PROBLEM AND KIND STREQUAL "FATAL_ERROR")
      message(FATAL_ERROR "error: ${PROBLEM}")
    elseif(PROBLEM)
      message(WARNING "CMAKE_CUDA_ARCHITECTURES in the environment is ignored: ${PROBLEM}")
      set(CHOSEN)
    endif()
  endif()
  if(NOT CHOSEN)
    oprd_default_architectures("${GPU_CODE}" CHOSEN)
  endif()
  list(REMOVE_DUPLICATES CHOSEN)
  list(SORT CHOSEN COMPARE NATURAL)
  set(${RESULT} "${CHOSEN}" PARENT_SCOPE)
endfunction()

function(oprd_default_architectures GPU_CODE RESULT)
  set(FOUND)
  foreach(NUMBER 80 90 100)
    if(GPU_CODE MATCHES "sm_${NUMBER}(\n|$)")
      list(APPEND FOUND ${NUMBER})
    endif()
  endforeach()
  set(${RESULT} "${FOUND}" PARENT_SCOPE)
endfunction()

# Sets RESULT to the numbers, and PROBLEM to the reason why they can't be built, or to "".
function(oprd_read_architectures ASKED GPU_CODE RESULT PROBLEM)
  set(FOUND)
  set(REASON "")
  string(REGEX REPLACE "[, \t]+" ";" ASKED "${ASKED}")
  foreach(ONE IN LISTS ASKED)
    if(ONE STREQUAL "native")
      oprd_native_architectures(NUMBERS)
      if(NOT NUMBERS)
        set(REASON "the architecture \"native\" is asked for, and nvidia-smi names no GPU")
        break()
      endif()
    elseif(ONE STREQUAL "all" OR ONE STREQUAL "all-major")
      oprd_default_architectures("${GPU_CODE}" NUMBERS)
    elseif(ONE MATCHES "^(sm_|compute_)?([0-9]+)[.]?([0-9])[af]?(-real|-virtual|[+]PTX)?$")
      set(NUMBERS "${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    elseif(ONE STREQUAL "")
      set(NUMBERS)
    else()
      set(REASON "the architecture \"${ONE}\" can't be read: write it like \"90\" or \"9.0\"")
      break()
    endif()
    foreach(NUMBER IN LISTS NUMBERS)
      if(NOT GPU_CODE MATCHES "sm_${NUMBER}(\n|$)")
        set(REASON "this nvcc does not build for the architecture \"${ONE}\" that is asked for")
      endif()
    endforeach()
    list(APPEND FOUND ${NUMBERS})
  endforeach()
  set(${RESULT} "${FOUND}" PARENT_SCOPE)
  set(${PROBLEM} "${REASON}" PARENT_SCOPE)
endfunction()

# Sets RESULT to the architectures of this machine's GPUs by nvidia-smi, or to an empty list.
function(oprd_native_architectures RESULT)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE FOUND ERROR_QUIET RESULT_VARIABLE FAILED)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" FOUND "${FOUND}")
  string(REPLACE "." "" FOUND "${FOUND}")
  if(FAILED)
    set(FOUND)
  endif()
  set(${RESULT} "${FOUND}" PARENT_SCOPE)
endfunction()
