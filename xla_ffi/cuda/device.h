// CUDA calls from host code: errors, the driver's functions, which device is current.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>

#include "proxy/error.h"

namespace pplx::moe::cuda {

// Throws kFabric saying what was tried.
void check(cudaError_t status, const std::string& what);
void check(CUresult status, const std::string& what);
// "cudaErrorInvalidValue (invalid argument)"
std::string error_text(cudaError_t status);

// Makes a device current for a scope, which may lie in a program that has made another one current.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  CUcontext before_ = nullptr;
};

// The driver's functions that are used, looked up in the loaded driver: nothing links it, so that the module
// imports on machines without one.
struct Driver {
  static const Driver& get();  // throws kFabric where there is none

  decltype(&cuGetErrorName) get_error_name;
  decltype(&cuCtxGetCurrent) get_current;
  decltype(&cuCtxSetCurrent) set_current;
  decltype(&cuDeviceGetAttribute) device_get_attribute;
  decltype(&cuMemGetAllocationGranularity) get_granularity;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemExportToShareableHandle) export_handle;
  decltype(&cuMemImportFromShareableHandle) import_handle;
  decltype(&cuMemGetHandleForAddressRange) export_range;
};

// A stream of our own, which waits for nobody else's: work on it may be done while programs run.
class Stream {
 public:
  explicit Stream(int device);
  cudaStream_t get() const { return stream_.get(); }
  void wait(const std::string& what) const;  // throws what went wrong

 private:
  struct Destroy {
    void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy> stream_;
};

// Waits for everything that the device has been given, `milliseconds` at most. False: it still runs, or
// could not be waited for.
bool wait_idle(int device, int milliseconds);

int device_count();  // 0 where there is no driver
std::string device_uuid(int device);
bool peer_access(int device, int peer);

}  // namespace pplx::moe::cuda
