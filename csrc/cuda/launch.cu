// Runs the kernel bodies on a GPU: a barrier of the block between phases.
#include <cuda_runtime.h>

#include "launch.h"

namespace hyperspace::cuda {
namespace {

template <class Kernel, int Phase>
__device__ __forceinline__ void run_from(const typename Kernel::Params& params,
                                         typename Kernel::Shared& shared) {
    if constexpr (Phase > 0) __syncthreads();
    Kernel::template run<Phase>(params, shared, blockIdx.x, threadIdx.x);
    if constexpr (Phase + 1 < Kernel::kPhases) run_from<Kernel, Phase + 1>(params, shared);
}

// __grid_constant__: arguments indexed at run time stay in place, instead of in each thread's stack.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    run_kernel(const __grid_constant__ typename Kernel::Params params) {
    extern __shared__ __align__(16) unsigned char shared[];
    run_from<Kernel, 0>(params, *reinterpret_cast<typename Kernel::Shared*>(shared));
}

// Selects the calling thread's device for its own lifetime.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    cudaError_t error() const { return error_; }

  private:
    int before_ = 0;
    cudaError_t error_;
};

const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Kernel>
const char* launch(const typename Kernel::Params& params, int device, Stream stream) {
    static_assert(sizeof params <= 4096, "what a kernel takes by value on every architecture");
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return words(on.error());
    constexpr int shared = static_cast<int>(sizeof(typename Kernel::Shared));
    if constexpr (shared > 48 * 1024) {  // more than that must be asked for, on each device
        const cudaError_t error =
            cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return words(error);
    }
    run_kernel<Kernel>
        <<<Kernel::blocks(params), Kernel::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(params);
    return words(cudaGetLastError());
}

}  // namespace

const char* why_unavailable() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return words(error);
    return devices > 0 ? nullptr : "no CUDA device";
}

bool is_device_memory(const void* pointer, int device) {
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
        cudaGetLastError();  // otherwise the next launch would report it
        return false;
    }
    return (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged) &&
           attributes.device == device;
}

const char* copy_to_device(const void* from, size_t bytes, int device, void** to) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return words(on.error());
    if (const cudaError_t error = cudaMalloc(to, bytes)) return words(error);
    if (const cudaError_t error = cudaMemcpy(*to, from, bytes, cudaMemcpyHostToDevice)) {
        cudaFree(*to);
        return words(error);
    }
    return nullptr;
}

void free_on_device(void* pointer, int device) {
    const OnDevice on(device);
    if (on.error() == cudaSuccess) cudaFree(pointer);
}

const char* launch_gather(const CopyParams& params, bool aligned, int device, Stream stream) {
    return (aligned ? launch<Gather<true>> : launch<Gather<false>>)(params, device, stream);
}
const char* launch_scatter(const CopyParams& params, bool aligned, int device, Stream stream) {
    return (aligned ? launch<Scatter<true>> : launch<Scatter<false>>)(params, device, stream);
}
const char* launch_encode(const EncodeParams& params, int device, Stream stream) {
    return launch<Encode>(params, device, stream);
}
const char* launch_decode(const DecodeParams& params, int device, Stream stream) {
    return launch<Decode>(params, device, stream);
}

}  // namespace hyperspace::cuda
