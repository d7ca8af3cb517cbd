# Sets HYPERSPACE_CUDA_WORKS and CMAKE_CUDA_ARCHITECTURES. AUTO must never fail a `pip install .`, and
# enable_language(CUDA) ends the configuration when nvcc is broken or doesn't know an architecture, so nvcc compiles a
# separate probe first.
set(HYPERSPACE_CUDA_WORKS OFF)
if(HYPERSPACE_CUDA STREQUAL "OFF")
    return()
endif()

# A100, H100, B200, and PTX of the last for later ones. nvcc before 12.8 doesn't know the B200.
function(find_architectures)
    set(reason "found no CUDA compiler")
    foreach(architectures IN ITEMS "80;90;100" "80;90")
        if(NOT CMAKE_CUDA_COMPILER)
            break()
        endif()
        set(gencode "")
        foreach(arch IN LISTS architectures)
            list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
        endforeach()
        execute_process(
            COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 ${gencode} -c -o probe.o ${CMAKE_CURRENT_SOURCE_DIR}/cmake/probe.cu
            WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
            RESULT_VARIABLE failed OUTPUT_VARIABLE reason ERROR_VARIABLE reason)
        if(NOT failed)
            list(TRANSFORM architectures APPEND -real REGEX "^[89]0$")
            if(NOT 100 IN_LIST architectures)
                string(REPLACE "90-real" "90" architectures "${architectures}")
            endif()
            set(CMAKE_CUDA_ARCHITECTURES ${architectures} PARENT_SCOPE)
            return()
        endif()
    endforeach()
    if(HYPERSPACE_CUDA STREQUAL "ON")
        message(FATAL_ERROR "HYPERSPACE_CUDA=ON, but nvcc doesn't work: ${reason}")
    endif()
    message(STATUS "Building without CUDA (HYPERSPACE_CUDA=AUTO): ${reason}")
    set(CMAKE_CUDA_ARCHITECTURES OFF PARENT_SCOPE)
endfunction()

include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES 80)
check_language(CUDA)
find_architectures()
if(CMAKE_CUDA_ARCHITECTURES)
    enable_language(CUDA)
    set(HYPERSPACE_CUDA_WORKS ON)
endif()
