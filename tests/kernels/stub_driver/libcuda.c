// The part of the CUDA driver that Triton's launcher calls, without a device: answers as an H200
// and writes down what is launched. Built by this folder's __init__.py.
#include <cuda.h>
#include <string.h>

enum { MAX_PARAMS = 256, MAX_RECORDS = 64, MAX_FUNCTIONS = 4096, MAX_NAME = 128 };

typedef struct {
  unsigned int grid[3];
  unsigned int block[3];
  unsigned int shared;
  unsigned int num_attributes;
  unsigned long long stream;
  unsigned long long function;
  unsigned int num_params;
  unsigned long long params[MAX_PARAMS];
} Record;

static Record records[MAX_RECORDS];
static int num_records = 0;
static int num_launches = 0;
static int sizes[MAX_FUNCTIONS][MAX_PARAMS];
static int num_sizes[MAX_FUNCTIONS];  // 0: its launches are counted, not written down
static char names[MAX_FUNCTIONS][MAX_NAME];
static unsigned long long num_functions = 0;
static CUcontext current = NULL;

// What the tests call.

// The sizes of a function's parameters: what is launched does not say them.
void stub_expect(unsigned long long function, int count, const int *param_sizes) {
  num_sizes[function] = count < MAX_PARAMS ? count : MAX_PARAMS;
  memcpy(sizes[function], param_sizes, num_sizes[function] * sizeof(int));
}

void stub_clear(void) { num_records = 0; }
int stub_num_records(void) { return num_records; }
int stub_num_launches(void) { return num_launches; }
const Record *stub_record(int n) { return &records[n]; }
const char *stub_name(unsigned long long function) { return names[function % MAX_FUNCTIONS]; }

// What Triton calls.

CUresult CUDAAPI cuInit(unsigned int flags) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stubbed driver";
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult CUDAAPI cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)(++num_functions);
  return num_functions < MAX_FUNCTIONS ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

// A module has one kernel, of the module's number: every load is another function.
CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  strncpy(names[(unsigned long long)module], name, MAX_NAME - 1);
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute attribute,
                                    CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                    int value) {
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return CUDA_SUCCESS;
}

// All memory is the device's: so tensors on the CPU are taken.
CUresult CUDAAPI cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                       CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                              const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                                  void **params, void **extra) {
  ++num_launches;
  const unsigned long long number = (unsigned long long)function;
  if (num_sizes[number] == 0) return CUDA_SUCCESS;
  if (num_records == MAX_RECORDS) return CUDA_ERROR_OUT_OF_MEMORY;
  Record *record = &records[num_records++];
  memset(record, 0, sizeof *record);
  record->grid[0] = config->gridDimX;
  record->grid[1] = config->gridDimY;
  record->grid[2] = config->gridDimZ;
  record->block[0] = config->blockDimX;
  record->block[1] = config->blockDimY;
  record->block[2] = config->blockDimZ;
  record->shared = config->sharedMemBytes;
  record->num_attributes = config->numAttrs;
  record->stream = (unsigned long long)config->hStream;
  record->function = number;
  record->num_params = num_sizes[number];
  for (int n = 0; n < num_sizes[number]; ++n) {
    memcpy(&record->params[n], params[n], sizes[number][n]);
  }
  return CUDA_SUCCESS;
}
