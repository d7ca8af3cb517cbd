// The kernels behind plain functions, twice: launch.cu runs them on a GPU, launch_host.cpp on the CPU for
// tests.
//
// Each enqueues on `stream` of `device` and returns nullptr, or an error text. Callers have checked all
// sizes.
#pragma once

#include "code.h"
#include "paged.h"

namespace hyperspace::cuda {

using Stream = void*;  // cudaStream_t

// Why there is no usable device; nullptr when there is one.
const char* why_unavailable();
bool is_device_memory(const void* pointer, int device);

// Blocks the host; for tables that are created once.
const char* copy_to_device(const void* from, size_t bytes, int device, void** to);
void free_on_device(void* pointer, int device);

// `aligned`: every base, stride and run is a multiple of 16 bytes.
const char* launch_gather(const CopyParams& params, bool aligned, int device, Stream stream);
const char* launch_scatter(const CopyParams& params, bool aligned, int device, Stream stream);
const char* launch_encode(const EncodeParams& params, int device, Stream stream);
const char* launch_decode(const DecodeParams& params, int device, Stream stream);

}  // namespace hyperspace::cuda
