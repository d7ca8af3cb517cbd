# Sets HYPERSPACE_CUDA_WORKS. AUTO must never fail a `pip install .`, and enable_language(CUDA) ends the
# configuration when nvcc is broken or doesn't know an architecture: so nvcc compiles a kernel first, beside it.
set(HYPERSPACE_CUDA_WORKS OFF)
if(HYPERSPACE_CUDA STREQUAL "OFF")
    return()
endif()

include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES 80 90 100)
check_language(CUDA)
if(HYPERSPACE_CUDA STREQUAL "AUTO")
    set(reason "found no CUDA compiler")
    if(CMAKE_CUDA_COMPILER)
        foreach(arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
            list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
        endforeach()
        execute_process(
            COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 --expt-relaxed-constexpr ${gencode} -I${CMAKE_CURRENT_SOURCE_DIR}/include
                    -c -o probe.o ${CMAKE_CURRENT_SOURCE_DIR}/cuda/encode.cu
            WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
            RESULT_VARIABLE failed OUTPUT_VARIABLE reason ERROR_VARIABLE reason)
    endif()
    if(NOT CMAKE_CUDA_COMPILER OR failed)
        message(STATUS "Building without CUDA (HYPERSPACE_CUDA=AUTO): ${reason}")
        return()
    endif()
endif()
enable_language(CUDA)
set(HYPERSPACE_CUDA_WORKS ON)
