# Which GPU architectures the CUDA kernels are built for.

# oprd_choose_architectures(GPU_CODE RESULT): sets RESULT to a list of numbers, as "80;90". What is
# asked for (-DOPRD_CUDA_ARCHITECTURES or -DCMAKE_CUDA_ARCHITECTURES, or environment variables of
# these names; "90", "80;90" or "native": the GPUs of this machine) is an error if the nvcc does not
# know it. Nothing asked for: those of sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) that are in
# GPU_CODE, what nvcc prints for --list-gpu-code.
function(oprd_choose_architectures GPU_CODE RESULT)
  set(ASKED)
  foreach(CANDIDATE "${OPRD_CUDA_ARCHITECTURES}" "${CMAKE_CUDA_ARCHITECTURES}"
      "$ENV{OPRD_CUDA_ARCHITECTURES}" "$ENV{CMAKE_CUDA_ARCHITECTURES}")
    if(CANDIDATE AND NOT ASKED)
      string(REGEX REPLACE "[, ]+" ";" ASKED "${CANDIDATE}")
    endif()
  endforeach()
  set(CHOSEN)
  if(ASKED STREQUAL "native")
    oprd_native_architectures(ASKED)
  endif()
  foreach(ARCHITECTURE ${ASKED})
    string(REGEX REPLACE "^(sm_)?([0-9]+)(-real|-virtual)?$" "\\2" NUMBER "${ARCHITECTURE}")
    if(NOT GPU_CODE MATCHES "sm_${NUMBER}(\n|$)")
      message(FATAL_ERROR "error: this nvcc does not build for the architecture "
        "\"${ARCHITECTURE}\" that is asked for")
    endif()
    list(APPEND CHOSEN ${NUMBER})
  endforeach()
  if(NOT ASKED)
    foreach(ARCHITECTURE 80 90 100)
      if(GPU_CODE MATCHES "sm_${ARCHITECTURE}(\n|$)")
        list(APPEND CHOSEN ${ARCHITECTURE})
      endif()
    endforeach()
  endif()
  list(REMOVE_DUPLICATES CHOSEN)
  list(SORT CHOSEN COMPARE NATURAL)
  set(${RESULT} "${CHOSEN}" PARENT_SCOPE)
endfunction()

# Of the GPUs here, by nvidia-smi.
function(oprd_native_architectures RESULT)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE FOUND ERROR_QUIET RESULT_VARIABLE FAILED)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" FOUND "${FOUND}")
  if(FAILED OR NOT FOUND)
    message(FATAL_ERROR "error: the architecture \"native\" is asked for, and nvidia-smi names no GPU")
  endif()
  string(REPLACE "." "" FOUND "${FOUND}")
  set(${RESULT} "${FOUND}" PARENT_SCOPE)
endfunction()
