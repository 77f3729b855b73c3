#include "xla_ffi/cuda/device.h"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace pplx::moe::cuda {
namespace {

// Versions of the functions' types, which the newest header may have changed since.
constexpr unsigned kDriverVersion = 12000;

template <typename F>
void look_up(const char* name, F& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &address, kDriverVersion, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr) {
    throw Error(ErrorKind::kFabric, std::string("the CUDA driver has no ") + name + " (" +
                                        error_text(status) + "): it is missing or older than CUDA 12");
  }
  function = reinterpret_cast<F>(address);
}

Driver load() {
  Driver driver{};
  look_up("cuGetErrorName", driver.get_error_name);
  look_up("cuCtxGetCurrent", driver.get_current);
  look_up("cuCtxSetCurrent", driver.set_current);
  look_up("cuDeviceGetAttribute", driver.device_get_attribute);
  look_up("cuMemGetAllocationGranularity", driver.get_granularity);
  look_up("cuMemCreate", driver.create);
  look_up("cuMemRelease", driver.release);
  look_up("cuMemAddressReserve", driver.reserve);
  look_up("cuMemAddressFree", driver.unreserve);
  look_up("cuMemMap", driver.map);
  look_up("cuMemUnmap", driver.unmap);
  look_up("cuMemSetAccess", driver.set_access);
  look_up("cuMemExportToShareableHandle", driver.export_handle);
  look_up("cuMemImportFromShareableHandle", driver.import_handle);
  look_up("cuMemGetHandleForAddressRange", driver.export_range);
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver kDriver = load();
  return kDriver;
}

std::string error_text(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")";
}

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  // Otherwise the next call of somebody else would report it.
  static_cast<void>(cudaGetLastError());
  throw Error(ErrorKind::kFabric, what + ": " + error_text(status));
}

void check(CUresult status, const std::string& what) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  Driver::get().get_error_name(status, &name);
  throw Error(ErrorKind::kFabric, what + ": " + (name != nullptr ? name : "unknown CUDA driver error"));
}

// Not cudaSetDevice() to go back: on a thread that had no device it would start CUDA on the first one.
OnDevice::OnDevice(int device) {
  check(Driver::get().get_current(&before_), "asking for the current CUDA context");
  check(cudaSetDevice(device), "using CUDA device " + std::to_string(device));
}

OnDevice::~OnDevice() { Driver::get().set_current(before_); }

Stream::Stream(int device) {
  const OnDevice current(device);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
        "making a stream on CUDA device " + std::to_string(device));
  stream_.reset(stream);
}

void Stream::wait(const std::string& what) const { check(cudaStreamSynchronize(stream_.get()), what); }

bool wait_idle(int device, int milliseconds) {
  // The runtime has no wait with a deadline for all streams, so a thread waits that may be left behind.
  struct Waiting {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false, idle = false;
  };
  auto waiting = std::make_shared<Waiting>();
  std::thread([waiting, device] {
    const bool idle = cudaSetDevice(device) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
    const std::lock_guard guard(waiting->mutex);
    waiting->idle = idle;
    waiting->done = true;
    waiting->changed.notify_all();
  }).detach();
  std::unique_lock lock(waiting->mutex);
  waiting->changed.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return waiting->done; });
  return waiting->idle;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return count;
}

std::string device_uuid(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device),
        "asking for the properties of CUDA device " + std::to_string(device));
  std::string uuid;
  for (const char byte : properties.uuid.bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    const auto value = static_cast<unsigned char>(byte);
    uuid += {kDigits[value >> 4], kDigits[value & 15]};
  }
  return uuid;
}

bool peer_access(int device, int peer) {
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, device, peer), "asking for peer access between CUDA devices");
  return can != 0;
}

}  // namespace pplx::moe::cuda
