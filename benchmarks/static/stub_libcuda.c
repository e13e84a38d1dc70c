/* The part of CUDA's driver that Triton 3.6 to 3.8 and csrc/launch.cpp call to launch a kernel. It checks a launch and runs nothing. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

#undef cuGetErrorString

/* Limits of sm_90 (H100 and H200). */
enum { SHARED = 232448, REGISTERS = 65536, PROCESSORS = 132, THREADS = 1024, WARP = 32 };

static int nothing; /* every handle points here */
static unsigned long long launches;

unsigned long long stub_launches(void) { return launches; }

/* A function that is called with what a launch passes to the driver, or NULL. */
typedef void (*Observer)(CUfunction, const unsigned *grid, const unsigned *block, unsigned shared, CUstream stream,
                         void **arguments);
static Observer observer;

void stub_observe(Observer function) { observer = function; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "the launch configuration is not valid on sm_90" : "stub";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&nothing;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = WARP; break;
    default: *value = 1000; /* clock rates and widths: a launch does not read them */
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)&nothing;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return value > SHARED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Tensors are on the CPU, and their host pointers stand for device pointers. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}

static CUresult launch(CUfunction function, const unsigned grid[3], const unsigned block[3], unsigned shared,
                       CUstream stream, void **arguments) {
  const unsigned threads = block[0] * block[1] * block[2];
  launches++;
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 2147483647u || grid[1] > 65535 ||
      grid[2] > 65535 || threads == 0 || threads > THREADS || shared > SHARED || function == NULL)
    return CUDA_ERROR_INVALID_VALUE;
  if (observer) observer(function, grid, block, shared, stream, arguments);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  const unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  const unsigned block[] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return launch(function, grid, block, c->sharedMemBytes, c->hStream, arguments);
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                        void **arguments, void **extra) {
  const unsigned grid[] = {x, y, z}, block[] = {block_x, block_y, block_z};
  return launch(function, grid, block, shared, stream, arguments);
}
