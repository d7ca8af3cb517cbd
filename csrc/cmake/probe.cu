// What cuda.cmake compiles to see whether nvcc works: the header, the library and the code generator.
#include <cuda_runtime.h>

#include <cstdint>

struct Argument {
    uint32_t word;
};

__global__ void probe(const __grid_constant__ Argument argument, uint32_t* out) { *out = argument.word; }
