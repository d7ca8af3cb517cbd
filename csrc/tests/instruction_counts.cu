// One kernel for each phase and warp, without loops, for bench/cuda_static.py to count: they are never run.
#define HYPERSPACE_STRAIGHT_LINE
#include "../cuda/code.h"
#include "../cuda/paged.h"

using namespace hyperspace::cuda;

#define COUNT(name, Kernel, phase, warp)                                                   \
    extern "C" __global__ void __launch_bounds__(kLanes)                                   \
        name##_##phase##_##warp(const __grid_constant__ Kernel::Params params) {           \
        extern __shared__ __align__(16) unsigned char shared[];                            \
        Kernel::run<phase>(params, *reinterpret_cast<Kernel::Shared*>(shared), blockIdx.x, \
                           warp * kLanes + threadIdx.x % kLanes);                          \
    }
#define COUNT_WARPS(name, Kernel, phase) \
    COUNT(name, Kernel, phase, 0)        \
    COUNT(name, Kernel, phase, 1)        \
    COUNT(name, Kernel, phase, 2)        \
    COUNT(name, Kernel, phase, 3)

COUNT(kv_gather, Gather<true>, 0, 0)
COUNT(kv_scatter, Scatter<true>, 0, 0)
COUNT_WARPS(rs_encode, Encode, 0)
COUNT_WARPS(rs_encode, Encode, 1)
COUNT_WARPS(rs_encode, Encode, 2)
COUNT_WARPS(rs_encode, Encode, 3)
COUNT_WARPS(rs_decode, Decode, 0)
COUNT_WARPS(rs_decode, Decode, 1)
COUNT_WARPS(rs_decode, Decode, 2)
COUNT_WARPS(rs_decode, Decode, 3)
COUNT_WARPS(rs_decode, Decode, 4)
