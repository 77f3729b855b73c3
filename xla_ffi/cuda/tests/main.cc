#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  // A queue for each stream: a rank's kernel behind another's would never start.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  ::testing::InitGoogleTest(&count, arguments);
  int gpus = 0;
  const cudaError_t error = cudaGetDeviceCount(&gpus);
  if (error != cudaSuccess || gpus == 0) {
    std::printf("skipped: there is no GPU here (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  return RUN_ALL_TESTS();
}
